import { AsyncResource } from 'node:async_hooks'
import fastify from 'fastify'
import type { FastifyContextConfig, FastifyInstance, FastifyReply, FastifyRequest, RegisterOptions, RequestPayload, RouteHandlerMethod, RouteOptions } from 'fastify'
import fp from 'fastify-plugin'
import { handling, keepRefusal, refuseErrors, statusOf } from './answer.ts'
import type { RouteErrorHandler } from './answer.ts'
import { channels } from './channels.ts'
import { RunnerDeadLetters } from './dead-letters.ts'
import type { DeadLetters } from './dead-letters.ts'
import { Deadline } from './deadline.ts'
import { diagnoseQuickly } from './diagnose.ts'
import { AlreadyRegistered, InvalidOptions, InvalidRoute, InvalidSignature, Overloaded, UnprotectedRoute } from './errors.ts'
import { officialEvents } from './events/index.ts'
import { Exchange } from './exchange.ts'
import { causeOf, isHandlersFailure } from './failure.ts'
import { RefusalLog, logError, logFields } from './log.ts'
import { assertSpelling, registeredIn } from './marked-routes.ts'
import { attempt, isPromise } from './maybe-promise.ts'
import { documentation } from './openapi.ts'
import type { Documented } from './openapi.ts'
import { assertEndpointOptions, assertOptions, assertOverrides } from './options.ts'
import type { EndpointOptions, OpenAIWebhookOptions, ReceivingOptions } from './options.ts'
import { declareRoute, shareDecorators } from './own-scope.ts'
import { retryLater } from './pipeline/acknowledge.ts'
import { boundRest, captureBody, readPayload, replayPayload, toBuffer, toHeaders } from './pipeline/capture.ts'
import type { BodyBounds } from './pipeline/capture.ts'
import { Claims } from './pipeline/deduplicate.ts'
import { recordAnswer } from './pipeline/respond.ts'
import { Validators } from './pipeline/validate.ts'
import type { Compiler, ParseJson } from './pipeline/validate.ts'
import { headerFault } from './pipeline/verify.ts'
import type { Verification } from './pipeline/verify.ts'
import { Receiver, SECRET_INDEX } from './receive.ts'
import type { Authentic } from './receive.ts'
import { HandlerList, HandlerTable, Registry } from './registry.ts'
import type { FailureInfo, Refused } from './registry.ts'
import { inline } from './runners/inline.ts'
import { runnersInUse } from './runners/runner.ts'
import type { Attempts, DeadDelivery, Job, Runner } from './runners/runner.ts'
import { memoryStore } from './stores/memory.ts'
import type { IdempotencyStore } from './stores/store.ts'
import { OpenAIWebhookScope } from './scope.ts'
import type { OpenAIWebhook, RouteOverrides, VerifiedRequest, WebhookRouteOptions } from './types.ts'
import { TypeCompiler } from './typebox.ts'
import { Verifications } from './verifications.ts'
import { standardWebhooks } from './verifiers/standard-webhooks.ts'

/** In a route's config: the hook that this plugin has put on the route. */
const PROTECTED = Symbol('openai-webhook.protected')

/** On the scope of a route of our own: `request.routeOptions` is built anew each time, for 0.4 µs. */
const OWN = Symbol('openai-webhook.own')

const DECLARED_EARLY = 'was declared before fastify-openai-webhook had loaded, so nothing verifies it: put `await` before app.register(openaiWebhook), or declare the route in a plugin registered after it'
const SKIPPED = 'a hook of the app has thrown null or undefined, which Fastify takes for no error while it skips the hooks that come after: throw an Error'

/** A receiving route: its own verification, and the URL that names it in jobs, logs and idempotency keys. */
type Endpoint = Verification & { readonly name: string }

/** Levels at which a logger takes `debug`. */
const DETAILED = new Set(['debug', 'trace'])
/** ms between two diagnoses of an endpoint: each costs as much as many deliveries. */
const DIAGNOSIS_INTERVAL = 10_000

const DEFAULTS = { path: '/webhooks/openai', bodyLimit: 65_536, bodyTimeout: 10_000, lease: 30_000, retention: 270_000_000, deadline: 4_500, closeTimeout: 10_000 }

