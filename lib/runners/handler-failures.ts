import { HandlerFailed } from '../errors.ts'
import type { DeadDelivery, DeliveryError, Job } from './runner.ts'

/** What one handler threw. */
export interface HandlerFailure {
  readonly handler: string
  readonly error: unknown
}

/** Maximum number of characters of a message, of a stack, of the combined stack of a delivery, and of a summary line. */
const MAX_MESSAGE = 2_000
const MAX_STACK = 5_000
const MAX_TEXT = 10_000
const MAX_SUMMARY = 1_000
/** Maximum number of errors that are kept of one delivery. */
const MAX_ERRORS = 20
/** Stacks are kept of this many levels of causes, and of this many errors of an AggregateError. */
const MAX_DEPTH = 3
const MAX_INNER = 3

interface Failed {
  readonly failures: readonly HandlerFailure[]
  readonly finished: readonly string[]
  readonly remembered: Job['remembered']
}

/** Kept in a WeakMap and not on the error, because a logger would write out a property of the error. */
const failed = new WeakMap<Error, Failed>()

/**
 * Makes the error of a delivery whose handlers failed. The error's cause is for logs and dead letters; no sender sees it.
 *
 * @param handlers how many handlers the delivery has
 * @param finished the handlers that have succeeded, in this attempt and before
 * @param remembered the handlers that have used an inbox, in this attempt and before
 */
export function handlersFailed (failures: readonly HandlerFailure[], handlers: number, finished: readonly string[], remembered?: Job['remembered']): Error {
  const errors = failures.map(({ error }) => error)
  const summary = `${errors.length} of ${handlers} handlers failed: ${errors.map(error => textOf(error)).join('; ').slice(0, MAX_SUMMARY)}`
  const cause = new AggregateError(errors, summary)
  // Logs and dead letters show this stack first. A stack of the plugin's own code would say nothing.
  cause.stack = `AggregateError: ${summary}${failures.map(named).join('')}`.slice(0, MAX_TEXT)
  const error = new HandlerFailed({ cause })
  // Both, because a queue may pass on only the cause.
  for (const each of [error, cause]) failed.set(each, { failures, finished, remembered })
  return error
}

function named ({ handler, error }: HandlerFailure): string {
  return `\nhandler "${handler}": ${stackOf(error) || textOf(error)}`
}

/** Whether this is the error of failed handlers, and not that of a store or a queue. */
export function isHandlersFailure (error: unknown): boolean {
  return failed.has(error as Error)
}

/** The error that logs and queues show: the cause, or the error itself if it has no cause. */
export function causeOf (error: unknown): unknown {
  try {
    return (error as { cause?: unknown } | null | undefined)?.cause ?? error
  } catch {
    return error // a getter that throws
  }
}

/** Describes a failed attempt, as a dead letter keeps it. @param error with which `host.process` rejected */
export function describeFailure (job: Job, error: unknown): Pick<DeadDelivery, 'errors' | 'finished' | 'remembered'> {
  const handlers = failed.get(error as Error)
  const failures = handlers?.failures ?? [{ handler: null, error: causeOf(error) }]
  const { finished = [], remembered } = handlers ?? job
  const errors = failures.slice(0, MAX_ERRORS).map(({ handler, error }) => deliveryError(handler, error))
  return { errors, finished, ...(remembered !== undefined && { remembered }) }
}

/** Adds to a job the finished handlers and the inbox records of its earlier attempts. */
export function resumed (job: Job, { finished = [], remembered }: { finished?: Job['finished'] | undefined, remembered?: Job['remembered'] | undefined }): Job {
  return { ...job, ...(finished.length > 0 && { finished }), ...(remembered !== undefined && { remembered }) }
}

/** Restores an error from its message and stack, as a queue or a dead letter keeps them. */
export function errorOf (message: string, stack: string | null | undefined): Error {
  return Object.assign(new Error(message), { stack })
}

/** Describes an error for keeping. Cuts its texts, and does not fail if a getter throws. */
export function deliveryError (handler: string | null, error: unknown): DeliveryError {
  return { handler, message: textOf(error, MAX_MESSAGE), stack: stackOf(error) }
}

/**
 * Makes the dead delivery of a job that is not attempted again.
 *
 * @param attempts how often its handlers were started
 * @param error with which `host.process` rejected, or why there was no further attempt
 * @param diedAt ms since the epoch; now, if it is not given
 */
export function deadDelivery (job: Job, attempts: number, error: unknown, diedAt = Date.now()): DeadDelivery {
  return { ...job, attempts, ...describeFailure(job, error), diedAt }
}

/** One line about a value that was thrown. */
function textOf (error: unknown, max = MAX_SUMMARY): string {
  try {
    // Does not use instanceof, because an error may come from another realm.
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
