import type { FastifyReply } from 'fastify'
import { markAcknowledged, markRefused } from './answer.ts'

const RECEIVED = '{"received":true}'
const DUPLICATE = '{"received":true,"duplicate":true}'

/** Seconds. OpenAI has a backoff of its own; this is for proxies. */
const RETRY_AFTER = '5'

/** Answers 200: OpenAI's documents differ on whether it retries after another 2xx. */
export function acknowledge (reply: FastifyReply, outcome: 'processed' | 'duplicate'): void {
  markAcknowledged(reply.request)
  reply
    .code(200)
    .header('content-type', 'application/json; charset=utf-8')
    .send(outcome === 'duplicate' ? DUPLICATE : RECEIVED)
}

/** Answers through the app's error handler, and not 200, so that the delivery comes again. */
export function refuse (reply: FastifyReply, error: unknown): void {
  // Before it is sent: a hook of the app may have put a function of its own in place of `send`.
  markRefused(error, reply.request, reply)
  const { statusCode } = error as { statusCode?: number }
  if (statusCode === 409 || statusCode === 503) retryLater(reply)
  reply.send(error)
}

/** After this answer, where the connection is of HTTP/1: HTTP/2 has no such header, and Node warns of it. */
export function closeConnection (reply: FastifyReply): void {
  if (reply.request.raw.httpVersionMajor !== 2) reply.header('connection', 'close')
}

export function retryLater (reply: FastifyReply): void {
  reply.header('retry-after', RETRY_AFTER)
}
