import type { FastifyInstance } from 'fastify'
import { InvalidOptions } from './errors.ts'
import { assertRouteOptions } from './options.ts'
import type { Plugin } from './plugin.ts'
import type { AnyHandler, HandlerOptions } from './registry.ts'
import type { OpenAIWebhook } from './types.ts'

/** `app.openaiWebhook` as one scope sees it: handlers get that scope as `this`, routes are added to it. */
export class OpenAIWebhookScope implements OpenAIWebhook {
  readonly #plugin: Plugin
  readonly #scope: FastifyInstance

  constructor (plugin: Plugin, scope: FastifyInstance) {
    this.#plugin = plugin
    this.#scope = scope
  }

  get handler (): OpenAIWebhook['handler'] {
    return this.#plugin.handler
  }

  get deadLetters (): OpenAIWebhook['deadLetters'] {
    return this.#plugin.deadLetters
  }

  on (types: string | readonly string[], handler: AnyHandler, options?: HandlerOptions): this {
    this.#open('on').app.on(types, handler, this.#scope, options)
    return this
  }

  onAny (handler: AnyHandler, options?: HandlerOptions): this {
    this.#open('onAny').app.onAny(handler, this.#scope, options)
    return this
  }

  onUnhandled (handler: AnyHandler, options?: HandlerOptions): this {
    this.#open('onUnhandled').app.onUnhandled(handler, this.#scope, options)
    return this
  }

  onError (handler: Parameters<OpenAIWebhook['onError']>[0]): this {
    if (typeof handler !== 'function') throw new InvalidOptions(`onError(): expected a function, got ${typeof handler}`)
    this.#open('onError').errorHandlers.push(handler)
    return this
  }

  onDead (handler: Parameters<OpenAIWebhook['onDead']>[0]): this {
    if (typeof handler !== 'function') throw new InvalidOptions(`onDead(): expected a function, got ${typeof handler}`)
    this.#open('onDead').deadHandlers.push(handler)
    return this
  }

  route (options: Parameters<OpenAIWebhook['route']>[0]): this {
    this.#open('route')
    assertRouteOptions(options)
    this.#plugin.receiveAt(this.#scope, options)
    return this
  }

  unwrap (...[rawBody, headers, overrides]: Parameters<OpenAIWebhook['unwrap']>): ReturnType<OpenAIWebhook['unwrap']> {
    return this.#plugin.unwrap(rawBody, headers, overrides) as ReturnType<OpenAIWebhook['unwrap']>
  }

  #open (method: string): Plugin['registry'] {
    this.#plugin.registry.assertOpen(method)
    return this.#plugin.registry
  }
}
