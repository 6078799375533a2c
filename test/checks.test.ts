import t from 'tap'
import { webhookTracing } from '../lib/otel.ts'
import { background, memoryStore } from '../lib/index.ts'
import { RunnerDeadLetters } from '../lib/dead-letters.ts'
import { webhookMetrics } from '../lib/metrics.ts'
import { migration, postgresInbox, postgresStore } from '../lib/postgres/index.ts'
import { batchResults, reconcile, retrieve } from '../lib/resources/index.ts'
import { bullmq } from '../lib/runners/bullmq.ts'
import { pgboss } from '../lib/runners/pgboss.ts'
import { durable, sqliteInbox } from '../lib/sqlite/index.ts'
import { redisStore } from '../lib/stores/redis.ts'
import { build } from './support/deliveries.ts'

t.test('an option that nobody would read is refused, wherever options are taken', async t => {
  const none = undefined as never
  const app = await build(t)
  const deadLetters = new RunnerDeadLetters({ dead: () => [], requeue: () => true } as never)
  const takers: Array<[name: string, known: string, take: (options: never) => unknown]> = [
    ['background', 'maxQueue', background],
    ['durable', 'attempts', options => durable(none, options)],
    ['bullmq', 'queueName', bullmq],
    ['pgboss', 'heartbeatSeconds', pgboss],
    ['pgboss: worker', 'batchSize', worker => pgboss({ boss: none, worker })],
    ['bullmq: worker', 'concurrency', worker => bullmq({ connection: {}, worker })],
    ['memoryStore', 'max', memoryStore],
    ['redisStore', 'prefix', options => redisStore(none, options)],
    ['postgresStore', 'table', options => postgresStore(none, options)],
    ['sqliteInbox', 'retention', options => sqliteInbox(none, options)],
    ['postgresInbox', 'lockTimeout', options => postgresInbox(none, options)],
    ['migration', 'tables', migration],
    ['migration', 'inbox', tables => migration({ tables })],
    ['webhookMetrics()', 'eventTypes', webhookMetrics],
    ['webhookTracing', 'tracerProvider', webhookTracing],
    ['reconcile()', 'dryRun', options => reconcile(none, options)],
    ['retrieve()', 'signal', options => retrieve(none, none, options)],
    ['batchResults()', 'idleTimeout', options => batchResults(none, none, options).next()],
    ['deadLetters.list()', 'limit', async options => await deadLetters.list(options)],
    ['deadLetters.requeue()', 'force', async options => await deadLetters.requeue(none, options)],
    ['on()', 'name', options => app.openaiWebhook.on('batch.failed', () => {}, options)],
    ['onAny()', 'name', options => app.openaiWebhook.onAny(() => {}, options)]
  ]
  const misspelt = (name: string): string => `${name.slice(0, 1)}${name}`
  for (const [caller, known, take] of takers) {
    const taking = (options: unknown) => async (): Promise<unknown> => await take(options as never)
    await t.rejects(taking({ [misspelt(known)]: 1 }), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: `${caller}: unknown option "${misspelt(known)}", did you mean "${known}"?` })
    await t.rejects(taking({ somethingElse: 1 }), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: new RegExp(`unknown option "somethingElse": expected .*\\b${known}\\b`) })
    for (const [value, got] of [[null, 'null'], ['text', 'a value of type string']]) {
      await t.rejects(taking(value), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: `${caller}: expected ${caller.endsWith('worker') ? 'worker to be true, false or' : 'options to be'} an object, got ${got}`.replace(/: worker: /, ': ') }, caller)
    }
  }
})

t.test('pgboss has no more attempts than it can tell from its own looks', async t => {
  t.throws(() => pgboss({ boss: { previewRedrive () {}, work () {} } as never, attempts: 1_001 }), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: 'pgboss: expected attempts to be at most 1000, got 1001' })
})

t.test('an unknown option without a value is none', async t => {
  t.ok(memoryStore({ maximum: undefined } as never))
})
