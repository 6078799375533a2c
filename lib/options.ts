import type {
  FastifyContextConfig, FastifyRequest, RawReplyDefaultExpression, RawRequestDefaultExpression, RawServerDefault, RouteGenericInterface, RouteHandlerMethod
} from 'fastify'
import { InvalidOptions } from './errors.ts'
import type { Secret } from './verifiers/keyring.ts'
import { ANYTHING, BOOLEAN, FUNCTION, LONGEST_TIMER, assertRules, isEventType, isFunction, isObject, show, wholeNumber } from './checks.ts'
import type { Rule } from './checks.ts'
import type { Runner } from './runners/runner.ts'
import { RETENTION } from './stores/store.ts'
import type { IdempotencyStore } from './stores/store.ts'
import { jsonSchemaOf, kindOf } from './events/users.ts'
import type { AnySchema } from './events/users.ts'
import type { RouteHandlers } from './handlers.ts'
import { standardWebhooks } from './verifiers/standard-webhooks.ts'
import type { Verifier } from './verifiers/verifier.ts'
import { xOpenAISignature } from './verifiers/x-openai-signature.ts'

export interface IdempotencyOptions {
  /** @default memoryStore() */
  store?: IdempotencyStore | undefined
  /**
   * ms for which a claim lasts if it is not renewed. The plugin renews it while handlers run, so this is how long a delivery stays locked after
   * its process has died.
   *
   * @default 30_000
   */
  lease?: number | undefined
  /**
   * ms for which a processed `webhook-id` is remembered. OpenAI retries for up to 72 h.
   *
   * @default 270_000_000 (75 h)
   */
  retention?: number | undefined
  /**
   * Whether the handlers run once for what an event says of a resource (its type and the id of the resource), and not once for each
   * `webhook-id`. Applies to event types that occur at most once for a resource. Needed for `reconcile()`. Must be the same in every process
   * that shares the store.
   *
   * @default false
   */
  reconcile?: boolean | undefined
}

/** Options that one route, or one call of `unwrap`, may override. */
export interface EndpointOptions {
  /**
   * The signing secret, several secrets while one replaces another, or a function that fetches them. The function is called at boot, and again,
   * at most once a minute, if a signature matches none of them. The key is the base64 after `whsec_`; without that prefix it is the UTF-8 bytes
   * of the secret, as in OpenAI's SDKs.
   *
   * @default process.env.OPENAI_WEBHOOK_SECRET
   */
  secret?: Secret | undefined
  /**
   * Seconds by which the signed timestamp may differ from this server's clock, past and future.
   *
   * @default 300
   */
  tolerance?: number | undefined
  /**
   * Maximum length of a body, in bytes. A longer body is answered 413.
   *
   * @default 65_536
   */
  bodyLimit?: number | undefined
  /** @default standardWebhooks() */
  verifier?: Verifier | undefined
}

/** Options that a receiving route may override. */
export interface ReceivingOptions extends EndpointOptions {
  /**
   * ms from a request's headers until its whole body must have arrived. After that the request is answered 408
   * (`FST_OPENAI_WEBHOOK_BODY_TIMEOUT`), and the connection is closed (HTTP/1.1) or the stream reset (HTTP/2). If Fastify's `requestTimeout` is
   * shorter, it applies instead.
   *
   * @default 10_000
   */
  bodyTimeout?: number | undefined
}

export interface OpenAIWebhookOptions extends ReceivingOptions {
  /**
   * The path of the plugin's own receiving route; `false` for none.
   *
   * @default '/webhooks/openai'
   */
  path?: string | false | undefined
  /** Put before `path`, as for any Fastify plugin. */
  prefix?: string
  /**
   * The limits of @fastify/rate-limit for the plugin's own route, as its `config.rateLimit`; `false` if the app's limits are not to apply. The
   * limits count deliveries whose headers are valid, before any body is hashed.
   */
  rateLimit?: RateLimit | undefined
  /**
   * Schemas of additional event types, or other schemas for known types: of TypeBox 0.34 or 1.x, or with Standard Schema (Zod, Valibot,
   * ArkType). They must be synchronous. They check an event and do not change it. To type these events, merge `EventsOf` into
   * `OpenAIWebhookEvents`.
   */
  events?: Readonly<Record<string, AnySchema>> | undefined
  /**
   * How deliveries are deduplicated. With `false`, a delivery that is sent again is processed again, unless it is still running in this process:
   * then it joins that one.
   */
  idempotency?: IdempotencyOptions | false | undefined
  /**
   * When and where handlers run.
   *
   * @default inline()
   */
  runner?: Runner | undefined
  /**
   * ms after which the sender is answered 503 (`FST_OPENAI_WEBHOOK_DEADLINE`) while the handlers keep running. The retry joins them or finds
   * their result.
   *
   * @default 4_500
   */
  deadline?: number | undefined
  /**
   * ms for which `app.close()` waits for what is running. Then the handlers' `signal` aborts.
   *
   * @default 10_000
   */
  closeTimeout?: number | undefined
}

