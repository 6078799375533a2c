import { request as httpRequest } from 'node:http'
import type { AddressInfo } from 'node:net'
import Fastify from 'fastify'
import type { FastifyInstance } from 'fastify'
import Database from 'libsql'
import t from 'tap'
import openaiWebhook, { background, memoryStore, xOpenAISignature } from '../../lib/index.ts'
import type { Job, Runner, RunnerHost } from '../../lib/index.ts'
import inspector from '../../lib/inspector/index.ts'
import { Journal } from '../../lib/inspector/journal.ts'
import { Rate } from '../../lib/inspector/rate.ts'
import { durable } from '../../lib/sqlite/index.ts'
import { faultNames, forge, sign as signBytes } from '../../lib/testing/index.ts'
import { SECRET, build, post, sign, thin } from '../support/deliveries.ts'
import { act, detailOf, inspected, journalOf, rowsOf } from '../support/inspector.ts'
import { deferred, redelivered } from '../support/observe.ts'

const states = (app: FastifyInstance): string[] => rowsOf(app).map(({ state }) => state)

async function until (holds: () => boolean): Promise<void> {
  while (!holds()) await new Promise(resolve => setImmediate(resolve))
}

t.test('a delivery that is processed: its row, its steps in order, its handlers, its bytes', async t => {
  const app = await inspected(t)
  app.openaiWebhook.on('batch.completed', () => {}, { name: 'first' }).on('batch.completed', async () => {}, { name: 'second' })
  const delivery = sign(thin('batch.completed', { id: 'batch_1' }))
  await post(app, delivery)
  const [row] = rowsOf(app)
  t.match(row, {
    id: 1, type: 'batch.completed', webhookId: delivery.headers['webhook-id'], endpoint: '/webhooks/openai', tenant: null, resource: 'batch_1', state: 'processed', status: 200, code: null, attempts: 1, own: false
  })
  const { steps, attempts, body, headers, refusal, diagnosis, death, scheme, deliver, url } = await detailOf(app)
  t.same(steps!.map(({ name, failed }) => `${name} ${failed}`), ['capture', 'verify', 'validate', 'deduplicate', 'dispatch', 'acknowledge'].map(name => `${name} false`))
  let last = 0
  for (const { from, to } of steps!) {
    t.equal(from, last)
    t.ok(to! >= from!)
    last = to!
  }
  t.equal(last, row!.ms)
  t.match(attempts, [{ number: 1, queued: false, outcome: 'processed', errors: [], handlers: [{ name: 'first', outcome: 'succeeded', ms: Number }, { name: 'second', outcome: 'succeeded', ms: Number }] }])
  t.ok(attempts[0]!.at >= row!.at && attempts[0]!.at <= Date.now())
  t.same(Buffer.from(body!.base64, 'base64'), delivery.body)
  t.match(new Map(headers), new Map([['webhook-id', delivery.headers['webhook-id']]]))
  t.match({ refusal, diagnosis, death, scheme, deliver, url }, { refusal: null, diagnosis: null, death: null, scheme: 'standard', deliver: { again: null, edited: null }, url: '/webhooks/openai' })
})

t.test('what the event is about, by whatever field names it', async t => {
  const app = await inspected(t)
  const sent = [{ id: 'a' }, { call_id: 'b' }, { session_id: 'c' }, { safety_identifier: 'd' }, { id: 5 }]
  for (const data of sent) await post(app, sign(thin('of.nobody', data)))
  await post(app, sign({ type: 'of.nobody', data: null }))
  await post(app, sign({ type: 'of.nobody', data: { id: 'x'.repeat(300) } }))
  t.same(rowsOf(app).map(({ resource }) => resource), ['a', 'b', 'c', 'd', null, null, 'x'.repeat(256)])
})

