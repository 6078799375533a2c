import { Readable } from 'node:stream'
import type { FastifyInstance, FastifyReply, RouteHandlerMethod } from 'fastify'
import t from 'tap'
import { memoryStore } from '../../lib/index.ts'
import type { IdempotencyStore } from '../../lib/index.ts'
import { build, outcome, post, sign, stoppedClock, thin } from '../support/deliveries.ts'
import type { Signed } from '../support/deliveries.ts'
import { deferred, dialWith, listen, redelivered, send, watchedStore } from '../support/observe.ts'

// Whether a route's own handler has succeeded, where that is not plain.

const DUPLICATE = '200 {"received":true,"duplicate":true}'
const marked = { config: { openaiWebhook: {} } }

const tick = (): Promise<void> => new Promise(resolve => setImmediate(resolve))

type Tap = Parameters<typeof build>[0] & Pick<typeof t, 'equal'>

/** A store whose answers come later. @param until what it waits for before it records how a delivery has ended */
function asyncStore (until = async (): Promise<void> => {}): IdempotencyStore {
  const store = memoryStore()
  return {
    begin: async (...args) => store.begin(...args),
    checkpoint: async (...args) => store.checkpoint(...args),
    async complete (...args) {
      await until()
      return store.complete(...args)
    },
    extend: async (...args) => store.extend(...args),
    async release (...args) {
      await until()
      store.release(...args)
    }
  }
}

/** A connection that several requests share: it calls back in its own async context. */
function connection (t: Tap): (callback: () => void) => void {
  const waiting: Array<() => void> = []
  const timer = setInterval(() => { for (const callback of waiting.splice(0)) callback() }, 1)
  t.teardown(() => { clearInterval(timer) })
  return callback => { waiting.push(callback) }
}

t.test('a route\'s own handler that ends after the deadline is judged by what it replies', async t => {
  /** Delivers to a handler that replies once the sender has been refused, and waits until that is recorded. */
  async function overdue (t: Tap, before: (reply: FastifyReply) => void, ending: RouteHandlerMethod): Promise<() => Promise<string>> {
    const refused = deferred()
    const { store, next } = watchedStore()
    const app = await build(t, { idempotency: { store }, deadline: 20 })
    let first = true
    app.post('/own', marked, async function (request, reply) {
      if (!first) return { again: true }
      first = false
      before(reply)
      await refused.promise
      return await ending.call(this, request, reply)
    })
    await listen(app) // its socket keeps the process alive until the deadline, whose timer does not
    const delivery = sign(thin('batch.failed'))
    t.equal(await outcome(app, delivery, '/own'), '503 DEADLINE')
    const recorded = Promise.race([next('complete'), next('release')])
    refused.resolve()
    await recorded
    return async () => await outcome(app, redelivered(delivery), '/own')
  }
  const nothing = (): void => {}
  const failed = (reply: FastifyReply): void => { reply.code(500) }

  const failures: Record<string, [(reply: FastifyReply) => void, RouteHandlerMethod]> = {
    'sends a status that is not 2xx': [nothing, async (_request, reply) => reply.code(500).send('no')],
    'sends with such a status from before': [failed, async (_request, reply) => reply.send('no')],
    'returns a body with such a status from before': [failed, async () => 'no'],
    'says so by status()': [nothing, async (_request, reply) => { reply.status(422).send() }],
    redirects: [nothing, async (_request, reply) => reply.redirect('/elsewhere')],
    'sends an error': [nothing, async (_request, reply) => reply.send(new Error('disk full'))],
    'returns an error': [nothing, async () => new Error('disk full')],
    'returns nothing with such a status from before': [failed, async () => {}],
    'returns a Response that is not 2xx': [nothing, async () => new Response('no', { status: 500 })]
  }
  for (const [name, [before, ending]] of Object.entries(failures)) {
    t.test(`and ${name} runs again`, async t => {
      const retry = await overdue(t, before, ending)
      t.equal(await retry(), '200 {"again":true}')
    })
  }

  const successes: Record<string, [(reply: FastifyReply) => void, RouteHandlerMethod]> = {
    'sends a 2xx of its own': [nothing, async (_request, reply) => reply.code(201).send('yes')],
    'takes a failure back': [failed, async (_request, reply) => reply.code(200).send('yes')],
    'returns a Response': [nothing, async () => new Response('yes')],
    'returns nothing': [nothing, async () => {}]
  }
  for (const [name, [before, ending]] of Object.entries(successes)) {
    t.test(`and ${name} does not run again`, async t => {
      const retry = await overdue(t, before, ending)
      t.equal(await retry(), DUPLICATE)
    })
  }
})