/** The tenants of a route, each with its own signing secret. */
export interface TenantOptions {
  /**
   * Returns the name of a request's tenant: 1 to 256 visible ASCII characters. The request is not verified yet. If the function returns anything
   * else, or throws, the sender is answered 401.
   *
   * The function must return one spelling for each tenant. If `secret` finds the same tenant for `Acme` and `acme`, a delivery to one can be
   * sent again to the other.
   */
  of: (request: FastifyRequest & { params: any, query: any }) => string | null | undefined
  /**
   * Fetches a tenant's signing secret, or several secrets while one replaces another. Returns `undefined` or `null` for an unknown tenant, whose
   * sender is answered 401. If the function fails, takes longer than the deadline or returns what is not a secret, the sender is answered 503.
   */
  secret: (tenant: string) => TenantSecret | Promise<TenantSecret>
  /**
   * ms for which a secret is kept. After that it stays in use while it is fetched again. It is also fetched again, at most once a minute, if no
   * signature matches.
   *
   * @default 300_000
   */
  ttl?: number | undefined
  /**
   * Maximum number of tenants whose secrets are kept. Beyond it, the tenant that was not used for the longest time is forgotten.
   *
   * @default 10_000
   */
  max?: number | undefined
}

/** A tenant's signing secret, or several while one replaces another. `undefined` and `null` mean that there is no such tenant. */
export type TenantSecret = string | readonly string[] | null | undefined

/** `config.openaiWebhook` of a marked route. */
export interface RouteOverrides extends ReceivingOptions {
  /** Replaces `secret` on a route that serves many tenants. */
  tenant?: TenantOptions | undefined
  /** Handlers by event type or pattern. */
  on?: RouteHandlers | undefined
}

/** The type that @fastify/rate-limit gives to `config.rateLimit`, if that package is imported. */
export type RateLimit = Required<FastifyContextConfig> extends { rateLimit: infer Limits } ? Limits : object | false

export interface WebhookRouteOptions extends RouteOverrides {
  /** The path of the route, within the scope's prefix. */
  url: string
  /**
   * The route's own handler, which replies once the event handlers have succeeded. If it returns nothing, the answer is 200 `{"received":true}`.
   */
  handler?: VerifiedHandler | undefined
  /** The limits of @fastify/rate-limit for this route, as its `config.rateLimit`. */
  rateLimit?: RateLimit | undefined
}

/** A route's own handler. Its requests have passed verification. */
export type VerifiedHandler = RouteHandlerMethod<
  RawServerDefault, RawRequestDefaultExpression, RawReplyDefaultExpression, RouteGenericInterface, { openaiWebhook: RouteOverrides }
>

/** The defaults of options. Each is also written at its option, as `@default`. */
export const DEFAULTS = {
  path: '/webhooks/openai',
  tolerance: 300,
  bodyLimit: 65_536,
  bodyTimeout: 10_000,
  lease: 30_000,
  retention: RETENTION,
  reconcile: false,
  deadline: 4_500,
  closeTimeout: 10_000,
  tenantTtl: 300_000,
  tenantMax: 10_000
}

const STORE_METHODS = ['begin', 'checkpoint', 'complete', 'extend', 'release'] as const

const isPath = (value: unknown): boolean => typeof value === 'string' && value.startsWith('/')

const rateLimit: Rule = { expected: 'an object of @fastify/rate-limit\'s route options, or false', accepts: value => value === false || isObject(value) }

const endpointRules: Record<keyof Required<EndpointOptions>, Rule> = {
  secret: ANYTHING, // checked elsewhere, with its own coded error
  tolerance: wholeNumber('seconds', 1),
  bodyLimit: wholeNumber('bytes', 1),
  // A verifier maker that was not called is a function too, and would refuse every delivery.
  verifier: { expected: 'a function such as standardWebhooks() returns', accepts: value => isFunction(value) && value !== standardWebhooks && value !== xOpenAISignature }
}

const receivingRules: Record<keyof Required<ReceivingOptions>, Rule> = {
  ...endpointRules,
  bodyTimeout: wholeNumber('ms', 1, LONGEST_TIMER)
}

