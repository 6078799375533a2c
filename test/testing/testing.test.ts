import { once } from 'node:events'
import { join } from 'node:path'
import OpenAI from 'openai'
import t from 'tap'
import ts from 'typescript'
import { guideEntries, officialEntries } from '../../lib/events/index.ts'
import { guideEvents } from '../../lib/index.ts'
import * as kit from '../../lib/testing/index.ts'
import { deliver, faultNames, forge, newWebhookId, redeliver, sampleEvent, sampleTypes, sign, testSecret } from '../../lib/testing/index.ts'
import type { Fault, SampleType } from '../../lib/testing/index.ts'
import { build, SECRET, stoppedClock, VECTOR } from '../support/deliveries.ts'
import { codeBlocks, readDocument, tableRows } from '../support/docs.ts'
import { spawnProgram } from '../support/program.mjs'

const CODE = 'FST_OPENAI_WEBHOOK_'

t.test('the kit is plain functions, for any test framework', async t => {
  t.same(Object.keys(kit).sort(), [
    'deliver', 'faultNames', 'forge', 'inboxContract', 'newWebhookId', 'redeliver', 'runnerContract', 'sampleEvent', 'sampleTypes', 'sign', 'storeContract', 'testSecret'
  ])
})

t.test('sampleEvent', async t => {
  t.test('knows every type, and makes what the receiver takes', async t => {
    t.same([...sampleTypes].sort(), [...new Set([...Object.keys(officialEntries), ...Object.keys(guideEntries)])].sort())
    t.equal(sampleTypes.length, 39)
    const app = await build(t, { secret: testSecret, events: guideEvents })
    const got: string[] = []
    app.openaiWebhook.onAny(event => { got.push(event.type) })
    for (const type of sampleTypes) {
      const event = sampleEvent(type)
      t.equal(event.type, type)
      t.equal((await deliver(app, event)).statusCode, 200, type)
    }
    t.same(got, sampleTypes)
  })

  t.test('gives an id of its own and the present time', async t => {
    stoppedClock(t, 1_800_000_000_999)
    const [first, second] = [sampleEvent('batch.failed'), sampleEvent('batch.failed')]
    t.match(first, { id: /^evt_[0-9a-f]{32}$/, object: 'event', created_at: 1_800_000_000, type: 'batch.failed' })
    t.not(first.id, second.id)
  })

  t.test('takes fields in place of the sample\'s: objects are merged, arrays replaced', async t => {
    const plain = sampleEvent('realtime.call.incoming')
    t.ok(plain.data.sip_headers.length > 1, 'an array to be replaced')
    const sip = { sip_headers: [{ name: 'From', value: 'sip:1@example.com' }] }
    const event = sampleEvent('realtime.call.incoming', { id: 'evt_1', created_at: 1, data: sip })
    t.strictSame(event, { ...plain, id: 'evt_1', created_at: 1, data: { ...plain.data, ...sip } })

    const { data } = sampleEvent('batch.in_progress')
    t.strictSame(sampleEvent('batch.in_progress', { data: { request_counts: { failed: 7 } } }).data, {
      ...data, request_counts: { ...data.request_counts, failed: 7 }
    }, 'at any depth')
  })

  t.test('takes a __proto__ as a field, so that a test can send it', async t => {
    const overrides = JSON.parse('{ "__proto__": { "polluted": true }, "data": { "constructor": { "prototype": { "polluted": true } } } }') as object
    t.equal(JSON.stringify(sampleEvent('batch.failed', overrides)).includes('"__proto__":{"polluted":true}'), true)
    t.equal(({} as { polluted?: true }).polluted, undefined)
  })

  t.test('leaves the next event as it was', async t => {
    const before = sampleEvent('batch.failed').data
    const event = sampleEvent('batch.failed', { data: { id: 'batch_1' } })
    t.equal(event.data.id, 'batch_1')
    event.data.id = 'batch_2'
    t.strictSame(sampleEvent('batch.failed').data, before)
  })

  t.test('refuses a type that it does not know', async t => {
    for (const [type, advice] of [['batch.faild', ', did you mean "batch.failed"?'], ['constructor', ''], ['__proto__', ''], [undefined, '']] as const) {
      t.throws(() => sampleEvent(type as SampleType), { name: 'TypeError', message: `sampleEvent: expected an event type such as "batch.failed", got "${String(type)}"${advice}` })
    }
  })
})

