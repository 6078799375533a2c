import { createServer } from 'node:http'
import Fastify from 'fastify'
import type { FastifyInstance } from 'fastify'
import t from 'tap'
import openaiWebhook, { background, inline, memoryStore } from '../../lib/index.ts'
import type { IdempotencyStore, OpenAIWebhookOptions } from '../../lib/index.ts'
import { SECRET, build, post, sign, stoppedClock, thin } from '../support/deliveries.ts'
import { capturedLog, deferred, dial, head, listen, messageOf, send, watchedStore } from '../support/observe.ts'

t.test('closing waits for what is running, and its sender is answered', async t => {
  const app = await build(t)
  const { promise, resolve } = deferred()
  const started = deferred()
  const order: string[] = []
  app.addHook('onClose', async () => { order.push('what handlers use is closed') })
  app.openaiWebhook.on('batch.failed', async (_event, { signal }) => {
    started.resolve()
    await promise
    order.push(`handler ends, ${signal.aborted ? 'aborted' : 'undisturbed'}`)
  })
  await listen(app)
  const answer = send(app, sign(thin('batch.failed')))
  await started.promise
  const closed = app.close().then(() => { order.push('closed') })
  await new Promise(resolve => setImmediate(resolve))
  t.same(order, [])
  resolve()

  t.match(await answer, /^HTTP\/1\.1 200 OK\r\n[^]*\{"received":true\}$/)
  await closed
  t.same(order, ['handler ends, undisturbed', 'what handlers use is closed', 'closed'])
})

t.test('a delivery whose body arrives while the app is closing is to come again', async t => {
  const closing = deferred()
  const app = await build(t, { runner: { ...inline(), close () { closing.resolve() } } })
  const { promise, resolve } = deferred()
  const started = deferred()
  const admitted = deferred()
  const seen: string[] = []
  app.openaiWebhook.on('batch.failed', async event => {
    seen.push(event.data.id)
    started.resolve()
    await promise
  })
  app.addHook('preParsing', (request, _reply, _payload, done) => {
    if (request.headers['x-late'] !== undefined) admitted.resolve()
    done()
  })
  await listen(app)
  const first = send(app, sign(thin('batch.failed', { id: 'first' })))
  await started.promise
  const late = sign(thin('batch.failed', { id: 'late' }))
  const { socket, received } = await dial(app)
  socket.write(head({ ...late, headers: { ...late.headers, 'x-late': '1' } }))
  await admitted.promise
  const closed = app.close()
  await closing.promise
  socket.write(late.body)

  const answer = await received
  t.match(answer, /^HTTP\/1\.1 503 /)
  t.match(answer, /retry-after: 5\r\n/)
  t.match(answer, /FST_OPENAI_WEBHOOK_OVERLOADED/)
  resolve()
  t.match(await first, /^HTTP\/1\.1 200 /)
  await closed
  t.same(seen, ['first'])
})

t.test('a delivery that comes on a new connection while the app is closing is to come again', async t => {
  const closing = deferred()
  const app = await build(t, { runner: { ...inline(), close () { closing.resolve() } } })
  const { promise, resolve } = deferred()
  const started = deferred()
  let runs = 0
  app.openaiWebhook.on('batch.failed', async () => {
    runs++
    started.resolve()
    await promise
  })
  await listen(app)
  const first = send(app, sign(thin('batch.failed')))
  await started.promise
  const closed = app.close()
  await closing.promise

  t.match(await send(app, sign(thin('batch.failed'))), /^HTTP\/1\.1 503 /)
  resolve()
  t.match(await first, /^HTTP\/1\.1 200 /)
  await closed
  t.equal(runs, 1)
})

