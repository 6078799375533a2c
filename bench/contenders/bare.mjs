// The limit: parses JSON and checks nothing.
import Fastify from 'fastify'
import { PATH } from '../deliveries.mjs'

export async function build () {
  const app = Fastify()
  app.post(PATH, (request, reply) => { reply.send({ received: true }) })
  return app
}
