import { Readable } from 'node:stream'
import type { FastifyInstance, FastifyReply, FastifyRequest, RouteHandlerMethod } from 'fastify'
import t from 'tap'
import { build, outcome, sign, thin } from '../support/deliveries.ts'
import { deferred, listen, redelivered, watchedStore } from '../support/observe.ts'

// A route's own handler has a reply of its own. Whatever others do with theirs, its end counts, and a refusal stays one.

const DUPLICATE = '200 {"received":true,"duplicate":true}'
const marked = { config: { openaiWebhook: {} } }

type Tap = Parameters<typeof build>[0] & Pick<typeof t, 'equal'>
type Reply = (reply: FastifyReply) => unknown

const tick = async (): Promise<void> => { await new Promise(resolve => setImmediate(resolve)) }

/** A connection that several requests share: it calls back in its own async context. */
function connection (t: Tap): (callback: () => void) => void {
  const waiting: Array<() => void> = []
  const timer = setInterval(() => { for (const callback of waiting.splice(0)) callback() }, 1)
  t.teardown(() => { clearInterval(timer) })
  return callback => { waiting.push(callback) }
}

const ends: Record<string, ['complete' | 'release', string, Reply]> = {
  'in success': ['complete', DUPLICATE, reply => reply.code(201).send('own')],
  'in failure': ['release', '200 again', reply => reply.code(500).send('disk full')]
}

/** Handlers that reply once `over` is fulfilled. */
const handlers: Record<string, (over: Promise<void>, end: Reply) => RouteHandlerMethod> = {
  'one that calls back': (over, end) => (_request, reply) => {
    over.then(() => { end(reply) }, () => {})
    return reply
  },
  'an async one that returns the reply': (over, end) => async (_request, reply) => {
    over.then(() => { end(reply) }, () => {})
    return reply
  },
  'an async one that awaits the reply': (over, end) => async (_request, reply) => {
    over.then(() => { end(reply) }, () => {})
    await reply
  },
  'an async one that returns what it sends': (over, end) => async (_request, reply) => {
    await over
    return end(reply)
  }
}

t.test('what an app does with the refusal at the deadline', async t => {
  /** To be called when the refusal is on its way, and fulfilled when it may go on. */
  type Hold = () => Promise<void>
  const apps: Record<string, (app: FastifyInstance, hold: Hold, query: ReturnType<typeof connection>) => void> = {
    'an error handler that writes to the raw response and then hijacks': app => {
      app.setErrorHandler((_error, _request, reply) => {
        reply.raw.writeHead(503).end('refused')
        reply.hijack()
      })
    },
    'one that hijacks late': (app, hold) => {
      app.setErrorHandler(async (_error, _request, reply) => {
        await hold()
        reply.raw.writeHead(503).end('refused')
        reply.hijack()
      })
    },
    'one that hijacks where the async context is lost': (app, _hold, query) => {
      app.setErrorHandler((_error, _request, reply) => {
        query(() => {
          reply.hijack()
          reply.raw.writeHead(503).end('refused')
        })
      })
    },
    'one that looks late whether the reply was sent': (app, hold) => {
      app.setErrorHandler(async (_error, _request, reply) => {
        await hold()
        return reply.sent ? reply : await reply.code(503).send('refused')
      })
    },
    'one that passes the error on, beside an async onSend hook': (app, hold) => {
      app.setErrorHandler(error => { throw error })
      app.addHook('onSend', async () => { await hold() })
    },
    'an onSend hook that fails for its answer, where the async context is lost': (app, hold, query) => {
      app.setErrorHandler((_error, _request, reply) => { reply.code(503).send('refused') })
      let hasFailed = false
      app.addHook('onSend', (_request, _reply, _payload, done) => {
        hold().then(() => {
          query(() => {
            if (hasFailed) done()
            else done(Object.assign(new Error('no sessions'), { statusCode: 503 }))
            hasFailed = true
          })
        }, () => {})
      })
    },
    'an onResponse hook that hijacks': app => {
      app.addHook('onResponse', async (_request, reply) => { reply.hijack() })
    }
  }
  for (const [name, set] of Object.entries(apps)) {
    for (const [kind, handler] of Object.entries(handlers)) {
      for (const [how, [recorded, retried, end]] of Object.entries(ends)) {
        for (const isBefore of [true, false]) {
          t.test(`${name}; ${kind}, ${how}, ${isBefore ? 'while the refusal is held' : 'after the refusal'}`, async t => {
            const [holding, held, over] = [deferred(), deferred(), deferred()]
            const { store, calls, next } = watchedStore()
            const app = await build(t, { idempotency: { store }, deadline: 10 })
            set(app, async () => {
              holding.resolve()
              await held.promise
            }, connection(t))
            let runs = 0
            const own = handler(over.promise, end)
            app.post('/own', marked, function (request, reply) {
              return ++runs > 1 ? reply.send('again') : own.call(this, request, reply)
            })
            await listen(app)
            const delivery = sign(thin('batch.failed'))
            const settled = next(recorded)
            const answering = outcome(app, delivery, '/own')
            if (isBefore) {
              await Promise.race([holding.promise, answering])
              over.resolve()
              await tick()
            }
            held.resolve()
            t.match(await answering, /^503 /)
            await tick()
            if (!isBefore) {
              t.same(calls, ['begin'], 'nothing is recorded while it runs')
              over.resolve()
            }
            await settled
            t.equal(await outcome(app, redelivered(delivery), '/own'), retried)
          })
        }
      }
    }
  }
})

