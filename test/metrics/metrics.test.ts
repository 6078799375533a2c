import { join } from 'node:path'
import swagger from '@fastify/swagger'
import { Type } from '@sinclair/typebox'
import Fastify from 'fastify'
import type { FastifyInstance } from 'fastify'
import Database from 'libsql'
import promClient, { Counter, Registry, register as globalRegister } from 'prom-client'
import t from 'tap'
import openaiWebhook, { background, channels, memoryStore } from '../../lib/index.ts'
import type { IdempotencyStore, OpenAIWebhookOptions, Runner, Verifier } from '../../lib/index.ts'
import { webhookMetrics } from '../../lib/metrics.ts'
import type { MetricsRegistry, WebhookMetrics, WebhookMetricsOptions } from '../../lib/metrics.ts'
import { bullmq } from '../../lib/runners/bullmq.ts'
import { durable } from '../../lib/sqlite/index.ts'
import { SECRET, build, post, sign, stoppedClock, thin } from '../support/deliveries.ts'
import type { Signed } from '../support/deliveries.ts'
import { codeOf, deferred, messageOf, redelivered } from '../support/observe.ts'
import { runProgram } from '../support/program.mjs'
import { RedisServer, redisMissing } from '../support/redis.ts'

type Teardown = { teardown: (fn: () => unknown) => void }

const OLD_SECRET = `whsec_${Buffer.alloc(32, 'old').toString('base64')}`
const OF_QUEUES: readonly string[] = ['webhook_queue_depth', 'webhook_dead_deliveries']
const NAMES: readonly string[] = [
  'webhook_events_total', 'webhook_duplicates_total', 'webhook_unhandled_total', 'webhook_processing_duration_seconds', 'webhook_delivery_age_seconds',
  'webhook_event_age_seconds', 'webhook_handler_failures_total', 'webhook_deliveries_in_flight', 'webhook_refusals_total', 'webhook_secret_matches_total',
  'webhook_trouble_total', 'webhook_dead_total', ...OF_QUEUES
]

/** Metrics in a registry of their own, until the test ends. */
function observe (t: Teardown, options: Omit<WebhookMetricsOptions, 'register'> = {}, register: MetricsRegistry = new Registry()): { register: MetricsRegistry, metrics: WebhookMetrics } {
  const metrics = webhookMetrics({ register, ...options })
  t.teardown(() => metrics.close())
  return { register, metrics }
}

/** The samples of a scrape by `name{labels}`; those that begin with `prefix`. */
async function scrape (register: { metrics (): Promise<string> }, prefix = ''): Promise<Record<string, number>> {
  return parse(await register.metrics(), prefix)
}

function parse (text: string, prefix = ''): Record<string, number> {
  return Object.fromEntries(text.split('\n')
    .filter(line => line !== '' && !line.startsWith('#') && line.startsWith(prefix))
    .map(line => [line.slice(0, line.lastIndexOf(' ')), Number(line.slice(line.lastIndexOf(' ') + 1))]))
}

/** Those that are not zero: the zeros that are told from the start are checked for themselves. */
async function counted (register: { metrics (): Promise<string> }, prefix: string): Promise<Record<string, number>> {
  return Object.fromEntries(Object.entries(await scrape(register, prefix)).filter(([, value]) => value !== 0))
}

async function until (holds: () => Promise<boolean>): Promise<void> {
  while (!await holds()) await new Promise(resolve => setImmediate(resolve))
}

const sum = (samples: Record<string, number>): number => Object.values(samples).reduce((total, value) => total + value, 0)

const delivery = (type = 'batch.failed', webhookId?: string): Signed => sign(thin(type), webhookId === undefined ? {} : { webhookId })
const events = (type: string, status: string): string => `webhook_events_total{event_type="${type}",status="${status}"}`
const busyStore = (): IdempotencyStore => ({ ...memoryStore(), begin: () => ({ state: 'running' }) })
const brokenStore = (): IdempotencyStore => ({ ...memoryStore(), begin () { throw new Error('the store is down') } })

