import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import OpenAI from 'openai'
import { Pool } from 'pg'
import t from 'tap'
import type { Test } from 'tap'
import { memoryStore } from '../../lib/index.ts'
import type { IdempotencyStore, OpenAIWebhookOptions, Runner } from '../../lib/index.ts'
import { postgresStore } from '../../lib/postgres/index.ts'
import { reconcile } from '../../lib/resources/index.ts'
import type { ReconcileOptions, ReconcileProgress, ReconcileReport } from '../../lib/resources/index.ts'
import { durable, sqliteStore } from '../../lib/sqlite/index.ts'
import { redisStore } from '../../lib/stores/redis.ts'
import { build, post, SECRET, sign, thin } from '../support/deliveries.ts'
import type { Signed } from '../support/deliveries.ts'
import { redisClient, until } from '../support/faults.ts'
import { redelivered } from '../support/observe.ts'
import { OpenAIServer } from '../support/openai-server.ts'
import type { Listed } from '../support/openai-server.ts'
import { PostgresServer, postgresMissing } from '../support/postgres.ts'
import { RedisServer, redisMissing } from '../support/redis.ts'
import { isLong } from '../support/size.ts'
import { openSqlite } from '../support/sqlite.mjs'
import { unixTime } from '../support/time.ts'

const HOUR = 3_600
const DAY = 24 * HOUR

const clientOf = (server: OpenAIServer): OpenAI => new OpenAI({ apiKey: server.apiKey, baseURL: server.url, maxRetries: 0 })

/** A batch that took an hour. */
function batch (id: string, status: string, endedAt: number): Listed {
  return { object: 'batch', id, status, endpoint: '/v1/responses', created_at: endedAt - HOUR, [`${status}_at`]: endedAt }
}

async function receiver (t: Test, options: OpenAIWebhookOptions = {}, listens = true) {
  const app = await build(t, { idempotency: { reconcile: true }, ...options })
  const ran = new Map<string, number>()
  app.openaiWebhook.onAny(event => {
    const of = `${event.type} ${(event.data as { id: string }).id}`
    ran.set(of, (ran.get(of) ?? 0) + 1)
  })
  return { app, ran, url: listens ? `${await app.listen({ port: 0, host: '127.0.0.1' })}/webhooks/openai` : '' }
}