t.test('one that answers twice is judged by its first answer, which is the one that is sent, as a plain route\'s', async t => {
  type Act = (reply: FastifyReply) => unknown
  const firsts: Record<string, Act> = {
    'a failure': reply => { reply.code(422).send('first') },
    'an error': reply => { reply.send(new Error('first')) },
    'a success': reply => { reply.code(201).send('first') }
  }
  const seconds: Record<string, Act> = {
    'a success': reply => { reply.code(200).send('second') },
    'a success without a status': reply => { reply.send('second') },
    'a failure': reply => { reply.code(500).send('second') },
    'a status': reply => { reply.code(200) },
    'a status that it assigns': reply => { reply.statusCode = 500 },
    'what sent allows': reply => { if (!reply.sent) reply.code(503).send('second') },
    'a stream': reply => { reply.send(Readable.from(['second'])) },
    'the end of the raw response': reply => { reply.raw.end() }
  }
  const handlers: Record<string, (first: Act, second: Act, ended: () => void) => RouteHandlerMethod> = {
    'a sync one': (first, second, ended) => (_request, reply) => {
      first(reply)
      second(reply)
      ended()
    },
    'an async one': (first, second, ended) => async (_request, reply) => {
      first(reply)
      second(reply)
      ended()
    },
    'an async one, after waiting': (first, second, ended) => async (_request, reply) => {
      await tick()
      first(reply)
      second(reply)
      ended()
    },
    'an async one, the second time after waiting': (first, second, ended) => async (_request, reply) => {
      first(reply)
      await tick()
      second(reply)
      ended()
    },
    'a sync one, later': (first, second, ended) => (_request, reply) => {
      setImmediate(() => {
        first(reply)
        setImmediate(() => {
          second(reply)
          ended()
        })
      })
      return reply
    }
  }
  const cases = Object.entries(handlers).flatMap(([kind, handlerOf]) => Object.entries(firsts).flatMap(([one, first]) => (
    Object.entries(seconds).map(([other, second]) => ({ name: `${kind}: ${one}, then ${other}`, isRaw: other === 'the end of the raw response', handler: handlerOf(first, second, () => ended.resolve()) })))))
  let ended: ReturnType<typeof deferred<void>>
  for (const isLater of [false, true]) {
    const app = await build(t, { idempotency: { store: isLater ? asyncStore(() => ended.promise) : memoryStore() } })
    const runs = cases.map(() => 0)
    for (const [nth, { handler }] of cases.entries()) {
      app.post(`/own/${nth}`, marked, function (request, reply) { return ++runs[nth]! === 1 ? handler.call(this, request, reply) : 'again' })
      app.post(`/plain/${nth}`, handler)
    }
    for (const [nth, { name, isRaw }] of cases.entries()) {
      ended = deferred()
      const delivery = sign(thin('batch.failed'))
      const plain = await app.inject({ method: 'POST', url: `/plain/${nth}` })
      ended = deferred()
      const own = await post(app, delivery, `/own/${nth}`)
      const message = `${name}${isLater ? ', with a store that answers later' : ''}`
      t.equal(own.statusCode, plain.statusCode, message)
      if (!isRaw) t.equal(own.body, plain.body, message)
      t.equal(await outcome(app, redelivered(delivery), `/own/${nth}`), plain.statusCode === 201 ? DUPLICATE : '200 again', message)
    }
  }
})

t.test('one that answers twice and is answered 2xx has succeeded, whatever it answers with and whoever holds the answer', async t => {
  const firsts: Record<string, (reply: FastifyReply) => void> = {
    'a failure': reply => { reply.code(422).send({ first: true }) },
    'a failure as a stream': reply => { reply.code(422).send(Readable.from(['first'])) },
    'a Response that is a failure': reply => { reply.send(new Response('first', { status: 422 })) },
    'a success': reply => { reply.code(201).send({ first: true }) }
  }
  const seconds: Record<string, (reply: FastifyReply) => void> = {
    'a success': reply => { reply.code(200).send('second') },
    'a failure': reply => { reply.code(500).send('second') },
    'a status': reply => { reply.code(200) }
  }
  const replies: Record<string, (reply: FastifyReply) => FastifyReply> = { 'with its reply': reply => reply, 'with a reply that a hook kept': reply => kept.get(reply.request)! }
  const kept = new WeakMap<object, FastifyReply>()
  const holds: Record<string, (app: FastifyInstance) => void> = {
    nobody: () => {},
    'a hook before the record': app => { app.addHook('onSend', async () => { await tick() }) },
    'a hook after the record': app => {
      app.addHook('onRoute', route => { route.onSend = [route.onSend ?? [], async () => { await tick() }].flat() as NonNullable<typeof route.onSend> })
    }
  }
  for (const [who, hold] of Object.entries(holds)) {
    for (const isLater of [false, true]) {
      const base = isLater ? asyncStore(async () => { await tick() }) : memoryStore()
      let recorded = deferred()
      const release: IdempotencyStore['release'] = isLater
        ? async (...args) => {
          await base.release(...args)
          recorded.resolve()
        }
        : (...args) => {
            base.release(...args)
            recorded.resolve()
          }
      const app = await build(t, { idempotency: { store: { ...base, release } } })
      app.addHook('preHandler', async (request, reply) => { kept.set(request, reply) })
      hold(app)
      const cases: Array<{ name: string, url: string, isFirst: boolean, expected: number }> = []
      for (const [whose, replyOf] of Object.entries(replies)) {
        for (const [one, first] of Object.entries(firsts)) {
          for (const [other, second] of Object.entries(seconds)) {
            for (const isSync of [true, false]) {
              const url = `/own/${cases.length}`
              let runs = 0
              const act = (reply: FastifyReply): void => {
                first(replyOf(reply))
                second(replyOf(reply))
              }
              app.post(url, marked, isSync
                ? (_request, reply) => {
                    if (++runs > 1) return 'again'
                    act(reply)
                  }
                : async (_request, reply) => {
                  if (++runs > 1) return 'again'
                  act(reply)
                  await tick()
                })
              // Before hooks of the app are over, nothing is recorded, and Fastify decides.
              const isFirst = who !== 'a hook before the record' && whose === 'with its reply'
              cases.push({ name: `${isSync ? 'sync' : 'async'}, ${whose}: ${one}, then ${other}, held by ${who}${isLater ? ' and the store' : ''}`, url, isFirst, expected: one === 'a success' ? 201 : 422 })
            }
          }
        }
      }
      for (const { name, url, isFirst, expected } of cases) {
        const delivery = sign(thin('batch.failed'))
        recorded = deferred()
        const { statusCode } = await post(app, delivery, url)
        if (isFirst) t.equal(statusCode, expected, name)
        // A second answer that overtakes a success may be a failure. The delivery is a success all the same.
        if (statusCode < 300) t.equal(await outcome(app, redelivered(delivery), url), DUPLICATE, name)
        if (!isFirst || statusCode < 300) continue
        await recorded.promise
        await tick()
        t.equal(await outcome(app, redelivered(delivery), url), '200 again', name)
      }
    }
  }
})

