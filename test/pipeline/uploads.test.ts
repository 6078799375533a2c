import { once } from 'node:events'
import { connect as connect2 } from 'node:http2'
import type { ClientHttp2Session, ClientHttp2Stream, Http2ServerResponse } from 'node:http2'
import { connect as connectTcp, createServer } from 'node:net'
import type { AddressInfo, Socket } from 'node:net'
import { PassThrough, Readable } from 'node:stream'
import { setImmediate as turn } from 'node:timers/promises'
import type { FastifyInstance, FastifyReply, FastifyServerOptions, RequestPayload } from 'fastify'
import t from 'tap'
import type { Test } from 'tap'
import { Deadline } from '../../lib/deadline.ts'
import { Gathered } from '../../lib/pipeline/gathered.ts'
import type { OpenAIWebhookOptions } from '../../lib/index.ts'
import { build, post, sign, stoppedClock, thin } from '../support/deliveries.ts'
import type { Signed } from '../support/deliveries.ts'
import { deferred } from '../support/observe.ts'
import { CHUNKED, chunk, head, LAST_CHUNK, listen, request, Wire } from '../support/wire.ts'

// How long a body may be on its way, and what becomes of what is not read.

const OWN = '/webhooks/openai'
const ADDED = '/added'
const MARKED = '/marked'
const URLS = [OWN, ADDED, MARKED]

const TIMEOUT = 'FST_OPENAI_WEBHOOK_BODY_TIMEOUT'

/** As Fastify closes by default: what is under way may end. */
const GRACEFUL = { forceCloseConnections: undefined } as unknown as FastifyServerOptions

interface Fixture {
  app: FastifyInstance
  port: number
  seen: () => number
  told: unknown[]
  /** Resolves when so many requests are being read. */
  reading: (count: number) => Promise<void>
}

async function fixture (t: Test, options: OpenAIWebhookOptions = {}, server: FastifyServerOptions = {}, prepare: (app: FastifyInstance) => void = () => {}): Promise<Fixture> {
  const app = await build(t, options, { forceCloseConnections: true, ...server })
  let seen = 0
  const told: unknown[] = []
  let arrived = 0
  let wake = (): void => {}
  app.openaiWebhook
    .onAny(() => { seen++ })
    .onError(({ code }: Error & { code?: string }, { endpoint }) => { told.push([code, endpoint]) })
    .route({ url: ADDED })
  app.post(MARKED, { config: { openaiWebhook: {} } }, async () => { seen++ })
  app.addHook('onRequest', (_request, _reply, done) => {
    done()
    arrived++
    wake()
  })
  prepare(app)
  const port = await listen(app)
  return {
    app,
    port,
    told,
    seen: () => seen,
    async reading (count) {
      await new Promise<void>(resolve => {
        wake = () => { if (arrived >= count) resolve() }
        wake()
      })
      await turn()
    }
  }
}

const lines = ({ headers }: Signed): Array<[string, string]> => Object.entries(headers)

const codeOf = (body: string): unknown => (JSON.parse(body) as { code?: unknown }).code

const stale = (): Signed => sign(thin('batch.failed'), { timestamp: 1_750_861_210 })

/** Whether the connection is still there once what is under way has been done. */
async function isOpen (socket: Socket): Promise<boolean> {
  for (let n = 0; n < 5; n++) await turn()
  return !socket.destroyed && !socket.readableEnded
}

async function closed (socket: Socket): Promise<void> {
  if (!socket.closed) await once(socket, 'close')
}

async function connect (t: Test, port: number): Promise<ClientHttp2Session> {
  const session = connect2(`http://127.0.0.1:${port}`)
  t.teardown(() => session.destroy())
  await once(session, 'connect')
  return session
}

function open (session: ClientHttp2Session, { headers }: Signed, url: string) {
  const stream: ClientHttp2Stream = session.request({ ...headers, ':method': 'POST', ':path': url })
  stream.on('error', () => {})
  let status: unknown
  let body = ''
  stream.on('response', headers => { status = headers[':status'] })
  stream.setEncoding('utf8').on('data', text => { body += text })
  return {
    stream,
    answer: new Promise<{ status: unknown, body: string }>(resolve => stream.once('end', () => { resolve({ status, body }) })),
    closed: new Promise<void>(resolve => stream.once('close', () => { resolve() }))
  }
}

