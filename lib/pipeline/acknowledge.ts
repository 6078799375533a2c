import type { FastifyReply } from 'fastify'
import { acknowledged } from './answer.ts'

const RECEIVED = '{"received":true}'
const DUPLICATE = '{"received":true,"duplicate":true}'

/** Seconds. OpenAI backs off on its own; this is for whatever stands between. */
const RETRY_AFTER = '5'

/** 200: OpenAI's guide has it that any other status is retried. */
export function acknowledge (reply: FastifyReply, outcome: 'processed' | 'duplicate'): void {
  acknowledged(reply.request)
  reply
    .code(200)
    .header('content-type', 'application/json; charset=utf-8')
    .send(outcome === 'duplicate' ? DUPLICATE : RECEIVED)
}

/** Not 200, so the delivery comes again. Answered by the app's own error handler. */
export function refuse (reply: FastifyReply, error: unknown): void {
  const { statusCode } = error as { statusCode?: number }
  if (statusCode === 409 || statusCode === 503) retryLater(reply)
  reply.send(error)
}

export function retryLater (reply: FastifyReply): void {
  reply.header('retry-after', RETRY_AFTER)
}
