import type { FastifyBaseLogger } from 'fastify'
import t from 'tap'
import { memoryStore } from '../lib/index.ts'
import type { Verifier } from '../lib/index.ts'
import { RefusalLog } from '../lib/refusal-log.ts'
import { SECRET, build, outcome, post, sign, stoppedClock, thin } from './support/deliveries.ts'
import { ENDPOINT, MARKER, NAMED, REFUSED, forged, quiet, said, valid, withText } from './support/log-lines.ts'
import { capturedLog } from './support/observe.ts'
import { sized } from './support/size.ts'

/** What a wrong secret's line says to do. */
const FIX = /^where the sender is OpenAI: compare OPENAI_WEBHOOK_SECRET, or the secret option, with the signing secret \(whsec_…\) of the endpoint/

/** In one window. */
const FORGERIES = sized(1_000, 10_000)

t.test('a refused delivery is a line at warn, with its code and nothing of a payload or a secret', async t => {
  const log = capturedLog()
  const app = await build(t, { idempotency: { store: { ...memoryStore(), begin: () => ({ state: 'running' }) } } }, { logger: { ...log.logger as object, level: 'trace' }, ...quiet })
  const refused = [
    forged(),
    { ...forged(), headers: { 'content-type': 'application/json' } },
    sign(JSON.stringify({ type: 'batch.failed', data: { note: MARKER } })),
    { ...valid(), headers: { ...valid().headers, 'content-type': 'text/plain' } },
    valid()
  ]
  for (const delivery of refused) await post(app, delivery)
  const line = { level: 40, msg: REFUSED, endpoint: ENDPOINT }
  const [wrongSecret] = withText(log.lines, REFUSED)
  t.match(wrongSecret!['fix'], FIX)
  t.same(withText(log.lines, REFUSED).map(said), [
    { ...line, code: 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE', statusCode: 401, fix: wrongSecret!['fix'] },
    { ...line, code: 'FST_OPENAI_WEBHOOK_MISSING_HEADER', statusCode: 401 },
    { ...line, webhookId: refused[2]!.headers['webhook-id'], code: 'FST_OPENAI_WEBHOOK_INVALID_EVENT', statusCode: 400, reason: `the event does not have the shape of its type, batch.failed: ${['/id', '/created_at', '/data/id'].map(path => `${path} (Expected required property)`).join(', ')}` },
    { ...line, code: 'FST_ERR_CTP_INVALID_MEDIA_TYPE', statusCode: 415 },
    { ...line, ...NAMED, code: 'FST_OPENAI_WEBHOOK_IN_PROGRESS', statusCode: 409 }
  ])
  // The diagnosis of a signature comes after the answer.
  while (!JSON.stringify(log.lines).includes('the signature does not match')) await new Promise(resolve => setImmediate(resolve))
  const text = JSON.stringify(log.lines)
  for (const secret of [MARKER, SECRET.slice('whsec_'.length), 'Zm9yZ2Vk', valid().headers['webhook-signature']!]) t.notOk(text.includes(secret), secret)
})

t.test('thousands of forgeries are a few lines, and their count when the window ends', async t => {
  const log = capturedLog()
  const app = await build(t, {}, { logger: log.logger, ...quiet })
  app.openaiWebhook.route({ url: '/second' })
  await app.ready()
  const clock = stoppedClock(t)
  const line = { code: 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE', endpoint: ENDPOINT }

  const forgery = forged()
  for (let sent = 0; sent < FORGERIES; sent++) await post(app, forgery)
  t.match(log.lines, Array.from({ length: 5 }, () => ({ level: 40, msg: REFUSED, ...line, statusCode: 401, fix: FIX })))
  t.equal(log.lines.length, 5)
  await post(app, forgery, '/second')
  await post(app, { ...forgery, headers: { 'content-type': 'application/json' } })
  t.match(log.lines.slice(5).map(said), [{ endpoint: '/second' }, { code: 'FST_OPENAI_WEBHOOK_MISSING_HEADER' }], 'a flood hides no other refusal')

  log.lines.length = 0
  clock.advance(9_999)
  t.same(log.lines, [])
  clock.advance(1)
  t.same(log.lines.map(said), [{ level: 40, msg: `${FORGERIES - 5} more webhook deliveries refused`, ...line, suppressed: FORGERIES - 5 }], 'nothing is told of what was written in full')

  log.lines.length = 0
  for (let sent = 0; sent < 6; sent++) await post(app, forgery)
  t.equal(withText(log.lines, REFUSED).length, 5, 'another window')
  await app.close()
  t.same(said(log.lines.at(-1)!), { level: 40, msg: '1 more webhook deliveries refused', ...line, suppressed: 1 }, 'closing tells at once')
  t.equal(log.lines.length, 6)
})

t.test('what had no line of its own is told with its tenants, of whom one hides no other', async t => {
  const log = capturedLog()
  const app = await build(t, {}, { logger: log.logger, ...quiet })
  app.openaiWebhook.route({ url: '/of/:tenant', tenant: { of: ({ params }) => (params as { tenant: string }).tenant, secret: () => SECRET } })
  const names = Array.from({ length: 30 }, (_, nth) => `tenant-${nth}`)
  for (const name of [...Array<string>(5).fill('acme'), 'globex', 'globex', ...names]) await post(app, forged(), `/of/${name}`)
  await app.close()
  t.match(withText(log.lines, REFUSED), Array(5).fill({ tenant: 'acme' }))
  t.match(log.lines.at(-1), { msg: '32 more webhook deliveries refused', endpoint: '/of/:tenant', tenants: ['globex', ...names.slice(0, 19)], suppressed: 32 })
  t.equal((log.lines.at(-1)!['tenants'] as string[]).length, 20)
})

t.test('codes without end are lines with an end', async t => {
  const log = capturedLog()
  const verifier: Verifier = ({ headers }) => {
    throw Object.assign(new Error('no'), { code: String(headers['x-code']), statusCode: 401 })
  }
  const app = await build(t, { verifier }, { logger: log.logger, ...quiet })
  app.post('/marked', { config: { openaiWebhook: {} } }, () => {})
  await app.ready()
  const clock = stoppedClock(t)
  const refuse = async (code: string): Promise<unknown> => await post(app, { ...valid(), headers: { ...valid().headers, 'x-code': code } }, '/marked')
  for (let nth = 0; nth < 1_000; nth++) await refuse(`ACME_${nth}`)
  t.equal(log.lines.length, 200 + 5)
  await refuse('ACME_0')
  t.match(log.lines[205], { code: 'ACME_0' }, 'a code that has a window keeps it')
  log.lines.length = 0
  clock.advance(10_000)
  t.same(log.lines.map(said), [{ level: 40, msg: '795 more webhook deliveries refused', code: 'others', suppressed: 795 }])
})

t.test('a line about a refusal says why where the code does not, and what to do where the secret is a tenant\'s', async t => {
  const { lines, logger } = capturedLog()
  const app = await build(t, {}, { logger })
  app.openaiWebhook.route({ url: '/tenants', tenant: { of: ({ headers }) => String(headers['x-tenant']), secret: name => name === 'acme' ? SECRET : undefined } })
  const refused = (): Array<Record<string, unknown>> => lines.splice(0).filter(({ msg }) => msg === 'webhook delivery refused')

  t.equal(await outcome(app, sign({ ...thin('batch.failed'), data: { id: 4711 } })), '400 INVALID_EVENT')
  const [event] = refused()
  t.match(event!['reason'], /^the event does not have the shape of its type, batch\.failed: \/data\/id/)
  t.notMatch(event!['reason'], /4711/)
  t.equal(await outcome(app, sign('[]')), '400 INVALID_BODY')
  t.match(refused(), [{ reason: /^the signed body is not an event/ }])
  t.equal(await outcome(app, sign(thin('batch.failed'), { timestamp: 1 })), '401 TIMESTAMP_OUT_OF_TOLERANCE')
  t.match(refused(), [{ reason: /s behind$/ }])
  t.equal(await outcome(app, sign(thin('batch.failed'), { secret: 'whsec_b3RoZXI=' })), '401 INVALID_SIGNATURE')
  const [signature] = refused()
  t.match(signature!['fix'], /compare OPENAI_WEBHOOK_SECRET/)
  t.notOk('reason' in signature!)

  const to = async (tenant: string, delivery: ReturnType<typeof sign>): Promise<unknown> =>
    (await post(app, { ...delivery, headers: { ...delivery.headers, 'x-tenant': tenant } }, '/tenants')).statusCode
  t.equal(await to('acme', sign(thin('batch.failed'), { secret: 'whsec_b3RoZXI=' })), 401)
  const [tenant] = refused()
  t.match(tenant, { tenant: 'acme', fix: /compare what tenant\.secret gives for this tenant/ })
  t.notMatch(tenant!['fix'], /OPENAI_WEBHOOK_SECRET/)
  t.equal(await to('globex', sign(thin('batch.failed'))), 401)
  t.match(refused(), [{ reason: 'tenant.secret knows no tenant of that name', fix: /tenant\.of/ }])
})

t.test('a refusal by an app\'s hook is told, though its code is a number', async t => {
  const { lines, logger } = capturedLog()
  const app = await build(t, {}, { logger })
  app.addHook('preValidation', async () => { throw Object.assign(new Error('duplicate key'), { code: 11000 }) })
  const told: unknown[] = []
  app.openaiWebhook.onError((error: Error & { code?: unknown }) => { told.push(error.code) })
  t.equal(await outcome(app), '500 11000')
  t.same(told, [11000])
  t.equal(lines.find(({ msg }) => msg === 'webhook delivery refused')?.['code'], '11000')
})

t.test('refusals are counted under their own code, however many others there are', async t => {
  const lines: Array<{ code: string, endpoint?: string, suppressed?: number }> = []
  const log = { isLevelEnabled: () => true, warn: (line: typeof lines[number]) => { lines.push(line) } } as unknown as FastifyBaseLogger
  const refusals = new RefusalLog(log)
  const write = (code: string, endpoint: string): void => refusals.write(log, code, 401, { endpoint }, 'why')
  for (let i = 0; i < 10; i++) write('FIRST', '/a')
  for (let i = 0; i < 5_000; i++) write(`CODE_${i}`, `/${i}`)
  for (let i = 0; i < 10; i++) write('FIRST', '/a')
  refusals.flush()
  const counted = lines.filter(({ suppressed }) => suppressed !== undefined)
  t.match(counted, [{ code: 'FIRST', endpoint: '/a', suppressed: 15 }, { code: 'others', endpoint: undefined, suppressed: 4_796 }])
  t.equal(counted.length, 2)
})

t.test('a line that cannot be written at the end of a window does not end the process', async t => {
  const log = { isLevelEnabled: () => true, warn () { throw new Error('ENOSPC') } } as unknown as FastifyBaseLogger
  const refusals = new RefusalLog(log)
  for (let i = 0; i < 6; i++) refusals.write(log, 'CODE', 401, { endpoint: '/' }, 'why')
  t.doesNotThrow(() => refusals.flush())
})
