// The limit: parses JSON and checks nothing. With `status` it refuses everything by a constant.
import Fastify from 'fastify'
import { PATH } from '../deliveries.mjs'

const REFUSED = { statusCode: 401, code: 'UNAUTHORIZED', error: 'Unauthorized', message: 'The request is not signed.' }

/** @param {{ status?: number }} [options] */
export async function build ({ status } = {}) {
  const app = Fastify()
  app.post(PATH, status === undefined ? (request, reply) => { reply.send({ received: true }) } : (request, reply) => { reply.code(status).send(REFUSED) })
  return app
}
