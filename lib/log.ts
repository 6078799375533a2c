import type { FastifyBaseLogger } from 'fastify'

/** Maximum number of characters in the message of an error, and in its stack. */
const MAX_TEXT = 10_000
/** Maximum number of nested causes. */
const MAX_CAUSES = 5
/** Maximum number of errors in an AggregateError. */
const MAX_ERRORS = 100

/**
 * Logs what a user's code threw. A huge error is clipped. An error that cannot be read, because a getter throws, is replaced by one that says so:
 * a logger reads the error when it is called, and must not fail the delivery.
 */
export function logError (log: FastifyBaseLogger, error: unknown, fields: object, message: string): void {
  try {
    log.error({ err: clipped(error), ...fields }, message)
  } catch {
    write(log, 'error', { err: new Error('an error that cannot be read'), ...fields }, message)
  }
}

/** Logs a line. Ignores errors, because a full disk, or a `mixin` of the user that throws, must not fail the delivery. */
export function write (log: FastifyBaseLogger, level: 'info' | 'warn' | 'error', fields: object, message: string): void {
  try {
    log[level](fields, message)
  } catch {}
}

function clipped (error: unknown, causes = MAX_CAUSES): unknown {
  if (typeof error === 'string') return error.slice(0, MAX_TEXT)
  if (!(error instanceof Error)) return error
  hideCommands(error)
  const { message, stack = '', cause } = error
  const errors = error instanceof AggregateError ? error.errors.slice(0, MAX_ERRORS).map(each => clipped(each, causes)) : undefined
  const clippedCause = causes === 0 ? undefined : clipped(cause, causes - 1)
  if (errors === undefined && message.length <= MAX_TEXT && stack.length <= MAX_TEXT && clippedCause === cause) return error
  const options = clippedCause === undefined ? undefined : { cause: clippedCause }
  const text = message.slice(0, MAX_TEXT)
  const copy = errors === undefined ? new Error(text, options) : new AggregateError(errors, text, options)
  copy.name = error.name
  copy.stack = stack.slice(0, MAX_TEXT)
  return copy
}

/**
 * An error of ioredis has the command that failed, with its arguments: a password, or an event. So have the errors in its `previousErrors` and
 * `lastNodeError`. A logger shows what is enumerable.
 */
function hideCommands (error: Error, seen = new Set<Error>()): void {
  if (seen.has(error)) return
  seen.add(error)
  if (typeof (error as { command?: unknown }).command === 'object') Reflect.defineProperty(error, 'command', { enumerable: false })
  for (const each of Object.values(error).flat()) if (each instanceof Error) hideCommands(each, seen)
}

/** Maximum number of characters in the id and in the type of an event, which a schema need not limit. */
const MAX_NAME = 256

const nameOf = (value: unknown): string | undefined => typeof value === 'string' ? value.slice(0, MAX_NAME) : undefined

/** What is known about a delivery. */
export interface Described {
  readonly endpoint?: string | undefined
  readonly tenant?: string | undefined
  readonly webhookId?: string | undefined
  readonly event?: { readonly type: string, readonly id?: unknown } | undefined
}

/** What is known about a delivery that is not answered 200. */
export type RefusedDelivery = Described & { readonly endpoint: string }

/** The fields of every line about a delivery. A caller may add to them. */
export function logFields ({ endpoint, tenant, webhookId, event }: Described, attempt?: number): Record<string, unknown> {
  const fields: Record<string, unknown> = { webhookId: nameOf(webhookId), eventId: nameOf(event?.id), eventType: nameOf(event?.type), endpoint }
  if (tenant !== undefined) fields['tenant'] = tenant
  if (attempt !== undefined) fields['attempt'] = attempt
  return fields
}

/** Whether a line of this level is written. To be called first, because the fields of a line cost more than the dispatch. */
export function logs (log: FastifyBaseLogger, level: 'info' | 'warn'): boolean {
  const { isLevelEnabled } = log as { isLevelEnabled?: (level: string) => boolean }
  // The logger for Fastify's `logger: false` has the same function for all levels.
  return isLevelEnabled === undefined ? log[level] !== log.fatal : isLevelEnabled.call(log, level)
}
