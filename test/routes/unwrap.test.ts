import { createHmac } from 'node:crypto'
import http from 'node:http'
import type { AddressInfo } from 'node:net'
import t from 'tap'
import { standardWebhooks, xOpenAISignature } from '../../lib/index.ts'
import type { OpenAIWebhook, Verifier } from '../../lib/index.ts'
import { build, SECRET, sign, stoppedClock, thin, VECTOR } from '../support/deliveries.ts'
import type { Signed } from '../support/deliveries.ts'

const OTHER = `whsec_${Buffer.alloc(32, 7).toString('base64')}`
const EVENT = thin('response.completed', { id: 'resp_123' })

type UnwrapArguments = Parameters<OpenAIWebhook['unwrap']>

const renamed = (headers: Record<string, string>, rename: (name: string) => string): Record<string, string> =>
  Object.fromEntries(Object.entries(headers).map(([name, value]) => [rename(name), value]))

t.test('the known-good vector of OpenAI', async t => {
  const app = await build(t)
  await app.ready()
  stoppedClock(t, VECTOR.timestamp * 1000)
  t.same(await app.openaiWebhook.unwrap(VECTOR.body, VECTOR.headers), JSON.parse(VECTOR.body))
})

t.test('the body as text or as bytes', async t => {
  const app = await build(t)
  await app.ready()
  const event = { ...EVENT, note: 'gr\u00fc\u00dfe \u{1f44b}' }
  const { headers, body } = sign(event)
  const around = Buffer.concat([Buffer.from('before'), body, Buffer.from('after')])
  const bodies: Record<string, string | Uint8Array> = {
    'a string': body.toString(),
    'a Buffer': body,
    'a Buffer that is part of a larger one': around.subarray(6, 6 + body.length),
    'a Uint8Array': Uint8Array.from(body),
    'a Uint8Array that is part of a larger buffer': new Uint8Array(Uint8Array.from(around).buffer, 6, body.length)
  }
  for (const [name, rawBody] of Object.entries(bodies)) {
    t.same(await app.openaiWebhook.unwrap(rawBody, headers), event, name)
  }
})

t.test('the headers as they come', async t => {
  const app = await build(t)
  await app.ready()
  const { headers, body } = sign(EVENT)

  const received = await new Promise<http.IncomingMessage>((resolve, reject) => {
    const server = http.createServer((request, response) => {
      resolve(request)
      response.end()
    })
    t.teardown(() => server.close())
    server.listen(0, '127.0.0.1', () => {
      const { port } = server.address() as AddressInfo
      http.get({ port, host: '127.0.0.1', headers, agent: false }, response => response.resume()).on('error', reject)
    })
  })

  const forms: Record<string, UnwrapArguments[1]> = {
    'lower case': headers,
    'title case': renamed(headers, name => name.replace(/\b[a-z]/g, char => char.toUpperCase())),
    'upper case': renamed(headers, name => name.toUpperCase()),
    'a Headers instance': new Headers(headers),
    'of a node request': received.headers,
    'of an HTTP/2 request': { ':method': 'POST', ':path': '/', ...headers },
    'beside lists and holes': { 'set-cookie': ['a=1', 'b=2'], 'x-absent': undefined, ...headers },
    'without a prototype': Object.assign(Object.create(null) as object, headers)
  }
  for (const [name, form] of Object.entries(forms)) {
    t.same(await app.openaiWebhook.unwrap(body, form), EVENT, name)
  }
})

t.test('verifies and validates, and does nothing else', async t => {
  const app = await build(t)
  app.openaiWebhook.onAny(() => { t.fail('no handler runs') })
  await app.ready()
  const { headers, body } = sign(EVENT)
  t.same(await app.openaiWebhook.unwrap(body, headers), EVENT)
  t.same(await app.openaiWebhook.unwrap(body, headers), EVENT, 'nor is a second one a duplicate')

  const unknown = { type: 'new.event', data: { any: ['thing'] } }
  const delivery = sign(unknown)
  t.same(await app.openaiWebhook.unwrap(delivery.body, delivery.headers), unknown, 'an unknown type passes')

  const large = sign({ ...EVENT, text: 'x'.repeat(70_000) })
  t.match(await app.openaiWebhook.unwrap(large.body, large.headers), EVENT, 'what has been read is not limited')
})

