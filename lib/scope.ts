import type { FastifyInstance } from 'fastify'
import type { DeadLetters } from './dead-letters.ts'
import { InvalidOptions } from './errors.ts'
import { assertRouteOptions } from './options.ts'
import type { AnyHandler, HandlerOptions } from './registry.ts'
import { INSIDE } from './observation.ts'
import { pluginRoute } from './routes/plugin-route.ts'
import type { Routes } from './routes/routes.ts'
import { unwrap } from './routes/unwrap.ts'
import type { OpenAIWebhook } from './api.ts'

/** `app.openaiWebhook` for one scope. Handlers get that scope as `this`, and routes are added to it. */
export class OpenAIWebhookScope implements OpenAIWebhook {
  readonly deadLetters: DeadLetters
  readonly #routes: Routes
  readonly #scope: FastifyInstance

  constructor (routes: Routes, deadLetters: DeadLetters, scope: FastifyInstance) {
    this.deadLetters = deadLetters
    this.#routes = routes
    this.#scope = scope
  }

  get [INSIDE] (): Routes { return this.#routes }

  get handler (): OpenAIWebhook['handler'] {
    return this.#routes.marker
  }

  on (types: string | readonly string[], handler: AnyHandler, options?: HandlerOptions): this {
    this.#routes.registry.open('on').app.on(types, handler, this.#scope, options)
    return this
  }

  onAny (handler: AnyHandler, options?: HandlerOptions): this {
    this.#routes.registry.open('onAny').app.onAny(handler, this.#scope, options)
    return this
  }

  onUnhandled (handler: AnyHandler, options?: HandlerOptions): this {
    this.#routes.registry.open('onUnhandled').app.onUnhandled(handler, this.#scope, options)
    return this
  }

  onError (handler: Parameters<OpenAIWebhook['onError']>[0]): this {
    if (typeof handler !== 'function') throw new InvalidOptions(`onError(): expected a function, got ${typeof handler}`)
    this.#routes.registry.open('onError').errorHandlers.push(handler)
    return this
  }

  onDead (handler: Parameters<OpenAIWebhook['onDead']>[0]): this {
    if (typeof handler !== 'function') throw new InvalidOptions(`onDead(): expected a function, got ${typeof handler}`)
    this.#routes.registry.open('onDead').deadHandlers.push(handler)
    return this
  }

  route (options: Parameters<OpenAIWebhook['route']>[0]): this {
    this.#routes.registry.open('route')
    assertRouteOptions(options)
    pluginRoute(this.#routes, this.#scope, options)
    return this
  }

  unwrap (...[rawBody, headers, overrides]: Parameters<OpenAIWebhook['unwrap']>): ReturnType<OpenAIWebhook['unwrap']> {
    return unwrap(this.#routes, rawBody, headers, overrides) as ReturnType<OpenAIWebhook['unwrap']>
  }
}
