import type { FastifyReply, FastifyRequest } from 'fastify'
import type { DuplicateMessage } from './channels.ts'
import type { Handler } from './handlers.ts'
import type { RefusedDelivery } from './log.ts'
import type { VerifiedRequest } from './request.ts'
import type { DeadDelivery, Job } from './runners/runner.ts'

/**
 * Follows the deliveries of one registration through the six steps. The methods are called as the steps happen, so they have to be fast and must
 * not throw.
 */
export interface Observer {
  /** A request has arrived at a receiving route. */
  arrived (request: FastifyRequest, reply: FastifyReply, endpoint: string): void
  captured (request: FastifyRequest, rawBody: Buffer): void
  verified (request: FastifyRequest): void
  validated (request: VerifiedRequest): void
  /** The store has answered. */
  deduplicated (request: VerifiedRequest): void
  duplicate (request: VerifiedRequest, state: DuplicateMessage['state']): void
  /** A runner has accepted the delivery, and runs the handlers later. */
  queued (job: Job, request: VerifiedRequest): void
  /** The handlers start, in the request or for a job of a queue. */
  started (start: AttemptStart): ObservedAttempt
  /** The delivery is not answered 200. */
  refused (refusal: Refusal, delivery: RefusedDelivery, request: FastifyRequest): void
  dead (delivery: DeadDelivery): void
}

/** What a sender is answered other than 200. */
export interface Refusal {
  readonly code: string
  readonly statusCode: number
  readonly error: unknown
}

export interface AttemptStart {
  readonly job: Job
  /** `undefined` if the job comes from a queue. */
  readonly request: VerifiedRequest | undefined
  /** How often the runner has started the handlers, including this time; `undefined` if the runner does not know. */
  readonly attempt: number | undefined
  readonly handlers: readonly Handler[]
  /** Names of the handlers that have succeeded before and do not run again. */
  readonly finished: readonly string[]
  /** Whether the route's own handler runs after the event handlers. */
  readonly replies: boolean
}

export interface ObservedAttempt {
  /** @param index of the handler in `handlers` */
  succeeded (index: number): void
  failed (index: number): void
  /** @param error with which the run of the handlers rejects */
  ended (error?: unknown): void
}

/** Holds the observer of one registration. Without an observer nothing is kept or computed for it. */
export class Observation {
  observer: Observer | undefined = undefined
}

/** Key on `app.openaiWebhook` for the parts of its registration, which the inspector uses. */
export const INSIDE = Symbol('openai-webhook.inside')