t.test('one that has succeeded does not run again if Fastify\'s handlerTimeout is over while a hook of the app holds its answer', async t => {
  for (const isSync of [true, false]) {
    await t.test(isSync ? 'sync' : 'async', async t => {
      const [holding, timedOut] = [deferred(), deferred()]
      const app = await build(t)
      app.addHook('onSend', async request => {
        if (request.url !== '/own' || runs > 1) return
        holding.resolve()
        await timedOut.promise
      })
      let runs = 0
      app.post('/own', { ...marked, handlerTimeout: 20 }, isSync
        ? (_request, reply) => {
            runs++
            reply.send('own')
          }
        : async () => {
          runs++
          return 'own'
        })
      await app.ready()
      const clock = stoppedClock(t)
      const delivery = sign(thin('batch.failed'))
      const answering = outcome(app, delivery, '/own')
      await holding.promise
      clock.advance(20)
      timedOut.resolve()
      await answering
      t.equal(await outcome(app, redelivered(delivery), '/own'), DUPLICATE)
      t.equal(runs, 1)
    })
  }
})

t.test('an async one that sends a failure at once and goes on does not run beside itself', async t => {
  const failures: Record<string, (reply: FastifyReply) => void> = {
    'a status': reply => { reply.code(500).send('no') },
    'an error': reply => { reply.send(new Error('no')) },
    'no route': reply => { reply.callNotFound() }
  }
  for (const [name, fail] of Object.entries(failures)) {
    for (const isLater of [false, true]) {
      const cleaned = deferred()
      const app = await build(t, { idempotency: { store: isLater ? asyncStore() : memoryStore() } })
      let running = 0
      let most = 0
      app.post('/own', marked, async (_request, reply) => {
        most = Math.max(most, ++running)
        fail(reply)
        await cleaned.promise
        running--
      })
      const delivery = sign(thin('batch.failed'))
      t.not((await post(app, delivery, '/own')).statusCode, 200)
      const retry = post(app, redelivered(delivery), '/own')
      await tick()
      cleaned.resolve()
      await retry
      await app.close()
      t.equal(most, 1, name)
    }
  }
})

t.test('an async one that returns or awaits the reply, and replies later, has not ended before that', async t => {
  const waits: Record<string, (reply: FastifyReply) => Promise<unknown>> = {
    'returns it': async reply => reply,
    'awaits it': async reply => { await reply }
  }
  const endings: Record<string, [string, (reply: FastifyReply) => void]> = {
    'in success': [DUPLICATE, reply => { reply.send('own') }],
    'in failure': ['200 again', reply => { reply.code(500).send('disk full') }]
  }
  for (const [waiting, wait] of Object.entries(waits)) {
    for (const [ending, [retried, end]] of Object.entries(endings)) {
      for (const over of ['the refusal', 'a sender that goes away']) {
        t.test(`${waiting}, ${ending}, after ${over}`, async t => {
          const [started, closed, replying, left] = [deferred(), deferred(), deferred(), deferred()]
          const { store, calls, next } = watchedStore()
          const app = await build(t, { idempotency: { store }, ...(over === 'the refusal' && { deadline: 20 }) })
          let runs = 0
          app.post('/own', marked, async (_request, reply) => {
            if (++runs > 1) return 'again'
            reply.raw.once('close', closed.resolve)
            replying.promise.then(() => { end(reply) }, () => {})
            started.resolve()
            try {
              return await wait(reply)
            } finally {
              left.resolve()
            }
          })
          await listen(app)
          const delivery = sign(thin('batch.failed'))
          const { socket } = await dialWith(app, delivery, '/own')
          await started.promise
          if (over !== 'the refusal') socket.destroy()
          await closed.promise
          await new Promise(resolve => setImmediate(resolve))
          t.same(calls, ['begin'], 'nothing is recorded while it runs')
          const recorded = next(retried === DUPLICATE ? 'complete' : 'release')
          replying.resolve()
          await recorded
          await left.promise
          t.equal(await outcome(app, redelivered(delivery), '/own'), retried)
        })
      }
    }
  }
})

