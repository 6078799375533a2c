import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { once } from 'node:events'
import { connect } from 'node:http2'
import type { AddressInfo } from 'node:net'
import { Readable } from 'node:stream'
import rateLimit from '@fastify/rate-limit'
import Fastify from 'fastify'
import type { FastifyBaseLogger, FastifyInstance, FastifyReply, RouteHandlerMethod } from 'fastify'
import t from 'tap'
import { InvalidSignature } from '../lib/errors.ts'
import openaiWebhook from '../lib/index.ts'
import { cellsOf, fail, faults, inject } from './support/composition.ts'
import type { Ask, Composed } from './support/composition.ts'
import { build, post, sign, SECRET, thin } from './support/deliveries.ts'
import { until } from './support/faults.ts'
import { capturedLog, deferred, dial, head, redelivered } from './support/observe.ts'
import { sized } from './support/size.ts'

// The same hooks and error handlers around a route of ours and around a plain one: the answers must be the same.

const rejections: unknown[] = []
process.on('unhandledRejection', reason => { rejections.push(reason) })

const cells = cellsOf(sized(15, 1))
t.test(`${cells.length} of the cells of hooks, error handlers, places, routes and deliveries`, async t => {
  t.same(await faults(cells, ({ app }) => inject(app)), [])
  t.same(rejections.splice(0), [], 'nothing is left to end the process')
})

const sample = cellsOf(sized(121, 11))
t.test(`${sample.length} over HTTP/1.1`, async t => {
  t.same(await faults(sample, fetched), [])
  t.same(rejections.splice(0), [], 'nothing is left to end the process')
})

const others = cellsOf(sized(131, 13))
t.test(`${others.length} over HTTP/2`, async t => {
  t.same(await faults(others, streamed, { http2: true } as object), [])
  t.same(rejections.splice(0), [], 'nothing is left to end the process')
})

async function listening ({ app }: Composed): Promise<string> {
  await app.listen({ port: 0, host: '127.0.0.1' })
  return `http://127.0.0.1:${(app.server.address() as AddressInfo).port}`
}

async function fetched (composed: Composed): Promise<Ask> {
  const origin = await listening(composed)
  return async (url, { headers, body }) => {
    const response = await fetch(origin + url, { method: 'POST', headers: { ...headers, connection: 'close' }, body: new Uint8Array(body), redirect: 'manual' })
    return { status: response.status, headers: Object.fromEntries(response.headers), body: await response.text() }
  }
}

async function streamed (composed: Composed): Promise<Ask> {
  const origin = await listening(composed)
  return async (url, { headers, body }) => {
    const session = connect(origin)
    const stream = session.request({ ':method': 'POST', ':path': url, ...headers })
    stream.end(body)
    const [{ ':status': status, ...others }] = await once(stream, 'response') as [Record<string, unknown>]
    let text = ''
    for await (const chunk of stream.setEncoding('utf8')) text += chunk
    session.close()
    return { status: Number(status), headers: others, body: text }
  }
}

t.test('what an app sets after the plugin holds for its routes as for those that come later', async t => {
  const settings: Record<string, (app: FastifyInstance) => void> = {
    'a reply serializer': app => {
      app.setReplySerializer(payload => JSON.stringify({ wrapped: payload }))
      app.setErrorHandler((error, _request, reply) => {
        reply.code(401)
        return { error }
      })
    },
    'a child logger factory': app => {
      app.setChildLoggerFactory(function (logger, bindings, options) { return logger.child({ ...bindings, by: this.prefix }, options) })
      app.addHook('onSend', async (request, reply) => { reply.header('x-by', (request.log as FastifyBaseLogger & { bindings: () => { by: string } }).bindings().by) })
    },
    'a value on requests': app => {
      app.decorateRequest('guest', 'nobody')
      app.addHook('onSend', async (request, reply) => { reply.header('x-guest', String((request as { guest?: string }).guest)) })
    },
    'a value on replies': app => {
      app.decorateReply('theme', 'dark')
      app.addHook('onSend', async (_request, reply) => { reply.header('x-theme', String((reply as { theme?: string }).theme)) })
    },
    'a value on the app': app => {
      app.decorate('tier', 'gold')
      app.addHook('onSend', async function (_request, reply) { reply.header('x-tier', String((this as { tier?: string }).tier)) })
    },
    'an id for requests': app => {
      app.setGenReqId(() => 'seven')
      app.addHook('onSend', async (request, reply) => { reply.header('x-id', request.id) })
    },
    'a not found handler': app => {
      app.setNotFoundHandler((_request, reply) => reply.code(404).send({ lost: true }))
      app.addHook('onRequest', async (_request, reply) => reply.callNotFound())
    },
    'two error handlers, of which the last fails': app => {
      app.setErrorHandler((_error, _request, reply) => reply.code(418).send('first'))
      app.setErrorHandler(error => { throw error })
    }
  }
  for (const [name, set] of Object.entries(settings)) {
    t.test(name, async t => {
      const app = Fastify({ logger: capturedLog().logger }) as FastifyInstance
      t.teardown(() => app.close())
      await app.register(async scope => {
        await scope.register(openaiWebhook, { secret: SECRET, path: '/own' })
        scope.openaiWebhook.route({ url: '/route' })
        await scope.register(async () => {})
        set(scope)
        scope.post('/marked', { config: { openaiWebhook: {} } }, scope.openaiWebhook.handler)
        scope.post('/plain', {
          preHandler: (request, _reply, done) => done(request.headers['webhook-signature'] === 'v1,AA==' ? new InvalidSignature() : undefined)
        }, async () => ({ received: true }))
      }, { prefix: '/api' })
      const good = sign(thin('batch.failed'))
      const bad = { ...good, headers: { ...good.headers, 'webhook-signature': 'v1,AA==' } }
      for (const delivery of name === 'a reply serializer' ? [bad] : [bad, good]) {
        const seen = async (url: string): Promise<object> => {
          const { statusCode, body, headers: { date, ...headers } } = await post(app, delivery, `/api${url}`)
          return { statusCode, body, headers }
        }
        const plain = await seen('/plain')
        for (const url of ['/own', '/route', '/marked']) t.same(await seen(url), plain, url)
      }
    })
  }
})

