import Fastify from 'fastify'
import { Webhook } from 'svix'
import { PATH, SECRET } from '../deliveries.mjs'

export async function build () {
  const webhook = new Webhook(SECRET)
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
