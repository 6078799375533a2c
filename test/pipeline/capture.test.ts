import { createHmac } from 'node:crypto'
import { once } from 'node:events'
import http from 'node:http'
import http2 from 'node:http2'
import { PassThrough, Readable } from 'node:stream'
import { setImmediate as turn } from 'node:timers/promises'
import { gzipSync } from 'node:zlib'
import Fastify from 'fastify'
import type { FastifyInstance, FastifyServerOptions, RequestPayload } from 'fastify'
import OpenAI from 'openai'
import t from 'tap'
import type { Test } from 'tap'
import openaiWebhook from '../../lib/index.ts'
import type { OpenAIWebhookOptions } from '../../lib/index.ts'
import { build, outcome, SECRET, sign, thin } from '../support/deliveries.ts'
import type { Signed } from '../support/deliveries.ts'
import { chunk, CHUNKED, head, LAST_CHUNK, listen, request, Wire } from '../support/wire.ts'

const OWN = '/webhooks/openai'
const MARKED = '/own'
const LIMIT = 65_536

const client = new OpenAI({ apiKey: 'none', webhookSecret: SECRET })

interface Fixture {
  app: FastifyInstance
  /** The events that reached a handler, on either route. */
  seen: unknown[]
}

/** An app with the plugin's own route and a marked one. */
async function fixture (t: Test, options: OpenAIWebhookOptions = {}, server: FastifyServerOptions = {}): Promise<Fixture> {
  const app = await build(t, options, { forceCloseConnections: true, ...server })
  const seen: unknown[] = []
  app.openaiWebhook.onAny(event => { seen.push(event) })
  app.post(MARKED, { config: { openaiWebhook: {} } }, async request => { seen.push(request.openaiWebhook.event) })
  return { app, seen }
}

/** Header lines of a delivery, some replaced; `undefined` leaves one out. */
function lines ({ headers }: Signed, changes: Record<string, string | undefined> = {}): Array<[string, string]> {
  return Object.entries({ ...headers, ...changes }).filter((line): line is [string, string] => line[1] !== undefined)
}

/** A delivery whose body is exactly this long. */
function ofLength (length: number): Signed {
  const empty = JSON.stringify(thin('response.completed', { id: 'resp_1', text: '' }))
  return sign(thin('response.completed', { id: 'resp_1', text: 'x'.repeat(length - empty.length) }))
}

async function exchange (t: Test, port: number, bytes: Buffer) {
  const wire = await Wire.open(t, port)
  wire.write(bytes).catch(() => {}) // the answer may come first
  const answer = await wire.answer()
  wire.socket.destroy()
  return answer
}

function code (body: string): unknown {
  return (JSON.parse(body) as { code?: unknown }).code
}

const received = { status: 200, body: '{"received":true}' }

/** What OpenAI's SDK makes of the same bytes. */
async function unwrapped ({ headers, body }: Signed): Promise<unknown> {
  return await client.webhooks.unwrap(body.toString(), headers)
}

const nonAscii = thin('response.completed', { id: 'resp_1', text: 'Grüße, 世界 👋  \u0000' })