t.test('a handler that does not end', async t => {
  t.test('is told so by its signal when closeTimeout is over, and then the app closes', async t => {
    const closing = deferred()
    const app = await build(t, { closeTimeout: 6_000, runner: { ...inline(), close () { closing.resolve() } } })
    const started = deferred()
    const order: string[] = []
    app.addHook('onClose', async () => { order.push('onClose') })
    app.openaiWebhook
      .on('batch.failed', async (_event, { signal }) => {
        started.resolve()
        await new Promise<void>(resolve => signal.addEventListener('abort', () => {
          order.push(`aborted: ${(signal.reason as Error).message}`)
          resolve()
        }))
        order.push('ended')
      })
      .on('batch.failed', () => new Promise(() => {}))
    await app.ready()
    const clock = stoppedClock(t)
    const answer = post(app, sign(thin('batch.failed')))
    await started.promise
    const closed = app.close()
    await closing.promise
    clock.advance(5_999)
    t.same(order, [])
    clock.advance(1)
    await closed
    t.same(order, ['aborted: the app is closing and closeTimeout is over', 'ended', 'onClose'])
    t.equal((await answer).statusCode, 503)
  })

  t.test('does not have close fail by default, where Fastify gives a hook no longer than closeTimeout', async t => {
    const app = await build(t)
    const started = deferred()
    let aborted = false
    app.openaiWebhook.on('batch.failed', async (_event, { signal }) => {
      started.resolve()
      signal.addEventListener('abort', () => { aborted = true })
      await new Promise(() => {})
    })
    await app.ready()
    const clock = stoppedClock(t)
    const answer = post(app, sign(thin('batch.failed')))
    await started.promise
    const closed = messageOf(() => app.close())
    for (let seconds = 0; seconds < 11; seconds++) {
      await new Promise(resolve => setImmediate(resolve))
      clock.advance(1_000)
    }
    t.equal(await closed, '')
    t.equal(aborted, true)
    t.equal((await answer).statusCode, 503)
  })

  t.test('holds the app for closeTimeout, and no longer', async t => {
    const app = await build(t, { closeTimeout: 20, deadline: 10 })
    const never = deferred()
    let signal: AbortSignal | undefined
    app.openaiWebhook.on('batch.failed', async (_event, context) => {
      signal = context.signal
      await never.promise
    })
    await listen(app)
    t.match(await send(app, sign(thin('batch.failed'))), /^HTTP\/1\.1 503 /)
    t.notOk(signal!.aborted)
    await app.close()
    t.ok(signal!.aborted)
  })
})

t.test('a delivery whose store answers once closeTimeout is over is not started', async t => {
  for (const [name, runner, answered] of [['inline', inline(), 503], ['background', background(), 200], ['the route\'s own handler', inline(), 503]] as const) {
    const asked = deferred()
    const granted = deferred()
    const memory = memoryStore()
    let begins = 0
    const released: string[] = []
    const store: IdempotencyStore = {
      ...memory,
      async begin (key, lease) {
        // With background(), the first claim is that of the request, and the second one that of the handlers.
        if (++begins === (name === 'background' ? 2 : 1)) {
          asked.resolve()
          await granted.promise
        }
        return await memory.begin(key, lease)
      },
      async release (key, token) {
        released.push(key)
        await memory.release(key, token)
      }
    }
    const app = await build(t, { runner, closeTimeout: 20, idempotency: { store } })
    const told: string[] = []
    const over = deferred()
    app.openaiWebhook.on('batch.failed', () => { told.push('started') })
    app.openaiWebhook.onDead(({ attempts }) => {
      told.push(`dead, ${attempts} attempts`)
      over.resolve()
    })
    app.openaiWebhook.route({ url: '/own', handler: async () => { told.push('own handler started') } })
    const answer = post(app, sign(thin('batch.failed')), name === 'the route\'s own handler' ? '/own' : '/webhooks/openai')
    await asked.promise
    await app.close()
    const releasedBefore = released.length
    granted.resolve()
    t.equal((await answer).statusCode, answered, name)
    if (name === 'background') await over.promise
    t.same(told, name === 'background' ? ['dead, 0 attempts'] : [], name)
    t.equal(released.length, releasedBefore + 1, 'another process may claim it at once')
  }
})

