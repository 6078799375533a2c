import { once } from 'node:events'
import http from 'node:http'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import { setImmediate as turn } from 'node:timers/promises'
import { pathToFileURL } from 'node:url'
import zlib, { brotliCompressSync, deflateSync, gunzipSync, gzipSync } from 'node:zlib'
import type { Gunzip } from 'node:zlib'
import compress from '@fastify/compress'
import cors from '@fastify/cors'
import helmet from '@fastify/helmet'
import multipart from '@fastify/multipart'
import rateLimit from '@fastify/rate-limit'
import underPressure from '@fastify/under-pressure'
import type { FastifyInstance, FastifyReply } from 'fastify'
import rawBody from 'fastify-raw-body'
import t from 'tap'
import type { Test } from 'tap'
import ts from 'typescript'
import { SECRET, sign, thin } from './support/deliveries.ts'
import { codeBlocks, readDocument } from './support/docs.ts'
import {
  AWKWARD, DISPATCHING, forged, interop, MARKED, message, ORDERS, overHttp1, overHttp2, OWN, RECEIVING, receives, REPLYING, ROUTE
} from './support/interop.ts'
import type { Interop, Send } from './support/interop.ts'
import { deferred, redelivered } from './support/observe.ts'
import { TLS } from './support/tls.ts'
import { head, listen, Wire } from './support/wire.ts'

/** What a route answers to a new delivery. */
async function status ({ send }: { send: Send }, url: string, delivery = sign(thin('batch.failed')), headers?: Record<string, string>): Promise<number> {
  return (await send(message(url, delivery, headers))).status
}

const JSON_TYPE = { 'content-type': 'application/json' }

