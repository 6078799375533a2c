import { setMaxListeners } from 'node:events'
import type { FastifyInstance, RegisterOptions } from 'fastify'
import fp from 'fastify-plugin'
import { LONGEST_TIMER } from './checks.ts'
import { deadLettersOf } from './dead-letters.ts'
import { drain } from './delivery/drain.ts'
import { Handling } from './delivery/handling.ts'
import { Host } from './delivery/host.ts'
import { Receiver } from './delivery/receive.ts'
import { Works } from './delivery/work.ts'
import { AlreadyRegistered, InvalidOptions } from './errors.ts'
import { officialEvents } from './events/index.ts'
import { Failures } from './failures.ts'
import { DEFAULTS, assertOptions } from './options.ts'
import type { OpenAIWebhookOptions } from './options.ts'
import { Claims } from './pipeline/deduplicate.ts'
import { Validators, compilersFor } from './pipeline/validators.ts'
import type { Compilers } from './pipeline/validators.ts'
import { Observation } from './observation.ts'
import { Registry } from './registry.ts'
import type { FailureInfo } from './registry.ts'
import { Authentication } from './routes/authenticate.ts'
import { Bounds } from './routes/bounds.ts'
import { Endpoints } from './routes/endpoint.ts'
import { dispatching, guard } from './routes/guard.ts'
import { protectMarked } from './routes/marked.ts'
import { pluginRoute } from './routes/plugin-route.ts'
import type { Routes } from './routes/routes.ts'
import { guardedScope, rootOf } from './routes/unprotected.ts'
import { inline } from './runners/inline.ts'
import { runnersInUse } from './runners/runner.ts'
import { scopeOf } from './scope.ts'
import { memoryStore } from './stores/memory.ts'
import { noStore } from './stores/none.ts'
import type { OpenAIWebhook } from './api.ts'
import { Verifications } from './routes/verifications.ts'
import { secretInTime } from './verifiers/keyring.ts'
import { within } from './within.ts'

/** Close the registrations of an app, by its root: two apps may share a server, as with @fastify/restartable. */
const closings = new WeakMap<object, Array<() => Promise<void>>>()

// `options` has no default, because Fastify always passes an object, and its types cannot infer the options from an optional parameter.
async function openaiWebhook (instance: FastifyInstance, options: OpenAIWebhookOptions): Promise<void> {
  if (typeof (instance as Partial<FastifyInstance> | undefined)?.decorateRequest !== 'function') {
    throw new InvalidOptions('openaiWebhook is a Fastify plugin, and cannot be called or used as a handler or middleware: expected await app.register(openaiWebhook, { … })')
  }
  assertOptions(options)
  if (instance.hasDecorator('openaiWebhook')) throw new AlreadyRegistered()
  const compilers = await compilersFor(options.events ?? {})
  const { routes, deadLetters, start, close } = assemble(instance, options, compilers)

  const scopes = new WeakMap<FastifyInstance, OpenAIWebhook>()
  instance.decorate('openaiWebhook', {
    getter (this: FastifyInstance): OpenAIWebhook {
      let scope = scopes.get(this)
      if (scope === undefined) scopes.set(this, scope = scopeOf(routes, deadLetters, this))
      return scope
    }
  })
  instance.decorateRequest('openaiWebhook', null)
  // Fastify binds the hooks of an instance late, so this hook also runs on routes that were declared before the plugin had loaded.
  guardedScope(instance).addHook('onRequest', guard(routes.failures))
  instance.addHook('onRoute', function (route) { protectMarked(routes, this, route) })
  instance.addHook('onReady', start)
  const root = rootOf(instance)
  const registrations = closings.get(root) ?? []
  closings.set(root, registrations)
  registrations.push(close)
  // preClose runs before every onClose hook, so that the app's databases are still open while the handlers are drained. onClose waits for the rest.
  instance.addHook('preClose', async () => {
    // At once, because Fastify runs the hooks one after the other: each `closeTimeout` would begin when the one before is over.
    for (const closeEach of registrations) closeEach().catch(() => {}) // reported by the hook of that registration
    await within(close(), hookTime(instance), () => {})
  })
  instance.addHook('onClose', close)

  const path = options.path ?? DEFAULTS.path
  // Throws if the secret is missing or unusable.
  if (path !== false || options.secret !== undefined) routes.verifications.of({}, true)
  if (path !== false) {
    const { rateLimit, prefix = '', logLevel, logSerializers } = options as OpenAIWebhookOptions & RegisterOptions
    // Fastify applies these options to the scope of a plugin, but a plugin wrapped by fastify-plugin has none.
    const scope = { prefix, ...(logLevel !== undefined && { logLevel }), ...(logSerializers !== undefined && { logSerializers }) }
    pluginRoute(routes, instance, { url: path, ...(rateLimit !== undefined && { rateLimit }) }, scope)
  }
}

