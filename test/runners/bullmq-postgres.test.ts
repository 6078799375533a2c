import { join } from 'node:path'
import { Queue, createPostgresBackend } from 'bullmq'
import t from 'tap'
import type { DeadDelivery } from '../../lib/index.ts'
import { bullmq } from '../../lib/runners/bullmq.ts'
import type { BullMQOptions } from '../../lib/runners/bullmq.ts'
import { storableError } from '../../lib/runners/storable.ts'
import { runnerContract } from '../../lib/testing/index.ts'
import { build, sign, thin } from '../support/deliveries.ts'
import { Member, UNAVAILABLE, answer, batchFailed, deliverUntil200, effectsIn, until } from '../support/faults.ts'
import { deferred, listen, redelivered } from '../support/observe.ts'
import { PostgresServer, postgresMissing } from '../support/postgres.ts'
import { long } from '../support/size.ts'

// The queue of bullmq() in PostgreSQL.

const ENDPOINT = '/webhooks/openai'
let server: PostgresServer

t.before(async () => {
  if (postgresMissing === false) server = await PostgresServer.start(t, '-c', 'max_connections=300')
})

const inPostgres = ({ url = server.url, migrate = true } = {}): Pick<BullMQOptions, 'connection' | 'backend'> =>
  ({ connection: { connectionString: url, migrate, max: 4 }, backend: createPostgresBackend })

long(t, 'contract', { skip: postgresMissing }, async t => {
  let queues = 0
  const fresh = () => bullmq({ ...inPostgres(), queueName: `contract-${++queues}`, backoff: 5, attempts: 2, removeOnFail: { count: 100 } })
  for (const { name, run } of runnerContract(fresh, { attempts: 2 })) await t.test(name, run)
})

t.test('without its tables the app does not start, and says why', { skip: postgresMissing }, async t => {
  const own = await PostgresServer.start(t)
  const app = await build(t, { runner: bullmq(inPostgres({ url: own.url, migrate: false })) })
  await t.rejects(async () => await app.ready(), { message: /migrate: true/ })
})

long(t, 'PostgreSQL stops: 503, nothing acknowledged is lost, and all goes on when it is back', { skip: postgresMissing }, async t => {
  const own = await PostgresServer.start(t, '-c', 'fsync=on')
  const app = await build(t, { runner: bullmq({ ...inPostgres(own), backoff: 1 }), deadline: 1_000 })
  const ran: string[] = []
  const finish = deferred()
  app.openaiWebhook.on('batch.failed', async (_event, { webhookId }) => {
    ran.push(webhookId)
    if (webhookId === 'wh_before') await finish.promise
  })
  await listen(app)
  t.equal(await answer(app, batchFailed('wh_before')), '200')
  await until('it to be started', () => ran.length === 1)
  await own.stop()
  const delivery = batchFailed('wh_during')
  t.equal(await answer(app, delivery), UNAVAILABLE)
  await own.start()
  finish.resolve()
  await deliverUntil200(app, redelivered(delivery))
  await until('it to run', () => ran.includes('wh_during'))
  t.equal(await answer(app, redelivered(delivery)), '200 duplicate')
})

long(t, 'a worker that is killed while it runs a job: another one takes it over', { skip: postgresMissing }, async t => {
  const effects = join(t.testdir(), 'effects')
  const receiving = await build(t, { runner: bullmq({ ...inPostgres(), worker: false }) })
  await listen(receiving)
  const options = { effects, runner: 'bullmq', postgresUrl: server.url, path: false, worker: { lockDuration: 500, stalledInterval: 250 } } as const
  const killed = await Member.start(t, { ...options, hangs: true })
  t.equal(await answer(receiving, batchFailed('wh_taken_over')), '200')
  await until('the job to be started', () => effectsIn(effects).length === 1)
  await killed.kill()
  const other = await Member.start(t, options)
  const queue = new Queue('openai-webhook', inPostgres() as never, createPostgresBackend as never)
  t.teardown(async () => await queue.close())
  await until('the job to be done', async () => await queue.getCompletedCount() === 1)
  t.same(effectsIn(effects), [{ webhookId: 'wh_taken_over', pid: killed.pid }, { webhookId: 'wh_taken_over', pid: other.pid }])
  await other.close()
})

t.test('an error whose text PostgreSQL takes is left as it is', t => {
  const error = Object.assign(new Error('é 😀'), { stack: undefined }) as Error
  t.equal(storableError(error), error)
  t.match(storableError(Object.assign(new Error('a\u0000b'), { stack: 'Error: a\ud800' })), { message: 'a\ufffdb', stack: 'Error: a\ufffd' })
  t.end()
})

t.test('what jsonb and text refuse is kept, in an event and in an error', { skip: postgresMissing }, async t => {
  const odd = 'a\u0000b\ud800 é'
  const app = await build(t, { runner: bullmq({ ...inPostgres(), queueName: 'odd', attempts: 2, backoff: 1 }) })
  const seen: unknown[] = []
  const died: DeadDelivery[] = []
  app.openaiWebhook.onDead(delivery => { died.push(delivery) })
  app.openaiWebhook.onAny(event => {
    seen.push(event)
    throw new Error(odd)
  })
  await listen(app)
  const event = thin('batch.failed', { id: 'batch_1', note: odd })
  t.equal(await answer(app, sign(event, { webhookId: 'wh_odd' })), '200')
  await until('it to be dead', () => died.length === 1)
  t.same(seen, [event, event])
  const { deadLetters } = app.openaiWebhook
  t.match(await deadLetters.list({ type: 'batch.failed' }), [{ webhookId: 'wh_odd', endpoint: ENDPOINT, event, attempts: 2, errors: [{ message: odd }] }])
  t.same(died, await deadLetters.list())
})