t.test('each delivery that is verified has one status, in the request', async t => {
  const { register } = observe(t)
  const app = await build(t)
  const broken = await build(t, { idempotency: { store: brokenStore() } })
  const elsewhere = await build(t, { idempotency: { store: busyStore() } })
  app.openaiWebhook.on('batch.failed', () => {}).on('batch.expired', () => { throw new Error('the handler failed') })
  app.openaiWebhook.on('batch.cancelled', async () => {})
  const first = delivery()
  await post(app, first)
  await post(app, redelivered(first))
  const failing = delivery('batch.expired')
  await post(app, failing)
  await post(app, redelivered(failing))
  await post(app, delivery('batch.cancelled'))
  await post(broken, delivery())
  await post(elsewhere, delivery())
  await post(app, { ...delivery(), headers: {} })

  t.same(await counted(register, 'webhook_events_total'), {
    [events('batch.failed', 'processed')]: 1,
    [events('batch.failed', 'duplicate')]: 2,
    [events('batch.failed', 'refused')]: 1,
    [events('batch.expired', 'failed')]: 2,
    [events('batch.cancelled', 'processed')]: 1
  })
  t.equal(sum(await scrape(register, 'webhook_events_total')), sum(await scrape(register, 'webhook_secret_matches_total')))
  t.equal(sum(await scrape(register, 'webhook_secret_matches_total')), 7, 'all but the one without headers')
  t.equal((await scrape(register))[events('batch.cancelled', 'failed')], 0, 'told from zero, so that a first failure is an increase')
  t.notOk(events('batch.failed', 'queued') in await scrape(register), 'what does not occur is left out')
  t.same(await counted(register, 'webhook_duplicates_total'), { 'webhook_duplicates_total{state="processed"}': 1, 'webhook_duplicates_total{state="elsewhere"}': 1 })
})

t.test('a delivery that is joined is a duplicate, and what it joined is one', async t => {
  const { register } = observe(t)
  const app = await build(t)
  const [started, ended] = [deferred(), deferred()]
  app.openaiWebhook.on('batch.failed', async () => {
    started.resolve()
    await ended.promise
  })
  const first = delivery()
  const answers = [post(app, first)]
  await started.promise
  t.equal((await scrape(register))['webhook_deliveries_in_flight'], 1)
  answers.push(post(app, redelivered(first)))
  await until(async () => (await scrape(register))['webhook_duplicates_total{state="joined"}'] === 1)
  ended.resolve()
  t.same((await Promise.all(answers)).map(({ statusCode }) => statusCode), [200, 200])
  t.same(await counted(register, 'webhook_events_total'), { [events('batch.failed', 'processed')]: 1, [events('batch.failed', 'duplicate')]: 1 })
  t.equal((await scrape(register))['webhook_deliveries_in_flight'], 0)
})

t.test('with a queue each delivery is queued, duplicate or refused, and processed or failed at each attempt', async t => {
  const { register } = observe(t)
  const app = await build(t, { runner: durable(new Database(':memory:'), { backoff: 1 }) })
  let failures = 2
  const done = deferred()
  app.openaiWebhook.on('batch.failed', () => {
    if (failures-- > 0) throw new Error('the handler failed')
    done.resolve()
  })
  await app.listen({ port: 0, host: '127.0.0.1' }) // keeps the process waiting for the attempts
  const first = delivery()
  await post(app, first)
  await done.promise
  await post(app, redelivered(first))
  await app.close()

  const full = await build(t, { runner: background({ concurrency: 1, maxQueue: 0 }) })
  const held = deferred()
  full.openaiWebhook.on('batch.failed', async () => { await held.promise })
  await post(full, delivery())
  t.equal((await post(full, delivery())).statusCode, 503)
  held.resolve()
  await full.close()

  t.same(await counted(register, 'webhook_events_total'), {
    [events('batch.failed', 'queued')]: 2,
    [events('batch.failed', 'refused')]: 1,
    [events('batch.failed', 'duplicate')]: 1,
    [events('batch.failed', 'failed')]: 2,
    [events('batch.failed', 'processed')]: 2
  })
  t.equal((await scrape(register))['webhook_processing_duration_seconds_count{event_type="batch.failed"}'], 4, 'one for each attempt')
  t.equal((await scrape(register))['webhook_trouble_total'], 0, 'a handler that fails is none')
})

