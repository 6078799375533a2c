import type { OfficialEvents } from './index.ts'

/**
 * Add your own event types here, so that `on()` accepts them:
 * `declare module 'fastify-openai-webhook' { interface OpenAIWebhookEvents extends EventsOf<typeof myEvents> {} }`
 */
export interface OpenAIWebhookEvents {}

/** Every event type with its event: OpenAI's types, and the types that are merged into `OpenAIWebhookEvents`, which take precedence. */
export type EventMap = Omit<OfficialEvents, keyof OpenAIWebhookEvents> & OpenAIWebhookEvents

export type EventType = keyof EventMap & string

type FamilyOf<Type extends string> = Type extends `${infer Head}.${infer Rest}`
  ? `${Head}.*` | (FamilyOf<Rest> extends infer Inner extends string ? `${Head}.${Inner}` : never)
  : never

/** A pattern for a family of event types, such as `batch.*` or `agent.session.*`. */
export type EventPattern = FamilyOf<EventType>

/** Any event of a known type. Narrow it by `event.type`. */
export type WebhookEvent = EventMap[EventType]

/** The event of a type, or the events that a pattern matches. */
export type EventOf<Name extends EventType | EventPattern> = Name extends EventType
  ? EventMap[Name]
  : Name extends `${infer Family}.*` ? EventMap[Extract<EventType, `${Family}.${string}`>] : never

/** An event of a type without a schema. Its signature is verified, but its shape is not checked. */
export interface UnknownEvent {
  type: string
  [field: string]: unknown
}