/** ms that a hook may take. Fastify fails a hook that takes longer than `pluginTimeout` (0: no limit), without saying what it waited for. */
function hookTime ({ initialConfig: { pluginTimeout = 0 } }: FastifyInstance): number {
  return pluginTimeout * 0.8 || LONGEST_TIMER
}

function assemble (instance: FastifyInstance, options: OpenAIWebhookOptions, compilers: Compilers) {
  const { store, lease = DEFAULTS.lease, retention = DEFAULTS.retention, reconcile = DEFAULTS.reconcile } = options.idempotency || {}
  const events = { ...officialEvents, ...options.events }
  const runner = options.runner ?? inline()
  const abort = new AbortController()
  // Every running handler may listen to it.
  setMaxListeners(0, abort.signal)
  const works = new Works()
  const registry = new Registry(new Set(Object.keys(events)))
  const observation = new Observation()
  const failures = new Failures(instance.log, registry, observation)
  const onTrouble = (error: unknown, delivery?: FailureInfo): void => failures.trouble(error, delivery)
  const claims = new Claims({ store: options.idempotency === false ? noStore : store ?? memoryStore(), lease, retention, reconcile, onTrouble })
  const handling = new Handling(works, claims, registry, instance.log, observation, abort.signal)
  const deadline = options.deadline ?? DEFAULTS.deadline
  const verifications = new Verifications(options, { patience: deadline, warn: message => { instance.log.warn(message) }, onTrouble })
  const bounds = new Bounds(options, instance)
  const routes: Routes = {
    registry,
    events,
    endpoints: new Endpoints(registry, verifications),
    verifications,
    authentication: new Authentication(new Validators(officialEvents, options.events ?? {}, compilers), failures, observation),
    failures,
    observation,
    receiver: new Receiver(works, claims, handling, runner, observation),
    deadline,
    bounds,
    onReady: [],
    marker: dispatching()
  }
  let isStarted = false
  let closed: Promise<void> | undefined

  return {
    routes,
    deadLetters: deadLettersOf(runner),
    async start (): Promise<void> {
      for (const work of routes.onReady) work()
      await secretInTime('secret', async () => { await verifications.load() }, hookTime(instance))
      registry.complete()
      // app.close() was called meanwhile, and would not close what is started now.
      if (closed !== undefined) return
      // A runner has one host. With two, a delivery that one registration acknowledged would run the handlers of the other.
      if (runnersInUse.has(runner)) throw new InvalidOptions('expected a runner of its own, got one that another registration of the plugin uses')
      runnersInUse.add(runner)
      isStarted = true
      await runner.start?.(new Host(works, claims, handling, failures))
    },
    async close (): Promise<void> {
      // If another registration uses the runner, this one has failed to start and must not close it.
      const isOurs = isStarted || !runnersInUse.has(runner)
      closed ??= drain(works, claims, isOurs ? runner : undefined, failures, abort, options.closeTimeout ?? DEFAULTS.closeTimeout).then(() => {
        if (isOurs) runnersInUse.delete(runner)
        bounds.close()
        failures.flush()
      })
      await closed
    }
  }
}

export default fp(openaiWebhook, { fastify: '5.x', name: 'fastify-openai-webhook' })