t.test('an answer that others have sent, or are sending, when the handler starts', async t => {
  const answers: Record<string, (app: FastifyInstance, held: Promise<void>) => Reply> = {
    'a hook has answered': () => reply => reply.code(503).send('too slow'),
    'an async error handler holds the answer of a hook': (app, held) => {
      app.setErrorHandler(async (_error, _request, reply) => {
        await held
        return await reply.code(503).send('too slow')
      })
      return reply => reply.send(Object.assign(new Error('too slow'), { statusCode: 503 }))
    }
  }
  for (const [name, set] of Object.entries(answers)) {
    for (const [kind, handler] of Object.entries(handlers)) {
      for (const [how, [recorded, retried, end]] of Object.entries(ends)) {
        for (const deadline of [10, 1_000]) {
          t.test(`${name}; ${kind}, ${how}, ${deadline === 10 ? 'after' : 'before'} the deadline`, async t => {
            const [started, waited, running, held, over] = [deferred(), deferred(), deferred(), deferred(), deferred()]
            const { store, next } = watchedStore()
            const app = await build(t, { idempotency: { store }, deadline })
            const answer = set(app, held.promise)
            let latest: FastifyReply
            app.addHook('onRequest', async (_request, reply) => { latest = reply })
            let runs = 0
            const own = handler(over.promise, end)
            app.openaiWebhook.route({
              url: '/own',
              on: {
                'batch.failed': async () => {
                  started.resolve()
                  await waited.promise
                }
              },
              handler (request, reply) {
                if (++runs > 1) return reply.send('again')
                t.equal(reply.sent, false, 'it has not replied itself')
                running.resolve()
                return own.call(this, request, reply)
              }
            })
            await listen(app)
            const delivery = sign(thin('batch.failed'))
            const settled = next(recorded)
            const answering = outcome(app, delivery, '/own')
            await started.promise
            answer(latest!)
            if (name.startsWith('a hook')) await answering
            if (deadline === 10) await new Promise(resolve => setTimeout(resolve, 20)) // beyond the deadline
            waited.resolve()
            await running.promise
            over.resolve()
            await tick()
            held.resolve()
            t.match(await answering, /^503 /)
            await settled
            t.equal(await outcome(app, redelivered(delivery), '/own'), retried)
          })
        }
      }
    }
  }
})

