import type { FastifyBaseLogger } from 'fastify'
import { channels } from '../channels.ts'
import { HandlerFailed, Overloaded } from '../errors.ts'
import { handlersFailed } from '../runners/handler-failures.ts'
import type { HandlerFailure } from '../runners/handler-failures.ts'
import { union } from '../pipeline/deduplicate.ts'
import type { Claims, Held } from '../pipeline/deduplicate.ts'
import { dispatch } from '../pipeline/dispatch.ts'
import { OWN_HANDLER } from '../handlers.ts'
import type { Handler } from '../handlers.ts'
import type { Observation, ObservedAttempt } from '../observation.ts'
import type { Registry } from '../registry.ts'
import { both, then, tryOr } from '../maybe-promise.ts'
import type { MaybePromise } from '../maybe-promise.ts'
import { Context } from './context.ts'
import { observeRun, traceDelivery } from './observe.ts'
import type { RecordEnd, Work, Works } from './work.ts'

/** Runs the handlers of a claimed delivery and records how they end. */
export class Handling {
  /** @param signal aborts when the app is closing and `closeTimeout` is over */
  constructor (
    readonly works: Works,
    readonly claims: Claims,
    readonly registry: Registry,
    readonly log: FastifyBaseLogger,
    readonly observation: Observation,
    readonly signal: AbortSignal
  ) {}

  /**
   * Starts the handlers that have not succeeded yet. Rejects with FST_OPENAI_WEBHOOK_HANDLER_FAILED if one fails.
   *
   * @throws FST_OPENAI_WEBHOOK_OVERLOADED if `closeTimeout` is over, and the app closes what handlers use
   */
  start (work: Work, claim: Held): MaybePromise<void> {
    if (this.signal.aborted) throw new Overloaded()
    work.move({ at: 'handling' })
    if (claim.finished.length > 0) work.job = { ...work.job, finished: union(claim.finished, work.job.finished) }
    const { finished } = work.job
    const all = this.#handlers(work)
    const handlers = finished === undefined ? all : all.filter(({ name }) => !finished.includes(name))
    if (channels.unhandled.hasSubscribers) this.#publishUnhandled(work)
    work.end = observeRun(work, handlers, this.log, this.observation, observed =>
      traceDelivery(work, handlers, traced => this.#handle(work, claim, traced, observed)))
    return work.end
  }

  #handle (work: Work, claim: Held, handlers: readonly Handler[], observed?: ObservedAttempt): MaybePromise<void> {
    const { claims, log, signal } = this
    const replies = work.sender?.ownHandler !== undefined
    const failures = dispatch(handlers, work.job.event, new Context(work, log, signal), (handler, isLast) =>
      // The last success needs no checkpoint, because it completes the delivery, unless the route's own handler has yet to run.
      isLast && !replies ? undefined : claims.checkpoint(claim, handler.name), observed)
    return then(failures, failures => this.#dispatched(work, claim, failures))
  }

  #dispatched (work: Work, claim: Held, failures: readonly HandlerFailure[]): MaybePromise<void> {
    if (failures.length > 0) return this.#settle(work, claim, this.#failed(work, failures))
    const ownHandler = work.sender?.ownHandler
    if (ownHandler === undefined) return this.#settle(work, claim)
    // The event handlers have outlasted `closeTimeout`.
    if (this.signal.aborted) return this.#settle(work, claim, new Overloaded())
    return new Promise<void>((resolve, reject) => {
      const record: RecordEnd = (succeeded, error) => {
        // The answer waits until the result is recorded. A failure goes to `reject`, which fails the delivery, and not to the answer.
        const settled = tryOr(() => this.#settle(work, claim, succeeded ? undefined : ownFailure(error)), reject)
        return then(settled, () => { resolve() })
      }
      try {
        ownHandler(record)
      } catch (error) {
        record(false, error) // thrown by what a hook of the app has put in place of a method of reply
      }
    })
  }

  /** Records how the handlers have ended, and then throws `failure` if there is one. */
  #settle (work: Work, claim: Held, failure?: Error): MaybePromise<void> {
    return then(failure === undefined ? this.#complete(work, claim) : this.claims.release(claim), () => {
      work.move({ at: 'over', succeeded: failure === undefined })
      if (work.canBeForgotten) this.works.forget(work)
      if (failure !== undefined) throw failure
    })
  }

  /**
   * Records the success in the store and with the runner. Both calls are made in one turn, so that a database that both share makes one commit
   * of them.
   */
  #complete ({ onSuccess }: Work, claim: Held): MaybePromise<void> {
    const completed = this.claims.complete(claim)
    return both(onSuccess?.(), completed)
  }

  /** To be called when all handlers have ended, because every handler without a failure counts as succeeded. */
  #failed (work: Work, failures: readonly HandlerFailure[]): Error {
    const handlers = this.#handlers(work)
    const succeeded = handlers.map(({ name }) => name).filter(name => !failures.some(({ handler }) => handler === name))
    return handlersFailed(failures, handlers.length, union(work.job.finished, succeeded), work.job.remembered)
  }

  #handlers ({ job }: Work): readonly Handler[] {
    return this.registry.handlersOf(job.endpoint).for(job.event.type)
  }

  #publishUnhandled ({ job, sender }: Work): void {
    const isHandled = sender?.ownHandler !== undefined || this.registry.handlersOf(job.endpoint).handles(job.event.type)
    if (!isHandled) channels.unhandled.publish(job)
  }
}

function ownFailure (error: unknown): Error {
  return error === undefined ? new HandlerFailed() : handlersFailed([{ handler: OWN_HANDLER, error }], 1, [])
}
