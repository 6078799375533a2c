import type { OfficialEvents } from './index.ts'

/**
 * Event types of your own, for `on()` to know them:
 * `declare module 'fastify-openai-webhook' { interface OpenAIWebhookEvents extends EventsOf<typeof myEvents> {} }`
 */
export interface OpenAIWebhookEvents {}

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
