import type { RouteHandlerMethod, onErrorHookHandler } from 'fastify'
import { isTemporary } from '../coded.ts'
import { noteError, recordAnswer } from '../delivery/own-handler.ts'
import { Responder } from '../delivery/responder.ts'
import type { Receiver } from '../delivery/receive.ts'
import type { AnySchema } from '../events/users.ts'
import type { Failures } from '../failures.ts'
import type { Observation } from '../observation.ts'
import { retryLater } from '../pipeline/acknowledge.ts'
import { keepRefusal, markHandling, markRefused, refuseErrors } from '../pipeline/refusal.ts'
import type { RouteErrorHandler } from '../pipeline/refusal.ts'
import { boundRefused } from '../pipeline/capture.ts'
import type { BodyBounds } from '../pipeline/capture.ts'
import type { Registry } from '../registry.ts'
import type { VerifiedRequest } from '../request.ts'
import { waitOf } from './authenticate.ts'
import type { Authentication } from './authenticate.ts'
import type { Bounds } from './bounds.ts'
import type { Endpoint, Endpoints } from './endpoint.ts'
import { unverified } from './guard.ts'
import type { Verifications } from './verifications.ts'

/** What the receiving routes of one registration share. */
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
  readonly onReady: Array<() => void>
  /** `app.openaiWebhook.handler`, which marks a route that dispatches. */
  readonly marker: RouteHandlerMethod
}

export interface RouteParts {
  /** The route's own handler, which replies. */
  readonly own: RouteHandlerMethod | undefined
  /** The route's own error handler. */
  readonly ownErrors?: RouteErrorHandler | undefined
  /** Returns the current handler of the route: an onRoute hook of the app may have wrapped the one made here. */
  readonly currentHandler: () => unknown
}

/** Makes the handler and the hooks that every receiving route has, besides the hook that captures and authenticates. */
export function receiving (routes: Routes, endpoint: Endpoint, body: BodyBounds, parts: RouteParts) {
  const { authentication, failures } = routes
  const keep = keepRefusal((request, statusCode) => failures.answeredByHook(endpoint.url, request, statusCode))
  return {
    onRequest: authentication.admit(endpoint),
    onSend: parts.own === undefined ? [keep] : [keep, recordAnswer],
    onError: onErrorHook(routes, endpoint, body),
    errorHandler: refuseErrors(parts.ownErrors),
    handler: deliver(routes, endpoint, parts)
  }
}

/** Makes the handler, which answers by the deadline. */
function deliver ({ receiver, deadline, failures }: Routes, { url }: Endpoint, { own, currentHandler }: RouteParts): RouteHandlerMethod {
  const options = { receiver, failures, own }
  const handle: RouteHandlerMethod = function (request, reply) {
    if (request.openaiWebhook === null) throw unverified(url)
    markHandling(request)
    const responder = new Responder(request as VerifiedRequest, reply, options, this)
    responder.run(Math.max(0, deadline - waitOf(request)))
    // If an async function wraps this handler and gets no promise from it, Fastify sends an empty answer at once.
    if (currentHandler() !== handle) return responder.answerSent()
  }
  return handle
}

/** Makes the onError hook, which runs after the app's. Whoever sends the answer, it is a refusal from now on. */
function onErrorHook ({ authentication }: Routes, endpoint: Endpoint, body: BodyBounds): onErrorHookHandler {
  return (request, reply, error, done) => {
    authentication.refusedByOthers(error, endpoint, request)
    noteError(request, error)
    markRefused(error, request, reply)
    if (isTemporary(error)) retryLater(reply)
    boundRefused(request, reply, body)
    done()
  }
}
