import fastify from 'fastify'
import type { FastifyContextConfig, FastifyInstance, FastifyReply, FastifyRequest, RequestPayload, RouteOptions } from 'fastify'
import { inContext } from '../async-context.ts'
import { isObject } from '../checks.ts'
import { InvalidRoute } from '../errors.ts'
import { assertOverrides } from '../options.ts'
import { closeConnection } from '../pipeline/acknowledge.ts'
import { readPayload, replayPayload } from '../pipeline/capture.ts'
import type { BodyBounds } from '../pipeline/capture.ts'
import type { RouteErrorHandler } from '../pipeline/refusal.ts'
import type { Endpoint } from './endpoint.ts'
import { PROTECTED, isProtected, unverified } from './guard.ts'
import { receiving } from './routes.ts'
import type { Routes } from './routes.ts'
import { assertSpelling } from './unprotected.ts'

/** onRoute hook: adds the pipeline to a route that asks for it with `config.openaiWebhook`. */
export function protectMarked (routes: Routes, scope: FastifyInstance, route: RouteOptions): void {
  const config: unknown = route.config?.openaiWebhook
  if (isProtected(route)) return
  if (config === undefined) return assertSpelling(route)
  assertMarkable(route)
  assertOverrides(config)
  const { on, ...overrides } = config
  const { bounds, endpoints, registry, verifications } = routes
  const body = bounds.of(overrides, route.bodyLimit)
  const verification = verifications.of(overrides, true)
  const list = registry.listOf(on, scope)
  const dispatches = route.handler === routes.marker
  const endpoint = endpoints.add(route.url, verification, dispatches ? [registry.app, list] : [list], overrides.tenant)

  const capture = captureAndAuthenticate(routes, endpoint, body)
  const { onRequest, onSend, onError, errorHandler, handler } = receiving(routes, endpoint, body, {
    own: dispatches ? undefined : route.handler,
    ownErrors: route.errorHandler as RouteErrorHandler | undefined,
    currentHandler: () => route.handler
  })
  route.config = { ...route.config, [PROTECTED]: capture } as FastifyContextConfig
  route.bodyLimit = body.limit
  route.onRequest = [onRequest, route.onRequest ?? []].flat()
  route.preParsing = [capture, route.preParsing ?? []].flat()
  // Added only if the route has such hooks itself. Otherwise assertVerified would follow the app's last hook, and Fastify treats an odd
  // `done('')` as an error only in the last hook.
  if (route.preValidation !== undefined) route.preValidation = [assertVerified, route.preValidation].flat()
  if (route.preHandler !== undefined) route.preHandler = [assertVerified, route.preHandler].flat()
  route.onSend = [route.onSend ?? [], onSend].flat()
  route.onError = [route.onError ?? [], onError].flat()
  route.errorHandler = errorHandler
  route.handler = handler
}

/** @throws FST_OPENAI_WEBHOOK_INVALID_ROUTE */
function assertMarkable ({ method, url, config, schema }: RouteOptions): void {
  const fault = (reason: string): Error => new InvalidRoute(String(method), url, reason)
  if (method !== 'POST' && !(Array.isArray(method) && method.length === 1 && method[0] === 'POST')) {
    throw fault('expected the method POST alone, which is what OpenAI sends')
  }
  if (!isObject(config?.openaiWebhook)) throw fault('expected config.openaiWebhook to be an object, such as {}')
  if ((schema as { body?: unknown } | undefined)?.body !== undefined) {
    throw fault('schema.body would be checked before the signature, and tell unsigned senders about it: remove it, events are validated after verification')
  }
}

/** Keeps the route's own hooks from running if verification was skipped. The handler would notice only after they had run. */
function assertVerified (request: FastifyRequest, _reply: FastifyReply, done: (error?: Error) => void): void {
  if (request.openaiWebhook === null) return done(unverified(String(request.routeOptions.url)))
  done()
}

/** Makes the hook that verifies. It runs in preParsing, so that the user's parser gets verified bytes only. */
function captureAndAuthenticate ({ authentication }: Routes, endpoint: Endpoint, body: BodyBounds) {
  return (request: FastifyRequest, reply: FastifyReply, payload: RequestPayload, done: (error: Error | null, payload?: RequestPayload) => void): void => {
    const refuse = (error: Error): void => done(authentication.refused(error, endpoint, request))
    const { 'content-type': contentType, 'content-length': contentLength, 'transfer-encoding': transferEncoding } = request.headers
    const isEmpty = transferEncoding === undefined && (contentLength === undefined || contentLength === '0')
    // Fastify requires no content type if there is no body. If there is one, a catch-all parser of the app must not accept another type.
    if (contentType === undefined ? !isEmpty : !/^application\/json\s*(?:;|$)/i.test(contentType)) {
      return refuse(new fastify.errorCodes.FST_ERR_CTP_INVALID_MEDIA_TYPE())
    }
    // inContext, as Fastify does for content type parsers: the socket's events lack the request's async context, which tracers need.
    readPayload(request, payload, body, inContext((error: Error | null, rawBody: Buffer = Buffer.alloc(0)) => {
      if (error !== null) {
        // The sender may continue to send a body that nobody reads.
        closeConnection(reply)
        return refuse(error)
      }
      authentication.authenticate(endpoint, request, rawBody, error => {
        if (error === undefined) done(null, replayPayload(rawBody, payload.receivedEncodedLength))
        else done(error)
      })
    }))
  }
}