t.test('a type that is not known is `other`, however many there are', async t => {
  const { register } = observe(t, { eventTypes: ['acme.invoice.paid'] })
  const app = await build(t, { events: { 'acme.invoice.paid': Type.Object({ type: Type.String() }) } })
  app.openaiWebhook.onAny(() => { throw new Error('the handler failed') }, { name: 'any' })
  const types = ['batch.failed', 'batch.created', 'acme.invoice.paid', '__proto__', ...Array.from({ length: 100 }, (_, nth) => `made.up.${nth}`)]
  for (const type of types) await post(app, delivery(type))
  const perType = (name: string, labels = ''): Record<string, number> => ({
    [`${name}{event_type="batch.failed"${labels}}`]: 1,
    [`${name}{event_type="batch.created"${labels}}`]: 1, // of the guide
    [`${name}{event_type="acme.invoice.paid"${labels}}`]: 1,
    [`${name}{event_type="other"${labels}}`]: 101
  })
  t.same(await counted(register, 'webhook_events_total'), perType('webhook_events_total', ',status="failed"'))
  t.same(await scrape(register, 'webhook_unhandled_total'), perType('webhook_unhandled_total'))
  t.same(await scrape(register, 'webhook_handler_failures_total'), perType('webhook_handler_failures_total', ',handler="any"'))
  t.same(await scrape(register, 'webhook_processing_duration_seconds_count'), perType('webhook_processing_duration_seconds_count'))
})

t.test('a refusal is counted by its code, from zero; a code of somebody else\'s is `other`', async t => {
  const { register } = observe(t)
  const verifier: Verifier = ({ headers }) => { throw Object.assign(new Error('no'), { code: headers['x-code'], statusCode: 401 }) }
  const app = await build(t)
  app.addHook('onRequest', async (request, reply) => { if (request.headers['x-hook'] !== undefined) return await reply.code(403).send() })
  app.post('/marked', { config: { openaiWebhook: { verifier } } }, () => {})
  const zeros = await scrape(register, 'webhook_refusals_total')
  t.equal(Object.keys(zeros).length, 15)
  t.equal(sum(zeros), 0)

  const signed = delivery()
  const withHeaders = (headers: Record<string, string>): Signed => ({ ...signed, headers: { ...signed.headers, ...headers } })
  await post(app, withHeaders({ 'webhook-id': '' }))
  await post(app, withHeaders({ 'webhook-signature': 'v1,Zm9yZ2Vk' }))
  await post(app, withHeaders({ 'webhook-signature': 'v1,Zm9yZ2Vk' }))
  await post(app, withHeaders({ 'content-type': 'text/plain' }))
  await post(app, sign({ type: 'batch.failed' }))
  for (const code of ['ACME_1', 'ACME_2', 'FST_ERR_CTP_ACME']) await post(app, withHeaders({ 'x-code': code }), '/marked')
  await post(app, withHeaders({ 'x-hook': '403' }))
  const refusal = (code: string): string => `webhook_refusals_total{code="${code}"}`
  t.same(await counted(register, 'webhook_refusals_total'), {
    [refusal('FST_OPENAI_WEBHOOK_MISSING_HEADER')]: 1,
    [refusal('FST_OPENAI_WEBHOOK_INVALID_SIGNATURE')]: 2,
    [refusal('FST_ERR_CTP_INVALID_MEDIA_TYPE')]: 1,
    [refusal('FST_OPENAI_WEBHOOK_INVALID_EVENT')]: 1,
    [refusal('ANSWERED_BY_A_HOOK')]: 1,
    [refusal('other')]: 3
  })
  t.same(await scrape(register, 'webhook_events_total'), {}, 'of none of them is it known what they were')
})

t.test('the secret that matched is counted by its index, and never said', async t => {
  const { register } = observe(t)
  let keyIndex: number | undefined
  const verifier: Verifier = ({ headers }) => ({
    webhookId: String(headers['webhook-id']), timestamp: Number(headers['webhook-timestamp']), ...(keyIndex !== undefined && { keyIndex })
  })
  const app = await build(t, { secret: [SECRET, OLD_SECRET] })
  app.openaiWebhook.route({ url: '/second', verifier })
  for (const secret of [SECRET, OLD_SECRET, OLD_SECRET]) await post(app, sign(thin('batch.failed'), { secret }))
  for (keyIndex of [undefined, 3, 1_732_000_000, -1, 0.5]) await post(app, delivery(), '/second')
  const match = (endpoint: string, index: string): string => `webhook_secret_matches_total{endpoint="${endpoint}",secret_index="${index}"}`
  t.same(await scrape(register, 'webhook_secret_matches_total'), {
    [match('/webhooks/openai', '0')]: 1,
    [match('/webhooks/openai', '1')]: 2,
    [match('/second', 'unknown')]: 1,
    [match('/second', '3')]: 1,
    [match('/second', 'other')]: 3
  })
  await post(app, sign(thin('batch.failed'), { secret: OLD_SECRET }))
  t.equal((await scrape(register))[match('/webhooks/openai', '1')], 3, 'counts go on from scrape to scrape')
  const text = await register.metrics()
  for (const secret of [SECRET, OLD_SECRET]) t.notOk(text.includes(secret.slice('whsec_'.length)))
})