t.test('sign', async t => {
  t.test('makes the headers that OpenAI made for the published delivery', async t => {
    const { secret, timestamp, headers, body } = VECTOR
    for (const bytes of [body, Buffer.from(body), new Uint8Array(Buffer.from(body))]) {
      t.strictSame(sign(bytes, { secret, timestamp, webhookId: headers['webhook-id'] }), headers)
    }
  })

  t.test('is accepted by the official SDK, with a secret of either form', async t => {
    const { webhooks } = new OpenAI({ apiKey: 'unused' })
    const event = { ...sampleEvent('response.completed'), note: 'naïve ☎' }
    const body = JSON.stringify(event)
    for (const secret of [testSecret, 'not of the whsec_ form, é']) {
      t.same(await webhooks.unwrap(body, sign(body, { secret }), secret), event, 'text')
      t.same(await webhooks.unwrap(body, sign(Buffer.from(body), { secret }), secret), event, 'bytes')
    }
    const refused = await webhooks.unwrap(body, sign(body), SECRET).catch((error: unknown) => error)
    t.type(refused, OpenAI.InvalidWebhookSignatureError)
  })

  t.test('signs bytes that are no text', async t => {
    const app = await build(t, { secret: testSecret })
    const body = Buffer.from([0x7b, 0xff, 0x0d, 0x0a, 0x7d])
    const response = await app.inject({ method: 'POST', url: '/webhooks/openai', headers: sign(body), payload: body })
    t.equal(response.json().code, `${CODE}INVALID_BODY`, 'the signature holds; the bytes are no event')
  })

  t.test('takes the test secret, a new webhook-id and the present time', async t => {
    stoppedClock(t, 1_800_000_000_999)
    const [first, second] = [sign('{}'), sign('{}')]
    t.match(first, { 'content-type': 'application/json', 'webhook-id': /^wh_[0-9a-f]{32}$/, 'webhook-timestamp': '1800000000' })
    t.not(first['webhook-id'], second['webhook-id'])
    t.strictSame(sign('{}', { webhookId: first['webhook-id'], secret: testSecret }), first)
    t.match(newWebhookId(), /^wh_[0-9a-f]{32}$/)
    t.match(testSecret, /^whsec_[A-Za-z0-9+/]{43}=$/)
  })
})

t.test('deliver', async t => {
  t.test('resolves to the app\'s response', async t => {
    const app = await build(t, { secret: testSecret })
    const response = await deliver(app, sampleEvent('batch.failed'))
    t.equal(response.statusCode, 200)
    t.same(response.json(), { received: true })
  })

  t.test('sends text to the letter', async t => {
    const app = await build(t, { secret: testSecret })
    let got = ''
    app.openaiWebhook.onAny((_event, { request }) => { got = String(request?.openaiWebhook.rawBody) })
    const text = '{ "type":"batch.failed",\r\n"id":"evt_1","object":"event","created_at":1,"data":{"id":"é"} }\n'
    t.equal((await deliver(app, text)).statusCode, 200)
    t.equal(got, text)
  })

  t.test('takes another URL, secret, webhook-id, timestamp and headers', async t => {
    const app = await build(t, { secret: testSecret })
    const seen: object[] = []
    app.openaiWebhook.route({
      url: '/finance',
      secret: SECRET,
      on: {
        'batch.failed': (_event, { webhookId, timestamp, endpoint, request }) => {
          seen.push({ webhookId, timestamp, endpoint, tenant: request?.headers['x-tenant'] })
        }
      }
    })
    const timestamp = Math.floor(Date.now() / 1000) - 60
    const options = { url: '/finance', secret: SECRET, webhookId: 'wh_1', timestamp, headers: { 'x-tenant': 'a' } }
    t.equal((await deliver(app, sampleEvent('batch.failed'), options)).statusCode, 200)
    t.same(seen, [{ webhookId: 'wh_1', timestamp, endpoint: '/finance', tenant: 'a' }])
    t.same((await deliver(app, sampleEvent('batch.failed'), options)).json(), { received: true, duplicate: true })
    t.equal((await deliver(app, sampleEvent('batch.failed'), { headers: { 'content-type': 'text/plain' } })).statusCode, 415)
  })
})

t.test('redeliver', async t => {
  t.test('keeps webhook-id and body, and renews timestamp and signature, as OpenAI does', async t => {
    const app = await build(t, { secret: testSecret })
    const seen: Array<{ webhookId: string, timestamp: number, signature: unknown, body: string }> = []
    app.openaiWebhook.on('batch.failed', (_event, { webhookId, timestamp, request }) => {
      seen.push({ webhookId, timestamp, signature: request!.headers['webhook-signature'], body: String(request!.openaiWebhook.rawBody) })
      if (seen.length < 3) throw new Error('not yet')
    })
    await app.ready()
    const clock = stoppedClock(t, 1_800_000_000_000)
    const first = await deliver(app, sampleEvent('batch.failed'), { timestamp: 1_799_999_900 })
    t.equal(first.statusCode, 500)
    clock.travel(1_800_003_600_000)
    const second = await redeliver(app, first)
    t.equal(second.statusCode, 500)
    clock.travel(1_800_007_200_000)
    const third = await redeliver(app, second)
    t.same([third.statusCode, third.json()], [200, { received: true }])
    t.same((await redeliver(app, third)).json(), { received: true, duplicate: true })

    t.same(seen.map(({ timestamp }) => timestamp), [1_799_999_900, 1_800_003_600, 1_800_007_200])
    t.equal(new Set(seen.map(({ webhookId }) => webhookId)).size, 1)
    t.equal(new Set(seen.map(({ body }) => body)).size, 1)
    t.equal(new Set(seen.map(({ signature }) => signature)).size, 3)
  })

  t.test('keeps where and how it was delivered', async t => {
    const app = await build(t, { secret: testSecret })
    app.openaiWebhook.route({ url: '/finance', secret: SECRET })
    const first = await deliver(app, sampleEvent('batch.failed'), { url: '/finance', secret: SECRET })
    t.same((await redeliver(app, first)).json(), { received: true, duplicate: true })
  })

  t.test('refuses a response that was no delivery\'s', async t => {
    const app = await build(t, { secret: testSecret })
    await t.rejects(redeliver(app, await app.inject('/')), { name: 'TypeError', message: 'redeliver: expected a response that deliver() or redeliver() resolved to' })
  })
})

