import { createServer, request as httpRequest } from 'node:http'
import { connect as connectHttp2 } from 'node:http2'
import { connect } from 'node:net'
import type { AddressInfo } from 'node:net'
import { text } from 'node:stream/consumers'
import { mkdtempSync, readFileSync, rmSync, statSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import Fastify from 'fastify'
import type { FastifyInstance, FastifyRequest, FastifyServerOptions } from 'fastify'
import Database from 'libsql'
import t from 'tap'
import { Type } from '@sinclair/typebox'
import openaiWebhook, { xOpenAISignature } from '../../lib/index.ts'
import type { Verifier } from '../../lib/index.ts'
import inspector from '../../lib/inspector/index.ts'
import type { InspectorOptions } from '../../lib/inspector/index.ts'
import { durable } from '../../lib/sqlite/index.ts'
import { deliver, forge } from '../../lib/testing/index.ts'
import { standardWebhooks } from '../../lib/verifiers/standard-webhooks.ts'
import { SECRET, build, post, sign, thin } from '../support/deliveries.ts'
import { act, detailOf, inspected, rowsOf } from '../support/inspector.ts'
import { capturedLog, codeOf, messageOf } from '../support/observe.ts'
import { Wire, listen, request } from '../support/wire.ts'

const PAGE = '/openai-webhook'
const REFUSED = 'FST_OPENAI_WEBHOOK_INSPECTOR_REFUSED'

async function until (holds: () => boolean | Promise<boolean>): Promise<void> {
  while (!await holds()) await new Promise(resolve => setImmediate(resolve))
}

function production (t: { teardown: (fn: () => unknown) => void }): void {
  const before = process.env['NODE_ENV']
  process.env['NODE_ENV'] = 'production'
  t.teardown(() => {
    if (before === undefined) delete process.env['NODE_ENV']
    else process.env['NODE_ENV'] = before
  })
}

const allow: NonNullable<InspectorOptions['onRequest']> = (_request, _reply, done) => { done() }

t.test('wrong options are told at boot', async t => {
  const wrong: Array<[object, RegExp]> = [
    [{ paht: '/x' }, /unknown option "paht", did you mean "path"/],
    ...['auth', 'authenticate', 'authentication', 'preHandler'].map((name): [object, RegExp] => [{ [name]: allow }, new RegExp(`unknown option "${name}", did you mean "onRequest"\\?`)]),
    [{ path: 'x' }, /expected path to be a path.*, got "x"$/],
    [{ path: '/x/' }, /expected path.*, got "\/x\/"$/],
    [{ path: '/:x' }, /expected path/],
    [{ path: 'a longer one than is told' }, /expected path.*, got a string$/],
    [{ path: 'whsec_x' }, /expected path.*, got a string$/],
    [{ path: 5 }, /expected path.*, got 5$/],
    [{ onRequest: [] }, /expected onRequest.*, got an array$/],
    [{ onRequest: [5] }, /expected onRequest/],
    [{ onRequest: null }, /expected onRequest.*, got null$/],
    [{ onRequest: true }, /expected onRequest.*, got true$/],
    [{ readOnly: 'yes' }, /expected readOnly.*, got "yes"$/],
    [{ max: 0 }, /expected max.*, got 0$/],
    [{ max: 10_001 }, /expected max/],
    [{ redact: {} }, /expected redact.*, got a value of type object$/]
  ]
  for (const [options, message] of wrong) {
    const app = await build(t)
    t.match(await messageOf(async () => await app.register(inspector, options)), message)
  }
  const fine = await build(t)
  await fine.register(inspector, { path: '/a/b', max: 1, prefix: '/in', logLevel: 'warn', redact: undefined as never })
  t.equal((await fine.inject('/in/a/b')).statusCode, 200)
})

t.test('it needs the plugin, and a registration has one', async t => {
  const without = Fastify()
  t.equal(await codeOf(async () => await without.register(inspector)), 'INVALID_OPTIONS')
  const app = await inspected(t)
  t.match(await messageOf(async () => await app.register(inspector, { path: '/second' })), /got a second one/)
})

t.test('one HTML, one script, one style, under 60 KB, with a policy that lets nothing else in', async t => {
  const app = await inspected(t)
  const page = await app.inject(PAGE)
  t.equal(page.statusCode, 200)
  t.match(page.headers, { 'content-type': 'text/html; charset=utf-8', 'cache-control': 'no-store', 'x-content-type-options': 'nosniff', 'x-frame-options': 'DENY' })
  const policy = String(page.headers['content-security-policy'])
  t.match(policy, /default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'/)
  t.notMatch(policy, /unsafe|\*|http/)
  const links = [...page.body.matchAll(/(?:src|href)="(?!data:)([^"]+)"/g)].map(([, link]) => link!)
  t.same(links, ['openai-webhook/page.css', 'openai-webhook/page.js'])
  let size = page.body.length
  for (const link of links) {
    const response = await app.inject(`/${link}`)
    t.equal(response.statusCode, 200)
    size += response.rawPayload.length
  }
  t.ok(size < 60_000, `${size} bytes`)
  t.equal((await app.inject({ method: 'HEAD', url: `${PAGE}/api/events` })).statusCode, 404)
  t.match((await app.inject(`${PAGE}/?x=1`)).body, /src="\.\/page\.js"/)
  t.equal((await app.inject({ url: `${PAGE}/`, headers: { host: 'evil.example' } })).statusCode, 403)
  for (const options of [{ routerOptions: { ignoreTrailingSlash: true } }, { ignoreTrailingSlash: true }]) {
    const lax = await inspected(t, {}, {}, options)
    t.match((await lax.inject(`${PAGE}/?x=1`)).body, /src="\.\/page\.js"/)
  }
})

t.test('without onRequest it refuses to start in production', async t => {
  production(t)
  const app = await build(t)
  t.match(await messageOf(async () => await app.register(inspector)), /expected onRequest.*NODE_ENV is "production"/)
})

t.test('without onRequest it serves this machine, by its own name, and nothing that was forwarded', async t => {
  const app = await inspected(t)
  const asked = async (headers: Record<string, string>, remoteAddress = '127.0.0.1'): Promise<number> => (await app.inject({ url: PAGE, headers, remoteAddress })).statusCode
  for (const host of ['localhost', 'localhost:3000', '127.0.0.1:3000', '[::1]:3000', 'LOCALHOST']) t.equal(await asked({ host }), 200, host)
  for (const host of ['evil.example', 'localhost.evil.example', 'evil.example:80', '127.0.0.1.evil.example', '10.0.0.1', 'localhost:', '0.0.0.0', '[::]']) t.equal(await asked({ host }), 403, host)
  for (const address of ['127.0.0.1', '127.8.9.1', '::1', '::ffff:127.0.0.1']) t.equal(await asked({}, address), 200, address)
  for (const address of ['10.0.0.1', '::ffff:10.0.0.1', '192.168.1.5', '2001:db8::1', '1127.0.0.1']) t.equal(await asked({}, address), 403, address)
  for (const name of ['forwarded', 'x-forwarded-for', 'X-Forwarded-Host', 'x-forwarded-anything', 'cf-connecting-ip', 'cf-ray', 'via', 'x-real-ip']) t.equal(await asked({ [name]: 'x' }), 403, name)
  t.equal(await asked({ ':authority': 'evil.example', host: 'localhost' }), 403)
  t.match((await app.inject({ url: PAGE, headers: { host: 'evil.example' } })).json(), { code: REFUSED, message: /`onRequest`/ })
  for (const url of [`${PAGE}/page.js`, `${PAGE}/page.css`, `${PAGE}/api/events`, `${PAGE}/api/deliveries/1`, `${PAGE}/api/dead`, `${PAGE}/api/sample?type=batch.failed`]) {
    t.equal((await app.inject({ url, headers: { host: 'evil.example' } })).statusCode, 403, url)
  }
  for (const action of ['deliver', 'again', 'requeue', 'requeue-all']) {
    t.equal((await act(app, action, {}, { host: 'evil.example', 'sec-fetch-site': 'same-origin' })).statusCode, 403, action)
  }
})

t.test('where proxies are trusted, the sender\'s word for its address is not', async t => {
  const app = await inspected(t, {}, {}, { trustProxy: true })
  t.equal((await app.inject({ url: PAGE, remoteAddress: '10.0.0.1', headers: { 'x-forwarded-for': '127.0.0.1' } })).statusCode, 403)
})

t.test('with onRequest, whoever it lets in may look, from anywhere', async t => {
  production(t)
  const onRequest = async (request: FastifyRequest): Promise<void> => {
    if (request.headers.authorization !== 'Bearer key') throw Object.assign(new Error('who are you?'), { statusCode: 401 })
  }
  const app = await inspected(t, {}, { onRequest: [onRequest, allow] as never })
  app.openaiWebhook.on('batch.failed', () => {})
  const authorized = { authorization: 'Bearer key', host: 'app.example', 'x-forwarded-for': '10.0.0.1' }
  for (const url of [PAGE, `${PAGE}/page.js`, `${PAGE}/page.css`, `${PAGE}/api/sample?type=batch.failed`]) {
    t.equal((await app.inject({ url, headers: authorized })).statusCode, 200, url)
    t.equal((await app.inject(url)).statusCode, 401, url)
  }
  t.equal((await app.inject(`${PAGE}/api/events`)).statusCode, 401)
  // In production it acts only where that is said.
  t.match((await act(app, 'requeue-all', {}, { ...authorized, 'sec-fetch-site': 'same-origin' })).json(), { code: REFUSED, message: /read-only/ })
  const acting = await inspected(t, {}, { onRequest: allow, readOnly: false })
  t.equal((await act(acting, 'deliver', { endpoint: '/webhooks/openai', url: '/webhooks/openai', body: JSON.stringify(thin('batch.failed')) })).statusCode, 200)
})

t.test('readOnly may be a function of the request; nothing but false lets anybody act', async t => {
  const { errors, logger } = capturedLog()
  const app = await inspected(t, {}, {
    async readOnly ({ headers }) {
      if (headers['x-role'] === 'broken') throw new Error('no roles')
      return (headers['x-role'] === 'admin' ? false : headers['x-role'] === 'odd' ? undefined : true) as boolean
    }
  }, { logger })
  const status = async (role: string): Promise<number> => (await act(app, 'again', { id: 99 }, { 'sec-fetch-site': 'same-origin', 'x-role': role })).statusCode
  t.same([await status('admin'), await status('guest'), await status('odd'), await status('broken')], [404, 403, 403, 403])
  t.match(errors(), [{ msg: /readOnly function/, err: { message: 'no roles' } }])
  const looking = await inspected(t, {}, { readOnly: true })
  t.equal((await act(looking, 'again', { id: 1 })).statusCode, 403)
})

t.test('an action is JSON from the page itself', async t => {
  const app = await inspected(t)
  const status = async (headers: Record<string, string>): Promise<number> => (await act(app, 'again', { id: 99 }, headers)).statusCode
  const allowed: Array<Record<string, string>> = [
    { 'sec-fetch-site': 'same-origin' },
    { 'sec-fetch-site': 'same-origin', origin: 'http://localhost:80' },
    { origin: 'http://localhost:3000', host: 'localhost:3000' },
    { origin: 'http://localhost', host: 'localhost:80' },
    { origin: 'https://127.0.0.1', host: '127.0.0.1' }
  ]
  const refused: Array<Record<string, string>> = [
    {},
    { 'sec-fetch-site': 'cross-site' },
    { 'sec-fetch-site': 'same-site' },
    { 'sec-fetch-site': 'none' },
    { 'sec-fetch-site': 'cross-site', origin: 'http://localhost:80', host: 'localhost:80' },
    { origin: 'null' },
    { origin: 'http://evil.example' },
    { origin: 'http://localhost:4000', host: 'localhost:3000' },
    { origin: 'http://localhost.evil.example', host: 'localhost' },
    { origin: 'file://localhost', host: 'localhost' }
  ]
  for (const headers of allowed) t.equal(await status(headers), 404, JSON.stringify(headers))
  for (const headers of refused) t.equal(await status(headers), 403, JSON.stringify(headers))
  const sent = async (type: string | undefined, payload: string): Promise<number> =>
    (await app.inject({ method: 'POST', url: `${PAGE}/api/again`, headers: { 'sec-fetch-site': 'same-origin', ...(type !== undefined && { 'content-type': type }) }, payload })).statusCode
  t.equal(await sent('text/plain', '{"id":99}'), 415)
  t.equal(await sent('application/x-www-form-urlencoded', 'id=99'), 415)
  t.equal(await sent('application/json', '{"id":99'), 400)
  t.equal(await sent('application/json', '{"__proto__":{"id":1},"id":99}'), 400)
  t.equal(await sent('application/json', '5'), 400)
  t.equal(await sent(undefined, ''), 400)
  t.equal(await sent('application/json', JSON.stringify({ id: 99, body: 5 })), 400)
  t.equal(await sent('application/json', JSON.stringify({ id: 99, body: 'x'.repeat(1_100_000) })), 413)
  t.equal((await act(app, 'deliver', { endpoint: '/webhooks/openai', url: null, body: '' })).statusCode, 400)
  // The page's script reads from its own page alone.
  t.equal((await app.inject({ url: `${PAGE}/api/sample?type=batch.failed`, headers: { 'sec-fetch-site': 'cross-site' } })).statusCode, 403)
  t.equal((await app.inject({ url: `${PAGE}/api/sample?type=batch.failed`, headers: { 'sec-fetch-site': 'same-origin' } })).statusCode, 200)
})

t.test('no other route\'s parsing changes', async t => {
  const app = await inspected(t)
  app.post('/plain', async ({ body }) => body)
  t.equal((await app.inject({ method: 'POST', url: '/plain', headers: { 'content-type': 'text/plain' }, payload: 'x' })).body, 'x')
  t.same((await app.inject({ method: 'POST', url: '/plain', payload: { a: 1 } })).json(), { a: 1 })
})

t.test('headers: those that authenticate are hidden, and what the user hides', async t => {
  const { errors, logger } = capturedLog()
  let broken = false
  const app = await inspected(t, {}, {
    redact ({ 'x-internal': _hidden, ...headers }) {
      if (broken) throw new Error('no redaction')
      return { ...headers, cookie: 'shown after all?' }
    }
  }, { logger })
  const { headers, body } = sign(thin('batch.failed'))
  await post(app, { headers: { ...headers, authorization: 'Bearer key', 'x-internal': 'secret', 'x-shown': 'yes' }, body })
  const shown = new Map((await detailOf(app)).headers)
  t.same([shown.get('authorization'), shown.get('cookie'), shown.get('x-internal'), shown.get('x-shown')], ['(hidden)', '(hidden)', undefined, 'yes'])
  broken = true
  t.same((await detailOf(app)).headers, [])
  t.match(errors(), [{ msg: /redact function/ }])
  const silent = await inspected(t, {}, { redact: headers => ({ ...headers, host: undefined }) })
  await post(silent, sign(thin('batch.failed')))
  t.notOk(new Map((await detailOf(silent)).headers).has('host'))
  for (const answer of [() => undefined, () => null, () => 1, () => 'all', () => [], async () => headers, async () => { throw new Error('late') }]) {
    const log = capturedLog()
    const wrong = await inspected(t, {}, { redact: answer as never }, { logger: log.logger })
    await post(wrong, sign(thin('batch.failed')))
    t.same((await detailOf(wrong)).headers, [])
    t.match(log.errors(), [{ msg: /redact function/, err: { message: /^expected the headers to show, got / } }])
  }
})

t.test('why a 401 was refused, as diagnose says it; neither secret nor expected signature is told', async t => {
  const app = await inspected(t)
  const { headers, body } = sign(thin('batch.failed'))
  await post(app, { headers, body: Buffer.concat([body, Buffer.from('\n')]) })
  t.match((await detailOf(app)).diagnosis, { cause: 'body-newline-added', fix: /./ }, 'one change, proved')
  await post(app, sign(thin('batch.failed'), { secret: `whsec_${Buffer.alloc(32, 'o').toString('base64')}` }))
  const unknown = await detailOf(app)
  t.match(unknown.diagnosis, { cause: null, message: /^the secret is that of another endpoint/, fix: null })
  t.ok(unknown.diagnosis!.ruledOut.length > 5)
  await post(app, sign(thin('batch.failed'), { timestamp: Math.floor(Date.now() / 1_000) - 3_600 }))
  t.match((await detailOf(app)).diagnosis, { cause: 'timestamp-stale', message: /signed 36\d\d s before it came/, fix: /clock/ })
  await post(app, sign(thin('batch.failed'), { timestamp: Math.floor(Date.now() / 1_000) + 3_600 }))
  t.match((await detailOf(app)).diagnosis, { cause: 'timestamp-future', message: /signed 3\d\d\d s after it came/ })
  await app.inject({ method: 'POST', url: '/webhooks/openai', payload: {} })
  t.match((await detailOf(app)).diagnosis, { cause: 'header-missing' })
  await post(app, { headers: { ...headers, 'webhook-id': 'wh_1.2' }, body })
  t.match((await detailOf(app)).diagnosis, { cause: 'webhook-id-dot' })
  await forge(app, 'wrong shape', { secret: SECRET })
  t.equal((await detailOf(app)).diagnosis, null)
  const all = JSON.stringify(await Promise.all(rowsOf(app).map(async ({ id }) => await detailOf(app, id))))
  t.notMatch(all, SECRET.slice('whsec_'.length))
  t.notMatch(all, Buffer.from(SECRET.slice('whsec_'.length), 'base64').toString('hex'))
})

t.test('what to change is what the log advises', async t => {
  const { lines, logger } = capturedLog()
  const app = await inspected(t, {}, {}, { logger })
  app.openaiWebhook.route({ url: '/tenants/:name', tenant: { of: request => (request.params as { name: string }).name, secret: name => name === 'acme' ? SECRET : undefined } })
  for (const [url, code] of [['/webhooks/openai', 'INVALID_SIGNATURE'], ['/tenants/acme', 'INVALID_SIGNATURE'], ['/tenants/nobody', 'UNKNOWN_TENANT']] as const) {
    await post(app, sign(thin('batch.failed'), { secret: `whsec_${Buffer.alloc(32, 'o').toString('base64')}` }), url)
    const { refusal } = await detailOf(app)
    const line = lines.findLast(({ fix }) => fix !== undefined)!
    t.equal(refusal!.code, `FST_OPENAI_WEBHOOK_${code}`)
    t.equal(refusal!.fix, line['fix'], url)
  }
  await forge(app, 'wrong shape', { secret: SECRET })
  t.match((await detailOf(app)).refusal, { fix: null, told: null })
})

t.test('deliver again: through the real route, signed anew, with another webhook-id', async t => {
  const app = await inspected(t)
  const got: Array<{ webhookId: string, event: unknown, tenant: unknown }> = []
  app.openaiWebhook.on('batch.failed', (event, { webhookId, request }) => { got.push({ webhookId, event, tenant: request!.headers['x-tenant'] }) })
  const { headers, body } = sign(thin('batch.failed'))
  await post(app, { headers: { ...headers, 'x-tenant': 'acme', connection: 'keep-alive' }, body })
  const response = await act(app, 'again', { id: 1 })
  t.same(response.json(), { status: 200, body: '{"received":true}', id: 2 })
  t.equal(got.length, 2)
  t.same(got[0]!.event, got[1]!.event)
  t.not(got[0]!.webhookId, got[1]!.webhookId)
  t.equal(got[1]!.tenant, 'acme')
  const again = await detailOf(app)
  t.match(again, { row: { own: true, again: 1, state: 'processed' } })
  t.same(Buffer.from(again.body!.base64, 'base64'), body)
  const edited = { ...thin('batch.failed'), data: { id: 'batch_edited' } }
  await act(app, 'again', { id: 1, body: JSON.stringify(edited) })
  t.same(got[2]!.event, edited)
  t.match((await act(app, 'again', { id: 1, body: 'no json' })).json(), { status: 400, body: /INVALID_BODY/, id: 4 })
  t.match(rowsOf(app).at(-1), { id: 4, own: true, again: 1, state: 'refused' }, 'a refused one is marked too')
  t.match((await act(app, 'again', { id: 12_345 })).json(), { message: /not kept any more/ })
})

t.test('of deliveries that come while the page sends one, that one alone is marked', async t => {
  const app = await build(t)
  let answered = '/webhooks/openai'
  app.addHook('onRequest', async ({ url }, reply) => {
    if (url !== answered) return
    await post(app, sign(thin('batch.failed')), '/other')
    await reply.code(204).send()
  })
  await app.register(inspector)
  app.openaiWebhook.route({ url: '/other', secret: SECRET })
  app.openaiWebhook.route({
    url: '/first',
    secret: SECRET,
    on: { 'batch.failed': async (_event, { request }) => { await app.inject({ method: 'POST', url: '/other', headers: request!.headers, payload: {} }) } }
  })
  const send = async (url: string): Promise<object> => (await act(app, 'deliver', { endpoint: url, url, body: JSON.stringify(thin('batch.failed')) })).json()
  t.match(await send('/webhooks/openai'), { status: 204 })
  t.match(await send('/first'), { status: 200 })
  t.same(rowsOf(app).map(({ endpoint, own }) => [endpoint, own]), [['/other', false], ['/first', true], ['/other', false]])
  answered = '/first'
  t.match((await act(app, 'again', { id: 2 })).json(), { status: 204, id: null }, 'a hook has answered it before it came to the plugin')
})

t.test('what was not verified is not signed here', async t => {
  const app = await inspected(t)
  await forge(app, 'bad signature', { secret: SECRET })
  const { deliver: { again, edited } } = await detailOf(app)
  t.match([again, edited], [/not verified/, /not verified/])
  t.match((await act(app, 'again', { id: 1 })).json(), { message: /cannot be delivered again: it was not verified/ })
  t.match((await act(app, 'again', { id: 1, body: '{}' })).json(), { message: /not verified/ })
})

t.test('a verifier of the user\'s cannot sign; that of the older guide names a delivery by its event', async t => {
  const own: Verifier = (delivery, keys) => standardWebhooks()(delivery, keys)
  const app = await inspected(t, { verifier: own })
  await post(app, sign(thin('batch.failed')))
  t.match((await detailOf(app)).deliver, { again: /verifier is your own/, edited: /verifier is your own/ })
  t.match((await act(app, 'deliver', { endpoint: '/webhooks/openai', url: '/webhooks/openai', body: '{}' })).json(), { message: /verifier is your own/ })

  const guide = await inspected(t, { verifier: xOpenAISignature() })
  let runs = 0
  guide.openaiWebhook.on('batch.failed', () => { runs++ })
  const sent = async (event: object | string): Promise<Record<string, unknown>> =>
    (await act(guide, 'deliver', { endpoint: '/webhooks/openai', url: '/webhooks/openai', body: typeof event === 'string' ? event : JSON.stringify(event) })).json()
  t.match(await sent(thin('batch.failed')), { status: 200 })
  t.match((await detailOf(guide)).deliver, { again: /edit its id/, edited: null })
  t.match((await act(guide, 'again', { id: 1 })).json(), { message: /edit its id/ })
  t.match((await act(guide, 'again', { id: 1, body: JSON.stringify(thin('batch.failed')) })).json(), { message: /edit the event's id/ })
  t.match((await act(guide, 'again', { id: 1, body: JSON.stringify({ ...thin('batch.failed'), id: 'evt_2' }) })).json(), { status: 200 })
  t.equal(runs, 2)
  t.match(rowsOf(guide), [{ own: true }, { own: true }])
  t.match(await sent({ ...thin('batch.failed'), id: undefined }), { status: 400 })
  t.match(await sent('no json'), { status: 400 })
  t.ok(rowsOf(guide).every(({ own }) => own), 'refused ones too')
})

t.test('samples of every type, those of the user\'s included, to the endpoint that is chosen', async t => {
  const Own = Type.Object({ type: Type.Literal('own.type'), data: Type.Object({}) })
  const app = await inspected(t, { events: { 'own.type': Own } })
  const got: string[] = []
  app.openaiWebhook.onAny(({ type }, { endpoint, request }) => { got.push(`${type} ${endpoint} ${request!.url}`) })
  app.openaiWebhook.route({ url: '/hooks/:project', secret: SECRET })
  const sample = async (type: string): Promise<string> => (await app.inject(`${PAGE}/api/sample?type=${type}`)).json().text
  t.match(JSON.parse(await sample('response.completed')), { type: 'response.completed', data: { id: /^resp_/ } })
  t.match(JSON.parse(await sample('own.type')), { type: 'own.type', data: {} })
  t.equal((await app.inject(`${PAGE}/api/sample?type=toString`)).statusCode, 404)
  t.equal((await app.inject(`${PAGE}/api/sample`)).statusCode, 404)
  const send = async (endpoint: string, url: string): Promise<number> => {
    const answer = await act(app, 'deliver', { endpoint, url, body: await sample('own.type') })
    return answer.statusCode === 200 ? answer.json().status : answer.statusCode
  }
  t.equal(await send('/webhooks/openai', '/webhooks/openai'), 200)
  t.equal(await send('/hooks/:project', '/hooks/acme'), 200)
  t.same(got, ['own.type /webhooks/openai /webhooks/openai', 'own.type /hooks/:project /hooks/acme'])
  t.equal(await send('/webhooks/openai', '/hooks/acme'), 400)
  t.equal(await send('/hooks/:project', '/hooks/:project'), 400)
  t.equal(await send('/hooks/:project', '/other'), 400)
  for (const url of ['/hooks/../other', '/hooks/%2e%2e/other', '/hooks/.%2E/other', '/hooks/..\\other', '/hooks/x\\..\\..\\other', '/hooks/.\t./other', '/hooks/..?', '/hooks/a/b', '/hooks/', '//evil/hooks/a', 'http://evil/hooks/a']) {
    t.equal(await send('/hooks/:project', url), 400, url)
  }
  t.equal(await send('/hooks/:project', `/hooks/${'x'.repeat(2_001)}`), 400)
  t.equal(await send('/nowhere', '/nowhere'), 404)
  const again = await act(app, 'again', { id: rowsOf(app).at(-1)!.id })
  t.match(again.json(), { status: 200 })
  t.equal(got.at(-1), 'own.type /hooks/:project /hooks/acme', 'it keeps its URL')
})

t.test('many tenants behind one route: shown, diagnosed and delivered to by name', async t => {
  const app = await inspected(t)
  const got: unknown[] = []
  app.openaiWebhook.onAny((_event, { tenant }) => { got.push(tenant) })
  app.openaiWebhook.route({
    url: '/tenants/:name',
    tenant: { of: request => (request.params as { name: string }).name, secret: name => name === 'acme' ? SECRET : undefined }
  })
  await post(app, sign(thin('batch.failed')), '/tenants/acme')
  t.match(await detailOf(app), { row: { tenant: 'acme', endpoint: '/tenants/:name', state: 'processed' }, url: '/tenants/acme', scheme: 'standard', deliver: { again: null } })
  t.match((await act(app, 'again', { id: 1 })).json(), { status: 200 })
  const { headers, body } = sign(thin('batch.failed'))
  await post(app, { headers, body: Buffer.concat([body, Buffer.from('\n')]) }, '/tenants/acme')
  t.match(await detailOf(app), { row: { tenant: 'acme', state: 'refused' }, diagnosis: { cause: 'body-newline-added' } })
  const answer = await post(app, sign(thin('batch.failed')), '/tenants/nobody')
  t.match(await detailOf(app), { refusal: { told: answer.json().code } }, 'the sender was told another code')
  t.match(await detailOf(app), { row: { tenant: 'nobody', state: 'refused', status: 401, code: 'FST_OPENAI_WEBHOOK_UNKNOWN_TENANT' }, diagnosis: null })
  const sample = { endpoint: '/tenants/:name', url: '/tenants/acme', body: body.toString() }
  t.match((await act(app, 'deliver', { ...sample, tenant: 'acme' })).json(), { status: 200 })
  t.match((await act(app, 'deliver', sample)).json(), { message: /fill in Tenant/ })
  t.match((await act(app, 'deliver', { ...sample, tenant: '' })).json(), { message: /fill in Tenant/ })
  t.match((await act(app, 'deliver', { ...sample, url: '/tenants/:name', tenant: 'acme' })).json(), { message: 'fill in :name in the URL' })
  t.match((await act(app, 'deliver', { ...sample, tenant: 'nobody' })).json(), { message: /secret cannot be had/ })
  t.same(got, ['acme', 'acme', 'acme'])
})

t.test('deliver again: where the app rewrites URLs, to the URL that the sender used', async t => {
  const rewriteUrl = ({ url = '' }: { url?: string | undefined }): string => url.startsWith('/hooks/') ? `/v1${url}` : url
  const app = await inspected(t, { path: '/v1/hooks/openai' }, {}, { rewriteUrl })
  t.equal((await post(app, sign(thin('batch.failed')), '/hooks/openai?from=test')).statusCode, 200)
  t.equal((await detailOf(app)).url, '/hooks/openai?from=test')
  t.match((await act(app, 'again', { id: 1 })).json(), { status: 200, id: 2 })
  t.equal((await detailOf(app)).url, '/hooks/openai?from=test')
})

t.test('deliver again: where the app cuts off a prefix and sends other URLs elsewhere', async t => {
  const rewriteUrl = ({ url = '' }: { url?: string | undefined }): string => url.startsWith('/api/') ? url.slice('/api'.length) : `/elsewhere${url}`
  const app = await inspected(t, {}, {}, { rewriteUrl })
  t.equal((await post(app, sign(thin('batch.failed')), '/api/webhooks/openai')).statusCode, 200)
  const again = await app.inject({ method: 'POST', url: `/api${PAGE}/api/again`, headers: { 'content-type': 'application/json', 'sec-fetch-site': 'same-origin', host: 'localhost' }, payload: { id: 1 } })
  t.match(again.json(), { status: 200, id: 2 })
})

t.test('no other route of the app is reached', async t => {
  const app = await inspected(t)
  let reached = 0
  for (const url of ['/admin', '/t/admin']) app.post(url, async () => { reached++ })
  for (const url of ['/hooks/*', '/t/:a/:b/admin', '/h/:project']) app.openaiWebhook.route({ url, secret: SECRET })
  const sample = { body: sign(thin('batch.failed')).body.toString() }
  for (const [endpoint, url] of [['/hooks/*', '/hooks/%ff/%2e%2e/%2e%2e/admin'], ['/t/:a/:b/admin', '/t/%ff/%2e%2e/admin'], ['/hooks/*', '/hooks/../admin'], ['/hooks/*', '/hooks/.%2E/admin']] as const) {
    t.equal((await act(app, 'deliver', { ...sample, endpoint, url })).statusCode, 400, url)
  }
  const port = await listen(app)
  let id = 0
  for (const url of ['/hooks/../admin', '/hooks/%2e%2e/admin', '/h/..\\admin']) {
    const { headers, body } = sign(thin('batch.failed'))
    // Not by fetch(), which would resolve the dots as inject() does.
    const wire = await Wire.open(t, port)
    await wire.write(request(Object.entries(headers), body, url))
    t.equal((await wire.answer()).status, 200, url)
    wire.socket.destroy()
    const { deliver } = await detailOf(app)
    t.match(deliver, { again: /lead elsewhere/, edited: /lead elsewhere/ })
    t.equal((await act(app, 'again', { id: ++id })).statusCode, 409, url)
  }
  t.equal(reached, 0)
})

t.test('deliver again: where a mount has cut off the beginning of the URL, to the app itself', async t => {
  const mount: FastifyServerOptions['serverFactory'] = handler => createServer((request, response) => {
    Object.assign(request, { originalUrl: request.url, baseUrl: '/hooks', url: request.url!.replace('/hooks', '') })
    handler(request, response)
  })
  const app = await inspected(t, {}, {}, { serverFactory: mount })
  await app.listen({ port: 0, host: '127.0.0.1' })
  const { headers, body } = sign(thin('batch.failed'))
  const { port } = app.server.address() as AddressInfo
  t.equal((await fetch(`http://127.0.0.1:${port}/hooks/webhooks/openai`, { method: 'POST', headers, body })).status, 200)
  t.match((await act(app, 'again', { id: 1 })).json(), { status: 200, id: 2 })
})

t.test('a sample to each form of URL that a route may have', async t => {
  const app = await inspected(t)
  const got: string[] = []
  app.openaiWebhook.onAny((_event, { endpoint }) => { got.push(endpoint) })
  const body = sign(thin('batch.failed')).body.toString()
  const forms = { '/o/:it?': ['/o', '/o/x'], '/p/:it/end': ['/p/a%2Fb/end'], '/a b': ['/a b?t=1', '/a%20b'], '/f-:id(^\\d+$)/x': ['/f-12/x'], '/lit::x/:y.json': ['/lit:x/5.json'], '/all/*': ['/all/a/b'], '/:a-:b/(c)': ['/1-2/(c)'], '/100%': ['/100%'] }
  for (const url of Object.keys(forms)) app.openaiWebhook.route({ url, secret: SECRET })
  for (const [endpoint, urls] of Object.entries(forms)) {
    for (const url of urls) t.equal((await act(app, 'deliver', { endpoint, url, body })).statusCode, 200, url)
    for (const url of ['/other', '/a bc', '/f-12/y', '/lit:x/5-json', '/all', '/1/(c)', '/1-2/3/(c)']) t.equal((await act(app, 'deliver', { endpoint, url, body })).statusCode, 400, `${endpoint} ${url}`)
  }
  t.ok(got.length >= 5)
})

t.test('a sample to a tenant that is named by the query', async t => {
  const app = await inspected(t)
  const got: unknown[] = []
  app.openaiWebhook.onAny((_event, { tenant }) => { got.push(tenant) })
  app.openaiWebhook.route({ url: '/tenants', tenant: { of: request => (request.query as { t: string }).t, secret: name => name === 'acme' ? SECRET : undefined } })
  const body = sign(thin('batch.failed')).body.toString()
  const send = async (url: string): Promise<number> => (await act(app, 'deliver', { endpoint: '/tenants', url, tenant: 'acme', body })).json().status
  t.equal(await send('/tenants?t=acme'), 200)
  t.equal(await send('/tenants?t=globex'), 401)
  for (const url of ['/tenants?t=acme#there', '/tenants/acme', `/tenants?t=${'x'.repeat(2_000)}`]) t.equal(await send(url), undefined, url)
  t.same(got, ['acme'])
})

t.test('a secret that is not known yet', async t => {
  const app = await inspected(t, { secret: async () => SECRET })
  await app.ready()
  t.equal((await act(app, 'deliver', { endpoint: '/webhooks/openai', url: '/webhooks/openai', body: JSON.stringify(thin('batch.failed')) })).json().status, 200)
})

t.test('dead letters: listed, looked at, requeued one by one and all of a type', async t => {
  const app = await inspected(t, { runner: durable(new Database(':memory:'), { attempts: 1, backoff: 1 }) })
  let broken = true
  app.openaiWebhook.onAny(() => { if (broken) throw new Error('no bucket') }, { name: 'handler-1' })
  const dead = async (query = ''): Promise<Array<{ webhookId: string, type: string }>> => (await app.inject(`${PAGE}/api/dead${query}`)).json()
  const types = ['batch.failed', 'batch.failed', 'batch.completed', 'batch.expired']
  for (const type of types) await deliver(app, thin(type), { secret: SECRET })
  await until(async () => (await dead()).length === types.length)
  const [first] = await dead('?type=batch.failed')
  t.match(first, { type: 'batch.failed', tenant: null, attempts: 1, errors: [{ handler: 'handler-1', message: 'no bucket', stack: /Error: no bucket/ }], finished: [], event: JSON.stringify(thin('batch.failed')) })
  broken = false
  const ref = { endpoint: '/webhooks/openai', webhookId: first!.webhookId }
  t.same((await act(app, 'requeue', { ...ref, tenant: 'nobody' })).json(), { requeued: false })
  t.same((await act(app, 'requeue', ref)).json(), { requeued: true })
  t.same((await act(app, 'requeue', ref)).json(), { requeued: false })
  t.same((await act(app, 'requeue-all', { type: 'batch.failed' })).json(), { requeued: 1, failed: null })
  t.same((await dead()).map(({ type }) => type).sort(), ['batch.completed', 'batch.expired'])
  t.same((await act(app, 'requeue-all', {})).json(), { requeued: 2, failed: null })
  t.same(await dead(), [])
  await until(() => rowsOf(app).every(({ state }) => state === 'processed'))
  const plain = await inspected(t)
  t.match((await plain.inject(`${PAGE}/api/dead`)).json(), { code: 'FST_OPENAI_WEBHOOK_NO_DEAD_LETTERS' })
})

t.test('one that cannot be requeued keeps no other from it', async t => {
  const asked: object[] = []
  const job = (webhookId: string, tenant?: string) => ({ webhookId, timestamp: 1, endpoint: '/webhooks/openai', event: { type: 'batch.failed' }, attempts: 1, errors: [], finished: [], diedAt: 1, ...(tenant !== undefined && { tenant }) })
  const app = await inspected(t, {
    runner: {
      run () {},
      dead: () => [job('wh_1'), job('wh_2', 'acme'), job('wh_3')],
      requeue (ref, options) {
        asked.push({ ...ref, ...options })
        if (ref.webhookId === 'wh_1') throw new Error('needs force')
        return ref.webhookId === 'wh_2'
      }
    }
  })
  t.same((await act(app, 'requeue-all', {})).json(), { requeued: 1, failed: 'needs force' })
  t.match((await app.inject(`${PAGE}/api/dead`)).json(), [{}, { tenant: 'acme' }, {}])
  t.match((await act(app, 'requeue', { endpoint: '/webhooks/openai', webhookId: 'wh_1', force: true })).json(), { message: 'needs force' })
  t.match(asked, [{}, { tenant: 'acme' }, {}, { webhookId: 'wh_1', force: true }])
})

t.test('between two of them deliveries come in, though the runner is synchronous', async t => {
  const order: string[] = []
  const app = await inspected(t, {
    runner: {
      run () {},
      dead: () => ['wh_1', 'wh_2'].map(webhookId => ({ webhookId, timestamp: 1, endpoint: '/webhooks/openai', event: { type: 'batch.failed' }, attempts: 1, errors: [], finished: [], diedAt: 1 })),
      requeue ({ webhookId }) {
        order.push(webhookId)
        setImmediate(() => order.push('a turn'))
        return true
      }
    }
  })
  t.same((await act(app, 'requeue-all', {})).json(), { requeued: 2, failed: null })
  t.same(order.slice(0, 3), ['wh_1', 'a turn', 'wh_2'])
})

t.test('many old ones that need force keep no other from it', async t => {
  const dead = Array.from({ length: 1_005 }, (_, nth) => ({ webhookId: `wh_${nth}`, timestamp: 1, endpoint: '/webhooks/openai', event: { type: 'batch.failed' }, attempts: 1, errors: [], finished: [], diedAt: nth }))
  const app = await inspected(t, {
    runner: {
      run () {},
      dead: (limit = 100) => dead.slice(0, limit),
      requeue ({ webhookId }) {
        const at = dead.findIndex(delivery => delivery.webhookId === webhookId)
        if (at < 1_000) throw new Error('needs force')
        dead.splice(at, 1)
        return true
      }
    }
  })
  t.same((await act(app, 'requeue-all', {})).json(), { requeued: 5, failed: 'needs force' })
  t.same((await act(app, 'requeue-all', {})).json(), { requeued: 0, failed: 'needs force' })
})

t.test('over HTTP/2, and where the app has an error handler of its own', async t => {
  const app = Fastify({ http2: true }) as unknown as FastifyInstance
  t.teardown(() => app.close())
  app.setErrorHandler((_error, _request, reply) => { reply.code(418).send('teapot') })
  await app.register(openaiWebhook, { secret: SECRET })
  await app.register(inspector)
  const got: string[] = []
  app.openaiWebhook.on('batch.failed', (_event, { request }) => { got.push(String(request!.headers.host)) })
  await app.listen({ port: 0, host: '127.0.0.1' })
  const { port } = app.server.address() as AddressInfo
  const session = connectHttp2(`http://127.0.0.1:${port}`)
  t.teardown(() => session.close())
  const ask = async (headers: Record<string, string>, body = ''): Promise<{ status: number, text: string }> => await new Promise((resolve, reject) => {
    const stream = session.request(headers, { endStream: body === '' })
    let status = 0
    let text = ''
    stream.on('response', answer => { status = Number(answer[':status']) })
    stream.on('data', data => { text += String(data) })
    stream.on('end', () => resolve({ status, text }))
    stream.on('error', reject)
    if (body !== '') stream.end(body)
  })
  t.equal((await ask({ ':path': PAGE })).status, 200)
  t.equal((await ask({ ':path': PAGE, ':authority': 'evil.example' })).status, 418, 'the page itself is the app\'s to answer')
  const delivery = sign(thin('batch.failed'))
  await ask({ ':method': 'POST', ':path': '/webhooks/openai', ...delivery.headers }, delivery.body.toString())
  const post = async (headers: Record<string, string>) => await ask({ ':method': 'POST', ':path': `${PAGE}/api/again`, 'content-type': 'application/json', ...headers }, '{"id":1}')
  t.equal((await post({ origin: 'http://evil.example' })).status, 403)
  t.equal((await ask({ ':path': `${PAGE}/api/dead`, 'x-forwarded-for': 'x' })).text, 'teapot', 'who may not look is told what the app tells')
  t.match(JSON.parse((await post({ origin: `http://127.0.0.1:${port}` })).text), { status: 200 })
  t.same(got, [undefined, `127.0.0.1:${port}`].map(String))
})

t.test('a request without a Host, and one over a socket of the file system', async t => {
  const app = await inspected(t)
  const directory = mkdtempSync(join(tmpdir(), 'inspector-')) // a socket's path must be short
  t.teardown(() => rmSync(directory, { recursive: true }))
  const path = join(directory, 'socket')
  await app.listen({ path })
  const status = await new Promise(resolve => {
    httpRequest({ socketPath: path, path: PAGE, headers: { host: 'localhost' } }, ({ statusCode }) => resolve(statusCode)).end()
  })
  t.equal(status, 403)
  const tcp = await inspected(t)
  await tcp.listen({ port: 0, host: '127.0.0.1' })
  const socket = connect((tcp.server.address() as AddressInfo).port, '127.0.0.1')
  socket.end(`GET ${PAGE} HTTP/1.0\r\n\r\n`)
  t.match(await text(socket), /^HTTP\/1\.1 403 /)
})

t.test('what is shipped is what the page is made of', t => {
  t.ok(statSync('dist/inspector/page/page.js').size > 10_000)
  t.notMatch(readFileSync('dist/inspector/page/index.html', 'utf8'), /<script(?![^>]* src=)|<style| style=|https?:\/\/(?!www\.w3\.org)/)
  t.end()
})
