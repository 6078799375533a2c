import { Type } from '@sinclair/typebox'
import Fastify from 'fastify'
import t from 'tap'
import openaiWebhook, { background, memoryStore, standardWebhooks, xOpenAISignature } from '../lib/index.ts'
import { webhookMetrics } from '../lib/metrics.ts'
import type { Claim, EventType, FailureInfo, IdempotencyStore, Job, OpenAIWebhookOptions, Runner, RunnerHost } from '../lib/index.ts'
import { build, post, sign, SECRET, thin } from './support/deliveries.ts'
import { capturedLog, codeOf, deferred, messageOf, redelivered, watchedStore } from './support/observe.ts'

const RECEIVED = '{"received":true}'
const DUPLICATE = '{"received":true,"duplicate":true}'

/** What people have in place of a schema. */
const foreignSchemas: Record<string, unknown> = {
  'one of another version of Standard Schema (2)': { type: 'object', '~standard': { version: 2, vendor: 'zod', validate () {} } },
  'one with Standard Schema that lacks the function `validate`': Object.assign(() => {}, { '~standard': { version: 1, vendor: 'arktype' } }),
  'one of another version of Standard Schema (undefined)': { '~standard': null },
  'a plain JSON Schema': { type: 'object', properties: {} },
  'an instance of ZodObject': new (class ZodObject { _def = {} })(),
  'a value of type object': { id: 'string' },
  'a value of type function': () => {},
  '"string"': 'string',
  undefined,
  null: null
}

/** Registers with what a JavaScript user may write. */
async function register (options: unknown): Promise<void> {
  await Fastify().register(openaiWebhook, options as OpenAIWebhookOptions)
}

/** What the plugin's options are called, as an error lists them. */
const ALL = 'secret, tolerance, bodyLimit, verifier, bodyTimeout, path, prefix, rateLimit, events, idempotency, runner, deadline or closeTimeout'

