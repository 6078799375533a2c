import { createHmac } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'
import { LRUCache } from 'lru-cache'
import { Registry } from 'prom-client'
import t from 'tap'
import { background, channels, standardWebhooks, xOpenAISignature } from '../../lib/index.ts'
import type { MessageChannel, OpenAIWebhookOptions, RouteOverrides, TenantSecret } from '../../lib/index.ts'
import { webhookMetrics } from '../../lib/metrics.ts'
import { signedHeadersOf, verificationBy, verify } from '../../lib/pipeline/verify.ts'
import { NO_KEYS } from '../../lib/routes/tenants.ts'
import { durable, sqliteInbox } from '../../lib/sqlite/index.ts'
import { SECRET, build, outcome, post, sign, stoppedClock, thin } from '../support/deliveries.ts'
import type { Signed } from '../support/deliveries.ts'
import { until } from '../support/faults.ts'
import { capturedLog, codeOf, deferred, messageOf, listen } from '../support/observe.ts'
import { sized } from '../support/size.ts'
import { openSqlite } from '../support/sqlite.mjs'
import { keepsTenantsApart, secretOf, serving, signedBy, tenants, urlOf } from '../support/tenants.ts'

const REFUSED = '401 INVALID_SIGNATURE'
const RECEIVED = '200 {"received":true}'
const ENDPOINT = '/of/:tenant'
const MINUTE = 60_000
const TTL = 300_000

const deliver = async (app: FastifyInstance, tenant: string, delivery = signedBy(tenant)): Promise<string> => await outcome(app, delivery, urlOf(tenant))

/** A table of secrets that the test changes, and what was asked of it. */
function table (rows: Record<string, TenantSecret> = {}) {
  const asked: string[] = []
  const state = {
    rows,
    asked,
    /** What the database does before it answers. */
    answer: async (_tenant: string): Promise<void> => {},
    secret: async (tenant: string): Promise<TenantSecret> => {
      asked.push(tenant)
      await state.answer(tenant)
      return Object.hasOwn(state.rows, tenant) ? state.rows[tenant] : undefined
    }
  }
  return state
}

const rowsOf = (...names: string[]): Record<string, TenantSecret> => Object.fromEntries(names.map(name => [name, secretOf(name)]))

/** What `onError` was told: codes and tenants. */
function errorsOf (app: FastifyInstance): string[] {
  const told: string[] = []
  app.openaiWebhook.onError((error, { tenant }) => { told.push(`${(error as { code?: string }).code?.replace('FST_OPENAI_WEBHOOK_', '') ?? error.message} ${tenant ?? '-'}`) })
  return told
}

/** A turn of the event loop, after which a secret that was asked for in the background is there. */
const turn = async (): Promise<void> => await new Promise(resolve => { setImmediate(resolve) })

t.test('what handlerTimeout has refused is not told once more when the secret comes', async t => {
  const asked = deferred()
  const secret = deferred<string>()
  const app = await build(t, { path: false }, { handlerTimeout: 20 })
  const told: unknown[] = []
  app.openaiWebhook.onError(error => { told.push((error as { code?: string }).code) })
  app.openaiWebhook.route({ url: '/hooks/:tenant', tenant: { of: request => (request.params as { tenant: string }).tenant, secret: async () => { asked.resolve(); return await secret.promise } } })
  const { headers, body } = sign(thin('batch.failed'))
  await app.ready()
  const clock = stoppedClock(t)
  const answer = app.inject({ method: 'POST', url: '/hooks/acme', headers, payload: body })
  await asked.promise
  clock.advance(20)
  t.equal((await answer).statusCode, 503)
  secret.resolve(`whsec_${Buffer.alloc(32, 7).toString('base64')}`)
  for (let n = 0; n < 5; n++) await new Promise(resolve => setImmediate(resolve))
  t.same(told, ['FST_ERR_HANDLER_TIMEOUT'])
})

t.test('a route whose URL has a space shares no key with a tenant of another route', async t => {
  for (const reconcile of [false, true]) {
    const app = await build(t, { idempotency: { reconcile } })
    const ran: string[] = []
    app.openaiWebhook.on('batch.failed', (_event, { endpoint, tenant }) => { ran.push(`${endpoint}|${tenant}`) })
    app.openaiWebhook.route({ url: '/x', tenant: { of: () => 'y', secret: () => SECRET } })
    app.openaiWebhook.route({ url: '/x y' })
    app.openaiWebhook.route({ url: '/x y z' })
    app.openaiWebhook.route({ url: '/x z', tenant: { of: () => 'y', secret: () => SECRET } })
    const delivery = sign(thin('batch.failed', { id: 'batch_1' }))
    for (const url of ['/x', '/x%20y', '/x%20y%20z', '/x%20z']) t.equal(await outcome(app, delivery, url), RECEIVED)
    t.same(ran, ['/x|y', '/x y|undefined', '/x y z|undefined', '/x z|y'])
    t.equal(await outcome(app, delivery, '/x%20y'), '200 {"received":true,"duplicate":true}')
  }
})