t.test('what has ended since is delivered as the event that was sent, and a second run does nothing', async t => {
  const now = unixTime()
  const server = await OpenAIServer.start(t, { pageSize: 2 })
  const { app, url } = await receiver(t)
  const client = clientOf(server)
  server.lists
    .set('/v1/batches', [
      batch('batch_1', 'completed', now - 10),
      batch('batch_2', 'failed', now - HOUR),
      batch('batch_3', 'expired', now - 2 * HOUR),
      batch('batch_4', 'cancelled', now - 3 * HOUR),
      batch('batch_on', 'in_progress', now - 3 * HOUR),
      // Made before, ended since.
      { ...batch('batch_5', 'completed', now - DAY + HOUR), created_at: now - 2 * DAY },
      batch('batch_old', 'completed', now - DAY - HOUR),
      ...Array.from({ length: 9 }, (_, i) => batch(`batch_older_${i}`, 'completed', now - (10 + i) * DAY))
    ])
    .set('/v1/fine_tuning/jobs', [
      { object: 'fine_tuning.job', id: 'ftjob-1', status: 'succeeded', created_at: now - 5 * DAY, finished_at: now - 20 },
      { object: 'fine_tuning.job', id: 'ftjob-2', status: 'running', created_at: now - 100, finished_at: null },
      { object: 'fine_tuning.job', id: 'ftjob-3', status: 'cancelled', created_at: now - 100, finished_at: null }
    ])
    .set('/v1/videos', [
      { object: 'video', id: 'video_1', status: 'completed', created_at: now - 400, completed_at: now - 30 },
      { object: 'video', id: 'video_2', status: 'failed', created_at: now - 400, completed_at: null }
    ])
    .set('/v1/agents/sessions', [
      { object: 'agent.session', id: 'sess_1', status: 'failed', created_at: now - 400, last_active_at: now - 40, environment: { type: 'openai_hosted', id: 'env_1' } },
      { object: 'agent.session', id: 'sess_2', status: 'failed', created_at: now - 400, last_active_at: now - 50, environment: { type: 'none' } },
      { object: 'agent.session', id: 'sess_3', status: 'failed', created_at: now - 400, last_active_at: now - 55 },
      { object: 'agent.session', id: 'sess_4', status: 'idle', created_at: now - 400, last_active_at: now - 50, environment: { type: 'none' } }
    ])
    .set('/v1/evals/eval_1/runs', [
      { object: 'eval.run', id: 'evalrun_1', status: 'completed', created_at: now - 60 },
      { object: 'eval.run', id: 'evalrun_2', status: 'canceled', created_at: now - 70 }
    ])
    .set('/v1/evals/eval_2/runs', [{ object: 'eval.run', id: 'evalrun_3', status: 'failed', created_at: now - 80 }])

  // What OpenAI delivered itself: its retry may come again.
  const own = sign(thin('batch.completed', { id: 'batch_1' }))
  t.equal((await post(app, own)).json().duplicate, undefined)

  const options: ReconcileOptions = { url, secret: SECRET, since: '1d', evals: ['eval_1', 'eval_2'] }
  const expected = [
    'batch.completed batch_5', 'batch.cancelled batch_4', 'batch.expired batch_3', 'batch.failed batch_2', 'video.failed video_2', 'fine_tuning.job.cancelled ftjob-3',
    'eval.run.failed evalrun_3', 'eval.run.canceled evalrun_2', 'eval.run.succeeded evalrun_1', 'agent.session.failed sess_3', 'agent.session.failed sess_2',
    'agent.session.failed sess_1', 'video.completed video_1', 'fine_tuning.job.succeeded ftjob-1', 'batch.completed batch_1'
  ]
  const named = ({ events }: ReconcileReport): string[] => events.map(({ type, id }) => `${type} ${id}`)

  const dry = await reconcile(client, { ...options, dryRun: true })
  t.same(named(dry), expected, 'oldest first')
  t.ok(dry.events.every(({ outcome }) => outcome === 'listed'))
  t.match(dry, { delivered: 0, duplicates: 0, failed: 0, skipped: [] })
  t.notOk(server.calls.some(call => call.includes('after=batch_older_3')), 'what is older than a batch may take is not read')

  const progress: ReconcileProgress[] = []
  const first = await reconcile(client, { ...options, onProgress: each => { progress.push(each) } })
  t.same(named(first), expected)
  t.match(first, { delivered: 14, duplicates: 1, failed: 0 })
  t.same(first.events.at(-1), { type: 'batch.completed', id: 'batch_1', webhookId: dry.events.at(-1)!.webhookId, endedAt: now - 10, outcome: 'duplicate', status: 200 })
  t.same(progress.filter(({ step }) => step === 'deliver').map(each => 'done' in each && each.done), expected.map((_, i) => i + 1))
  t.match(progress.filter(({ step }) => step === 'list').at(-1), { family: 'eval.run.*', found: 15 })

  const second = await reconcile(client, options)
  t.match(second, { delivered: 0, duplicates: 15, failed: 0 })
  t.same(second.events.map(({ webhookId }) => webhookId), first.events.map(({ webhookId }) => webhookId))
})

t.test('the event, as the receiver gets it', async t => {
  const now = unixTime()
  const server = await OpenAIServer.start(t)
  const app = await build(t)
  const got: unknown[] = []
  app.openaiWebhook.on('agent.session.failed', (event, { webhookId, timestamp }) => { got.push(event, webhookId, timestamp) })
  const url = `${await app.listen({ port: 0, host: '127.0.0.1' })}/webhooks/openai`
  server.lists.set('/v1/agents/sessions', [{ object: 'agent.session', id: 'sess_1', status: 'failed', created_at: now - 400, last_active_at: now - 40.5, environment: { type: 'openai_hosted', id: 'env_1' } }])
  await reconcile(clientOf(server), { url: new URL(url), secret: SECRET, since: new Date(Date.now() - HOUR * 1_000), types: ['agent.session.*'], evals: ['eval_1'] })
  t.notOk(JSON.stringify(server.calls).includes('eval'), 'runs of evals are listed where they are asked for')
  const [event, webhookId, timestamp] = got as [{ id: string }, string, number]
  t.same(event, { id: event.id, object: 'event', created_at: now - 41, type: 'agent.session.failed', data: { id: 'sess_1', environment_type: 'openai_hosted', environment_id: 'env_1' } })
  t.match(event.id, /^evt_reconciled_[0-9a-f]{32}$/)
  t.match(webhookId, /^wh_reconciled_[0-9a-f]{32}$/)
  t.ok(timestamp >= now, 'signed now')
  t.equal(server.requests.at(-1)!.headers['openai-beta'], 'agents=v1')
})

