import type { FastifyBaseLogger } from 'fastify'
import { channels, trace } from '../channels.ts'
import type { DeliveryMessage, DuplicateMessage } from '../channels.ts'
import { logFields, logs, write } from '../log.ts'
import type { Handler } from '../handlers.ts'
import type { Observation, ObservedAttempt, Observer } from '../observation.ts'
import type { MaybePromise } from '../maybe-promise.ts'
import type { Sender, Work } from './work.ts'

export function isTraced (): boolean {
  return channels.delivery.hasSubscribers || channels.handler.hasSubscribers
}

/** Runs the handlers, and publishes their start and end on the tracing channels. */
export function traceDelivery (work: Work, handlers: readonly Handler[], run: (handlers: readonly Handler[]) => MaybePromise<void>): MaybePromise<void> {
  const { delivery, handler } = channels
  const { job: { webhookId, timestamp, endpoint, tenant, event, carrier }, attempt, sender } = work
  // Copied field by field, because a spread costs 4 µs per delivery, and a queue may have added an `error` to the job.
  const message: DeliveryMessage = { webhookId, timestamp, endpoint, tenant, event, carrier, attempt, queued: sender === undefined, handlers: handlers.length, request: sender?.request }
  const traced = !handler.hasSubscribers
    ? handlers
    : handlers.map((traced): Handler => ({
      name: traced.name,
      run: (event, context) => trace(handler, { handler: traced.name, delivery: message }, () => traced.run(event, context))
    }))
  return trace(delivery, message, () => run(traced))
}

/** Reports one run of a delivery's handlers to the inspector, and its success to the log. */
export class ObservedRun {
  readonly #work: Work
  readonly #log: FastifyBaseLogger | undefined
  readonly #handlers: number
  readonly #startedAt: number
  readonly attempt: ObservedAttempt | undefined

  /** @returns `undefined` if there is no inspector and the level `info` is not logged, so that no object is created for the delivery */
  static of (work: Work, handlers: readonly Handler[], log: FastifyBaseLogger, { observer }: Observation): ObservedRun | undefined {
    const to = work.sender?.request.log ?? log
    const isLogged = logs(to, 'info')
    return isLogged || observer !== undefined ? new ObservedRun(work, handlers, isLogged ? to : undefined, observer) : undefined
  }

  private constructor (work: Work, handlers: readonly Handler[], log: FastifyBaseLogger | undefined, observer: Observer | undefined) {
    const { job, sender, attempt, finished } = work
    this.#work = work
    this.#log = log
    this.#startedAt = log === undefined ? 0 : performance.now()
    this.#handlers = handlers.length
    this.attempt = observer?.started({ job, request: sender?.request, attempt, handlers, finished, replies: sender?.ownHandler !== undefined })
  }

  succeeded (): void {
    this.attempt?.ended()
    if (this.#log === undefined) return
    const fields = logFields(this.#work.job, this.#work.attempt)
    fields['handlers'] = this.#handlers
    fields['ms'] = Math.round((performance.now() - this.#startedAt) * 1_000) / 1_000
    write(this.#log, 'info', fields, 'webhook delivery processed')
  }

  failed (error: unknown): void {
    this.attempt?.ended(error)
  }
}

export function observeDuplicate ({ request }: Sender, state: DuplicateMessage['state'], { observer }: Observation): void {
  observer?.duplicate(request, state)
  // Taken from the duplicate's request, because the duplicate was signed later than the first delivery.
  const { webhookId, timestamp, endpoint, tenant, event } = request.openaiWebhook
  if (logs(request.log, 'info')) write(request.log, 'info', { ...logFields(request.openaiWebhook), state }, 'webhook delivery is a duplicate')
  if (channels.duplicate.hasSubscribers) channels.duplicate.publish({ endpoint, tenant, webhookId, timestamp, event, state, request })
}
