import type { FastifyBaseLogger, FastifyInstance } from 'fastify'
import type { EventOf, EventPattern, EventType } from './events/map.ts'
import type { VerifiedRequest } from './request.ts'

export interface EventContext {
  /** The idempotency key: the same for every retry of the delivery. */
  readonly webhookId: string
  /** When the delivery was signed, in Unix seconds. */
  readonly timestamp: number
  /** The receiving route's URL. */
  readonly endpoint: string
  /** The tenant whose secret it was signed with; only where the route serves many. */
  readonly tenant?: string
  /** Logs with the delivery's `webhookId`, `eventId`, `eventType`, `endpoint` and `tenant`, and with `attempt` where a runner counts them. */
  readonly log: FastifyBaseLogger
  /** Aborts when the app is closing and `closeTimeout` is over; not at the deadline. */
  readonly signal: AbortSignal
  /** Present only where the handler runs in the request: by the `inline()` runner, and on a route with a handler of its own, whatever the runner. */
  readonly request?: VerifiedRequest
}

export interface Handler {
  readonly name: string
  readonly run: (event: unknown, context: EventContext) => unknown
}

/** The name of a route's own handler, in errors and dead letters. */
export const OWN_HANDLER = 'handler'

/**
 * Runs for a verified event; `this` is the Fastify scope it was registered in. It may be asynchronous; what it returns counts for
 * nothing. When it throws or rejects, the sender is told to deliver again.
 */
export type EventHandler<Event> = (this: FastifyInstance, event: Event, context: EventContext) => void | PromiseLike<unknown>

export type RouteHandlers = {
  [Name in EventType | EventPattern]?: EventHandler<EventOf<Name>> | ReadonlyArray<EventHandler<EventOf<Name>>>
}