t.test('before the app is ready and after', async t => {
  const { headers, body } = sign(EVENT)
  for (const secret of [SECRET, () => SECRET, async () => [OTHER, SECRET]]) {
    const app = await build(t, { secret })
    t.same(await app.openaiWebhook.unwrap(body, headers), EVENT, 'before')
    await app.ready()
    t.same(await app.openaiWebhook.unwrap(body, headers), EVENT, 'after')
  }
})

t.test('from a scope within', async t => {
  const app = await build(t)
  let unwrapped: unknown
  await app.register(async child => {
    const { headers, body } = sign(EVENT)
    unwrapped = await child.openaiWebhook.unwrap(body, headers)
  })
  await app.ready()
  t.same(unwrapped, EVENT)
})

t.test('overrides', async t => {
  const app = await build(t)
  await app.ready()
  const unwrap = ({ headers, body }: Signed, overrides?: UnwrapArguments[2]) => app.openaiWebhook.unwrap(body, headers, overrides)
  const mismatch = { code: 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE' }
  const late = { code: 'FST_OPENAI_WEBHOOK_TIMESTAMP_OUT_OF_TOLERANCE' }

  t.test('secret', async t => {
    for (const secret of [OTHER, [OTHER], () => OTHER, async () => [OTHER]]) {
      t.same(await unwrap(sign(EVENT, { secret: OTHER }), { secret }), EVENT)
      await t.rejects(unwrap(sign(EVENT), { secret }), mismatch, 'the plugin\'s own is refused')
    }
    await t.rejects(unwrap(sign(EVENT, { secret: OTHER })), mismatch, 'and the next call has the plugin\'s again')
    await t.rejects(unwrap(sign(EVENT), { secret: 'sk-proj-abc' }), { code: 'FST_OPENAI_WEBHOOK_INVALID_SECRET', message: /got an API key/ })
  })

  t.test('tolerance', async t => {
    stoppedClock(t, VECTOR.timestamp * 1000)
    const ago = (seconds: number): Signed => sign(EVENT, { timestamp: VECTOR.timestamp - seconds })
    for (const seconds of [60, -60]) t.same(await unwrap(ago(seconds), { tolerance: 60 }), EVENT)
    for (const seconds of [61, -61]) await t.rejects(unwrap(ago(seconds), { tolerance: 60 }), { ...late, message: /more than 60 s/ })
    t.same(await unwrap(ago(86_400), { tolerance: 86_400 }), EVENT)
    for (const seconds of [300, -300]) t.same(await unwrap(ago(seconds)), EVENT, 'the plugin\'s own otherwise')
    for (const seconds of [301, -301]) await t.rejects(unwrap(ago(seconds)), late)
    t.same(await unwrap(sign(EVENT, { secret: OTHER, timestamp: VECTOR.timestamp - 1_000 }), { secret: OTHER, tolerance: 1_000 }), EVENT, 'with a secret')
  })

  t.test('verifier', async t => {
    const body = Buffer.from(JSON.stringify(EVENT))
    const timestamp = String(Math.floor(Date.now() / 1000))
    const headers = {
      'x-openai-timestamp': timestamp,
      'x-openai-signature': createHmac('sha256', SECRET).update(`${timestamp}.`).update(body).digest('hex')
    }
    t.same(await unwrap({ headers, body }, { verifier: xOpenAISignature() }), EVENT, 'the plugin\'s secret, as that scheme takes it')
    await t.rejects(unwrap({ headers, body }), { code: 'FST_OPENAI_WEBHOOK_MISSING_HEADER' })
    t.same(await unwrap(sign(EVENT), { verifier: standardWebhooks() }), EVENT)

    const own: Verifier = ({ headers }, keys) => {
      if (headers['x-mine'] !== keys[0]!.export().toString('base64')) throw new Error('not mine')
      return { webhookId: 'mine', timestamp: Date.now() / 1000 }
    }
    t.same(await unwrap({ headers: { 'X-Mine': OTHER.slice(6) }, body }, { verifier: own, secret: OTHER }), EVENT, 'one of the user\'s gets lower-case names')
    await t.rejects(unwrap({ headers: {}, body }, { verifier: own }), { ...mismatch, cause: { message: 'not mine' } })
  })

  t.test('none but these', async t => {
    const { headers, body } = sign(EVENT)
    const wrong: [unknown, RegExp][] = [
      [{ tolerence: 60 }, /unknown option "tolerence", did you mean "tolerance"/],
      [{ tolerance: '60' }, /expected tolerance to be a whole number of seconds/],
      [{ tolerance: 0 }, /expected tolerance to be a whole number of seconds/],
      [{ verifier: {} }, /expected verifier to be a function/],
      [{ on: {} }, /unknown option "on"/],
      [{ bodyTimeout: 60 }, /unknown option "bodyTimeout"/],
      [null, /expected options to be an object, got null/],
      [[], /expected options to be an object, got an array/],
      [SECRET, /expected options to be an object, got a string/]
    ]
    for (const [overrides, message] of wrong) {
      await t.rejects(app.openaiWebhook.unwrap(body, headers, overrides as UnwrapArguments[2]), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message })
    }
  })
})