t.test('a handler that replies from within the error handler', async t => {
  for (const isFirst of [true, false]) {
    for (const [how, [recorded, retried, end]] of Object.entries(ends)) {
      t.test(`${how}, ${isFirst ? 'before' : 'after'} the refusal is sent`, async t => {
        const { store, next } = watchedStore()
        const app = await build(t, { idempotency: { store }, deadline: 10 })
        const aborts = new WeakMap<FastifyRequest, () => void>()
        app.setErrorHandler((_error, request, reply) => {
          if (isFirst) aborts.get(request)!()
          reply.code(503).send('refused')
          if (!isFirst) aborts.get(request)!()
        })
        let runs = 0
        app.post('/own', marked, (request, reply) => {
          if (++runs > 1) return reply.send('again')
          aborts.set(request, () => { end(reply) })
          return reply
        })
        await listen(app)
        const delivery = sign(thin('batch.failed'))
        const settled = next(recorded)
        t.equal(await outcome(app, delivery, '/own'), '503 refused')
        await settled
        t.equal(await outcome(app, redelivered(delivery), '/own'), retried)
      })
    }
  }
})

t.test('after the deadline', async t => {
  const late = async (t: Tap, recorded: 'complete' | 'release', end: Reply): Promise<FastifyInstance> => {
    const over = deferred()
    const { store, next } = watchedStore()
    const app = await build(t, { idempotency: { store }, deadline: 10 })
    app.post('/own', marked, (_request, reply) => {
      over.promise.then(() => { end(reply) }, () => {})
      return reply
    })
    await listen(app)
    const settled = next(recorded)
    t.equal(await outcome(app, sign(thin('batch.failed')), '/own'), '503 DEADLINE')
    over.resolve()
    await settled
    return app
  }

  t.test('callNotFound() is a failure', async t => {
    await late(t, 'release', reply => { reply.callNotFound() })
  })

  t.test('hijack() is the end', async t => {
    await late(t, 'complete', reply => {
      reply.hijack()
      reply.raw.end()
    })
  })

  t.test('the status is that of the handler, however it is set and read', async t => {
    await late(t, 'release', reply => {
      t.equal(reply.statusCode, 200)
      reply.statusCode = 500
      t.equal(reply.statusCode, 500)
      t.equal(reply.sent, false)
      reply.send()
      t.equal(reply.sent, true)
    })
  })

  t.test('a stream that nobody reads is closed, and does not end the process if it fails', async t => {
    const payload = new Readable({ read () {}, destroy: (_error, done) => { done(new Error('no such file')) } })
    await late(t, 'complete', reply => reply.send(payload))
    t.ok(payload.destroyed)
  })
})

t.test('the handler\'s reply is otherwise that of the hooks', async t => {
  const app = await build(t)
  app.decorateReply('language', '')
  app.decorateReply('answer', function (this: FastifyReply, text: string) { return this.type('text/plain').send(text) })
  type Decorated = FastifyReply & { language: string, answer: (text: string) => FastifyReply }
  app.addHook('preHandler', async (_request, reply) => { (reply as Decorated).language = 'en' })
  const seen: unknown[] = []
  app.addHook('onSend', async (_request, reply) => { seen.push((reply as Decorated).language, reply.statusCode, reply.getHeader('x-own')) })
  app.post('/own', marked, async (request, reply) => {
    const decorated = reply as Decorated
    seen.push(decorated.language, reply.request === request, reply.sent)
    decorated.language = 'de'
    reply.statusCode = 202
    // A handler may put a `send` of its own in place.
    const send = reply.send.bind(reply)
    reply.send = ((payload: unknown) => send(`${String(payload)}!`)) as typeof reply.send
    reply.header('x-own', 'yes').then(() => { seen.push('sent', reply.sent) }, () => {})
    return decorated.answer('own')
  })
  await listen(app)
  t.equal(await outcome(app, sign(thin('batch.failed')), '/own'), '202 own!')
  while (!seen.includes('sent')) await tick()
  t.same(seen, ['en', true, false, 'de', 202, 'yes', 'sent', true])
})