const FRAMES: Readonly<Record<number, string>> = { 0: 'DATA', 1: 'HEADERS', 3: 'RST_STREAM' }

/** Stands before a server, and notes which frames it sends for the first stream of a connection (RFC 9113, section 4.1). */
async function watchFrames (t: Test, target: number): Promise<{ frames: string[], port: number }> {
  const frames: string[] = []
  const server = createServer(client => {
    const upstream = connectTcp(target, '127.0.0.1')
    let rest = Buffer.alloc(0)
    client.pipe(upstream).on('data', (data: Buffer) => {
      rest = Buffer.concat([rest, data])
      while (rest.length >= 9 && rest.length >= 9 + rest.readUIntBE(0, 3)) {
        const [length, type, flags, stream] = [rest.readUIntBE(0, 3), rest[3]!, rest[4]!, rest.readUInt32BE(5)]
        if (stream === 1 && type in FRAMES) frames.push(FRAMES[type]! + (type < 2 && flags & 1 ? ' END_STREAM' : ''))
        rest = rest.subarray(9 + length)
      }
      client.write(data)
    })
    for (const [socket, other] of [[client, upstream], [upstream, client]] as const) socket.on('error', () => {}).on('close', () => { other.destroy() })
  }).listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => { server.close() })
  return { frames, port: (server.address() as AddressInfo).port }
}

