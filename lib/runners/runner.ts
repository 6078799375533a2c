import { InvalidOptions, NeedsForce } from '../errors.ts'
import type { MaybePromise } from '../maybe-promise.ts'

/** One verified delivery, as plain JSON, so that any queue can carry it. */
export interface Job {
  readonly webhookId: string
  /** When the delivery was signed, in Unix seconds. */
  readonly timestamp: number
  /** The receiving route, whose handlers run. */
  readonly endpoint: string
  readonly event: { readonly type: string }
  /** Strings that a tracer has added, such as W3C's `traceparent`. */
  readonly carrier?: Readonly<Record<string, string>>
  /** The tenant, if the route serves many. */
  readonly tenant?: string
  /** Set if the route has event handlers of its own. A process that lacks the route must not complete the delivery. */
  readonly routeHandlers?: true
  /** Handlers that succeeded in earlier attempts. They do not run again, even if the store has forgotten them. */
  readonly finished?: readonly string[]
  /** Handlers that have used an inbox, each with the time until which the inbox is sure to remember it, in ms since the epoch. */
  readonly remembered?: Readonly<Record<string, number>>
}

/** Identifies a delivery. */
export type DeliveryRef = Pick<Job, 'endpoint' | 'webhookId' | 'tenant'>

/** The key of a delivery in stores and queues. A space separates its parts, because none of them contains one. */
export function keyOf ({ endpoint, tenant, webhookId }: DeliveryRef): string {
  const route = partOfKey(endpoint)
  return tenant === undefined ? `${route} ${webhookId}` : `${route} ${tenant} ${webhookId}`
}

/** An endpoint as a part of a key. The URL of a route may be declared with a space, which a request writes as `%20`. */
export function partOfKey (endpoint: string): string {
  return endpoint.includes(' ') ? encodeURIComponent(endpoint) : endpoint
}

/** One error with which an attempt ended. `message` is cut to 2,000 characters, and `stack` to 5,000. */
export interface DeliveryError {
  /** The name of the handler that threw; `null` if no handler failed, but a store, for example. */
  readonly handler: string | null
  readonly message: string
  /** The stack of the error that was thrown, followed by the stacks of its causes; empty if there is none. */
  readonly stack: string
}

/** A dead delivery: its attempts are used up. */
export interface DeadDelivery extends Job {
  /** How often its handlers were started. */
  readonly attempts: number
  /** The errors with which its last attempt ended, at most 20. */
  readonly errors: readonly DeliveryError[]
  /** Handlers that have succeeded. When the delivery is requeued, only the others run. */
  readonly finished: readonly string[]
  /** ms since the epoch */
  readonly diedAt: number
}

export interface RequeueOptions {
  /**
   * Whether to requeue the delivery even if an effect could happen twice, because the inbox that prevents that may no longer remember the
   * delivery.
   *
   * @default false
   */
  force?: boolean
}

/** How often the handlers of a job have been started, and how often they may be. */
export interface Attempts {
  readonly attempt: number
  readonly attempts: number
}

export interface RunnerHost {
  /**
   * Runs the handlers of one delivery that have not succeeded yet, and records each success. Rejects with one of these coded errors, after which
   * the job is to be attempted again:
   *
   * - FST_OPENAI_WEBHOOK_HANDLER_FAILED if a handler failed; the error's `cause` is an AggregateError
   * - FST_OPENAI_WEBHOOK_UNAVAILABLE if the idempotency store failed
   * - FST_OPENAI_WEBHOOK_IN_PROGRESS if another process has the delivery
   * - FST_OPENAI_WEBHOOK_MISSING_ROUTE if this process lacks the route's handlers
   * - FST_OPENAI_WEBHOOK_OVERLOADED if `closeTimeout` was over before the handlers could start
   *
   * @param attempt how often the runner has started this job, including this time; for logs and channels
   * @param onSuccess called once every handler has succeeded, at the moment when the store is told so, which makes one commit of both if they
   *   share a database. `process` waits for it, and reports its error without failing the delivery. Not called if another process has processed
   *   the job
   */
  process (job: Job, attempt?: number, onSuccess?: () => MaybePromise<void>): MaybePromise<void>
  /**
   * Keeps the claim on a delivery for a runner that soon calls `process` for this job in this process. To be called before `run` resolves. The
   * plugin has this method; the host of a test may lack it.
   *
   * @returns a function that gives the claim back, to be called if the runner does not call `process` after all
   */
  keep? (job: Job): () => MaybePromise<void>
  /**
   * Reports trouble that no sender hears of, or a job that failed and is to be attempted again, with the error with which `process` rejected.
   *
   * @param attempts if a job failed
   */
  report (error: unknown, job?: Job, attempts?: Attempts): void
  /**
   * Reports that a job is dead: nothing attempts it again. To be called once, when the death is on record. The plugin has this method; the host
   * of a test may lack it.
   *
   * @param delivery made by `deadDelivery(job, attempts, error)`
   * @param error with which `process` rejected, or why there was no further attempt
   */
  dead? (delivery: DeadDelivery, error: unknown): void
  /**
   * To be called before a further attempt of a job if the end of an earlier attempt is not on record, for example because its process ended. Any
   * handler of that attempt may have used an inbox. The plugin has this method; the host of a test may lack it.
   *
   * @returns the job with `remembered`: until when an inbox remembers each of its handlers
   */
  interrupted? (job: Job): Job
  /**
   * Asks the idempotency store about a job whose last attempt ended with its process. Rejects with FST_OPENAI_WEBHOOK_UNAVAILABLE if the store
   * failed, and with FST_OPENAI_WEBHOOK_IN_PROGRESS if another process has the delivery. The plugin has this method; the host of a test may lack
   * it.
   *
   * @returns `done`: whether the job has been processed. If not, `finished` has the handlers that have succeeded, and `remembered` says until
   *   when an inbox that any handler may have used remembers the handler
   */
  recorded? (job: Job): MaybePromise<{ done: boolean } & Required<Pick<Job, 'finished'>> & Pick<Job, 'remembered'>>
}

