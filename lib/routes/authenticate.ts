import type { FastifyReply, FastifyRequest } from 'fastify'
import { channels } from '../channels.ts'
import { InvalidSignature, UnknownTenant } from '../errors.ts'
import type { Failures } from '../failures.ts'
import type { RefusedDelivery } from '../log.ts'
import { hasProgress, isHandlerTimeout, isRefused, markTimedOut } from '../pipeline/refusal.ts'
import { validate } from '../pipeline/validate.ts'
import type { Validators } from '../pipeline/validators.ts'
import { signedHeadersOf, verify } from '../pipeline/verify.ts'
import type { Verification } from '../pipeline/verify.ts'
import { isPromise, then } from '../maybe-promise.ts'
import type { Observation } from '../observation.ts'
import type { WebhookEvent } from '../events/map.ts'
import type { VerifiedRequest } from '../request.ts'
import type { SignedHeaders, Verified } from '../verifiers/verifier.ts'
import type { Endpoint } from './endpoint.ts'
import { explainer } from './explain.ts'

type Done = (error?: Error) => void

/** Key on a request whose value is what was read from its headers. */
const SIGNED = Symbol('openai-webhook.signed')

/** Key on a request whose value is how many ms it has waited for a secret. */
const WAITED = Symbol('openai-webhook.waited')

type Admitted = FastifyRequest & { [SIGNED]?: SignedHeaders | undefined, [WAITED]?: number }

/** How many ms of the deadline are over when the handler of the route is called. */
export const waitOf = (request: FastifyRequest): number => (request as Admitted)[WAITED] ?? 0

/** What is known about a refused delivery. The webhook-id is set if the signature matched. */
type Known = Pick<RefusedDelivery, 'tenant' | 'webhookId'>

/** The verify and validate steps: they turn a request into a trusted delivery, or refuse it. */
export class Authentication {
  readonly #explain: ReturnType<typeof explainer>
  /** The answers to refusals that have been logged and reported. Kept by identity, because a user's verifier may throw an error with any code. */
  readonly #answers = new WeakSet<object>()

  constructor (readonly validators: Validators, readonly failures: Failures, readonly observation: Observation) {
    this.#explain = explainer(failures)
  }

  /** Makes the onRequest hook, which refuses requests by their headers alone. */
  admit (endpoint: Endpoint) {
    return (request: FastifyRequest, reply: FastifyReply, done: Done): void => {
      this.observation.observer?.arrived(request, reply, endpoint.url)
      const signed = signedHeadersOf(endpoint, request.headers)
      if (signed instanceof Error) return done(this.refused(signed, endpoint, request))
      ;(request as Admitted)[SIGNED] = signed
      done()
    }
  }

  /** Sets `request.openaiWebhook` and calls `done`, or calls `done` with the error that refuses the request. */
  authenticate (endpoint: Endpoint, request: FastifyRequest, rawBody: Buffer, done: Done): void {
    const { observer } = this.observation
    observer?.captured(request, rawBody)
    const { url, tenants } = endpoint
    const tenant = tenants?.nameOf(request)
    if (tenant instanceof Error) return done(this.refused(tenant, endpoint, request))
    let verification: Verification = endpoint
    // A hook of the app that throws null makes Fastify skip the hook that reads the headers.
    const signed = (request as Admitted)[SIGNED] ?? signedHeadersOf(endpoint, request.headers)
    const delivery = { rawBody, headers: request.headers }

    const settle = (verified: Verified | Error): void => {
      if (verified instanceof Error) {
        this.#explain(verified, url, verification, request, rawBody)
        return done(this.refused(verified, endpoint, request, { tenant }))
      }
      observer?.verified(request)
      const { webhookId, timestamp, keyIndex } = verified
      const event = validate(rawBody, this.validators) as WebhookEvent | Error
      if (event instanceof Error) return done(this.refused(event, endpoint, request, { tenant, webhookId }))
      request.openaiWebhook = { webhookId, timestamp, endpoint: url, ...(tenant !== undefined && { tenant }), rawBody, event }
      if (channels.verified.hasSubscribers) {
        channels.verified.publish({ endpoint: url, tenant, webhookId, timestamp, event, secretIndex: keyIndex, bodySize: rawBody.length, request: request as VerifiedRequest })
      }
      observer?.validated(request as VerifiedRequest)
      done()
    }
    const verified = then(tenant === undefined ? endpoint : tenants!.verificationOf(tenant), (found: Verification | Error) => {
      if (found instanceof Error) return found
      verification = found
      return verify(found, delivery, signed)
    })
    if (!isPromise<Verified | Error>(verified)) return settle(verified)
    const since = performance.now()
    verified.then(verified => {
      (request as Admitted)[WAITED] = performance.now() - since
      settle(verified)
    }, done)
  }

  /**
   * Logs, publishes and reports the refusal of a request whose event is not known. Does nothing if the request has been refused already, such as by
   * Fastify's `handlerTimeout`.
   *
   * @returns the error that the sender is answered
   */
  refused (error: Error, { url }: Endpoint, request: FastifyRequest, { tenant, webhookId }: Known = {}): Error {
    if (!hasProgress(request)) this.failures.refused(error, { endpoint: url, tenant, webhookId }, request)
    const answer = error instanceof UnknownTenant ? new InvalidSignature() : error
    this.#answers.add(answer)
    return answer
  }

  /**
   * For onError hooks, before the request is marked as refused: does the same for what Fastify, another plugin or a hook of the app has refused,
   * such as a body that is too large or a rate limit. The plugin's own refusals have been reported.
   */
  refusedByOthers (error: Error, { url }: Endpoint, request: FastifyRequest): void {
    const isTimeout = isHandlerTimeout(error) && !isRefused(request)
    if (isTimeout) markTimedOut(request)
    if (!this.#answers.has(error) && (isTimeout || !hasProgress(request))) this.failures.refused(error, request.openaiWebhook ?? { endpoint: url }, request)
  }
}