t.test('@fastify/rate-limit', async t => {
  for (const order of ORDERS) {
    t.test(`registered ${order} ours, with room left`, async t => {
      await receives(t, await interop(t, { order, beside: app => app.register(rateLimit) }))
    })
  }

  const eachRoute = { max: 1, keyGenerator: (request: { routeOptions: { url?: string | undefined } }) => request.routeOptions.url! }

  t.test('registered before ours, its limit holds for every receiving route, and nothing is hashed beyond it', async t => {
    const it = await interop(t, { beside: app => app.register(rateLimit, eachRoute) })
    for (const url of RECEIVING) {
      t.equal(await status(it, url), 200, url)
      const hashed = it.hashed()
      const { status: second, headers } = await it.send(message(url, sign(thin('batch.failed'))))
      t.equal(second, 429, url)
      t.match(headers, { 'retry-after': '60', 'x-ratelimit-limit': '1' })
      t.equal(it.hashed(), hashed, url)
    }
    t.equal(it.seen.length, RECEIVING.length)
    const json = { url: '/json', headers: JSON_TYPE, body: '{}' }
    t.same([(await it.send(json)).status, (await it.send(json)).status], [200, 429], 'it limits the other routes')
  })

  t.test('registered after ours, too late for our own route: only what is declared after it is limited', async t => {
    const it = await interop(t, { order: 'after', beside: app => app.register(rateLimit, eachRoute) })
    for (const url of RECEIVING) {
      t.same([await status(it, url), await status(it, url)], [200, url === OWN ? 200 : 429], url)
    }
  })

  for (const url of RECEIVING) {
    t.test(`429 comes before the body, and the delivery is not lost, at ${url}`, async t => {
      let max = 0
      const it = await interop(t, { beside: app => app.register(rateLimit, { max: () => max }) })
      const delivery = sign(AWKWARD)
      const wire = await Wire.open(t, it.port)
      await wire.write(head([...Object.entries(delivery.headers), ['content-length', String(delivery.body.length)]], url))
      t.match(await wire.answer(), { status: 429 }, 'to the headers alone')
      t.equal(it.hashed(), 0)

      max = 10
      const { status, body } = await it.send(message(url, redelivered(delivery)))
      t.equal(`${status} ${body.toString()}`, '200 {"received":true}')
      t.same(it.seen, [{ url, bytes: AWKWARD }])
    })
  }

  t.test('`rateLimit` limits our own route and those of .route(), before they hash', async t => {
    const it = await interop(t, {
      beside: app => app.register(rateLimit, { global: false }),
      webhook: { rateLimit: { max: 2, timeWindow: '1 hour' } },
      route: { rateLimit: { max: 1 } }
    })
    for (const [url, max] of [[OWN, 2], [ROUTE, 1], [REPLYING, 1]] as const) {
      const hashed = it.hashed()
      for (let n = 1; n <= max; n++) t.equal(await status(it, url), 200, `${url}: ${n} of ${max}`)
      const { status: beyond, headers } = await it.send(message(url, sign(thin('batch.failed'))))
      t.equal(beyond, 429, `${url}: ${max + 1} of ${max}`)
      t.match(headers, { 'x-ratelimit-limit': String(max), 'retry-after': url === OWN ? '3600' : '60' })
      t.equal(it.hashed() - hashed, max)
    }
    for (const url of [MARKED, DISPATCHING]) t.same([await status(it, url), await status(it, url), await status(it, url)], [200, 200, 200], url)
  })

  t.test('`rateLimit` is refused at boot where it would limit nothing', async t => {
    const refused = { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: /expected @fastify\/rate-limit to be registered before/ }
    await t.rejects(interop(t, { order: 'after', beside: app => app.register(rateLimit), webhook: { rateLimit: { max: 1 } } }), refused)
    await t.rejects(interop(t, { route: { rateLimit: { max: 1 } } }), refused)
    await receives(t, await interop(t, { webhook: { rateLimit: false }, route: { rateLimit: false } }))
  })

  t.test('a marked route has its limit in its config', async t => {
    const it = await interop(t, { beside: app => app.register(rateLimit, { global: false }), marked: { rateLimit: { max: 1 } } })
    for (const url of [MARKED, DISPATCHING]) t.same([await status(it, url), await status(it, url), it.hashed()], [200, 429, url === MARKED ? 1 : 2], url)
    t.same([await status(it, OWN), await status(it, OWN)], [200, 200])
  })

  t.test('`rateLimit: false` exempts from the limit of the app', async t => {
    const it = await interop(t, {
      beside: app => app.register(rateLimit, { max: 1 }),
      webhook: { rateLimit: false },
      route: { rateLimit: false },
      marked: { rateLimit: false }
    })
    for (const url of RECEIVING) t.same([await status(it, url), await status(it, url)], [200, 200], url)
    const json = { url: '/json', headers: JSON_TYPE, body: '{}' }
    t.same([(await it.send(json)).status, (await it.send(json)).status], [200, 429])
  })

  t.test('what the headers alone condemn does not count', async t => {
    const it = await interop(t, { beside: app => app.register(rateLimit, eachRoute) })
    const stale = () => sign(thin('batch.failed'), { timestamp: Math.floor(Date.now() / 1000) - 3_600 })
    for (const url of RECEIVING) {
      const anonymous = { headers: JSON_TYPE, body: Buffer.from('{}') }
      t.same([await status(it, url, anonymous), await status(it, url, stale()), await status(it, url)], [401, 401, 200], url)
    }
  })

  t.test('with hook: \'preHandler\' it counts what has been verified, and nothing else', async t => {
    const it = await interop(t, { beside: app => app.register(rateLimit, { ...eachRoute, hook: 'preHandler' }) })
    for (const url of RECEIVING) {
      t.same([await status(it, url, forged(sign(AWKWARD))), await status(it, url, forged(sign(AWKWARD)))], [401, 401], url)
      t.same([await status(it, url), await status(it, url)], [200, 429], url)
    }
    t.equal(it.seen.length, RECEIVING.length)
  })

  t.test('a 429 is told to onError, on a route of the plugin', async t => {
    const told: unknown[] = []
    const it = await interop(t, {
      beside: app => app.register(rateLimit, { max: 0 }),
      routes: app => app.openaiWebhook.onError((error, { endpoint }) => { told.push([(error as { statusCode?: number }).statusCode, endpoint]) })
    })
    for (const url of [OWN, ROUTE, REPLYING]) t.equal(await status(it, url), 429)
    t.same(told, [[429, OWN], [429, ROUTE], [429, REPLYING]])
  })
})