t.test('a secret of one tenant never verifies for another', async t => {
  const names = ['acme', 'globex', 'initech', 'Acme', 'acme2']
  const sent = (secret: string): Signed => sign(thin('batch.failed'), { secret })
  let events = 0
  function byGuide (secret: string): Signed {
    const body = Buffer.from(JSON.stringify({ ...thin('batch.failed'), id: `evt_${++events}` }))
    const timestamp = String(Math.floor(Date.now() / 1000))
    return { headers: { 'content-type': 'application/json', 'x-openai-timestamp': timestamp, 'x-openai-signature': createHmac('sha256', secret).update(`${timestamp}.`).update(body).digest('hex') }, body }
  }
  const routes: Array<[string, (app: FastifyInstance) => void, (secret: string) => Signed]> = [
    ['route()', app => { app.openaiWebhook.route({ url: ENDPOINT, tenant: tenants(name => names.includes(name)) }) }, sent],
    ['a marked route', app => { app.post(ENDPOINT, { config: { openaiWebhook: { tenant: tenants(name => names.includes(name)) } } }, async () => {}) }, sent],
    ['the older guide\'s scheme', app => { app.openaiWebhook.route({ url: ENDPOINT, verifier: xOpenAISignature(), tenant: tenants(name => names.includes(name)) }) }, byGuide]
  ]
  for (const [label, declare, signed] of routes) {
    const app = await build(t, { path: false })
    declare(app)
    for (const round of ['asked for', 'kept']) {
      const passed: string[] = []
      for (const by of [...names, 'unknown']) {
        for (const to of [...names, 'unknown']) {
          const answer = await deliver(app, to, signed(secretOf(by)))
          if (answer !== REFUSED) passed.push(`${by} to ${to}: ${answer}`)
        }
      }
      t.same(passed, names.map(name => `${name} to ${name}: ${RECEIVED}`), `${label}, ${round}`)
    }
    t.equal(await deliver(app, 'acme', signed(SECRET)), REFUSED, `${label}: nor the plugin's own`)
  }
})

t.test('a delivery of one tenant is no duplicate of another\'s with the same webhook-id', async t => {
  const app = await serving(t, tenants(() => true))
  const ran: unknown[] = []
  app.openaiWebhook.on('batch.failed', (_event, { tenant, request }) => { ran.push([tenant, request!.openaiWebhook.tenant]) })
  t.equal(await deliver(app, 'acme', signedBy('acme', { webhookId: 'wh_1' })), RECEIVED)
  t.equal(await deliver(app, 'globex', signedBy('globex', { webhookId: 'wh_1' })), RECEIVED)
  t.equal(await deliver(app, 'acme', signedBy('acme', { webhookId: 'wh_1' })), '200 {"received":true,"duplicate":true}')
  t.same(ran, [['acme', 'acme'], ['globex', 'globex']])
})

t.test('each runner carries the tenant', async t => {
  await t.test('inline()', async t => await keepsTenantsApart(t, {}, false))
  await t.test('background()', async t => {
    const app = await serving(t, tenants(() => true), { runner: background() })
    const { promise, resolve } = deferred<string | undefined>()
    app.openaiWebhook.onDead(({ tenant }) => { resolve(tenant) })
    app.openaiWebhook.on('batch.failed', () => { throw new Error('no') })
    t.equal(await deliver(app, 'acme'), RECEIVED)
    t.equal(await promise, 'acme')
  })
  await t.test('durable()', async t => await keepsTenantsApart(t, { runner: durable(openSqlite(':memory:'), { attempts: 1 }) }))
})

t.test('an inbox keeps tenants apart', async t => {
  const db = openSqlite(':memory:')
  const app = await serving(t, tenants(() => true), { idempotency: false })
  const ran: unknown[] = []
  app.openaiWebhook.on('batch.failed', sqliteInbox(db).once('settle', (_tx, _event, { tenant }) => { ran.push(tenant) }))
  for (const tenant of ['acme', 'globex', 'acme']) t.equal(await deliver(app, tenant, signedBy(tenant, { webhookId: 'wh_1' })), RECEIVED)
  t.same(ran, ['acme', 'globex'])
  t.same((db.prepare('SELECT tenant FROM openai_webhook_inbox ORDER BY tenant').all() as Array<{ tenant: string }>).map(({ tenant }) => tenant), ['acme', 'globex'])
})

