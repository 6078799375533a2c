import { HandlerFailed } from '../errors.ts'
import type { DeadDelivery, DeliveryError, Job } from './runner.ts'

/** What one handler threw. */
export interface HandlerFailure {
  readonly handler: string
  readonly error: unknown
}

/** Characters that are kept of a message, of a stack, of all of it, and of the line that sums it up. */
const MAX_MESSAGE = 2_000
const MAX_STACK = 5_000
const MAX_TEXT = 10_000
const MAX_SUMMARY = 1_000
/** Errors of one delivery that are kept. */
const MAX_ERRORS = 20
/** Levels of causes, and errors of an AggregateError, whose stacks are kept. */
const MAX_DEPTH = 3
const MAX_INNER = 3

interface Failed {
  readonly failures: readonly HandlerFailure[]
  readonly finished: readonly string[]
  readonly remembered: Job['remembered']
}

/** In a WeakMap and not on the error, or a logger would write it out. */
const failed = new WeakMap<Error, Failed>()

/**
 * Makes the error of a delivery whose handlers failed. Its cause is for logs and dead letters; no sender sees it.
 *
 * @param handlers how many there were
 * @param finished those that have succeeded, in this attempt and before
 * @param remembered those that have used an inbox, likewise
 */
export function handlersFailed (failures: readonly HandlerFailure[], handlers: number, finished: readonly string[], remembered?: Job['remembered']): Error {
  const errors = failures.map(({ error }) => error)
  const summary = `${errors.length} of ${handlers} handlers failed: ${errors.map(error => textOf(error)).join('; ').slice(0, MAX_SUMMARY)}`
  const cause = new AggregateError(errors, summary)
  // Logs and dead letters show this stack first. That of the plugin's own code would say nothing.
  cause.stack = `AggregateError: ${summary}${failures.map(named).join('')}`.slice(0, MAX_TEXT)
  const error = new HandlerFailed({ cause })
  // A queue may pass on the cause alone.
  for (const each of [error, cause]) failed.set(each, { failures, finished, remembered })
  return error
}

function named ({ handler, error }: HandlerFailure): string {
  return `\nhandler "${handler}": ${stackOf(error) || textOf(error)}`
}

/** Whether handlers failed, and not a store or a queue. */
export function isHandlersFailure (error: unknown): boolean {
  return failed.has(error as Error)
}

/** The error that a log and a queue show. */
export function causeOf (error: unknown): unknown {
  try {
    return (error as { cause?: unknown } | null | undefined)?.cause ?? error
  } catch {
    return error // a getter that throws
  }
}

/** What a dead letter keeps of a failed attempt. @param error as `host.process` rejected */
export function describeFailure (job: Job, error: unknown): Pick<DeadDelivery, 'errors' | 'finished' | 'remembered'> {
  const handlers = failed.get(error as Error)
  if (handlers !== undefined) {
    const { failures, finished, remembered } = handlers
    const errors = failures.slice(0, MAX_ERRORS).map(({ handler, error }) => describe(handler, error))
    return { errors, finished, ...(remembered !== undefined && { remembered }) }
  }
  const { finished = [], remembered } = job
  return { errors: [describe(null, causeOf(error))], finished, ...(remembered !== undefined && { remembered }) }
}

/** A job with what its attempts have left. */
export function resumed (job: Job, { finished = [], remembered }: { finished?: Job['finished'] | undefined, remembered?: Job['remembered'] | undefined }): Job {
  return { ...job, ...(finished.length > 0 && { finished }), ...(remembered !== undefined && { remembered }) }
}

/** An error as it is kept: cut, and read in spite of getters that throw. */
export function describe (handler: string | null, error: unknown): DeliveryError {
  return { handler, message: textOf(error, MAX_MESSAGE), stack: stackOf(error) }
}

/**
 * Makes a dead delivery of a job that is not run again.
 *
 * @param attempts how often its handlers were started
 * @param error as `host.process` rejected, or why there was no other attempt
 * @param diedAt ms since the epoch
 */
export function deadDelivery (job: Job, attempts: number, error: unknown, diedAt = Date.now()): DeadDelivery {
  return { ...job, attempts, ...describeFailure(job, error), diedAt }
}

/** A line about anything that was thrown. */
function textOf (error: unknown, max = MAX_SUMMARY): string {
  try {
    // Not instanceof: an error may be of another realm.
    const text = typeof error === 'string' ? error : (error as { message?: unknown } | null | undefined)?.message
    return typeof text === 'string' ? text.slice(0, max) : `threw ${error === null ? 'null' : typeof error}`
  } catch {
    return 'an error that cannot be read'
  }
}

/** The stacks of an error and of its causes. */
function stackOf (error: unknown, depth = MAX_DEPTH): string {
  try {
    const { stack, cause, errors } = (error ?? {}) as { stack?: unknown, cause?: unknown, errors?: unknown }
    const own = typeof stack === 'string' ? stack.slice(0, MAX_STACK) : ''
    if (depth === 0) return own
    const inner = [...(Array.isArray(errors) ? errors.slice(0, MAX_INNER) : []), cause].map(each => stackOf(each, depth - 1)).filter(text => text !== '')
    return [own, ...inner].join('\ncaused by: ').slice(0, MAX_STACK)
  } catch {
    return ''
  }
}