/** Remembers nothing: the `idempotency: false` option. */
const forgetful: IdempotencyStore = {
  begin: () => ({ state: 'claimed', token: '', finished: [] }),
  checkpoint () {},
  complete () {},
  extend: () => true,
  release () {}
}

// No default for `options`: Fastify gives an object, and could not infer the type of an optional parameter.
async function openaiWebhook (instance: FastifyInstance, options: OpenAIWebhookOptions): Promise<void> {
  assertOptions(options)
  if (instance.hasDecorator('openaiWebhook')) throw new AlreadyRegistered()
  const compiler = options.events === undefined ? TypeCompiler : await usersCompiler()
  const plugin = new Plugin(instance, options, compiler)

  instance.decorate('openaiWebhook', { getter (this: FastifyInstance): OpenAIWebhook { return plugin.scope(this) } })
  instance.decorateRequest('openaiWebhook', null)
  // Instance hooks bind late: this one reaches routes that were declared before the plugin had loaded.
  const guarded = registeredIn(instance) ?? instance
  guarded.addHook('onRequest', (request, _reply, done) => plugin.guard(request, done))
  instance.addHook('onRoute', function (route) { plugin.protect(this, route) })
  instance.addHook('onReady', () => plugin.start())
  // preClose comes before every onClose hook, so that what handlers use is still open while they are drained.
  instance.addHook('preClose', () => plugin.closeWithinPluginTimeout())
  instance.addHook('onClose', () => plugin.close())

  if (plugin.path !== false) {
    const { rateLimit, prefix = '', logLevel, logSerializers } = options as OpenAIWebhookOptions & RegisterOptions
    // Fastify gives these to what has a scope of its own, which a plugin of fastify-plugin's has not.
    const scope = { prefix, ...(logLevel !== undefined && { logLevel }), ...(logSerializers !== undefined && { logSerializers }) }
    plugin.receiveAt(instance, { url: plugin.path, ...(rateLimit !== undefined && { rateLimit }) }, scope)
  }
}

/** The user's copy of TypeBox compiles the user's schemas: it has the formats and kinds that were registered with it. */
async function usersCompiler (): Promise<Compiler> {
  // A name that the build cannot see: it would put a copy in our own file.
  const name: string = '@sinclair/typebox/compiler'
  const module = await import(name) as typeof import('@sinclair/typebox/compiler')
  return module.TypeCompiler
}

/** One registration. The only file that holds a Fastify instance. */
export class Plugin {
  readonly path: string | false
  readonly registry: Registry
  readonly #instance: FastifyInstance
  readonly #options: OpenAIWebhookOptions
  readonly #events: Documented['events']
  readonly #receiver: Receiver
  readonly #runner: Runner
  readonly #deadline: Deadline
  /** By their ms. */
  readonly #bodyDeadlines = new Map<number, Deadline>()
  readonly #closeTimeout: number
  readonly #abort = new AbortController()
  readonly #scopes = new WeakMap<FastifyInstance, OpenAIWebhookScope>()
  readonly #verifications: Verifications
  readonly #refusals: RefusalLog
  readonly #tables = new Map<string, { lists: HandlerList[], table?: HandlerTable }>()
  readonly #settleRoutes: Array<() => void> = []
  #closed: Promise<void> | undefined

  readonly deadLetters: DeadLetters

  /** For a route that replies by dispatching, on a marked route. */
  readonly handler: RouteHandlerMethod

