// The practical limit: the least code that authenticates the bytes. It accepts timestamps of any age, checks neither type nor shape,
// dispatches nothing and remembers nothing.
import { createHmac, createSecretKey, timingSafeEqual } from 'node:crypto'
import Fastify from 'fastify'
import { PATH, SECRET, logTo } from '../deliveries.mjs'

/** @param {{ logger?: boolean, directory?: string }} [options] logger: writes the same log as ours, a line for each delivery */
export async function build ({ logger = false, directory } = {}) {
  const key = createSecretKey(Buffer.from(SECRET.slice('whsec_'.length), 'base64'))
  const app = Fastify({ logger: logger && logTo({ directory }) })
  app.addContentTypeParser('application/json', { parseAs: 'buffer' }, (request, body, done) => { done(null, body) })
  app.post(PATH, (request, reply) => {
    const { 'webhook-id': id, 'webhook-timestamp': timestamp, 'webhook-signature': signature } = request.headers
    if (!id || !timestamp || !signature) return reply.code(401).send({ error: 'headers are missing' })
    const expected = createHmac('sha256', key).update(`${id}.${timestamp}.`).update(request.body).digest()
    const given = Buffer.from(signature.slice('v1,'.length), 'base64')
    if (given.length !== expected.length || !timingSafeEqual(given, expected)) return reply.code(401).send({ error: 'the signature does not match' })
    request.body = JSON.parse(request.body.toString())
    if (logger) request.log.info({ webhookId: id, type: request.body.type }, 'webhook delivery processed')
    reply.send({ received: true })
  })
  return app
}
