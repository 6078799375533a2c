import type { IncomingHttpHeaders } from 'node:http'
import type { FastifyReply, FastifyRequest } from 'fastify'
import { channels } from '../channels.ts'
import type { Failures } from '../failures.ts'
import { validate } from '../pipeline/validate.ts'
import type { ParseJson, Validators } from '../pipeline/validate.ts'
import { headerFault, verify } from '../pipeline/verify.ts'
import type { Verification } from '../pipeline/verify.ts'
import { isPromise, then } from '../steps.ts'
import type { MaybePromise } from '../steps.ts'
import type { WebhookEvent } from '../events/map.ts'
import type { Delivery, VerifiedRequest } from '../request.ts'
import type { Endpoint } from './endpoint.ts'
import { Explainer } from './explain.ts'

type Done = (error?: Error) => void

type Authentic = Pick<Delivery, 'webhookId' | 'timestamp' | 'event'> & {
  /** Which secret matched: for the channels, and nobody else. */
  readonly secretIndex: number | undefined
}

/** verify → validate: what a request carries becomes a delivery that can be trusted, or is refused. */
export class Authentication {
  readonly #parse: ParseJson
  readonly #validators: Validators
  readonly #failures: Failures
  readonly #explainer: Explainer
  /** What has been told. By identity, since a verifier of the user's may throw any code. */
  readonly #told = new WeakSet<object>()

  constructor (parse: ParseJson, validators: Validators, failures: Failures) {
    this.#parse = parse
    this.#validators = validators
    this.#failures = failures
    this.#explainer = new Explainer(failures)
  }

  /** onRequest: refuses what the headers alone condemn. */
  admit (endpoint: Endpoint) {
    return (request: FastifyRequest, _reply: FastifyReply, done: Done): void => {
      const fault = headerFault(endpoint, request.headers)
      if (fault !== undefined) this.refuse(fault, endpoint, request)
      done(fault)
    }
  }

  /** Sets `request.openaiWebhook`, or tells why not. */
  authenticate (endpoint: Endpoint, request: FastifyRequest, rawBody: Buffer, done: Done): void {
    const settle = (authentic: Authentic | Error): void => {
      if (authentic instanceof Error) {
        this.refuse(authentic, endpoint, request)
        this.#explainer.explain(authentic, endpoint, request, rawBody)
        return done(authentic)
      }
      const { webhookId, timestamp, event, secretIndex } = authentic
      request.openaiWebhook = { webhookId, timestamp, endpoint: endpoint.name, rawBody, event }
      if (channels.verified.hasSubscribers) {
        channels.verified.publish({ endpoint: endpoint.name, webhookId, timestamp, event, secretIndex, bodySize: rawBody.length, request: request as VerifiedRequest })
      }
      done()
    }
    let authentic
    try {
      authentic = this.verify(endpoint, request.headers, rawBody)
    } catch (error) {
      return settle(thrownBySchema(error))
    }
    if (isPromise<Authentic | Error>(authentic)) authentic.then(settle, error => settle(thrownBySchema(error)))
    else settle(authentic)
  }

  /** @returns the coded error to refuse with where it is none */
  verify (verification: Verification, headers: IncomingHttpHeaders, rawBody: Buffer): MaybePromise<Authentic | Error> {
    return then(verify(verification, { rawBody, headers }), verified => {
      if (verified instanceof Error) return verified
      const { webhookId, timestamp, keyIndex } = verified
      const event = validate(rawBody, this.#parse, this.#validators)
      if (event instanceof Error) return event
      return { webhookId, timestamp, event: event as WebhookEvent, secretIndex: keyIndex }
    })
  }

  /** Before there is an event to name. */
  refuse (error: Error, { name }: Endpoint, request: FastifyRequest): void {
    this.#told.add(error)
    this.#failures.refused(error, { endpoint: name }, request)
  }

  /** Whether a refusal has been told of here. */
  hasTold (error: Error): boolean {
    return this.#told.has(error)
  }
}

/** The one thing that may throw in there is a schema of the user's, and anything. */
function thrownBySchema (cause: unknown): Error {
  return cause instanceof Error ? cause : new Error('a schema threw what is no Error, as the event was checked', { cause })
}