t.test('wrong values are refused: what was expected, what came', async t => {
  const event = (type: string) => Type.Object({ type: Type.Literal(type) })
  const cases: Array<[object, string]> = [
    [{ path: 'webhooks' }, 'expected path to be a path that begins with "/", or false, got "webhooks"'],
    [{ path: '' }, 'expected path to be a path that begins with "/", or false, got ""'],
    [{ path: true }, 'expected path to be a path that begins with "/", or false, got true'],
    [{ path: null }, 'expected path to be a path that begins with "/", or false, got null'],
    [
      { path: false, rateLimit: { max: 1 } },
      'expected rateLimit together with a path, got path: false: it is for the plugin\'s own route alone; further ones have theirs, as in app.openaiWebhook.route({ url, rateLimit })'
    ],
    [{ prefix: 7 }, 'expected prefix to be a string, got 7'],
    [{ tolerance: 0 }, 'expected tolerance to be a whole number of seconds, 1 or more, got 0'],
    [{ tolerance: -300 }, 'expected tolerance to be a whole number of seconds, 1 or more, got -300'],
    [{ tolerance: 1.5 }, 'expected tolerance to be a whole number of seconds, 1 or more, got 1.5'],
    [{ tolerance: NaN }, 'expected tolerance to be a whole number of seconds, 1 or more, got NaN'],
    [{ tolerance: Infinity }, 'expected tolerance to be a whole number of seconds, 1 or more, got Infinity'],
    [{ tolerance: '300' }, 'expected tolerance to be a whole number of seconds, 1 or more, got "300"'],
    [{ tolerance: [300] }, 'expected tolerance to be a whole number of seconds, 1 or more, got an array'],
    [{ tolerance: 300n }, 'expected tolerance to be a whole number of seconds, 1 or more, got a value of type bigint'],
    [{ bodyLimit: 0 }, 'expected bodyLimit to be a whole number of bytes, 1 or more, got 0'],
    [{ bodyLimit: '64kb' }, 'expected bodyLimit to be a whole number of bytes, 1 or more, got "64kb"'],
    [{ bodyTimeout: 0 }, 'expected bodyTimeout to be a whole number of ms, 1 to 2147483647, got 0'],
    [{ bodyTimeout: '10s' }, 'expected bodyTimeout to be a whole number of ms, 1 to 2147483647, got "10s"'],
    [{ events: [] }, 'expected events to be an object of schemas by event type, got an array'],
    ...Object.entries(foreignSchemas).map(([got, schema]) => [
      { events: { 'order.shipped': event('order.shipped'), 'order.paid': schema } },
      `expected events["order.paid"] to be a schema of TypeBox 0.34 or 1.x, or with Standard Schema (Zod, Valibot, ArkType), got ${got}`
    ] as [object, string]),
    [{ events: { 'order.paid': event('order.shipped') } }, 'expected events["order.paid"] to have the type "order.paid", got the literal "order.shipped"'],
    [{ events: { 'order.paid': Type.Object({ type: Type.Literal(7) }) } }, 'expected events["order.paid"] to have the type "order.paid", got the literal 7'],
    [{ verifier: 'standard' }, 'expected verifier to be a function such as standardWebhooks() returns, got "standard"'],
    [{ verifier: standardWebhooks }, 'expected verifier to be a function such as standardWebhooks() returns, got a value of type function: call it, standardWebhooks()'],
    [{ verifier: xOpenAISignature }, 'expected verifier to be a function such as standardWebhooks() returns, got a value of type function: call it, xOpenAISignature()'],
    [{ verifier: Object.assign(() => {}, { checkHeaders: null }) }, 'verifier: expected checkHeaders to be a function, got null'],
    [{ verifier: Object.assign(() => {}, { keyBytes: 5 }) }, 'verifier: expected keyBytes to be a function, got 5'],
    [{ events: { 'batch.*': event('batch.*') } }, 'expected the names in events to be event types, got "batch.*": a schema is for one type, such as "batch.failed"'],
    [{ events: { '*': event('*') } }, 'expected the names in events to be event types, got "*": a schema is for one type, such as "batch.failed"'],
    [{ events: { '': event('') } }, 'expected the names in events to be event types, got "": a schema is for one type, such as "batch.failed"'],
    [{ verifier: {} }, 'expected verifier to be a function such as standardWebhooks() returns, got a value of type object'],
    [{ idempotency: true }, 'expected idempotency to be false or an object { store, lease, retention, reconcile }, got true'],
    [{ idempotency: null }, 'expected idempotency to be false or an object { store, lease, retention, reconcile }, got null'],
    [{ idempotency: memoryStore }, 'expected idempotency to be false or an object { store, lease, retention, reconcile }, got a value of type function: call it, memoryStore()'],
    [{ idempotency: memoryStore() }, 'expected idempotency to be false or an object { store, lease, retention, reconcile }, got a store: say { idempotency: { store } }'],
    [{ runner: background }, 'expected runner to be a runner such as inline(), got a value of type function: call it, background()'],
    [{ idempotency: { store: {} } }, 'expected idempotency.store to be a store such as memoryStore(), got a value of type object'],
    [{ idempotency: { store: new Map() } }, 'expected idempotency.store to be a store such as memoryStore(), got a value of type object'],
    [{ idempotency: { store: { ...memoryStore(), release: undefined } } }, 'expected idempotency.store.release to be a function, got undefined'],
    [{ idempotency: { store: { ...memoryStore(), begin: 5 } } }, 'expected idempotency.store.begin to be a function, got 5'],
    [{ idempotency: { lease: 0 } }, 'expected idempotency.lease to be a whole number of ms, 1 to 2147483647, got 0'],
    [{ idempotency: { lease: 2 ** 31 } }, 'expected idempotency.lease to be a whole number of ms, 1 to 2147483647, got 2147483648'],
    [{ idempotency: { retention: '72h' } }, 'expected idempotency.retention to be a whole number of ms, 1 or more, got "72h"'],
    [{ idempotency: { retention: 2 ** 53 } }, 'expected idempotency.retention to be a whole number of ms, 1 or more, got 9007199254740992'],
    [{ runner: 'inline' }, 'expected runner to be a runner such as inline(), got "inline"'],
    [{ runner: {} }, 'expected runner to be a runner such as inline(), got a value of type object'],
    [{ deadline: 0 }, 'expected deadline to be a whole number of ms, 1 to 2147483647, got 0'],
    [{ deadline: Infinity }, 'expected deadline to be a whole number of ms, 1 to 2147483647, got Infinity'],
    [{ closeTimeout: -1 }, 'expected closeTimeout to be a whole number of ms, 0 to 2147483647, got -1'],
    [{ closeTimeout: 'a value longer than 16' }, 'expected closeTimeout to be a whole number of ms, 0 to 2147483647, got a string']
  ]
  for (const [options, message] of cases) {
    const attempt = () => register({ secret: SECRET, ...options })
    t.equal(await messageOf(attempt), message, message)
    t.equal(await codeOf(attempt), 'INVALID_OPTIONS')
  }
})

