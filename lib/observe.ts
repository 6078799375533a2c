import type { FastifyBaseLogger } from 'fastify'
import { channels, trace } from './channels.ts'
import type { DeliveryMessage, DuplicateMessage } from './channels.ts'
import { logFields, logs, write } from './log.ts'
import { then } from './maybe-promise.ts'
import type { Handler } from './pipeline/dispatch.ts'
import type { Run, Sender } from './run.ts'
import type { Job } from './runners/runner.ts'
import type { MaybePromise } from './stores/store.ts'

/** Whether anybody hears of it. */
export function isObserved ({ sender }: Run, log: FastifyBaseLogger): boolean {
  return channels.delivery.hasSubscribers || channels.handler.hasSubscribers || logs(sender?.request.log ?? log, 'info')
}

/** Runs the handlers of a delivery between the messages of its channels, and logs that it was processed. */
export function observeDelivery (
  run: Run,
  handlers: readonly Handler[],
  log: FastifyBaseLogger,
  work: (handlers: readonly Handler[]) => MaybePromise<void>
): MaybePromise<void> {
  const to = run.sender?.request.log ?? log
  if (!logs(to, 'info')) return tracedDelivery(run, handlers, work)
  const startedAt = performance.now()
  return then(tracedDelivery(run, handlers, work), () => {
    const ms = Math.round((performance.now() - startedAt) * 1_000) / 1_000
    write(to, 'info', { ...logFields(run.job, run.attempt), handlers: handlers.length, ms }, 'webhook delivery processed')
  })
}

function tracedDelivery (run: Run, handlers: readonly Handler[], work: (handlers: readonly Handler[]) => MaybePromise<void>): MaybePromise<void> {
  const { delivery, handler } = channels
  const observesHandlers = handler.hasSubscribers
  if (!observesHandlers && !delivery.hasSubscribers) return work(handlers)
  const { job: { webhookId, timestamp, endpoint, event, carrier }, attempt, sender } = run
  // Each property by name: to spread the job costs a delivery 4 µs, and a queue may have added an `error` to it.
  const message: DeliveryMessage = { webhookId, timestamp, endpoint, event, carrier, attempt, queued: sender === undefined, handlers: handlers.length, request: sender?.request }
  const observed = !observesHandlers
    ? handlers
    : handlers.map(({ name, run }): Handler => ({
      name,
      run: (event, context) => trace(handler, { handler: name, delivery: message }, () => run(event, context))
    }))
  return trace(delivery, message, () => work(observed))
}

export function observeDuplicate ({ endpoint }: Job, { request }: Sender, state: DuplicateMessage['state']): void {
  // Of the duplicate itself, which was signed later than the one it joins.
  const { webhookId, timestamp, event } = request.openaiWebhook
  if (logs(request.log, 'info')) write(request.log, 'info', { ...logFields({ endpoint, webhookId, event }), state }, 'webhook delivery is a duplicate')
  if (channels.duplicate.hasSubscribers) channels.duplicate.publish({ endpoint, webhookId, timestamp, event, state, request })
}