t.test('the tenant is in log lines and channels, never in metrics', async t => {
  const log = capturedLog()
  const register = new Registry()
  const metrics = webhookMetrics({ register })
  t.teardown(() => metrics.close())
  const seen: Record<string, unknown[]> = {}
  const observe = (name: string, channel: MessageChannel<any>): void => {
    const listener = (message: { tenant?: string, delivery?: { tenant?: string } }): void => { (seen[name] ??= []).push((message.delivery ?? message).tenant) }
    channel.subscribe(listener)
    t.teardown(() => channel.unsubscribe(listener))
  }
  for (const name of ['verified', 'refused', 'duplicate', 'unhandled', 'dead'] as const) observe(name, channels[name])
  for (const name of ['enqueue', 'delivery', 'handler'] as const) observe(name, channels[name].start)

  const app = await build(t, { path: false, runner: durable(openSqlite(':memory:'), { attempts: 1 }) }, { logger: log.logger })
  app.openaiWebhook.route({
    url: ENDPOINT,
    tenant: tenants(name => name === 'acme-corp'),
    on: {
      'batch.failed': (_event, { log }) => {
        log.info('from the handler')
        throw new Error('no')
      }
    }
  })
  const errors = errorsOf(app)
  await app.listen({ port: 0, host: '127.0.0.1' })
  t.equal(await deliver(app, 'acme-corp', signedBy('acme-corp', { webhookId: 'wh_1' })), RECEIVED)
  await until('it is dead', () => seen['dead'] !== undefined)
  t.equal(await deliver(app, 'acme-corp', signedBy('acme-corp', { webhookId: 'wh_2', type: 'batch.completed' })), RECEIVED)
  await until('it is unhandled', () => seen['unhandled'] !== undefined)
  t.equal(await deliver(app, 'acme-corp', signedBy('acme-corp', { webhookId: 'wh_2', type: 'batch.completed' })), '200 {"received":true,"duplicate":true}')
  t.equal(await deliver(app, 'acme-corp', signedBy('globex')), REFUSED)
  t.equal(await deliver(app, 'initech-inc'), REFUSED)

  const own = 'acme-corp'
  t.same(seen, {
    verified: [own, own, own], refused: [own, 'initech-inc'], duplicate: [own], unhandled: [own], dead: [own], enqueue: [own, own, own].slice(0, seen['enqueue']!.length), delivery: [own, own], handler: [own]
  })
  t.same(errors, ['HANDLER_FAILED acme-corp', 'INVALID_SIGNATURE acme-corp', 'UNKNOWN_TENANT initech-inc'])
  const lines = log.lines.filter(({ endpoint }) => endpoint === ENDPOINT).map(({ msg, tenant, code }) => [msg, tenant, code])
  t.same(lines.filter(([msg]) => msg === 'from the handler' || msg === 'webhook delivery is dead' || msg === 'webhook delivery refused'), [
    ['from the handler', own, undefined],
    ['webhook delivery is dead', own, undefined],
    ['webhook delivery refused', own, 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE'],
    ['webhook delivery refused', 'initech-inc', 'FST_OPENAI_WEBHOOK_UNKNOWN_TENANT']
  ])
  t.ok(lines.every(([, tenant]) => tenant !== undefined), 'no line about a delivery lacks it')

  const text = await register.metrics()
  t.match(text, /code="FST_OPENAI_WEBHOOK_UNKNOWN_TENANT"[^\n]* 1\n/)
  t.notMatch(text, /acme-corp|initech-inc/)
})

t.test('a delivery that fails, or ends too late, tells its tenant', async t => {
  const log = capturedLog()
  const app = await serving(t, tenants(() => true), { deadline: 50 }, { logger: log.logger })
  const errors = errorsOf(app)
  const { promise, reject } = deferred()
  app.openaiWebhook.on('batch.failed', () => { throw new Error('no') })
  app.openaiWebhook.on('batch.completed', async () => await promise)
  await listen(app)
  t.equal(await deliver(app, 'acme'), '500 HANDLER_FAILED')
  t.equal(await deliver(app, 'acme', signedBy('acme', { type: 'batch.completed' })), '503 DEADLINE')
  reject(new Error('in the end'))
  await turn()
  t.same(errors, ['HANDLER_FAILED acme', 'DEADLINE acme', 'HANDLER_FAILED acme'])
  t.same(log.lines.filter(({ webhookId }) => webhookId !== undefined).map(({ tenant }) => tenant), ['acme', 'acme', 'acme'])
})

t.test('an unknown tenant is answered as a wrong signature is', async t => {
  const log = capturedLog()
  const app = await serving(t, tenants(name => name === 'acme'), {}, { logger: log.logger })
  const handled: unknown[] = []
  app.setErrorHandler((error: Error & { code: string }, _request, reply) => {
    handled.push(error.code, error.cause)
    return reply.send(error)
  })
  const [unknown, wrong] = await Promise.all([post(app, signedBy('x'), urlOf('nobody')), post(app, signedBy('x'), urlOf('acme'))])
  t.equal(unknown.body, wrong.body)
  const { date, ...headers } = unknown.headers
  const { date: at, ...others } = wrong.headers
  t.same(headers, others)
  t.same(handled, ['FST_OPENAI_WEBHOOK_INVALID_SIGNATURE', undefined, 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE', undefined])
  const line = log.lines.find(({ code }) => code === 'FST_OPENAI_WEBHOOK_UNKNOWN_TENANT')
  t.match(line, { msg: 'webhook delivery refused', tenant: 'nobody', statusCode: 401, fix: /tenant\.of/ })
})

t.test('`of` names a tenant by 1 to 256 visible ASCII characters', async t => {
  const rejecting = async (): Promise<never> => { throw new Error('no such database') }
  const named: Array<[unknown, string]> = [
    ['a', RECEIVED], ['~'.repeat(256), RECEIVED], ['a:b/c?"', RECEIVED],
    ['', REFUSED], ['a'.repeat(257), REFUSED], ['a b', REFUSED], ['a\n', REFUSED], ['\x7f', REFUSED], ['é', REFUSED],
    [undefined, REFUSED], [null, REFUSED], [7, REFUSED], [['a'], REFUSED], [Promise.resolve('a'), REFUSED], [rejecting, REFUSED], [{ toString: () => 'a' }, REFUSED]
  ]
  const asked: string[] = []
  let name: unknown
  const app = await serving(t, {
    of: () => (name === rejecting ? rejecting() : name) as string,
    secret: tenant => {
      asked.push(tenant)
      return SECRET
    }
  })
  const errors = errorsOf(app)
  for (const [given, answer] of named) {
    name = given
    t.equal(await deliver(app, 'any', sign(thin('batch.failed'))), answer, String(given))
  }
  t.same(asked, named.filter(([, answer]) => answer === RECEIVED).map(([given]) => given), 'nothing else reaches `secret`')
  t.same(errors, named.filter(([, answer]) => answer === REFUSED).map(() => 'UNKNOWN_TENANT -'))

  const log = capturedLog()
  const throwing = await serving(t, { of: () => { throw new Error('no header') }, secret: () => SECRET }, {}, { logger: log.logger })
  const causes: unknown[] = []
  throwing.openaiWebhook.onError(({ cause }) => { causes.push((cause as Error).message) })
  t.equal(await deliver(throwing, 'any', sign(thin('batch.failed'))), REFUSED)
  t.same(causes, ['no header'])
  t.match(log.errors(), [{ msg: 'tenant.of failed, and the delivery was refused', endpoint: ENDPOINT, code: 'FST_OPENAI_WEBHOOK_UNKNOWN_TENANT', err: { message: 'no header' } }])
})

t.test('the route itself has no keys, so what went by those would verify nothing', async t => {
  const { headers, body } = signedBy('acme')
  const verification = verificationBy(standardWebhooks(), NO_KEYS, 300)
  t.match(verify(verification, { headers, rawBody: body }, signedHeadersOf(verification, headers)), { code: 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE' })
})

t.test('a delivery that its headers condemn names no tenant', async t => {
  const app = await serving(t, { of: () => t.fail('called') as never, secret: () => t.fail('called') as never })
  t.equal(await deliver(app, 'acme', signedBy('acme', { timestamp: 1 })), '401 TIMESTAMP_OUT_OF_TOLERANCE')
})

t.test('options', async t => {
  const tenant = tenants(() => true)
  const wrong: Array<[RouteOverrides | { tenant: unknown }, string]> = [
    [{ tenant, secret: SECRET }, 'expected `tenant` or `secret`, got both: with tenants, tenant.secret gives the secret of each'],
    [{ tenant: 'acme' }, 'expected tenant to be an object { of, secret, ttl, max }, got "acme"'],
    [{ tenant: { secret: tenant.secret } }, 'expected tenant.of to be a function of the request, got nothing'],
    [{ tenant: { of: tenant.of } }, 'expected tenant.secret to be a function of the tenant, got nothing'],
    [{ tenant: { ...tenant, of: 'params' } }, 'expected tenant.of to be a function of the request, got "params"'],
    [{ tenant: { ...tenant, secret: SECRET } }, 'expected tenant.secret to be a function of the tenant, got a string'],
    [{ tenant: { ...tenant, ttl: 0 } }, 'expected tenant.ttl to be a whole number of ms, 1 or more, got 0'],
    [{ tenant: { ...tenant, max: 1e9 } }, 'expected tenant.max to be a whole number of tenants, 1 to 10000000, got 1000000000'],
    [{ tenant: { ...tenant, tll: 1 } }, 'unknown option "tenant.tll", did you mean "ttl"?']
  ]
  const app = await build(t, { path: false })
  for (const [options, message] of wrong) {
    t.equal(await messageOf(() => app.openaiWebhook.route({ url: '/x', ...options } as never)), message)
    t.equal(await messageOf(() => app.post('/y', { config: { openaiWebhook: options as RouteOverrides } }, async () => {})), message, 'of a marked route')
  }
  t.equal(await codeOf(() => app.openaiWebhook.route({ url: '/x', tenant, secret: SECRET })), 'INVALID_OPTIONS')
  const misplaced = 'unknown option "tenant": it is an option of a route, as in app.openaiWebhook.route({ url, tenant }); unwrap() takes the `secret` of the tenant whose delivery it is'
  t.equal(await messageOf(() => app.openaiWebhook.unwrap('', {}, { tenant } as never)), misplaced)
  t.equal(await messageOf(async () => { await build(t, { tenant } as OpenAIWebhookOptions) }), misplaced)
})

t.test('a route with tenants needs no secret of the plugin\'s', async t => {
  const before = process.env['OPENAI_WEBHOOK_SECRET']
  delete process.env['OPENAI_WEBHOOK_SECRET']
  t.teardown(() => { if (before !== undefined) process.env['OPENAI_WEBHOOK_SECRET'] = before })
  const app = await serving(t, tenants(() => true), { secret: undefined } as never)
  t.equal(await deliver(app, 'acme'), RECEIVED)
})

t.test('a secret is asked for once and kept', async t => {
  const { asked, secret, rows } = table(rowsOf('acme', 'globex'))
  const app = await serving(t, tenants(() => true, { secret }))
  await app.ready()
  t.same(asked, [], 'nothing at boot')
  t.same(await Promise.all([deliver(app, 'acme'), deliver(app, 'acme'), deliver(app, 'globex')]), [RECEIVED, RECEIVED, RECEIVED])
  t.same(asked, ['acme', 'globex'], 'what comes meanwhile waits for the same answer')
  rows['acme'] = [secretOf('old'), secretOf('acme')]
  t.equal(await deliver(app, 'acme'), RECEIVED)
  t.same(asked.length, 2)
})

t.test('`max` tenants are kept: the one that was not used for longest goes', async t => {
  const { asked, secret } = table(rowsOf('a', 'b', 'c'))
  const app = await serving(t, tenants(() => true, { secret, max: 2 }))
  for (const name of ['a', 'b', 'a', 'c', 'a', 'b']) t.equal(await deliver(app, name), RECEIVED)
  t.same(asked, ['a', 'b', 'c', 'b'])
})

t.test('past `ttl` the kept secret serves while it is asked for again', async t => {
  const db = table(rowsOf('acme'))
  const log = capturedLog()
  const app = await serving(t, tenants(() => true, { secret: db.secret }), {}, { logger: log.logger })
  const errors = errorsOf(app)
  await app.ready()
  const clock = stoppedClock(t)
  t.equal(await deliver(app, 'acme'), RECEIVED)
  clock.advance(TTL - 1)
  t.equal(await deliver(app, 'acme'), RECEIVED)
  t.equal(db.asked.length, 1)

  const slow = deferred()
  db.answer = async () => await slow.promise
  clock.advance(1)
  t.equal(await deliver(app, 'acme'), RECEIVED, 'nobody waits for it')
  t.equal(await deliver(app, 'acme'), RECEIVED)
  t.equal(db.asked.length, 2, 'and it is asked for once')
  db.rows['acme'] = secretOf('acme', 1)
  slow.resolve()
  await turn()
  t.equal(await deliver(app, 'acme', signedBy('acme', { secret: secretOf('acme', 1) })), RECEIVED, 'the new one has taken its place')
  t.equal(await deliver(app, 'acme'), REFUSED)

  // A database that is down: it serves on, and is tried again within the minute.
  db.answer = async () => { throw new Error('database down') }
  clock.advance(TTL)
  for (let nth = 0; nth < 3; nth++) t.equal(await deliver(app, 'acme', signedBy('acme', { secret: secretOf('acme', 1) })), RECEIVED)
  await turn()
  t.equal(db.asked.length, 3)
  t.same(errors.slice(1), ['database down acme'])
  t.match(log.lines.find(({ msg }) => msg === 'webhook trouble'), { tenant: 'acme', endpoint: ENDPOINT, err: { message: 'database down' } })
  clock.advance(MINUTE)
  t.equal(await deliver(app, 'acme', signedBy('acme', { secret: secretOf('acme', 1) })), RECEIVED)
  t.equal(db.asked.length, 4)

  // A tenant that is no more.
  delete db.rows['acme']
  db.answer = async () => {}
  await turn()
  clock.advance(MINUTE)
  await deliver(app, 'acme', signedBy('acme', { secret: secretOf('acme', 1) }))
  await turn()
  t.equal(await deliver(app, 'acme', signedBy('acme', { secret: secretOf('acme', 1) })), REFUSED)
  t.equal(errors.at(-1), 'UNKNOWN_TENANT acme')
})

t.test('rotation heals itself: a secret is asked for again when no signature matches, once a minute a tenant', async t => {
  const db = table(rowsOf('acme', 'globex'))
  const app = await serving(t, tenants(() => true, { secret: db.secret }))
  await app.ready()
  const clock = stoppedClock(t)
  for (const name of ['acme', 'globex']) t.equal(await deliver(app, name), RECEIVED)
  const rotated = (): Signed => signedBy('acme', { secret: secretOf('acme', 1) })
  db.rows['acme'] = [secretOf('acme', 1), secretOf('acme')]
  clock.advance(MINUTE - 1)
  t.equal(await deliver(app, 'acme', rotated()), REFUSED, 'not within a minute')
  clock.advance(1)
  t.same(await Promise.all([deliver(app, 'acme', rotated()), deliver(app, 'acme', rotated()), deliver(app, 'acme')]), [RECEIVED, RECEIVED, RECEIVED])
  t.same(db.asked, ['acme', 'globex', 'acme'], 'asked once for all')

  // A flood of forgeries for one tenant.
  for (let nth = 0; nth < 50; nth++) t.equal(await deliver(app, 'acme', signedBy('x')), REFUSED)
  t.equal(db.asked.length, 3)
  clock.advance(MINUTE)
  for (let nth = 0; nth < 50; nth++) t.equal(await deliver(app, 'acme', signedBy('x')), REFUSED)
  t.same(db.asked.slice(3), ['acme'])
  t.equal(await deliver(app, 'globex', signedBy('x')), REFUSED)
  t.same(db.asked.slice(4), ['globex'], 'each tenant has a minute of its own')

  // A question that fails leaves the kept secret in place.
  db.answer = async () => { throw new Error('down') }
  clock.advance(MINUTE)
  t.equal(await deliver(app, 'acme', signedBy('x')), REFUSED)
  t.equal(await deliver(app, 'acme'), RECEIVED)
})

t.test('a clock that is set forward or back asks for nothing and stops nothing', async t => {
  const db = table(rowsOf('acme'))
  const app = await serving(t, tenants(() => true, { secret: db.secret }))
  await app.ready()
  const clock = stoppedClock(t)
  t.equal(await deliver(app, 'acme'), RECEIVED)
  t.equal(await deliver(app, 'nobody'), REFUSED)
  // The wall clock alone, as NTP or a person sets it.
  const { now } = Date
  for (const hours of [24, -24]) {
    Date.now = () => now() + hours * 60 * MINUTE
    t.equal(await deliver(app, 'acme'), RECEIVED)
    t.equal(await deliver(app, 'acme', signedBy('x')), REFUSED)
    t.equal(await deliver(app, 'nobody'), REFUSED)
    t.same(db.asked, ['acme', 'nobody'])
  }
  clock.advance(MINUTE)
  t.equal(await deliver(app, 'acme', signedBy('x')), REFUSED)
  t.equal(await deliver(app, 'nobody'), REFUSED)
  t.same(db.asked.slice(2), ['acme', 'nobody'])
  Date.now = now
})

t.test('a database that is down is a 503 for tenants that are not kept, and nothing to those that are', async t => {
  const db = table({ ...rowsOf('acme', 'globex'), empty: '', key: 'sk-proj-1', list: [], number: 7 as never, gone: null })
  const log = capturedLog()
  const app = await serving(t, tenants(() => true, { secret: db.secret }), { deadline: 100 }, { logger: log.logger })
  const errors = errorsOf(app)
  t.equal(await deliver(app, 'acme'), RECEIVED)
  db.answer = async () => { throw new Error('database down') }
  const { statusCode, headers, body } = await post(app, signedBy('globex'), urlOf('globex'))
  t.same([statusCode, headers['retry-after']], [503, '5'])
  t.notMatch(body, /database/)
  t.equal(await deliver(app, 'acme'), RECEIVED)
  t.same(errors, ['UNAVAILABLE globex'])
  t.match(log.errors()[0], { code: 'FST_OPENAI_WEBHOOK_UNAVAILABLE', tenant: 'globex', endpoint: ENDPOINT, err: { message: 'database down' } })

  db.answer = async tenant => { if (tenant === 'globex') await new Promise(() => {}) }
  t.equal(await deliver(app, 'globex'), '503 UNAVAILABLE', 'one that hangs')
  t.ok(log.errors().some(({ err }) => err!.message.startsWith('the `tenant.secret` function took more than ')))
  db.answer = async () => {}
  t.equal(await deliver(app, 'globex'), RECEIVED, 'and is asked again by the retry')
  for (const name of ['empty', 'key', 'list', 'number']) t.equal(await deliver(app, name), '503 UNAVAILABLE', name)
  t.equal(await deliver(app, 'gone'), REFUSED, 'null is no tenant')
  t.ok(log.errors().every(({ err }) => !JSON.stringify(err).includes('sk-proj-1')))
})

t.test('failures before it is known who sends fill no disk', async t => {
  const log = capturedLog()
  const db = table()
  db.answer = async () => { throw new Error('database down') }
  const app = await serving(t, tenants(() => true, { secret: db.secret }), {}, { logger: log.logger })
  for (let nth = 0; nth < 20; nth++) t.equal(await deliver(app, `invented-${nth}`), '503 UNAVAILABLE')
  t.equal(log.errors().filter(({ code }) => code === 'FST_OPENAI_WEBHOOK_UNAVAILABLE').length, 5)
})

t.test('tenants that are invented', async t => {
  t.test('are looked up 16 at once and 100 a second, whatever comes', async t => {
    const db = table(rowsOf('acme', 'late'))
    const app = await serving(t, tenants(() => true, { secret: db.secret }))
    await app.ready()
    const clock = stoppedClock(t)
    t.equal(await deliver(app, 'acme'), RECEIVED)
    db.asked.length = 0

    const slow = deferred()
    db.answer = async () => await slow.promise
    const flood = Array.from({ length: 40 }, async (_, nth) => await deliver(app, `at-once-${nth}`))
    await until('they wait', () => db.asked.length === 16)
    t.equal(await deliver(app, 'acme'), RECEIVED, 'a kept one does not')
    t.equal(await deliver(app, 'late'), '503 OVERLOADED', 'a new one comes again')
    slow.resolve()
    const answers = await Promise.all(flood)
    t.same([REFUSED, '503 OVERLOADED'].map(answer => answers.filter(each => each === answer).length), [16, 24])
    t.equal(db.asked.length, 16)

    clock.advance(1_000)
    db.asked.length = 0
    for (let nth = 0; nth < 150; nth++) t.equal(await deliver(app, `in-turn-${nth}`), nth < 100 ? REFUSED : '503 OVERLOADED')
    t.equal(db.asked.length, 100)
    clock.advance(999)
    t.equal(await deliver(app, 'late'), '503 OVERLOADED')
    clock.advance(1)
    t.equal(await deliver(app, 'late'), RECEIVED)
  })

  t.test('are remembered for 10 s', async t => {
    const db = table()
    const app = await serving(t, tenants(() => true, { secret: db.secret }))
    await app.ready()
    const clock = stoppedClock(t)
    t.equal(await deliver(app, 'acme'), REFUSED)
    db.rows['acme'] = secretOf('acme')
    clock.advance(9_999)
    t.equal(await deliver(app, 'acme'), REFUSED)
    t.equal(db.asked.length, 1)
    clock.advance(1)
    t.equal(await deliver(app, 'acme'), RECEIVED)
  })

  t.test('neither evict a known one nor take its slots', async t => {
    const known = Array.from({ length: 20 }, (_, nth) => `known-${nth}`)
    const db = table(rowsOf(...known))
    const app = await serving(t, tenants(() => true, { secret: db.secret, max: 20 }))
    await app.ready()
    const clock = stoppedClock(t)
    for (const name of known) t.equal(await deliver(app, name), RECEIVED)
    const SECONDS = sized(3, 30)
    for (let second = 0; second < SECONDS; second++) {
      clock.advance(1_000)
      for (let nth = 0; nth < 100; nth++) await deliver(app, `invented-${second}-${nth}`)
    }
    t.equal(db.asked.length, 20 + SECONDS * 100)
    for (const name of known) t.equal(await deliver(app, name), RECEIVED)
    t.equal(db.asked.length, 20 + SECONDS * 100, 'none was forgotten')

    // Every slot for new tenants is taken: known ones are asked for again all the same, 16 at once.
    clock.advance(TTL)
    db.asked.length = 0
    const slow = deferred()
    db.answer = async () => await slow.promise
    const flood = Array.from({ length: 16 }, async (_, nth) => await deliver(app, `slow-${nth}`))
    await until('they wait', () => db.asked.length === 16)
    for (const name of known) t.equal(await deliver(app, name), RECEIVED)
    t.equal(db.asked.length, 32)
    t.equal(await deliver(app, known[19]!, signedBy('x')), REFUSED, 'nobody waits for a slot')
    slow.resolve()
    await Promise.all(flood)
    await turn()
    for (const name of known) t.equal(await deliver(app, name), RECEIVED)
    t.equal(db.asked.length, 36, 'the others get theirs then')
  })

  t.test('do not slow the real ones', async t => {
    const db = table(rowsOf('acme'))
    // A database that takes its time.
    db.answer = async () => { await sleep(20) }
    const app = await listen(await serving(t, tenants(() => true, { secret: db.secret })))
    const { port } = app.server.address() as { port: number }
    const sent = async (tenant: string, delivery = signedBy(tenant)): Promise<number> => {
      const { headers, body } = delivery
      const response = await fetch(`http://127.0.0.1:${port}${urlOf(tenant)}`, { method: 'POST', headers, body: new Uint8Array(body) })
      await response.arrayBuffer()
      return response.status
    }
    /** The answers to a real tenant, and to 20 connections of strangers meanwhile. */
    async function among (stranger: () => Promise<number>): Promise<{ p99: number, answers: number[], strangers: number[], seconds: number }> {
      const over = new AbortController()
      const strangers: number[] = []
      const start = performance.now()
      const flood = Array.from({ length: 20 }, async () => { while (!over.signal.aborted) strangers.push(await stranger()) })
      const answers: number[] = []
      const latencies: number[] = []
      for (let nth = 0; nth < sized(8, 300); nth++) {
        const sentAt = performance.now()
        answers.push(await sent('acme'))
        latencies.push(performance.now() - sentAt)
      }
      over.abort()
      await Promise.all(flood)
      return { p99: latencies.sort((a, b) => a - b)[Math.ceil(latencies.length * 0.99) - 1]!, answers, strangers, seconds: (performance.now() - start) / 1_000 }
    }
    let names = 0
    await sent('acme')
    db.asked.length = 0
    const forged = signedBy('acme', { secret: SECRET })
    const before = await among(async () => await sent('acme', forged))
    const { p99, answers, strangers, seconds } = await among(async () => await sent(`invented-${names++}`, forged))
    t.same(new Set([...before.answers, ...answers]), new Set([200]), 'a real tenant is answered 200, always')
    t.same(strangers.filter(status => status !== 401 && status !== 503), [])
    t.notOk(db.asked.includes('acme'), 'and not asked for')
    t.ok(db.asked.length <= 100 * (seconds + 1), `${db.asked.length} of ${names} looked up`)
    t.comment(`p99 of a real tenant: ${before.p99.toFixed(1)} ms among forgeries, ${p99.toFixed(1)} ms among ${Math.round(names / seconds)} invented tenants a second, ${db.asked.length} of ${names} looked up`)
  })

  t.test('leave no memory behind', async t => {
    const sizes: number[] = []
    const { set } = LRUCache.prototype
    LRUCache.prototype.set = function (this: LRUCache<object, object>, ...args: Parameters<typeof set>) {
      const result = set.apply(this, args)
      sizes.push(this.size)
      return result
    } as typeof set
    t.teardown(() => { LRUCache.prototype.set = set })
    const app = await serving(t, tenants(name => name === 'acme'))
    await app.ready()
    const clock = stoppedClock(t)
    for (let second = 0; second < 12; second++) {
      clock.advance(1_000)
      for (let nth = 0; nth < 100; nth++) await deliver(app, `invented-${second}-${nth}`)
    }
    t.equal(sizes.length, 1_200)
    t.equal(Math.max(...sizes), 1_000)
  })
})

t.test('why a tenant\'s signature does not match is explained with its own secret', async t => {
  const log = capturedLog()
  const app = await serving(t, tenants(() => true), {}, { logger: { ...(log.logger as object), level: 'debug' } })
  const delivery = signedBy('acme')
  t.equal(await deliver(app, 'acme', { ...delivery, body: Buffer.from(`${delivery.body.toString()}\n`) }), REFUSED)
  await until('it is explained', () => log.lines.some(({ msg }) => msg.startsWith('the signature does not match')))
  t.match(log.lines.find(({ msg }) => msg.startsWith('the signature does not match')), { endpoint: ENDPOINT, cause: String })
})