for (const url of URLS) {
  t.test(`HTTP/1.1: a body that has not arrived whole in time, at ${url}`, async t => {
    for (const [name, framing] of [['with a length', [['content-length', '1000']]], ['chunked', CHUNKED]] as const) {
      t.test(`${name}: nothing of it`, async t => {
        const { port, reading, told, seen } = await fixture(t)
        const clock = stoppedClock(t)
        const wire = await Wire.open(t, port)
        await wire.write(head([...lines(sign(thin('batch.failed'))), ...framing], url))
        await reading(1)
        clock.advance(9_999)
        t.ok(await isOpen(wire.socket))
        t.same(told, [])
        clock.advance(1)
        const answer = await wire.answer()
        t.match(answer, { status: 408, headers: { connection: 'close' } })
        t.equal(codeOf(answer.body), TIMEOUT)
        await closed(wire.socket)
        t.same(told, [[TIMEOUT, url]])
        t.equal(seen(), 0)
      })
    }

    t.test('byte by byte, however steadily', async t => {
      const { port, reading, seen } = await fixture(t)
      const clock = stoppedClock(t)
      const wire = await Wire.open(t, port)
      const delivery = sign(thin('batch.failed'))
      await wire.write(head([...lines(delivery), ...CHUNKED], url))
      await reading(1)
      for (let n = 0; n < 10; n++) {
        await wire.write(chunk(delivery.body.subarray(n, n + 1)))
        t.ok(await isOpen(wire.socket))
        clock.advance(1_000)
      }
      t.equal((await wire.answer()).status, 408)
      await closed(wire.socket)
      t.equal(seen(), 0)
    })
  })

  t.test(`HTTP/1.1: a body that arrives in the last moment is a delivery, at ${url}`, async t => {
    const { port, reading, told, seen } = await fixture(t)
    const clock = stoppedClock(t)
    const wire = await Wire.open(t, port)
    const delivery = sign(thin('batch.failed'))
    const bytes = request(lines(delivery), delivery.body, url)
    await wire.write(bytes.subarray(0, -1))
    await reading(1)
    clock.advance(9_999)
    await wire.write(bytes.subarray(-1))
    t.match(await wire.answer(), { status: 200 })
    clock.advance(1_000_000)
    t.ok(await isOpen(wire.socket))
    t.equal(seen(), 1)
    t.same(told, [])
  })

  t.test(`HTTP/2: a body that has not arrived whole in time has its stream reset, and the connection lives on, at ${url}`, async t => {
    const { port, reading, told, seen } = await fixture(t, {}, { http2: true } as FastifyServerOptions)
    const session = await connect(t, port)
    const clock = stoppedClock(t)
    const first = sign(thin('batch.failed'))
    const late = open(session, first, url)
    late.stream.write(first.body.subarray(0, 40))
    await reading(1)
    clock.advance(9_999)
    t.same(told, [])
    clock.advance(1)
    const answer = await late.answer
    t.equal(answer.status, 408)
    t.equal(codeOf(answer.body), TIMEOUT)
    await late.closed
    t.equal(seen(), 0)

    const next = sign(thin('batch.failed'))
    const whole = open(session, next, url)
    whole.stream.end(next.body)
    t.equal((await whole.answer).status, 200)
    t.same(told, [[TIMEOUT, url]])
  })

  t.test(`HTTP/2: a stream that has as many bytes as it declared, but does not end, at ${url}`, async t => {
    const { port, reading, told } = await fixture(t, {}, { http2: true } as FastifyServerOptions)
    const session = await connect(t, port)
    const clock = stoppedClock(t)
    const { headers, body } = sign(thin('batch.failed'))
    const late = open(session, { headers: { ...headers, 'content-length': String(body.length) }, body }, url)
    late.stream.write(body)
    await reading(1)
    clock.advance(10_000)
    t.equal((await late.answer).status, 408)
    t.same(told, [[TIMEOUT, url]])
  })

  t.test(`HTTP/2: what is refused before it has arrived is not read on, at ${url}`, async t => {
    const { port } = await fixture(t, { bodyLimit: 1_000 }, { http2: true } as FastifyServerOptions)
    const session = await connect(t, port)
    const warnings: string[] = []
    const onWarning = ({ name }: Error): void => { warnings.push(name) }
    process.on('warning', onWarning)
    t.teardown(() => process.off('warning', onWarning))
    const other = sign(thin('batch.failed'))
    for (const [delivery, body, status] of [
      [stale(), 'x', 401],
      [sign(thin('batch.failed')), 'x'.repeat(2_000), 413],
      [{ ...other, headers: { ...other.headers, 'content-length': '2000' } }, 'x', 413],
      [{ ...other, headers: { ...other.headers, 'content-type': 'text/plain' } }, 'x', 415]
    ] as const) {
      const refused = open(session, delivery, url)
      refused.stream.write(body)
      t.equal((await refused.answer).status, status)
      await refused.closed // though it has not been ended here
    }
    t.notOk(session.closed)
    t.notOk(warnings.includes('UnsupportedWarning'), 'of a connection header')
  })

  t.test(`HTTP/2: a refusal is answered whole before its stream is reset, at ${url}`, async t => {
    const answers: Record<string, (reply: FastifyReply) => unknown> = {
      'no body': reply => reply.send(),
      'a short body': reply => reply.send('x'),
      'a long body': reply => reply.send('x'.repeat(200_000)),
      'a stream': reply => reply.send(Readable.from(['x', 'y'])),
      trailers: reply => reply.trailer('x-trailer', async () => 'z').send('x'),
      'of its own, no body': reply => reply.hijack().raw.writeHead(401).end(),
      'of its own, nothing but an end': reply => { Object.assign(reply.hijack().raw, { statusCode: 401 }).end() },
      'of its own, a short body': reply => reply.hijack().raw.writeHead(401).end('x')
    }
    for (const [name, answer] of Object.entries(answers)) {
      const { port } = await fixture(t, {}, { http2: true } as FastifyServerOptions, app => {
        app.setErrorHandler((_error, _request, reply) => { answer(reply.code(401)) })
      })
      const { frames, port: watched } = await watchFrames(t, port)
      const refused = open(await connect(t, watched), stale(), url)
      refused.stream.write('x') // and more is to come
      t.equal((await refused.answer).status, 401, name)
      await refused.closed
      const ended = frames.findIndex(frame => frame.endsWith(' END_STREAM'))
      t.match(frames[0], /^HEADERS/, name)
      t.not(ended, -1, name)
      t.same(frames.slice(ended + 1), ['RST_STREAM'], name)
    }
  })

  t.test(`HTTP/2: a refused stream whose answer has not gone out is reset where it does not arrive in time, at ${url}`, async t => {
    const { port } = await fixture(t, {}, { http2: true } as FastifyServerOptions, app => {
      app.setErrorHandler((_error, _request, reply) => {
        const { raw } = reply.hijack() as unknown as { raw: Http2ServerResponse }
        // As behind a socket that takes nothing.
        Object.defineProperty(raw.stream, 'state', { value: { localClose: 0 } })
        Object.assign(raw, { statusCode: 401 }).end()
      })
    })
    const clock = stoppedClock(t)
    const refused = open(await connect(t, port), stale(), url)
    refused.stream.write('x')
    t.equal((await refused.answer).status, 401)
    for (let n = 0; n < 5; n++) await turn()
    t.notOk(refused.stream.destroyed)
    const closed = refused.closed.then(() => true)
    while (!await Promise.race([closed, turn(false)])) clock.advance(10_000)
  })

  t.test(`HTTP/1.1: the body of a request that was refused, at ${url}`, async t => {
    const unread: Array<[string, number, Signed]> = [['by its headers', 401, stale()]]
    const { headers, body } = sign(thin('batch.failed'))
    unread.push(['by its content type', 415, { headers: { ...headers, 'content-type': 'text/plain' }, body }])
    for (const [name, status, delivery] of unread) {
      t.test(`${name}: closes the connection where it does not arrive in time`, async t => {
        const { port, reading } = await fixture(t)
        const clock = stoppedClock(t)
        const wire = await Wire.open(t, port)
        await wire.write(head([...lines(delivery), ['content-length', '1000']], url))
        t.equal((await wire.answer()).status, status)
        await reading(1)
        for (let n = 0; n < 10; n++) {
          await wire.write(Buffer.from('x'))
          t.ok(await isOpen(wire.socket))
          clock.advance(1_000)
        }
        await closed(wire.socket)
      })

      t.test(`${name}: leaves the connection open where it does`, async t => {
        const { port } = await fixture(t)
        const clock = stoppedClock(t)
        const wire = await Wire.open(t, port)
        await wire.write(request(lines(delivery), delivery.body, url))
        t.equal((await wire.answer()).status, status)
        const good = sign(thin('batch.failed'))
        await wire.write(request(lines(good), good.body, url))
        t.equal((await wire.answer()).status, 200)
        clock.advance(1_000_000)
        t.ok(await isOpen(wire.socket))
      })
    }
  })
}