t.test('a function around handlers that ends what the handler has begun to write itself', async t => {
  const app = Fastify() as FastifyInstance
  t.teardown(() => app.close())
  await app.register(openaiWebhook, { secret: SECRET })
  app.addHook('onRoute', route => {
    const { handler } = route
    route.handler = async function (request, reply) {
      await (handler as Function).call(this, request, reply)
      reply.raw.end('end')
    }
  })
  let runs = 0
  const begin = (reply: FastifyReply): void => {
    runs++
    reply.hijack()
    reply.raw.write('begun, ')
  }
  const handlers: Record<string, RouteHandlerMethod> = {
    'not async': (_request, reply) => { begin(reply) },
    'async, at once': async (_request, reply) => { begin(reply) },
    'async, later': async (_request, reply) => {
      await new Promise(resolve => setTimeout(resolve, 5))
      begin(reply)
    }
  }
  for (const [nth, handler] of Object.values(handlers).entries()) {
    app.post(`/plain/${nth}`, handler)
    app.post(`/marked/${nth}`, { config: { openaiWebhook: {} } }, handler)
  }
  await app.listen({ port: 0, host: '127.0.0.1' })
  const { port } = app.server.address() as AddressInfo
  for (const [nth, name] of Object.keys(handlers).entries()) {
    const delivery = sign(thin('batch.failed'))
    const ask = async (url: string): Promise<string> => {
      const { headers, body } = redelivered(delivery)
      return await (await fetch(`http://127.0.0.1:${port}/${url}/${nth}`, { method: 'POST', headers: { ...headers, connection: 'close' }, body: new Uint8Array(body) })).text()
    }
    t.equal(await ask('plain'), 'begun, end', name)
    t.equal(await ask('marked'), 'begun, end', name)
    runs = 0
    t.equal(await ask('marked'), '{"received":true,"duplicate":true}', name)
    t.equal(runs, 0)
  }
})