t.test('forge', async t => {
  const answers: Record<Fault, [status: number, code?: string]> = {
    'bad signature': [401, 'INVALID_SIGNATURE'],
    stale: [401, 'TIMESTAMP_OUT_OF_TOLERANCE'],
    future: [401, 'TIMESTAMP_OUT_OF_TOLERANCE'],
    'changed body': [401, 'INVALID_SIGNATURE'],
    'missing header': [401, 'MISSING_HEADER'],
    'bad id': [401, 'INVALID_ID'],
    'unknown type': [200],
    'wrong shape': [400, 'INVALID_EVENT'],
    'not json': [400, 'INVALID_BODY']
  }

  t.test('has every fault, and each is answered as documented', async t => {
    t.same([...faultNames].sort(), Object.keys(answers).sort())
    const documented = tableRows(readDocument('docs/testing.md')).filter(([fault]) => faultNames.includes(fault!.slice(1, -1) as Fault))
    t.same(Object.fromEntries(documented.map(([fault, answer]) => [fault!.slice(1, -1), answer])),
      Object.fromEntries(Object.entries(answers).map(([fault, [status, code]]) => [fault, code === undefined ? `${status}` : `${status} \`${CODE}${code}\``])))
    const app = await build(t, { secret: testSecret })
    const handled: string[] = []
    app.openaiWebhook.on('batch.*', () => { handled.push('on') })
    app.openaiWebhook.onUnhandled(({ type }) => { handled.push(type) })
    for (const fault of faultNames) {
      const [status, code] = answers[fault]
      const response = await forge(app, fault)
      t.equal(response.statusCode, status, fault)
      t.equal(response.json().code, code && CODE + code, fault)
    }
    t.same(handled, ['unknown.type'], 'no other reached a handler')
  })

  t.test('is wrong in that way alone, whatever is delivered where', async t => {
    const app = await build(t, { secret: testSecret })
    app.openaiWebhook.route({ url: '/finance', secret: SECRET })
    const options = { url: '/finance', secret: SECRET, event: sampleEvent('response.completed') }
    for (const fault of faultNames) {
      const [status, code] = answers[fault]
      const response = await forge(app, fault, options)
      t.same([response.statusCode, response.json().code], [status, code && CODE + code], fault)
    }
  })

  t.test('dates from the timestamp that is given', async t => {
    const app = await build(t, { secret: testSecret })
    const now = Math.floor(Date.now() / 1000)
    t.equal((await forge(app, 'stale', { timestamp: now + 600 })).statusCode, 200)
    t.equal((await forge(app, 'future', { timestamp: now - 600 })).statusCode, 200)
  })

  t.test('reaches an error handler of the app\'s own', async t => {
    const app = await build(t, { secret: testSecret })
    app.setErrorHandler(async (error: { code: string }, _request, reply) => await reply.code(418).send(error.code))
    const { statusCode, body } = await forge(app, 'changed body')
    t.same([statusCode, body], [418, `${CODE}INVALID_SIGNATURE`])
  })

  t.test('refuses a fault that it does not know', async t => {
    const app = await build(t, { secret: testSecret })
    for (const fault of ['rotten', 'constructor', undefined]) {
      await t.rejects(forge(app, fault as Fault), { name: 'TypeError', message: `forge: expected one of "${faultNames.join('", "')}", got "${String(fault)}"` })
    }
  })
})

t.test('the examples of docs/testing.md pass, where their framework is here', async t => {
  const blocks = codeBlocks(readDocument('docs/testing.md'))
  for (const framework of ['node:test', 'tap']) {
    const { code } = blocks.find(({ code }) => code.includes(`from '${framework}'`))!
    const { outputText } = ts.transpileModule(code, { compilerOptions: { target: ts.ScriptTarget.ES2023, module: ts.ModuleKind.ESNext } })
    // Within the package, so that its name leads to what is published: `exports`, dist/.
    const file = join(t.testdir({ 'example.mjs': outputText }), 'example.mjs')
    const child = spawnProgram([file], { env: { PATH: process.env['PATH'], TAP: '1' }, stdio: ['ignore', 'pipe', 'pipe'] })
    let out = ''
    child.stdout.on('data', chunk => { out += String(chunk) })
    const [exitCode] = await once(child, 'close')
    t.equal(exitCode, 0, out)
    t.match(out, framework === 'tap' ? /^ok 1 - a finished response is saved once/m : /pass 3$/m)
  }
})