t.test('one that starts after the deadline, and replies without a payload', async t => {
  const wait = async (): Promise<void> => { await new Promise(resolve => setImmediate(resolve)) }
  const callback = (end: (reply: FastifyReply) => unknown): RouteHandlerMethod => (_request, reply) => {
    setImmediate(() => { end(reply) })
    return reply
  }
  const endings: Record<string, ['complete' | 'release', RouteHandlerMethod]> = {
    'a callback, 204': ['complete', callback(reply => reply.code(204).send())],
    'a callback, 500': ['release', callback(reply => reply.code(500).send())],
    'a callback, a redirect': ['release', callback(reply => reply.redirect('/elsewhere'))],
    'async, 500': ['release', async (_request, reply) => { await wait(); reply.code(500).send() }],
    'async, 500, awaited': ['release', async (_request, reply) => { await wait(); await reply.code(500).send() }],
    'async, 500, returned': ['release', async (_request, reply) => { await wait(); return reply.code(500).send() }]
  }
  for (const [name, [recorded, handler]] of Object.entries(endings)) {
    t.test(name, async t => {
      const over = deferred()
      const { store, next } = watchedStore()
      const app = await build(t, { idempotency: { store }, deadline: 20 })
      app.openaiWebhook.route({ url: '/own', on: { 'batch.failed': async () => await over.promise }, handler })
      await listen(app)
      const settled = next(recorded)
      t.equal(await outcome(app, sign(thin('batch.failed')), '/own'), '503 DEADLINE')
      over.resolve()
      await settled
    })
  }
})

t.test('whatever waits for the reply goes on, once the handler has ended late without replying', async t => {
  for (const isError of [false, true]) {
    const [over, side, cleaned] = [deferred(), deferred(), deferred()]
    const { store, next } = watchedStore()
    const app = await build(t, { idempotency: { store }, deadline: 20 })
    app.setErrorHandler(async (_error, _request, reply) => {
      await reply.code(503).send('refused')
      cleaned.resolve()
    })
    app.post('/own', marked, async (_request, reply) => {
      reply.then(side.resolve, () => {})
      await over.promise
      if (isError) throw new Error('disk full')
      return 'own'
    })
    await listen(app)
    const settled = next(isError ? 'release' : 'complete')
    t.equal(await outcome(app, sign(thin('batch.failed')), '/own'), '503 refused')
    await cleaned.promise // it does not wait for the handler
    over.resolve()
    await settled
    await side.promise
  }
})

t.test('an async one that returns the reply, and hijacks it when the response is over, has ended', async t => {
  for (const end of ['the refusal', 'a sender that goes away']) {
    t.test(end, async t => {
      const [started, closed] = [deferred(), deferred()]
      const { store, next } = watchedStore()
      const app = await build(t, { idempotency: { store }, ...(end === 'the refusal' && { deadline: 20 }) })
      let runs = 0
      app.post('/own', marked, async (_request, reply) => {
        runs++
        reply.raw.once('close', () => {
          setImmediate(() => {
            reply.hijack()
            reply.raw.end()
            closed.resolve()
          })
        })
        started.resolve()
        return reply
      })
      await listen(app)
      const delivery = sign(thin('batch.failed'))
      const completed = next('complete')
      const { socket } = await dialWith(app, delivery, '/own')
      await started.promise
      if (end !== 'the refusal') socket.destroy()
      await closed.promise
      await completed
      t.equal(await outcome(app, redelivered(delivery), '/own'), DUPLICATE)
      t.equal(runs, 1)
    })
  }
})

t.test('one that returns the reply, and later hijacks it and writes the answer itself', async t => {
  for (const [status, recorded, retried] of [[202, 'complete', DUPLICATE], [500, 'release', '200 again']] as const) {
    for (const isAsync of [false, true]) {
      const { store, next } = watchedStore()
      const app = await build(t, { idempotency: { store } })
      let runs = 0
      const handler: RouteHandlerMethod = (_request, reply) => {
        if (++runs > 1) return reply.send('again')
        setImmediate(() => {
          reply.hijack()
          reply.raw.writeHead(status).end('own')
        })
        return reply
      }
      app.post('/own', marked, isAsync ? async function (...args) { return await handler.apply(this, args) } : handler)
      await listen(app)
      const delivery = sign(thin('batch.failed'))
      const settled = next(recorded)
      t.equal(await outcome(app, delivery, '/own'), `${status} own`)
      await settled
      t.equal(await outcome(app, redelivered(delivery), '/own'), retried)
    }
  }
})