t.test('a function that a hook of the app puts around handlers', async t => {
  const around: Record<string, (handler: Function) => (this: FastifyInstance, ...args: unknown[]) => unknown> = {
    'async, and awaits': handler => async function (...args) {
      try {
        return await handler.apply(this, args)
      } finally {
        ended++
      }
    },
    'async, and gives nothing back': handler => async function (...args) {
      await handler.apply(this, args)
      ended++
    },
    'not async, for what may be a promise': handler => function (...args) {
      const result = handler.apply(this, args) as Promise<unknown> | undefined
      return result?.finally === undefined ? result : result.finally(() => { ended++ })
    },
    'not async, and knows of no promise': handler => function (...args) {
      ended++
      return handler.apply(this, args)
    }
  }
  let ended = 0
  for (const [name, wrap] of Object.entries(around)) {
    for (const order of ['before the plugin', 'after it'] as const) {
      for (const isAsync of [true, false]) {
        t.test(`${name}, ${order}, ${isAsync ? 'async' : 'sync'} handlers`, async t => {
          const { logger, lines } = capturedLog()
          const app = Fastify({ logger }) as FastifyInstance
          t.teardown(() => app.close())
          const hook = (): void => {
            app.addHook('onRoute', route => { route.handler = wrap(route.handler) as typeof route.handler })
          }
          if (order === 'before the plugin') hook()
          await app.register(openaiWebhook, { secret: SECRET, deadline: 1_000 })
          if (order === 'after it') hook()
          let broken = true
          let isHandled = false
          const handle = (): void => {
            if (broken) throw Object.assign(new Error('disk full'), { statusCode: 500 })
            isHandled = true
          }
          const handler = isAsync
            ? async () => {
              await new Promise(resolve => setTimeout(resolve, 5))
              handle()
            }
            : handle
          const own = isAsync
            ? async (_request: unknown, reply: FastifyReply) => {
              await handler()
              return await reply.send('own')
            }
            : (_request: unknown, reply: FastifyReply) => {
                handle()
                reply.send('own')
              }
          app.openaiWebhook.on('batch.failed', handler as () => void)
          app.openaiWebhook.route({ url: '/route', handler: async (_request, reply) => await reply.send('own') })
          app.post('/marked', { config: { openaiWebhook: {} } }, own)
          app.post('/plain', own)
          const expected = { '/webhooks/openai': '{"received":true}', '/route': 'own', '/marked': 'own', '/plain': 'own' }
          await app.listen({ port: 0, host: '127.0.0.1' })
          for (const [url, body] of Object.entries(expected)) {
            const delivery = sign(thin('batch.failed'))
            const ask = async (): Promise<{ status: number, text: string }> => {
              const response = await fetch(`http://127.0.0.1:${(app.server.address() as AddressInfo).port}${url}`, {
                method: 'POST', headers: { ...redelivered(delivery).headers, connection: 'close' }, body: new Uint8Array(delivery.body)
              })
              return { status: response.status, text: await response.text() }
            }
            broken = true
            t.equal((await ask()).status, 500, `${url}: what fails is refused`)
            broken = isHandled = false
            ended = 0
            t.same(await ask(), { status: 200, text: body }, `${url}: the answer is the handler's`)
            t.equal(isHandled, true, 'and comes after its end')
            // The plugin's own route was declared before.
            if (name.startsWith('async')) t.equal(ended, url === '/webhooks/openai' && order === 'after it' ? 0 : 1, `${url}: the function ends once`)
            if (url !== '/plain') t.match((await ask()).text, '"duplicate":true')
          }
          t.notOk(lines.some(({ msg }) => /already sent|reply.sent/i.test(msg)))
        })
      }
    }
  }

  t.test('ends where the sender goes away, or is told at the deadline', async t => {
    const app = await build(t, { deadline: 20 })
    let ended = 0
    app.addHook('onRoute', route => {
      const { handler } = route
      route.handler = async function (request, reply) {
        try {
          return await handler.call(this, request, reply)
        } finally {
          ended++
        }
      }
    })
    const [started, over] = [deferred(), deferred()]
    app.openaiWebhook.on('batch.failed', async (_event, { webhookId }) => {
      if (webhookId === 'wh_gone') started.resolve()
      await over.promise
    })
    app.openaiWebhook.route({ url: '/route' })
    await app.listen({ port: 0, host: '127.0.0.1' })
    const answer = await post(app, sign(thin('batch.failed')), '/route')
    t.same([answer.statusCode, answer.json().code], [503, 'FST_OPENAI_WEBHOOK_DEADLINE'])
    t.equal(ended, 1)

    const gone = sign(thin('batch.failed'), { webhookId: 'wh_gone' })
    const { socket } = await dial(app)
    socket.write(head(gone, '/route'))
    socket.write(gone.body)
    await started.promise
    socket.destroy()
    await until('the function to end', () => ended === 2)
    over.resolve()
    t.equal((await post(app, redelivered(gone), '/route')).statusCode, 200)
  })
})

t.test('a delivery that @fastify/rate-limit refuses with an object is refused, and comes again', async t => {
  const app = Fastify() as FastifyInstance
  t.teardown(() => app.close())
  await app.register(rateLimit, {
    max: 1,
    keyGenerator: request => String(request.headers['x-who']),
    errorResponseBuilder: (_request, { statusCode }) => ({ statusCode, error: 'slow down' })
  })
  await app.register(openaiWebhook, { secret: SECRET })
  const seen: string[] = []
  app.openaiWebhook.on('batch.failed', (_event, { webhookId }) => { seen.push(webhookId) })
  const [first, second] = [sign(thin('batch.failed')), sign(thin('batch.failed'))]
  const from = (who: string, delivery: typeof first): typeof first => ({ ...delivery, headers: { ...delivery.headers, 'x-who': who } })

  t.equal((await post(app, from('a', first))).statusCode, 200)
  const limited = await post(app, from('a', second))
  t.equal(limited.statusCode, 429)
  t.same(limited.json(), { statusCode: 429, error: 'slow down' })
  t.equal((await post(app, from('b', redelivered(second)))).body, '{"received":true}')
  t.same(seen, [first.headers['webhook-id'], second.headers['webhook-id']])
})