t.test('ages are those at the start of the handlers, and of `created_at` only where it is a time', async t => {
  const { register } = observe(t)
  const schema = Type.Object({ type: Type.String() })
  const app = await build(t, { events: { 'batch.failed': schema } })
  await app.ready()
  const clock = stoppedClock(t, 1_800_000_000_000)
  const now = 1_800_000_000
  const send = async (createdAt: unknown, signedAt = now): Promise<void> => {
    t.equal((await post(app, sign({ type: 'batch.failed', created_at: createdAt }, { timestamp: signedAt }))).statusCode, 200)
  }
  const ages = async (name: string): Promise<unknown> => {
    const samples = await scrape(register, name)
    return { count: samples[`${name}_count`], sum: samples[`${name}_sum`] }
  }
  await send(now - 7, now - 4)
  t.same(await ages('webhook_event_age_seconds'), { count: 1, sum: 7 })
  t.same(await ages('webhook_delivery_age_seconds'), { count: 1, sum: 4 })
  t.equal((await scrape(register))['webhook_event_age_seconds_bucket{le="5"}'], 0)
  t.equal((await scrape(register))['webhook_event_age_seconds_bucket{le="10"}'], 1)

  await send(now + 200, now + 200)
  t.same(await ages('webhook_event_age_seconds'), { count: 2, sum: 7 }, 'a clock that is ahead makes it 0')
  t.same(await ages('webhook_delivery_age_seconds'), { count: 2, sum: 4 })

  for (const nonsense of [undefined, null, '1800000000', now * 1_000, now + 301, 0, -1, {}, [now]]) await send(nonsense)
  t.same(await ages('webhook_event_age_seconds'), { count: 2, sum: 7 })
  t.equal((await ages('webhook_delivery_age_seconds') as { count: number }).count, 11)
  clock.advance(500)
})

t.test('a delivery that waits in a queue grows older; one whose timestamp was lost there has no age', async t => {
  const { register } = observe(t)
  const app = await build(t, { runner: background({ concurrency: 1 }) })
  const [started, held] = [deferred(), deferred()]
  app.openaiWebhook.on('batch.failed', async () => {
    started.resolve()
    await held.promise
  })
  const jobs: Runner = {
    run () {},
    start: async host => await host.process({ webhookId: 'wh_1', timestamp: NaN, endpoint: '/queue', event: { type: 'batch.failed' } })
  }
  const queue = await build(t, { runner: jobs })
  await app.ready()
  const clock = stoppedClock(t, 1_800_000_000_000)
  await post(app, delivery())
  await started.promise
  await post(app, delivery())
  clock.advance(100_000)
  held.resolve()
  await app.close()
  const samples = await scrape(register, 'webhook_delivery_age_seconds')
  t.equal(samples['webhook_delivery_age_seconds_count'], 2)
  t.equal(samples['webhook_delivery_age_seconds_sum'], 100)

  await queue.ready()
  t.equal((await scrape(register))['webhook_processing_duration_seconds_count{event_type="batch.failed"}'], 3)
  t.equal((await scrape(register))['webhook_delivery_age_seconds_count'], 2)
})

t.test('durations are of the handlers, in buckets of the user\'s', async t => {
  const { register } = observe(t, { buckets: [0.01, 60] })
  const app = await build(t)
  app.openaiWebhook.on('batch.failed', async () => { await new Promise(resolve => setTimeout(resolve, 20)) })
  await post(app, delivery())
  const samples = await scrape(register, 'webhook_processing_duration_seconds')
  t.same(Object.entries(samples).filter(([name]) => name.includes('bucket')), [
    ['webhook_processing_duration_seconds_bucket{le="0.01",event_type="batch.failed"}', 0],
    ['webhook_processing_duration_seconds_bucket{le="60",event_type="batch.failed"}', 1],
    ['webhook_processing_duration_seconds_bucket{le="+Inf",event_type="batch.failed"}', 1]
  ])
})

