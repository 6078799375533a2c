import type { MaybePromise } from '../stores/store.ts'

/** One verified delivery, as plain JSON, so that any queue can carry it. */
export interface Job {
  readonly webhookId: string
  /** When the delivery was signed, in Unix seconds. */
  readonly timestamp: number
  /** The receiving route, which tells its handlers. */
  readonly endpoint: string
  readonly event: { readonly type: string }
  /** What a tracer sends along, such as W3C's `traceparent`. */
  readonly carrier?: Readonly<Record<string, string>>
}

export interface RunnerHost {
  /**
   * Runs the handlers of one delivery that have not succeeded yet, and records what did.
   * Rejects with FST_OPENAI_WEBHOOK_HANDLER_FAILED (its `cause` an AggregateError) when any failed, and with
   * FST_OPENAI_WEBHOOK_UNAVAILABLE when the idempotency store did: the job is then to be run again.
   *
   * @param attempt how often the runner has started this job, this time included; for logs and channels
   */
  process (job: Job, attempt?: number): MaybePromise<void>
  /** Told of trouble that no sender hears of, such as a job that failed after it was acknowledged. */
  report (error: unknown, job?: Job): void
}

/**
 * Decides when and where handlers run.
 *
 * - `run` resolves when the delivery may be acknowledged, and rejects when it was not accepted; whatever has no coded
 *   error of its own is answered 503 `FST_OPENAI_WEBHOOK_UNAVAILABLE`.
 * - After `run` has resolved, the runner owes the job a `host.process`.
 * - `close` stops taking jobs and resolves when none of this process's is running. Its signal aborts when `closeTimeout`
 *   is over: nothing is waited for then.
 */
export interface Runner {
  /** Called once, when the app is ready, before the first `run`. */
  start? (host: RunnerHost): MaybePromise<void>
  run (job: Job): MaybePromise<void>
  close? (signal?: AbortSignal): MaybePromise<void>
  /** Deliveries that wait to be run. A runner that has a queue has this; one without it runs the handlers in `run`. */
  depth? (): MaybePromise<number>
}

/** The runners of apps that are ready and not closed. */
export const runnersInUse = new Set<Runner>()
