import type { FastifyReply, FastifyRequest } from 'fastify'
import type { DuplicateMessage } from './channels.ts'
import type { Handler } from './handlers.ts'
import type { Refused } from './registry.ts'
import type { VerifiedRequest } from './request.ts'
import type { DeadDelivery, Job } from './runners/runner.ts'

/**
 * Follows the deliveries of one registration through the six steps. Called as they happen, so it has to be quick, and must not
 * throw.
 */
export interface Observer {
  /** A request has come to a receiving route. */
  arrived (request: FastifyRequest, reply: FastifyReply, endpoint: string): void
  captured (request: FastifyRequest, rawBody: Buffer): void
  verified (request: FastifyRequest): void
  validated (request: VerifiedRequest): void
  /** The store has answered. */
  deduplicated (request: VerifiedRequest): void
  duplicate (request: VerifiedRequest, state: DuplicateMessage['state']): void
  /** A runner has taken it: the handlers run later. */
  queued (job: Job, request: VerifiedRequest): void
  /** The handlers start, in the request or out of a queue. */
  started (start: AttemptStart): ObservedAttempt
  /** It is not answered 200. */
  refused (refusal: { readonly code: string, readonly statusCode: number, readonly error: unknown }, delivery: Refused, request: FastifyRequest): void
  dead (delivery: DeadDelivery): void
}

export interface AttemptStart {
  readonly job: Job
  /** Absent where the job came out of a queue. */
  readonly request: VerifiedRequest | undefined
  /** How often a runner has started the handlers; `undefined` where it does not know. */
  readonly attempt: number | undefined
  readonly handlers: readonly Handler[]
  /** Those that had succeeded before and do not run. */
  readonly finished: readonly string[]
  /** Whether the route's own handler runs after them. */
  readonly replies: boolean
}

export interface ObservedAttempt {
  /** @param index of the handler in `handlers` */
  succeeded (index: number): void
  failed (index: number): void
  /** @param error as the handlers' run rejects */
  ended (error?: unknown): void
}

/** Whoever follows one registration. Nothing is kept or computed while nobody does. */
export class Observation {
  observer: Observer | undefined = undefined
}

/** On `app.openaiWebhook`: the parts of its registration, for the inspector. */
export const INSIDE = Symbol('openai-webhook.inside')
