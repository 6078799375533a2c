import type { RouteHandlerMethod } from 'fastify'
import type { DeadLetters } from './dead-letters.ts'
import type { EventOf, EventPattern, EventType, UnknownEvent, WebhookEvent } from './events/map.ts'
import type { EventHandler } from './handlers.ts'
import type { EndpointOptions, WebhookRouteOptions } from './options.ts'
import type { DeadHandler, ErrorHandler, HandlerOptions } from './registry.ts'
import type { WebhookHeaders } from './request.ts'

/** `app.openaiWebhook`, bound to the scope it is read from. */
export interface OpenAIWebhook {
  /**
   * Runs the handler for events of a type, of several, or of a family of known types (`batch.*`).
   *
   * Throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS for an unknown type or a taken `name`, FST_OPENAI_WEBHOOK_ALREADY_STARTED
   * once the app is ready.
   */
  on<Name extends EventType | EventPattern> (type: Name | readonly Name[], handler: EventHandler<EventOf<Name>>, options?: HandlerOptions): this
  /**
   * Runs the handler for every verified event, beside those that match its type.
   *
   * Throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS for a taken `name` or what is no function, FST_OPENAI_WEBHOOK_ALREADY_STARTED once the
   * app is ready.
   */
  onAny (handler: EventHandler<WebhookEvent>, options?: HandlerOptions): this
  /** Runs the handler for verified events that no `on` handler matches, unknown types included. Throws as `onAny` does. */
  onUnhandled (handler: EventHandler<WebhookEvent | UnknownEvent>, options?: HandlerOptions): this
  /**
   * Reports every failure to the handler. What it returns or throws changes nothing for the sender.
   *
   * Throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS for what is no function, FST_OPENAI_WEBHOOK_ALREADY_STARTED once the app is ready.
   */
  onError (handler: ErrorHandler): this
  /**
   * Calls the handler with each delivery whose attempts are used up, once, in the process that made the last attempt. What it
   * throws is logged. A crash may swallow the call, so rely on `deadLetters`. Throws as `onError` does.
   */
  onDead (handler: DeadHandler): this
  /**
   * Adds a receiving route in this scope, with its own overrides. The app's handlers run there and those in `on`.
   *
   * Throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS, FST_OPENAI_WEBHOOK_INVALID_SECRET, FST_OPENAI_WEBHOOK_ALREADY_STARTED. Where another
   * receiving route has the URL, the app does not start: FST_OPENAI_WEBHOOK_INVALID_ROUTE.
   */
  route (options: WebhookRouteOptions): this
  /**
   * Verifies and validates a delivery that did not come through a route.
   *
   * @param rawBody the bytes as they arrived, or their UTF-8 text
   * @returns the event; rejects with the coded errors of the verify and validate steps
   */
  unwrap (rawBody: string | Uint8Array, headers: WebhookHeaders, overrides?: Omit<EndpointOptions, 'bodyLimit'>): Promise<WebhookEvent>
  /** The deliveries whose attempts are used up, where the runner keeps them: `durable()`, `bullmq()`, `pgboss()`. */
  readonly deadLetters: DeadLetters
  /** A marked route's handler that runs the event handlers, the app's included, and acknowledges. */
  readonly handler: RouteHandlerMethod
}
