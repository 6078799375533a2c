import type { IncomingHttpHeaders } from 'node:http'
import type { FastifyInstance, FastifyReply, FastifyRequest, HookHandlerDoneFunction } from 'fastify'
import { assertRules, isFunction, wholeNumber } from '../checks.ts'
import type { Rule } from '../checks.ts'

/** With `done` or asynchronous. One type, since TypeScript infers no parameters from Fastify's two. */
export type OnRequest = (this: FastifyInstance, request: FastifyRequest, reply: FastifyReply, done: HookHandlerDoneFunction) => void | Promise<unknown>

export interface InspectorOptions {
  /**
   * Where the page is, within the `prefix` of `register`.
   *
   * @default '/openai-webhook'
   */
  path?: string
  /**
   * Lets in who may see deliveries, as Fastify's hook of this name: your authentication. Without it the page is served on the
   * loopback interface alone, and not at all where NODE_ENV is `production`.
   */
  onRequest?: OnRequest | readonly OnRequest[]
  /**
   * Whether the page may only look: no sending, no requeueing. A function decides for each request, and nothing but `false` lets
   * it act.
   *
   * @default true where NODE_ENV is 'production', else false
   */
  readOnly?: boolean | ((request: FastifyRequest) => boolean | Promise<boolean>)
  /**
   * Deliveries that are kept, of 16 MB at most.
   *
   * @default 500
   */
  max?: number
  /**
   * The headers as they are shown, given a copy of those that arrived. By default `authorization`, `proxy-authorization`, `cookie`
   * and `set-cookie` are hidden; they are after yours too.
   */
  redact?: (headers: IncomingHttpHeaders) => IncomingHttpHeaders
}

/** The defaults of options. Each stands at its option too, as `@default`. */
export const DEFAULTS = { path: '/openai-webhook', max: 500 }

/** Deliveries. A page with more would be slow. */
const MOST = 10_000

const rules: Record<keyof Required<InspectorOptions>, Rule> = {
  path: { expected: 'a path such as "/openai-webhook", without ":", "*", "?", "#" or a "/" at its end', accepts: value => typeof value === 'string' && /^\/[^\s?#:*]*[^\s?#:*/]$/.test(value) },
  onRequest: { expected: 'a hook or a non-empty array of hooks', accepts: value => isFunction(value) || (Array.isArray(value) && value.length > 0 && value.every(isFunction)) },
  readOnly: { expected: 'a boolean or a function of the request', accepts: value => typeof value === 'boolean' || isFunction(value) },
  max: wholeNumber('deliveries', 1, MOST),
  redact: { expected: 'a function of the headers', accepts: isFunction }
}

/** Options of `register` that Fastify itself or fastify-cli reads. */
const FASTIFY_OPTIONS = ['prefix', 'logLevel', 'logSerializers', 'skipOverride']

/** @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS */
export function assertInspectorOptions (options: object): asserts options is InspectorOptions {
  assertRules(rules, options, {
    caller: 'inspector: ',
    foreign: FASTIFY_OPTIONS,
    advice: name => OTHER_NAMES.test(name) ? ', did you mean "onRequest"?' : undefined
  })
}

/** Of what lets in who may look; by its letters alone, `auth` is nearest to `path`. */
const OTHER_NAMES = /^(?:auth|authenticate|authentication|preHandler)$/i