t.test('a request that Fastify\'s handlerTimeout has answered is closed all the same', async t => {
  const { port, reading, seen } = await fixture(t, { bodyTimeout: 10_000 }, { handlerTimeout: 100 } as FastifyServerOptions)
  const clock = stoppedClock(t)
  const wire = await Wire.open(t, port)
  await wire.write(head([...lines(sign(thin('batch.failed'))), ['content-length', '1000']], MARKED))
  await reading(1)
  clock.advance(100)
  t.equal((await wire.answer()).status, 503)
  t.ok(await isOpen(wire.socket))
  clock.advance(10_000)
  await closed(wire.socket)
  t.equal(seen(), 0)
})

t.test('`bodyTimeout`', async t => {
  /** ms after which each of these urls is answered 408. */
  async function patience (t: Test, urls: string[], options: OpenAIWebhookOptions, server: FastifyServerOptions = {}, prepare?: (app: FastifyInstance) => void): Promise<number[]> {
    const { port, reading, told } = await fixture(t, options, server, prepare)
    const clock = stoppedClock(t)
    for (const url of urls) {
      const wire = await Wire.open(t, port)
      await wire.write(head([...lines(sign(thin('batch.failed'))), ...CHUNKED], url))
    }
    await reading(urls.length)
    const waited = new Map<unknown, number>()
    for (let ms = 0; ms <= 30_000; ms += 500) {
      for (const [code, url] of told as Array<[unknown, unknown]>) {
        if (code === TIMEOUT && !waited.has(url)) waited.set(url, ms)
      }
      clock.advance(500)
    }
    return urls.map(url => waited.get(url) ?? Infinity)
  }

  t.test('may be set for all routes, and for one', async t => {
    t.same(await patience(t, [OWN, ADDED, MARKED, '/a', '/b'], { bodyTimeout: 2_000 }, {}, app => {
      app.openaiWebhook.route({ url: '/a', bodyTimeout: 1_000 })
      app.post('/b', { config: { openaiWebhook: { bodyTimeout: 20_000 } } }, async () => {})
    }), [2_000, 2_000, 2_000, 1_000, 20_000])
  })

  t.test('gives way to a shorter requestTimeout of Fastify\'s, which Node checks when it likes', async t => {
    t.same(await patience(t, [OWN, '/b'], {}, { requestTimeout: 3_000 }, app => {
      app.post('/b', { config: { openaiWebhook: { bodyTimeout: 1_000 } } }, async () => {})
    }), [3_000, 1_000])
    t.same(await patience(t, [OWN], {}, { requestTimeout: 300_000 }), [10_000])
  })
})