t.test('a delivery that waits for a claim of others when closeTimeout is over asks the store no more', async t => {
  const memory = memoryStore()
  let begins = 0
  const asked = deferred()
  const store: IdempotencyStore = {
    ...memory,
    begin (key, lease) {
      if (++begins === 1) return memory.begin(key, lease)
      asked.resolve()
      return { state: 'running' }
    }
  }
  const app = await build(t, { runner: background(), closeTimeout: 1, idempotency: { store } })
  const over = deferred<number>()
  app.openaiWebhook.on('batch.failed', () => {}).onDead(({ attempts }) => { over.resolve(attempts) })
  t.equal((await post(app, sign(thin('batch.failed')))).statusCode, 200)
  await asked.promise
  await app.close()
  t.equal(await over.promise, 0)
  // It would ask eight times. A process that stalls may ask once more before it closes.
  t.ok(begins <= 3, `${begins} times`)
})

t.test('an app that is closed while it becomes ready starts no runner that it would not close', async t => {
  for (const [name, begin] of Object.entries<(app: FastifyInstance) => PromiseLike<unknown>>({
    ready: app => app.ready(),
    listen: app => app.listen({ port: 0, host: '127.0.0.1' }),
    inject: app => app.inject('/')
  })) {
    const calls: string[] = []
    const app = await build(t, { runner: { ...inline(), start () { calls.push('start') }, close () { calls.push('close') } } })
    const begun = Promise.allSettled([begin(app)])
    await app.close()
    await begun
    app.server.close() // Fastify may still have begun to listen
    t.not(calls.at(-1), 'start', name)
  }
})

t.test('any number of handlers may wait for the signal, without a warning of Node', async t => {
  const warnings: unknown[] = []
  const warned = (warning: Error): void => { warnings.push(warning.name) }
  process.on('warning', warned)
  t.teardown(() => process.off('warning', warned))
  const app = await build(t, { closeTimeout: 1 })
  let waiting = 0
  const all = deferred()
  app.openaiWebhook.on('batch.failed', async (_event, { signal }) => await new Promise<void>(resolve => {
    signal.addEventListener('abort', () => { resolve() })
    if (++waiting === 20) all.resolve()
  }))
  const answers = Array.from({ length: 20 }, async (_, n) => await post(app, sign(thin('batch.failed'), { webhookId: `wh_${n}` })))
  await all.promise
  await app.close()
  await Promise.all(answers)
  await new Promise(resolve => setImmediate(resolve)) // a warning is emitted in a turn of its own
  t.same(warnings, [])
})

t.test('a runner that cannot close is reported, and the app closes', async t => {
  const log = capturedLog()
  const app = await build(t, { runner: { ...inline(), close: async () => { throw new Error('the queue is gone') } } }, { logger: log.logger })
  const told: string[] = []
  app.openaiWebhook.onError(({ message }) => { told.push(message) })
  await app.ready()
  await app.close()
  t.same(told, ['the queue is gone'])
  t.ok(log.errors().some(({ err }) => err?.message === 'the queue is gone'))
})

for (const [how, close] of Object.entries({
  rejects: async () => { throw new Error('the queue is gone') },
  throws: () => { throw new Error('the queue is gone') }
})) {
  t.test(`handlers are waited for even though the runner ${how} in close`, async t => {
    const app = await build(t, { runner: { ...inline(), close } })
    const order: string[] = []
    const { promise, resolve } = deferred()
    const started = deferred()
    app.addHook('onClose', async () => { order.push('onClose') })
    app.openaiWebhook
      .onError(({ message }) => { order.push(message) })
      .on('batch.failed', async () => {
        started.resolve()
        await promise
        order.push('handler ends')
      })
    await app.ready()
    const answer = post(app, sign(thin('batch.failed')))
    await started.promise
    const closed = messageOf(() => app.close())
    for (let turn = 0; turn < 5; turn++) await new Promise(resolve => setImmediate(resolve))
    resolve()
    t.equal((await answer).statusCode, 200)
    t.equal(await closed, '')
    t.same(order, ['the queue is gone', 'handler ends', 'onClose'])
  })
}