t.test('a handler that fails is counted by its name, and the route\'s own as `handler`', async t => {
  const { register } = observe(t)
  const app = await build(t)
  const fail = (): never => { throw new Error('the handler failed') }
  app.openaiWebhook.on('batch.failed', fail, { name: 'import' }).on('batch.failed', async () => fail()).on('batch.failed', () => {})
  app.post('/marked', { config: { openaiWebhook: { on: { 'batch.expired': fail } } } }, fail)
  await post(app, delivery())
  await post(app, delivery('batch.expired'), '/marked')
  await post(app, delivery('batch.completed'), '/marked')
  const failure = (type: string, handler: string): string => `webhook_handler_failures_total{event_type="${type}",handler="${handler}"}`
  t.same(await scrape(register, 'webhook_handler_failures_total'), {
    [failure('batch.failed', 'import')]: 1,
    [failure('batch.failed', '#1')]: 1,
    [failure('batch.expired', 'route#0')]: 1,
    [failure('batch.completed', 'handler')]: 1
  })
})

t.test('metrics that come while a delivery is running leave it out', async t => {
  const app = await build(t)
  const [started, ended] = [deferred(), deferred()]
  app.openaiWebhook.on('batch.failed', async () => {
    started.resolve()
    await ended.promise
  })
  // Without a subscriber from its start a delivery is not traced at all.
  observe(t)
  const answer = post(app, delivery())
  await started.promise
  const { register } = observe(t)
  ended.resolve()
  await answer
  t.equal((await scrape(register))['webhook_deliveries_in_flight'], 0)
  t.same(await scrape(register, 'webhook_events_total'), {})
})

t.test('the depth of the queues of this process', async t => {
  const { register } = observe(t)
  const depth = async (): Promise<number | undefined> => (await scrape(register))['webhook_queue_depth']
  t.equal(await depth(), 0, 'without a queue')
  t.equal(await bullmq({ connection: {} }).depth!(), 0, 'before its app is ready')

  const [started, held] = [deferred(), deferred()]
  const inMemory = await build(t, { runner: background({ concurrency: 1 }) })
  inMemory.openaiWebhook.on('batch.failed', async () => {
    started.resolve()
    await held.promise
  })
  const inFile = await build(t, { runner: { ...durable(new Database(':memory:')), start () {} } })
  for (let count = 0; count < 3; count++) await post(inMemory, delivery())
  for (let count = 0; count < 4; count++) await post(inFile, delivery())
  await started.promise
  t.equal(await depth(), 2 + 4, 'of all apps together; what runs does not wait')
  held.resolve()
  await inMemory.close()
  t.equal(await depth(), 4)
})

t.test('a queue that cannot tell its depth is left out, and fails no scrape', async t => {
  const { register } = observe(t)
  let answer: () => number | Promise<number> = () => 3
  const app = await build(t, { runner: { run () {}, depth: () => answer() } })
  await app.ready()
  const depth = async (): Promise<number | undefined> => (await scrape(register))['webhook_queue_depth']
  t.equal(await depth(), 3)

  for (const [name, unable] of Object.entries({
    throws: () => { throw new Error('no connection') },
    rejects: async () => { throw new Error('no connection') },
    'is no number': () => undefined as unknown as number
  })) {
    answer = unable
    t.equal(await depth(), undefined, `${name}: no sample, rather than an old one`)
    t.equal((await scrape(register))['webhook_deliveries_in_flight'], 0, 'the others are there')
  }
  const other = await build(t, { runner: { run () {}, depth: () => 5 } })
  await other.ready()
  t.equal(await depth(), 5, 'others tell theirs')

  const late = deferred<number>()
  let questions = 0
  answer = async () => {
    questions++
    return await late.promise
  }
  const clock = stoppedClock(t)
  const scrapes = [depth(), depth()]
  await new Promise(resolve => setImmediate(resolve))
  clock.advance(1_000)
  t.same(await Promise.all(scrapes), [5, 5], 'after a second it is waited for no longer')
  t.equal(questions, 1, 'and not asked again before it has answered')
  late.resolve(7)
  await late.promise
  t.equal(await depth(), 12)
})