const pluginRules: Record<keyof Required<OpenAIWebhookOptions>, Rule> = {
  ...receivingRules,
  path: { expected: 'a path that begins with "/", or false', accepts: value => value === false || isPath(value) },
  prefix: { expected: 'a string', accepts: value => typeof value === 'string' },
  rateLimit,
  events: { expected: 'an object of schemas by event type', accepts: isObject },
  idempotency: { expected: 'false or an object { store, lease, retention, reconcile }', accepts: value => value === false || isObject(value) },
  runner: { expected: 'a runner such as inline()', accepts: value => isObject(value) && isFunction(value['run']) },
  deadline: wholeNumber('ms', 1, LONGEST_TIMER),
  closeTimeout: wholeNumber('ms', 0, LONGEST_TIMER)
}

const overrideRules: Record<keyof Required<RouteOverrides>, Rule> = {
  ...receivingRules,
  tenant: { expected: 'an object { of, secret, ttl, max }', accepts: isObject },
  on: { expected: 'an object of handlers by event type', accepts: isObject }
}

const routeRules: Record<keyof Required<WebhookRouteOptions>, Rule> = {
  ...overrideRules,
  url: { expected: 'a path that begins with "/"', accepts: isPath },
  handler: FUNCTION,
  rateLimit
}

const tenantRules: Record<keyof Required<TenantOptions>, Rule> = {
  of: { expected: 'a function of the request', accepts: isFunction },
  secret: { expected: 'a function of the tenant', accepts: isFunction },
  ttl: wholeNumber('ms', 1),
  // Limited, because the memory for the tenants is reserved at boot.
  max: wholeNumber('tenants', 1, 10_000_000)
}

const idempotencyRules: Record<keyof Required<IdempotencyOptions>, Rule> = {
  // A store that has only some of the methods is refused later, with the name of one that it lacks.
  store: { expected: 'a store such as memoryStore()', accepts: value => isObject(value) && STORE_METHODS.some(method => isFunction(value[method])) },
  lease: wholeNumber('ms', 1, LONGEST_TIMER),
  retention: wholeNumber('ms', 1),
  reconcile: BOOLEAN
}

/** Any JSON Schema that describes an event has one of these. */
const JSON_SCHEMA_KEYWORDS = ['type', 'properties', 'required', '$ref', 'allOf', 'anyOf', 'oneOf', 'const', 'enum']

/**
 * Options of `register` that are not for the plugin. Fastify reads the first two. `skipOverride` is fastify-cli's: the tests that it generates
 * pass it to the app, which passes its options on to every plugin.
 */
export const IGNORED_OPTIONS = ['logLevel', 'logSerializers', 'skipOverride']

const each = (names: string[], place: (name: string) => string): Record<string, string> => Object.fromEntries(names.map(name => [name, place(name)]))

/** The advice for a known option that is in the wrong place. */
const RIGHT_PLACES: Readonly<Record<string, string>> = {
  path: 'a route has `url`; `path` is an option of the plugin',
  prefix: 'a route has the prefix of its scope: call route() in a scope that is registered with { prefix }',
  url: 'the plugin\'s own route has `path`; further ones have a `url`, as in app.openaiWebhook.route({ url })',
  on: 'handlers are added by app.openaiWebhook.on(type, handler); those of one route alone by `on` of app.openaiWebhook.route() or of config.openaiWebhook',
  handler: 'handlers are added by app.openaiWebhook.on(type, handler); the one that replies is `handler` of a route',
  rateLimit: 'a marked route has it beside, as in config: { openaiWebhook: {}, rateLimit: {} }',
  tenant: 'it is an option of a route, as in app.openaiWebhook.route({ url, tenant }); unwrap() takes the `secret` of the tenant whose delivery it is',
  max: 'it is an option of the store, as in { idempotency: { store: memoryStore({ max }) } }',
  ...each(['bodyTimeout', 'bodyLimit'], () => 'it is an option of the plugin and of its routes'),
  ...each(['webhookSecret', 'signingSecret'], () => 'it is called `secret` here'),
  ...each(['events', 'idempotency', 'runner', 'deadline', 'closeTimeout'], name => `it is an option of the plugin, as in app.register(openaiWebhook, { ${name} })`),
  ...each(['store', 'lease', 'retention', 'reconcile'], name => `it is an option of the plugin's idempotency, as in app.register(openaiWebhook, { idempotency: { ${name} } })`),
  ...each(['concurrency', 'attempts', 'backoff'], name => `it is an option of a runner that has it, as in { runner: durable(db, { ${name} }) }`)
}