for (const url of [OWN, MARKED]) {
  t.test(`what a real sender may send to ${url}`, async t => {
    const { app, seen } = await fixture(t)
    const port = await listen(app)

    async function accepted (t: Test, delivery: Signed, bytes: Buffer): Promise<void> {
      seen.length = 0
      t.match(await exchange(t, port, bytes), received)
      t.same(seen, [await unwrapped(delivery)], 'the handler gets what the official SDK unwraps')
    }

    t.test('a body in one piece', async t => {
      const delivery = sign(thin('response.completed'))
      await accepted(t, delivery, request(lines(delivery), delivery.body, url))
    })

    t.test('a chunked body', async t => {
      const delivery = sign(nonAscii)
      const half = Math.floor(delivery.body.length / 2)
      await accepted(t, delivery, Buffer.concat([
        head([...lines(delivery), ...CHUNKED], url), chunk(delivery.body.subarray(0, half)), chunk(delivery.body.subarray(half)), LAST_CHUNK
      ]))
    })

    t.test('every byte a chunk', async t => {
      const delivery = sign(nonAscii)
      const chunks = [...delivery.body].map(byte => chunk(Buffer.from([byte])))
      await accepted(t, delivery, Buffer.concat([head([...lines(delivery), ...CHUNKED], url), ...chunks, LAST_CHUNK]))
    })

    t.test('non-ASCII text', async t => {
      const delivery = sign(nonAscii)
      await accepted(t, delivery, request(lines(delivery), delivery.body, url))
    })

    t.test('pretty-printed JSON with a trailing newline', async t => {
      const delivery = sign(`${JSON.stringify(thin('response.completed'), null, 2)}\n`)
      await accepted(t, delivery, request(lines(delivery), delivery.body, url))
    })

    for (const contentType of ['application/json; charset=utf-8', 'application/json;charset=UTF-8', 'Application/JSON']) {
      t.test(`content-type: ${contentType}`, async t => {
        const delivery = sign(nonAscii)
        await accepted(t, delivery, request(lines(delivery, { 'content-type': contentType }), delivery.body, url))
      })
    }

    t.test('Expect: 100-continue', async t => {
      const delivery = sign(thin('response.completed'))
      seen.length = 0
      const wire = await Wire.open(t, port)
      await wire.write(head([...lines(delivery), ['content-length', String(delivery.body.length)], ['expect', '100-continue']], url))
      t.match(await wire.answer(), { status: 100 })
      await wire.write(delivery.body)
      t.match(await wire.answer(), received)
      t.same(seen, [await unwrapped(delivery)])
    })

    t.test('split at every byte, all on one connection', async t => {
      const wire = await Wire.open(t, port)
      const length = sign(nonAscii).body.length
      for (let at = 1; at < length; at++) {
        const delivery = sign(nonAscii)
        seen.length = 0
        await wire.write(Buffer.concat([head([...lines(delivery), ['content-length', String(length)]], url), delivery.body.subarray(0, at)]))
        await turn() // the server reads in this process's turns
        await wire.write(delivery.body.subarray(at))
        const answer = await wire.answer()
        if (answer.status === 200 && seen.length === 1) continue
        t.match(answer, received, `split at ${at}`)
        t.same(seen, [nonAscii], `split at ${at}`)
      }
      t.same(seen, [nonAscii])
    })

    t.test('several on one connection, good and bad, and pipelined', async t => {
      const wire = await Wire.open(t, port)
      const deliveries = ['batch.completed', 'batch.failed', 'response.completed'].map(type => sign(thin(type)))
      seen.length = 0
      for (const delivery of deliveries) {
        await wire.write(request(lines(delivery), delivery.body, url))
        t.match(await wire.answer(), received)
      }
      t.same(seen, await Promise.all(deliveries.map(unwrapped)))

      seen.length = 0
      const forged = { ...sign(thin('batch.expired')), body: sign(thin('batch.cancelled')).body }
      const again = ['eval.run.failed', 'video.failed'].map(type => sign(thin(type)))
      const pipelined = [again[0]!, forged, again[1]!]
      await wire.write(Buffer.concat(pipelined.map(delivery => request(lines(delivery), delivery.body, url))))
      t.match([await wire.answer(), await wire.answer(), await wire.answer()], [received, { status: 401 }, received])
      t.same(seen, await Promise.all(again.map(unwrapped)))
    })
  })

  t.test(`HTTP/2 at ${url}`, async t => {
    const { app, seen } = await fixture(t, {}, { http2: true } as FastifyServerOptions)
    const port = await listen(app)
    const session = http2.connect(`http://127.0.0.1:${port}`)
    t.teardown(() => session.destroy())
    await once(session, 'connect')

    function open ({ headers }: Signed) {
      return session.request({ ...headers, ':method': 'POST', ':path': url })
    }

    async function answer (stream: http2.ClientHttp2Stream): Promise<{ status: unknown, body: string }> {
      let body = ''
      stream.setEncoding('utf8').on('data', (text: string) => { body += text })
      const [headers] = await once(stream, 'response') as [http2.IncomingHttpHeaders & http2.IncomingHttpStatusHeader]
      if (!stream.readableEnded) await once(stream, 'end')
      return { status: headers[':status'], body }
    }

    const deliveries = [sign(nonAscii), sign(thin('batch.failed'))]
    const answers = await Promise.all(deliveries.map(delivery => {
      const stream = open(delivery)
      stream.write(delivery.body.subarray(0, 40))
      stream.end(delivery.body.subarray(40))
      return answer(stream)
    }))
    t.same(answers, [received, received])
    t.same(seen, await Promise.all(deliveries.map(unwrapped)))

    t.test('a forged one', async t => {
      seen.length = 0
      const stream = open(sign(thin('batch.failed')))
      stream.end(JSON.stringify(thin('batch.completed')))
      const { status, body } = await answer(stream)
      t.equal(status, 401)
      t.equal(code(body), 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE')
      t.same(seen, [])
    })

    t.test('one byte over the limit', async t => {
      seen.length = 0
      const delivery = ofLength(LIMIT + 1)
      const stream = open(delivery)
      stream.end(delivery.body)
      t.equal((await answer(stream)).status, 413)
      t.same(seen, [])
    })

    t.test('a stream that is reset before the body has ended', async t => {
      seen.length = 0
      const arrived = once(app.server, 'request')
      const delivery = sign(thin('batch.failed'))
      const stream = open(delivery)
      stream.write(delivery.body.subarray(0, 40))
      await arrived
      stream.close(http2.constants.NGHTTP2_CANCEL)
      await once(stream, 'close')
      t.same(seen, [])
      const next = open(delivery)
      next.end(delivery.body)
      t.same(await answer(next), received, 'its retry passes')
      t.equal(seen.length, 1)
    })
  })
}

for (const url of [OWN, MARKED]) {
  t.test(`the body limit of ${url}`, async t => {
    const { app, seen } = await fixture(t)
    const port = await listen(app)
    const exact = () => ofLength(LIMIT)
    const over = () => ofLength(LIMIT + 1)
    t.beforeEach(() => { seen.length = 0 })

    t.test('exactly at it', async t => {
      const delivery = exact()
      t.match(await exchange(t, port, request(lines(delivery), delivery.body, url)), received)
      const chunked = exact()
      t.match(await exchange(t, port, Buffer.concat([head([...lines(chunked), ...CHUNKED], url), chunk(chunked.body), LAST_CHUNK])), received)
      t.equal(seen.length, 2)
    })

    t.test('one byte over, by Content-Length', async t => {
      const delivery = over()
      t.match(await exchange(t, port, request(lines(delivery), delivery.body, url)), { status: 413, headers: { connection: 'close' } })
      t.match(await exchange(t, port, head([...lines(delivery), ['content-length', String(LIMIT + 1)]], url)), { status: 413 }, 'before any of it has come')
      t.same(seen, [])
    })

    t.test('one byte over, chunked', async t => {
      const delivery = over()
      const begun = Buffer.concat([head([...lines(delivery), ...CHUNKED], url), chunk(delivery.body)])
      t.match(await exchange(t, port, Buffer.concat([begun, LAST_CHUNK])), { status: 413, headers: { connection: 'close' } })
      t.match(await exchange(t, port, begun), { status: 413 }, 'before it has ended')
      t.same(seen, [])
    })

    t.test('an ordinary client that sends far more sees the answer, not a reset', async t => {
      const delivery = ofLength(LIMIT * 16)
      for (const headers of [{ 'content-length': String(delivery.body.length) }, { 'transfer-encoding': 'chunked' }]) {
        const sent = http.request({ port, host: '127.0.0.1', path: url, method: 'POST', headers: { ...delivery.headers, ...headers } })
        sent.end(delivery.body)
        const [response] = await once(sent, 'response') as [http.IncomingMessage]
        response.resume()
        await once(response, 'end')
        t.equal(response.statusCode, 413)
      }
      t.same(seen, [])
    })

    t.test('the next delivery passes', async t => {
      const delivery = sign(thin('batch.failed'))
      t.match(await exchange(t, port, request(lines(delivery), delivery.body, url)), received)
      t.equal(seen.length, 1)
    })
  })

  t.test(`framing and encodings that do not hold what was signed, at ${url}`, async t => {
    const { app, seen } = await fixture(t)
    const port = await listen(app)

    function refused (name: string, send: (t: Test) => Promise<void>): void {
      t.test(name, async t => {
        seen.length = 0
        await send(t)
        t.same(seen, [], 'no handler ran')
      })
    }

    refused('a Content-Length shorter than the body', async t => {
      const delivery = sign(thin('batch.failed'))
      const bytes = Buffer.concat([head([...lines(delivery), ['content-length', String(delivery.body.length - 1)]], url), delivery.body])
      const wire = await Wire.open(t, port)
      await wire.write(bytes.subarray(0, -1))
      const answer = await wire.answer()
      t.equal(answer.status, 401)
      t.equal(code(answer.body), 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE')
      await wire.write(bytes.subarray(-1))
      t.match(await wire.answer(), { status: 400 }, 'the rest is no request')
      t.not((await exchange(t, port, bytes)).status, 200, 'all at once')
    })

    refused('a Content-Length longer than the body', async t => {
      const delivery = sign(thin('batch.failed'))
      const wire = await Wire.open(t, port)
      await wire.write(Buffer.concat([head([...lines(delivery), ['content-length', String(delivery.body.length + 1)]], url), delivery.body]))
      wire.socket.end()
      const answer = await wire.answer().catch(() => undefined)
      t.not(answer?.status, 200)
    })

    refused('a Content-Length that the transport did not check', async t => {
      const delivery = sign(thin('batch.failed'))
      for (const length of [delivery.body.length - 1, delivery.body.length + 1]) {
        const response = await app.inject({ method: 'POST', url, headers: { ...delivery.headers, 'content-length': String(length) }, payload: delivery.body })
        t.equal(response.statusCode, 400)
        t.equal(code(response.body), 'FST_ERR_CTP_INVALID_CONTENT_LENGTH')
      }
    })

    refused('Content-Length and chunked at once', async t => {
      const delivery = sign(thin('batch.failed'))
      const answer = await exchange(t, port, Buffer.concat([
        head([...lines(delivery), ['content-length', String(delivery.body.length)], ...CHUNKED], url), chunk(delivery.body), LAST_CHUNK
      ]))
      t.equal(answer.status, 400)
    })

    refused('an empty body, signed', async t => {
      const delivery = sign('')
      for (const contentType of ['application/json', undefined]) {
        for (const bytes of [
          request(lines(delivery, { 'content-type': contentType }), delivery.body, url),
          head(lines(delivery, { 'content-type': contentType }), url)
        ]) {
          const answer = await exchange(t, port, bytes)
          t.equal(answer.status, 400)
          t.equal(code(answer.body), 'FST_OPENAI_WEBHOOK_INVALID_BODY')
        }
      }
    })

    refused('an empty body, unsigned', async t => {
      for (const contentType of ['application/json', undefined]) {
        const { headers } = sign(thin('batch.failed'))
        const answer = await exchange(t, port, request(lines({ headers, body: Buffer.alloc(0) }, { 'content-type': contentType }), Buffer.alloc(0), url))
        t.equal(answer.status, 401)
        t.equal(code(answer.body), 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE')
      }
    })

    refused('a gzip body is not unpacked: its bytes were not signed', async t => {
      const delivery = sign(thin('batch.failed'))
      const answer = await exchange(t, port, request(lines(delivery, { 'content-encoding': 'gzip' }), gzipSync(delivery.body), url))
      t.equal(answer.status, 401)
      t.equal(code(answer.body), 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE')
    })

    refused('a gzip body that was signed as such is not an event', async t => {
      const body = gzipSync(JSON.stringify(thin('batch.failed')))
      const { headers } = sign('')
      const mac = createHmac('sha256', Buffer.from(SECRET.slice('whsec_'.length), 'base64'))
        .update(`${headers['webhook-id']}.${headers['webhook-timestamp']}.`).update(body).digest('base64')
      const answer = await exchange(t, port, request(lines({ headers, body }, { 'webhook-signature': `v1,${mac}`, 'content-encoding': 'gzip' }), body, url))
      t.equal(answer.status, 400)
      t.equal(code(answer.body), 'FST_OPENAI_WEBHOOK_INVALID_BODY')
    })

    refused('other methods', async t => {
      for (const method of ['GET', 'HEAD', 'PUT', 'PATCH', 'DELETE', 'OPTIONS'] as const) {
        const delivery = sign(thin('batch.failed'))
        const { statusCode } = await app.inject({ method, url, headers: delivery.headers, ...(method === 'GET' || method === 'HEAD' ? {} : { payload: delivery.body }) })
        t.equal(statusCode, 404, method)
      }
    })

    refused('other content types', async t => {
      const types = [
        'text/plain', 'application/x-www-form-urlencoded', 'multipart/form-data; boundary=x', 'application/jsonx', 'application/json-seq',
        'application/vnd.api+json', 'application/cloudevents+json', 'text/json', 'json', 'application/json, text/plain', '', undefined
      ]
      for (const contentType of types) {
        const delivery = sign(thin('batch.failed'))
        const answer = await exchange(t, port, request(lines(delivery, { 'content-type': contentType }), delivery.body, url))
        t.equal(answer.status, 415, String(contentType))
        t.equal(code(answer.body), 'FST_ERR_CTP_INVALID_MEDIA_TYPE')
        const chunked = await exchange(t, port, Buffer.concat([
          head([...lines(delivery, { 'content-type': contentType }), ...CHUNKED], url), chunk(delivery.body), LAST_CHUNK
        ]))
        t.equal(chunked.status, 415, `${contentType}, chunked`)
      }
    })
  })

  for (const leave of ['end', 'destroy'] as const) {
    t.test(`a sender that goes away in the middle of the body (${leave}), at ${url}`, async t => {
      const { app, seen } = await fixture(t)
      const told: Array<{ statusCode?: number }> = []
      app.openaiWebhook.onError(error => { told.push(error as { statusCode?: number }) })
      const port = await listen(app)
      const delivery = sign(thin('batch.failed'))
      const bytes = request(lines(delivery), delivery.body, url)
      const arrived = once(app.server, 'request') as Promise<[http.IncomingMessage]>
      const wire = await Wire.open(t, port)
      await wire.write(bytes.subarray(0, -10))
      const [message] = await arrived
      const closed = new Promise(resolve => { message.once('close', resolve) })
      wire.socket[leave]()
      await closed
      await turn()
      t.same(seen, [])
      t.equal(told.length, 1)
      t.equal(told[0]?.statusCode, 400, 'not an error of the server')
      t.match(await exchange(t, port, bytes), received, 'its retry passes')
      t.equal(seen.length, 1)
    })
  }

  t.test(`what Fastify itself refuses is told to onError, at ${url}`, async t => {
    const { app, seen } = await fixture(t)
    const told: unknown[] = []
    app.openaiWebhook.onError(({ code }: Error & { code?: string }, { endpoint }) => { told.push([code, endpoint]) })
    const tooLong = ofLength(LIMIT + 1)
    const plain = sign(thin('batch.failed'))
    t.equal((await app.inject({ method: 'POST', url, headers: tooLong.headers, payload: tooLong.body })).statusCode, 413)
    t.equal((await app.inject({ method: 'POST', url, headers: { ...plain.headers, 'content-type': 'text/plain' }, payload: plain.body })).statusCode, 415)
    t.same(told, [['FST_ERR_CTP_BODY_TOO_LARGE', url], ['FST_ERR_CTP_INVALID_MEDIA_TYPE', url]])
    t.same(seen, [])
  })

  for (const hook of ['onRequest', 'preParsing', 'preValidation', 'preHandler'] as const) {
    t.test(`what the app's ${hook} hook refuses is told to onError, once, at ${url}`, async t => {
      const { app, seen } = await fixture(t)
      const told: unknown[] = []
      app.openaiWebhook.onError(({ code }: Error & { code?: string }, { endpoint, webhookId, event }) => { told.push([code, endpoint, webhookId, event?.type]) })
      app.addHook(hook as 'onRequest', async () => { throw Object.assign(new Error('too many'), { code: 'BUSY', statusCode: 429 }) })
      const delivery = sign(thin('batch.failed'))
      const { statusCode } = await app.inject({ method: 'POST', url, headers: delivery.headers, payload: delivery.body })
      t.equal(statusCode, 429)
      // A marked route verifies in preParsing, and the plugin's own in preHandler, each after the app's hooks of that name.
      const isVerified = url === MARKED && (hook === 'preValidation' || hook === 'preHandler')
      t.same(told, [['BUSY', url, ...isVerified ? [delivery.headers['webhook-id'], 'batch.failed'] : [undefined, undefined]]])
      t.same(seen, [])
    })
  }

  t.test(`a catch-all parser in the app does not open ${url} to other content types`, async t => {
    const { app, seen } = await fixture(t)
    let parsed = 0
    app.addContentTypeParser('*', (_request, _payload, done) => { parsed++; done(null, {}) })
    for (const contentType of ['text/plain', 'application/jsonx', undefined]) {
      const delivery = sign(thin('batch.failed'))
      const headers = Object.fromEntries(lines(delivery, { 'content-type': contentType }))
      const { statusCode } = await app.inject({ method: 'POST', url, headers, payload: delivery.body })
      t.equal(statusCode, 415, String(contentType))
    }
    t.equal(parsed, 0)
    t.same(seen, [])
  })
}

t.test('a body limit of a route\'s own', async t => {
  const app = await build(t, { bodyLimit: 300 })
  let runs = 0
  const reply = async () => { runs++ }
  app.openaiWebhook.onAny(() => { runs++ })
  app.openaiWebhook.route({ url: '/route', bodyLimit: 400 })
  app.post('/config', { config: { openaiWebhook: { bodyLimit: 500 } }, bodyLimit: 1 }, reply)
  app.post('/fastify', { config: { openaiWebhook: {} }, bodyLimit: 600 }, reply)
  app.post('/inherited', { config: { openaiWebhook: {} } }, reply)
  for (const [url, limit] of [[OWN, 300], ['/route', 400], ['/config', 500], ['/fastify', 600], ['/inherited', 300]] as const) {
    runs = 0
    for (const [length, status] of [[limit, 200], [limit + 1, 413]] as const) {
      const { headers, body } = ofLength(length)
      t.equal((await app.inject({ method: 'POST', url, headers, payload: body })).statusCode, status, `${url}: ${length} bytes`)
      // No Content-Length: a stream.
      const chunked = ofLength(length)
      t.equal((await app.inject({ method: 'POST', url, headers: chunked.headers, payload: Readable.from([chunked.body]) })).statusCode, status, `${url}: ${length} bytes, chunked`)
    }
    t.equal(runs, 2)
  }
})

t.test('a marked route beside the app\'s own parsing', async t => {
  /** An app that parses JSON its own way, with routes that have nothing to do with webhooks. */
  async function ordinary (app: FastifyInstance): Promise<{ parsed: string[] }> {
    const parsed: string[] = []
    app.addContentTypeParser('application/json', { parseAs: 'string' }, (_request, body, done) => {
      parsed.push(body as string)
      try {
        done(null, { own: JSON.parse(body as string) })
      } catch (error) {
        done(error as Error)
      }
    })
    app.post('/json', async request => ({ body: request.body }))
    app.post('/text', async request => ({ body: request.body }))
    return { parsed }
  }

  t.test('the app\'s own JSON parser gets the body once it has been verified', async t => {
    const app = await build(t)
    const { parsed } = await ordinary(app)
    const seen: unknown[] = []
    app.post(MARKED, { config: { openaiWebhook: {} } }, async ({ body, openaiWebhook }) => {
      seen.push(body, openaiWebhook.event, openaiWebhook.rawBody)
    })
    const delivery = sign(nonAscii)
    const { statusCode } = await app.inject({ method: 'POST', url: MARKED, headers: delivery.headers, payload: delivery.body })
    t.equal(statusCode, 200)
    t.same(parsed, [delivery.body.toString()])
    t.same(seen, [{ own: nonAscii }, nonAscii, delivery.body])
  })

  t.test('nothing that was not verified reaches it', async t => {
    const app = await build(t)
    const { parsed } = await ordinary(app)
    let runs = 0
    app.post(MARKED, { config: { openaiWebhook: {} } }, async () => { runs++ })
    const { headers, body } = sign(thin('batch.failed'))
    const other = sign(thin('batch.completed'))
    const { 'webhook-signature': signature, ...unsigned } = headers
    for (const bad of [
      { headers: { 'content-type': 'application/json' }, body },
      { headers: unsigned, body },
      { headers: { ...headers, 'webhook-timestamp': '1750861210' }, body },
      { headers: { ...headers, 'webhook-signature': other.headers['webhook-signature'] }, body },
      { headers, body: other.body },
      { headers, body: Buffer.from('{') },
      ofLength(LIMIT + 1),
      sign('{"type":'), // signed, and no event
      sign({ ...thin('batch.failed'), data: 1 })
    ]) {
      const { statusCode } = await app.inject({ method: 'POST', url: MARKED, headers: bad.headers, payload: bad.body })
      t.ok([400, 401, 413].includes(statusCode), String(statusCode))
    }
    t.same(parsed, [])
    t.equal(runs, 0)
  })

  t.test('other routes parse as they would without the plugin', async t => {
    const bare = Fastify() as FastifyInstance
    t.teardown(() => bare.close())
    await ordinary(bare)
    const app = await build(t)
    await ordinary(app)
    app.post(MARKED, { config: { openaiWebhook: {} } }, async () => {})
    const json = { 'content-type': 'application/json' }
    for (const [url, headers, payload] of [
      ['/json', json, '{"a":1}'],
      ['/json', { 'content-type': 'application/json; charset=utf-8' }, '{"a":"ü"}'],
      ['/json', json, '{"a":'],
      ['/json', json, ''],
      ['/json', json, `{"a":"${'x'.repeat(LIMIT)}"}`],
      ['/json', json, `{"a":"${'x'.repeat(1_048_576)}"}`],
      ['/json', { 'content-type': 'application/x-www-form-urlencoded' }, 'a=1'],
      ['/text', { 'content-type': 'text/plain' }, 'plain'],
      ['/text', json, '[]']
    ] as const) {
      const [expected, actual] = await Promise.all([bare, app].map(async instance => {
        const { statusCode, body } = await instance.inject({ method: 'POST', url, headers, payload })
        return { statusCode, body }
      }))
      t.same(actual, expected, `${url} ${headers['content-type']} ${payload.slice(0, 12)}`)
    }
  })

  for (const place of ['the app\'s', 'the route\'s'] as const) {
    t.test(`${place} async preParsing hook`, async t => {
      const { app, seen } = await fixture(t)
      let hooked = 0
      const preParsing = async (_request: unknown, _reply: unknown, payload: unknown) => {
        hooked++
        await turn()
        await turn()
        return payload as never
      }
      await app.register(async scope => {
        if (place === 'the app\'s') scope.addHook('preParsing', preParsing)
        scope.post('/hooked', {
          config: { openaiWebhook: {} },
          ...(place === 'the app\'s' ? {} : { preParsing: [preParsing, preParsing] })
        }, async ({ body, openaiWebhook }) => {
          t.same(body, openaiWebhook.event)
          seen.push(body)
        })
      })
      const port = await listen(app)
      for (const event of [nonAscii, thin('batch.failed')]) {
        const delivery = sign(event)
        t.match(await exchange(t, port, request(lines(delivery), delivery.body, '/hooked')), received)
      }
      t.same(seen, [nonAscii, thin('batch.failed')])
      t.equal(hooked, place === 'the app\'s' ? 2 : 4)
    })
  }

  t.test('an earlier preParsing hook that hands on text', async t => {
    const { app, seen } = await fixture(t)
    await app.register(async scope => {
      scope.addHook('preParsing', (_request, _reply, payload, done) => {
        payload.setEncoding('utf8')
        done(null, payload)
      })
      scope.post('/text', { config: { openaiWebhook: {} } }, async ({ body }) => { seen.push(body) })
    })
    const delivery = sign(nonAscii)
    const { statusCode } = await app.inject({ method: 'POST', url: '/text', headers: delivery.headers, payload: delivery.body })
    t.equal(statusCode, 200)
    t.same(seen, [nonAscii])
  })

  t.test('an earlier preParsing hook whose payload is destroyed before its end', async t => {
    const { app, seen } = await fixture(t)
    await app.register(async scope => {
      scope.addHook('preParsing', (_request, _reply, _payload, done) => {
        const payload = new PassThrough()
        payload.once('resume', () => { payload.destroy() })
        done(null, payload)
      })
      scope.post('/destroyed', { config: { openaiWebhook: {} } }, async ({ body }) => { seen.push(body) })
    })
    const delivery = sign(nonAscii)
    const { statusCode } = await app.inject({ method: 'POST', url: '/destroyed', headers: delivery.headers, payload: delivery.body })
    t.equal(statusCode, 400)
    t.same(seen, [])
  })
})

for (const url of [OWN, MARKED]) {
  t.test(`a body that something has read before is refused at ${url}, and keeps nobody waiting`, async t => {
    for (const hook of ['onRequest', 'preParsing'] as const) {
      const { app, seen } = await fixture(t)
      // As body-parser does, where the app uses middleware.
      app.addHook(hook as 'onRequest', async ({ raw }) => { for await (const chunk of raw) t.ok(chunk) })
      const port = await listen(app)
      const { headers, body } = sign(nonAscii)
      for (const framing of [{ 'content-length': String(body.length) }, { 'transfer-encoding': 'chunked' }]) {
        const sent = http.request({ port, host: '127.0.0.1', path: url, method: 'POST', agent: false, headers: { ...headers, ...framing } })
        sent.end(body)
        const [response] = await once(sent, 'response') as [http.IncomingMessage]
        response.resume()
        t.equal(response.statusCode, 401, `${hook}, ${Object.keys(framing).join('')}`)
      }
      t.same(seen, [])
    }
  })
}

t.test('a body that an earlier preParsing hook has put in place of the request\'s', async t => {
  /** An app whose bodies come in the chunks that `rechunk` makes of them, of a length that nobody declares. */
  async function rechunked (t: Parameters<typeof build>[0], rechunk: (body: Buffer) => unknown[]): Promise<FastifyInstance> {
    const app = Fastify()
    t.teardown(() => app.close())
    app.addHook('preParsing', async (request, _reply, payload) => {
      const chunks: Buffer[] = []
      for await (const chunk of payload) chunks.push(chunk as Buffer)
      delete request.headers['content-length']
      request.headers['transfer-encoding'] = 'chunked'
      return Readable.from(rechunk(Buffer.concat(chunks))) as RequestPayload
    })
    await app.register(openaiWebhook, { secret: SECRET })
    app.post('/own', { config: { openaiWebhook: {} } }, async () => ({ received: true }))
    return app
  }
  for (const url of ['/webhooks/openai', '/own']) {
    t.test(`${url}: is taken as Uint8Arrays, in one piece and in several`, async t => {
      const one = await rechunked(t, body => [new Uint8Array(body)])
      t.equal(await outcome(one, undefined, url), '200 {"received":true}')
      const two = await rechunked(t, body => [new Uint8Array(body.subarray(0, 9)), new Uint8Array(body.subarray(9))])
      t.equal(await outcome(two, undefined, url), '200 {"received":true}')
    })

    t.test(`${url}: is refused where its chunks are something else, and does not end the process`, async t => {
      for (const chunks of [[{ a: 1 }, { b: 2 }], [[1], [2]], [5]]) {
        const app = await rechunked(t, () => chunks)
        t.match(await outcome(app, undefined, url), /^500 /)
      }
    })
  }
})