t.test('a handler that fails is told with its stack; the retry runs it alone', async t => {
  const app = await inspected(t)
  let broken = true
  app.openaiWebhook.on('batch.failed', () => {}, { name: 'good' }).on('batch.failed', function misuse () { if (broken) throw new TypeError('no bucket') }, { name: 'bad' })
  const delivery = sign(thin('batch.failed'))
  await post(app, delivery)
  const failed = await detailOf(app)
  t.match(failed.row, { state: 'failed', status: 500, code: 'FST_OPENAI_WEBHOOK_HANDLER_FAILED' })
  t.match(failed.attempts, [{ outcome: 'failed', handlers: [{ name: 'good', outcome: 'succeeded' }, { name: 'bad', outcome: 'failed' }], errors: [{ handler: 'bad', message: 'no bucket', stack: /TypeError: no bucket\n.*misuse/s }] }])
  t.equal(failed.refusal!.error, null, 'it stands at the attempt')
  t.same(failed.steps!.map(({ name }) => name), ['capture', 'verify', 'validate', 'deduplicate', 'dispatch', 'acknowledge'])
  broken = false
  await post(app, redelivered(delivery))
  const retried = await detailOf(app)
  t.match(retried.attempts, [{ outcome: 'processed', handlers: [{ name: 'good', outcome: 'skipped', ms: null }, { name: 'bad', outcome: 'succeeded' }] }])
  t.match(retried.others, [{ id: failed.row.id, state: 'failed' }])
  t.same(states(app), ['failed', 'processed'])
})

t.test('duplicates, of each kind', async t => {
  const store = memoryStore()
  const app = await inspected(t, { idempotency: { store } })
  const busy = await inspected(t, { idempotency: { store: { ...memoryStore(), begin: () => ({ state: 'running' }) } } })
  const end = deferred()
  app.openaiWebhook.on('batch.failed', () => end.promise)
  const delivery = sign(thin('batch.failed'))
  const first = post(app, delivery)
  await until(() => states(app)[0] === 'running')
  const second = post(app, redelivered(delivery))
  await until(() => states(app)[1] === 'duplicate')
  end.resolve()
  await Promise.all([first, second])
  await post(app, redelivered(delivery))
  t.same(states(app), ['processed', 'duplicate', 'duplicate'])
  t.equal((await detailOf(app, 2)).duplicate, 'joined')
  t.equal((await detailOf(app, 3)).duplicate, 'processed')
  await post(busy, sign(thin('batch.failed')))
  t.match(await detailOf(busy), { duplicate: 'elsewhere', row: { state: 'duplicate', status: 409, code: 'FST_OPENAI_WEBHOOK_IN_PROGRESS' } })
})

t.test('the deadline makes it late, until its handlers have ended', async t => {
  const app = await inspected(t, { deadline: 20 })
  const end = deferred()
  app.openaiWebhook.on('batch.failed', () => end.promise)
  // The timer of a deadline keeps no process alive, and an injected request has no socket that would.
  const alive = setInterval(() => {}, 1_000)
  t.teardown(() => clearInterval(alive))
  await post(app, sign(thin('batch.failed')))
  t.match(rowsOf(app), [{ state: 'late', status: 503, code: 'FST_OPENAI_WEBHOOK_DEADLINE' }])
  const running = await detailOf(app)
  t.match(running.attempts, [{ outcome: 'running', ms: null, handlers: [{ outcome: 'running', ms: null }] }])
  t.equal(running.steps!.at(-1)!.name, 'acknowledge')
  end.resolve()
  await until(() => states(app)[0] === 'processed')
  t.match(rowsOf(app), [{ state: 'processed', status: 503 }])
})

