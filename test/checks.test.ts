import t from 'tap'
import { webhookTracing } from '../lib/otel.ts'
import { background, inline, memoryStore, standardWebhooks, xOpenAISignature } from '../lib/index.ts'
import { deadLettersOf } from '../lib/dead-letters.ts'
import { webhookMetrics } from '../lib/metrics.ts'
import { migration, postgresInbox, postgresStore } from '../lib/postgres/index.ts'
import { batchResults, reconcile, retrieve } from '../lib/resources/index.ts'
import { bullmq } from '../lib/runners/bullmq.ts'
import { pgboss } from '../lib/runners/pgboss.ts'
import { durable, sqliteInbox, sqliteStore } from '../lib/sqlite/index.ts'
import { redisStore } from '../lib/stores/redis.ts'
import { deliver, forge, sign } from '../lib/testing/index.ts'
import { build } from './support/deliveries.ts'

t.test('an option that nobody would read is refused, wherever options are taken', async t => {
  const none = undefined as never
  const app = await build(t)
  const deadLetters = deadLettersOf({ dead: () => [], requeue: () => true } as never)
  const takers: Array<[name: string, known: string, take: (options: never) => unknown]> = [
    ['background', 'maxQueue', background],
    ['durable', 'attempts', options => durable(none, options)],
    ['bullmq', 'queueName', bullmq],
    ['pgboss', 'heartbeatSeconds', pgboss],
    ['pgboss: worker.', 'batchSize', worker => pgboss({ boss: none, worker })],
    ['bullmq: worker.', 'concurrency', worker => bullmq({ connection: {}, worker })],
    ['memoryStore', 'max', memoryStore],
    ['redisStore', 'prefix', options => redisStore(none, options)],
    ['postgresStore', 'table', options => postgresStore(none, options)],
    ['sqliteInbox', 'retention', options => sqliteInbox(none, options)],
    ['postgresInbox', 'lockTimeout', options => postgresInbox(none, options)],
    ['migration', 'tables', migration],
    ['migration: tables', 'inbox', tables => migration({ tables })],
    ['webhookMetrics()', 'eventTypes', webhookMetrics],
    ['webhookTracing', 'tracerProvider', webhookTracing],
    ['reconcile()', 'dryRun', options => reconcile(none, options)],
    ['retrieve()', 'signal', options => retrieve(none, none, options)],
    ['batchResults()', 'idleTimeout', options => batchResults(none, none, options).next()],
    ['deadLetters.list()', 'limit', async options => await deadLetters.list(options)],
    ['deadLetters.requeue()', 'force', async options => await deadLetters.requeue(none, options)],
    ['sign', 'webhookId', options => sign('', options)],
    ['deliver', 'webhookId', async options => await deliver(app, {}, options)],
    ['forge', 'webhookId', async options => await forge(app, 'stale', options)],
    ['on()', 'name', options => app.openaiWebhook.on('batch.failed', () => {}, options)],
    ['onAny()', 'name', options => app.openaiWebhook.onAny(() => {}, options)]
  ]
  const misspelt = (name: string): string => `${name.slice(0, 1)}${name}`
  for (const [at, known, take] of takers) {
    const [, caller, outer] = /^(.+?)(?:: (worker\.))?$/.exec(at)!
    const unknown = (name: string): string => `${caller}: unknown option "${outer ?? ''}${name}"`
    const taking = (options: unknown) => async (): Promise<unknown> => await take(options as never)
    await t.rejects(taking({ [misspelt(known)]: 1 }), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: `${unknown(misspelt(known))}, did you mean "${known}"?` })
    await t.rejects(taking({ somethingElse: 1 }), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: new RegExp(`^${unknown('somethingElse').replaceAll(/[.()]/g, '\\$&')}: expected .*\\b${known}\\b`) })
    for (const [value, got] of [[null, 'null'], ['text', '"text"']]) {
      await t.rejects(taking(value), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: `${caller}: expected ${outer === undefined ? 'options to be' : 'worker to be true, false or'} an object, got ${got}` }, at)
    }
  }
})

t.test('pgboss has no more attempts than it can tell from its own looks', async t => {
  t.throws(() => pgboss({ boss: { previewRedrive () {}, work () {} } as never, attempts: 1_001 }), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: 'pgboss: expected attempts to be a whole number of attempts, 1 to 1000, got 1001' })
})

t.test('an unknown option without a value is none', async t => {
  t.ok(memoryStore({ maximum: undefined } as never))
})