for (const order of ORDERS) {
  t.test(`@fastify/under-pressure, registered ${order} ours: 503 before any hashing, and the delivery is not lost`, async t => {
    let healthy = true
    const told: unknown[] = []
    const it = await interop(t, {
      order,
      beside: app => app.register(underPressure, { healthCheck: async () => healthy, healthCheckInterval: 1, retryAfter: 7, exposeStatusRoute: true }),
      routes: app => app.openaiWebhook.onError(({ code }: Error & { code?: string }, { endpoint }) => { told.push([code, endpoint]) })
    })
    async function becomes (health: boolean): Promise<void> {
      healthy = health
      while (it.app.isUnderPressure() === health) await turn() // until the next health check
    }
    await receives(t, it)
    t.equal((await it.send({ url: '/status', method: 'GET' })).status, 200)

    it.seen.length = 0
    const deliveries = RECEIVING.map(url => ({ url, delivery: sign(AWKWARD) }))
    await becomes(false)
    const hashed = it.hashed()
    told.length = 0
    for (const { url, delivery } of deliveries) {
      t.match(await it.send(message(url, delivery)), { status: 503, code: 'FST_UNDER_PRESSURE', headers: { 'retry-after': '7' } }, url)
    }
    t.equal((await it.send({ url: '/json', headers: JSON_TYPE, body: '{}' })).status, 503)
    t.equal(it.hashed(), hashed)
    t.same(it.seen, [])
    t.strictSame(told.slice(0, 3), [OWN, ROUTE, REPLYING].map(url => ['FST_UNDER_PRESSURE', url]), 'told to onError, on a route of the plugin')

    await becomes(true)
    for (const { url, delivery } of deliveries) t.equal(await status(it, url, redelivered(delivery)), 200, url)
    t.same(it.seen, RECEIVING.map(url => ({ url, bytes: AWKWARD })))
  })

  t.test(`@fastify/helmet, registered ${order} ours: its headers are on every answer`, async t => {
    const it = await interop(t, { order, beside: app => app.register(helmet, { enableCSPNonces: true }) })
    await receives(t, it)
    const expected = { 'x-content-type-options': 'nosniff', 'strict-transport-security': /max-age/, 'content-security-policy': /nonce-/ }
    const tooLong = sign(thin('batch.failed', { id: 'x'.repeat(70_000) }))
    for (const url of RECEIVING) {
      for (const [delivery, status] of [[sign(AWKWARD), 200], [forged(sign(AWKWARD)), 401], [tooLong, 413]] as const) {
        t.match(await it.send(message(url, delivery)), { status, headers: expected }, `${status} of ${url}`)
      }
    }
    t.match(await it.send({ url: '/json', headers: JSON_TYPE, body: '{}' }), { status: 200, headers: expected })
  })

  for (const hook of ['onRequest', 'preParsing', 'preValidation', 'preHandler'] as const) {
    t.test(`@fastify/cors at ${hook}, registered ${order} ours: its headers are on the answers, and no preflight runs a handler`, async t => {
      const it = await interop(t, { order, beside: app => app.register(cors, { origin: true, hook }) })
      const origin = { origin: 'https://app.example.com' }
      await receives(t, it, { headers: origin })
      it.seen.length = 0
      for (const url of [...RECEIVING, '/json']) {
        const delivery = url === '/json' ? { headers: JSON_TYPE, body: Buffer.from('{}') } : sign(AWKWARD)
        t.match(await it.send(message(url, delivery, origin)), { status: 200, headers: { 'access-control-allow-origin': origin.origin } }, url)
      }
      t.equal(it.seen.length, RECEIVING.length)
      for (const url of [...RECEIVING, '/json']) {
        const preflight = await it.send({ url, method: 'OPTIONS', headers: { ...origin, 'access-control-request-method': 'POST' } })
        t.equal(preflight.status, 204, url)
      }
      t.equal(it.seen.length, RECEIVING.length)
    })
  }
}

