// The usual receiver with a library that verifies the Standard Webhooks scheme and parses the body.
import Fastify from 'fastify'
import { PATH } from '../deliveries.mjs'

/** @param {{ verify (body: string, headers: object): unknown }} webhook throws unless the signature matches */
export function buildWith (webhook) {
  const app = Fastify()
  app.addContentTypeParser('application/json', { parseAs: 'string' }, (request, body, done) => { done(null, body) })
  app.post(PATH, (request, reply) => {
    try {
      request.body = webhook.verify(request.body, request.headers)
    } catch {
      return reply.code(401).send({ error: 'not verified' })
    }
    reply.send({ received: true })
  })
  return app
}