t.test('types select what is listed', async t => {
  const now = unixTime()
  const server = await OpenAIServer.start(t)
  const client = clientOf(server)
  server.lists.set('/v1/batches', [batch('batch_1', 'completed', now - 10), batch('batch_2', 'failed', now - 10)]).set('/v1/videos', [])
  const options = { url: 'https://example.com', since: Date.now() - 1_000_000, dryRun: true }
  t.same((await reconcile(client, { ...options, types: ['batch.failed', 'video.*'] })).events.map(({ id }) => id), ['batch_2'])
  t.same(server.calls.map(call => call.split('?')[0]), ['GET /v1/batches', 'GET /v1/videos'])

  // A project lacks some of it.
  const { events, skipped } = await reconcile(client, options)
  t.equal(events.length, 2)
  t.same(skipped, [{ family: 'fine_tuning.job.*', status: 404 }, { family: 'agent.session.*', status: 404 }])
  await t.rejects(reconcile(client, { ...options, types: ['fine_tuning.job.*'] }), { message: /^404 / }, 'what was asked for is not skipped')
  await t.rejects(reconcile(new OpenAI({ apiKey: 'sk-wrong', baseURL: server.url, maxRetries: 0 }), options), { message: /^401 / })
})

t.test('wrong options are told before anything is asked', async t => {
  const server = await OpenAIServer.start(t)
  const client = clientOf(server)
  const options: ReconcileOptions = { url: 'http://127.0.0.1:1/', secret: SECRET, since: '3d' }
  const wrong: Array<[Partial<Record<keyof ReconcileOptions, unknown>>, RegExp]> = [
    [{ url: 'example.com' }, /expected url/], [{ url: 'ftp://example.com' }, /expected url/], [{ url: 'https://a:b@example.com' }, /expected url/], [{ url: undefined }, /expected url/],
    [{ since: '3 days' }, /expected since/], [{ since: '3' }, /expected since/], [{ since: ' -3.5 ' }, /expected since/], [{ since: Date.now() + 60_000 }, /expected since/], [{ since: NaN }, /expected since/], [{ since: undefined }, /expected since/], [{ since: new Date('x') }, /expected since/],
    [{ types: ['response.completed'] }, /no list for "response\.completed"/], [{ types: ['batch.complete'] }, /did you mean "batch\.completed"/],
    [{ types: ['eval.run.*'] }, /expected evals/], [{ evals: ['../batches'] }, /expected evals/], [{ evals: [7] }, /expected evals/],
    [{ dryrun: true } as object, /unknown option "dryrun", did you mean "dryRun"\?/], [{ dryRun: 'yes' }, /expected dryRun/],
    [{ timeout: 0 }, /expected timeout/], [{ timeout: 2 ** 31 }, /expected timeout/], [{ timeout: 1.5 }, /expected timeout/]
  ]
  for (const [given, message] of wrong) {
    await t.rejects(reconcile(client, { ...options, ...given } as ReconcileOptions), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message })
  }
  for (const none of [undefined, null, 'sk-proj-1']) {
    await t.rejects(reconcile(none as never, options), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: /^reconcile\(\): expected a client of the openai package as the first argument, got / })
  }
  t.intercept(process, 'env', { value: {} })
  for (const secret of ['', 'sk-proj-1', undefined]) {
    await t.rejects(reconcile(client, { ...options, ...(secret === undefined ? { secret: secret as never } : { secret }) }), { code: 'FST_OPENAI_WEBHOOK_INVALID_SECRET' })
  }
  await t.rejects(reconcile(client, { url: options.url, since: '3d' }), { code: 'FST_OPENAI_WEBHOOK_INVALID_SECRET', message: /OPENAI_WEBHOOK_SECRET or as `secret`, got neither$/ })
  await t.rejects(reconcile(client, { url: options.url, since: 'soon' }), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS' }, 'whatever else is wrong is told first')
  await t.rejects(reconcile(client, { ...options, signal: AbortSignal.abort(new Error('enough')) }), { message: 'Request was aborted.' })
  t.same(server.calls, [])
})

t.test('times are taken as they are meant', async t => {
  const now = unixTime()
  const server = await OpenAIServer.start(t)
  server.lists.set('/v1/batches', [2, 90, 7_000, 90_000].map(ago => batch(`batch_${ago}`, 'completed', now - ago)))
  const since = async (since: ReconcileOptions['since']): Promise<number> => (await reconcile(clientOf(server), { url: '', since, types: ['batch.*'], dryRun: true })).events.length
  t.equal(await since('45s'), 1)
  t.equal(await since('60m'), 2)
  t.equal(await since('12h'), 3)
  t.equal(await since('2d'), 4)
  t.equal(await since(new Date((now - 3_600) * 1_000)), 2)
  t.equal(await since((now - 3_600) * 1_000), 2)
  t.equal(await since(new Date((now - 3_600) * 1_000).toISOString()), 2)
})