t.test('@fastify/compress', async t => {
  const accept = { 'accept-encoding': 'gzip' }
  const long = JSON.stringify({ text: 'the same again, '.repeat(1_000) })

  for (const order of ORDERS) {
    for (const [how, syncThreshold] of [['at once', 1e6], ['as a stream', 0]] as const) {
      t.test(`registered ${order} ours, answers compressed ${how}`, async t => {
        const closed: Array<Promise<unknown>> = []
        let runs = 0
        const compressing = (reply: FastifyReply): FastifyReply => {
          runs++
          closed.push(once(reply.raw, 'close'))
          return reply.type('application/json')
        }
        const it = await interop(t, {
          order,
          beside: app => app.register(compress, { threshold: 0, syncThreshold }),
          routes (app) {
            app.post('/long', async (_request, reply) => reply.type('application/json').send(long))
            app.openaiWebhook.route({ url: '/route/long', handler: async (_request, reply) => compressing(reply).send(long) })
            app.post('/marked/long', { config: { openaiWebhook: {} } }, async (_request, reply) => compressing(reply).send(long))
            app.post('/marked/compress', { config: { openaiWebhook: {} } }, (_request, reply) => { compressing(reply).compress(long) })
          }
        })
        await receives(t, it)

        for (const url of RECEIVING) {
          const { status, headers, body } = await it.send(message(url, sign(AWKWARD), accept))
          t.equal(status, 200)
          // A plugin that adds hooks to routes does not see those that were there before it.
          const encoding = url === OWN && order === 'after' ? undefined : 'gzip'
          t.equal(headers['content-encoding'], encoding, url)
          t.equal((encoding === undefined ? body : gunzipSync(body)).toString(), '{"received":true}', url)
        }
        for (const url of ['/route/long', '/marked/long', '/marked/compress']) {
          const delivery = sign(AWKWARD)
          const { status, headers, body } = await it.send(message(url, delivery, accept))
          t.match({ status, headers }, { status: 200, headers: { 'content-encoding': 'gzip' } }, url)
          t.equal(gunzipSync(body).toString(), long, url)
          await Promise.all(closed)
          const again = await it.send(message(url, redelivered(delivery)))
          t.equal(again.body.toString(), '{"received":true,"duplicate":true}', url)
        }
        t.equal(runs, 3)
        const { headers, body } = await it.send({ url: '/long', headers: { ...JSON_TYPE, ...accept }, body: '{}' })
        t.equal(headers['content-encoding'], 'gzip', 'it compresses the other routes\' answers')
        t.equal(gunzipSync(body).toString(), long)
      })
    }
  }

  // OpenAI signs the JSON and sends it as it is; a proxy in between may compress it.
  for (const order of ORDERS) {
    t.test(`registered ${order} ours, what arrives compressed`, { timeout: 30_000 }, async t => {
      const it = await interop(t, { order, beside: app => app.register(compress) })
      // Our own route is declared with the plugin; a marked route's bytes are captured before the hooks that it had.
      const unpacked = order === 'before' ? [OWN, ROUTE, REPLYING] : [ROUTE, REPLYING, MARKED, DISPATCHING]
      t.equal((await it.send({ url: '/json', headers: { ...JSON_TYPE, 'content-encoding': 'gzip' }, body: gzipSync('{"a":1}') })).body.toString(), '{"body":{"a":1}}')

      for (const [encoding, pack] of [['gzip', gzipSync], ['deflate', deflateSync], ['br', brotliCompressSync]] as const) {
        it.seen.length = 0
        for (const url of RECEIVING) {
          const { headers, body } = sign(AWKWARD)
          t.equal(await status(it, url, { headers, body: pack(body) }, { 'content-encoding': encoding }), unpacked.includes(url) ? 200 : 401, `${encoding} to ${url}`)
        }
        t.same(it.seen, unpacked.map(url => ({ url, bytes: AWKWARD })), 'what is unpacked first verifies')
      }

      it.seen.length = 0
      for (const url of RECEIVING) {
        const { headers, body } = forged(sign(AWKWARD))
        t.equal(await status(it, url, { headers, body: gzipSync(body) }, { 'content-encoding': 'gzip' }), 401, `forged, to ${url}`)
        const huge = sign(thin('batch.failed', { id: 'x'.repeat(1_000_000) }))
        t.equal(await status(it, url, { headers: huge.headers, body: gzipSync(huge.body) }, { 'content-encoding': 'gzip' }), unpacked.includes(url) ? 413 : 401, `a bomb, to ${url}`)
        const cut = gzipSync(body).subarray(0, -12)
        t.equal(await status(it, url, { headers, body: cut }, { 'content-encoding': 'gzip' }), unpacked.includes(url) ? 400 : 401, `cut off, to ${url}`)
      }
      t.same(it.seen, [])
    })
  }

  for (const url of [ROUTE, REPLYING, MARKED, DISPATCHING]) {
    t.test(`unpacking stops at the limit, at ${url}`, async t => {
      const unpacking: Gunzip[] = []
      const watched = {
        createGunzip () {
          const gunzip = zlib.createGunzip()
          unpacking.push(gunzip)
          return gunzip
        }
      }
      const it = await interop(t, { order: 'after', beside: app => app.register(compress, { zlib: watched }) })
      const bomb = gzipSync(Buffer.alloc(10_000_000, ' '))
      t.equal(await status(it, url, { headers: sign(AWKWARD).headers, body: bomb }, { 'content-encoding': 'gzip' }), 413)
      t.match(unpacking, [{ readableFlowing: false, readableEnded: false }])
    })
  }

  t.test('with globalDecompression: false nothing is unpacked before it is verified', async t => {
    const it = await interop(t, { beside: app => app.register(compress, { globalDecompression: false, threshold: 0 }) })
    await receives(t, it)
    it.seen.length = 0
    for (const url of RECEIVING) {
      const { headers, body } = sign(AWKWARD)
      t.equal(await status(it, url, { headers, body: gzipSync(body) }, { 'content-encoding': 'gzip' }), 401, url)
    }
    t.same(it.seen, [])
    t.equal((await it.send({ url: '/json', headers: { ...JSON_TYPE, ...accept }, body: '{}' })).headers['content-encoding'], 'gzip', 'answers are compressed all the same')
  })
})