t.test('what is refused stands in a ring of its own, with its step and its code', async t => {
  const app = await inspected(t, { secret: SECRET })
  for (const fault of faultNames.filter(name => name !== 'unknown type')) await forge(app, fault, { secret: SECRET })
  const rows = rowsOf(app)
  t.ok(rows.every(({ state, attempts }) => state === 'refused' && attempts === 0))
  t.equal([...journalOf(app).refusals].length, rows.length)
  const shown: Record<string, string> = {}
  for (const { id, code, status } of rows) {
    const { steps, body, deliver } = await detailOf(app, id)
    const failed = steps!.filter(({ failed }) => failed).map(({ name }) => name)
    shown[`${code!.replace('FST_OPENAI_WEBHOOK_', '')} ${status}`] = `${failed.join()} ${body === null ? 'no body' : 'body'} ${deliver.edited === null}`
  }
  t.same(shown, {
    'INVALID_SIGNATURE 401': 'verify body false',
    'TIMESTAMP_OUT_OF_TOLERANCE 401': 'verify no body false',
    'MISSING_HEADER 401': 'verify no body false',
    'INVALID_ID 401': 'verify no body false',
    'INVALID_EVENT 400': 'validate body true',
    'INVALID_BODY 400': 'validate body true'
  })
  t.equal(rows[0]!.type, 'batch.failed', 'what its sender says')
  await app.inject({ method: 'POST', url: '/webhooks/openai', payload: 'x' })
  t.match(rowsOf(app).at(-1), { type: null, webhookId: null, state: 'refused', status: 401 })
  await app.inject({ method: 'POST', url: '/webhooks/openai', headers: { ...sign(thin('batch.failed')).headers, 'content-type': 'text/plain' }, payload: 'x' })
  t.match(rowsOf(app).at(-1), { status: 415, code: 'FST_ERR_CTP_INVALID_MEDIA_TYPE' })
  t.same((await detailOf(app)).steps!.map(({ name, failed }) => [name, failed]), [['capture', true]])
})

t.test('a flood of refused deliveries displaces no delivery, and no more than a ring of its own is kept', async t => {
  const app = await inspected(t, {}, { max: 300 })
  await post(app, sign(thin('batch.failed')))
  for (let i = 0; i < 1_000; i++) await app.inject({ method: 'POST', url: '/webhooks/openai' })
  t.equal(rowsOf(app).length, 201)
  t.match(rowsOf(app)[0], { id: 1, state: 'processed' })
  for (let i = 0; i < 400; i++) await post(app, sign(thin('batch.failed')))
  t.equal([...journalOf(app).deliveries].length, 300)
  t.equal((await app.inject('/openai-webhook/api/deliveries/1')).statusCode, 404)
})

t.test('the bytes of each delivery are those that arrived, whatever their sizes and what a handler does to them', async t => {
  const app = await inspected(t, {}, { max: 200 })
  app.openaiWebhook.on('batch.failed', (_event, { request }) => { request!.openaiWebhook.rawBody.fill('x') })
  const sizes = Array.from({ length: 120 }, (_, i) => i % 10 === 0 ? 20_000 + i : 30 * i)
  const sent = sizes.map(size => sign({ ...thin('batch.failed'), padding: 'p'.repeat(size) }))
  const bodies = sent.map(({ body }) => Buffer.from(body))
  // Copied, because app.inject() hands over the very buffer that the handler fills.
  for (const { headers, body } of sent) await post(app, { headers, body: Buffer.from(body) })
  for (const [index, body] of bodies.entries()) {
    // A large body is not copied: it is what the handler made of it.
    if (body.length > 4_096) continue
    t.same(Buffer.from((await detailOf(app, index + 1)).body!.base64, 'base64'), body)
  }
})

t.test('a small body is kept, and counted by its own bytes, whatever buffer it is a part of', async t => {
  const app = await inspected(t)
  const { headers, body } = sign(thin('batch.failed'))
  const large = Buffer.alloc(2_000_000)
  body.copy(large, 500)
  await post(app, { headers, body: large.subarray(500, 500 + body.length) })
  t.same(Buffer.from((await detailOf(app)).body!.base64, 'base64'), body)
  t.ok(journalOf(app).deliveries.bytes < 10_000)
})