t.test('an option of the wrong kind is refused where it is given, and not when a delivery needs it', async t => {
  const boss = { previewRedrive () {}, work () {} }
  const pool = { connect () {}, query () {} } as never
  const none = undefined as never
  const takers: Array<[name: string, take: (options: never) => unknown, wrong: Record<string, unknown[]>]> = [
    ['bullmq', (options: object) => bullmq({ connection: {}, ...options }), {
      queueName: ['', 'a:b', 5, null],
      attempts: [0, 1.5, '3', null],
      backoff: [-1, Number.NaN, 'x', null, [], {}, { type: 'nope' }, { type: 'fixed', delay: '5' }],
      removeOnComplete: ['x', true, 5, null],
      removeOnFail: ['x', false, 5, null],
      'removeOnComplete.age': ['x', -1, null],
      'removeOnComplete.limit': [0],
      'removeOnFail.count': [1.5, '5'],
      worker: ['x', 0, null],
      'worker.concurrency': [0, 'x'],
      'worker.lockDuration': [0, 'x'],
      'worker.stalledInterval': [0, 'x']
    }],
    ['pgboss', (options: object) => pgboss({ boss: boss as never, ...options }), {
      queueName: ['', 'a b', 5, null],
      attempts: [0, '3'],
      backoff: [-1, 'x'],
      worker: ['x', 0, null],
      'worker.concurrency': [0, 'x'],
      'worker.pollingIntervalSeconds': ['300', true, 10n, Infinity, NaN, Symbol('s'), 0.4, null]
    }],
    ['durable', options => durable(none, options), { lease: [0, 7_000_000_000] }],
    ['migration', options => migration(options), { 'tables.store': [5, '', null], 'tables.inbox': [true] }],
    ['postgresStore', (options: object) => postgresStore(pool, options), { migrate: ['false', 0, 1, null], table: ['', 5, null] }],
    ['postgresInbox', (options: object) => postgresInbox(pool, options), { migrate: ['false', 0, 1, null], table: ['', 5, null], retention: [0, 'x'], concurrency: [0, '8'] }],
    ['reconcile()', async (options: object) => await reconcile({} as never, { url: 'http://127.0.0.1', secret: 'secret', since: '3d', ...options }), {
      secret: [['a'], 5, null],
      types: ['batch.*', 5, [5], null],
      evals: ['eval_1', 5, [5], null],
      dryRun: ['false', 1, null],
      timeout: [0, '5', 2 ** 31],
      signal: [5, {}, null],
      onProgress: [5, {}, null]
    }],
    ['retrieve()', async (options: object) => await retrieve({} as never, { type: 'batch.failed', data: { id: 'batch_1' } } as never, options), { signal: [5, {}, null] }],
    ['batchResults()', async (options: object) => await batchResults({} as never, {} as never, options).next(), { signal: [5, {}, null], idleTimeout: [0, '5', 2 ** 31], lineLimit: [0, '5'] }],
    ['', async (options: { runner: object }) => await build(t, { ...options, runner: { run () {}, ...options.runner } } as never), {
      'runner.start': [5, {}, null], 'runner.close': ['x'], 'runner.depth': [5], 'runner.dead': [5], 'runner.deadCount': [{}], 'runner.requeue': [true]
    }]
  ]
  for (const [caller, take, options] of takers) {
    for (const [name, values] of Object.entries(options)) {
      const [outer, inner] = name.split('.')
      for (const value of values) {
        const given = inner === undefined ? { [outer!]: value } : { [outer!]: { [inner]: value } }
        await t.rejects(async () => await take(given as never), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: new RegExp(`${caller.replace('()', '\\(\\)')}.*expected ${name}`) }, `${caller} ${name} ${String(value)}`)
      }
    }
  }
})

t.test('a function that has no options takes none', async t => {
  for (const make of [standardWebhooks, xOpenAISignature, inline] as Array<(...given: unknown[]) => unknown>) {
    for (const given of [{ tolerance: 600 }, undefined, 5]) {
      t.throws(() => make(given), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: new RegExp(`^${make.name}\\(\\): expected no options, got `) })
    }
    t.ok(make())
  }
})

t.test('a store takes no option that it does not have', async t => {
  t.throws(() => (sqliteStore as (...given: unknown[]) => unknown)(undefined, { table: 'x' }), {
    code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: /^sqliteStore\(\): expected no options, got a value of type object: /
  })
})

t.test('a misspelt retention of BullMQ\'s jobs is refused', async t => {
  t.throws(() => bullmq({ connection: {}, removeOnFail: { ag: 1 } as never }), {
    code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: 'bullmq: unknown option "removeOnFail.ag", did you mean "age"?'
  })
})

t.test('what BullMQ and pg-boss take, they are given', async t => {
  for (const options of [{ backoff: 0 }, { backoff: { type: 'fixed' } }, { backoff: { type: 'exponential', delay: 5, jitter: 0.5 } }, { removeOnComplete: { count: 5 }, removeOnFail: { age: 5, count: 0, limit: 1 } }, { worker: { lockDuration: 1, stalledInterval: undefined } }]) {
    t.ok(bullmq({ connection: {}, ...options } as never), JSON.stringify(options))
  }
  t.ok(pgboss({ boss: { previewRedrive () {}, work () {} } as never, queueName: 'a/b.c-d_e', worker: { pollingIntervalSeconds: 0.5 } }))
})
