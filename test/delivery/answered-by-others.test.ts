import Fastify from 'fastify'
import type { FastifyInstance, FastifyReply, FastifyServerOptions } from 'fastify'
import t from 'tap'
import type { Test } from 'tap'
import openaiWebhook from '../../lib/index.ts'
import { SECRET, build, outcome, post, sign, stoppedClock, thin } from '../support/deliveries.ts'
import { capturedLog, deferred, listen, redelivered } from '../support/observe.ts'

// Somebody else answers, or has a hand in the answer: a hook's own time limit, a hook that wraps `reply.send`, an onRoute hook.

const marked = { config: { openaiWebhook: {} } }
const delivered = (): ReturnType<typeof sign> => sign(thin('batch.failed'))
const forged = (): ReturnType<typeof sign> => sign(thin('batch.failed'), { secret: 'whsec_b3RoZXI=' })
const broken = async (): Promise<never> => { throw new Error('disk full') }

t.test('a hook that makes an envelope of errors, in a `send` of its own, makes no success of them', async t => {
  const app = Fastify() as FastifyInstance
  t.teardown(() => app.close())
  app.addHook('onRequest', async (_request, reply) => {
    const { send } = reply
    const enveloping = (payload: unknown): FastifyReply => send.call(reply, payload instanceof Error ? { ok: false } : payload)
    reply.send = enveloping as typeof send
  })
  await app.register(openaiWebhook, { secret: SECRET })
  app.openaiWebhook.onAny(broken).route({ url: '/answering', on: { 'batch.failed': broken }, handler: broken })
  app.post('/marked', marked, broken)
  app.post('/dispatching', { ...marked, handler: app.openaiWebhook.handler })
  for (const url of ['/webhooks/openai', '/answering', '/marked', '/dispatching']) {
    const delivery = delivered()
    for (const attempt of ['first', 'retry']) t.equal((await post(app, redelivered(delivery), url)).statusCode, 500, `${url} ${attempt}`)
    t.ok((await post(app, forged(), url)).statusCode >= 400, `${url} forged`)
  }
})

for (const place of ['before', 'after']) {
  t.test(`an onRoute hook that gives routes an error handler which answers 200, ${place} the plugin`, async t => {
    const app = Fastify() as FastifyInstance
    t.teardown(() => app.close())
    const hook = (): void => {
      app.addHook('onRoute', route => { route.errorHandler = (_error, _request, reply) => { reply.code(200).send({ ok: false }) } })
    }
    if (place === 'before') hook()
    await app.register(openaiWebhook, { secret: SECRET })
    if (place === 'after') hook()
    app.openaiWebhook.onAny(broken).route({ url: '/route' }).route({ url: '/answering', handler: broken })
    app.post('/marked', marked, broken)
    app.post('/dispatching', { ...marked, handler: app.openaiWebhook.handler })
    for (const url of ['/webhooks/openai', '/route', '/answering', '/marked', '/dispatching']) {
      const delivery = delivered()
      for (const attempt of ['first', 'retry']) t.equal((await post(app, redelivered(delivery), url)).statusCode, 500, `${url} ${attempt}`)
      t.equal((await post(app, forged(), url)).statusCode, 401, `${url} forged`)
      const text = delivered()
      t.equal((await post(app, { ...text, headers: { ...text.headers, 'content-type': 'text/plain' } }, url)).statusCode, 415, `${url} text`)
    }
  })
}

interface Interrupted {
  app: FastifyInstance
  log: ReturnType<typeof capturedLog>
  /** Delivers to /own, where a hook of the app answers once that has started. @returns what was delivered */
  interrupt: (started: Promise<unknown>, status: number) => Promise<ReturnType<typeof sign>>
}

async function interrupted (t: Test): Promise<Interrupted> {
  const log = capturedLog()
  const app = Fastify({ logger: log.logger! }) as FastifyInstance
  t.teardown(() => app.close())
  let latest: FastifyReply
  app.addHook('onRequest', async (_request, reply) => { latest = reply })
  await app.register(openaiWebhook, { secret: SECRET })
  async function interrupt (started: Promise<unknown>, status: number): Promise<ReturnType<typeof sign>> {
    const delivery = delivered()
    const answering = post(app, delivery, '/own')
    await started
    latest.code(status).send({ slow: true })
    t.equal((await answering).statusCode, status)
    return delivery
  }
  return { app, log, interrupt }
}