  constructor (instance: FastifyInstance, options: OpenAIWebhookOptions, compiler: Compiler) {
    const schemas = { ...officialEvents, ...options.events }
    const { lease = DEFAULTS.lease, retention = DEFAULTS.retention, store } = options.idempotency || {}
    this.path = options.path ?? DEFAULTS.path
    this.registry = new Registry(new Set(Object.keys(schemas)))
    this.#instance = instance
    this.#options = options
    this.#events = schemas
    this.#refusals = new RefusalLog(instance.log)
    this.#runner = options.runner ?? inline()
    this.deadLetters = new RunnerDeadLetters(this.#runner)
    this.#deadline = new Deadline(options.deadline ?? DEFAULTS.deadline)
    this.#closeTimeout = options.closeTimeout ?? DEFAULTS.closeTimeout
    this.#receiver = new Receiver({
      parse: jsonParser(instance),
      validators: new Validators(officialEvents, options.events ?? {}, compiler),
      claims: new Claims({
        store: options.idempotency === false ? forgetful : store ?? memoryStore(),
        lease,
        retention,
        onTrouble: error => this.trouble(error, {})
      }),
      runner: this.#runner,
      log: instance.log,
      signal: this.#abort.signal,
      handlersOf: endpoint => this.#table(endpoint),
      report: (error, job, attempts) => {
        if (job !== undefined && isHandlersFailure(error)) this.failed(error, job, attempts)
        else this.trouble(error, job ?? {}, attempts?.attempt)
      },
      dead: (delivery, error) => this.dead(delivery, error)
    })
    this.handler = function ({ method, routeOptions: { config, url } }) {
      if (!(PROTECTED in config)) throw new UnprotectedRoute(`${method} ${String(url)}`, DECLARED_EARLY)
      throw new InvalidRoute(method, url, 'app.openaiWebhook.handler cannot be told where another plugin has wrapped it, as @fastify/otel does: declare the route with app.openaiWebhook.route(), or with `otel: { instrumentHandler: false }` in its config')
    }
    this.#verifications = new Verifications(options, {
      patience: this.#deadline.ms,
      warn: message => { instance.log.warn(message) },
      onTrouble: error => { this.trouble(error, {}) }
    })
    // A secret that is missing or unusable is told at once.
    if (this.path !== false || options.secret !== undefined) this.#verifications.of({}, true)
  }

  scope (instance: FastifyInstance): OpenAIWebhookScope {
    let scope = this.#scopes.get(instance)
    if (scope === undefined) {
      scope = new OpenAIWebhookScope(this, instance)
      this.#scopes.set(instance, scope)
    }
    return scope
  }

  /** Adds a receiving route in a scope of its own, so that no other route's parsing changes. */
  receiveAt (scope: FastifyInstance, { url, on, handler, rateLimit, ...overrides }: WebhookRouteOptions, options: RegisterOptions = {}): void {
    // Left alone, it would limit nothing, and nobody would be told.
    if (typeof rateLimit === 'object' && !scope.hasDecorator('rateLimit')) {
      throw new InvalidOptions('rateLimit: expected @fastify/rate-limit to be registered before, got none')
    }
    const verification = this.#verifications.of(overrides, true)
    const list = this.#routeHandlers(on, scope)
    const own = handler === this.handler ? undefined : handler as RouteHandlerMethod | undefined
    const bounds = this.#bodyBounds(overrides)
    scope.register(async child => {
      captureBody(child, bounds)
      shareDecorators(child)
      child.decorate(OWN, true)
      const endpoint = this.#endpoint(child.prefix + url, verification, [this.registry.app, list])
      const admit = this.#admit(endpoint)
      this.#settleRoutes.push(declareRoute(child, scope, {
        method: 'POST',
        url,
        bodyLimit: bounds.limit,
        config: {
          [PROTECTED]: admit,
          swaggerTransform: documentation({ events: this.#events, verifier: verification.verifier, replies: own !== undefined }),
          ...(rateLimit !== undefined && { rateLimit })
        } as FastifyContextConfig,
        onRequest: admit,
        preHandler: (request, _reply, done) => {
          // A request without a body and a content type is not parsed at all.
          const rawBody = Buffer.isBuffer(request.body) ? request.body : Buffer.alloc(0)
          this.#authenticate(endpoint, request, rawBody, error => {
            if (error === undefined) request.body = (request as VerifiedRequest).openaiWebhook.event
            done(error)
          })
        },
        onError: (request, reply, error, done) => {
          refusing(request, reply, error, bounds)
          // Fastify's own refusals: over the limit, not JSON; and those of other plugins. Ours are told where they come up.
          if (request.openaiWebhook === null && !this.#told.has(error)) this.refuse(error, { endpoint: endpoint.name }, request)
          done()
        },
        onSend: own === undefined ? this.#keepRefusal(endpoint) : [this.#keepRefusal(endpoint), recordAnswer],
        errorHandler: refuseErrors(undefined),
        handler: this.#deliver(endpoint, own)
      }))
    }, options)
  }

  /** onRoute: puts the pipeline on a route that asks for it by `config.openaiWebhook`. */
  protect (scope: FastifyInstance, route: RouteOptions): void {
    const config: unknown = route.config?.openaiWebhook
    if (isProtected(route)) return
    if (config === undefined) return assertSpelling(route)
    const fault = (reason: string): Error => new InvalidRoute(String(route.method), route.url, reason)
    if (route.method !== 'POST' && !(Array.isArray(route.method) && route.method.length === 1 && route.method[0] === 'POST')) {
      throw fault('expected the method POST alone, which is what OpenAI sends')
    }
    if (typeof config !== 'object' || config === null || Array.isArray(config)) {
      throw fault('expected config.openaiWebhook to be an object, such as {}')
    }
    const schema = route.schema as { body?: unknown } | undefined
    if (schema?.body !== undefined) {
      throw fault('schema.body would be checked before the signature, and tell unsigned senders about it: remove it, events are validated after verification')
    }
    assertOverrides(config)
    const { on, ...overrides } = config
    const bounds = this.#bodyBounds(overrides, route.bodyLimit)
    const verification = this.#verifications.of(overrides, true)
    const list = this.#routeHandlers(on, scope)
    const dispatches = route.handler === this.handler
    const endpoint = this.#endpoint(route.url, verification, dispatches ? [this.registry.app, list] : [list])

    const capture = this.#captureAndAuthenticate(endpoint, bounds)
    route.config = { ...route.config, [PROTECTED]: capture } as FastifyContextConfig
    route.bodyLimit = bounds.limit
    route.onRequest = [this.#admit(endpoint), ...toArray(route.onRequest)]
    route.preParsing = [capture, ...toArray(route.preParsing)]
    route.onError = [...toArray(route.onError), (request, reply, error, done) => {
      refusing(request, reply, error, bounds)
      done()
    }]
    route.onSend = [...toArray(route.onSend), this.#keepRefusal(endpoint), recordAnswer]
    route.errorHandler = refuseErrors(route.errorHandler as RouteErrorHandler | undefined)
    route.handler = this.#deliver(endpoint, dispatches ? undefined : route.handler)
  }

  /** onRequest: a route that asks for verification and cannot have it fails closed. */
  guard (request: FastifyRequest, done: (error?: Error) => void): void {
    if (OWN in request.server) return done()
    const { config, method, url } = request.routeOptions
    if (config?.openaiWebhook === undefined || PROTECTED in config) return done()
    const error = new UnprotectedRoute(`${String(method)} ${String(url)}`, DECLARED_EARLY)
    this.refuse(error, { endpoint: String(url) }, request)
    done(error)
  }

  /** onReady */
  async start (): Promise<void> {
    for (const settle of this.#settleRoutes) settle()
    await this.#verifications.load()
    this.registry.closed = true
    for (const entry of this.#tables.values()) entry.table = new HandlerTable(entry.lists, this.registry.known)
    // A runner has one host: what this registration acknowledged would run the handlers of the other.
    if (runnersInUse.has(this.#runner)) throw new InvalidOptions('expected a runner of its own, got one that another registration of the plugin uses')
    runnersInUse.add(this.#runner)
    await this.#runner.start?.(this.#receiver)
  }

  /** Drains, then aborts what is left. */
  close (): Promise<void> {
    this.#receiver.closing = true
    this.#closed ??= this.#drain()
    return this.#closed
  }

  /** Fastify fails a preClose hook that outlasts `pluginTimeout`: what is left then is waited for in onClose. */
  async closeWithinPluginTimeout (): Promise<void> {
    const { pluginTimeout = 0 } = this.#instance.initialConfig
    if (pluginTimeout === 0) return await this.close()
    let timer: NodeJS.Timeout | undefined
    const almost = new Promise<void>(resolve => { timer = setTimeout(resolve, pluginTimeout * 0.8) })
    await Promise.race([this.close(), almost])
    clearTimeout(timer)
  }

  async unwrap (rawBody: string | Uint8Array, headers: unknown, overrides: EndpointOptions = {}): Promise<{ type: string }> {
    assertEndpointOptions(overrides)
    const verification = this.#verifications.of(overrides, false)
    const body = toBuffer(rawBody)
    const plain = toHeaders(headers)
    const fault = headerFault(verification, plain)
    if (fault !== undefined) throw fault
    const authentic = await this.#receiver.authenticate(verification, plain, body)
    if (authentic instanceof Error) throw authentic
    return authentic.event
  }

  /** Tells the `onError` handlers. */
  report (error: unknown, info: FailureInfo, { log }: { log: FastifyInstance['log'] } = this.#instance): void {
    this.registry.report(error, info, thrown => logError(log, thrown, {}, 'an onError handler failed'))
  }

  /** A delivery is not answered 200: it is logged with the errors behind that, or else by its code. */
  refuse (error: unknown, delivery: Refused, request: FastifyRequest): void {
    const { code: given, cause, message } = error as { code?: unknown, cause?: unknown, message: string }
    const statusCode = statusOf(error)
    // That of a database or gRPC client, in an app's hook, may be a number.
    const code = typeof given === 'string' || typeof given === 'number' ? String(given) : 'UNKNOWN'
    if (statusCode >= 500 && cause !== undefined) logError(request.log, cause, { code, ...logFields(delivery) }, message)
    else this.#refusals.write(request.log, code, statusCode, delivery)
    if (channels.refused.hasSubscribers) {
      const { endpoint, webhookId, event } = delivery
      channels.refused.publish({ endpoint, webhookId, event, code, statusCode, error, request })
    }
    this.report(error, delivery, request)
  }

  /** What no sender hears of: logged here, since no error handler will. */
  trouble (error: unknown, delivery: FailureInfo, attempt?: number): void {
    logError(this.#instance.log, error, logFields(delivery, attempt), 'webhook trouble')
    const { endpoint, webhookId, event } = delivery
    if (channels.trouble.hasSubscribers) channels.trouble.publish({ error, endpoint, webhookId, event })
    this.report(error, infoOf(delivery))
  }

  /** Handlers have failed a delivery that a runner had acknowledged. */
  failed (error: unknown, job: Job, attempts?: Attempts): void {
    const fate = attempts === undefined ? '' : ' and will be attempted again'
    logError(this.#instance.log, causeOf(error), { ...logFields(job, attempts?.attempt), attempts: attempts?.attempts }, `webhook delivery failed${fate}`)
    this.report(error, infoOf(job))
  }

  /** Nothing will attempt it again, unless a person does. */
  dead (delivery: DeadDelivery, error: unknown): void {
    const { log } = this.#instance
    logError(log, causeOf(error), logFields(delivery, delivery.attempts), 'webhook delivery is dead')
    if (channels.dead.hasSubscribers) channels.dead.publish(delivery)
    this.report(error, infoOf(delivery))
    this.registry.bury(delivery, thrown => logError(log, thrown, logFields(delivery), 'an onDead handler failed'))
  }

  #routeHandlers (on: RouteOverrides['on'], scope: FastifyInstance): HandlerList {
    const list = new HandlerList(this.registry.known, 'route')
    for (const [type, handlers] of Object.entries(on ?? {})) {
      for (const handler of toArray(handlers)) list.on(type, handler as never, scope)
    }
    return list
  }

  /** @param ofRoute a marked route's own Fastify `bodyLimit` */
  #bodyBounds ({ bodyLimit, bodyTimeout }: ReceivingOptions, ofRoute?: number): BodyBounds {
    const { bodyLimit: limit = DEFAULTS.bodyLimit, bodyTimeout: timeout = DEFAULTS.bodyTimeout } = this.#options
    // Node checks it every 30 s, and not under HTTP/2.
    const { requestTimeout = 0 } = this.#instance.initialConfig as { requestTimeout?: number }
    const ms = Math.min(bodyTimeout ?? timeout, requestTimeout > 0 ? requestTimeout : Infinity)
    let deadline = this.#bodyDeadlines.get(ms)
    if (deadline === undefined) this.#bodyDeadlines.set(ms, deadline = new Deadline(ms))
    return { limit: bodyLimit ?? ofRoute ?? limit, deadline }
  }

  #endpoint (name: string, verification: Verification, lists: HandlerList[]): Endpoint {
    // The URL names the endpoint in jobs and idempotency keys: routes that differ by a constraint alone would share both.
    if (this.#tables.has(name)) throw new InvalidRoute('POST', name, 'expected a URL of its own, got that of another receiving route')
    this.#tables.set(name, { lists })
    return { ...verification, name }
  }

  #appTable: HandlerTable | undefined

  #table (endpoint: string): HandlerTable {
    // A worker may not have the route that received the job; the app's handlers it does have.
    return this.#tables.get(endpoint)?.table ?? (this.#appTable ??= new HandlerTable([this.registry.app], this.registry.known))
  }

  /** What has been refused here: a verifier of the user's may throw any code. */
  readonly #told = new WeakSet<object>()

  /** Before there is an event to name. */
  #refuseUnread (error: Error, { name }: Endpoint, request: FastifyRequest): void {
    this.#told.add(error)
    this.refuse(error, { endpoint: name }, request)
  }

  #admit (endpoint: Endpoint) {
    return (request: FastifyRequest, _reply: FastifyReply, done: (error?: Error) => void): void => {
      const fault = headerFault(endpoint, request.headers)
      if (fault === undefined) return done()
      this.#refuseUnread(fault, endpoint, request)
      done(fault)
    }
  }

  #authenticate (endpoint: Endpoint, request: FastifyRequest, rawBody: Buffer, done: (error?: Error) => void): void {
    const settle = (authentic: Authentic | Error): void => {
      if (authentic instanceof Error) return done(this.#unauthentic(endpoint, request, rawBody, authentic))
      this.#authentic(endpoint, request, authentic)
      done()
    }
    let authentic
    try {
      authentic = this.#receiver.authenticate(endpoint, request.headers, rawBody)
    } catch (error) {
      authentic = thrownBySchema(error)
    }
    if (isPromise<Authentic | Error>(authentic)) authentic.then(settle, error => settle(thrownBySchema(error)))
    else settle(authentic)
  }

  #authentic ({ name }: Endpoint, request: FastifyRequest, authentic: Authentic): void {
    request.openaiWebhook = authentic
    if (!channels.verified.hasSubscribers) return
    const { webhookId, timestamp, event, rawBody, [SECRET_INDEX]: secretIndex } = authentic
    channels.verified.publish({ endpoint: name, webhookId, timestamp, event, secretIndex, bodySize: rawBody.length, request: request as VerifiedRequest })
  }

  #unauthentic (endpoint: Endpoint, request: FastifyRequest, rawBody: Buffer, error: Error): Error {
    this.#refuseUnread(error, endpoint, request)
    if (error instanceof InvalidSignature && DETAILED.has(request.log.level)) this.#explain(endpoint, request, rawBody)
    return error
  }

  readonly #diagnosedAt = new Map<string, number>()

  /** Logs why a signature does not match; the sender is not told. */
  #explain ({ name, verifier, keyring, tolerance }: Endpoint, { headers, log }: FastifyRequest, rawBody: Buffer): void {
    const now = Date.now()
    // A clock set back must not silence it until it has caught up.
    if (verifier !== standardWebhooks() || Math.abs(now - (this.#diagnosedAt.get(name) ?? 0)) < DIAGNOSIS_INTERVAL) return
    this.#diagnosedAt.set(name, now)
    // After the answer, which neither waits for it nor fails with it.
    setImmediate(() => {
      try {
        const secret = keyring.keys.map(key => key.export())
        const { finding, likely } = diagnoseQuickly({ headers, rawBody, secret, now, tolerance })
        log.debug({ endpoint: name, cause: finding?.cause, fix: finding?.fix }, `the signature does not match: ${finding?.message ?? likely}`)
      } catch (error) {
        this.report(error, { endpoint: name })
      }
    })
  }

  /** preParsing, so that the user's parser sees nothing that was not verified. */
  #captureAndAuthenticate (endpoint: Endpoint, bounds: BodyBounds) {
    return (request: FastifyRequest, reply: FastifyReply, payload: RequestPayload, done: (error: Error | null, payload?: RequestPayload) => void): void => {
      const refuse = (error: Error): void => {
        this.refuse(error, { endpoint: endpoint.name }, request)
        done(error)
      }
      const { 'content-type': contentType, 'content-length': contentLength, 'transfer-encoding': transferEncoding } = request.headers
      const isEmpty = transferEncoding === undefined && (contentLength === undefined || contentLength === '0')
      // Without a body Fastify asks for no content type; with one, a catch-all parser of the app's must not take it.
      if (contentType === undefined ? !isEmpty : !/^application\/json\s*(?:;|$)/i.test(contentType)) {
        return refuse(new fastify.errorCodes.FST_ERR_CTP_INVALID_MEDIA_TYPE())
      }
      // The socket's events come in no request's async context, which tracers and request contexts go by. Fastify does the
      // same for content type parsers.
      readPayload(request, payload, bounds, AsyncResource.bind((error: Error | null, rawBody: Buffer = Buffer.alloc(0)) => {
        if (error !== null) {
          // The sender may go on sending what nobody reads.
          reply.header('connection', 'close')
          return refuse(error)
        }
        this.#authenticate(endpoint, request, rawBody, error => {
          if (error === undefined) done(null, replayPayload(rawBody, payload.receivedEncodedLength))
          else done(error)
        })
      }))
    }
  }

  /** The route's handler: receives the delivery, and has it answered by the deadline. */
  #deliver (endpoint: Endpoint, own: RouteHandlerMethod | undefined): RouteHandlerMethod {
    const options = {
      endpoint: endpoint.name,
      receiver: this.#receiver,
      deadline: this.#deadline,
      refuse: this.refuse.bind(this),
      report: this.report.bind(this),
      own
    }
    return function (request, reply) {
      if (request.openaiWebhook === null) throw new UnprotectedRoute(`POST ${endpoint.name}`, SKIPPED)
      handling(request, own !== undefined)
      new Exchange(request as VerifiedRequest, reply, options, this).run()
    }
  }

  #keepRefusal ({ name }: Endpoint) {
    return keepRefusal(({ log }, statusCode) => {
      this.#refusals.unprocessed(log, statusCode, name)
    })
  }

  async #drain (): Promise<void> {
    let timer: NodeJS.Timeout | undefined
    const over = new Promise<void>(resolve => {
      timer = setTimeout(() => {
        this.#abort.abort(new Error('the app is closing and closeTimeout is over'))
        // Handlers that listen to the signal get this turn to end.
        setImmediate(resolve)
      }, this.#closeTimeout)
    })
    const runnerClosed = attempt(() => this.#runner.close?.(this.#abort.signal), error => this.trouble(error, {}))
    const drained = Promise.all([runnerClosed, this.#receiver.drained()])
    await Promise.race([drained, over])
    clearTimeout(timer)
    runnersInUse.delete(this.#runner)
    // What arrives from now on is to come again: it must not hold the app open until it has arrived.
    for (const deadline of this.#bodyDeadlines.values()) deadline.close()
    this.#refusals.flush()
  }
}

function infoOf ({ endpoint, webhookId, event }: FailureInfo): FailureInfo {
  return { ...(endpoint !== undefined && { endpoint }), ...(webhookId !== undefined && { webhookId }), ...(event !== undefined && { event }) }
}

/** onError: the answer is not out yet. */
function refusing (request: FastifyRequest, reply: FastifyReply, error: Error, bounds: BodyBounds): void {
  boundRest(request, reply, bounds)
  if (error instanceof Overloaded) retryLater(reply)
}

/** The one thing that may throw in there is a schema of the user's, and anything. */
function thrownBySchema (cause: unknown): Error {
  return cause instanceof Error ? cause : new Error('a schema threw what is no Error, as the event was checked', { cause })
}

/** A route that was given the config of a protected one has the mark, but not the hook. */
function isProtected ({ config, onRequest, preParsing }: RouteOptions): boolean {
  const mark = (config as { [PROTECTED]?: unknown } | undefined)?.[PROTECTED]
  return mark !== undefined && [...toArray<unknown>(onRequest), ...toArray<unknown>(preParsing)].includes(mark)
}

function toArray<T> (value: T | readonly T[] | undefined): T[] {
  if (value === undefined) return []
  return Array.isArray(value) ? [...value] : [value as T]
}

/** Fastify's own JSON parser, without its callback: it refuses prototype poisoning. */
function jsonParser (instance: FastifyInstance): ParseJson {
  const parse = instance.getDefaultJsonParser('error', 'error')
  let failure: Error | null
  let parsed: unknown
  const done = (error: Error | null, body?: unknown): void => {
    failure = error
    parsed = body
  }
  return text => {
    parse(undefined as unknown as FastifyRequest, text, done)
    if (failure !== null) throw failure
    return parsed
  }
}

export default fp(openaiWebhook, { fastify: '5.x', name: 'fastify-openai-webhook' })
