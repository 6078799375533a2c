import type { FastifyBaseLogger, FastifyInstance } from 'fastify'
import type { EventOf, EventPattern, EventType } from './events/map.ts'
import type { Delivery, VerifiedRequest } from './request.ts'

export interface EventContext extends Pick<Delivery, 'webhookId' | 'timestamp' | 'endpoint' | 'tenant'> {
  /** Logs with the delivery's `webhookId`, `eventId`, `eventType`, `endpoint` and `tenant`, and with `attempt` if the runner counts attempts. */
  readonly log: FastifyBaseLogger
  /** Aborts when the app is closing and `closeTimeout` has passed, but not at the deadline. */
  readonly signal: AbortSignal
  /** Set only if the handler runs in the request: with the `inline()` runner, or on a route with its own handler, whatever the runner. */
  readonly request?: VerifiedRequest
}

export interface Handler {
  readonly name: string
  readonly run: (event: unknown, context: EventContext) => unknown
}

/** The name of a route's own handler, in errors, dead letters and metrics. */
export const OWN_HANDLER = 'handler'

/**
 * Runs for a verified event. `this` is the Fastify scope that the handler was registered in. The handler may be asynchronous, and its result is
 * ignored. If it throws or rejects in a request, the sender is answered 500, and OpenAI sends the delivery again. If the delivery was
 * acknowledged before, the runner decides whether the handler runs again.
 */
export type EventHandler<Event> = (this: FastifyInstance, event: Event, context: EventContext) => void | PromiseLike<unknown>

export type RouteHandlers = {
  [Name in EventType | EventPattern]?: EventHandler<EventOf<Name>> | ReadonlyArray<EventHandler<EventOf<Name>>>
}
