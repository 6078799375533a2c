import type { FastifyContextConfig, FastifyInstance, RegisterOptions, RouteHandlerMethod, RouteOptions } from 'fastify'
import { InvalidOptions } from '../errors.ts'
import { captureBody } from '../pipeline/capture.ts'
import type { WebhookRouteOptions } from '../options.ts'
import type { VerifiedRequest } from '../request.ts'
import { PROTECTED } from './guard.ts'
import { declareRoute, shareDecorators } from './child-scope.ts'
import { receiving } from './routes.ts'
import type { Routes } from './routes.ts'

/** Adds a receiving route in its own scope, so that body parsing does not change on any other route. */
export function pluginRoute (
  routes: Routes,
  scope: FastifyInstance,
  { url, on, handler, rateLimit, ...overrides }: WebhookRouteOptions,
  options: RegisterOptions = {}
): void {
  const { authentication, bounds, endpoints, events, onReady, registry, verifications } = routes
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
    // As Fastify joins the two.
    const endpoint = endpoints.add(child.prefix.replace(/\/$/, '') + url, verification, [registry.app, list], overrides.tenant)
    // Loaded only if it can be used: @fastify/swagger documents only the routes that are declared after it.
    const documents = scope.hasPlugin('@fastify/swagger') ? await import('./openapi.ts') : undefined
    let declared: RouteOptions | undefined
    child.addHook('onRoute', route => { declared = route })
    const parts = receiving(routes, endpoint, body, { own, currentHandler: () => declared!.handler })
    onReady.push(declareRoute(child, scope, {
      method: 'POST',
      url,
      bodyLimit: body.limit,
      config: {
        [PROTECTED]: parts.onRequest,
        ...(documents !== undefined && { swaggerTransform: documents.documentation({ events, verifier: verification.verifier, replies: own !== undefined }) }),
        ...(rateLimit !== undefined && { rateLimit })
      } as FastifyContextConfig,
      ...parts,
      preHandler: (request, _reply, done) => {
        // Fastify does not parse a request that has neither a body nor a content type.
        const rawBody = Buffer.isBuffer(request.body) ? request.body : Buffer.alloc(0)
        authentication.authenticate(endpoint, request, rawBody, error => {
          if (error === undefined) request.body = (request as VerifiedRequest).openaiWebhook.event
          done(error)
        })
      }
    }))
  }, options)
}
