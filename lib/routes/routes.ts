import type { FastifyInstance, RouteHandlerMethod } from 'fastify'
import { Deadline } from '../deadline.ts'
import { Reply } from '../delivery/reply.ts'
import type { Receiver } from '../delivery/receive.ts'
import type { AnySchema } from '../events/users.ts'
import type { Failures } from '../failures.ts'
import { DEFAULTS } from '../options.ts'
import type { ReceivingOptions } from '../options.ts'
import type { Observation } from '../observation.ts'
import type { BodyBounds } from '../pipeline/capture.ts'
import type { Registry } from '../registry.ts'
import type { VerifiedRequest } from '../request.ts'
import type { Verifications } from './verifications.ts'
import { markHandling } from '../pipeline/answer.ts'
import type { Authentication } from './authenticate.ts'
import type { Endpoint, Endpoints } from './endpoint.ts'
import { unverified } from './guard.ts'

/** Shared by the receiving routes of one registration. */
export interface Routes {
  readonly registry: Registry
  readonly events: Readonly<Record<string, AnySchema>>
  readonly endpoints: Endpoints
  readonly verifications: Verifications
  readonly authentication: Authentication
  readonly failures: Failures
  readonly observation: Observation
  readonly receiver: Receiver
  /** ms */
  readonly deadline: number
  readonly bounds: Bounds
  /** Called when the app is ready. */
  readonly settles: Array<() => void>
  /** `app.openaiWebhook.handler`, which marks a route that dispatches. */
  readonly handler: RouteHandlerMethod
}

/**
 * Makes the handler of a receiving route: it has the delivery received, and answered by the deadline.
 *
 * @param declared the handler of the route by now: an onRoute hook of the app may have put a function of its own around this one
 */
export function deliver ({ receiver, deadline, failures }: Routes, { name }: Endpoint, own: RouteHandlerMethod | undefined, declared: () => unknown): RouteHandlerMethod {
  const options = { receiver, deadline, failures, own }
  const handle: RouteHandlerMethod = function (request, reply) {
    if (request.openaiWebhook === null) throw unverified(name)
    markHandling(request, own !== undefined)
    const answer = new Reply(request as VerifiedRequest, reply, options, this)
    answer.run()
    // An async function around this one that was given nothing would have Fastify answer with nothing, at once.
    if (declared() !== handle) return answer.given()
  }
  return handle
}

/** The bounds of bodies, before it is known who has sent them. */
export class Bounds {
  readonly #options: ReceivingOptions
  readonly #requestTimeout: number
  /** By their ms. */
  readonly #deadlines = new Map<number, Deadline>()

  constructor (options: ReceivingOptions, { initialConfig }: FastifyInstance) {
    this.#options = options
    // Applied here as well: Node checks it every 30 s, and not at all under HTTP/2.
    const { requestTimeout = 0 } = initialConfig as { requestTimeout?: number }
    this.#requestTimeout = requestTimeout > 0 ? requestTimeout : Infinity
  }

  /** @param ofRoute a marked route's own Fastify `bodyLimit` */
  of ({ bodyLimit, bodyTimeout }: ReceivingOptions, ofRoute?: number): BodyBounds {
    const ms = Math.min(bodyTimeout ?? this.#options.bodyTimeout ?? DEFAULTS.bodyTimeout, this.#requestTimeout)
    let deadline = this.#deadlines.get(ms)
    if (deadline === undefined) this.#deadlines.set(ms, deadline = new Deadline(ms))
    return { limit: bodyLimit ?? ofRoute ?? this.#options.bodyLimit ?? DEFAULTS.bodyLimit, deadline }
  }

  /** The app is closing: a body that is still arriving must not hold it open, since its delivery comes again. */
  close (): void {
    for (const deadline of this.#deadlines.values()) deadline.close()
  }
}