t.test('a stream that an earlier preParsing hook has put in place of the request is not read on', async t => {
  const source = new PassThrough() as PassThrough & RequestPayload
  const { port, reading } = await fixture(t, {}, {}, app => {
    app.addHook('preParsing', (_request, _reply, _payload, done) => { done(null, source) })
  })
  const clock = stoppedClock(t)
  const wire = await Wire.open(t, port)
  await wire.write(head([...lines(sign(thin('batch.failed'))), ...CHUNKED], MARKED))
  await reading(1)
  clock.advance(10_000)
  t.equal((await wire.answer()).status, 408)
  t.ok(source.isPaused())
})

t.test('a stream in place of the request that has as many bytes as were declared, but does not end', async t => {
  const { headers, body } = sign(thin('batch.failed'))
  const source = new PassThrough() as PassThrough & RequestPayload
  source.write(body)
  const { port, reading } = await fixture(t, {}, {}, app => {
    app.addHook('preParsing', (_request, _reply, _payload, done) => { done(null, source) })
  })
  const clock = stoppedClock(t)
  const wire = await Wire.open(t, port)
  await wire.write(head([...Object.entries(headers), ['content-length', String(body.length)]], MARKED))
  await reading(1)
  clock.advance(10_000)
  t.equal((await wire.answer()).status, 408)
})

t.test('a body that has as many bytes as its Content-Length says, but does not end', async t => {
  const lenient = { http: { insecureHTTPParser: true } }
  await t.test('because it is chunked, for a lenient parser', async t => {
    for (const url of URLS) {
      const { port, reading } = await fixture(t, {}, lenient as FastifyServerOptions)
      const clock = stoppedClock(t)
      const wire = await Wire.open(t, port)
      const { headers, body } = sign(thin('batch.failed'))
      await wire.write(Buffer.concat([head([...Object.entries(headers), ['content-length', String(body.length)], ...CHUNKED], url), chunk(body)]))
      await reading(1)
      clock.advance(10_000)
      t.equal((await wire.answer()).status, 408, url)
    }
  })

  await t.test('because a hook has it decoded into more of them', async t => {
    const { port, reading } = await fixture(t, {}, {}, app => {
      app.addHook('onRequest', async ({ raw }) => { raw.setEncoding('utf8') })
    })
    const clock = stoppedClock(t)
    const wire = await Wire.open(t, port)
    const { headers } = sign(thin('batch.failed'))
    await wire.write(Buffer.concat([head([...Object.entries(headers), ['content-length', '9']]), Buffer.alloc(3, 0xff)]))
    await reading(1)
    clock.advance(10_000)
    t.equal((await wire.answer()).status, 408)
  })
})