/** Checks the plugin's options. @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS */
export function assertOptions (options: unknown): asserts options is OpenAIWebhookOptions {
  assertOptionsBy(pluginRules, options, '', IGNORED_OPTIONS)
  const { path, rateLimit, idempotency, runner, events = {} } = options as OpenAIWebhookOptions
  if (path === false && isObject(rateLimit)) throw new InvalidOptions('expected rateLimit together with a path, got path: false: it is for the plugin\'s own route alone; further ones have theirs, as in app.openaiWebhook.route({ url, rateLimit })')
  if (idempotencyRules.store.accepts(idempotency)) throw new InvalidOptions(`expected idempotency to be ${pluginRules.idempotency.expected}, got a store: say { idempotency: { store } }`)
  if (isObject(idempotency)) {
    assertOptionsBy(idempotencyRules, idempotency, 'idempotency.')
    const { store } = idempotency as { store?: Record<string, unknown> }
    for (const method of STORE_METHODS) {
      if (store !== undefined && !isFunction(store[method])) throw new InvalidOptions(`expected idempotency.store.${method} to be a function, got ${show(store[method])}`)
    }
  }
  for (const method of ['start', 'close', 'depth', 'dead', 'deadCount', 'requeue'] as const) {
    const given: unknown = runner?.[method]
    if (given !== undefined && !isFunction(given)) throw new InvalidOptions(`expected runner.${method} to be a function, got ${show(given)}`)
  }
  for (const [type, schema] of Object.entries(events)) assertSchema(type, schema)
}

/** Checks the overrides of `unwrap()`. @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS */
export function assertUnwrapOptions (options: unknown): asserts options is EndpointOptions {
  const { bodyLimit, ...rules } = endpointRules
  assertOptionsBy(rules, options)
}

/** Checks the overrides in `config.openaiWebhook`. @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS */
export function assertOverrides (options: unknown): asserts options is RouteOverrides {
  assertOptionsBy(overrideRules, options)
  assertTenant(options)
}

/** Checks the options of `.route()`. @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS */
export function assertRouteOptions (options: unknown): asserts options is WebhookRouteOptions {
  assertOptionsBy(routeRules, options)
  assertTenant(options)
  if (options['url'] === undefined) throw new InvalidOptions(`expected url to be ${routeRules.url.expected}, got nothing`)
}

function assertTenant ({ tenant, secret }: RouteOverrides): void {
  if (tenant === undefined) return
  if (secret !== undefined) throw new InvalidOptions('expected `tenant` or `secret`, got both: with tenants, tenant.secret gives the secret of each')
  assertOptionsBy(tenantRules, tenant, 'tenant.')
  for (const name of ['of', 'secret'] as const) {
    if (tenant[name] === undefined) throw new InvalidOptions(`expected tenant.${name} to be ${tenantRules[name].expected}, got nothing`)
  }
}

function assertOptionsBy (rules: Record<string, Rule>, options: unknown, at = '', ignored: readonly string[] = []): asserts options is Record<string, unknown> {
  assertRules('', options, rules, { at, ignored, advice: name => Object.hasOwn(RIGHT_PLACES, name) ? `: ${RIGHT_PLACES[name]!}` : undefined })
}

function assertSchema (type: string, schema: AnySchema): void {
  if (!isEventType(type)) throw new InvalidOptions(`expected the names in events to be event types, got "${type}": a schema is for one type, such as "batch.failed"`)
  if (kindOf(schema) === undefined) {
    throw new InvalidOptions(`expected events["${type}"] to be a schema of TypeBox 0.34 or 1.x, or with Standard Schema (Zod, Valibot, ArkType), got ${showSchema(schema)}`)
  }
  const { properties } = jsonSchemaOf(schema) as { properties?: { type?: { const?: unknown } } }
  const literal = properties?.type?.const
  if (literal !== undefined && literal !== type) {
    throw new InvalidOptions(`expected events["${type}"] to have the type "${type}", got the literal ${show(literal)}`)
  }
}

/** Describes a value that was given instead of a schema. */
function showSchema (value: unknown): string {
  if ((typeof value !== 'object' && typeof value !== 'function') || value === null) return show(value)
  const { '~standard': standard, constructor } = value as { '~standard'?: { version?: unknown }, constructor?: unknown }
  if (standard?.version === 1) return 'one with Standard Schema that lacks the function `validate`'
  if (standard !== undefined) return `one of another version of Standard Schema (${show(standard?.version)})`
  if (JSON_SCHEMA_KEYWORDS.some(keyword => Object.hasOwn(value, keyword))) return 'a plain JSON Schema'
  return isObject(value) && typeof constructor === 'function' && constructor !== Object ? `an instance of ${constructor.name}` : show(value)
}
