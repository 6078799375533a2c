// The lower limit: parses JSON and checks nothing. With `status`, every delivery is refused with a constant answer.
import Fastify from 'fastify'
import { PATH } from '../deliveries.mjs'

const REFUSED = { statusCode: 401, code: 'UNAUTHORIZED', error: 'Unauthorized', message: 'The request is not signed.' }

/** @param {{ status?: number }} [options] */
export async function build ({ status } = {}) {
  const app = Fastify()
  app.post(PATH, status === undefined ? (request, reply) => { reply.send({ received: true }) } : (request, reply) => { reply.code(status).send(REFUSED) })
  return app
}