t.test('options that are no object are refused', async t => {
  for (const [options, got] of [[[], 'an array'], ['whsec_', 'a string'], [7, '7']] as const) {
    t.equal(await messageOf(() => register(options)), `expected options to be an object, got ${got}`, got)
  }
})

t.test('unknown options are refused, with the nearest known one', async t => {
  const cases: Array<[object, string]> = [
    [{ secrets: SECRET }, 'unknown option "secrets", did you mean "secret"?'],
    [{ webhookSecret: SECRET }, 'unknown option "webhookSecret": it is called `secret` here'],
    [{ bodylimit: 7 }, 'unknown option "bodylimit", did you mean "bodyLimit"?'],
    [{ closeTimeOut: 7 }, 'unknown option "closeTimeOut", did you mean "closeTimeout"?'],
    [{ cache: true }, `unknown option "cache": expected ${ALL}`],
    [{ toString: 7 }, `unknown option "toString": expected ${ALL}`],
    [{ idempotency: { leese: 7 } }, 'unknown option "idempotency.leese", did you mean "lease"?'],
    [{ idempotency: { ttl: 7 } }, 'unknown option "idempotency.ttl": expected store, lease, retention or reconcile']
  ]
  for (const [options, message] of cases) t.equal(await messageOf(() => register({ secret: SECRET, ...options })), message)
})

t.test('the plugin is registered, and nothing else', async t => {
  const message = 'openaiWebhook is a Fastify plugin, and cannot be called or used as a handler or middleware: expected await app.register(openaiWebhook, { … })'
  const plugin = openaiWebhook as unknown as (...args: unknown[]) => Promise<void>
  for (const args of [[], [{ secret: SECRET }], [{ headers: {} }, { end () {} }, () => {}]]) {
    await t.rejects(plugin(...args), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message })
  }
  const app = Fastify()
  t.teardown(() => app.close())
  await t.rejects(async () => await app.register(webhookMetrics as never), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: /^webhookMetrics\(\) makes the plugin/ })
})