t.test('the depth of a BullMQ queue, and none while Redis is down', { skip: redisMissing }, async t => {
  const { register } = observe(t)
  const redis = await RedisServer.start(t)
  const app = await build(t, { runner: bullmq({ connection: { host: '127.0.0.1', port: redis.port }, worker: false }), closeTimeout: 100 })
  app.log.level = 'silent'
  for (let count = 0; count < 2; count++) await post(app, delivery())
  t.equal((await scrape(register))['webhook_queue_depth'], 2)
  await redis.stop()
  const startedAt = performance.now()
  t.equal((await scrape(register))['webhook_queue_depth'], undefined)
  t.ok(performance.now() - startedAt < 5_000, 'in time for a scrape')
})

t.test('several apps in one process add up, and several registries each have all', async t => {
  const first = observe(t)
  const second = observe(t)
  const apps = [await build(t), await build(t)]
  for (const app of apps) await post(app, delivery())
  for (const { register } of [first, second]) t.equal((await scrape(register))[events('batch.failed', 'processed')], 2)
  first.metrics.close()
  await post(apps[0]!, delivery())
  t.same(await scrape(first.register), {})
  t.equal((await scrape(second.register))[events('batch.failed', 'processed')], 3)
})

t.test('close() ends the subscriptions and leaves what is not ours', async t => {
  const register = new Registry()
  const own = new Counter({ name: 'acme_total', help: 'mine', registers: [register] })
  const metrics = webhookMetrics({ register })
  t.same(register.getMetricsAsArray().map(({ name }) => name), ['acme_total', ...NAMES])
  metrics.close()
  metrics.close()
  t.same(register.getMetricsAsArray(), [own])
  for (const [name, channel] of Object.entries(channels)) t.notOk(channel.hasSubscribers, name)

  const again = webhookMetrics({ register })
  register.clear()
  const third = webhookMetrics({ register })
  again.close()
  t.same(register.getMetricsAsArray().map(({ name }) => name), NAMES, 'those of the third')
  third.close()
})

t.test('a registry has them once', async t => {
  const register = new Registry()
  const metrics = webhookMetrics({ register })
  t.equal(await codeOf(() => webhookMetrics({ register })), 'INVALID_OPTIONS')
  t.match(await messageOf(() => webhookMetrics({ register })), /the registry has a metric "webhook_events_total" already\. One webhookMetrics\(\) observes every app of the process/)
  t.same(register.getMetricsAsArray().map(({ name }) => name), NAMES, 'those that were there are left alone')
  metrics.close()

  const taken = new Counter({ name: 'webhook_trouble_total', help: 'somebody else\'s', registers: [register] })
  t.match(await messageOf(() => webhookMetrics({ register })), /has a metric "webhook_trouble_total" already/)
  t.same(register.getMetricsAsArray(), [taken], 'nothing is left behind')
  for (const [name, channel] of Object.entries(channels)) t.notOk(channel.hasSubscribers, name)
})

t.test('prom-client itself stands for its global registry, and so does nothing', async t => {
  for (const options of [{ register: promClient }, { register: globalRegister }, {}, undefined]) {
    const metrics = webhookMetrics(options)
    t.same(globalRegister.getMetricsAsArray().map(({ name }) => name), NAMES)
    metrics.close()
    t.same(globalRegister.getMetricsAsArray(), [])
  }
})