t.test('what is refused, and with which code', async t => {
  const app = await build(t)
  await app.ready()
  const good = sign(EVENT)
  const now = Number(good.headers['webhook-timestamp'])
  const withHeader = (name: string, value: unknown): [Buffer, UnwrapArguments[1]] => [good.body, { ...good.headers, [name]: value } as UnwrapArguments[1]]
  const signed = (event: unknown, options = {}): [Buffer, UnwrapArguments[1]] => {
    const { body, headers } = sign(event, options)
    return [body, headers]
  }

  const refusals: Record<string, [number, [string | Uint8Array, UnwrapArguments[1]][], RegExp]> = {
    MISSING_HEADER: [401, [
      ...['webhook-id', 'webhook-timestamp', 'webhook-signature'].flatMap(name => [withHeader(name, undefined), withHeader(name, '')]),
      [good.body, {}],
      [good.body, new Headers()]
    ], /the webhook-(?:id|timestamp|signature) header is missing or empty/],
    INVALID_ID: [401, [
      withHeader('webhook-id', 'wh_1.2'),
      withHeader('webhook-id', 'wh_1, wh_1'),
      withHeader('webhook-id', 'wh 1'),
      withHeader('webhook-id', 'wh_\u0007'),
      withHeader('webhook-id', 'wh_\u00e9'),
      withHeader('webhook-id', 'x'.repeat(257)),
      withHeader('webhook-id', [good.headers['webhook-id']]),
      withHeader('webhook-id', 7)
    ], /webhook-id must be 1 to 256 visible ASCII characters/],
    INVALID_TIMESTAMP: [401, [
      ...['1e9', `+${now}`, ` ${now}`, `${now}abc`, `${now}.5`, '-1', 'NaN', `${now}, ${now}`].map(text => withHeader('webhook-timestamp', text)),
      withHeader('webhook-timestamp', [String(now)]),
      withHeader('webhook-timestamp', now)
    ], /webhook-timestamp must be whole decimal seconds/],
    TIMESTAMP_OUT_OF_TOLERANCE: [401, [
      signed(EVENT, { timestamp: now - 3_600 }),
      signed(EVENT, { timestamp: now + 3_600 }),
      withHeader('webhook-timestamp', '0'),
      withHeader('webhook-timestamp', '9'.repeat(20)),
      withHeader('webhook-timestamp', '9'.repeat(400))
    ], /more than 300 s away from this server's clock: (?:\d+|Infinity) s (?:ahead|behind)$/],
    INVALID_SIGNATURE: [401, [
      signed(EVENT, { secret: OTHER }),
      [`${good.body.toString()} `, good.headers],
      ['', good.headers],
      withHeader('webhook-id', 'wh_other'),
      withHeader('webhook-signature', [good.headers['webhook-signature']]),
      withHeader('webhook-signature', good.headers['webhook-signature']!.slice(3)),
      withHeader('webhook-signature', 'v1,')
    ], /no signature matches the body and the signing secret/],
    INVALID_BODY: [400, [
      signed(''), signed('null'), signed('[]'), signed('"text"'), signed('{}'), signed('{"type":1}'), signed('{"type":'), signed('\ufeff{"type":"a"}'),
      signed('{"type":"a","__proto__":{}}')
    ], /the signed body is not an event/],
    INVALID_EVENT: [400, [
      signed({ ...EVENT, data: {} }),
      signed({ ...EVENT, data: { id: 4711 } })
    ], /\/data\/id/]
  }
  for (const [timestamp, off] of [[now - 3_600, /: 36\d\d s behind$/], [now + 3_601, /: 3[56]\d\d s ahead$/]] as const) {
    await t.rejects(app.openaiWebhook.unwrap(...signed(EVENT, { timestamp })), { message: off })
  }
  for (const [code, [statusCode, deliveries, message]] of Object.entries(refusals)) {
    for (const [rawBody, headers] of deliveries) {
      const error: Error = await app.openaiWebhook.unwrap(rawBody, headers).then(() => t.fail(`accepted: ${JSON.stringify(headers)}`) as never, error => error)
      t.match(error, { code: `FST_OPENAI_WEBHOOK_${code}`, statusCode, message })
      t.notMatch(error.message, '4711', 'without a value out of the payload')
    }
  }
})

t.test('a secret function that fails proves no forgery', async t => {
  const app = await build(t)
  await app.ready()
  const { headers, body } = sign(EVENT)
  const failing = {
    'it throws': () => { throw new Error('the secret manager is down') },
    'it rejects': async () => { throw new Error('the secret manager is down') },
    'it returns nothing': () => undefined as never,
    'it returns an API key': () => 'sk-proj-abc'
  }
  for (const [name, secret] of Object.entries(failing)) {
    const failed = { code: 'FST_OPENAI_WEBHOOK_INVALID_SECRET', message: /the `secret` function has failed/ }
    await t.rejects(app.openaiWebhook.unwrap(body, headers, { secret }), failed, name)
    await t.rejects(app.openaiWebhook.unwrap(body, headers, { secret }), failed, `${name}, and is not asked again at once`)
  }
})

t.test('arguments of the wrong type', async t => {
  const app = await build(t)
  await app.ready()
  const { headers, body } = sign(EVENT)
  const wrongBody = { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: /expected the raw body as a string, a Buffer or a Uint8Array: a parsed body cannot be verified/ }
  for (const rawBody of [EVENT, undefined, null, 7, [...body], new ArrayBuffer(8)]) {
    await t.rejects(app.openaiWebhook.unwrap(rawBody as unknown as string, headers), wrongBody)
    await t.rejects(app.openaiWebhook.unwrap(rawBody as unknown as string, {}), wrongBody, 'told before what the headers lack')
  }
  const wrongHeaders = { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: /expected the headers as an object or a Headers instance/ }
  for (const value of [undefined, null, 'webhook-id: wh_1', 7, Object.entries(headers)]) {
    await t.rejects(app.openaiWebhook.unwrap(body, value as unknown as Headers), wrongHeaders)
  }
})
