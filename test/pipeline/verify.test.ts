import { createHash, createHmac, createSecretKey, randomBytes } from 'node:crypto'
import type { FastifyInstance } from 'fastify'
import OpenAI from 'openai'
import { Webhook } from 'standardwebhooks'
import t from 'tap'
import type { Test } from 'tap'
import { guideEvents, standardWebhooks, xOpenAISignature } from '../../lib/index.ts'
import type { OpenAIWebhookOptions, Verified, Verifier } from '../../lib/index.ts'
import { fail } from '../support/composition.ts'
import { build, post, SECRET, sign, stoppedClock, thin, VECTOR } from '../support/deliveries.ts'
import type { Signed } from '../support/deliveries.ts'
import { unixTime } from '../support/time.ts'
import { chunk, CHUNKED, head, listen, request, Wire } from '../support/wire.ts'

const OWN = '/webhooks/openai'
const MARKED = '/own'
const ROUTES = [OWN, MARKED]

const client = new OpenAI({ apiKey: 'none', webhookSecret: SECRET })
const reference = new Webhook(SECRET)

const keyBytes = (secret: string) => Buffer.from(secret.slice('whsec_'.length), 'base64')
const newSecret = () => `whsec_${randomBytes(24).toString('base64')}`

/** Signs whatever stands in the headers, sound or not. */
function mac (id: string, timestamp: string, body: Buffer | string, secret = SECRET): string {
  return createHmac('sha256', keyBytes(secret)).update(`${id}.${timestamp}.`).update(body).digest('base64')
}

function signedAs (id: string, timestamp: string, body: Buffer | string = JSON.stringify(thin('batch.failed'))): Signed {
  return {
    headers: {
      'content-type': 'application/json',
      'webhook-id': id,
      'webhook-timestamp': timestamp,
      'webhook-signature': `v1,${mac(id, timestamp, body)}`
    },
    body: Buffer.from(body)
  }
}

interface Fixture {
  app: FastifyInstance
  /** How many handlers have run, on either route. */
  runs: () => number
}

/** An app with the plugin's own route and a marked one, ready. */
async function fixture (t: Test, options: OpenAIWebhookOptions = {}): Promise<Fixture> {
  const app = await build(t, options, { forceCloseConnections: true })
  let runs = 0
  app.openaiWebhook.onAny(() => { runs++ })
  app.post(MARKED, { config: { openaiWebhook: {} } }, async () => { runs++ })
  await app.ready()
  return { app, runs: () => runs }
}

interface Refusal { statusCode?: number, code: string }

function codeOf (body: string): unknown {
  return (JSON.parse(body) as { code?: unknown }).code
}

/** Both routes refuse it with this code, run nothing and tell nothing of the key. */
async function refuses (t: Test, { app, runs }: Fixture, { headers, body }: Signed | { headers: Record<string, string | string[]>, body: Buffer }, expected: string | Refusal, name = ''): Promise<void> {
  const { statusCode = 401, code } = typeof expected === 'string' ? { code: `FST_OPENAI_WEBHOOK_${expected}` } : expected
  const before = runs()
  for (const url of ROUTES) {
    const response = await app.inject({ method: 'POST', url, headers, payload: body })
    t.match({ statusCode: response.statusCode, code: codeOf(response.body) }, { statusCode, code }, `${name} at ${url}`)
    const right = mac(String(headers['webhook-id']), String(headers['webhook-timestamp']), body)
    const told = JSON.stringify([response.headers, response.body])
    t.notOk(told.includes(right) || told.includes(SECRET.slice('whsec_'.length)), 'neither secret nor expected signature in the answer')
  }
  t.equal(runs(), before, 'no handler ran')
}

async function accepts (t: Test, { app, runs }: Fixture, { headers, body }: Signed | { headers: Record<string, string | string[]>, body: Buffer }, name = ''): Promise<void> {
  const before = runs()
  for (const url of ROUTES) {
    const response = await app.inject({ method: 'POST', url, headers, payload: body })
    t.match({ statusCode: response.statusCode, body: response.body }, { statusCode: 200, body: '{"received":true}' }, `${name} at ${url}`)
  }
  t.equal(runs(), before + 2, 'the handlers ran')
}

/** The answer to bytes on a socket of their own; the body need not be complete. */
async function exchange (t: Test, port: number, bytes: Buffer) {
  const wire = await Wire.open(t, port)
  await wire.write(bytes)
  const answer = await wire.answer()
  wire.socket.destroy()
  return answer
}

const HEADERS = ['webhook-id', 'webhook-timestamp', 'webhook-signature'] as const

t.test('headers that are absent or empty', async t => {
  const all = await fixture(t)
  for (const name of HEADERS) {
    const { headers, body } = sign(thin('batch.failed'))
    const { [name]: _absent, ...rest } = headers
    await refuses(t, all, { headers: rest, body }, 'MISSING_HEADER', `${name} absent`)
    await refuses(t, all, { headers: { ...headers, [name]: '' }, body }, 'MISSING_HEADER', `${name} empty`)
  }
  await refuses(t, all, { headers: { 'content-type': 'application/json' }, body: sign(thin('batch.failed')).body }, 'MISSING_HEADER', 'all absent')
})