t.test('a wrong option is told at once', async t => {
  const register = new Registry()
  for (const [options, message] of [
    [{ registry: register }, /unknown option "registry", did you mean "register"\?/],
    [{ path: '/metrics' }, /unknown option "path"/],
    [null, /expected options to be an object/],
    ['/metrics', /expected options to be an object/],
    [{ register: {} }, /expected register to be a Registry of prom-client's, or prom-client itself/],
    [{ register: null }, /expected register/],
    [{ register: 'global' }, /expected register/],
    [{ register, eventTypes: 'batch.failed' }, /expected eventTypes to be an array/],
    [{ register, eventTypes: [7] }, /expected eventTypes/],
    [{ register, eventTypes: [''] }, /expected eventTypes to be an array of event types, such as \["order\.paid"\], got one with ""$/],
    [{ register, eventTypes: ['order.paid', 'a.*'] }, /expected eventTypes .* got one with "a\.\*"$/],
    [{ register, buckets: [1, 1] }, /expected buckets to be an array of numbers of seconds in ascending order/],
    [{ register, buckets: [1, Infinity] }, /expected buckets/],
    [{ register, buckets: 5 }, /expected buckets/]
  ] as const) {
    t.equal(await codeOf(() => webhookMetrics(options as never)), 'INVALID_OPTIONS')
    t.match(await messageOf(() => webhookMetrics(options as never)), message)
  }
  t.same(register.getMetricsAsArray(), [])
})

t.test('the route', async t => {
  async function served (t: Teardown, options: Parameters<FastifyInstance['register']>[1] = {}, register?: MetricsRegistry): Promise<FastifyInstance> {
    const app = Fastify() as unknown as FastifyInstance
    t.teardown(() => app.close())
    await app.register(openaiWebhook, { secret: SECRET })
    await app.register(observe(t, {}, register).metrics, options)
    return app
  }

  await t.test('is there only where the plugin is registered', async t => {
    observe(t)
    const app = await build(t)
    t.equal((await app.inject('/metrics')).statusCode, 404)
  })

  await t.test('serves all of the registry, with its content type', async t => {
    const register = new Registry()
    new Counter({ name: 'acme_total', help: 'mine', registers: [register] }).inc()
    const app = await served(t, {}, register)
    await post(app, delivery())
    const { statusCode, headers, body } = await app.inject('/metrics')
    t.equal(statusCode, 200)
    t.equal(headers['content-type'], register.contentType)
    t.equal(body, await register.metrics())
    t.match(parse(body), { acme_total: 1, [events('batch.failed', 'processed')]: 1 })
  })

  await t.test('in the OpenMetrics format, where the registry has it', async t => {
    const register = new Registry()
    register.setContentType(Registry.OPENMETRICS_CONTENT_TYPE as never)
    const app = await served(t, {}, register)
    await post(app, delivery())
    const { headers, body } = await app.inject('/metrics')
    t.match(headers['content-type'], /^application\/openmetrics-text; version=1\.0\.0/)
    t.equal(parse(body)[events('batch.failed', 'processed')], 1)
    t.ok(body.endsWith('# EOF\n'))
  })

  await t.test('at a path and with a prefix of the user\'s', async t => {
    const app = await served(t, { path: '/internal', prefix: '/ops', logLevel: 'warn' })
    t.equal((await app.inject('/ops/internal')).statusCode, 200)
    t.equal((await app.inject('/metrics')).statusCode, 404)
  })

  await t.test('refuses options that it does not have', async t => {
    for (const [options, message] of [[{ url: '/m' }, /unknown option "url"/], [{ path: 'metrics' }, /expected path to begin with "\/"/], [{ path: 7 }, /expected path/]] as const) {
      t.match(await messageOf(async () => await served(t, options)), message)
    }
  })

  await t.test('is in no API document', async t => {
    const app = Fastify() as unknown as FastifyInstance
    t.teardown(() => app.close())
    await app.register(swagger)
    await app.register(observe(t).metrics)
    await app.ready()
    t.same(app.swagger().paths, {})
  })
})

t.test('the processes of a cluster add up in prom-client\'s AggregatorRegistry', async t => {
  const { stdout } = await runProgram([join(import.meta.dirname, '../support/processes/cluster-metrics.mjs')])
  const samples = parse(stdout)
  t.equal(samples[events('batch.failed', 'queued')], 1 + 2)
  t.equal(samples['webhook_secret_matches_total{endpoint="/webhooks/openai",secret_index="0"}'], 3)
  t.equal(samples['webhook_queue_depth'], 7, 'one queue that two processes tell of')
})

t.test('every value of a label is known beforehand, whatever comes', async t => {
  const { register } = observe(t)
  const options: OpenAIWebhookOptions = { idempotency: { store: memoryStore() } }
  const app = await build(t, options)
  await post(app, sign({ ...thin(`x"}\n${'y'.repeat(10_000)}`), id: 'evt_secret_marker' }, { webhookId: 'wh_marker' }))
  await post(app, { ...delivery(), headers: { ...delivery().headers, 'webhook-id': 'wh_marker', 'webhook-signature': 'v1,marker' } })
  const text = await register.metrics()
  t.notMatch(text, /marker|yyyy/)
  t.match(text, /event_type="other"/)
})