t.test('an answer that is not the API\'s is not taken for an empty list', async t => {
  const now = unixTime()
  const server = await OpenAIServer.start(t)
  const client = clientOf(server)
  const options = { url: 'https://example.com', since: '1d', dryRun: true }
  const page = (data: unknown, more = false): object => ({ object: 'list', data, has_more: more })
  const wrong: Array<object | string> = ['<html>', {}, page('x'), page([null]), page([{ id: 'batch_1' }]), page([{ id: 7, status: 'completed', created_at: now }]), page([{ id: 'x', status: 'completed', created_at: 'now' }])]
  for (const each of wrong) {
    server.resources.set('GET /v1/batches?limit=100', each)
    await t.rejects(reconcile(client, options), { code: 'FST_OPENAI_WEBHOOK_UNEXPECTED_LIST', message: /^GET \/batches / })
  }
  // A list that never ends
  server.resources.set('GET /v1/batches?limit=100', page([batch('batch_1', 'completed', now)], true))
  server.resources.set('GET /v1/batches?limit=100&after=batch_1', page([batch('batch_1', 'completed', now)], true))
  await t.rejects(reconcile(client, options), { code: 'FST_OPENAI_WEBHOOK_UNEXPECTED_LIST', message: /another page/ })
  server.resources.set('GET /v1/batches?limit=100&after=batch_1', page([], true))
  t.equal((await reconcile(client, { ...options, types: ['batch.*'] })).events.length, 1)
})