t.test('several registrations in one app close at the same time, and none takes a delivery once one of them closes', async t => {
  const app = Fastify({ pluginTimeout: 60_000, return503OnClosing: false })
  t.teardown(async () => await app.close())
  const [closing, begun] = [deferred(), deferred()]
  const aborted: string[] = []
  let runs = 0
  for (const prefix of ['/a', '/b']) {
    await app.register(async scope => {
      await scope.register(openaiWebhook, { secret: SECRET, prefix, closeTimeout: 1_000, runner: { ...inline(), close () { if (prefix === '/a') closing.resolve() } } })
      scope.openaiWebhook.on('batch.failed', async (_event, { signal }) => {
        if (++runs === 2) begun.resolve()
        await new Promise(resolve => { signal.addEventListener('abort', resolve) })
        aborted.push(prefix)
      })
    })
  }
  await listen(app)
  const clock = stoppedClock(t)
  const answers = ['/a', '/b'].map(async prefix => await send(app, sign(thin('batch.failed')), `${prefix}/webhooks/openai`))
  await begun.promise
  const closed = app.close()
  await closing.promise
  t.match(await send(app, sign(thin('batch.failed')), '/b/webhooks/openai'), /^HTTP\/1\.1 503 [^]*OVERLOADED/)
  clock.advance(1_000)
  await closed
  t.same(aborted, ['/a', '/b'])
  for (const answer of answers) t.match(await answer, /^HTTP\/1\.1 200 /)
  t.equal(runs, 2)
})

t.test('an app that closes leaves another app on the same server open, as after a restart', async t => {
  const server = createServer()
  const make = async (): Promise<FastifyInstance> => {
    const app = Fastify({ serverFactory: () => server })
    await app.register(openaiWebhook, { secret: SECRET })
    await app.ready()
    return app
  }
  const [first, second] = [await make(), await make()]
  t.teardown(async () => await second.close())
  await first.close()
  t.equal((await post(second, sign(thin('batch.failed')))).statusCode, 200)
})

t.test('closing twice, or before the app was ready, is fine', async t => {
  const app = await build(t)
  await Promise.all([app.close(), app.close()])
  t.equal(app.server.listening, false)
})

