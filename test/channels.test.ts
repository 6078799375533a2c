import { AsyncLocalStorage } from 'node:async_hooks'
import { join } from 'node:path'
import type { FastifyInstance, FastifyRequest } from 'fastify'
import Database from 'libsql'
import t from 'tap'
import { background, channels, memoryStore } from '../lib/index.ts'
import type { DeliveryMessage, EnqueueMessage, HandlerMessage, IdempotencyStore, Job, MessageChannel, OpenAIWebhookOptions, Runner, RunnerHost, VerifiedRequest, Verifier } from '../lib/index.ts'
import { durable } from '../lib/sqlite/index.ts'
import { SECRET, build, outcome, post, sign, thin } from './support/deliveries.ts'
import { capturedLog, closeTimeout, deferred, drained, redelivered } from './support/observe.ts'
import { runProgram } from './support/program.mjs'

type Teardown = { teardown: (fn: () => unknown) => void }

const ENDPOINT = '/webhooks/openai'
const OLD_SECRET = `whsec_${Buffer.alloc(32, 'old').toString('base64')}`
const STAGES = ['start', 'end', 'asyncStart', 'asyncEnd', 'error'] as const
const PLAIN = ['verified', 'refused', 'duplicate', 'unhandled', 'trouble', 'dead'] as const
const TRACED = ['enqueue', 'delivery', 'handler'] as const

type Any = Record<string, unknown>
const asChannel = (part: unknown): MessageChannel<Any> => part as MessageChannel<Any>

/** By name: `verified`, …, `delivery.start`, … */
const parts = new Map<string, MessageChannel<Any>>([
  ...PLAIN.map(name => [name, asChannel(channels[name])] as const),
  ...TRACED.flatMap(name => STAGES.map(stage => [`${name}.${stage}`, asChannel(channels[name][stage])] as const))
])

function listen<Message> (t: Teardown, channel: MessageChannel<Message>, listener: (message: Message) => void): void {
  channel.subscribe(listener)
  t.teardown(() => channel.unsubscribe(listener))
}

interface Told {
  readonly name: string
  /** The object that was published. */
  readonly message: Any
  /** What it held then. */
  readonly held: Any
}

/** Everything that is published from now on, or what the channels of these names publish. */
function record (t: Teardown, ...names: string[]): Told[] {
  const told: Told[] = []
  for (const [name, channel] of parts) {
    if (names.length > 0 && !names.some(wanted => name === wanted || name.startsWith(`${wanted}.`))) continue
    listen(t, channel, message => { told.push({ name, message, held: { ...message } }) })
  }
  return told
}

const namesOf = (told: readonly Told[]): string[] => told.map(({ name }) => name)
const messagesOf = (told: readonly Told[], name: string): Any[] => told.filter(entry => entry.name === name).map(({ held }) => held)

/** A store to which another process got first. */
const busyStore = (): IdempotencyStore => ({ ...memoryStore(), begin: () => ({ state: 'running' }) })

t.test('verified: a delivery that can be trusted, and which secret says so', async t => {
  const told = record(t, 'verified')
  const app = await build(t, { secret: [SECRET, OLD_SECRET] })
  const event = thin('batch.failed')
  const first = sign(event, { webhookId: 'wh_1' })
  await post(app, first)
  await post(app, sign(event, { webhookId: 'wh_2', secret: OLD_SECRET }))
  const [{ request, ...message }, second] = messagesOf(told, 'verified') as [Any, Any]
  t.same(message, { endpoint: ENDPOINT, webhookId: 'wh_1', timestamp: Number(first.headers['webhook-timestamp']), event, secretIndex: 0, bodySize: first.body.length })
  t.equal((request as VerifiedRequest).openaiWebhook.webhookId, 'wh_1')
  t.match(second, { webhookId: 'wh_2', secretIndex: 1 })
  t.equal(told.length, 2)
  const texts = JSON.stringify([message, { ...second, request: undefined }])
  for (const secret of [SECRET, OLD_SECRET]) t.notOk(texts.includes(secret.slice('whsec_'.length)), 'the index, never the text')
})

