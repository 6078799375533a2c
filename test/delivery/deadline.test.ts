import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { connect } from 'node:http2'
import { text } from 'node:stream/consumers'
import Fastify from 'fastify'
import type { FastifyError, FastifyInstance, FastifyServerOptions } from 'fastify'
import t from 'tap'
import { Deadline } from '../../lib/deadline.ts'
import openaiWebhook, { memoryStore } from '../../lib/index.ts'
import type { OpenAIWebhookOptions } from '../../lib/index.ts'
import { build, post, SECRET, sign, stoppedClock, thin } from '../support/deliveries.ts'
import { capturedLog, deferred, handled, listen, redelivered, watchedStore } from '../support/observe.ts'

const RECEIVED = '{"received":true}'
const DUPLICATE = '{"received":true,"duplicate":true}'

/** Starts a wait; what it returns calls it off. */
function starter (deadline: Deadline): (expired: () => void) => () => void {
  return expired => {
    const timer = deadline.start(expired)
    return () => { deadline.stop(timer) }
  }
}

t.test('waits of one length', async t => {
  t.test('end in the order in which they began, each at its time', async t => {
    const clock = stoppedClock(t)
    const deadline = new Deadline(100)
    const start = starter(deadline)
    const seen: string[] = []
    start(() => { seen.push('first') })
    clock.advance(30)
    start(() => { seen.push('second') })
    start(() => { seen.push('third') })
    clock.advance(69)
    t.same(seen, [])
    clock.advance(1)
    t.same(seen, ['first'])
    clock.advance(29)
    t.same(seen, ['first'])
    clock.advance(1)
    t.same(seen, ['first', 'second', 'third'])
    clock.advance(1_000)
    t.equal(seen.length, 3, 'each once')
  })

  t.test('can be called off', async t => {
    const clock = stoppedClock(t)
    const deadline = new Deadline(100)
    const start = starter(deadline)
    const seen: string[] = []
    const first = start(() => { seen.push('first') })
    clock.advance(50)
    start(() => { seen.push('second') })
    first()
    clock.advance(50)
    t.same(seen, [])
    clock.advance(50)
    t.same(seen, ['second'])
    first()
  })

  t.test('begin anew when all have ended or were called off', async t => {
    const clock = stoppedClock(t)
    const deadline = new Deadline(100)
    const start = starter(deadline)
    const seen: string[] = []
    start(() => { seen.push('called off') })()
    clock.advance(1_000)
    start(() => { seen.push('second') })
    clock.advance(99)
    t.same(seen, [])
    clock.advance(1)
    t.same(seen, ['second'])
  })

  t.test('may begin while another ends', async t => {
    const clock = stoppedClock(t)
    const deadline = new Deadline(100)
    const start = starter(deadline)
    const seen: string[] = []
    start(() => {
      seen.push('first')
      start(() => { seen.push('from the first') })
    })
    clock.advance(10)
    start(() => { seen.push('second') })
    clock.advance(90)
    t.same(seen, ['first'])
    clock.advance(10)
    t.same(seen, ['first', 'second'])
    clock.advance(89)
    t.same(seen, ['first', 'second'])
    clock.advance(1)
    t.same(seen, ['first', 'second', 'from the first'])
  })
})

/** A listening app: its socket keeps the process alive until the deadline, whose timer does not. */
async function watched (t: Parameters<typeof build>[0], options: OpenAIWebhookOptions = {}) {
  const log = capturedLog()
  const store = watchedStore()
  const app = await build(t, { deadline: 20, idempotency: { store: store.store }, ...options }, { logger: log.logger })
  const told: Array<Error & { code?: string }> = []
  app.openaiWebhook.onError(error => { told.push(error) })
  return { app, log, told, ...store }
}

