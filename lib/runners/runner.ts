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
  /** Strings of a tracer, such as W3C's `traceparent`. */
  readonly carrier?: Readonly<Record<string, string>>
  /** The tenant, where a route serves many. */
  readonly tenant?: string
  /** Set where its route has handlers of its own: a process that lacks the route must not complete it. */
  readonly routeHandlers?: true
  /** Handlers that succeeded in earlier attempts: they do not run again, whatever the store has forgotten. */
  readonly finished?: readonly string[]
  /** Handlers that have used an inbox, each with the time until which that is sure to remember it, in ms since the epoch. */
  readonly remembered?: Readonly<Record<string, number>>
}

/** Names a delivery. */
export type DeliveryRef = Pick<Job, 'endpoint' | 'webhookId' | 'tenant'>

/** The key of a delivery in stores and queues. Neither a URL, a tenant nor a webhook-id holds a space. */
export function keyOf ({ endpoint, tenant, webhookId }: DeliveryRef): string {
  return tenant === undefined ? `${endpoint} ${webhookId}` : `${endpoint} ${tenant} ${webhookId}`
}

/** Why a delivery failed, cut where it is long. */
export interface DeliveryError {
  /** The handler that threw, by its name; `null` where it was no handler, such as a store that failed. */
  readonly handler: string | null
  readonly message: string
  /** As it was thrown, with its causes; empty where there is none. */
  readonly stack: string
}

/** A dead delivery: its attempts are used up. */
export interface DeadDelivery extends Job {
  /** How often its handlers were started. */
  readonly attempts: number
  /** What its last attempt ended with. */
  readonly errors: readonly DeliveryError[]
  /** Handlers that have succeeded: when it is requeued, only the others run. */
  readonly finished: readonly string[]
  /** ms since the epoch */
  readonly diedAt: number
}

export interface RequeueOptions {
  /**
   * Also where an effect could happen twice, because the inbox that prevents it may no longer remember the delivery.
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
   * Runs the handlers of one delivery that have not succeeded yet, and records what did.
   * Rejects with FST_OPENAI_WEBHOOK_HANDLER_FAILED (its `cause` an AggregateError) when any failed, with
   * FST_OPENAI_WEBHOOK_UNAVAILABLE when the idempotency store did, with FST_OPENAI_WEBHOOK_IN_PROGRESS when another process
   * has the delivery, and with FST_OPENAI_WEBHOOK_MISSING_ROUTE when this one lacks its handlers: the job is then to be
   * run again.
   *
   * @param attempt how often the runner has started this job, this time included; for logs and channels
   * @param onSuccess called once every handler has succeeded and as the store is told so, which makes one commit of both
   *   where they share a database. It does not fail, and is waited for. Not called where another has processed the job.
   */
  process (job: Job, attempt?: number, onSuccess?: () => MaybePromise<void>): MaybePromise<void>
  /**
   * To be called before `run` resolves, by a runner that calls `process` for this job here and soon: the claim on the
   * delivery is kept for that. As for `dead`, the plugin has it.
   *
   * @returns gives it back, where it is not called after all
   */
  keep? (job: Job): () => MaybePromise<void>
  /**
   * Told of trouble that no sender hears of; and of a job that failed, as `process` rejected, and is to be run again.
   *
   * @param attempts of a job that failed
   */
  report (error: unknown, job?: Job, attempts?: Attempts): void
  /**
   * Told once, when that is on record, that a job is not run again: `deadDelivery(job, attempts, error)`. The plugin has it;
   * the host of a test may not.
   *
   * @param error as `process` rejected, or why there was no other attempt
   */
  dead? (delivery: DeadDelivery, error: unknown): void
  /**
   * To be asked before a further attempt of a job of which an earlier one has no end on record, such as one that ended with its
   * process: any of its handlers may have used an inbox. As for `dead`, the plugin has it.
   *
   * @returns the job, with how long an inbox remembers each of them
   */
  interrupted? (job: Job): Job
  /**
   * What the idempotency store knows of a job whose last attempt ended with its process. Rejects as `process` does. As for
   * `dead`, the plugin has it.
   *
   * @returns whether it has been processed, or else the handlers that have succeeded, and how long an inbox that any of them
   * may have used remembers it
   */
  recorded? (job: Job): MaybePromise<{ done: boolean } & Required<Pick<Job, 'finished'>> & Pick<Job, 'remembered'>>
}

/**
 * Decides when and where handlers run.
 *
 * - `run` resolves when the delivery may be acknowledged, and rejects when it was not accepted; whatever has no coded
 *   error of its own is answered 503 `FST_OPENAI_WEBHOOK_UNAVAILABLE`.
 * - After `run` has resolved, the runner owes the job a `host.process`.
 * - `close` stops taking jobs and resolves when none of this process's is running. Its signal aborts when `closeTimeout`
 *   is over: nothing is waited for then.
 * - A runner that gives a job up tells `host.dead`; one that keeps it for a person to look at has `dead`, `deadCount` and
 *   `requeue`, which `app.openaiWebhook.deadLetters` and the metrics ask.
 */
export interface Runner {
  /** Called once, when the app is ready, before the first `run`. */
  start? (host: RunnerHost): MaybePromise<void>
  /** @returns `'duplicate'` when it has this delivery already, in whatever state; then it owes nothing more */
  run (job: Job): MaybePromise<void | 'duplicate'>
  close? (signal?: AbortSignal): MaybePromise<void>
  /** The number of waiting deliveries. A runner with a queue has this; one without it runs the handlers in `run`. */
  depth? (): MaybePromise<number>
  /** The dead deliveries, of one event type or of all, oldest first. @param limit default 100 */
  dead? (limit?: number, type?: string): MaybePromise<DeadDelivery[]>
  /** The number of dead deliveries. */
  deadCount? (): MaybePromise<number>
  /**
   * Gives a dead delivery its attempts anew, with the `finished` that it died with. Unless by `force`, it rejects with
   * FST_OPENAI_WEBHOOK_NEEDS_FORCE where `assertRemembered(delivery)` throws it.
   *
   * @returns whether there was one
   */
  requeue? (delivery: DeliveryRef, options?: RequeueOptions): MaybePromise<boolean>
}

/**
 * To run a delivery again is safe where handlers that used an inbox, and have not succeeded, are remembered there: one of them
 * may have taken effect all the same.
 *
 * @throws FST_OPENAI_WEBHOOK_NEEDS_FORCE
 */
export function assertRemembered ({ webhookId, finished = [], remembered = {} }: Job): void {
  for (const [handler, until] of Object.entries(remembered)) {
    if (until <= Date.now() && !finished.includes(handler)) throw new NeedsForce(webhookId, handler)
  }
}

/** Tells a host that a delivery is dead; one that cannot hear it is told of the failure. */
export function tellDead (host: RunnerHost, delivery: DeadDelivery, error: unknown): void {
  if (host.dead === undefined) host.report(error, delivery)
  else host.dead(delivery, error)
}

/** A runner that was closed answers everything 503. @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS */
export function assertOpen (runner: string, closed: boolean): void {
  if (closed) throw new InvalidOptions(`${runner}: expected a runner that no app has closed: make one for each app`)
}

/** The runners of apps that are ready and not closed. */
export const runnersInUse = new Set<Runner>()