t.test('verified: on each route by its URL, for retries too, and without an index where the verifier has none', async t => {
  const told = record(t, 'verified')
  const verifier: Verifier = ({ headers }) => ({ webhookId: String(headers['webhook-id']), timestamp: Number(headers['webhook-timestamp']) })
  const app = await build(t, { verifier, prefix: '/v1' })
  app.openaiWebhook.route({ url: '/second' })
  app.post('/marked/:tenant', { config: { openaiWebhook: {} } }, () => {})
  const delivery = sign(thin('batch.failed'))
  for (const url of ['/v1/webhooks/openai', '/second', '/marked/acme', '/second']) t.equal((await post(app, delivery, url)).statusCode, 200)
  t.same(messagesOf(told, 'verified').map(({ endpoint }) => endpoint), ['/v1/webhooks/openai', '/second', '/marked/:tenant', '/second'])
  t.same(messagesOf(told, 'verified').map(({ secretIndex }) => secretIndex), [undefined, undefined, undefined, undefined])
})

interface Refusal {
  name: string
  code: string
  status: number
  /** What is known of it, but where it went. */
  delivery?: object
  options?: OpenAIWebhookOptions
  prepare?: (app: FastifyInstance) => void
  send?: (app: FastifyInstance) => Promise<unknown>
}

const full: Runner = { run () { throw new Error('full') } }
const broken: IdempotencyStore = { ...memoryStore(), begin () { throw new Error('the store is down') } }
const failing = (app: FastifyInstance): void => { app.openaiWebhook.on('batch.failed', () => { throw new Error('the handler failed') }) }
const valid = (): ReturnType<typeof sign> => sign(thin('batch.failed'), { webhookId: 'wh_1' })
const withHeaders = (headers: Record<string, string>) => {
  return async (app: FastifyInstance) => await post(app, { ...valid(), headers: { ...valid().headers, ...headers } })
}

const VERIFIED = { webhookId: 'wh_1', event: thin('batch.failed') }