t.test('a delivery that is dropped while its handlers run holds no body', async t => {
  const app = await inspected(t, {}, { max: 1 })
  const end = deferred()
  app.openaiWebhook.on('batch.completed', () => end.promise)
  const running = post(app, sign(thin('batch.completed')))
  await until(() => states(app)[0] === 'running')
  const [entry] = [...journalOf(app).deliveries]
  t.ok(entry!.rawBody!.length > 0)
  await post(app, sign(thin('batch.failed')))
  t.equal(entry!.rawBody, undefined)
  end.resolve()
  t.equal((await running).statusCode, 200)
  t.same(states(app), ['processed'])
})

t.test('16 MB are kept at most, whatever the bodies and the errors', async t => {
  const app = await inspected(t, { bodyLimit: 3_000_000 }, { max: 10_000 })
  app.openaiWebhook.on('batch.failed', () => { throw new Error('e'.repeat(100_000)) })
  const body = (size: number): Buffer => Buffer.from(JSON.stringify({ ...thin('batch.failed'), padding: 'p'.repeat(size) }))
  const send = async (size: number, secret = SECRET): Promise<void> => {
    await app.inject({ method: 'POST', url: '/webhooks/openai', headers: signBytes(body(size), { secret }), payload: body(size) })
  }
  for (let i = 0; i < 20; i++) {
    await send(900_000)
    await send(900_000, `whsec_${Buffer.alloc(32, 'o').toString('base64')}`)
  }
  const { deliveries, refusals } = journalOf(app)
  t.ok(deliveries.bytes <= 12 * 1_048_576 && [...deliveries].length > 5)
  t.ok(refusals.bytes <= 4 * 1_048_576 && [...refusals].length > 2)
  await send(2_000_000)
  t.match(await detailOf(app), { body: null, deliver: { again: /not kept/, edited: null } })
  t.ok((await detailOf(app)).attempts[0]!.errors[0]!.message.length < 3_000)
})

t.test('background(): queued, then run out of the queue; a failure is dead', async t => {
  const app = await inspected(t, { runner: background({ concurrency: 1 }) })
  const end = deferred()
  app.openaiWebhook.on('batch.completed', () => end.promise).on('batch.failed', () => { throw new Error('no bucket') })
  const delivery = sign(thin('batch.completed'))
  await post(app, delivery)
  await post(app, sign(thin('batch.failed')))
  await post(app, redelivered(delivery))
  await until(() => states(app)[0] === 'running')
  t.same(states(app), ['running', 'queued', 'duplicate'])
  end.resolve()
  await until(() => states(app)[1] === 'dead')
  t.match(await detailOf(app, 1), { row: { state: 'processed', status: 200 }, attempts: [{ queued: true, outcome: 'processed' }] })
  t.match(await detailOf(app, 2), {
    row: { state: 'dead', status: 200, attempts: 1 },
    attempts: [{ queued: true, outcome: 'failed', errors: [{ message: 'no bucket' }] }],
    death: { attempts: 1, errors: [{ handler: '#1', message: 'no bucket' }] }
  })
})

t.test('durable(): every attempt, the death, and the requeue, in one row', async t => {
  const app = await inspected(t, { runner: durable(new Database(':memory:'), { attempts: 2, backoff: 1 }) })
  let broken = true
  app.openaiWebhook.on('batch.failed', () => { if (broken) throw new Error('no bucket') })
  const delivery = sign(thin('batch.failed'))
  await post(app, delivery)
  await until(() => states(app)[0] === 'dead')
  t.match(await detailOf(app), { row: { attempts: 2 }, attempts: [{ number: 1, outcome: 'failed' }, { number: 2, outcome: 'failed' }] })
  broken = false
  await app.openaiWebhook.deadLetters.requeue({ endpoint: '/webhooks/openai', webhookId: delivery.headers['webhook-id']! })
  await until(() => states(app)[0] === 'processed')
  t.match(await detailOf(app), { row: { attempts: 3 }, attempts: [{ number: 1 }, { number: 2 }, { number: 3, outcome: 'processed' }] })
  t.equal(rowsOf(app).length, 1)
})