t.test('a hook that answers with a failure while the own handler runs: a retry does not run it beside itself', async t => {
  const { app, log, interrupt } = await interrupted(t)
  const ends = [deferred(), deferred()]
  const starts = [deferred(), deferred()]
  let runs = 0
  app.post('/own', marked, async () => {
    const run = runs++
    starts[run]!.resolve()
    await ends[run]!.promise
  })
  const delivery = await interrupt(starts[0]!.promise, 503)
  const second = post(app, redelivered(delivery), '/own')
  while (!log.lines.some(({ state }) => state === 'joined')) await new Promise(resolve => setImmediate(resolve))
  t.equal(runs, 1)
  ends[0]!.resolve()
  t.ok((await second).statusCode >= 400, 'which has been answered for as failed')
  const third = post(app, redelivered(delivery), '/own')
  await starts[1]!.promise
  ends[1]!.resolve()
  t.equal((await third).body, '{"received":true}')
  t.equal(runs, 2)
})

t.test('a hook that answers while an async onError hook holds the refusal is told that it cannot, whatever the route\'s handlerTimeout', async t => {
  const [holding, held, over] = [deferred(), deferred(), deferred()]
  const app = await build(t, { deadline: 10 })
  let latest: FastifyReply
  app.addHook('onRequest', async (_request, reply) => { latest = reply })
  app.addHook('onError', async () => {
    holding.resolve()
    await held.promise
  })
  app.post('/own', { ...marked, handlerTimeout: 10_000 }, async () => { await over.promise })
  await listen(app)
  const answering = outcome(app, delivered(), '/own')
  await holding.promise
  t.throws(() => latest.send('busy'), { code: 'FST_ERR_SEND_INSIDE_ONERR' })
  held.resolve()
  t.equal(await answering, '503 DEADLINE')
  over.resolve()
})

for (const url of ['/webhooks/openai', '/own']) {
  t.test(`a handlerTimeout that is over while an async onError hook holds the deadline's refusal changes nothing: ${url}`, async t => {
    const [started, holding, held, over] = [deferred(), deferred(), deferred(), deferred()]
    const app = await build(t, { deadline: 10 }, { handlerTimeout: 20 } as FastifyServerOptions)
    app.addHook('onError', async () => {
      holding.resolve()
      await held.promise
    })
    const handler = async (): Promise<void> => {
      started.resolve()
      await over.promise
    }
    app.openaiWebhook.on('batch.failed', handler)
    app.post('/own', marked, handler)
    await app.ready()
    const clock = stoppedClock(t)
    const answering = outcome(app, delivered(), url)
    await started.promise
    clock.advance(10)
    await holding.promise
    clock.advance(10)
    held.resolve()
    t.equal(await answering, '503 DEADLINE')
    over.resolve()
  })
}

t.test('a hook that answers while the own handler runs, which throws', async t => {
  const { app, interrupt } = await interrupted(t)
  const end = deferred()
  const start = deferred()
  let runs = 0
  app.post('/own', marked, async () => {
    if (runs++ > 0) return
    start.resolve()
    await end.promise
    throw new Error('disk full')
  })
  const delivery = await interrupt(start.promise, 503)
  end.resolve()
  await new Promise(resolve => setImmediate(resolve))
  t.equal((await post(app, redelivered(delivery), '/own')).body, '{"received":true}')
  t.equal(runs, 2)
})

for (const status of [503, 200]) {
  t.test(`a hook that answers ${status} while event handlers run: how the own handler ends after that counts`, async t => {
    const { app, interrupt } = await interrupted(t)
    const end = deferred()
    const start = deferred()
    const ended = deferred()
    let runs = 0
    app.post('/own', { config: { openaiWebhook: { on: { 'batch.*': async () => { start.resolve(); await end.promise } } } } }, async () => {
      runs++
      setImmediate(ended.resolve)
      return { ok: true }
    })
    const delivery = await interrupt(start.promise, status)
    end.resolve()
    await ended.promise
    t.equal((await post(app, redelivered(delivery), '/own')).body, '{"received":true,"duplicate":true}')
    t.equal(runs, 1)
  })
}

t.test('an own handler that asks whether the reply was sent, which a hook has answered before: it has not replied itself', async t => {
  const { app, interrupt } = await interrupted(t)
  const end = deferred()
  const start = deferred()
  const ended = deferred()
  app.post('/own', { config: { openaiWebhook: { on: { 'batch.*': async () => { start.resolve(); await end.promise } } } } }, (_request, reply) => {
    setImmediate(ended.resolve)
    return reply.sent ? reply : reply.send('ok')
  })
  const delivery = await interrupt(start.promise, 503)
  end.resolve()
  await ended.promise
  t.equal((await post(app, redelivered(delivery), '/own')).body, '{"received":true,"duplicate":true}')
})

