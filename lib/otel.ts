import { ROOT_CONTEXT, SpanKind, SpanStatusCode, context, diag, propagation, trace } from '@opentelemetry/api'
import type { Attributes, Context, Span, Tracer, TracerProvider } from '@opentelemetry/api'
import type { FastifyRequest } from 'fastify'
import { channels } from './channels.ts'
import type { DeliveryInfo, DeliveryMessage, EnqueueMessage, HandlerMessage, TraceChannel, TracedMessage } from './channels.ts'
import { assertNames } from './checks.ts'
import { InvalidOptions } from './errors.ts'
import type { VerifiedRequest } from './request.ts'

export interface WebhookTracingOptions {
  /** @default the global tracer provider, which may be registered later */
  tracerProvider?: TracerProvider | undefined
}

export interface WebhookTracing {
  /** Stops making spans, and ends the open ones. */
  close (): void
}

const NAME = 'fastify-openai-webhook'

/**
 * Makes OpenTelemetry spans for all deliveries in this process. Without a queue, the request's span gets the child `process <endpoint>`, with a
 * child for each handler. If the runner has a queue, the request's span gets the child `send <endpoint>` instead, to which the `process` span in
 * the process that runs the handlers links. To be called once for each tracer provider.
 *
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS
 */
export function webhookTracing (options: WebhookTracingOptions = {}): WebhookTracing {
  assertNames('webhookTracing', options, ['tracerProvider'])
  const { tracerProvider = trace.getTracerProvider() } = options
  if (typeof (tracerProvider as TracerProvider | null)?.getTracer !== 'function') {
    throw new InvalidOptions(`webhookTracing: expected tracerProvider to have the method getTracer, got ${tracerProvider === null ? 'null' : `a value of type ${typeof tracerProvider}`}`)
  }
  if (open.has(tracerProvider)) throw new InvalidOptions('webhookTracing: expected a tracer provider that is not in use, got one that has a webhookTracing() already. One webhookTracing() observes every app of the process: call it once, or close() the first one')
  const spans = new Spans(tracerProvider.getTracer(NAME))
  open.set(tracerProvider, spans)
  return {
    close () {
      spans.close()
      if (open.get(tracerProvider) === spans) open.delete(tracerProvider)
    }
  }
}

/** What is not closed, by its tracer provider. With two for one provider, every span would be there twice. */
const open = new WeakMap<TracerProvider, Spans>()

class Spans {
  readonly #tracer: Tracer
  /** For each message whose work has not ended, the context that the work runs in, with the span. */
  readonly #open = new Map<object, Context>()
  readonly #unsubscribe: Array<() => void>

  constructor (tracer: Tracer) {
    this.#tracer = tracer
    this.#unsubscribe = [
      this.#observe(channels.enqueue, message => this.#send(message)),
      this.#observe(channels.delivery, message => this.#process(message)),
      this.#observe(channels.handler, message => this.#handle(message))
    ]
  }

  close (): void {
    for (const unsubscribe of this.#unsubscribe) unsubscribe()
    for (const message of this.#open.keys()) this.#end(message)
  }

  /** @param begin starts the span, and returns the context with the span */
  #observe<Message extends TracedMessage> (channel: TraceChannel<Message>, begin: (message: Message) => Context): () => void {
    const subscribers = {
      start: (message: Message) => {
        harmless(() => {
          const active = begin(message)
          this.#open.set(message, active)
          const { around: inner } = message
          const around: typeof message.around = work => runOnceIn(active, inner === undefined ? work : () => inner(work))
          message.around = around
        })
      },
      end () {},
      asyncStart () {},
      asyncEnd: (message: Message) => { this.#end(message) },
      error: (message: Message) => { harmless(() => { recordFailure(this.#spanOf(message), message.error) }) }
    }
    channel.subscribe(subscribers)
    return () => { channel.unsubscribe(subscribers) }
  }

  #end (message: object): void {
    harmless(() => { this.#spanOf(message)?.end() })
    this.#open.delete(message)
  }

  #spanOf (message: object): Span | undefined {
    const active = this.#open.get(message)
    return active && trace.getSpan(active)
  }

  #send (message: EnqueueMessage): Context {
    const parent = contextOf(message.request)
    const active = trace.setSpan(parent, this.#tracer.startSpan(`send ${message.endpoint}`, {
      kind: SpanKind.PRODUCER,
      attributes: { ...operation('send'), ...attributesOf(message), ...bodySize(message.request) }
    }, parent))
    // Baggage may come from the request's headers, which are not signed, so it must not be written to a queue.
    harmless(() => { propagation.inject(propagation.deleteBaggage(active), message.carrier) })
    return active
  }

  #process (message: DeliveryMessage): Context {
    const { request, carrier, queued, attempt } = message
    // The carrier counts too, because a worker of this process may take a job while the request still waits for the queue.
    const fromQueue = queued || carrier !== undefined
    // A queue starts a job in the context of another delivery, or without a context.
    const parent = fromQueue ? propagation.extract(ROOT_CONTEXT, carrier ?? {}) : contextOf(request!)
    const accepted = fromQueue ? trace.getSpanContext(parent) : undefined
    return trace.setSpan(parent, this.#tracer.startSpan(`process ${message.endpoint}`, {
      kind: SpanKind.CONSUMER,
      root: fromQueue,
      links: accepted === undefined ? [] : [{ context: accepted }],
      attributes: {
        ...operation('process'),
        ...attributesOf(message),
        ...bodySize(request),
        ...(attempt !== undefined && { 'openai.webhook.attempt': attempt })
      }
    }, parent))
  }

  #handle ({ handler, delivery }: HandlerMessage): Context {
    // Not the active context, because without a registered context manager there is none.
    const parent = this.#open.get(delivery) ?? context.active()
    return trace.setSpan(parent, this.#tracer.startSpan(`handler ${handler}`, {
      attributes: { ...operation('process'), ...attributesOf(delivery), 'openai.webhook.handler': handler }
    }, parent))
  }
}