t.test('with a queue, ms is when the sender was answered; how long the handlers took stands at the attempt', async t => {
  const runners = { background: background({ concurrency: 1 }), durable: durable(new Database(':memory:')) }
  for (const [name, runner] of Object.entries(runners)) {
    const app = await inspected(t, { runner })
    const end = deferred()
    app.openaiWebhook.on('batch.completed', () => end.promise)
    await post(app, sign(thin('batch.completed')))
    await until(() => states(app)[0] === 'running' && rowsOf(app)[0]!.ms !== null)
    const { ms } = rowsOf(app)[0]!
    await new Promise(resolve => setTimeout(resolve, 50))
    end.resolve()
    await until(() => states(app)[0] === 'processed')
    const { row, attempts, steps } = await detailOf(app)
    t.equal(row.ms, ms, name)
    t.equal(steps!.at(-1)!.to, ms, name)
    t.ok(attempts[0]!.ms! >= 45, name)
  }
})

t.test('a worker that has received nothing shows what comes out of the queue', async t => {
  let host: RunnerHost | undefined
  const runner: Runner = { start (given) { host = given }, run () {}, depth: () => 0 }
  const app = await inspected(t, { runner, path: false })
  let fails = true
  app.openaiWebhook.on('batch.failed', () => { if (fails) throw new Error('no bucket') })
  await app.ready()
  const job: Job = { webhookId: 'wh_1', timestamp: 1_750_861_210, endpoint: '/webhooks/openai', event: thin('batch.failed'), tenant: 'acme' }
  await t.rejects(Promise.resolve().then(() => host!.process(job, 1)))
  fails = false
  await host!.process(job, 2)
  t.match(rowsOf(app), [{ type: 'batch.failed', webhookId: 'wh_1', tenant: 'acme', resource: 'res_1', state: 'processed', status: null, attempts: 2, ms: Number }])
  const { steps, headers, body, deliver } = await detailOf(app)
  t.same({ steps, headers }, { steps: null, headers: null })
  t.match(body, { arrived: false })
  t.same(JSON.parse(Buffer.from(body!.base64, 'base64').toString()), thin('batch.failed'))
  t.match(deliver.again, /no such route/)
  for (let i = 0; i < 12; i++) {
    fails = true
    await t.rejects(Promise.resolve().then(() => host!.process({ ...job, webhookId: 'wh_2' }, i + 1)))
  }
  t.match(await detailOf(app), { row: { attempts: 12 } })
  t.equal((await detailOf(app)).attempts.length, 10, 'the last ones')
})

t.test('what is not kept any more may still run, and be waited for', async t => {
  let host: RunnerHost | undefined
  const app = await inspected(t, { runner: { start (given) { host = given }, run () {}, depth: () => 0 } }, { max: 1 })
  const end = deferred()
  app.openaiWebhook.on('batch.failed', () => end.promise).on('batch.completed', () => { throw new Error('no bucket') })
  await app.ready()
  const job = (webhookId: string, type = 'batch.failed'): Job => ({ webhookId, timestamp: 1_750_861_210, endpoint: '/webhooks/openai', event: thin(type) })
  const first = Promise.resolve(host!.process({ ...job('wh_1'), tenant: 'acme' }))
  const second = Promise.resolve(host!.process(job('wh_2')))
  await until(() => rowsOf(app)[0]?.webhookId === 'wh_2')
  end.reject(new Error('no bucket'))
  await t.rejects(first)
  await t.rejects(second)
  t.match(rowsOf(app), [{ webhookId: 'wh_2', state: 'failed' }])
  t.equal(rowsOf(app).length, 1)
  // It came out of a queue, and can be delivered again all the same: its URL is known.
  t.match((await detailOf(app)).deliver, { again: null, edited: null })
  t.match((await act(app, 'again', { id: rowsOf(app)[0]!.id })).json(), { status: 200 })
  await t.rejects(Promise.resolve().then(() => host!.process({ ...job('wh_3', 'batch.completed'), tenant: 'acme' })))
  t.match((await detailOf(app)).deliver, { again: /at which URL/ })
})