t.test('fastify-raw-body', async t => {
  for (const order of ORDERS) {
    for (const encoding of ['utf8', false] as const) {
      for (const runFirst of [false, true]) {
        // Whoever is told of a route last comes first, and what has been read cannot be read again.
        const late = runFirst && order === 'before'
        const name = late ? ', which finds the body of a marked route read already: request.openaiWebhook.rawBody has it' : ''
        t.test(`registered ${order} ours, encoding: ${encoding}, runFirst: ${runFirst}${name}`, async t => {
          const raw = new Map<string, unknown>()
          const keep = (url: string, { rawBody }: { rawBody?: string | Buffer }): void => {
            raw.set(url, rawBody)
          }
          const it = await interop(t, {
            order,
            beside: app => app.register(rawBody, { global: false, encoding, runFirst }),
            marked: { rawBody: true },
            routes (app) {
              app.addHook('preHandler', async request => { keep(request.url, request) })
              app.post('/raw', { config: { rawBody: true } }, async ({ body }) => body)
            }
          })
          await receives(t, it)
          const bytes = encoding === false ? Buffer.from(AWKWARD) : AWKWARD
          for (const url of [MARKED, DISPATCHING]) t.same(raw.get(url), late ? undefined : bytes, url)
          for (const url of [OWN, ROUTE, REPLYING]) t.equal(raw.get(url), undefined, url)

          t.same(JSON.parse((await it.send({ url: '/raw', headers: JSON_TYPE, body: AWKWARD })).body.toString()), JSON.parse(AWKWARD))
          t.same(raw.get('/raw'), bytes)
          t.equal((await it.send({ url: '/json', headers: JSON_TYPE, body: '{}' })).body.toString(), '{"body":{}}')
          t.equal(raw.get('/json'), undefined)
        })
      }
    }

    t.test(`registered ${order} ours, for all routes`, async t => {
      const raw: unknown[] = []
      const it = await interop(t, {
        order,
        beside: app => app.register(rawBody),
        routes: app => app.openaiWebhook.onAny((_event, { request }) => { raw.push(request!.rawBody) })
      })
      await receives(t, it)
      // It adds its hook to the routes that are declared after it.
      t.same(raw, [order === 'before' ? AWKWARD : undefined, AWKWARD, AWKWARD, AWKWARD])
      const tooLong = sign(thin('batch.failed', { id: 'x'.repeat(300_000) }))
      for (const url of RECEIVING) t.equal(await status(it, url, tooLong), 413, url)
    })
  }
})

for (const order of ORDERS) {
  for (const attachFieldsToBody of [false, true, 'keyValues'] as const) {
    t.test(`@fastify/multipart, registered ${order} ours, attachFieldsToBody: ${attachFieldsToBody}: forms are parsed on other routes, and refused on ours`, async t => {
      const it = await interop(t, {
        order,
        beside: app => app.register(multipart, { attachFieldsToBody }),
        routes (app) {
          app.post('/form', async request => {
            if (attachFieldsToBody === 'keyValues') return { file: String((request.body as { file: Buffer }).file) }
            const file = attachFieldsToBody ? (request.body as { file: { toBuffer: () => Promise<Buffer> } }).file : (await request.file())!
            return { file: String(await file.toBuffer()) }
          })
        }
      })
      await receives(t, it)

      const form = new FormData()
      form.set('file', new Blob(['as it was sent']), 'file.txt')
      const encoded = new Response(form)
      const headers = { 'content-type': encoded.headers.get('content-type')! }
      const body = Buffer.from(await encoded.arrayBuffer())
      t.equal((await it.send({ url: '/form', headers, body })).body.toString(), '{"file":"as it was sent"}')
      it.seen.length = 0
      for (const url of RECEIVING) t.equal(await status(it, url, { headers: { ...sign(AWKWARD).headers, ...headers }, body }), 415, url)
      t.same(it.seen, [])
    })
  }
}

