import type { FastifyBaseLogger } from 'fastify'
import { channels, trace } from '../channels.ts'
import type { DeliveryMessage, DuplicateMessage } from '../channels.ts'
import { logFields, logs, write } from '../log.ts'
import type { Handler } from '../handlers.ts'
import { observeAttempt } from '../observation.ts'
import type { Observation } from '../observation.ts'
import type { Job } from '../runners/runner.ts'
import { then } from '../steps.ts'
import type { MaybePromise } from '../steps.ts'
import type { Sender, Work } from './work.ts'

/** Whether the inspector, a log or a channel takes note of it. */
export function isObserved ({ sender }: Work, log: FastifyBaseLogger, { observer }: Observation): boolean {
  return observer !== undefined || channels.delivery.hasSubscribers || channels.handler.hasSubscribers || logs(sender?.request.log ?? log, 'info')
}

/** Runs the handlers between the messages of the tracing channels, and logs that the delivery was processed. */
export function observeDelivery (
  work: Work,
  handlers: readonly Handler[],
  log: FastifyBaseLogger,
  { observer }: Observation,
  run: (handlers: readonly Handler[]) => MaybePromise<void>
): MaybePromise<void> {
  if (observer === undefined) return loggedDelivery(work, handlers, log, run)
  const { job, sender, attempt, finished } = work
  const start = { job, request: sender?.request, attempt, handlers, finished, replies: sender?.ownHandler !== undefined }
  return observeAttempt(observer, start, observed => loggedDelivery(work, observed, log, run))
}

function loggedDelivery (
  work: Work,
  handlers: readonly Handler[],
  log: FastifyBaseLogger,
  run: (handlers: readonly Handler[]) => MaybePromise<void>
): MaybePromise<void> {
  const to = work.sender?.request.log ?? log
  if (!logs(to, 'info')) return tracedDelivery(work, handlers, run)
  const startedAt = performance.now()
  return then(tracedDelivery(work, handlers, run), () => {
    const fields = logFields(work.job, work.attempt)
    fields['handlers'] = handlers.length
    fields['ms'] = Math.round((performance.now() - startedAt) * 1_000) / 1_000
    write(to, 'info', fields, 'webhook delivery processed')
  })
}

function tracedDelivery (work: Work, handlers: readonly Handler[], run: (handlers: readonly Handler[]) => MaybePromise<void>): MaybePromise<void> {
  const { delivery, handler } = channels
  const observesHandlers = handler.hasSubscribers
  if (!observesHandlers && !delivery.hasSubscribers) return run(handlers)
  const { job: { webhookId, timestamp, endpoint, tenant, event, carrier }, attempt, sender } = work
  // Field by field: a spread costs a delivery 4 µs, and a queue may have added an `error` to the job.
  const message: DeliveryMessage = { webhookId, timestamp, endpoint, tenant, event, carrier, attempt, queued: sender === undefined, handlers: handlers.length, request: sender?.request }
  const observed = !observesHandlers
    ? handlers
    : handlers.map((observed): Handler => ({
      name: observed.name,
      run: (event, context) => trace(handler, { handler: observed.name, delivery: message }, () => observed.run(event, context))
    }))
  return trace(delivery, message, () => run(observed))
}

export function observeDuplicate ({ endpoint }: Job, { request }: Sender, state: DuplicateMessage['state'], { observer }: Observation): void {
  observer?.duplicate(request, state)
  // The duplicate's own: it was signed later than the delivery that it joins.
  const { webhookId, timestamp, tenant, event } = request.openaiWebhook
  if (logs(request.log, 'info')) write(request.log, 'info', { ...logFields({ endpoint, tenant, webhookId, event }), state }, 'webhook delivery is a duplicate')
  if (channels.duplicate.hasSubscribers) channels.duplicate.publish({ endpoint, tenant, webhookId, timestamp, event, state, request })
}