t.test('a handler that still runs at the deadline', async t => {
  t.test('is answered 503, runs on undisturbed, and is found done by the retry', async t => {
    const { app, told, calls, next } = await watched(t)
    const refused = deferred()
    let aborted: boolean | undefined
    app.openaiWebhook.on('batch.failed', async (_event, { signal }) => {
      await refused.promise
      aborted = signal.aborted
    })
    await listen(app)
    const delivery = sign(thin('batch.failed'))
    const { statusCode, headers, body } = await post(app, delivery)

    t.same([statusCode, headers['retry-after']], [503, '5'])
    t.match(JSON.parse(body), { code: 'FST_OPENAI_WEBHOOK_DEADLINE' })
    t.same(told.map(({ code }) => code), ['FST_OPENAI_WEBHOOK_DEADLINE'])
    const completed = next('complete')
    refused.resolve()
    await completed
    t.equal(aborted, false)
    t.equal((await post(app, redelivered(delivery))).body, DUPLICATE)
    t.same(calls, ['begin', 'complete', 'begin'])
    t.equal(told.length, 1)
  })

  t.test('is joined by the retry, which has a deadline of its own', async t => {
    const { app } = await watched(t)
    const { promise, resolve } = deferred()
    const third = handled(app, 3)
    let runs = 0
    app.openaiWebhook.on('batch.failed', async () => {
      runs++
      await promise
    })
    await listen(app)
    const delivery = sign(thin('batch.failed'))

    t.equal((await post(app, delivery)).statusCode, 503)
    t.equal((await post(app, redelivered(delivery))).statusCode, 503)
    const last = post(app, redelivered(delivery))
    await third
    resolve()
    t.equal((await last).body, RECEIVED)
    t.equal(runs, 1)
  })

  t.test('and fails then is told to onError, logged, and runs again', async t => {
    const { app, told, log, next } = await watched(t)
    const refused = deferred()
    let runs = 0
    app.openaiWebhook.on('batch.failed', async () => {
      if (runs++ > 0) return
      await refused.promise
      throw new Error('disk full')
    })
    await listen(app)
    const delivery = sign(thin('batch.failed'))

    t.equal((await post(app, delivery)).statusCode, 503)
    const released = next('release')
    refused.resolve()
    await released
    t.equal((await post(app, redelivered(delivery))).body, RECEIVED)
    t.equal(runs, 2)
    t.same(told.map(({ code }) => code), ['FST_OPENAI_WEBHOOK_DEADLINE', 'FST_OPENAI_WEBHOOK_HANDLER_FAILED'])
    const lines = log.errors().filter(({ err }) => err?.aggregateErrors !== undefined)
    t.match(lines, [{ webhookId: delivery.headers['webhook-id'], eventType: 'batch.failed', err: { aggregateErrors: [{ message: 'disk full' }] } }])
  })

  t.test('has nothing to do with a handler that was in time', async t => {
    const { app, told } = await watched(t)
    app.openaiWebhook.on('batch.failed', async () => {})
    await app.ready()
    const clock = stoppedClock(t)
    t.equal((await post(app, sign(thin('batch.failed')))).body, RECEIVED)
    clock.advance(1_000)
    t.same(told, [])
  })
})

t.test('a secret that is fetched takes its time from the deadline', async t => {
  const app = await build(t, { deadline: 1_000, closeTimeout: 1 })
  const [asked, started] = [deferred(), deferred()]
  const secret = deferred<string>()
  app.openaiWebhook.route({ url: '/of/:tenant', tenant: { of: ({ params }) => (params as { tenant: string }).tenant, secret: async () => { asked.resolve(); return await secret.promise } } })
  app.openaiWebhook.on('batch.failed', async () => {
    started.resolve()
    await new Promise(() => {})
  })
  await app.ready()
  const clock = stoppedClock(t)
  const answer = post(app, sign(thin('batch.failed')), '/of/acme')
  await asked.promise
  clock.advance(700)
  secret.resolve(SECRET)
  await started.promise
  let status = 0
  const answered = answer.then(({ statusCode }) => { status = statusCode })
  clock.advance(299)
  await new Promise(resolve => process.nextTick(resolve))
  t.equal(status, 0)
  clock.advance(1)
  await answered
  t.equal(status, 503)
})