t.test('an app with its own JSON parser', async t => {
  type Parsers = Record<string, (app: FastifyInstance, parse: (text: string) => unknown) => void>
  const parsers: Parsers = {
    'of text': (app, parse) => {
      app.addContentTypeParser('application/json', { parseAs: 'string' }, async (_request: unknown, body: string) => parse(body))
    },
    'of bytes': (app, parse) => {
      app.addContentTypeParser('application/json', { parseAs: 'buffer' }, (_request, body, done) => { done(null, parse(body.toString())) })
    },
    'of the stream': (app, parse) => {
      app.addContentTypeParser('application/json', async (_request: unknown, payload: NodeJS.ReadableStream) => parse(await text(payload)))
    },
    'for whatever looks like JSON': (app, parse) => {
      app.removeAllContentTypeParsers()
      app.addContentTypeParser(/^application\/.*json/, { parseAs: 'string' }, (_request, body, done) => { done(null, parse(body as string)) })
    },
    'for everything': (app, parse) => {
      app.removeAllContentTypeParsers()
      app.addContentTypeParser('*', { parseAs: 'string' }, (_request, body, done) => { done(null, parse(body as string)) })
    }
  }
  for (const order of ORDERS) {
    for (const [name, add] of Object.entries(parsers)) {
      t.test(`${name}, added ${order} ours: it parses the other routes, and on a marked one what has been verified`, async t => {
        const parsed: string[] = []
        const bodies: unknown[] = []
        const it = await interop(t, {
          order,
          beside: app => add(app, text => {
            parsed.push(text)
            return { own: JSON.parse(text) }
          }),
          routes: app => app.addHook('preHandler', async ({ url, body }) => { if (url === MARKED || url === DISPATCHING) bodies.push(body) })
        })
        await receives(t, it, { urls: [OWN, ROUTE, REPLYING] })
        t.same(parsed, [], 'not on a route of the plugin')
        await receives(t, it, { urls: [MARKED, DISPATCHING] })
        t.same(parsed, Array(4).fill(AWKWARD), 'a delivery and its retry on each, nothing forged')
        t.same(bodies, Array(4).fill({ own: JSON.parse(AWKWARD) }))
        t.equal((await it.send({ url: '/json', headers: JSON_TYPE, body: '[1]' })).body.toString(), '{"body":{"own":[1]}}')
      })
    }
  }
})