/**
 * Decides when and where handlers run.
 *
 * - `run` resolves when the delivery may be acknowledged, and rejects if the runner does not accept it. The sender gets a coded error as it is;
 *   any other error is answered 503 `FST_OPENAI_WEBHOOK_UNAVAILABLE`.
 * - If `run` has resolved before the handlers have run, the runner must call `host.process` for the job later.
 * - `close` stops the runner from taking jobs, and resolves when no job runs in this process. Its signal aborts when `closeTimeout` is over;
 *   after that the plugin no longer waits.
 * - A runner that gives a job up calls `host.dead`. A runner that keeps dead deliveries for a person has `dead`, `deadCount` and `requeue`,
 *   which `app.openaiWebhook.deadLetters` and the metrics call.
 */
export interface Runner {
  /** Called once, when the app is ready, before the first `run`. */
  start? (host: RunnerHost): MaybePromise<void>
  /** @returns `'duplicate'` if the runner already has this delivery, in any state. It then need not call `host.process` again */
  run (job: Job): MaybePromise<void | 'duplicate'>
  close? (signal?: AbortSignal): MaybePromise<void>
  /** The number of waiting deliveries. A runner with a queue has this method; a runner without one runs the handlers in `run`. */
  depth? (): MaybePromise<number>
  /** The dead deliveries of one event type, or of all types, oldest first. @param limit default 100 */
  dead? (limit?: number, type?: string): MaybePromise<DeadDelivery[]>
  /** The number of dead deliveries. */
  deadCount? (): MaybePromise<number>
  /**
   * Gives a dead delivery its attempts anew, with its `finished` handlers. Without `force`, rejects with FST_OPENAI_WEBHOOK_NEEDS_FORCE if
   * `assertRemembered(delivery)` throws it.
   *
   * @returns whether there was such a delivery
   */
  requeue? (delivery: DeliveryRef, options?: RequeueOptions): MaybePromise<boolean>
}

/**
 * Asserts that it is safe to run a delivery again: inboxes still remember every handler that has used one and is not known to have succeeded.
 * Such a handler may have taken effect all the same.
 *
 * @throws FST_OPENAI_WEBHOOK_NEEDS_FORCE if an inbox may have forgotten such a handler
 */
export function assertRemembered ({ webhookId, finished = [], remembered = {} }: Job): void {
  for (const [handler, until] of Object.entries(remembered)) {
    if (until <= Date.now() && !finished.includes(handler)) throw new NeedsForce(webhookId, handler)
  }
}

/** Reports a dead delivery to a host. A host without `dead` gets the error through `report`. */
export function tellDead (host: RunnerHost, delivery: DeadDelivery, error: unknown): void {
  if (host.dead === undefined) host.report(error, delivery)
  else host.dead(delivery, error)
}

/** Calls `then` when the signal of `close` aborts, or at once if it has: a user's runner may call the `close` of another one late. */
export function onAbort (signal: AbortSignal | undefined, then: () => void): void {
  if (signal?.aborted === true) then()
  else signal?.addEventListener('abort', then, { once: true })
}

/** Refuses a runner that an app has closed, because it would answer every delivery 503. @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS */
export function assertOpen (runner: string, closed: boolean): void {
  if (closed) throw new InvalidOptions(`${runner}: expected a runner that no app has closed: make one for each app`)
}

/** The runners of apps that are ready and not closed. */
export const runnersInUse = new Set<Runner>()