t.test('an injected delivery is answered at the deadline, though nothing else keeps the process alive', async t => {
  const script = `
    import Fastify from 'fastify'
    import openaiWebhook from ${JSON.stringify(new URL('../../lib/index.ts', import.meta.url).href)}
    import { deliver, sampleEvent, testSecret } from ${JSON.stringify(new URL('../../lib/testing/index.ts', import.meta.url).href)}
    const app = Fastify()
    await app.register(openaiWebhook, { secret: testSecret, deadline: 50 })
    app.openaiWebhook.on('batch.failed', async () => { await new Promise(() => {}) })
    const { statusCode } = await deliver(app, sampleEvent('batch.failed'))
    console.log(statusCode)
    process.exit()`
  const child = spawn(process.execPath, ['--import', './test/support/typescript.js', '--input-type=module', '--eval', script], { stdio: ['ignore', 'pipe', 'inherit'] })
  t.equal((await text(child.stdout)).trim(), '503')
})

t.test('a store that has not answered at the deadline', async t => {
  const begun = deferred()
  const { store } = watchedStore()
  const { app, told } = await watched(t, {
    idempotency: {
      store: {
        ...store,
        async begin (...args) {
          await begun.promise
          return await store.begin(...args)
        }
      }
    }
  })
  const handler = deferred()
  let runs = 0
  app.openaiWebhook.on('batch.failed', async () => {
    runs++
    handler.resolve()
  })
  await listen(app)
  const delivery = sign(thin('batch.failed'))
  const { statusCode, headers, body } = await post(app, delivery)

  t.same([statusCode, headers['retry-after']], [503, '5'])
  t.match(JSON.parse(body), { code: 'FST_OPENAI_WEBHOOK_UNAVAILABLE' })
  t.same(told.map(({ code }) => code), ['FST_OPENAI_WEBHOOK_UNAVAILABLE'])
  t.equal(runs, 0)
  begun.resolve()
  await handler.promise
  t.equal((await post(app, redelivered(delivery))).statusCode, 200, 'and then the delivery was processed after all')
  t.equal(runs, 1)
})