/** A reverse proxy that says who sent what it passes on. */
async function proxy (t: Test, port: number): Promise<(client: string) => Send> {
  const server = http.createServer((incoming, answer) => {
    const { host: _host, 'x-client': client, ...headers } = incoming.headers
    const outgoing = http.request({
      port,
      host: '127.0.0.1',
      path: incoming.url,
      method: incoming.method,
      headers: { ...headers, 'x-forwarded-for': client, 'x-forwarded-proto': 'https', 'x-forwarded-host': 'hooks.example.com' }
    })
    outgoing.on('response', response => {
      answer.writeHead(response.statusCode!, response.headers)
      response.pipe(answer)
    })
    incoming.pipe(outgoing)
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => server.close())
  const send = overHttp1((server.address() as { port: number }).port)
  return client => ({ headers, ...rest }) => send({ ...rest, headers: { ...headers, 'x-client': client } })
}

t.test('trustProxy', async t => {
  async function behindProxy (t: Test, trustProxy: boolean | string) {
    const who: unknown[] = []
    const it = await interop(t, {
      server: { trustProxy },
      beside: app => app.register(rateLimit, { global: false }),
      webhook: { rateLimit: { max: 4 } },
      routes: app => app.openaiWebhook.onAny((_event, { request }) => { who.push([request!.ip, request!.protocol, request!.host]) })
    })
    return { it, who, from: await proxy(t, it.port) }
  }

  for (const trustProxy of [true, '127.0.0.1']) {
    t.test(`${trustProxy}: a handler sees the sender, and a rate limit counts each of them`, async t => {
      const { it, who, from } = await behindProxy(t, trustProxy)
      await receives(t, it, { send: from('203.0.113.7') })
      t.same(who, Array(4).fill(['203.0.113.7', 'https', 'hooks.example.com']))
      t.same([await status({ send: from('203.0.113.7') }, OWN), await status({ send: from('203.0.113.7') }, OWN)], [200, 429])
      t.equal(await status({ send: from('203.0.113.8') }, OWN), 200)
    })
  }

  t.test('false: everybody is the proxy, and a rate limit counts all as one', async t => {
    const { it, who, from } = await behindProxy(t, false)
    await receives(t, it, { send: from('203.0.113.7') })
    t.match(who, Array(4).fill(['127.0.0.1', 'http']))
    t.same([await status({ send: from('203.0.113.7') }, OWN), await status({ send: from('203.0.113.8') }, OWN)], [200, 429])
  })
})

for (const [name, server] of Object.entries({
  ignoreTrailingSlash: { ignoreTrailingSlash: true },
  'routerOptions.ignoreTrailingSlash': { routerOptions: { ignoreTrailingSlash: true } }
})) {
  t.test(`${name}: with a slash or without, it is the same endpoint`, async t => {
    const it = await interop(t, {
      server,
      routes (app) {
        app.register(async scope => {
          scope.openaiWebhook.route({ url: '/' })
        }, { prefix: '/scope' })
      }
    })
    await receives(t, it)
    await receives(t, it, { at: url => `${url}/` })
    await receives(t, it, { urls: ['/scope'], at: url => `${url}/` })
    for (const url of RECEIVING) {
      const delivery = sign(AWKWARD)
      t.equal(await status(it, url, delivery), 200)
      t.equal((await it.send(message(`${url}/`, redelivered(delivery)))).body.toString(), '{"received":true,"duplicate":true}', url)
    }
  })
}

t.test('without ignoreTrailingSlash a URL with a slash is another one', async t => {
  const it = await interop(t)
  for (const url of RECEIVING) t.equal(await status(it, `${url}/`), 404, url)
})

t.test('rewriteUrl: a rewritten URL is the same endpoint', async t => {
  const it = await interop(t, { server: { rewriteUrl: ({ url = '' }) => url.replace(/^\/gateway(\/v\d)?/, '') } })
  await receives(t, it, { at: url => `/gateway/v1${url}?account=1` })
  for (const url of RECEIVING) {
    const delivery = sign(AWKWARD)
    t.equal(await status(it, `/gateway${url}`, delivery), 200)
    t.equal((await it.send(message(url, redelivered(delivery)))).body.toString(), '{"received":true,"duplicate":true}', url)
  }
})

/** Ordinary registrations of every plugin that is tested here. */
const everything: ReadonlyArray<(app: FastifyInstance) => PromiseLike<unknown>> = [
  app => app.register(rateLimit, { max: 10_000 }),
  app => app.register(underPressure, { maxEventLoopDelay: 60_000, exposeStatusRoute: true }),
  app => app.register(helmet),
  app => app.register(cors, { origin: 'https://app.example.com' }),
  app => app.register(compress, { threshold: 0 }),
  app => app.register(rawBody, { global: false }),
  app => app.register(multipart)
]

async function registerAll (app: FastifyInstance, plugins: typeof everything): Promise<void> {
  for (const register of plugins) await register(app)
  app.addContentTypeParser('application/json', { parseAs: 'string' }, (_request, body, done) => { done(null, { own: JSON.parse(body as string) }) })
}

const servers = {
  'HTTP/1.1': {},
  https: { https: TLS },
  'HTTP/2 without TLS': { http2: true },
  'HTTP/2': { http2: true, https: TLS },
  'HTTP/2 and HTTP/1.1 on one port': { http2: true, https: { allowHTTP1: true, ...TLS } }
} as const

for (const [name, server] of Object.entries(servers)) {
  const clients = async (t: Test, { port }: Interop): Promise<Send[]> => {
    const tls = 'https' in server
    const isHttp2 = 'http2' in server
    return [
      ...(isHttp2 ? [await overHttp2(t, port, tls)] : []),
      ...(!isHttp2 || (tls && 'allowHTTP1' in server.https) ? [overHttp1(port, tls)] : [])
    ]
  }

  t.test(name, async t => {
    t.test('our plugin alone', async t => {
      const warnings: Error[] = []
      const warned = (warning: Error): void => { warnings.push(warning) }
      process.on('warning', warned)
      t.teardown(() => process.off('warning', warned))
      const it = await interop(t, { server })
      for (const send of await clients(t, it)) await receives(t, it, { send })
      await turn()
      t.same(warnings, [])
    })

    for (const [order, plugins] of [['before', everything], ['before', everything.toReversed()], ['after', everything], ['after', everything.toReversed()]] as const) {
      t.test(`every plugin at once, registered ${order} ours${plugins === everything ? '' : ', in reverse'}`, async t => {
        const it = await interop(t, { server, order, marked: { rawBody: true }, beside: app => registerAll(app, plugins) })
        for (const send of await clients(t, it)) {
          await receives(t, it, { send })
          const { status, headers, body } = await send({ url: '/json', headers: { ...JSON_TYPE, 'accept-encoding': 'gzip' }, body: '[1]' })
          t.match({ status, headers }, {
            status: 200,
            headers: {
              'x-ratelimit-limit': '10000',
              'x-content-type-options': 'nosniff',
              'access-control-allow-origin': 'https://app.example.com',
              'content-encoding': 'gzip'
            }
          })
          t.equal(gunzipSync(body).toString(), '{"body":{"own":[1]}}')
        }
      })
    }
  })
}

/** The app that the code block under a heading of the recipe makes. */
async function example (t: Test, heading: string): Promise<FastifyInstance> {
  const document = readDocument('docs/recipes/plugins.md')
  const start = document.text.split('\n').indexOf(`## ${heading}`)
  const { code } = codeBlocks(document).find(({ line }) => line > start)!
  const { outputText } = ts.transpileModule(code, { compilerOptions: { target: ts.ScriptTarget.ES2023, module: ts.ModuleKind.ESNext } })
  const plugin = new URL('../lib/index.ts', import.meta.url).href
  const directory = t.testdir({
    'example.mjs': `${outputText.replace("'fastify-openai-webhook'", `'${plugin}'`)}\nexport { app }\n`,
    'key.pem': TLS.key,
    'cert.pem': TLS.cert
  })
  const before = process.cwd()
  process.chdir(directory)
  t.teardown(() => process.chdir(before))
  t.intercept(process, 'env', { value: { ...process.env, OPENAI_WEBHOOK_SECRET: SECRET } })
  const { app } = await import(pathToFileURL(join(directory, 'example.mjs')).href) as { app: FastifyInstance }
  t.teardown(() => app.close())
  return app
}

t.test('the examples of docs/recipes/plugins.md', async t => {
  t.test('Rate limits', async t => {
    const app = await example(t, 'Rate limits')
    const from = await proxy(t, await listen(app))
    for (const [url, max] of [[OWN, '600'], ['/webhooks/batches', '60'], ['/calls', '60']] as const) {
      for (const client of ['203.0.113.7', '203.0.113.8']) {
        const { status, headers } = await from(client)(message(url, sign(AWKWARD)))
        t.match({ status, headers }, { status: 200, headers: { 'x-ratelimit-limit': max, 'x-ratelimit-remaining': String(Number(max) - 1) } }, url)
      }
    }
  })

  t.test('Compression', async t => {
    const app = await example(t, 'Compression')
    app.get('/long', async () => 'the same again, '.repeat(1_000))
    const send = overHttp1(await listen(app))
    const { headers, body } = sign(AWKWARD)
    t.equal(await status({ send }, OWN, { headers, body }), 200)
    t.equal(await status({ send }, OWN, { headers, body: gzipSync(body) }, { 'content-encoding': 'gzip' }), 401)
    t.equal((await send({ url: '/long', method: 'GET', headers: { 'accept-encoding': 'br' } })).headers['content-encoding'], 'br')
  })

  t.test('HTTP/2', { timeout: 30_000 }, async t => {
    const app = await example(t, 'HTTP/2')
    const port = await listen(app)
    for (const send of [overHttp1(port, true), await overHttp2(t, port, true)]) t.equal(await status({ send }, OWN), 200)
    await app.close()
  })
})

t.test('HTTP/2 with forceCloseConnections: app.close() waits for what is running, and not for the connection to time out', { timeout: 30_000 }, async t => {
  const running = deferred()
  const started = deferred()
  const it = await interop(t, {
    server: { http2: true, https: TLS },
    routes: app => app.openaiWebhook.on('batch.failed', async () => {
      started.resolve()
      await running.promise
    })
  })
  const send = await overHttp2(t, it.port, true)
  const answered = status({ send }, OWN)
  await started.promise
  const closed = it.app.close()
  running.resolve()
  t.equal(await answered, 200)
  await closed
})