t.test('a stream of what is neither bytes nor text is the app\'s fault, and is not read on', async t => {
  const source = new PassThrough({ objectMode: true }) as PassThrough & RequestPayload
  source.write({ own: true })
  const { port } = await fixture(t, {}, {}, app => {
    app.addHook('preParsing', (_request, _reply, _payload, done) => { done(null, source) })
  })
  const wire = await Wire.open(t, port)
  await wire.write(head([...lines(sign(thin('batch.failed'))), ...CHUNKED], MARKED))
  t.match(await wire.answer(), { status: 500, headers: { connection: 'close' } })
  t.ok(source.isPaused())
})

t.test('closing the app is not held up by what has not arrived', async t => {
  for (const http2 of [false, true]) {
    for (const url of [OWN, MARKED]) {
      t.test(`over HTTP/${http2 ? 2 : 1.1}, at ${url}: it is to come again`, async t => {
        const { app, port, reading, told, seen } = await fixture(t, {}, { ...GRACEFUL, ...(http2 && { http2 }) } as FastifyServerOptions)
        const delivery = sign(thin('batch.failed'))
        if (http2) {
          const session = await connect(t, port)
          const { stream, answer } = open(session, delivery, url)
          stream.write('x')
          await reading(1)
          const closing = app.close()
          t.equal((await answer).status, 503)
          await closing
        } else {
          const wire = await Wire.open(t, port)
          await wire.write(head([...lines(delivery), ['content-length', '1000']], url))
          await reading(1)
          const closing = app.close()
          const answer = await wire.answer()
          t.match(answer, { status: 503, headers: { connection: 'close', 'retry-after': '5' } })
          t.equal(codeOf(answer.body), 'FST_OPENAI_WEBHOOK_OVERLOADED')
          await closing
        }
        t.same(told, [['FST_OPENAI_WEBHOOK_OVERLOADED', url]])
        t.equal(seen(), 0)
      })
    }
  }

  t.test('nor by the body of a request that was refused', async t => {
    const { app, port } = await fixture(t, {}, GRACEFUL)
    const wire = await Wire.open(t, port)
    await wire.write(head([...lines(stale()), ['content-length', '1000']]))
    t.equal((await wire.answer()).status, 401)
    await app.close()
    await closed(wire.socket)
  })

  t.test('where handlers still run, it has until their end, or closeTimeout', async t => {
    const finish = deferred()
    const { app, port, reading, told } = await fixture(t, { closeTimeout: 8_000, deadline: 60_000 }, { ...GRACEFUL, pluginTimeout: 0 }, app => {
      app.openaiWebhook.on('batch.completed', async () => { await finish.promise })
    })
    t.teardown(() => { finish.resolve() })
    const clock = stoppedClock(t)
    const running = sign(thin('batch.completed'))
    const first = await Wire.open(t, port)
    await first.write(request(lines(running), running.body))
    const wire = await Wire.open(t, port)
    await wire.write(head([...lines(sign(thin('batch.failed'))), ['content-length', '1000']]))
    await reading(2)
    const closing = app.close()
    await turn()
    clock.advance(7_999)
    await turn()
    t.same(told, [])
    clock.advance(1)
    t.equal((await wire.answer()).status, 503)
    finish.resolve()
    await closing
  })

  t.test('one that begins after that is refused at once', async t => {
    const held = deferred()
    const { app, port, reading } = await fixture(t, {}, GRACEFUL, app => {
      app.addHook('onRequest', async () => { await held.promise })
    })
    const wires = await Promise.all([sign(thin('batch.failed')), stale()].map(async delivery => {
      const wire = await Wire.open(t, port)
      await wire.write(head([...lines(delivery), ['content-length', '1000']], MARKED))
      return wire
    }))
    await reading(2)
    const closing = app.close()
    for (let n = 0; n < 5; n++) await turn()
    held.resolve()
    t.match(await wires[0]!.answer(), { status: 503, headers: { connection: 'close' } })
    t.match(await wires[1]!.answer(), { status: 401, headers: { connection: 'close' } })
    await closing
  })
})