const refusals: Refusal[] = [
  { name: 'by header', code: 'FST_OPENAI_WEBHOOK_MISSING_HEADER', status: 401, send: withHeaders({ 'webhook-id': '' }) },
  { name: 'by signature', code: 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE', status: 401, send: withHeaders({ 'webhook-signature': 'v1,Zm9yZ2Vk' }) },
  { name: 'by shape', code: 'FST_OPENAI_WEBHOOK_INVALID_EVENT', status: 400, delivery: { webhookId: 'wh_1' }, send: async app => await post(app, sign({ type: 'batch.failed' }, { webhookId: 'wh_1' })) },
  { name: 'by size', code: 'FST_ERR_CTP_BODY_TOO_LARGE', status: 413, options: { bodyLimit: 10 } },
  { name: 'by content type', code: 'FST_ERR_CTP_INVALID_MEDIA_TYPE', status: 415, send: withHeaders({ 'content-type': 'text/plain' }) },
  { name: 'while it runs elsewhere', code: 'FST_OPENAI_WEBHOOK_IN_PROGRESS', status: 409, delivery: VERIFIED, options: { idempotency: { store: busyStore() } } },
  { name: 'by a handler', code: 'FST_OPENAI_WEBHOOK_HANDLER_FAILED', status: 500, delivery: VERIFIED, prepare: failing },
  { name: 'by a runner', code: 'FST_OPENAI_WEBHOOK_UNAVAILABLE', status: 503, delivery: VERIFIED, options: { runner: full } },
  { name: 'by a store', code: 'FST_OPENAI_WEBHOOK_UNAVAILABLE', status: 503, delivery: VERIFIED, options: { idempotency: { store: broken } } }
]

for (const { name, code, status, delivery = {}, options, prepare, send = async (app: FastifyInstance) => await post(app, valid()) } of refusals) {
  t.test(`refused: ${name}, once, with the code that the sender was answered`, async t => {
    const told = record(t, 'refused')
    const app = await build(t, options)
    prepare?.(app)
    const errors: unknown[] = []
    app.openaiWebhook.onError(error => { errors.push(error) })
    await send(app)
    t.equal(told.length, 1)
    const [{ request, error, ...message }] = messagesOf(told, 'refused') as [Any]
    t.same(message, { endpoint: ENDPOINT, ...delivery, code, statusCode: status })
    t.equal((error as { code?: string }).code, code)
    t.same(errors, [error], 'what onError is told')
    t.equal((request as FastifyRequest).url, ENDPOINT)
  })
}

t.test('refused: once, with whatever code a verifier has', async t => {
  const told = record(t, 'refused')
  const errors: unknown[] = []
  const no = (): never => { throw Object.assign(new Error('no'), { code: 'ACME_NO', statusCode: 403 }) }
  const app = await build(t, { verifier: no })
  app.openaiWebhook.route({ url: '/by-header', verifier: Object.assign(() => no(), { checkHeaders: no }) }).onError(error => { errors.push(error) })
  for (const url of [ENDPOINT, '/by-header']) t.equal((await post(app, valid(), url)).statusCode, 403)
  t.same(messagesOf(told, 'refused').map(({ code, statusCode, endpoint }) => ({ code, statusCode, endpoint })), [
    { code: 'ACME_NO', statusCode: 403, endpoint: ENDPOINT },
    { code: 'ACME_NO', statusCode: 403, endpoint: '/by-header' }
  ])
  t.equal(errors.length, 2)
})

t.test('refused: on a marked route as on the plugin\'s own', async t => {
  const told = record(t, 'refused')
  const app = await build(t, { path: false })
  app.post('/marked', { config: { openaiWebhook: { bodyLimit: 200 } } }, () => {})
  const large = sign(thin('batch.failed', { id: 'x'.repeat(200) }))
  t.equal((await post(app, { ...valid(), headers: { 'content-type': 'application/json' } }, '/marked')).statusCode, 401)
  t.equal((await post(app, { ...valid(), headers: { ...valid().headers, 'content-type': 'text/plain' } }, '/marked')).statusCode, 415)
  t.equal((await post(app, large, '/marked')).statusCode, 413)
  t.same(messagesOf(told, 'refused').map(({ endpoint, code, statusCode }) => ({ endpoint, code, statusCode })), [
    { endpoint: '/marked', code: 'FST_OPENAI_WEBHOOK_MISSING_HEADER', statusCode: 401 },
    { endpoint: '/marked', code: 'FST_ERR_CTP_INVALID_MEDIA_TYPE', statusCode: 415 },
    { endpoint: '/marked', code: 'FST_ERR_CTP_BODY_TOO_LARGE', statusCode: 413 }
  ])
})

t.test('duplicate: processed before, joined here, or running elsewhere', async t => {
  const told = record(t, 'duplicate')
  const app = await build(t)
  const [started, ended] = [deferred(), deferred()]
  app.openaiWebhook.on('batch.failed', async () => {
    started.resolve()
    await ended.promise
  })
  const delivery = valid()
  const first = post(app, delivery)
  await started.promise
  const joined = post(app, redelivered(delivery))
  while (told.length === 0) await new Promise(resolve => setImmediate(resolve))
  ended.resolve()
  await Promise.all([first, joined])
  await post(app, redelivered(delivery))

  const other = await build(t, { idempotency: { store: busyStore() } })
  await post(other, delivery)
  t.same(messagesOf(told, 'duplicate').map(({ state }) => state), ['joined', 'processed', 'elsewhere'])
  const [, { request, state, ...message }] = messagesOf(told, 'duplicate') as [Any, Any]
  const timestamp = Number(delivery.headers['webhook-timestamp']) + 1
  t.same(message, { endpoint: ENDPOINT, webhookId: 'wh_1', timestamp, event: thin('batch.failed') })
  t.equal((request as VerifiedRequest).openaiWebhook.timestamp, timestamp, 'of the duplicate, not of the first')
})

t.test('unhandled: no handler of on() takes the type, be it known or not', async t => {
  const told = record(t, 'unhandled')
  const app = await build(t)
  app.openaiWebhook.on('batch.*', () => {}).onAny(() => {}).onUnhandled(() => {})
  app.post('/marked', { config: { openaiWebhook: {} } }, () => {})
  for (const type of ['batch.failed', 'response.completed', 'made.up']) await post(app, sign(thin(type)))
  await post(app, sign(thin('response.completed')), '/marked')
  t.same(messagesOf(told, 'unhandled').map(({ event }) => (event as { type: string }).type), ['response.completed', 'made.up'], 'a route with a handler of its own handles all')
  t.equal(messagesOf(told, 'unhandled')[0]!['endpoint'], ENDPOINT)
})

t.test('trouble: what no sender hears of, with the delivery where there is one', async t => {
  const told = record(t, 'trouble')
  const failure = new Error('cannot record')
  const app = await build(t, { idempotency: { store: { ...memoryStore(), complete () { throw failure } } } })
  t.equal((await post(app, valid())).statusCode, 200)
  t.same(messagesOf(told, 'trouble'), [{ error: failure, endpoint: ENDPOINT, webhookId: 'wh_1', event: thin('batch.failed') }])

  let host!: RunnerHost
  const queued = await build(t, { runner: { start (startedBy) { host = startedBy }, run () {} } })
  await queued.ready()
  host.report(failure, { endpoint: ENDPOINT, webhookId: 'wh_1', timestamp: 1, event: thin('batch.failed') })
  t.same(messagesOf(told, 'trouble')[1], { error: failure, endpoint: ENDPOINT, webhookId: 'wh_1', event: thin('batch.failed') })
})

t.test('dead: a delivery that nothing will attempt again, and no trouble', async t => {
  const told = record(t, 'dead', 'trouble')
  const app = await build(t, { runner: background() })
  failing(app)
  await post(app, valid())
  await app.close()
  t.match(messagesOf(told, 'dead'), [{ endpoint: ENDPOINT, webhookId: 'wh_1', event: thin('batch.failed'), attempts: 1, errors: [{ handler: '#0', message: 'the handler failed' }], finished: [] }])
  t.equal(told.length, 1)
})

t.test('delivery and handler: one object each, in order, for handlers that are done at once', async t => {
  const told = record(t, 'delivery', 'handler')
  const app = await build(t)
  app.openaiWebhook.on('batch.failed', () => {}, { name: 'first' }).onAny(() => {})
  const delivery = valid()
  await post(app, delivery)
  t.same(namesOf(told), [
    'delivery.start',
    'handler.start', 'handler.end', 'handler.asyncStart', 'handler.asyncEnd',
    'handler.start', 'handler.end', 'handler.asyncStart', 'handler.asyncEnd',
    'delivery.end', 'delivery.asyncStart', 'delivery.asyncEnd'
  ])
  const message = told[0]!.message
  const { request, ...held } = told[0]!.held
  t.same(held, {
    endpoint: ENDPOINT,
    webhookId: 'wh_1',
    timestamp: Number(delivery.headers['webhook-timestamp']),
    event: thin('batch.failed'),
    attempt: undefined,
    handlers: 2,
    queued: false,
    carrier: undefined
  })
  t.equal((request as FastifyRequest).url, ENDPOINT)
  t.equal(new Set(told.filter(({ name }) => name.startsWith('delivery')).map(({ message }) => message)).size, 1)
  const handlers = new Set(told.filter(({ name }) => name.startsWith('handler')).map(({ message }) => message))
  t.same([...handlers].map(({ handler }) => handler), ['#1', 'first'], 'onAny handlers first')
  for (const handler of handlers) t.equal(handler['delivery'], message)
})

t.test('delivery and handler: `end` once the handlers have been started, `asyncEnd` when their end is on record', async t => {
  const store = memoryStore()
  const told = record(t, 'delivery', 'handler')
  const app = await build(t, {
    idempotency: {
      store: {
        ...store,
        complete (...args) {
          told.push({ name: 'on record', message: {}, held: {} })
          return store.complete(...args)
        }
      }
    }
  })
  const ended = deferred()
  app.openaiWebhook.on('batch.failed', async () => { await ended.promise })
  const answer = post(app, valid())
  while (told.length < 4) await new Promise(resolve => setImmediate(resolve))
  t.same(namesOf(told), ['delivery.start', 'handler.start', 'handler.end', 'delivery.end'])
  ended.resolve()
  await answer
  t.same(namesOf(told.slice(4)), ['handler.asyncStart', 'handler.asyncEnd', 'on record', 'delivery.asyncStart', 'delivery.asyncEnd'])
})

for (const [kind, handler] of Object.entries({
  'at once': () => { throw new Error('the handler failed') },
  later: async () => { throw new Error('the handler failed') }
})) {
  t.test(`delivery and handler: a handler that fails ${kind} has an \`error\` before the asynchronous end`, async t => {
    const told = record(t, 'delivery', 'handler')
    const app = await build(t)
    app.openaiWebhook.on('batch.failed', handler)
    t.equal((await post(app, valid())).statusCode, 500)
    t.same(namesOf(told), kind === 'at once'
      ? [
          'delivery.start', 'handler.start', 'handler.error', 'handler.end', 'handler.asyncStart', 'handler.asyncEnd',
          'delivery.error', 'delivery.end', 'delivery.asyncStart', 'delivery.asyncEnd'
        ]
      : [
          'delivery.start', 'handler.start', 'handler.end', 'delivery.end', 'handler.error', 'handler.asyncStart', 'handler.asyncEnd',
          'delivery.error', 'delivery.asyncStart', 'delivery.asyncEnd'
        ])
    for (const { name, held } of told.filter(({ name }) => /start$/.test(name))) t.notOk('error' in held, name)
    const thrown = messagesOf(told, 'handler.error')[0]!['error']
    t.equal((thrown as Error).message, 'the handler failed')
    const { code, cause } = messagesOf(told, 'delivery.asyncEnd')[0]!['error'] as Error & { code: string, cause: AggregateError }
    t.equal(code, 'FST_OPENAI_WEBHOOK_HANDLER_FAILED')
    t.same(cause.errors, [thrown])
  })
}

t.test('delivery: a retry has the handlers that have not succeeded', async t => {
  const told = record(t, 'delivery.start', 'handler.start')
  const app = await build(t)
  let fails = true
  app.openaiWebhook.on('batch.failed', () => { if (fails) throw new Error('the handler failed') }, { name: 'fails' }).onAny(() => {}, { name: 'succeeds' })
  const delivery = valid()
  await post(app, delivery)
  fails = false
  await post(app, redelivered(delivery))
  t.same(messagesOf(told, 'delivery.start').map(({ handlers }) => handlers), [2, 1])
  t.same(messagesOf(told, 'handler.start').map(({ handler }) => handler), ['succeeds', 'fails', 'fails'])
})

t.test('delivery: a route\'s own handler is part of it', async t => {
  const told = record(t, 'delivery')
  const app = await build(t)
  app.post('/marked', { config: { openaiWebhook: {} } }, () => { throw new Error('the handler failed') })
  t.equal((await post(app, valid(), '/marked')).statusCode, 500)
  t.same(namesOf(told), ['delivery.start', 'delivery.end', 'delivery.error', 'delivery.asyncStart', 'delivery.asyncEnd'])
  t.match(told[0]!.held, { endpoint: '/marked', handlers: 1 })
})

t.test('enqueue: around the runner\'s taking of a delivery; then delivery, without a request', async t => {
  const told = record(t, 'enqueue', 'delivery')
  const app = await build(t, { runner: background() })
  app.openaiWebhook.on('batch.failed', () => {})
  const delivery = valid()
  await post(app, delivery)
  await app.close()
  t.same(namesOf(told), [
    'enqueue.start', 'enqueue.end', 'enqueue.asyncStart', 'enqueue.asyncEnd',
    'delivery.start', 'delivery.end', 'delivery.asyncStart', 'delivery.asyncEnd'
  ])
  const { request, ...message } = told[0]!.held
  t.same(message, { endpoint: ENDPOINT, webhookId: 'wh_1', timestamp: Number(delivery.headers['webhook-timestamp']), event: thin('batch.failed'), carrier: {} })
  t.equal((request as FastifyRequest).url, ENDPOINT)
  t.match(told[4]!.held, { webhookId: 'wh_1', queued: true, carrier: undefined, attempt: undefined })
  t.equal(told[4]!.held['request'], undefined)
})

t.test('enqueue: an `error` says why the runner did not take it', async t => {
  const told = record(t, 'enqueue')
  const failure = new Error('the queue is gone')
  const app = await build(t, { runner: { run: async () => { throw failure }, depth: () => 0 } })
  t.equal((await post(app, valid())).statusCode, 503)
  t.same(namesOf(told), ['enqueue.start', 'enqueue.end', 'enqueue.error', 'enqueue.asyncStart', 'enqueue.asyncEnd'])
  t.equal(told[2]!.held['error'], failure)
})

t.test('enqueue: not for a runner without a queue', async t => {
  const told = record(t, 'enqueue')
  const app = await build(t)
  app.openaiWebhook.on('batch.failed', () => {})
  await post(app, valid())
  t.same(told, [])
})

t.test('what a subscriber puts on the carrier goes with the job, and the handlers\' process has it', async t => {
  listen<EnqueueMessage>(t, channels.enqueue.start, ({ carrier, webhookId }) => { carrier['traceparent'] = `00-${webhookId}` })

  await t.test('in memory', async t => {
    const told = record(t, 'delivery.start', 'handler.start')
    const app = await build(t, { runner: background() })
    app.openaiWebhook.on('batch.failed', () => {})
    await post(app, valid())
    await app.close()
    t.same(messagesOf(told, 'delivery.start')[0]!['carrier'], { traceparent: '00-wh_1' })
    t.match(messagesOf(told, 'handler.start')[0]!['delivery'], { carrier: { traceparent: '00-wh_1' }, queued: true })
  })

  await t.test('through a file, over a restart and over attempts', async t => {
    const told = record(t, 'delivery.start')
    const file = join(t.testdir({}), 'jobs.db')
    const received = await build(t, { runner: { ...durable(new Database(file)), start () {} } })
    await post(received, valid())
    await received.close()
    t.same(told, [], 'accepted, and not run')

    const app = await build(t, { runner: durable(new Database(file), { backoff: 1 }) })
    const done = deferred()
    let failures = 1
    app.openaiWebhook.on('batch.failed', () => {
      if (failures-- > 0) throw new Error('the handler failed')
      done.resolve()
    })
    await app.listen({ port: 0, host: '127.0.0.1' }) // nothing else keeps the process waiting for the second attempt
    await done.promise
    t.same(messagesOf(told, 'delivery.start').map(({ carrier, attempt, queued }) => ({ carrier, attempt, queued })), [
      { carrier: { traceparent: '00-wh_1' }, attempt: 1, queued: true },
      { carrier: { traceparent: '00-wh_1' }, attempt: 2, queued: true }
    ])
  })
})

t.test('what is bound to `start` is the async context of the work', async t => {
  const seen: unknown[] = []
  const outer = new AsyncLocalStorage<string>()
  const inner = new AsyncLocalStorage<string>()
  const { delivery: { start: deliveryStart }, handler: { start: handlerStart }, enqueue: { start: enqueueStart } } = channels
  deliveryStart.bindStore(outer as AsyncLocalStorage<unknown>, (message: DeliveryMessage) => message.webhookId)
  handlerStart.bindStore(inner as AsyncLocalStorage<unknown>, (message: HandlerMessage) => message.handler)
  t.teardown(() => {
    deliveryStart.unbindStore(outer as AsyncLocalStorage<unknown>)
    handlerStart.unbindStore(inner as AsyncLocalStorage<unknown>)
  })
  const app = await build(t)
  app.openaiWebhook.on('batch.failed', async (_event, { webhookId }) => {
    await new Promise(resolve => setImmediate(resolve))
    seen.push([webhookId, outer.getStore(), inner.getStore()])
  }, { name: 'a' })
  await Promise.all(['wh_1', 'wh_2'].map(async webhookId => await post(app, sign(thin('batch.failed'), { webhookId }))))
  t.same(seen, [['wh_1', 'wh_1', 'a'], ['wh_2', 'wh_2', 'a']])
  t.equal(outer.getStore(), undefined)

  const queueing = new AsyncLocalStorage<string>()
  enqueueStart.bindStore(queueing as AsyncLocalStorage<unknown>, (message: EnqueueMessage) => message.webhookId)
  t.teardown(() => enqueueStart.unbindStore(queueing as AsyncLocalStorage<unknown>))
  const taken = await build(t, { runner: { run () { seen.push(queueing.getStore()) }, depth: () => 0 } })
  await post(taken, sign(thin('batch.failed'), { webhookId: 'wh_3' }))
  t.equal(seen[2], 'wh_3')
})

t.test('`around` runs the work within a context of the subscriber\'s', async t => {
  const store = new AsyncLocalStorage<string[]>()
  const seen: unknown[] = []
  const enter = (name: string) => (message: DeliveryMessage): void => {
    const within = message.around ?? (work => work())
    message.around = work => store.run([...store.getStore() ?? [], name], () => within(work))
  }
  listen(t, channels.delivery.start, enter('a'))
  listen(t, channels.delivery.start, enter('b'))
  const app = await build(t)
  app.openaiWebhook
    .on('batch.failed', async () => {
      await null
      seen.push(store.getStore())
    })
    .on('batch.completed', () => { throw new Error('the handler failed') })
  t.equal((await post(app, valid())).statusCode, 200)
  t.equal((await post(app, sign(thin('batch.completed')))).statusCode, 500)
  t.same(seen, [['b', 'a']], 'one that was set before belongs within')
})

t.test('without a subscriber nothing is published', async t => {
  for (const [name, channel] of parts) {
    t.notOk(channel.hasSubscribers, name)
    // On the object itself, before what its class has for channels without subscribers.
    Object.assign(channel, {
      publish: () => t.fail(`${name} was published`),
      runStores: () => t.fail(`${name} was traced`)
    })
    t.teardown(() => {
      delete (channel as { publish?: unknown }).publish
      delete (channel as { runStores?: unknown }).runStores
    })
  }
  const log = capturedLog()
  const app = await build(t, { idempotency: { store: { ...memoryStore(), checkpoint () { throw new Error('cannot record') } } } }, { logger: log.logger })
  app.openaiWebhook.on('batch.failed', () => {}).on('batch.failed', () => {})
  const delivery = valid()
  const answers = [delivery, redelivered(delivery), sign(thin('made.up')), { ...delivery, headers: {} }]
  t.same((await Promise.all(answers.map(async delivery => (await post(app, delivery)).statusCode))), [200, 200, 200, 401])
  t.ok(log.lines.some(({ msg }) => msg === 'webhook trouble'), 'all of it has happened')
  const queued = await build(t, { runner: background() })
  queued.openaiWebhook.on('batch.failed', () => { throw new Error('the handler failed') })
  t.equal((await post(queued, valid())).statusCode, 200)
  await queued.close()
})

t.test('a subscriber that throws changes neither the answer nor what others are told; Node has it as an uncaught exception', async t => {
  const script = join(import.meta.dirname, 'support/processes/throwing-subscriber.mjs')
  const { stdout } = await runProgram([script, 'listens'])
  const { statusCode, body, told } = JSON.parse(stdout) as { statusCode: number, body: string, told: string[] }
  t.equal(statusCode, 200)
  t.equal(body, '{"received":true}')
  t.same(told.sort(), ['a subscriber failed', 'a subscriber failed', 'a subscriber failed', 'handled', 'wh_1'])

  // Without a listener it ends the process, as anything does that nobody catches.
  const ended = await runProgram([script]).catch((error: unknown) => error) as { code: number, stdout: string, stderr: string }
  t.equal(ended.code, 1)
  t.equal(ended.stdout, '')
  t.match(ended.stderr, /a subscriber failed/)
})

t.test('whatever `around` does, the traced work runs, once, and its end is the answer', async t => {
  const arounds: Record<string, (work: () => unknown) => unknown> = {
    'calls nothing': () => {},
    'throws before': () => { throw new Error('tracer') },
    'throws after': work => {
      work()
      throw new Error('tracer')
    },
    'calls twice': work => {
      work()
      return work()
    },
    'returns nothing': work => { work() }
  }
  for (const [name, around] of Object.entries(arounds)) {
    for (const channel of ['enqueue', 'delivery', 'handler'] as const) {
      t.test(`${name}: ${channel}`, async t => {
        const nothing = (): void => {}
        const subscribers = { start (message: object) { Object.assign(message, { around }) }, end: nothing, asyncStart: nothing, asyncEnd: nothing, error: nothing }
        const traced = channels[channel] as typeof channels.handler
        traced.subscribe(subscribers)
        t.teardown(() => { traced.unsubscribe(subscribers) })
        const app = await build(t, { deadline: 100, closeTimeout, ...(channel === 'enqueue' && { runner: background() }) })
        let runs = 0
        app.openaiWebhook.on('batch.failed', async () => {
          await null
          if (++runs === 1 && channel !== 'enqueue') throw new Error('disk full')
        })
        const delivery = sign(thin('batch.failed'))
        if (channel !== 'enqueue') t.equal(await outcome(app, delivery), '500 HANDLER_FAILED')
        t.equal(await outcome(app, redelivered(delivery)), '200 {"received":true}')
        await drained(t, app)
        t.equal(runs, channel === 'enqueue' ? 1 : 2)
      })
    }
  }
})

t.test('what a queue adds to a job is not taken for a part of the messages about it', async t => {
  const ended: Array<{ error?: unknown }> = []
  const nothing = (): void => {}
  const subscribers = { start: nothing, end: nothing, asyncStart: nothing, asyncEnd (message: { error?: unknown }) { ended.push(message) }, error: nothing }
  channels.delivery.subscribe(subscribers)
  t.teardown(() => { channels.delivery.unsubscribe(subscribers) })
  let host: RunnerHost | undefined
  const app = await build(t, { runner: { start (startedBy) { host = startedBy }, run () {} } })
  let runs = 0
  app.openaiWebhook.on('batch.failed', () => { runs++ })
  await app.ready()
  const job: Job = { webhookId: 'wh_1', timestamp: 1, endpoint: '/webhooks/openai', event: thin('batch.failed') }
  await host?.process({ ...job, error: 'the last attempt\'s', around: 'the clock' } as Job)
  t.equal(runs, 1)
  t.equal(ended.length, 1)
  t.equal(ended[0]?.error, undefined)
})