/** An async error handler that holds the refusal. */
function holdRefusal (app: FastifyInstance, held: Promise<void>, holding: () => void): void {
  app.setErrorHandler(async (error: { statusCode?: number }, _request, reply) => {
    holding()
    await held
    return await reply.code(error.statusCode ?? 500).send('refused')
  })
}

t.test('a route\'s own handler that replies while hooks hold the refusal', async t => {
  type Hold = (app: FastifyInstance, held: Promise<void>, holding: () => void) => void
  /** How it holds it, and what the sender is told then. */
  const holds: Record<string, [Hold, string]> = {
    'onError, which lets nobody else reply': [(app, held, holding) => {
      app.addHook('onError', async () => {
        holding()
        await held
      })
    }, '503 DEADLINE'],
    'an async error handler': [holdRefusal, '503 refused']
  }
  for (const [name, [hold, refusal]] of Object.entries(holds)) {
    t.test(name, async t => {
      const held = deferred()
      const holding = deferred()
      const { store, next } = watchedStore()
      const app = await build(t, { idempotency: { store }, deadline: 20 })
      hold(app, held.promise, holding.resolve)
      let runs = 0
      app.post('/own', marked, (_request, reply) => {
        runs++
        holding.promise.then(() => reply.send('own'), () => {}) // a callback: nothing but the reply tells of its end
        return reply
      })
      await listen(app)
      const delivery = sign(thin('batch.failed'))
      const completed = next('complete')
      const answering = outcome(app, delivery, '/own')
      await completed
      held.resolve()
      t.equal(await answering, refusal)
      t.equal(await outcome(app, redelivered(delivery), '/own'), DUPLICATE)
      t.equal(runs, 1)
    })
  }
})

t.test('an async one that replies while an async error handler holds the refusal', async t => {
  const endings: Record<string, [string, (reply: FastifyReply) => unknown]> = {
    'with a 2xx, and returns the reply': [DUPLICATE, reply => reply.send('own')],
    'with a 2xx, and returns nothing': [DUPLICATE, reply => { reply.send('own') }],
    'with a failure': ['200 {"again":true}', reply => reply.code(500).send('no')]
  }
  for (const [name, [retried, ending]] of Object.entries(endings)) {
    t.test(name, async t => {
      const [holding, held, replied] = [deferred(), deferred(), deferred()]
      const { store, next } = watchedStore()
      const app = await build(t, { idempotency: { store }, deadline: 20 })
      holdRefusal(app, held.promise, holding.resolve)
      let runs = 0
      app.post('/own', marked, async (_request, reply) => {
        if (++runs > 1) return { again: true }
        await holding.promise
        setImmediate(replied.resolve)
        return await ending(reply)
      })
      await listen(app)
      const delivery = sign(thin('batch.failed'))
      const recorded = next(retried === DUPLICATE ? 'complete' : 'release')
      const answering = outcome(app, delivery, '/own')
      await replied.promise
      held.resolve()
      t.match(await answering, /^50\d /)
      await recorded
      t.equal(await outcome(app, redelivered(delivery), '/own'), retried)
    })
  }
})

t.test('one that replies while an async onSend hook holds what the error handler, or Fastify\'s, has sent', async t => {
  for (const [status, retried, sends] of [[201, DUPLICATE, true], [422, '200 {"again":true}', true], [201, DUPLICATE, false], [422, '200 {"again":true}', false]] as const) {
    const [holding, held] = [deferred(), deferred()]
    const { store, next } = watchedStore()
    const app = await build(t, { idempotency: { store }, deadline: 20 })
    let isHeld = true
    app.addHook('onSend', async () => {
      holding.resolve()
      if (isHeld) await held.promise
    })
    if (sends) app.setErrorHandler((_error, _request, reply) => { reply.send('refused') })
    let runs = 0
    app.post('/own', marked, (_request, reply) => {
      if (++runs > 1) return { again: true }
      // By a callback: nothing but the reply tells of its end.
      holding.promise.then(() => reply.code(status).send('own'), () => {})
      return reply
    })
    await listen(app)
    const delivery = sign(thin('batch.failed'))
    const recorded = next(status === 201 ? 'complete' : 'release')
    const answering = outcome(app, delivery, '/own')
    await recorded
    isHeld = false
    held.resolve()
    t.equal(await answering, sends ? '503 refused' : '503 DEADLINE')
    t.equal(await outcome(app, redelivered(delivery), '/own'), retried)
  }
})