t.test('a closed deadline', async t => {
  const clock = stoppedClock(t)
  const deadline = new Deadline(100)
  const seen: string[] = []
  const waiting = (name: string) => () => { seen.push(name) }
  deadline.start(waiting('first'))
  deadline.start(waiting('second'))
  deadline.close()
  t.same(seen, ['first', 'second'])
  clock.advance(1_000)
  t.equal(seen.length, 2, 'each once')
  deadline.start(waiting('late'))
  clock.advance(1)
  t.same(seen, ['first', 'second', 'late'], 'what starts afterwards has no time left')
})

t.test('the memory that a body takes', async t => {
  const sizes = [0, 1, 2, 3, 100, 4_095, 4_096, 8_192, 65_535, 65_536]
  const cuts: Array<[string, (bytes: Buffer) => Buffer[]]> = [
    ['in one piece', bytes => [bytes]],
    ['in small pieces', bytes => {
      const each = bytes.length > 100 ? 7 : 1
      return Array.from({ length: Math.ceil(bytes.length / each) }, (_, n) => Buffer.from(bytes.subarray(n * each, (n + 1) * each)))
    }],
    ['in pieces of a slab', bytes => {
      const slab = Buffer.concat([Buffer.alloc(100_000), bytes])
      return Array.from({ length: Math.ceil(bytes.length / 1_000) }, (_, n) => slab.subarray(100_000 + n * 1_000, 100_000 + Math.min(bytes.length, (n + 1) * 1_000)))
    }],
    ['in two', bytes => [bytes.subarray(0, bytes.length >> 1), bytes.subarray(bytes.length >> 1)]]
  ]
  for (const [name, cut] of cuts) {
    for (const size of sizes) {
      for (const expected of [size, 65_536, 1]) { // one byte was announced: an earlier preParsing hook may unpack more
        const bytes = Buffer.from(Array.from({ length: size }, (_, n) => n % 251))
        const gathered = new Gathered(expected)
        let most = 0
        for (const piece of cut(bytes)) {
          gathered.add(piece)
          most = Math.max(most, gathered.take().buffer.byteLength - 2 * gathered.length)
        }
        const { buffer } = gathered.take()
        const isRight = gathered.take().equals(bytes) && most <= 0 && (size === 0 || expected !== size || buffer === bytes.buffer || buffer.byteLength <= size)
        t.ok(isRight, `${name}: ${size} bytes of ${expected}, at most twice that at any time, and no more than announced`)
      }
    }
  }

  t.test('a piece that is alone with its memory is not copied', async t => {
    const piece = Buffer.allocUnsafeSlow(1_000)
    const gathered = new Gathered(1_000)
    gathered.add(piece)
    t.equal(gathered.take(), piece)
  })
})

t.test('a good delivery is not timed any longer', async t => {
  const app = await build(t)
  await app.ready()
  const clock = stoppedClock(t)
  const told: unknown[] = []
  t.equal((await post(app, sign(thin('batch.failed')))).statusCode, 200)
  clock.advance(1_000_000)
  t.same(told, [])
})

t.test('HTTP/1.1: no timer is started for a body that arrives with its headers', async t => {
  const { port } = await fixture(t)
  const started = t.capture(Deadline.prototype, 'start', Deadline.prototype.start)
  const wire = await Wire.open(t, port)
  for (const url of URLS) {
    const delivery = sign(thin('batch.failed'))
    await wire.write(request(lines(delivery), delivery.body, url))
    t.equal((await wire.answer()).status, 200)
  }
  t.same(started(), [])
})

t.test('a body in pieces is the body', async t => {
  const { port, seen } = await fixture(t)
  for (const url of URLS) {
    const delivery = sign(thin('batch.failed'))
    const wire = await Wire.open(t, port)
    await wire.write(head([...lines(delivery), ...CHUNKED], url))
    for (let at = 0; at < delivery.body.length; at += 50) await wire.write(chunk(delivery.body.subarray(at, at + 50)))
    await wire.write(LAST_CHUNK)
    t.equal((await wire.answer()).status, 200)
  }
  t.equal(seen(), 3)
})
