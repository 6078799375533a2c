import type { FastifyInstance } from 'fastify'
import type { DeadLetters } from './dead-letters.ts'
import { InvalidOptions } from './errors.ts'
import { assertRouteOptions } from './options.ts'
import type { WebhookRouteOptions } from './options.ts'
import type { AnyHandler, HandlerOptions } from './registry.ts'
import { INSIDE } from './observation.ts'
import { pluginRoute } from './routes/plugin-route.ts'
import type { Routes } from './routes/routes.ts'
import { unwrap } from './routes/unwrap.ts'
import type { OpenAIWebhook } from './api.ts'

/** Makes `app.openaiWebhook` for one scope. Handlers get that scope as `this`, and routes are added to it. */
export function scopeOf (routes: Routes, deadLetters: DeadLetters, scope: FastifyInstance): OpenAIWebhook & { readonly [INSIDE]: Routes } {
  const { registry, marker } = routes

  function add<Listener> (method: string, listeners: Listener[], listener: Listener): void {
    if (typeof listener !== 'function') throw new InvalidOptions(`${method}(): expected a function, got ${typeof listener}`)
    registry.open(method)
    listeners.push(listener)
  }

  const made: OpenAIWebhook = {
    deadLetters,
    handler: marker,
    on (types: string | readonly string[], handler: AnyHandler, options?: HandlerOptions) {
      registry.open('on').app.on(types, handler, scope, options)
      return this
    },
    onAny (handler: AnyHandler, options?: HandlerOptions) {
      registry.open('onAny').app.onAny(handler, scope, options)
      return this
    },
    onUnhandled (handler: AnyHandler, options?: HandlerOptions) {
      registry.open('onUnhandled').app.onUnhandled(handler, scope, options)
      return this
    },
    onError (handler) {
      add('onError', registry.errorHandlers, handler)
      return this
    },
    onDead (handler) {
      add('onDead', registry.deadHandlers, handler)
      return this
    },
    route (options: WebhookRouteOptions) {
      registry.open('route')
      assertRouteOptions(options)
      pluginRoute(routes, scope, options)
      return this
    },
    unwrap: async (rawBody, headers, overrides) => await unwrap(routes, rawBody, headers, overrides) as never
  }
  // Not enumerable, so that copies of the object do not lead to the secret.
  return Object.defineProperty(made, INSIDE, { value: routes }) as OpenAIWebhook & { readonly [INSIDE]: Routes }
}
