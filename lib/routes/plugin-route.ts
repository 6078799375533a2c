import type { FastifyContextConfig, FastifyInstance, RegisterOptions, RouteHandlerMethod, RouteOptions } from 'fastify'
import { recordAnswer } from '../delivery/own-handler.ts'
import { InvalidOptions } from '../errors.ts'
import { captureBody } from '../pipeline/capture.ts'
import type { WebhookRouteOptions } from '../options.ts'
import type { VerifiedRequest } from '../request.ts'
import { keepRefusal, refuseErrors } from '../pipeline/refusal.ts'
import { PROTECTED } from './guard.ts'
import { declareRoute, shareDecorators } from './child-scope.ts'
import { deliver, refusing } from './routes.ts'
import type { Routes } from './routes.ts'

/** Adds a receiving route in its own scope, so that body parsing does not change on any other route. */
export function pluginRoute (
  routes: Routes,
  scope: FastifyInstance,
  { url, on, handler, rateLimit, ...overrides }: WebhookRouteOptions,
  options: RegisterOptions = {}
): void {
  const { authentication, bounds, endpoints, events, failures, onReady, registry, verifications } = routes
  // Without @fastify/rate-limit the option would silently limit nothing.
  if (typeof rateLimit === 'object' && !scope.hasDecorator('rateLimit')) {
    throw new InvalidOptions('rateLimit: expected @fastify/rate-limit to be registered before, got none')
  }
  const verification = verifications.of(overrides, true)
  const list = registry.listOf(on, scope)
  const own = handler === routes.marker ? undefined : handler as RouteHandlerMethod | undefined
  const body = bounds.of(overrides)
  scope.register(async child => {
    captureBody(child, body)
    shareDecorators(child)
    // As Fastify joins them.
    const name = child.prefix.replace(/\/$/, '') + url
    const endpoint = endpoints.add(name, verification, [registry.app, list], verifications.tenantsOf(name, overrides.tenant, verification))
    const admit = authentication.admit(endpoint)
    // Loaded only if it can be used: @fastify/swagger documents only the routes that are declared after it.
    const documents = scope.hasPlugin('@fastify/swagger') ? await import('./openapi.ts') : undefined
    let declared: RouteOptions | undefined
    child.addHook('onRoute', route => { declared = route })
    const keep = keepRefusal((request, statusCode) => failures.answeredByHook(endpoint.name, request, statusCode))
    onReady.push(declareRoute(child, scope, {
      method: 'POST',
      url,
      bodyLimit: body.limit,
      config: {
        [PROTECTED]: admit,
        ...(documents !== undefined && { swaggerTransform: documents.documentation({ events, verifier: verification.verifier, replies: own !== undefined }) }),
        ...(rateLimit !== undefined && { rateLimit })
      } as FastifyContextConfig,
      onRequest: admit,
      preHandler: (request, _reply, done) => {
        // Fastify does not parse a request that has neither a body nor a content type.
        const rawBody = Buffer.isBuffer(request.body) ? request.body : Buffer.alloc(0)
        authentication.authenticate(endpoint, request, rawBody, error => {
          if (error === undefined) request.body = (request as VerifiedRequest).openaiWebhook.event
          done(error)
        })
      },
      onError: refusing(routes, endpoint, body),
      onSend: own === undefined ? keep : [keep, recordAnswer],
      errorHandler: refuseErrors(undefined),
      handler: deliver(routes, endpoint, own, () => declared!.handler)
    }))
  }, options)
}