t.test('an onSend hook that fails on a failure which the own handler sends, and that runs on: a retry does not run it beside itself', async t => {
  const { app, log } = await interrupted(t)
  app.addHook('onSend', async ({ headers }) => { if (headers['x-fails'] !== undefined) throw new Error('no') })
  const end = deferred()
  let runs = 0
  app.post('/own', marked, async (_request, reply) => {
    if (runs++ > 0) return
    await Promise.resolve()
    reply.code(503).send('busy')
    await end.promise
  })
  const delivery = delivered()
  t.ok((await post(app, { ...delivery, headers: { ...delivery.headers, 'x-fails': 'yes' } }, '/own')).statusCode >= 400)
  const second = post(app, redelivered(delivery), '/own')
  while (!log.lines.some(({ state }) => state === 'joined')) await new Promise(resolve => setImmediate(resolve))
  end.resolve()
  t.ok((await second).statusCode >= 400)
  t.equal(runs, 1)
  t.equal((await post(app, redelivered(delivery), '/own')).body, '{"received":true}')
})

t.test('an injected answer that the handler has written itself, and that is over before the handler is', async t => {
  const app = await build(t)
  let runs = 0
  const ending = (hijacks: boolean) => async (_request: unknown, reply: FastifyReply): Promise<void> => {
    runs++
    if (hijacks) reply.hijack()
    reply.raw.end('ok')
    await new Promise(resolve => setImmediate(resolve))
  }
  app.post('/raw', marked, ending(false))
  app.post('/hijacked', marked, ending(true))
  for (const url of ['/raw', '/hijacked']) {
    runs = 0
    const delivery = delivered()
    t.equal((await post(app, delivery, url)).body, 'ok')
    await new Promise(resolve => setImmediate(resolve))
    t.equal((await post(app, redelivered(delivery), url)).body, '{"received":true,"duplicate":true}', url)
    t.equal(runs, 1)
  }
})

t.test('a serializer of the app that fails on the acknowledgement: an answer, as on a plain route', async t => {
  const log = capturedLog()
  const app = Fastify({ logger: log.logger! }) as FastifyInstance
  t.teardown(() => app.close())
  app.addHook('onRequest', async (_request, reply) => {
    reply.serializer(payload => JSON.stringify(Object.keys((payload as { data: object }).data)))
  })
  await app.register(openaiWebhook, { secret: SECRET })
  let runs = 0
  app.openaiWebhook.onAny(() => { runs++ })
  app.post('/plain', async (_request, reply) => {
    reply.type('application/json; charset=utf-8')
    return '{"received":true}'
  })
  const delivery = delivered()
  const plain = await post(app, delivery, '/plain')
  for (const attempt of ['first', 'retry']) {
    const { statusCode, body } = await post(app, redelivered(delivery))
    t.same([statusCode, body], [plain.statusCode, plain.body], attempt)
  }
  t.equal(plain.statusCode, 500)
  t.equal(runs, 1)
  t.notOk(log.lines.some(({ msg }) => msg === 'the sender of a webhook delivery has another answer'))
})

t.test('a hook that puts a `send` in place which always throws is the app\'s to mend: the process goes on', async t => {
  const log = capturedLog()
  const app = Fastify({ logger: log.logger! }) as FastifyInstance
  t.teardown(() => app.close())
  let last: FastifyReply
  app.addHook('onRequest', async (_request, reply) => {
    last = reply
    const throwing = (): never => { throw new Error('no') }
    reply.send = throwing
  })
  await app.register(openaiWebhook, { secret: SECRET })
  const answering = post(app, delivered())
  answering.catch(() => {})
  while (!log.lines.some(({ msg }) => msg === 'the sender of a webhook delivery has another answer')) await new Promise(resolve => setImmediate(resolve))
  last!.raw.end('by the app')
  t.equal((await answering).body, 'by the app')
})

t.test('a handler that is not async and may reply later is acknowledged, and told of once', async t => {
  const log = capturedLog()
  const app = await build(t, {}, { logger: log.logger })
  app.post('/own', marked, (_request, _reply) => {})
  app.post('/alone', marked, _request => {})
  app.post('/returning', marked, (_request, reply) => {
    setImmediate(() => reply.code(503).send())
    return reply
  })
  app.post('/replying', marked, (_request, reply) => { reply.send('ok') })
  for (const url of ['/own', '/own', '/alone']) t.equal((await post(app, delivered(), url)).body, '{"received":true}')
  t.equal((await post(app, delivered(), '/returning')).statusCode, 503)
  t.equal((await post(app, delivered(), '/replying')).body, 'ok')
  t.match(log.lines.filter(({ level }) => level === 40), [{ url: '/own', msg: /return reply where it replies later$/ }])
  t.equal(log.lines.filter(({ msg }) => String(msg).includes('is not async')).length, 1)
})
