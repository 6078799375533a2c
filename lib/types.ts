import type {
  FastifyContextConfig, FastifyInstance, FastifyRequest, RawReplyDefaultExpression, RawRequestDefaultExpression, RawServerDefault,
  RouteGenericInterface, RouteHandlerMethod
} from 'fastify'
import type { DeadLetters } from './dead-letters.ts'
import type { OfficialEvents } from './events/index.ts'
import type { OpenAIWebhookEvents } from './index.ts'
import type { EndpointOptions, ReceivingOptions } from './options.ts'
import type { EventContext } from './pipeline/dispatch.ts'
import type { DeadHandler, ErrorHandler, HandlerOptions } from './registry.ts'

/** Every event type with its event: OpenAI's, and what is merged into `OpenAIWebhookEvents` in place of or beside them. */
export type EventMap = Omit<OfficialEvents, keyof OpenAIWebhookEvents> & OpenAIWebhookEvents

export type EventType = keyof EventMap & string

type FamilyOf<Type extends string> = Type extends `${infer Head}.${infer Rest}`
  ? `${Head}.*` | (FamilyOf<Rest> extends infer Inner extends string ? `${Head}.${Inner}` : never)
  : never

/** `batch.*`, `agent.session.*`, … */
export type EventPattern = FamilyOf<EventType>

/** Any event that has a type of ours; narrow it by `event.type`. */
export type WebhookEvent = EventMap[EventType]

/** The events that a type or a pattern names. */
export type EventOf<Name extends EventType | EventPattern> = Name extends EventType
  ? EventMap[Name]
  : Name extends `${infer Family}.*` ? EventMap[Extract<EventType, `${Family}.${string}`>] : never

/** An event of a type that has no schema here: verified, its shape not checked. */
export interface UnknownEvent {
  type: string
  [field: string]: unknown
}

/**
 * Runs for a verified event; `this` is the Fastify scope it was registered in. When it throws or rejects, the sender
 * is told to deliver again.
 */
export type EventHandler<Event> = (this: FastifyInstance, event: Event, context: EventContext) => void | Promise<void>

export type RouteHandlers = {
  [Name in EventType | EventPattern]?: EventHandler<EventOf<Name>> | ReadonlyArray<EventHandler<EventOf<Name>>>
}

/** `config.openaiWebhook` of a marked route. */
export interface RouteOverrides extends ReceivingOptions {
  /** Handlers by event type or pattern. */
  on?: RouteHandlers
}

/** As @fastify/rate-limit types a route's `config.rateLimit`, where it is imported. */
export type RateLimit = Required<FastifyContextConfig> extends { rateLimit: infer Limits } ? Limits : object | false

export interface WebhookRouteOptions extends RouteOverrides {
  /** Within the scope's prefix. */
  url: string
  /** Replies once the event handlers have succeeded; returns nothing → 200 `{"received":true}`. */
  handler?: VerifiedHandler
  /** The limits of @fastify/rate-limit for this route, as its `config.rateLimit`. */
  rateLimit?: RateLimit
}

/** A verified and valid delivery: what a request carries once it has passed. */
export interface Delivery {
  /** Verified, and of its type's shape. */
  readonly event: WebhookEvent
  /** The bytes that arrived. */
  readonly rawBody: Buffer
  /** The same for every retry of the delivery. */
  readonly webhookId: string
  /** When it was signed, in Unix seconds. */
  readonly timestamp: number
}

export type WebhookHeaders = Headers | Readonly<Record<string, string | readonly string[] | undefined>> | FastifyRequest['headers']

/** `app.openaiWebhook`, bound to the scope it is read from. */
export interface OpenAIWebhook {
  /**
   * Runs the handler for events of a type, of several, or of a family of known types (`batch.*`).
   *
   * Throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS for an unknown type or a taken `name`, FST_OPENAI_WEBHOOK_ALREADY_STARTED
   * once the app is ready.
   */
  on<Name extends EventType | EventPattern> (type: Name | readonly Name[], handler: EventHandler<EventOf<Name>>, options?: HandlerOptions): this
  /** Runs the handler for every verified event, beside those that match its type. */
  onAny (handler: EventHandler<WebhookEvent>, options?: HandlerOptions): this
  /** Runs the handler for verified events that no `on` handler matches, unknown types included. */
  onUnhandled (handler: EventHandler<WebhookEvent | UnknownEvent>, options?: HandlerOptions): this
  /** Tells the handler of every failure. What it returns or throws changes nothing for the sender. */
  onError (handler: ErrorHandler): this
  /**
   * Tells the handler of each delivery whose attempts are used up, once, in the process that made the last one. What it
   * throws is logged. A crash may swallow the telling: what counts is `deadLetters`.
   */
  onDead (handler: DeadHandler): this
  /**
   * Adds a receiving route in this scope, with its own overrides. The app's handlers run there and those in `on`.
   *
   * Throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS, FST_OPENAI_WEBHOOK_INVALID_SECRET, FST_OPENAI_WEBHOOK_ALREADY_STARTED.
   */
  route (options: WebhookRouteOptions): this
  /**
   * Verifies and validates a delivery that did not come through a route.
   *
   * @param rawBody the bytes as they arrived, or their UTF-8 text
   * @returns the event; rejects with the coded errors of the verify and validate steps
   */
  unwrap (rawBody: string | Uint8Array, headers: WebhookHeaders, overrides?: Omit<EndpointOptions, 'bodyLimit'>): Promise<WebhookEvent>
  /** The deliveries whose attempts are used up, where the runner keeps them: `durable()`, `bullmq()`. */
  readonly deadLetters: DeadLetters
  /** A marked route's handler that runs the event handlers, the app's included, and acknowledges. */
  readonly handler: RouteHandlerMethod
}

/** A route's handler, whose requests have passed verification. */
export type VerifiedHandler = RouteHandlerMethod<
  RawServerDefault, RawRequestDefaultExpression, RawReplyDefaultExpression, RouteGenericInterface, { openaiWebhook: RouteOverrides }
>

/** A request that has passed verification. */
export type VerifiedRequest = FastifyRequest & { openaiWebhook: Delivery }

/** `request.openaiWebhook`: a delivery where the route's config says so, else one or `null`. */
export type RequestDelivery<ContextConfig> = ContextConfig extends { openaiWebhook: object } ? Delivery : Delivery | null
