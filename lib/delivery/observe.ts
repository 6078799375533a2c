import type { FastifyBaseLogger } from 'fastify'
import { channels, deliveryInfoOf, trace } from '../channels.ts'
import type { DeliveryMessage, DuplicateMessage } from '../channels.ts'
import { logFields, logs, write } from '../log.ts'
import type { Handler } from '../handlers.ts'
import type { Observation, ObservedAttempt } from '../observation.ts'
import { after } from '../maybe-promise.ts'
import type { MaybePromise } from '../maybe-promise.ts'
import type { Sender, Work } from './work.ts'

/** Runs the handlers, and publishes their start and end on the tracing channels, if those have subscribers. */
export function traceDelivery (work: Work, handlers: readonly Handler[], run: (handlers: readonly Handler[]) => MaybePromise<void>): MaybePromise<void> {
  const { delivery, handler } = channels
  if (!delivery.hasSubscribers && !handler.hasSubscribers) return run(handlers)
  const { job, attempt, sender } = work
  const message: DeliveryMessage = { ...deliveryInfoOf(job), carrier: job.carrier, attempt, queued: work.isFromQueue, handlers: countOf(work, handlers), request: sender?.request }
  const traced = !handler.hasSubscribers
    ? handlers
    : handlers.map((traced): Handler => ({
      name: traced.name,
      run: (event, context) => trace(handler, { handler: traced.name, delivery: message }, () => traced.run(event, context))
    }))
  return trace(delivery, message, () => run(traced))
}

/** Runs the handlers, and tells the inspector of the run and the log of its success. */
export function observeRun (work: Work, handlers: readonly Handler[], log: FastifyBaseLogger, { observer }: Observation, run: (attempt?: ObservedAttempt) => MaybePromise<void>): MaybePromise<void> {
  const { job, sender, attempt } = work
  const to = sender?.request.log ?? log
  const isLogged = logs(to, 'info')
  if (!isLogged && observer === undefined) return run()
  const startedAt = performance.now()
  const observed = observer?.started({ job, request: sender?.request, attempt, handlers, finished: job.finished ?? [], replies: sender?.ownHandler !== undefined })
  return after(() => run(observed), () => {
    observed?.ended()
    if (!isLogged) return
    const fields = logFields(job, attempt)
    fields['handlers'] = countOf(work, handlers)
    fields['ms'] = Math.round((performance.now() - startedAt) * 1_000) / 1_000
    write(to, 'info', fields, 'webhook delivery processed')
  }, error => {
    observed?.ended(error)
    throw error
  })
}

/** How many handlers run, with the route's own. */
function countOf ({ sender }: Work, handlers: readonly Handler[]): number {
  return handlers.length + (sender?.ownHandler === undefined ? 0 : 1)
}

export function observeDuplicate ({ request }: Sender, state: DuplicateMessage['state'], { observer }: Observation): void {
  observer?.duplicate(request, state)
  // Taken from the duplicate's request, because the duplicate was signed later than the first delivery.
  const delivery = request.openaiWebhook
  if (logs(request.log, 'info')) write(request.log, 'info', { ...logFields(delivery), state }, 'webhook delivery is a duplicate')
  if (channels.duplicate.hasSubscribers) channels.duplicate.publish({ ...deliveryInfoOf(delivery), state, request })
}
