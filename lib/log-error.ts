import type { FastifyBaseLogger } from 'fastify'

/** Characters of an error's message, and of its stack, that are logged. */
const MAX_TEXT = 10_000

/**
 * Logs what a user's code threw: clipped where it is huge, and in place of one that cannot be read (a getter that
 * throws) a line that says so. A logger reads errors as it is called, and must not fail the delivery with them.
 */
export function logError (log: FastifyBaseLogger, error: unknown, fields: object, message: string): void {
  try {
    log.error({ err: clipped(error), ...fields }, message)
  } catch {
    log.error({ err: new Error('an error that cannot be read'), ...fields }, message)
  }
}

function clipped (error: unknown): unknown {
  if (typeof error === 'string') return error.slice(0, MAX_TEXT)
  if (error instanceof AggregateError) return new AggregateError(error.errors.map(clipped), error.message.slice(0, MAX_TEXT))
  if (!(error instanceof Error)) return error
  const { message, stack = '' } = error
  if (message.length <= MAX_TEXT && stack.length <= MAX_TEXT) return error
  const copy = new Error(message.slice(0, MAX_TEXT))
  copy.name = error.name
  copy.stack = stack.slice(0, MAX_TEXT)
  return copy
}