t.test('the headers that admitted a request are those that are verified', async t => {
  const app = await build(t)
  const old = signedAs('wh_old', '1', JSON.stringify(thin('batch.completed')))
  // A hook of the app that restores what a proxy has renamed. It comes after the timestamp was checked.
  app.addHook('preParsing', async ({ raw: { headers } }) => {
    for (const name of HEADERS) headers[name] = headers[`x-${name}`] as string | undefined ?? headers[name]
  })
  const renamed = (headers: Record<string, string>) => Object.fromEntries(HEADERS.map(name => [`x-${name}`, headers[name]!]))
  await app.ready()
  const post = async (headers: Record<string, string>, payload: Buffer): Promise<unknown> => {
    const { statusCode, body } = await app.inject({ method: 'POST', url: OWN, headers, payload })
    return [statusCode, codeOf(body)]
  }
  const fresh = signedAs('wh_fresh', String(unixTime()))
  t.same(await post({ ...fresh.headers, ...renamed(old.headers) }, old.body), [401, 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE'], 'a replay under fresh headers')
  t.same(await post({ ...fresh.headers, ...renamed(old.headers) }, fresh.body), [200, undefined])
})

t.test('a hook that throws null skips the hook that reads the headers, and they are read all the same', async t => {
  const app = await build(t)
  let runs = 0
  app.addHook('onRequest', () => { fail(null) })
  app.openaiWebhook.onAny(() => { runs++ })
  await app.ready()
  const post = async ({ headers, body: payload }: Signed): Promise<unknown> => {
    const { statusCode, body } = await app.inject({ method: 'POST', url: OWN, headers, payload })
    return [statusCode, codeOf(body)]
  }
  const fresh = sign(thin('batch.failed'))
  t.same(await post({ headers: { 'content-type': 'application/json' }, body: fresh.body }), [401, 'FST_OPENAI_WEBHOOK_MISSING_HEADER'])
  t.same(await post(signedAs('wh_old', '1')), [401, 'FST_OPENAI_WEBHOOK_TIMESTAMP_OUT_OF_TOLERANCE'])
  t.same(await post({ ...fresh, body: Buffer.from(JSON.stringify(thin('batch.completed'))) }), [401, 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE'])
  t.equal(runs, 0)
  t.same(await post(fresh), [200, undefined])
  t.equal(runs, 1)
})

t.test('headers on the wire', async t => {
  const { app, runs } = await fixture(t)
  const port = await listen(app)

  async function refused (t: Test, url: string, lines: Array<[string, string]>, body: Buffer, code: string, name: string): Promise<void> {
    const answer = await exchange(t, port, request(lines, body, url))
    t.match([answer.status, codeOf(answer.body)], [401, `FST_OPENAI_WEBHOOK_${code}`], name)
  }

  for (const url of ROUTES) {
    t.test(`doubled, at ${url}`, async t => {
      for (const [name, code] of [
        ['webhook-id', 'INVALID_ID'], ['webhook-timestamp', 'INVALID_TIMESTAMP'], ['webhook-signature', 'INVALID_SIGNATURE']
      ] as const) {
        const { headers, body } = sign(thin('batch.failed'))
        const other = sign(thin('batch.failed')).headers[name]!
        for (const second of [headers[name]!, other, '']) {
          await refused(t, url, [...Object.entries(headers), [name, second]], body, code, `${name}, then "${second}"`)
          await refused(t, url, [[name, second], ...Object.entries(headers)], body, code, `${name} after "${second}"`)
        }
      }
      t.equal(runs(), 0)
    })

    t.test(`empty, at ${url}`, async t => {
      for (const name of HEADERS) {
        const { headers, body } = sign(thin('batch.failed'))
        for (const value of ['', ' ', '\t']) {
          await refused(t, url, Object.entries({ ...headers, [name]: value }), body, 'MISSING_HEADER', `${name}: ${JSON.stringify(value)}`)
        }
      }
      t.equal(runs(), 0)
    })

    t.test(`oversized, at ${url}`, async t => {
      const { headers, body } = sign(thin('batch.failed'))
      for (const [name, value, code] of [
        ['webhook-id', 'x'.repeat(10_000), 'INVALID_ID'],
        ['webhook-timestamp', '1'.repeat(10_000), 'TIMESTAMP_OUT_OF_TOLERANCE'],
        ['webhook-timestamp', `${headers['webhook-timestamp']}${'x'.repeat(10_000)}`, 'INVALID_TIMESTAMP'],
        ['webhook-signature', `${headers['webhook-signature']}${'x'.repeat(10_000)}`, 'INVALID_SIGNATURE']
      ] as const) {
        await refused(t, url, Object.entries({ ...headers, [name]: value }), body, code, name)
      }
      for (const name of HEADERS) {
        const { status } = await exchange(t, port, request(Object.entries({ ...headers, [name]: 'x'.repeat(20_000) }), body, url))
        t.equal(status, 431, `${name} beyond what node:http reads`)
      }
      t.equal(runs(), 0)
    })

    t.test(`characters that an id may not have, at ${url}`, async t => {
      for (const id of ['wh_\t1', 'wh_é1', 'wh_\u00801', 'wh 1', 'wh.1', 'wh,1']) {
        const { headers, body } = signedAs(id, String(unixTime()))
        await refused(t, url, Object.entries(headers), body, 'INVALID_ID', JSON.stringify(id))
      }
      for (const id of ['wh_\u00001', 'wh_\u00011', 'wh_\u007f1', 'wh_\n1']) {
        const { headers, body } = signedAs(id, String(unixTime()))
        const { status } = await exchange(t, port, request(Object.entries(headers), body, url))
        t.equal(status, 400, `${JSON.stringify(id)}: node:http refuses it`)
      }
      t.equal(runs(), 0)
    })

    t.test(`judged before the body has come, at ${url}`, async t => {
      const stale = sign(thin('batch.failed'), { timestamp: unixTime() - 301 })
      const early = sign(thin('batch.failed'), { timestamp: unixTime() + 400 })
      const fresh = sign(thin('batch.failed'))
      for (const [{ headers, body }, code] of [
        [stale, 'TIMESTAMP_OUT_OF_TOLERANCE'],
        [early, 'TIMESTAMP_OUT_OF_TOLERANCE'],
        [{ headers: { 'content-type': 'application/json' }, body: fresh.body }, 'MISSING_HEADER'],
        [{ headers: { ...fresh.headers, 'webhook-signature': '' }, body: fresh.body }, 'MISSING_HEADER'],
        [{ headers: { ...fresh.headers, 'webhook-id': 'wh.1' }, body: fresh.body }, 'INVALID_ID'],
        [{ headers: { ...fresh.headers, 'webhook-timestamp': 'now' }, body: fresh.body }, 'INVALID_TIMESTAMP']
      ] as Array<[Signed, string]>) {
        const lines = Object.entries(headers)
        for (const bytes of [
          head([...lines, ['content-length', String(body.length)]], url),
          Buffer.concat([head([...lines, ['content-length', String(body.length)]], url), body.subarray(0, 10)]),
          head([...lines, ['content-length', String(2 ** 31)]], url),
          Buffer.concat([head([...lines, ...CHUNKED], url), chunk(body)])
        ]) {
          const answer = await exchange(t, port, bytes)
          t.match([answer.status, codeOf(answer.body)], [401, `FST_OPENAI_WEBHOOK_${code}`])
        }
      }
      t.equal(runs(), 0)
    })
  }
})

t.test('headers given as arrays', async t => {
  const all = await fixture(t)
  const { headers, body } = sign(thin('batch.failed'))
  for (const [name, code] of [
    ['webhook-id', 'INVALID_ID'], ['webhook-timestamp', 'INVALID_TIMESTAMP'], ['webhook-signature', 'INVALID_SIGNATURE']
  ] as const) {
    await refuses(t, all, { headers: { ...headers, [name]: [headers[name]!, headers[name]!] }, body }, code, name)
    for (const value of [[headers[name]!], [headers[name]!, headers[name]!], []]) {
      await t.rejects(all.app.openaiWebhook.unwrap(body, { ...headers, [name]: value }), { code: `FST_OPENAI_WEBHOOK_${code}`, statusCode: 401 }, `unwrap, ${name}: ${value.length} values`)
    }
  }
})

t.test('webhook-id', async t => {
  const all = await fixture(t)
  const now = String(unixTime())

  t.test('visible ASCII without "." and ",", up to 256 characters', async t => {
    for (const id of ['x', 'wh_685c059ae39c8190af8c71ed1022a24d', 'msg-1:2/3+4=5', '!"#$%&\'()*+-/0:;<=>?@A[\\]^_`a{|}~', 'x'.repeat(256)]) {
      await accepts(t, all, signedAs(id, now), id)
    }
  })

  t.test('anything else, rightly signed', async t => {
    for (const id of ['wh.1', '.', 'wh_1.', 'wh,1', ', wh_1', 'wh 1', ' wh_1', 'wh_1 ', 'wh\t1', 'wh\n1', 'wh\u00001', 'wh\u007f', 'whé', 'wh\u0080', '世界', 'x'.repeat(257), 'x'.repeat(100_000)]) {
      await refuses(t, all, signedAs(id, now), 'INVALID_ID', JSON.stringify(id.slice(0, 20)))
    }
  })

  t.test('a day-old delivery does not pass as a fresh one by splitting the signed text elsewhere', async t => {
    const old = unixTime() - 86_400
    const text = JSON.stringify({ text: `.${now}.`, ...thin('batch.failed') })
    const original = sign(text, { timestamp: old, webhookId: 'wh_1' })
    t.throws(() => reference.verify(text, original.headers), { message: 'Message timestamp too old' })
    await refuses(t, all, original, 'TIMESTAMP_OUT_OF_TOLERANCE')

    const [before, after] = text.split(`.${now}.`) as [string, string]
    const replay = {
      headers: { ...original.headers, 'webhook-id': `wh_1.${old}.${before}`, 'webhook-timestamp': now },
      body: Buffer.from(after)
    }
    t.doesNotThrow(() => reference.verify(replay.body, replay.headers, { jsonParse: false }), 'standardwebhooks accepts it')
    await t.resolves(client.webhooks.verifySignature(after, replay.headers), 'the official SDK accepts it')
    await refuses(t, all, replay, 'INVALID_ID')

    const port = await listen(all.app)
    for (const url of ROUTES) {
      const answer = await exchange(t, port, request(Object.entries(replay.headers), replay.body, url))
      t.match([answer.status, codeOf(answer.body)], [401, 'FST_OPENAI_WEBHOOK_INVALID_ID'], `on a socket, ${url}`)
    }
  })

  t.test('nor by moving the body\'s beginning into the timestamp', async t => {
    const text = JSON.stringify({ text: '.', ...thin('batch.failed') })
    const original = sign(text)
    const [before, after] = text.split('.') as [string, string]
    const rest = text.slice(before.length + 1)
    t.ok(rest.startsWith(after))
    const replay = {
      headers: { ...original.headers, 'webhook-timestamp': `${original.headers['webhook-timestamp']}.${before}` },
      body: Buffer.from(rest)
    }
    await t.resolves(client.webhooks.verifySignature(rest, replay.headers), 'the official SDK accepts it')
    await refuses(t, all, replay, 'INVALID_TIMESTAMP')
  })
})

t.test('webhook-timestamp', async t => {
  const all = await fixture(t, { tolerance: 300 })

  t.test('anything but digits, at the very second that a laxer reading would make of it', async t => {
    for (const [value, near] of [
      ['1750861210abc', 1750861210], ['1750861210.5', 1750861210], ['1750861210.', 1750861210], ['1750861210 ', 1750861210],
      ['1_750_861_210', 1], ['1,750,861,210', 1], ['1e9', 1e9], ['-1', 0], ['+1', 1], [' 1', 1], ['NaN', 0], ['Infinity', 0], ['null', 0],
      ['.5', 0], ['0x10', 16], ['١٢', 12], ['1750861210n', 1750861210], ['\n1', 1], ['1, 1', 1]
    ] as const) {
      await t.test(JSON.stringify(value), async t => {
        stoppedClock(t, near * 1000)
        await refuses(t, all, signedAs('wh_1', value), 'INVALID_TIMESTAMP')
      })
    }
  })

  t.test('digits that are out of any range', async t => {
    for (const value of ['0', '99999999999999999999', '9'.repeat(400), '1750861210000']) {
      await refuses(t, all, signedAs('wh_1', value), 'TIMESTAMP_OUT_OF_TOLERANCE', value.slice(0, 20))
    }
  })

  t.test('at the tolerance, and a second beyond', async t => {
    const strict = await fixture(t, { tolerance: 10 })
    const loose = await fixture(t, { tolerance: 3_600 })
    const byDefault = await fixture(t)
    const now = VECTOR.timestamp
    stoppedClock(t, now * 1000)
    for (const [instance, tolerance] of [[byDefault, 300], [strict, 10], [loose, 3_600]] as const) {
      for (const direction of [-1, 1]) {
        await accepts(t, instance, sign(thin('batch.failed'), { timestamp: now + direction * tolerance }))
        await refuses(t, instance, sign(thin('batch.failed'), { timestamp: now + direction * (tolerance + 1) }), 'TIMESTAMP_OUT_OF_TOLERANCE')
      }
    }
  })

  t.test('a tolerance of a route\'s own', async t => {
    const app = await build(t, { tolerance: 10 })
    let runs = 0
    app.openaiWebhook.onAny(() => { runs++ })
    app.openaiWebhook.route({ url: '/route', tolerance: 20 })
    app.post('/marked', { config: { openaiWebhook: { tolerance: 30 } } }, async () => { runs++ })
    await app.ready()
    const now = VECTOR.timestamp
    stoppedClock(t, now * 1000)
    for (const [url, tolerance] of [[OWN, 10], ['/route', 20], ['/marked', 30]] as const) {
      runs = 0
      t.equal((await post(app, sign(thin('batch.failed'), { timestamp: now - tolerance }), url)).statusCode, 200)
      t.equal((await post(app, sign(thin('batch.failed'), { timestamp: now - tolerance - 1 }), url)).statusCode, 401)
      t.equal(runs, 1)
    }
  })

  t.test('time that passes while the body arrives counts', async t => {
    const app = await build(t, { tolerance: 10 })
    let runs = 0
    app.openaiWebhook.onAny(() => { runs++ })
    const now = VECTOR.timestamp
    let late = false
    app.post(MARKED, {
      config: { openaiWebhook: {} },
      onRequest: async () => { if (late) clock.advance(11_000) }
    }, async () => { runs++ })
    await app.ready()
    const clock = stoppedClock(t, now * 1000)
    t.equal((await post(app, sign(thin('batch.failed'), { timestamp: now }), MARKED)).statusCode, 200)
    late = true
    const response = await post(app, sign(thin('batch.failed'), { timestamp: now }), MARKED)
    t.equal(codeOf(response.body), 'FST_OPENAI_WEBHOOK_TIMESTAMP_OUT_OF_TOLERANCE')
    t.equal(runs, 1)
  })
})

t.test('webhook-signature', async t => {
  const all = await fixture(t)

  /** A fresh delivery whose signature header is made from the right MAC. */
  function withSignature (make: (right: string, delivery: Signed) => string): Signed {
    const delivery = sign(thin('batch.failed', { id: 'batch_1' }))
    const right = delivery.headers['webhook-signature']!.slice('v1,'.length)
    return { headers: { ...delivery.headers, 'webhook-signature': make(right, delivery) }, body: delivery.body }
  }

  const wrong = () => `v1,${randomBytes(32).toString('base64')}`

  t.test('that do not hold the right one', async t => {
    for (const [name, make] of Object.entries<(right: string) => string>({
      'wrong MAC': wrong,
      'no v1,': right => right,
      'v1a,': right => `v1a,${right}`,
      'V1,': right => `V1,${right}`,
      'v2,': right => `v2,${right}`,
      'v1=': right => `v1=${right}`,
      'v1, alone': () => 'v1,',
      'v1,,': right => `v1,,${right}`,
      'v1 and a space': right => `v1 ${right}`,
      unpadded: right => `v1,${right.slice(0, -1)}`,
      'over-padded': right => `v1,${right}=`,
      'too short': right => `v1,${right.slice(0, -5)}=`,
      'too long': right => `v1,${right.slice(0, -1)}AAAA`,
      hex: right => `v1,${Buffer.from(right, 'base64').toString('hex')}`,
      'not base64': () => `v1,${'!'.repeat(44)}`,
      'multi-byte characters': () => `v1,${'é'.repeat(44)}`,
      'characters that share their low byte with the right ones': right => `v1,${[...right].map(char => String.fromCharCode(char.charCodeAt(0) + 0x100)).join('')}`,
      'junk inside': right => `v1,${right.slice(0, 20)}\t${right.slice(20)}`,
      'other case': right => `v1,${right.toLowerCase()}`,
      'joined by commas': right => `${wrong()},v1,${right}`,
      'a comma and a space after another': right => `${wrong()}, v1,${right}`,
      'a tab between': right => `${wrong()}\tv1,${right}`,
      'spaces alone': () => '   ',
      '1,000 wrong ones': () => Array.from({ length: 1_000 }, wrong).join(' '),
      '1,000 times v1,': () => Array.from({ length: 1_000 }, () => 'v1,').join(' ')
    })) {
      await refuses(t, all, withSignature(make), 'INVALID_SIGNATURE', name)
    }
  })

  t.test('URL-safe base64', async t => {
    let delivery = sign(thin('batch.failed'))
    while (!/[+/]/.test(delivery.headers['webhook-signature']!.slice('v1,'.length))) delivery = sign(thin('batch.failed'))
    const urlSafe = delivery.headers['webhook-signature']!.replaceAll('+', '-').replaceAll('/', '_')
    await refuses(t, all, { ...delivery, headers: { ...delivery.headers, 'webhook-signature': urlSafe } }, 'INVALID_SIGNATURE')
  })

  t.test('non-canonical base64 of the right bytes', async t => {
    const alphabet = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/'
    const delivery = withSignature(right => {
      const twin = `${right.slice(0, 42)}${alphabet[alphabet.indexOf(right[42]!) + 1]!}=`
      t.same(Buffer.from(twin, 'base64'), Buffer.from(right, 'base64'), 'decodes to the same bytes')
      return `v1,${twin}`
    })
    await t.resolves(client.webhooks.verifySignature(delivery.body.toString(), delivery.headers), 'the official SDK accepts it')
    await refuses(t, all, delivery, 'INVALID_SIGNATURE')
  })

  t.test('several, of which one is right', async t => {
    for (const [name, make] of Object.entries<(right: string) => string>({
      first: right => `v1,${right} ${wrong()}`,
      last: right => `${wrong()} ${wrong()} v1,${right}`,
      'after another version': right => `v1a,${randomBytes(64).toString('base64')} v1,${right}`,
      'after two spaces': right => `${wrong()}  v1,${right}`,
      'twice the same': right => `v1,${right} v1,${right}`,
      'last of 1,000': right => [...Array.from({ length: 999 }, wrong), `v1,${right}`].join(' ')
    })) {
      const delivery = withSignature(make)
      t.doesNotThrow(() => reference.verify(delivery.body, delivery.headers), 'standardwebhooks agrees')
      await accepts(t, all, delivery, name)
    }
  })

  t.test('made for something else', async t => {
    const delivery = sign(thin('batch.failed'))
    const { 'webhook-id': id, 'webhook-timestamp': timestamp } = delivery.headers as Record<string, string>
    const { body } = delivery
    for (const [name, made] of Object.entries({
      'another id': mac(`${id}0`, timestamp!, body),
      'another timestamp': mac(id!, String(Number(timestamp) + 1), body),
      'another body': mac(id!, timestamp!, `${body.toString()}\n`),
      'another secret': mac(id!, timestamp!, body, newSecret()),
      'the body alone': createHmac('sha256', keyBytes(SECRET)).update(body).digest('base64'),
      'the secret\'s text as the key': createHmac('sha256', SECRET).update(`${id}.${timestamp}.`).update(body).digest('base64')
    })) {
      await refuses(t, all, { headers: { ...delivery.headers, 'webhook-signature': `v1,${made}` }, body }, 'INVALID_SIGNATURE', name)
    }
  })

  t.test('over U+FFFD, where a byte that is not UTF-8 arrives', async t => {
    const signed = sign(thin('batch.failed', { id: 'batch_\ufffd' }))
    await accepts(t, all, signed, 'as it was signed')
    const at = signed.body.indexOf(Buffer.from('\ufffd'))
    const body = Buffer.concat([signed.body.subarray(0, at), Buffer.from([0xff]), signed.body.subarray(at + 3)])
    t.doesNotThrow(() => reference.verify(body, signed.headers), 'standardwebhooks accepts it')
    await t.resolves(client.webhooks.unwrap(body.toString(), signed.headers), 'the official SDK accepts it')
    await refuses(t, all, { headers: signed.headers, body }, 'INVALID_SIGNATURE')
  })
})

t.test('several secrets', async t => {
  const secrets = [newSecret(), newSecret(), newSecret()]

  t.test('each of them is accepted, no other', async t => {
    const all = await fixture(t, { secret: secrets })
    for (const secret of secrets) await accepts(t, all, sign(thin('batch.failed'), { secret }))
    await refuses(t, all, sign(thin('batch.failed')), 'INVALID_SIGNATURE')
  })

  t.test('the verifier says which one', async t => {
    const keys = secrets.map(secret => createSecretKey(keyBytes(secret)))
    const verify = standardWebhooks()
    for (const [keyIndex, secret] of secrets.entries()) {
      const { headers, body: rawBody } = sign(thin('batch.failed'), { secret, webhookId: 'wh_1', timestamp: 1750861210 })
      t.same(verify({ headers, rawBody }, keys), { webhookId: 'wh_1', timestamp: 1750861210, keyIndex })
    }
    const { headers, body: rawBody } = sign(thin('batch.failed'))
    t.throws(() => verify({ headers, rawBody }, keys), { code: 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE' })
    t.throws(() => verify({ headers, rawBody }, []), { code: 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE' }, 'no key, no match')
  })

  t.test('a secret function is asked again when none matches', async t => {
    const [first, second, third] = secrets as [string, string, string]
    let answer: () => string = () => first
    let asked = 0
    const all = await fixture(t, { secret: () => { asked++; return answer() } })
    const clock = stoppedClock(t, VECTOR.timestamp * 1000)
    const signed = (secret: string) => sign(thin('batch.failed'), { secret })
    await accepts(t, all, signed(first))
    t.equal(asked, 1, 'at boot')

    answer = () => second
    clock.advance(60_000)
    await accepts(t, all, signed(second))
    t.equal(asked, 2)
    await refuses(t, all, signed(third), 'INVALID_SIGNATURE')
    t.equal(asked, 2, 'not again within a minute')
    clock.advance(60_000)
    await refuses(t, all, signed(third), 'INVALID_SIGNATURE', 'still none matches')
    t.equal(asked, 3)

    answer = () => { throw new Error('the secret manager is down') }
    clock.advance(60_000)
    await refuses(t, all, signed(third), 'INVALID_SIGNATURE')
    t.equal(asked, 4)
    await accepts(t, all, signed(second), 'the known keys stay in use')
  })
})

t.test('a verifier of the user\'s own', async t => {
  const delivery = { headers: { 'content-type': 'application/json' }, body: Buffer.from(JSON.stringify(thin('batch.failed'))) }
  const good = (): Verified => ({ webhookId: `wh_${randomBytes(8).toString('hex')}`, timestamp: unixTime() })
  const coded = (code: string, statusCode: number) => Object.assign(new Error('told by the verifier'), { code, statusCode })
  const withVerifier = (t: Test, verifier: unknown) => fixture(t, { verifier: verifier as Verifier })

  t.test('decides', async t => {
    await accepts(t, await withVerifier(t, good), delivery)
  })

  t.test('throws a coded 4xx: the sender is told', async t => {
    await refuses(t, await withVerifier(t, () => { throw coded('MY_REFUSAL', 403) }), delivery, { statusCode: 403, code: 'MY_REFUSAL' })
  })

  t.test('throws anything else', async t => {
    for (const thrown of [
      new Error('secret detail'), new TypeError('x is not a function'), coded('MY_FAILURE', 500), coded('MY_SUCCESS', 200), coded('MY_REDIRECT', 302),
      Object.assign(new Error('no code'), { statusCode: 403 }), Object.assign(new Error('no status'), { code: 'MY_CODE' }), undefined, null, 'text', 401,
      { code: 'NO_ERROR', statusCode: 403 }, Object.defineProperty(new Error('unreadable'), 'code', { get () { throw new Error('no') } }),
      Object.assign(coded('MY_REFUSAL', 403), { then () {} })
    ]) {
      const all = await withVerifier(t, () => { throw thrown })
      const told: unknown[] = []
      const app = await build(t, { verifier: (() => { throw thrown }) as Verifier })
      app.openaiWebhook.onError(({ cause }) => { told.push(cause) })
      await refuses(t, all, delivery, 'INVALID_SIGNATURE', String(thrown))
      const { body } = await post(app, delivery)
      t.notMatch(body, /secret detail|not a function|told by/)
      t.same(told, [thrown], 'onError is told why')
    }
  })

  t.test('returns an error: it is as good as thrown', async t => {
    await refuses(t, await withVerifier(t, () => coded('MY_REFUSAL', 403)), delivery, { statusCode: 403, code: 'MY_REFUSAL' })
    for (const returned of [new Error('secret detail'), coded('MY_FAILURE', 500)]) {
      await refuses(t, await withVerifier(t, () => returned), delivery, 'INVALID_SIGNATURE', String(returned))
    }
  })

  t.test('answers with what cannot be read', async t => {
    const unreadable = { get webhookId () { throw new Error('no') }, timestamp: unixTime() }
    await refuses(t, await withVerifier(t, () => unreadable), delivery, 'INVALID_SIGNATURE')
    const once = { ...good(), reads: 0, get webhookId () { if (this.reads++ > 0) throw new Error('no'); return `wh_${randomBytes(8).toString('hex')}` } }
    await accepts(t, await withVerifier(t, () => Object.assign(Object.create(once), { reads: 0 })), delivery, 'read once')
    // Is an Error when it is first looked at, and no longer then.
    const turncoat = () => {
      let looks = 0
      return new Proxy(coded('MY_REFUSAL', 403), { getPrototypeOf: () => looks++ < 1 ? Error.prototype : null })
    }
    await refuses(t, await withVerifier(t, () => { throw turncoat() }), delivery, 'TIMESTAMP_OUT_OF_TOLERANCE')
  })

  t.test('has taken over all that is on one of ours, and is asked all the same', async t => {
    const ours = standardWebhooks()
    const stricter = Object.assign((...[delivered, keys]: Parameters<Verifier>) => {
      if (delivered.headers['x-mine'] !== 'yes') throw coded('MY_REFUSAL', 403)
      return ours(delivered, keys)
    }, ours)
    const all = await withVerifier(t, stricter)
    await refuses(t, all, sign(thin('batch.failed')), { statusCode: 403, code: 'MY_REFUSAL' })
    const { headers, body } = sign(thin('batch.failed'))
    await accepts(t, all, { headers: { ...headers, 'x-mine': 'yes' }, body })
  })

  t.test('forgets to throw, or to answer', async t => {
    for (const [name, answer, code] of [
      ['nothing', undefined, 'INVALID_SIGNATURE'], ['null', null, 'INVALID_SIGNATURE'], ['true', true, 'INVALID_SIGNATURE'], ['text', 'wh_1', 'INVALID_SIGNATURE'],
      ['a promise', Promise.resolve(good()), 'INVALID_SIGNATURE'],
      ['no webhookId', { timestamp: unixTime() }, 'INVALID_ID'], ['an empty webhookId', { webhookId: '', timestamp: unixTime() }, 'INVALID_ID'],
      ['a number as webhookId', { webhookId: 1, timestamp: unixTime() }, 'INVALID_ID'],
      ['no timestamp', { webhookId: 'wh_1' }, 'INVALID_TIMESTAMP'], ['NaN', { webhookId: 'wh_1', timestamp: NaN }, 'INVALID_TIMESTAMP'],
      ['text as timestamp', { webhookId: 'wh_1', timestamp: String(unixTime()) }, 'INVALID_TIMESTAMP'], ['Infinity', { webhookId: 'wh_1', timestamp: Infinity }, 'INVALID_TIMESTAMP'],
      ['a Date', { webhookId: 'wh_1', timestamp: new Date() }, 'INVALID_TIMESTAMP']
    ] as const) {
      await refuses(t, await withVerifier(t, () => answer), delivery, code, name)
    }
  })

  t.test('is asynchronous, and rejects', async t => {
    const rejecting = async () => { throw new Error('not one of mine') }
    await refuses(t, await withVerifier(t, rejecting), delivery, 'INVALID_SIGNATURE')
    const headersToo = Object.assign(good, { checkHeaders: rejecting })
    await refuses(t, await withVerifier(t, headersToo), delivery, 'INVALID_SIGNATURE', 'checkHeaders')
  })

  t.test('throws anything else out of checkHeaders', async t => {
    for (const thrown of [new Error('secret detail'), coded('MY_FAILURE', 500), undefined]) {
      await refuses(t, await withVerifier(t, Object.assign(() => good(), { checkHeaders: () => { throw thrown } })), delivery, 'INVALID_SIGNATURE', String(thrown))
    }
  })

  t.test('returns an error out of checkHeaders: it is as good as thrown', async t => {
    const returning = (error: Error) => withVerifier(t, Object.assign(() => good(), { checkHeaders: () => error }))
    await refuses(t, await returning(coded('MY_REFUSAL', 403)), delivery, { statusCode: 403, code: 'MY_REFUSAL' })
    await refuses(t, await returning(coded('MY_FAILURE', 500)), delivery, 'INVALID_SIGNATURE')
  })

  t.test('checkHeaders gives no timestamp', async t => {
    for (const answer of [undefined, NaN, 'now']) {
      await refuses(t, await withVerifier(t, Object.assign(() => good(), { checkHeaders: () => answer })), delivery, 'INVALID_TIMESTAMP', String(answer))
    }
  })

  t.test('without checkHeaders the tolerance is enforced all the same', async t => {
    for (const offset of [-302, 302]) {
      await refuses(t, await withVerifier(t, () => ({ ...good(), timestamp: unixTime() + offset })), delivery, 'TIMESTAMP_OUT_OF_TOLERANCE')
    }
  })

  t.test('checkHeaders is asked first', async t => {
    let verified = 0
    const verify = () => { verified++; return good() }
    const all = await withVerifier(t, Object.assign(verify, { checkHeaders: () => { throw coded('MY_REFUSAL', 400) } }))
    await refuses(t, all, delivery, { statusCode: 400, code: 'MY_REFUSAL' })
    const stale = await withVerifier(t, Object.assign(() => verify(), { checkHeaders: () => unixTime() - 302 }))
    await refuses(t, stale, delivery, 'TIMESTAMP_OUT_OF_TOLERANCE')
    t.equal(verified, 0)
  })

  t.test('gets the bytes, the headers and the keys', async t => {
    const calls: unknown[] = []
    const all = await withVerifier(t, Object.assign((delivered: { rawBody: Buffer, headers: Record<string, string> }, keys: unknown[]) => {
      calls.push([delivered.rawBody, delivered.headers['x-mine'], keys.length])
      return good()
    }, { keyBytes: (secret: string) => Buffer.from(secret) }))
    await accepts(t, all, { ...delivery, headers: { ...delivery.headers, 'x-mine': 'yes' } })
    t.same(calls, ROUTES.map(() => [delivery.body, 'yes', 1]))
  })
})

t.test('xOpenAISignature()', async t => {
  interface XSigned { headers: Record<string, string>, body: Buffer }

  function xSign (event: unknown, { timestamp = String(unixTime()), secret = SECRET as string | Buffer } = {}): XSigned {
    const body = Buffer.from(typeof event === 'string' ? event : JSON.stringify(event))
    return {
      headers: {
        'content-type': 'application/json',
        'x-openai-signature': createHmac('sha256', secret).update(`${timestamp}.`).update(body).digest('hex'),
        'x-openai-timestamp': timestamp
      },
      body
    }
  }

  let count = 0
  const unique = () => ({ ...thin('batch.failed'), id: `evt_${count++}` })
  const change = ({ headers, body }: XSigned, changes: Record<string, string>): XSigned => ({ headers: { ...headers, ...changes }, body })
  const all = await fixture(t, { verifier: xOpenAISignature() })

  t.test('hex HMAC-SHA256 of timestamp.body under the secret\'s bytes as written', async t => {
    await accepts(t, all, xSign(unique()))
    const delivery = xSign(unique())
    await accepts(t, all, change(delivery, { 'x-openai-signature': delivery.headers['x-openai-signature']!.toUpperCase() }), 'upper case')
    await refuses(t, all, xSign(unique(), { secret: keyBytes(SECRET) }), 'INVALID_SIGNATURE', 'the secret decoded')
    await refuses(t, all, xSign(unique(), { secret: SECRET.slice('whsec_'.length) }), 'INVALID_SIGNATURE', 'without whsec_')
  })

  t.test('refuses what OpenAI\'s own scheme signs', async t => {
    await refuses(t, all, sign(thin('batch.failed')), 'MISSING_HEADER')
  })

  t.test('headers', async t => {
    for (const name of ['x-openai-signature', 'x-openai-timestamp']) {
      const { headers, body } = xSign(unique())
      const { [name]: _absent, ...rest } = headers
      await refuses(t, all, { headers: rest, body }, 'MISSING_HEADER', `${name} absent`)
      await refuses(t, all, { headers: { ...headers, [name]: '' }, body }, 'MISSING_HEADER', `${name} empty`)
      const code = name === 'x-openai-signature' ? 'INVALID_SIGNATURE' : 'INVALID_TIMESTAMP'
      await refuses(t, all, { headers: { ...headers, [name]: [headers[name]!, headers[name]!] }, body }, code, `${name} doubled`)
      await t.rejects(all.app.openaiWebhook.unwrap(body, { ...headers, [name]: [headers[name]!] }), { code: `FST_OPENAI_WEBHOOK_${code}` }, `${name} as an array`)
    }
  })

  t.test('signatures', async t => {
    for (const [name, make] of Object.entries<(right: string) => string>({
      'one digit short': right => right.slice(1),
      'one digit more': right => `${right}0`,
      'a byte more': right => `${right}00`,
      'not hex': right => `g${right.slice(1)}`,
      'sha256=': right => `sha256=${right}`,
      base64: right => Buffer.from(right, 'hex').toString('base64'),
      'white space': right => `${right} `,
      'a line end': right => `${right}\n`,
      wrong: () => randomBytes(32).toString('hex'),
      'of another body': () => xSign(unique()).headers['x-openai-signature']!
    })) {
      const delivery = xSign(unique())
      await refuses(t, all, change(delivery, { 'x-openai-signature': make(delivery.headers['x-openai-signature']!) }), 'INVALID_SIGNATURE', name)
    }
  })

  t.test('timestamps', async t => {
    for (const offset of [-302, 302]) await refuses(t, all, xSign(unique(), { timestamp: String(unixTime() + offset) }), 'TIMESTAMP_OUT_OF_TOLERANCE')
    for (const timestamp of [`${unixTime()}abc`, `+${unixTime()}`, `${unixTime()}.0`, '1e9']) {
      await refuses(t, all, xSign(unique(), { timestamp }), 'INVALID_TIMESTAMP', timestamp)
    }
  })

  t.test('each of several secrets', async t => {
    const secrets = [newSecret(), 'not base64 at all', SECRET]
    const several = await fixture(t, { verifier: xOpenAISignature(), secret: secrets })
    for (const secret of secrets) await accepts(t, several, xSign(unique(), { secret }))
    const verify = xOpenAISignature()
    const keys = secrets.map(secret => createSecretKey(Buffer.from(secret)))
    for (const [keyIndex, secret] of secrets.entries()) {
      const { headers, body: rawBody } = xSign(thin('batch.failed'), { secret, timestamp: '1750861210' })
      t.same(verify({ headers, rawBody }, keys), { webhookId: 'evt_1', timestamp: 1750861210, keyIndex })
    }
  })

  t.test('on one route, beside OpenAI\'s own scheme on another', async t => {
    const app = await build(t)
    let runs = 0
    app.openaiWebhook.onAny(() => { runs++ })
    app.openaiWebhook.route({ url: '/guide', verifier: xOpenAISignature() })
    t.equal((await post(app, xSign(unique()), '/guide')).statusCode, 200)
    t.equal((await post(app, sign(thin('batch.failed')))).statusCode, 200)
    t.equal(runs, 2)
    t.equal((await post(app, xSign(unique()))).statusCode, 401)
    t.equal((await post(app, sign(thin('batch.failed')), '/guide')).statusCode, 401)
    t.equal(runs, 2)
  })

  t.test('the delivery\'s id', async t => {
    const app = await build(t, { verifier: xOpenAISignature(), events: guideEvents })
    const ids: string[] = []
    app.openaiWebhook.onAny((_event, { webhookId }) => { ids.push(webhookId) })
    const duplicate = '{"received":true,"duplicate":true}'

    t.test('is the event\'s, so that a re-sent one is known by it', async t => {
      ids.length = 0
      const event = { type: 'file.processed', id: 'evt_abc.1', data: { id: 'file_1' } }
      const now = unixTime()
      t.equal((await post(app, xSign(event, { timestamp: String(now) }))).body, '{"received":true}')
      t.equal((await post(app, xSign(event, { timestamp: String(now - 7) }))).body, duplicate)
      t.same(ids, ['evt_abc.1'])
    })

    t.test('is the SHA-256 of what was signed where the event has none that can be used', async t => {
      for (const id of [undefined, '', 'x'.repeat(257), 'evt 1', 'evt\n1', 'evté']) {
        ids.length = 0
        const event = { type: 'file.processed', id, data: { id: 'file_1' } }
        const now = unixTime()
        const digests = [now, now - 7].map(timestamp => createHash('sha256').update(`${timestamp}.${JSON.stringify(event)}`).digest('hex'))
        t.equal((await post(app, xSign(event, { timestamp: String(now) }))).body, '{"received":true}')
        t.equal((await post(app, xSign(event, { timestamp: String(now) }))).body, duplicate, 'the same once more')
        t.equal((await post(app, xSign(event, { timestamp: String(now - 7) }))).body, '{"received":true}', 'a new timestamp makes it another')
        t.same(ids, digests, JSON.stringify(id))
      }
    })
  })

  t.test('a body that is no event', async t => {
    for (const body of ['', '{', 'null', '1', '[]', '{"id":1}', '\ufeff{"type":"batch.failed"}']) {
      await refuses(t, all, xSign(body), { statusCode: 400, code: 'FST_OPENAI_WEBHOOK_INVALID_BODY' }, JSON.stringify(body))
    }
  })
})