t.test('error handlers that have lost the async context', async t => {
  t.test('a body, held by a hook, beside the handler\'s reply', async t => {
    const [holding, held] = [deferred(), deferred()]
    const { store, next } = watchedStore()
    const app = await build(t, { idempotency: { store }, deadline: 20 })
    const query = connection(t)
    app.addHook('onSend', async () => {
      holding.resolve()
      await held.promise
    })
    app.setErrorHandler((_error, _request, reply) => { query(() => { reply.send({ error: 'sorry' }) }) })
    let runs = 0
    app.post('/own', marked, (_request, reply) => {
      runs++
      holding.promise.then(() => reply.send('own'), () => {})
      return reply
    })
    await listen(app)
    const delivery = sign(thin('batch.failed'))
    const completed = next('complete')
    const answering = outcome(app, delivery, '/own')
    await completed
    held.resolve()
    t.match(await answering, /^503 /)
    t.equal(await outcome(app, redelivered(delivery), '/own'), DUPLICATE)
    t.equal(runs, 1)
  })

  t.test('another error, and what the next error handler makes of it: the sender is answered, and the handler\'s end counts', async t => {
    const { store, next } = watchedStore()
    const app = await build(t, { idempotency: { store }, deadline: 20 })
    const query = connection(t)
    app.setErrorHandler((_error, _request, reply) => { query(() => { reply.code(500).send({ error: 'sorry' }) }) })
    const over = deferred()
    let runs = 0
    app.post('/own', { ...marked, errorHandler: (_error, _request, reply) => { query(() => { reply.send(new Error('another')) }) } }, async () => {
      if (++runs > 1) return 'again'
      await over.promise
      return 'own'
    })
    await listen(app)
    const delivery = sign(thin('batch.failed'))
    t.match(await outcome(app, delivery, '/own'), /^500 /)
    const completed = next('complete')
    over.resolve()
    await completed
    t.equal(await outcome(app, redelivered(delivery), '/own'), DUPLICATE)
  })
})

t.test('one that starts while an async error handler holds the refusal', async t => {
  for (const [status, retried] of [[200, DUPLICATE], [500, '200 again']] as const) {
    for (const isFirst of [true, false]) {
      const [holding, held, replied, over] = [deferred(), deferred(), deferred(), deferred()]
      const { store, next } = watchedStore()
      const app = await build(t, { idempotency: { store }, deadline: 20 })
      holdRefusal(app, held.promise, holding.resolve)
      let runs = 0
      app.openaiWebhook.route({
        url: '/own',
        on: { 'batch.failed': async () => await over.promise },
        handler (_request, reply) {
          replied.resolve()
          return ++runs > 1 ? reply.send('again') : reply.code(status).send('own')
        }
      })
      await listen(app)
      const delivery = sign(thin('batch.failed'))
      const recorded = next(status === 200 ? 'complete' : 'release')
      const answering = outcome(app, delivery, '/own')
      await holding.promise
      const [sooner, later] = isFirst ? [over, held] : [held, over]
      sooner.resolve()
      await (isFirst ? replied.promise : answering)
      later.resolve()
      t.equal((await answering).slice(0, 2), '50')
      await recorded
      t.equal(await outcome(app, redelivered(delivery), '/own'), retried, `${status}, ${isFirst ? 'before' : 'after'} the refusal`)
    }
  }
})

t.test('whatever the error handler does at the deadline, and Fastify\'s handlerTimeout beside it, the handler\'s end counts', async t => {
  const handlers: Record<string, (app: FastifyInstance, held: Promise<void>) => { errorHandler: () => unknown } | void> = {
    'the route\'s own returns a body': () => ({ errorHandler: () => 'sorry' }),
    'the route\'s own resolves to a body': () => ({ errorHandler: async () => 'sorry' }),
    'the route\'s own throws': () => ({ errorHandler: () => { throw new Error('sorry') } }),
    'it returns a body': app => { app.setErrorHandler(error => ({ error })) },
    'it throws': app => { app.setErrorHandler(() => { throw new Error('sorry') }) },
    'it rejects': app => { app.setErrorHandler(async () => { throw new Error('sorry') }) },
    'an async onError hook holds it': (app, held) => { app.addHook('onError', async () => await held) },
    'it is async, and holds it': (app, held) => { holdRefusal(app, held, () => {}) }
  }
  for (const [name, set] of Object.entries(handlers)) {
    t.test(name, async t => {
      const [held, over] = [deferred(), deferred()]
      const { store, next } = watchedStore()
      const app = await build(t, { idempotency: { store }, deadline: 20 })
      const own = set(app, held.promise)
      const [started, timedOut] = [deferred(), deferred()]
      app.post('/own', { ...marked, ...own, handlerTimeout: 60 }, async request => {
        request.signal.addEventListener('abort', () => { setImmediate(timedOut.resolve) })
        started.resolve()
        await over.promise
        return 'own'
      })
      await listen(app)
      const clock = stoppedClock(t)
      const delivery = sign(thin('batch.failed'))
      const answering = outcome(app, delivery, '/own')
      await started.promise
      clock.advance(20)
      await new Promise(resolve => setImmediate(resolve))
      clock.advance(40)
      if (name.endsWith('holds it')) await timedOut.promise
      held.resolve()
      t.match(await answering, /^50\d /)
      const completed = next('complete')
      over.resolve()
      await completed
      t.equal(await outcome(app, redelivered(delivery), '/own'), DUPLICATE)
    })
  }
})

