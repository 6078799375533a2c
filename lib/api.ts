import type { RouteHandlerMethod } from 'fastify'
import type { DeadLetters } from './dead-letters.ts'
import type { EventOf, EventPattern, EventType, UnknownEvent, WebhookEvent } from './events/map.ts'
import type { EventHandler } from './handlers.ts'
import type { EndpointOptions, WebhookRouteOptions } from './options.ts'
import type { DeadHandler, ErrorHandler, HandlerOptions } from './registry.ts'
import type { WebhookHeaders } from './request.ts'

/** `app.openaiWebhook`, bound to the scope that it is read from. */
export interface OpenAIWebhook {
  /**
   * Runs the handler for events of one type, of several types, or of a family of known types (`batch.*`).
   *
   * Throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS for an unknown type, a `name` that is taken or a handler that is not a function, and
   * FST_OPENAI_WEBHOOK_ALREADY_STARTED once the app is ready.
   */
  on<Name extends EventType | EventPattern> (type: Name | readonly Name[], handler: EventHandler<EventOf<Name>>, options?: HandlerOptions): this
  /**
   * Runs the handler for every verified event, in addition to the handlers that match its type.
   *
   * Throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS for a `name` that is taken or a handler that is not a function, and
   * FST_OPENAI_WEBHOOK_ALREADY_STARTED once the app is ready.
   */
  onAny (handler: EventHandler<WebhookEvent>, options?: HandlerOptions): this
  /** Runs the handler for verified events that no `on` handler matches, including events of unknown types. Throws as `onAny` does. */
  onUnhandled (handler: EventHandler<WebhookEvent | UnknownEvent>, options?: HandlerOptions): this
  /**
   * Reports every failure to the handler. What the handler returns or throws does not change the answer to the sender.
   *
   * Throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS for a handler that is not a function, and FST_OPENAI_WEBHOOK_ALREADY_STARTED once the app is ready.
   */
  onError (handler: ErrorHandler): this
  /**
   * Calls the handler once with each delivery whose attempts are used up, in the process that made the last attempt. What the handler throws is
   * logged. After a crash the call may be missing, so rely on `deadLetters`. Throws as `onError` does.
   */
  onDead (handler: DeadHandler): this
  /**
   * Adds a receiving route in this scope, with its own overrides. The route runs the app's handlers and the handlers in `on`.
   *
   * Throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS, FST_OPENAI_WEBHOOK_INVALID_SECRET, FST_OPENAI_WEBHOOK_ALREADY_STARTED. If another receiving route
   * has the same URL, the app does not start: FST_OPENAI_WEBHOOK_INVALID_ROUTE.
   */
  route (options: WebhookRouteOptions): this
  /**
   * Verifies and validates a delivery that did not come through a route.
   *
   * @param rawBody the bytes as they arrived, or their UTF-8 text
   * @returns the event; rejects with the coded errors of the verify and validate steps, and with FST_OPENAI_WEBHOOK_INVALID_OPTIONS and
   * FST_OPENAI_WEBHOOK_INVALID_SECRET for the arguments
   */
  unwrap (rawBody: string | Uint8Array, headers: WebhookHeaders, overrides?: Omit<EndpointOptions, 'bodyLimit'>): Promise<WebhookEvent>
  /** The deliveries whose attempts are used up, if the runner keeps them, as `durable()`, `bullmq()` and `pgboss()` do. */
  readonly deadLetters: DeadLetters
  /** The handler for a marked route that has none of its own: it runs the event handlers, including the app's, and acknowledges the delivery. */
  readonly handler: RouteHandlerMethod
}