t.test('a route that replies by itself, and a store or a queue that fails', async t => {
  const app = await inspected(t)
  let seen: string[] = []
  app.post('/own', { config: { openaiWebhook: {} } }, async (_request, reply) => await reply.code(202).send('ok'))
  app.post('/broken', { config: { openaiWebhook: {} } }, async () => { throw new Error('no bucket') })
  app.post('/many', { config: { openaiWebhook: { on: { 'batch.failed': Array.from({ length: 101 }, () => () => {}) } } } }, async () => {
    seen = (await detailOf(app)).attempts[0]!.handlers.map(({ outcome }) => outcome)
  })
  await post(app, sign(thin('batch.failed')), '/own')
  t.match(await detailOf(app), { row: { state: 'processed', status: 202, endpoint: '/own' }, attempts: [{ handlers: [{ name: 'handler', outcome: 'succeeded' }] }] })
  await post(app, sign(thin('batch.failed')), '/broken')
  t.match(await detailOf(app), { row: { state: 'failed', status: 500 }, attempts: [{ handlers: [{ name: 'handler', outcome: 'failed' }], errors: [{ message: 'no bucket' }] }] })
  await post(app, sign(thin('batch.failed')), '/many')
  t.same([seen.length, ...seen.slice(-2)], [101, 'succeeded', 'running'], 'a hundred are kept, and its own')
  const broken = await inspected(t, { idempotency: { store: { ...memoryStore(), begin () { throw new Error('the store is down') } } } })
  await post(broken, sign(thin('batch.failed')))
  t.match(await detailOf(broken), { row: { state: 'refused', status: 503 }, refusal: { code: 'FST_OPENAI_WEBHOOK_UNAVAILABLE', error: { message: 'the store is down' } } })
  t.match((await detailOf(broken)).steps!.at(-1), { name: 'deduplicate', failed: true })
  const full = await inspected(t, { runner: { run () { throw new Error('the queue is down') }, depth: () => 0 } })
  await post(full, sign(thin('batch.failed')))
  t.match(await detailOf(full), { row: { state: 'refused', status: 503 } })
  t.match((await detailOf(full)).steps!.at(-1), { name: 'dispatch', failed: true })
})

const NOTHING: unknown = null

t.test('hooks of the app that answer or refuse by themselves, before and after verification', async t => {
  const app = Fastify() as FastifyInstance
  t.teardown(() => app.close())
  let at = ''
  app.addHook('onRequest', async ({ url }, reply) => {
    if (url.startsWith('/openai-webhook')) return
    if (at === 'refuse') throw Object.assign(new Error('too many'), { statusCode: 429, code: 5 })
  })
  app.addHook('onRequest', (_request, _reply, done) => {
    // What an app's hook may do by mistake: Fastify takes it for no error and skips the hooks that come after.
    if (at === 'null') throw NOTHING
    done()
  })
  app.addHook('preParsing', async (_request, reply, payload) => {
    if (at === 'before') await reply.code(204).send()
    return payload
  })
  await app.register(openaiWebhook, { secret: SECRET })
  await app.register(inspector)
  app.post('/marked', { config: { openaiWebhook: {} }, preHandler: async (_request, reply) => { if (at === 'after') await reply.code(403).send('no') } }, async () => {})
  const last = (): object => rowsOf(app).at(-1)!
  at = 'refuse'
  await post(app, sign(thin('batch.failed')))
  t.match(last(), { state: 'refused', status: 429, code: '5' })
  t.match((await detailOf(app)).steps, [{ name: 'capture', to: null, failed: true }])
  at = 'before'
  await post(app, sign(thin('batch.failed')))
  t.match(last(), { state: 'refused', status: 204, code: 'ANSWERED_BY_A_HOOK' })
  at = 'after'
  await post(app, sign(thin('batch.failed')), '/marked')
  t.match(last(), { state: 'refused', status: 403, code: 'ANSWERED_BY_A_HOOK', type: 'batch.failed', webhookId: /^wh_/ })
  at = 'null'
  await post(app, sign(thin('batch.failed')))
  t.match(last(), { state: 'processed', endpoint: '/webhooks/openai' }, 'Fastify skips the hook that notes arrivals')
})