t.test('claims are renewed while a handler runs longer than the lease', async t => {
  /** An app with a lease of 3 s whose handler runs until `end` is called, on a stopped clock. */
  async function running (t: Parameters<typeof build>[0], extend?: IdempotencyStore['extend'], options: OpenAIWebhookOptions = {}) {
    const { store, calls, next } = watchedStore()
    const log = capturedLog()
    const app = await build(t, {
      idempotency: { lease: 3_000, store: extend === undefined ? store : { ...store, extend } }, deadline: 60_000, ...options
    }, { logger: log.logger })
    const { promise, resolve: end } = deferred()
    const started = deferred()
    const told: Error[] = []
    app.openaiWebhook.onError(error => { told.push(error) })
    const handler = async (): Promise<void> => {
      started.resolve()
      await promise
    }
    app.openaiWebhook.on('batch.failed', handler).on('batch.expired', async () => {
      await handler()
      throw new Error('disk full')
    })
    app.post('/own', { config: { openaiWebhook: {} } }, handler)
    await app.ready()
    const clock = stoppedClock(t)
    return {
      app,
      calls,
      told,
      log,
      end,
      next,
      async begin (url?: string, type = 'batch.failed') {
        const answer = post(app, sign(thin(type)), url).then(({ statusCode }) => statusCode)
        await started.promise
        return { answer }
      },
      /** Lets the clock go on, and what it set off come to its end. */
      async pass (ms: number) {
        clock.advance(ms)
        await new Promise(resolve => setImmediate(resolve))
      }
    }
  }

  for (const url of ['/webhooks/openai', '/own']) {
    t.test(`at ${url}`, async t => {
      const { begin, pass, calls, end, told } = await running(t)
      const { answer } = await begin(url)
      await pass(999)
      t.same(calls, ['begin'])
      await pass(1)
      await pass(1_000)
      await pass(1_000)
      t.same(calls, ['begin', 'extend', 'extend', 'extend'])
      end()
      t.equal(await answer, 200)
      t.same(calls.splice(0), ['begin', 'extend', 'extend', 'extend', 'complete'])
      t.same(told, [])
    })
  }

  t.test('and one that was lost is reported once, and renewed no more', async t => {
    let asked = 0
    const { begin, pass, told, log, end } = await running(t, async () => ++asked === 1)
    const { answer } = await begin()
    await pass(1_000)
    t.same([asked, told], [1, []])
    await pass(1_000)
    await pass(1_000)
    t.equal(asked, 2)
    t.equal(told.length, 1)
    t.match(told[0]!.message, /^the claim on .* was lost: its lease of 3000 ms ran out/)
    t.equal(log.errors().filter(({ err }) => err?.message === told[0]!.message).length, 1)
    end()
    t.equal(await answer, 200)
  })

  t.test('and one that could not be renewed is renewed once the store is back, unless its handler has ended', async t => {
    let asked = 0
    let isDown = true
    const { begin, pass, calls, end, told } = await running(t, async () => {
      asked++
      if (isDown) throw new Error('ECONNREFUSED')
      return true
    })
    const { answer } = await begin()
    await pass(1_000)
    isDown = false
    await pass(299)
    t.equal(asked, 1)
    await pass(1)
    t.equal(asked, 2)
    await pass(600)
    t.equal(asked, 2)
    isDown = true
    await pass(100)
    t.equal(asked, 3)
    for (let ms = 0; ms < 9_000; ms += 100) await pass(100)
    t.ok(asked <= 3 + 3 * 13, `at most 13 times a lease, whatever the rounds between: ${asked}`)
    end()
    t.equal(await answer, 200)
    const before = asked
    await pass(1_000)
    t.equal(asked, before)
    t.same(calls, ['begin', 'complete'])
    t.same(new Set(told.map(({ message }) => message)), new Set(['ECONNREFUSED']))
    t.equal(told.length, 11, 'one for each round of renewals')
  })

  for (const [how, extend] of Object.entries({
    rejects: async () => { throw new Error('ECONNREFUSED') },
    throws: () => { throw new Error('ECONNREFUSED') }
  })) {
    t.test(`and a store that ${how} in extend is reported, once for all of them, and asked again`, async t => {
      let asked = 0
      const { begin, pass, calls, told, end } = await running(t, () => {
        asked++
        return extend()
      })
      const { answer } = await begin()
      const other = await begin()
      while (calls.length < 2) await pass(0)
      await pass(1_000)
      t.equal(asked, 2)
      for (const ms of [300, 300, 300]) await pass(ms)
      t.equal(asked, 8, 'a tenth of the lease later, because others may take the deliveries once it is over')
      t.same(told.map(({ message }) => message), ['ECONNREFUSED'])
      await pass(100)
      t.equal(asked, 10)
      t.same(told.map(({ message }) => message), ['ECONNREFUSED', 'ECONNREFUSED'])
      end()
      t.same(await Promise.all([answer, other.answer]), [200, 200])
    })
  }

  t.test('but not once the event handlers have ended', async t => {
    for (const [type, status, last] of [['batch.failed', 200, 'complete'], ['batch.expired', 500, 'release']] as const) {
      t.test(type, async t => {
        const { begin, pass, calls, told, end } = await running(t)
        const { answer } = await begin('/webhooks/openai', type)
        end()
        t.equal(await answer, status)
        told.length = 0
        await pass(10_000)
        t.same([calls, told], [['begin', last], []])
      })
    }
  })

  t.test('but not once its own handler has replied', async t => {
    const { begin, pass, calls, told, end } = await running(t)
    const { answer } = await begin('/own')
    end()
    t.equal(await answer, 200)
    await pass(10_000)
    t.same([calls, told], [['begin', 'complete'], []])
  })
})
