import type { FastifyReply } from 'fastify'
import { isAnswerHeld, isHandlerTimeout, markAcknowledged, markRefused } from './refusal.ts'

const RECEIVED = '{"received":true}'
const DUPLICATE = '{"received":true,"duplicate":true}'

/** Seconds. For proxies, because OpenAI has its own backoff. */
const RETRY_AFTER = '5'

/** Answers exactly 200, because OpenAI's documents differ on whether another 2xx is retried. */
export function acknowledge (reply: FastifyReply, outcome: 'processed' | 'duplicate'): void {
  markAcknowledged(reply.request)
  reply
    .code(200)
    .header('content-type', 'application/json; charset=utf-8')
    .send(outcome === 'duplicate' ? DUPLICATE : RECEIVED)
}

/** Answers with an error, through the app's error handler, so that OpenAI sends the delivery again. */
export function refuse (reply: FastifyReply, error: unknown): void {
  // Marked before it is sent, because a hook of the app may have replaced `send`.
  markRefused(error, reply.request, reply)
  reply.send(error)
}

/** For a reply that is about to be refused: Fastify's timer catches nothing, and `send` throws while an async onError hook of the app holds the refusal. */
export function holdTimeout (reply: FastifyReply): void {
  const { send } = reply
  const held = (payload: unknown): FastifyReply => {
    try {
      return send.call(reply, payload)
    } catch (error) {
      if (!isHandlerTimeout(payload) || !isAnswerHeld(error)) throw error
      return reply
    }
  }
  reply.send = held
}

/** Closes an HTTP/1 connection after this answer. HTTP/2 has no such header, and Node warns about it. */
export function closeConnection (reply: FastifyReply): void {
  if (reply.request.raw.httpVersionMajor !== 2) reply.header('connection', 'close')
}

export function retryLater (reply: FastifyReply): void {
  reply.header('retry-after', RETRY_AFTER)
}
