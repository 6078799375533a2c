// The practical limit: the least that authenticates the bytes, by hand. A timestamp of any age passes, no type or shape is
// checked, nothing is dispatched, and nothing is remembered.
import { createHmac, createSecretKey, timingSafeEqual } from 'node:crypto'
import Fastify from 'fastify'
import { PATH, SECRET } from '../deliveries.mjs'

export async function build () {
  const key = createSecretKey(Buffer.from(SECRET.slice('whsec_'.length), 'base64'))
  const app = Fastify()
  app.addContentTypeParser('application/json', { parseAs: 'buffer' }, (request, body, done) => { done(null, body) })
  app.post(PATH, (request, reply) => {
    const { 'webhook-id': id, 'webhook-timestamp': timestamp, 'webhook-signature': signature } = request.headers
    if (!id || !timestamp || !signature) return reply.code(401).send({ error: 'headers are missing' })
    const expected = createHmac('sha256', key).update(`${id}.${timestamp}.`).update(request.body).digest()
    const given = Buffer.from(signature.slice('v1,'.length), 'base64')
    if (given.length !== expected.length || !timingSafeEqual(given, expected)) return reply.code(401).send({ error: 'the signature does not match' })
    request.body = JSON.parse(request.body.toString())
    reply.send({ received: true })
  })
  return app
}