t.test('an option in the wrong place is refused, with the right one', async t => {
  const app = await build(t)
  const route = async (options: object): Promise<string> => await messageOf(() => app.openaiWebhook.route({ url: '/route', ...options } as never))
  const marked = async (config: object): Promise<string> => await messageOf(() => app.post('/marked', { config: { openaiWebhook: config as never } }, async () => {}))
  const unwrapped = async (options: object): Promise<string> => await messageOf(async () => { await app.openaiWebhook.unwrap('{}', {}, options as never) })
  const registered = async (options: object): Promise<string> => await messageOf(() => register({ secret: SECRET, ...options }))
  for (const [message, expected] of [
    [await registered({ url: '/hooks' }), /^unknown option "url": the plugin's own route has `path`/],
    [await registered({ on: {} }), /^unknown option "on": .*app\.openaiWebhook\.on\(type, handler\)/],
    [await registered({ handler () {} }), /^unknown option "handler": .*app\.openaiWebhook\.on\(type, handler\)/],
    [await registered({ store: memoryStore() }), /^unknown option "store": .*\{ idempotency: \{ store \} \}/],
    [await registered({ retention: 7 }), /^unknown option "retention": .*\{ idempotency: \{ retention \} \}/],
    [await registered({ attempts: 7 }), /^unknown option "attempts": .*\{ runner: durable\(db, \{ attempts \}\) \}/],
    [await registered({ max: 7 }), /^unknown option "max": .*memoryStore\(\{ max \}\)/],
    [await registered({ idempotency: { max: 7 } }), /^unknown option "idempotency\.max": .*memoryStore\(\{ max \}\)/],
    [await registered({ idempotency: { deadline: 7 } }), /^unknown option "idempotency\.deadline": it is an option of the plugin, as in app\.register\(openaiWebhook, \{ deadline \}\)/],
    [await registered({ reconcile: true }), /^unknown option "reconcile": .*\{ idempotency: \{ reconcile \} \}/],
    [await registered({ tenant: {} }), /^unknown option "tenant": it is an option of a route, as in app\.openaiWebhook\.route\(\{ url, tenant \}\)/],
    [await route({ deadline: 7 }), /^unknown option "deadline": it is an option of the plugin/],
    [await route({ lease: 7 }), /^unknown option "lease": .*\{ idempotency: \{ lease \} \}/],
    [await route({ path: '/other' }), /^unknown option "path": a route has `url`/],
    [await route({ prefix: '/v1' }), /^unknown option "prefix": a route has the prefix of its scope/],
    [await marked({ rateLimit: {} }), /^unknown option "rateLimit": .*config: \{ openaiWebhook: \{\}, rateLimit: \{\} \}/],
    [await marked({ idempotency: false }), /^unknown option "idempotency": it is an option of the plugin/],
    [await unwrapped({ bodyLimit: 7 }), /^unknown option "bodyLimit": it is an option of the plugin and of its routes/],
    [await unwrapped({ tol: 7 }), /^unknown option "tol": expected secret, tolerance or verifier$/],
    [await unwrapped({ bodyTimeout: 7 }), /^unknown option "bodyTimeout": it is an option of the plugin and of its routes/]
  ] as const) t.match(message, expected)
})

t.test('what an app that fastify-cli generated hands on in its tests is passed over', async t => {
  const app = await build(t, { skipOverride: true } as OpenAIWebhookOptions)
  t.equal((await post(app, sign(thin('batch.failed')))).body, RECEIVED)
})

t.test('a secret in the wrong place is not shown', async t => {
  const misplaced = ['whsec_short', SECRET, 'sk-proj-1', 'a secret of a length that tells']
  for (const secret of misplaced) {
    for (const options of [{ tolerance: secret }, { idempotency: { lease: secret } }, { path: secret }, secret]) {
      const message = await messageOf(() => register(options))
      t.match(message, /got a string$/)
      t.notOk(message.includes(secret))
    }
  }
})

t.test('what may be left out, and what Fastify adds', async t => {
  const app = await build(t, {
    tolerance: undefined, path: undefined, idempotency: {}, events: {}, closeTimeout: 0, deadline: 2 ** 31 - 1, logLevel: 'warn', logSerializers: {}
  } as unknown as OpenAIWebhookOptions)
  t.equal((await post(app, sign(thin('batch.failed')))).body, RECEIVED)
})

t.test('events of the user\'s own are known, checked and dispatched', async t => {
  const app = await build(t, {
    events: {
      'order.paid': Type.Object({ type: Type.Literal('order.paid'), data: Type.Object({ total: Type.Integer() }) }),
      'order.shipped': Type.Object({ type: Type.String() }),
      'order.any': Type.Unknown()
    }
  })
  const seen: unknown[] = []
  app.openaiWebhook
    .on('order.paid' as EventType, event => { seen.push((event as { data: unknown }).data) })
    .on('order.*' as EventType, ({ type }) => { seen.push(type) })
  t.equal(await messageOf(() => app.openaiWebhook.on('order.payed' as EventType, () => {})),
    'on(): unknown event type "order.payed", did you mean "order.paid"?; a type of your own needs a schema in the `events` option')

  t.equal((await post(app, sign({ type: 'order.paid', data: { total: 7 } }))).body, RECEIVED)
  t.equal((await post(app, sign({ type: 'order.paid', data: { total: '7' } }))).statusCode, 400)
  t.equal((await post(app, sign({ type: 'order.shipped' }))).body, RECEIVED)
  t.equal((await post(app, sign({ type: 'order.any' }))).body, RECEIVED)
  t.same(seen, [{ total: 7 }, 'order.paid', 'order.shipped', 'order.any'])
})

t.test('`events` takes the place of a known schema', async t => {
  const sparse = { type: 'batch.completed', data: { batch_id: 'batch_1', status: 'completed' } }
  const strict = await build(t)
  t.equal((await post(strict, sign(sparse))).statusCode, 400)
  const app = await build(t, { events: { 'batch.completed': Type.Object({ type: Type.Literal('batch.completed'), data: Type.Object({ batch_id: Type.String() }) }) } })
  t.equal((await post(app, sign(sparse))).body, RECEIVED)
})

t.test('`verifier` takes the place of the default one for every route', async t => {
  const asked: string[] = []
  const app = await build(t, {
    verifier: (delivery, keys) => {
      asked.push(String(delivery.headers['webhook-id']))
      return standardWebhooks()(delivery, keys)
    }
  })
  app.openaiWebhook.route({ url: '/second' })
  const delivery = sign(thin('batch.failed'))
  t.equal((await post(app, delivery)).body, RECEIVED)
  t.equal((await post(app, delivery, '/second')).body, RECEIVED)
  t.same(asked, [delivery.headers['webhook-id'], delivery.headers['webhook-id']])
})

t.test('idempotency: false', async t => {
  t.test('processes what comes twice twice', async t => {
    const app = await build(t, { idempotency: false })
    let runs = 0
    app.openaiWebhook.on('batch.failed', () => { runs++ }).on('batch.failed', async () => { runs++ })
    const delivery = sign(thin('batch.failed'))
    t.equal((await post(app, delivery)).body, RECEIVED)
    t.equal((await post(app, redelivered(delivery))).body, RECEIVED)
    t.equal(runs, 4)
  })

  t.test('runs every handler again after a failure', async t => {
    const app = await build(t, { idempotency: false })
    const seen: string[] = []
    app.openaiWebhook
      .on('batch.failed', () => { seen.push('first') })
      .on('batch.failed', () => { throw new Error('disk full') })
    const delivery = sign(thin('batch.failed'))
    t.equal((await post(app, delivery)).statusCode, 500)
    t.equal((await post(app, redelivered(delivery))).statusCode, 500)
    t.same(seen, ['first', 'first'])
  })
})

t.test('a store of the user\'s', async t => {
  /** An app on a store that does as the memory store, save for `faults`. */
  async function on (t: Parameters<typeof build>[0], faults: Partial<IdempotencyStore>) {
    const { store, calls } = watchedStore()
    const log = capturedLog()
    const app = await build(t, { idempotency: { store: { ...store, ...faults } } }, { logger: log.logger })
    const told: Array<{ error: Error & { code?: string }, info: FailureInfo }> = []
    let runs = 0
    app.openaiWebhook
      .on('batch.failed', () => { runs++ })
      .on('batch.expired', async () => { runs++ })
      .on('batch.completed', () => { throw new Error('disk full') })
      .on('batch.*', () => {})
      .onError((error, info) => { told.push({ error, info }) })
    return { app, told, log, calls, runs: () => runs }
  }

  t.test('may be asynchronous, and is told the lease, the retention and one key an endpoint and webhook-id', async t => {
    const told: unknown[][] = []
    const memory = memoryStore()
    const store: IdempotencyStore = {
      async begin (...args) {
        told.push(['begin', ...args])
        return await memory.begin(...args)
      },
      async checkpoint (...args) { await memory.checkpoint(...args) },
      async complete (...args) {
        told.push(['complete', args[0], args[2]])
        await memory.complete(...args)
      },
      async extend (...args) { return await memory.extend(...args) },
      async release (...args) { await memory.release(...args) }
    }
    const app = await build(t, { idempotency: { store, lease: 7_000, retention: 9_000 } })
    const seen: string[] = []
    app.openaiWebhook.on('batch.failed', event => { seen.push(event.data.id) }).route({ url: '/second' })
    const delivery = sign(thin('batch.failed'))
    t.equal((await post(app, delivery)).body, RECEIVED)
    t.equal((await post(app, redelivered(delivery))).body, DUPLICATE)
    t.equal((await post(app, delivery, '/second')).body, RECEIVED)
    t.same(seen, ['res_1', 'res_1'])
    const [first, second, , other] = told
    t.same(first, ['begin', first![1], 7_000])
    t.same(second, ['complete', first![1], 9_000])
    t.not(other![1], first![1])
  })

  for (const [how, begin] of Object.entries({
    rejects: async () => { throw new Error('ECONNREFUSED 10.0.0.7') },
    throws: () => { throw new Error('ECONNREFUSED 10.0.0.7') }
  })) {
    t.test(`that ${how} in begin: 503, and nothing runs`, async t => {
      const { app, told, runs, log } = await on(t, { begin })
      const { statusCode, headers, body } = await post(app, sign(thin('batch.failed')))
      t.same([statusCode, headers['retry-after']], [503, '5'])
      t.match(JSON.parse(body), { code: 'FST_OPENAI_WEBHOOK_UNAVAILABLE' })
      t.notOk(body.includes('10.0.0.7'))
      t.equal(runs(), 0)
      t.equal(told.length, 1)
      t.match(told[0]!.error, { code: 'FST_OPENAI_WEBHOOK_UNAVAILABLE', cause: { message: 'ECONNREFUSED 10.0.0.7' } })
      t.ok(log.errors().some(({ err }) => err?.message === 'ECONNREFUSED 10.0.0.7'))
    })
  }

  t.test('that says running: 409', async t => {
    const { app, runs, told } = await on(t, { begin: (): Claim => ({ state: 'running' }) })
    const { statusCode, headers, body } = await post(app, sign(thin('batch.failed')))
    t.same([statusCode, headers['retry-after']], [409, '5'])
    t.match(JSON.parse(body), { code: 'FST_OPENAI_WEBHOOK_IN_PROGRESS' })
    t.equal(runs(), 0)
    t.same(told.map(({ error }) => error.code), ['FST_OPENAI_WEBHOOK_IN_PROGRESS'])
  })

  t.test('that says done: a duplicate', async t => {
    const { app, runs } = await on(t, { begin: async (): Promise<Claim> => ({ state: 'done' }) })
    t.equal((await post(app, sign(thin('batch.failed')))).body, DUPLICATE)
    t.equal(runs(), 0)
  })

  t.test('that names handlers which have finished: the others run', async t => {
    const { app, runs } = await on(t, { begin: (): Claim => ({ state: 'claimed', token: '1', finished: ['#0', 'of an earlier deployment'] }) })
    t.equal((await post(app, sign(thin('batch.failed')))).body, RECEIVED)
    t.equal(runs(), 0)
    t.equal((await post(app, sign(thin('batch.expired')))).body, RECEIVED)
    t.equal(runs(), 1)
  })

  // Handlers have run: the sender is told how they ended, whatever the store has to say.
  for (const [method, type, status] of [
    ['complete', 'batch.failed', 200],
    ['complete', 'batch.expired', 200],
    ['checkpoint', 'batch.failed', 200],
    ['checkpoint', 'batch.expired', 200],
    ['release', 'batch.completed', 500]
  ] as const) {
    for (const fault of [async () => { throw new Error('readonly') }, () => { throw new Error('readonly') }]) {
      const how = fault.constructor.name === 'AsyncFunction' ? 'rejects' : 'throws'
      t.test(`that ${how} in ${method} after ${type}: the answer stays ${status}, onError is told`, async t => {
        const { app, told, log } = await on(t, { [method]: fault })
        t.equal((await post(app, sign(thin(type)))).statusCode, status)
        t.ok(told.some(({ error }) => error.message === 'readonly'))
        t.ok(log.errors().some(({ err }) => err?.message === 'readonly'))
      })
    }
  }
})

t.test('a runner of the user\'s', async t => {
  /** Keeps jobs until it is told to work, as a queue in another process does. */
  function queue (): Runner & { jobs: Job[], host: RunnerHost } {
    const jobs: Job[] = []
    return {
      jobs,
      host: undefined as unknown as RunnerHost,
      async start (host) { this.host = host },
      async run (job) { jobs.push(JSON.parse(JSON.stringify(job)) as Job) }
    }
  }

  t.test('acknowledges first and has the handlers run later', async t => {
    const runner = queue()
    const { store, calls } = watchedStore()
    const app = await build(t, { runner, idempotency: { store } })
    const seen: unknown[] = []
    app.openaiWebhook.on('batch.failed', function (event, context) { seen.push([event.data.id, context.webhookId, context.timestamp, context.endpoint, 'request' in context, this === app]) })
    const delivery = sign(thin('batch.failed'))
    const webhookId = delivery.headers['webhook-id']
    const timestamp = Number(delivery.headers['webhook-timestamp'])

    t.equal((await post(app, delivery)).body, RECEIVED)
    t.same(seen, [])
    t.same(runner.jobs, [{ webhookId, timestamp, endpoint: '/webhooks/openai', event: thin('batch.failed') }])
    t.same(calls.splice(0), ['begin', 'release'], 'the claim is left to whoever processes the job')
    await runner.host.process(runner.jobs[0]!)
    t.same(seen, [['res_1', webhookId, timestamp, '/webhooks/openai', false, true]])
    t.same(calls.splice(0), ['begin', 'complete'])
    t.equal((await post(app, redelivered(delivery))).body, DUPLICATE)
    await runner.host.process(runner.jobs[0]!)
    t.equal(seen.length, 1, 'a job that comes twice runs once')
  })

  t.test('is told of a failure, and runs what is left when it tries again', async t => {
    const runner = queue()
    const app = await build(t, { runner })
    const seen: string[] = []
    let broken = true
    app.openaiWebhook
      .on('batch.failed', async () => { seen.push('first') })
      .on('batch.failed', () => {
        if (broken) throw new Error('disk full')
        seen.push('second')
      })
    await post(app, sign(thin('batch.failed')))
    const [job] = runner.jobs
    t.equal(await codeOf(() => runner.host.process(job!)), 'HANDLER_FAILED')
    broken = false
    t.equal(await codeOf(() => runner.host.process(job!)), 'none')
    t.same(seen, ['first', 'second'])
  })

  t.test('that processes a job twice at once has it run once', async t => {
    const runner = queue()
    const app = await build(t, { runner })
    const { promise, resolve } = deferred()
    let runs = 0
    app.openaiWebhook.on('batch.failed', async () => {
      runs++
      await promise
    })
    const delivery = sign(thin('batch.failed'))
    await post(app, delivery)
    const both = Promise.all([runner.host.process(runner.jobs[0]!), runner.host.process(runner.jobs[0]!)])
    t.equal((await post(app, redelivered(delivery))).body, DUPLICATE, 'a delivery that comes meanwhile has been accepted')
    resolve()
    await both
    t.equal(runs, 1)
    t.equal(runner.jobs.length, 1)
  })

  t.test('may process jobs of a route that this process does not have: the app\'s handlers run', async t => {
    const runner = queue()
    const app = await build(t, { runner, path: false, rateLimit: false })
    const seen: string[] = []
    app.openaiWebhook.on('batch.*', (_event, { endpoint, log }) => {
      log.info('no request to log for')
      seen.push(endpoint)
    })
    await app.ready()
    for (const type of ['batch.failed', 'batch.expired']) {
      await runner.host.process({ webhookId: type, timestamp: 1, endpoint: '/elsewhere', event: thin(type) })
    }
    t.same(seen, ['/elsewhere', '/elsewhere'])
  })

  t.test('waits for a claim that is about to be let go', async t => {
    const runner = queue()
    const { store } = watchedStore()
    const states: Claim[] = [{ state: 'running' }, { state: 'claimed', token: '1', finished: [] }]
    const app = await build(t, { runner, idempotency: { store: { ...store, begin: () => states.shift()! } } })
    let runs = 0
    app.openaiWebhook.on('batch.failed', () => { runs++ })
    await app.ready()
    await runner.host.process({ webhookId: 'wh_1', timestamp: 1, endpoint: '/webhooks/openai', event: thin('batch.failed') })
    t.equal(runs, 1)
    t.same(states, [])
  })

  t.test('that began with the job while the store was asked about a second delivery of it', async t => {
    const runner = queue()
    const { store } = watchedStore()
    const asked = deferred()
    const told = deferred()
    const ended = deferred()
    let begins = 0
    const app = await build(t, {
      runner,
      idempotency: {
        store: {
          ...store,
          async begin (key, lease) {
            // The second delivery asks before the job's handlers are started, and hears of them after.
            if (++begins === 2) {
              asked.resolve()
              await told.promise
            }
            return await store.begin(key, lease)
          }
        }
      }
    })
    const started = deferred()
    app.openaiWebhook.on('batch.failed', async () => {
      started.resolve()
      await ended.promise
    })
    const delivery = sign(thin('batch.failed'))
    await post(app, delivery)
    const second = post(app, redelivered(delivery))
    await asked.promise
    const processed = runner.host.process(runner.jobs[0]!)
    await started.promise
    told.resolve()
    t.equal((await second).body, DUPLICATE)
    ended.resolve()
    await processed
    t.equal(runner.jobs.length, 1)
  })

  t.test('is left out on a route whose own handler replies once the others have succeeded', async t => {
    const runner = queue()
    const app = await build(t, { runner })
    const seen: string[] = []
    let status = 500
    app.openaiWebhook.route({
      url: '/own',
      on: { 'batch.failed': () => { seen.push('event handler') } },
      handler: async (_request, reply) => reply.code(status).send('own')
    })
    const delivery = sign(thin('batch.failed'))
    t.equal((await post(app, delivery, '/own')).statusCode, 500)
    status = 202
    t.equal((await post(app, redelivered(delivery), '/own')).statusCode, 202)
    t.equal((await post(app, redelivered(delivery), '/own')).body, DUPLICATE)
    t.same(seen, ['event handler'])
    t.same(runner.jobs, [])
  })

  t.test('may process within run and let the sender go before the end', async t => {
    const ended = deferred()
    let host!: RunnerHost
    const runner: Runner = {
      start (startedBy) { host = startedBy },
      run (job) { host.process(job) }
    }
    const { store, next } = watchedStore()
    const app = await build(t, { runner, idempotency: { store } })
    let runs = 0
    app.openaiWebhook.on('batch.failed', async () => {
      runs++
      await ended.promise
    })
    const delivery = sign(thin('batch.failed'))
    t.equal((await post(app, delivery)).body, RECEIVED)
    t.equal((await post(app, redelivered(delivery))).body, RECEIVED)
    const completed = next('complete')
    ended.resolve()
    await completed
    t.equal((await post(app, redelivered(delivery))).body, DUPLICATE)
    t.equal(runs, 1)
  })

  const nothing: unknown = undefined
  for (const [how, run] of Object.entries({
    rejects: async () => { throw new Error('ECONNREFUSED 10.0.0.7') },
    throws: () => { throw new Error('ECONNREFUSED 10.0.0.7') },
    'rejects with nothing': () => Promise.reject(nothing)
  })) {
    t.test(`that ${how}: 503, and the claim is let go`, async t => {
      const { store, calls } = watchedStore()
      const app = await build(t, { runner: { run }, idempotency: { store } })
      const told: Array<Error & { code?: string }> = []
      app.openaiWebhook.onError(error => { told.push(error) })
      const { statusCode, headers, body } = await post(app, sign(thin('batch.failed')))
      t.same([statusCode, headers['retry-after']], [503, '5'])
      t.match(JSON.parse(body), { code: 'FST_OPENAI_WEBHOOK_UNAVAILABLE' })
      t.notOk(body.includes('10.0.0.7'))
      t.same(calls, ['begin', 'release'])
      t.same(told.map(({ code }) => code), ['FST_OPENAI_WEBHOOK_UNAVAILABLE'])
    })
  }

  t.test('may refuse with a coded error', async t => {
    const overloaded = Object.assign(new Error('the queue is full'), { code: 'FST_OPENAI_WEBHOOK_OVERLOADED', statusCode: 503 })
    const app = await build(t, { runner: { run: () => Promise.reject(overloaded) } })
    const { statusCode, headers, body } = await post(app, sign(thin('batch.failed')))
    t.same([statusCode, headers['retry-after']], [503, '5'])
    t.match(JSON.parse(body), { code: 'FST_OPENAI_WEBHOOK_OVERLOADED', message: 'the queue is full' })
  })

  t.test('may report trouble of its own, with the job or without', async t => {
    const runner = queue()
    const log = capturedLog()
    const app = await build(t, { runner }, { logger: log.logger })
    const told: unknown[] = []
    app.openaiWebhook.onError(({ message }, info) => { told.push([message, info]) })
    await app.ready()
    const job = { webhookId: 'wh_1', timestamp: 1, endpoint: '/webhooks/openai', event: thin('batch.failed') }
    runner.host.report(new Error('lost the connection'))
    runner.host.report(new Error('gave up'), job)
    t.same(told, [
      ['lost the connection', {}],
      ['gave up', { endpoint: job.endpoint, webhookId: job.webhookId, event: job.event }]
    ])
    t.match(log.errors().map(({ err, webhookId, eventType }) => [err!.message, webhookId, eventType]), [
      ['lost the connection', undefined, undefined],
      ['gave up', 'wh_1', 'batch.failed']
    ])
  })

  t.test('that cannot start keeps the app from starting', async t => {
    const app = await build(t, { runner: { run () {}, start: async () => { throw new Error('no queue') } } })
    t.equal(await messageOf(() => app.ready()), 'no queue')
  })

  t.test('with no event handler on a route that replies itself is not given a job', async t => {
    const runner = queue()
    const app = await build(t, { runner })
    app.openaiWebhook.route({ url: '/own', handler: async () => 'own' })
    t.equal((await post(app, sign(thin('batch.failed')), '/own')).body, 'own')
    t.same(runner.jobs, [])
  })
})