t.test('Fastify\'s handlerTimeout counts as a deadline, whether or not the app\'s onError hooks fail', async t => {
  const clock = stoppedClock(t)
  for (const fails of [false, true]) {
    const [started, over] = [deferred(), deferred()]
    const { store, next } = watchedStore()
    const app = await build(t, { idempotency: { store } })
    app.addHook('onError', async () => { if (fails) throw new Error('no collector') })
    app.post('/own', { ...marked, handlerTimeout: 10 }, async () => {
      started.resolve()
      await over.promise
      return 'own'
    })
    await listen(app)
    const delivery = sign(thin('batch.failed'))
    const answering = outcome(app, delivery, '/own')
    await started.promise
    clock.advance(10)
    t.match(await answering, /^50\d /)
    const completed = next('complete')
    over.resolve()
    await completed
    t.equal(await outcome(app, redelivered(delivery), '/own'), DUPLICATE)
  }
})

t.test('an error handler that forgets the status, where the async context is lost', async t => {
  const forgetful: Record<string, (app: FastifyInstance, query: ReturnType<typeof connection>) => void> = {
    'by an onSend hook': (app, query) => {
      app.addHook('onSend', (_request, _reply, _payload, done) => { query(done) })
      app.setErrorHandler((_error, _request, reply) => { reply.send({ error: 'sorry' }) })
    },
    'by itself': (app, query) => {
      app.setErrorHandler((_error, _request, reply) => { query(() => { reply.send({ error: 'sorry' }) }) })
    },
    'by itself, and hands the error on': (app, query) => {
      app.setErrorHandler((error, _request, reply) => { query(() => { reply.send(error) }) })
    },
    'by itself, and hands the error on to an async one': (app, query) => {
      app.setErrorHandler(async (_error, _request, reply) => await reply.send({ error: 'sorry' }))
      app.addHook('onRoute', route => {
        // The route's own, before the app's.
        route.errorHandler ??= (error, _request, reply) => { query(() => { reply.send(error) }) }
      })
    },
    'by itself, with 200': (app, query) => {
      app.setErrorHandler((_error, _request, reply) => { query(() => { reply.code(200).send({ error: 'sorry' }) }) })
    }
  }
  for (const [name, forget] of Object.entries(forgetful)) {
    const setUp = async (t: Tap, deadline = 10_000): Promise<{ app: FastifyInstance, answer: (url: string, delivery: Signed) => Promise<number>, state: { runs: number, attempt: () => Promise<void> | void }, next: ReturnType<typeof watchedStore>['next'] }> => {
      const { store, next } = watchedStore()
      const app = await build(t, { idempotency: { store }, deadline })
      forget(app, connection(t))
      const state = { runs: 0, attempt: (): Promise<void> | void => {} }
      const run = async (): Promise<void> => {
        state.runs++
        await state.attempt()
      }
      app.post('/marked', marked, async () => {
        await run()
        return 'own'
      })
      app.openaiWebhook.route({ url: '/route', handler: async () => 'own', on: { 'batch.failed': run } })
      await listen(app)
      return { app, state, next, answer: async (url, delivery) => (await post(app, redelivered(delivery), url)).statusCode }
    }
    for (const url of ['/marked', '/route']) {
      t.test(`${name}: ${url}, a handler that fails is not answered 2xx, and runs again`, async t => {
        const { state, answer } = await setUp(t)
        const delivery = sign(thin('batch.failed'))
        state.attempt = () => { throw new Error('disk full') }
        for (let times = 1; times <= 2; times++) {
          t.equal(await answer(url, delivery), 500)
          t.equal(state.runs, times)
        }
        state.attempt = () => {}
        t.equal(await answer(url, delivery), 200)
        t.equal(state.runs, 3)
      })

      for (const ends of ['fails', 'succeeds'] as const) {
        t.test(`${name}: ${url}, at the deadline, and the handler ${ends} later`, async t => {
          const over = deferred()
          const { state, answer, next } = await setUp(t, 20)
          const delivery = sign(thin('batch.failed'))
          state.attempt = async () => {
            await over.promise
            if (ends === 'fails') throw new Error('disk full')
          }
          t.equal(await answer(url, delivery), 503)
          t.equal(await answer(url, delivery), 503, 'while it runs')
          t.equal(state.runs, 1)
          const recorded = next(ends === 'fails' ? 'release' : 'complete')
          over.resolve()
          await recorded
          state.attempt = () => {}
          t.equal(await answer(url, delivery), 200)
          t.equal(state.runs, ends === 'fails' ? 2 : 1)
        })
      }
    }
  }
})

