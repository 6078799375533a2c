import type { IncomingHttpHeaders } from 'node:http'
import type { FastifyInstance, FastifyReply, FastifyRequest, HookHandlerDoneFunction } from 'fastify'
import { assertRules, isFunction, wholeNumber } from '../checks.ts'
import type { Rule } from '../checks.ts'
import { IGNORED_OPTIONS } from '../options.ts'

/** A hook that calls `done` or is asynchronous. This is one type, because TypeScript infers no parameters from a union of Fastify's two. */
export type OnRequest = (this: FastifyInstance, request: FastifyRequest, reply: FastifyReply, done: HookHandlerDoneFunction) => void | Promise<unknown>

export interface InspectorOptions {
  /**
   * The path of the page, within the `prefix` of `register`.
   *
   * @default '/openai-webhook'
   */
  path?: string | undefined
  /**
   * Your authentication: a hook, or several, like Fastify's `onRequest`. It admits those who may see deliveries. Without it the page is
   * served only on the loopback interface, and not at all when NODE_ENV is `production`.
   */
  onRequest?: OnRequest | readonly OnRequest[] | undefined
  /**
   * Whether the page may only show deliveries, and not send or requeue any. A function decides for each request; only the result `false`
   * allows actions.
   *
   * @default true where NODE_ENV is 'production', else false
   */
  readOnly?: boolean | ((request: FastifyRequest) => boolean | Promise<boolean>) | undefined
  /**
   * The number of deliveries that are kept in memory. Refused deliveries are kept apart from these, at most 200. All of them together take
   * at most 16 MB.
   *
   * @default 500
   */
  max?: number | undefined
  /**
   * Returns the headers to show, given a copy of those that arrived. The values of `authorization`, `proxy-authorization`, `cookie` and
   * `set-cookie` are always hidden, whatever this function returns.
   */
  redact?: ((headers: IncomingHttpHeaders) => IncomingHttpHeaders) | undefined
}

/** The defaults of the options. Each is repeated at its option as `@default`. */
export const DEFAULTS = { path: '/openai-webhook', max: 500 }

/** The greatest `max`. A page with more deliveries would be slow. */
const MOST = 10_000

const rules: Record<keyof Required<InspectorOptions>, Rule> = {
  path: { expected: 'a path such as "/openai-webhook", without ":", "*", "?", "#" or a "/" at its end', accepts: value => typeof value === 'string' && /^\/[^\s?#:*]*[^\s?#:*/]$/.test(value) },
  onRequest: { expected: 'a hook or a non-empty array of hooks', accepts: value => isFunction(value) || (Array.isArray(value) && value.length > 0 && value.every(isFunction)) },
  readOnly: { expected: 'a boolean or a function of the request', accepts: value => typeof value === 'boolean' || isFunction(value) },
  max: wholeNumber('deliveries', 1, MOST),
  redact: { expected: 'a function of the headers', accepts: isFunction }
}

/** @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS */
export function assertInspectorOptions (options: object): asserts options is InspectorOptions {
  assertRules('inspector', options, rules, {
    ignored: ['prefix', ...IGNORED_OPTIONS],
    advice: name => OTHER_NAMES.test(name) ? ', did you mean "onRequest"?' : undefined
  })
}

/** Other names for `onRequest`. By its letters, `auth` is nearest to `path`. */
const OTHER_NAMES = /^(?:auth|authenticate|authentication|preHandler)$/i