t.test('what the receiver refuses is in the report', async t => {
  const now = unixTime()
  const server = await OpenAIServer.start(t)
  const client = clientOf(server)
  server.lists.set('/v1/batches', [batch('batch_1', 'completed', now - 10)])
  const run = async (url: string, more: Partial<ReconcileOptions> = {}) => (await reconcile(client, { url, secret: SECRET, since: '1d', types: ['batch.*'], ...more })).events[0]

  const { app, url } = await receiver(t)
  t.match(await run(url, { secret: `whsec_${Buffer.alloc(32).toString('base64')}` }), { outcome: 'failed', status: 401, code: 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE' })
  t.match(await run(`${url}/elsewhere`), { outcome: 'failed', status: 404 })
  t.match(await run(url, { secret: 'text, not base64' }), { outcome: 'failed', status: 401 })
  await app.close()
  t.match(await run(url), { outcome: 'failed', code: 'ECONNREFUSED' })
  t.equal((await run(url))!.status, undefined)

  const answers = createServer((request, response) => {
    if (request.url === '/silent') return
    if (request.url === '/reset') return request.socket.destroy()
    if (request.url === '/moved') return response.writeHead(307, { location: '/long' }).end()
    if (request.url === '/empty') return response.writeHead(204).end()
    response.end(request.url === '/long' ? 'x'.repeat(300_000) : 'null')
  })
  await new Promise<void>(resolve => { answers.listen(0, '127.0.0.1', resolve) })
  t.teardown(() => { answers.closeAllConnections(); answers.close() })
  const at = `http://127.0.0.1:${(answers.address() as AddressInfo).port}`
  t.match(await run(`${at}/silent`, { timeout: 50 }), { outcome: 'failed', code: 'TIMEOUT' })
  t.match(await run(`${at}/reset`), { outcome: 'failed', code: /./ })
  t.match(await run(`${at}/moved`), { outcome: 'failed', status: 307 })
  t.match(await run(`${at}/empty`), { outcome: 'failed', status: 204 })
  t.match(await run(`${at}/long`), { outcome: 'delivered', status: 200 })
  t.match(await run(`${at}/null`), { outcome: 'delivered', status: 200 })
  // fetch refuses some ports by itself.
  t.match(await run('http://127.0.0.1:1/'), { outcome: 'failed', code: 'UNREACHABLE' })

  const abort = new AbortController()
  const stopped = run(`${at}/silent`, { signal: abort.signal, onProgress: ({ step }) => { if (step === 'list') setTimeout(() => abort.abort(new Error('enough')), 50) } })
  await t.rejects(stopped, { message: 'enough' })
})

// A day of lost deliveries

interface Setup {
  skip?: string | false
  make: (t: Test) => Promise<{ store: IdempotencyStore, runner?: Runner }> | { store: IdempotencyStore, runner?: Runner }
}

const SETUPS: Record<string, Setup> = {
  'memory, inline': { make: () => ({ store: memoryStore() }) },
  'sqlite, inline': { make: () => ({ store: sqliteStore(openSqlite(':memory:')) }) },
  'sqlite, durable': {
    make () {
      const db = openSqlite(':memory:')
      return { store: sqliteStore(db), runner: durable(db, { backoff: 20 }) }
    }
  },
  'redis, inline': {
    skip: redisMissing,
    make: async t => ({ store: redisStore(redisClient(t, (await RedisServer.start(t)).port)) })
  },
  'postgres, inline': {
    skip: postgresMissing,
    async make (t) {
      const pool = new Pool({ connectionString: (await PostgresServer.start(t)).url })
      t.teardown(() => pool.end())
      return { store: postgresStore(pool) }
    }
  }
}

for (const [name, { skip, make }] of Object.entries(SETUPS)) {
  if (skip !== undefined && !isLong) continue // needs a server
  t.test(`${name}: after a day of lost deliveries every handler has run exactly once`, { skip: skip ?? false }, async t => {
    const now = unixTime()
    const server = await OpenAIServer.start(t, { pageSize: 10 })
    const client = clientOf(server)
    const { store, runner } = await make(t)
    const { app, ran } = await receiver(t, { idempotency: { store, reconcile: true }, ...(runner && { runner }) }, false)
    // A second handler, which fails at first for some, so that they are half done.
    const attempted = new Set<string>()
    const succeeded = new Map<string, number>()
    app.openaiWebhook.onAny(event => {
      const of = `${event.type} ${(event.data as { id: string }).id}`
      if (of.endsWith('3') && !attempted.has(of)) {
        attempted.add(of)
        throw new Error('not yet')
      }
      succeeded.set(of, (succeeded.get(of) ?? 0) + 1)
    })
    await app.listen({ port: 0, host: '127.0.0.1' })
    const url = `http://127.0.0.1:${(app.server.address() as AddressInfo).port}/webhooks/openai`
    const statuses = ['completed', 'failed', 'expired', 'cancelled']
    const batches = Array.from({ length: 48 }, (_, i) => batch(`batch_${i}`, statuses[i % 4]!, now - 60 - i * 1_700))
    server.lists.set('/v1/batches', batches)
    server.lists.set('/v1/fine_tuning/jobs', Array.from({ length: 6 }, (_, i) => (
      { id: `ftjob-${i}`, object: 'fine_tuning.job', status: 'succeeded', created_at: now - 2 * DAY, finished_at: now - i * HOUR })))
    const all = [...batches.map(({ id, status }) => `batch.${String(status)} ${id}`), ...Array.from({ length: 6 }, (_, i) => `fine_tuning.job.succeeded ftjob-${i}`)]
    // What OpenAI sends, each with a webhook-id of its own, which its retries keep.
    const sent: Signed[] = all.map(each => {
      const [type, id] = each.split(' ') as [string, string]
      return sign(thin(type, { id }))
    })
    const isPut = (each: string): boolean => each.endsWith('3') && runner === undefined

    // A third arrived. Of the rest nothing did, for a day; then some retries come before the reconciling, and some of them twice.
    for (const [i, delivery] of sent.slice(0, 18).entries()) t.equal((await post(app, delivery)).statusCode, isPut(all[i]!) ? 500 : 200)
    for (const delivery of [...sent.slice(10, 28), ...sent.slice(24, 30)]) await post(app, redelivered(delivery))

    // Others come while it runs.
    const during = sent.slice(30, 42).map(async delivery => {
      for (let n = 0; (await post(app, redelivered(delivery))).statusCode !== 200; n++) if (n === 200) throw new Error('never 200')
    })
    const options: ReconcileOptions = { url, secret: SECRET, since: '36h', types: ['batch.*', 'fine_tuning.job.*'] }
    let report = await reconcile(client, options)
    await Promise.all(during)
    await until('nothing in progress', async () => (report = await reconcile(client, options)).failed === 0)
    await until('all to have run', () => succeeded.size === all.length)
    t.equal(report.events.length, all.length)

    // And the last ones afterwards.
    for (const delivery of sent) t.same((await post(app, redelivered(delivery))).statusCode, 200)
    t.match(await reconcile(client, options), { delivered: 0, duplicates: all.length, failed: 0 })
    const once = Object.fromEntries(all.sort().map(each => [each, 1]))
    t.same(Object.fromEntries([...ran].sort()), once, 'every handler has run exactly once')
    t.same(Object.fromEntries([...succeeded].sort()), once)
  })
}