t.test('a sender that goes away', async t => {
  const app = await inspected(t)
  const end = deferred()
  app.openaiWebhook.on('batch.failed', () => end.promise)
  await app.listen({ port: 0, host: '127.0.0.1' })
  const { port } = app.server.address() as AddressInfo
  const { headers, body } = sign(thin('batch.failed'))
  const request = httpRequest({ port, method: 'POST', path: '/webhooks/openai', headers })
  request.on('error', () => {})
  request.end(body)
  await until(() => states(app)[0] === 'running')
  request.destroy()
  await until(() => rowsOf(app)[0]!.ms !== null)
  t.match(rowsOf(app), [{ state: 'running', status: null }])
  end.resolve()
  await until(() => states(app)[0] === 'processed')
})

t.test('nothing is kept without an inspector, nor of another registration, nor after the app is closed', async t => {
  const app = Fastify() as FastifyInstance
  t.teardown(() => app.close())
  await app.register(async scope => {
    await scope.register(openaiWebhook, { secret: SECRET })
    await scope.register(inspector)
    app.decorate('watched', scope)
  })
  await app.register(async scope => { await scope.register(openaiWebhook, { secret: SECRET, path: '/other' }) })
  await post(app, sign(thin('batch.failed')))
  await post(app, sign(thin('batch.failed')), '/other')
  const watched = (app as unknown as { watched: FastifyInstance }).watched
  t.match(rowsOf(watched), [{ endpoint: '/webhooks/openai' }])
  t.equal(rowsOf(watched).length, 1)
  await app.close()
  t.equal(journalOf(watched), undefined)
  const plain = await build(t)
  await post(plain, sign(thin('batch.failed')))
  t.equal(journalOf(plain), undefined)
})

t.test('the verifier of the older guide', async t => {
  const app = await inspected(t, { verifier: xOpenAISignature() })
  await app.inject({ method: 'POST', url: '/webhooks/openai', headers: { 'x-openai-signature': 'a'.repeat(64), 'x-openai-timestamp': String(Math.floor(Date.now() / 1_000)), 'content-type': 'application/json' }, payload: '{}' })
  t.match(await detailOf(app), { row: { state: 'refused', status: 401 }, diagnosis: null, scheme: null })
})

t.test('a journal that nobody looks at notes no change; one that is looked at tells each once', async t => {
  const app = await inspected(t, {}, { max: 2 })
  const journal: Journal = journalOf(app)
  await post(app, sign(thin('batch.failed')))
  t.same(journal.takeChanged(), [])
  journal.watch(true)
  journal.watch(true)
  t.same(journal.takeChanged(), [])
  for (let i = 0; i < 4; i++) await post(app, sign(thin('batch.failed')))
  t.same(journal.takeChanged().map(({ id, state }) => [id, state]), [[4, 'processed'], [5, 'processed']])
  t.same(journal.takeChanged(), [])
  journal.watch(false)
  await post(app, sign(thin('batch.failed')))
  t.same(journal.takeChanged(), [])
})

t.test('a rate is counted in slots of five seconds, over five minutes', t => {
  const rate = new Rate()
  rate.came(0)
  rate.came(4_999)
  rate.failed(5_000)
  rate.came(5_000)
  const { total, failed, seconds } = rate.read(9_000)
  t.same([total.slice(-2), failed.slice(-2), total.length, seconds], [[2, 1], [0, 1], 60, 5])
  t.same(rate.read(300_000).total.slice(0, 2), [1, 0], 'the first slot is over')
  rate.came(900_000)
  t.same(rate.read(900_000).total.filter(count => count > 0), [1])
  t.end()
})