t.test('a route\'s own handler whose reply turns out to be a failure as it is written', async t => {
  const replies: Record<string, RouteHandlerMethod> = {
    'a body of no type that can be sent': async (_request, reply) => {
      reply.type('text/html')
      return { own: true }
    },
    'a stream that fails': async () => new Readable({ read () { this.destroy(new Error('no upstream')) } }),
    'a Response with a status of its own': async () => new Response('no', { status: 500 })
  }
  for (const [name, reply] of Object.entries(replies)) {
    for (const [kind, store] of [['sync', memoryStore()], ['async', asyncStore()]] as const) {
      t.test(`${name}, ${kind} store: answered 500, and runs again`, async t => {
        const app = await build(t, { idempotency: { store } })
        let runs = 0
        app.post('/own', marked, function (request, ...args) {
          return ++runs === 1 ? reply.call(this, request, ...args) : { again: true }
        })
        await listen(app)
        const delivery = sign(thin('batch.failed'))
        t.match(await send(app, delivery, '/own'), /^HTTP\/1\.1 500 /)
        t.match(await send(app, redelivered(delivery), '/own'), /\{"again":true\}$/)
      })
    }
  }

  t.test('and what succeeds as it is written does not run again', async t => {
    for (const reply of [() => Readable.from(['own']), () => new Response('own')]) {
      const app = await build(t)
      app.post('/own', marked, async () => reply())
      await listen(app)
      const delivery = sign(thin('batch.failed'))
      t.match(await send(app, delivery, '/own'), /^HTTP\/1\.1 200 /)
      t.equal(await outcome(app, redelivered(delivery), '/own'), DUPLICATE)
    }
  })

  t.test('a header that cannot be sent does not end the process', async t => {
    const app = await build(t, { idempotency: { store: asyncStore() } })
    app.post('/own', marked, async (_request, reply) => reply.header('x-own', 'a\nb').send('own'))
    await listen(app)
    t.match(await send(app, sign(thin('batch.failed')), '/own'), /^HTTP\/1\.1 500 /)
  })
})

t.test('what is not an Error fails a route\'s own handler, even with a status', async t => {
  const app = await build(t)
  let runs = 0
  const noError: unknown = { statusCode: 503, message: 'later' }
  app.post('/own', marked, async () => {
    runs++
    throw noError
  })
  const delivery = sign(thin('batch.failed'))
  t.equal(await outcome(app, delivery, '/own'), '500 HANDLER_FAILED')
  t.equal(await outcome(app, redelivered(delivery), '/own'), '500 HANDLER_FAILED')
  t.equal(runs, 2)
})

t.test('a route\'s own handler that writes to the socket', async t => {
  t.test('is not acknowledged into it', async t => {
    const ended = deferred()
    const app = await build(t)
    app.post('/own', marked, async (_request, reply) => {
      reply.raw.writeHead(200)
      reply.raw.write('ow')
      ended.promise.then(() => reply.raw.end('n'), () => {})
    })
    await listen(app)
    const delivery = sign(thin('batch.failed'))
    const answering = send(app, delivery, '/own')
    setImmediate(ended.resolve)
    t.match(await answering, /^HTTP\/1\.1 200 [^]*ow\r\n1\r\nn\r\n/)
    t.equal(await outcome(app, redelivered(delivery), '/own'), DUPLICATE)
  })

  t.test('is not refused into it at the deadline', async t => {
    const written = deferred()
    const over = deferred()
    const app = await build(t, { deadline: 1_000 })
    app.post('/own', marked, async (_request, reply) => {
      reply.raw.writeHead(200)
      reply.raw.write('ow')
      written.resolve()
      await over.promise
      reply.raw.end('n')
    })
    await listen(app)
    const clock = stoppedClock(t)
    const answering = send(app, sign(thin('batch.failed')), '/own')
    await written.promise
    clock.advance(1_000)
    over.resolve()
    t.match(await answering, /^HTTP\/1\.1 200 [^]*ow\r\n1\r\nn\r\n/)
  })
})

t.test('the answer of a route\'s own handler waits for the store, but not beyond the deadline', async t => {
  for (const replied of ['before', 'after']) {
    t.test(`which came ${replied} the store was told`, async t => {
      const told = deferred()
      const held = deferred()
      const sending = deferred()
      const app = await build(t, {
        deadline: 1_000,
        closeTimeout: 0,
        idempotency: {
          store: {
            ...memoryStore(),
            complete () {
              told.resolve()
              return new Promise(() => {})
            }
          }
        }
      })
      app.addHook('onSend', async () => {
        sending.resolve()
        await held.promise
      })
      app.post('/own', marked, async () => 'own')
      await app.ready()
      const clock = stoppedClock(t)
      const answering = outcome(app, sign(thin('batch.failed')), '/own')
      await sending.promise
      if (replied === 'after') {
        held.resolve()
        await told.promise
        clock.advance(1_000)
      } else {
        clock.advance(1_000)
        held.resolve()
      }
      t.equal(await answering, '200 own')
      clock.exit()
    })
  }
})