t.test('Fastify\'s handlerTimeout', async t => {
  /** Over HTTP/2: over HTTP/1.1 Fastify calls it off when the body has been read. */
  async function over2 (t: { teardown: (fn: () => unknown) => void }, prepare: (app: FastifyInstance) => void, options: OpenAIWebhookOptions = {}, server: FastifyServerOptions = {}): Promise<(delivery: ReturnType<typeof sign>, url?: string) => Promise<number>> {
    const app = Fastify({ ...server, http2: true, handlerTimeout: 200 } as FastifyServerOptions) as FastifyInstance
    t.teardown(() => app.close())
    await app.register(openaiWebhook, { secret: SECRET, ...options })
    prepare(app)
    await listen(app)
    const session = connect(`http://127.0.0.1:${(app.server.address() as { port: number }).port}`)
    t.teardown(() => session.destroy())
    return async ({ headers, body }, url = '/webhooks/openai') => {
      const stream = session.request({ ...headers, ':method': 'POST', ':path': url })
      stream.end(body)
      const [answered] = await once(stream, 'response') as [{ ':status': number }]
      stream.resume()
      return answered[':status']
    }
  }

  t.test('leaves a route\'s own handler running, which the retry joins', async t => {
    const finish = deferred()
    const { store, next } = watchedStore()
    let runs = 0
    const deliver = await over2(t, app => {
      app.post('/own', { config: { openaiWebhook: {} } }, async () => {
        runs++
        await finish.promise
        return { own: true }
      })
    }, { idempotency: { store } })
    const delivery = sign(thin('batch.failed'))
    t.equal(await deliver(delivery, '/own'), 503)
    t.equal(await deliver(redelivered(delivery), '/own'), 503)
    const completed = next('complete')
    finish.resolve()
    await completed
    t.equal(await deliver(redelivered(delivery), '/own'), 200)
    t.equal(runs, 1)
  })

  for (const url of ['/webhooks/openai', '/own']) {
    for (const fails of [false, true]) {
      t.test(`is reported as a refusal, and ${fails ? 'the failure' : 'nothing else'} when the handlers end: ${url}`, async t => {
        const finish = deferred()
        const log = capturedLog()
        const told: string[] = []
        const { store, next } = watchedStore()
        const handler = async (): Promise<void> => {
          await finish.promise
          if (fails) throw new Error('disk full')
        }
        const deliver = await over2(t, app => {
          app.openaiWebhook.on('batch.failed', handler).onError(error => { told.push(`${(error as FastifyError).code}`) })
          app.post('/own', { config: { openaiWebhook: {} } }, handler)
        }, { idempotency: { store }, deadline: 60_000 }, { logger: log.logger })
        t.equal(await deliver(sign(thin('batch.failed')), url), 503)
        t.same(told, ['FST_ERR_HANDLER_TIMEOUT'])
        t.equal(log.lines.filter(({ code }) => code === 'FST_ERR_HANDLER_TIMEOUT').length, 1)
        const recorded = next(fails ? 'release' : 'complete')
        finish.resolve()
        await recorded
        await new Promise(resolve => setImmediate(resolve))
        t.same(told, fails ? ['FST_ERR_HANDLER_TIMEOUT', 'FST_OPENAI_WEBHOOK_HANDLER_FAILED'] : ['FST_ERR_HANDLER_TIMEOUT'])
        t.equal(log.lines.filter(({ err }) => (err as { code?: string } | undefined)?.code === 'FST_ERR_REP_ALREADY_SENT').length, 0)
        t.equal(log.errors().filter(({ err }) => err?.message.endsWith('disk full')).length, fails ? 1 : 0)
      })
    }
  }

  t.test('an error that a hook sends in its place leaves the deadline to be reported', async t => {
    const finish = deferred()
    const reported = deferred()
    const told: string[] = []
    const deliver = await over2(t, app => {
      app.addHook('preHandler', async (_request, reply) => { setTimeout(() => reply.send(Object.assign(new Error('slow'), { statusCode: 504 })), 20) })
      app.openaiWebhook.on('batch.failed', async () => { await finish.promise }).onError(error => {
        told.push(`${(error as FastifyError).code}`)
        reported.resolve()
      })
    }, { deadline: 60 })
    t.equal(await deliver(sign(thin('batch.failed'))), 504)
    await reported.promise
    t.same(told, ['FST_OPENAI_WEBHOOK_DEADLINE'])
    finish.resolve()
  })

  t.test('and then the deadline answers and reports nothing more', async t => {
    const finish = deferred()
    const told: string[] = []
    const late = deferred()
    const log = capturedLog()
    const deliver = await over2(t, app => {
      app.openaiWebhook.on('batch.failed', async () => {
        setTimeout(late.resolve, 300)
        await finish.promise
      }).onError(error => { told.push(`${(error as FastifyError).code}`) })
    }, { deadline: 250 }, { logger: log.logger })
    const delivery = sign(thin('batch.failed'))
    t.equal(await deliver(delivery), 503)
    await late.promise
    t.same(told, ['FST_ERR_HANDLER_TIMEOUT'])
    finish.resolve()
    t.equal(await deliver(redelivered(delivery)), 200)
    t.equal(log.lines.filter(({ err }) => (err as { code?: string } | undefined)?.code === 'FST_ERR_REP_ALREADY_SENT').length, 0)
  })

  t.test('whose answer an onError hook holds while the handlers end does not end the process', async t => {
    const holding = deferred()
    const held = deferred()
    const log = capturedLog()
    const deliver = await over2(t, app => {
      app.addHook('onError', async () => {
        holding.resolve()
        await held.promise
      })
      app.openaiWebhook.on('batch.failed', async () => { await holding.promise })
    }, {
      idempotency: {
        store: {
          ...memoryStore(),
          complete () { setImmediate(held.resolve) }
        }
      }
    }, { logger: log.logger })
    t.equal(await deliver(sign(thin('batch.failed'))), 503)
    t.equal(log.errors().filter(({ msg }) => msg === 'the sender of a webhook delivery has another answer').length, 1)
  })
})