/** Has both names, because the conventions have renamed `messaging.system` but backends still look for it. */
const SYSTEM = { 'messaging.system': 'openai_webhook', 'messaging.system.name': 'openai_webhook' }

function operation (name: 'send' | 'process'): Attributes {
  return { ...SYSTEM, 'messaging.operation.name': name, 'messaging.operation.type': name }
}

/** Uses the attributes for messages. The conventions have none for webhooks, and their attributes for CloudEvents do not fit OpenAI's events. */
function attributesOf ({ endpoint, webhookId, event: { type, id } }: DeliveryInfo): Attributes {
  return {
    'messaging.destination.name': endpoint,
    'messaging.message.id': webhookId,
    'openai.webhook.event.type': type,
    ...(typeof id === 'string' && { 'openai.webhook.event.id': id })
  }
}

function bodySize (request: VerifiedRequest | undefined): Attributes | undefined {
  return request && { 'messaging.message.body.size': request.openaiWebhook.rawBody.length }
}

/** The active context. If a hook that waited for an event has lost it, the context that @fastify/otel keeps for the request. */
function contextOf (request: FastifyRequest): Context {
  const active = context.active()
  if (trace.getSpan(active) !== undefined) return active
  const { opentelemetry } = request as { opentelemetry?: () => { context?: Context | null } | undefined }
  return opentelemetry?.call(request)?.context ?? active
}

/** Runs `work` exactly once, whatever the tracer does. */
function runOnceIn<T> (active: Context, work: () => T): T {
  let outcome: (() => T) | undefined
  const run = (): () => T => {
    try {
      const value = work()
      return () => value
    } catch (error) {
      return () => { throw error }
    }
  }
  harmless(() => { context.with(active, () => { outcome = run() }) })
  return (outcome ?? run())()
}

function recordFailure (span: Span | undefined, error: unknown): void {
  if (span === undefined) return
  const { name } = readable(error)
  // A coded error describes the answer to the sender. Its cause describes what happened.
  const cause = name.startsWith('FST_OPENAI_WEBHOOK_') ? (error as Error).cause ?? error : error
  const thrown: readonly unknown[] = cause !== error && cause instanceof AggregateError ? cause.errors : [cause]
  span.setAttribute('error.type', name)
  span.setStatus({ code: SpanStatusCode.ERROR, message: readable(cause).message })
  for (const each of thrown) span.recordException(readable(each))
}

/** Turns any thrown value into an exception that a span accepts. The SDK uses `name` as the type of the exception. */
function readable (thrown: unknown): { name: string, message: string, stack?: string } {
  try {
    if (thrown instanceof Error) {
      const { code, name, message, stack } = thrown as NodeJS.ErrnoException
      return { name: String(code ?? name), message: String(message), ...(stack !== undefined && { stack }) }
    }
  } catch {
    return { name: OTHER, message: 'an error that cannot be read' }
  }
  return { name: OTHER, message: typeof thrown === 'string' ? thrown : `threw ${thrown === null ? 'null' : typeof thrown}` }
}

/** The value of `error.type` that the conventions have for errors without a better one. */
const OTHER = '_OTHER'

const log = diag.createComponentLogger({ namespace: NAME })

/** Logs errors instead of throwing them. A subscriber that throws would end the process, and a tracer must not cause the loss of a delivery. */
function harmless (work: () => void): void {
  try {
    work()
  } catch (error) {
    log.error('a delivery could not be traced', error)
  }
}