t.test('a hook that answers by itself is told of: a 2xx in the log, five times in ten seconds, and anything else as a refusal', async t => {
  const log = capturedLog()
  const app = await build(t, {}, { logger: log.logger })
  app.addHook('onRequest', async (request, reply) => { if (request.headers['x-hook'] !== undefined) return await reply.code(Number(request.headers['x-hook'])).send() })
  app.post('/marked', { config: { openaiWebhook: {} } }, async () => {})
  const [refused, reported]: [unknown[], unknown[]] = [[], []]
  const hear = (message: unknown): void => { refused.push(message) }
  subscribe('fastify-openai-webhook.refused', hear)
  t.teardown(() => { unsubscribe('fastify-openai-webhook.refused', hear) })
  app.openaiWebhook.onError(error => { reported.push(error) })
  const send = async (status: string, url?: string): Promise<number> => {
    const { headers, body } = sign(thin('batch.failed'))
    return (await post(app, { body, headers: { ...headers, 'x-hook': status } }, url)).statusCode
  }
  const lines = (): unknown[] => log.lines.splice(0).filter(({ level }) => level === 40)

  t.equal(await send('202'), 202)
  t.match(lines(), [{ level: 40, msg: 'the delivery was not processed', code: 'ANSWERED_BY_A_HOOK', statusCode: 202, endpoint: '/webhooks/openai' }])
  t.equal(await send('204', '/marked'), 204)
  t.match(lines(), [{ msg: 'the delivery was not processed', statusCode: 204, endpoint: '/marked' }])
  for (const status of ['302', '403', '503']) {
    for (const [url, endpoint] of [[undefined, '/webhooks/openai'], ['/marked', '/marked']] as const) {
      t.equal(await send(status, url), Number(status))
      const refusal = { code: 'ANSWERED_BY_A_HOOK', statusCode: Number(status), endpoint }
      t.match(lines(), [{ msg: 'webhook delivery refused', ...refusal }], 'OpenAI sends it again')
      t.match(refused.splice(0), [refusal])
      t.match(reported.splice(0), [{ code: 'ANSWERED_BY_A_HOOK', statusCode: Number(status), message: `a hook of the app has answered ${status}, so the delivery was not processed` }])
    }
  }
  for (let i = 0; i < 9; i++) await send('200')
  t.equal(lines().length, 4)
})

t.test('a hook\'s answer that fails is told of once', async t => {
  const app = await build(t)
  app.addHook('onRequest', async (_request, reply) => await reply.code(403).send(new Readable({ read () { this.destroy(new Error('disk full')) } })))
  const reported: unknown[] = []
  app.openaiWebhook.onError(error => { reported.push((error as { code?: unknown }).code) })
  await post(app, sign(thin('batch.failed')))
  t.same(reported, ['ANSWERED_BY_A_HOOK'])
})

t.test('a hook that throws nothing, so that Fastify skips verification, has the delivery refused', async t => {
  const app = await build(t)
  const seen: string[] = []
  app.openaiWebhook.onAny(() => { seen.push('app') })
  const nothing = (request: { headers: Record<string, unknown> }, kind: string): void => { if (request.headers['x-kind'] === kind) fail(undefined) }
  app.addHook('preParsing', (request, _reply, payload, done) => {
    nothing(request, 'preParsing')
    done(null, payload)
  })
  app.addHook('preHandler', (request, _reply, done) => {
    nothing(request, 'preHandler')
    done()
  })
  app.post('/marked', {
    config: { openaiWebhook: {} },
    preValidation: async () => { seen.push('preValidation of the route') },
    preHandler: async () => { seen.push('preHandler of the route') }
  }, async () => { seen.push('marked') })
  for (const [url, kind] of [['/webhooks/openai', 'preHandler'], ['/marked', 'preParsing']] as const) {
    const { headers, body } = sign(thin('batch.failed'))
    const response = await post(app, { body, headers: { ...headers, 'webhook-signature': 'v1,AA==', 'x-kind': kind } }, url)
    t.equal(response.statusCode, 500)
    t.match(response.json(), { code: 'FST_OPENAI_WEBHOOK_UNPROTECTED_ROUTE', message: `route POST ${url} asks for webhook verification but a hook of the app has thrown null or undefined` })
  }
  t.same(seen, [])
})
