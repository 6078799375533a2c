import { createReadStream } from 'node:fs'
import { Readable, pipeline } from 'node:stream'
import Fastify from 'fastify'
import type { FastifyInstance, FastifyReply, FastifyRequest, RouteHandlerMethod } from 'fastify'
import t from 'tap'
import openaiWebhook from '../../lib/index.ts'
import { SECRET, build, outcome, sign, thin } from '../support/deliveries.ts'
import { deferred, dialWith, listen, redelivered, send, watchedStore } from '../support/observe.ts'

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
    'an async error handler that does not return the reply, beside an async onSend hook': (app, hold) => {
      app.setErrorHandler(async (_error, _request, reply) => { reply.code(503).send('refused') })
      app.addHook('onSend', async () => { await hold() })
    },
    'an error handler that sends and returns a value': app => {
      app.setErrorHandler((_error, _request, reply) => {
        reply.code(503).send('refused')
        return 'refused'
      })
    },
    'an onResponse hook that sets a status': app => {
      app.addHook('onResponse', async (_request, reply) => { reply.code(599) })
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
    for (const wrap of [(stream: ReadableStream) => stream, (stream: ReadableStream) => new Response(stream)]) {
      const cancelled = deferred()
      const stream = new ReadableStream({
        cancel () {
          cancelled.resolve()
          throw new Error('no upstream')
        }
      })
      await late(t, 'complete', reply => reply.send(wrap(stream)))
      await cancelled.promise
    }
  })

  t.test('what is no stream is left alone, though it has a method of that name', async t => {
    for (const name of ['destroy', 'cancel']) {
      await late(t, 'complete', reply => reply.send({ id: 7, [name]: async () => { t.fail(`${name}() was called`) } }))
    }
  })

  t.test('raw.end() without a reply, as NestJS does when a handler fails, is a failure', async t => {
    await late(t, 'release', reply => { reply.raw.end() })
    const over = deferred()
    const { store, next } = watchedStore()
    const app = await build(t, { idempotency: { store }, deadline: 10 })
    app.post('/own', marked, async (_request, reply) => {
      await over.promise
      reply.raw.end()
      return reply
    })
    await listen(app)
    const released = next('release')
    t.equal(await outcome(app, sign(thin('batch.failed')), '/own'), '503 DEADLINE')
    over.resolve()
    await released
  })

  t.test('only the first reply counts, and none of them is the sender\'s answer', async t => {
    const [holding, held, over] = [deferred(), deferred(), deferred()]
    const { store, next } = watchedStore()
    const app = await build(t, { idempotency: { store }, deadline: 10 })
    app.addHook('onSend', async () => {
      holding.resolve()
      await held.promise
    })
    app.post('/own', marked, (_request, reply) => {
      over.promise.then(() => {
        reply.send('own')
        if (!reply.sent) reply.code(418).send('not sent')
        reply.code(418).send('twice')
      }, () => {})
      return reply
    })
    await listen(app)
    const completed = next('complete')
    const answering = outcome(app, sign(thin('batch.failed')), '/own')
    await holding.promise
    over.resolve()
    await completed
    held.resolve()
    t.equal(await answering, '503 DEADLINE')
  })
})

t.test('a handler that replies with the reply of a hook', async t => {
  type Kept = FastifyRequest & { kept: FastifyReply }
  const kinds: Record<string, (over: Promise<void>, end: Reply) => RouteHandlerMethod> = {
    'calls back': (over, end) => (request, reply) => {
      over.then(() => { end((request as Kept).kept) }, () => {})
      return reply
    },
    'calls back, and returns it': (over, end) => request => {
      over.then(() => { end((request as Kept).kept) }, () => {})
      return (request as Kept).kept
    },
    'async, returns it before': (over, end) => async request => {
      over.then(() => { end((request as Kept).kept) }, () => {})
      return (request as Kept).kept
    },
    'async, returns what it sends': (over, end) => async request => {
      await over
      return end((request as Kept).kept)
    },
    'async, returns its own after that': (over, end) => async (request, reply) => {
      await over
      end((request as Kept).kept)
      return reply
    }
  }
  const keptEnds: Record<string, ['complete' | 'release', Reply]> = {
    'in success': ['complete', reply => reply.code(200).send('own')],
    'in failure': ['release', reply => reply.code(500).send('disk full')],
    'with an error': ['release', reply => reply.send(new Error('disk full'))],
    'without a status': ['complete', reply => reply.send('own')]
  }
  for (const [kind, handler] of Object.entries(kinds)) {
    for (const [how, [recorded, end]] of Object.entries(keptEnds)) {
      for (const over of ['the deadline', 'the sender has gone']) {
        t.test(`${kind}, ${how}, after ${over}`, async t => {
          const [started, closed, replying] = [deferred(), deferred(), deferred()]
          const { store, calls, next } = watchedStore()
          const app = await build(t, { idempotency: { store }, ...(over === 'the deadline' && { deadline: 10 }) })
          app.addHook('preHandler', async (request, reply) => { (request as Kept).kept = reply })
          let runs = 0
          const own = handler(replying.promise, end)
          app.post('/own', marked, function (request, reply) {
            if (++runs > 1) return reply.send('again')
            reply.raw.once('close', closed.resolve)
            started.resolve()
            return own.call(this, request, reply)
          })
          await listen(app)
          const delivery = sign(thin('batch.failed'))
          const { socket } = await dialWith(app, delivery, '/own')
          await started.promise
          if (over !== 'the deadline') socket.destroy()
          await closed.promise
          await tick()
          t.same(calls, ['begin'], 'nothing is recorded while it runs')
          const settled = next(recorded)
          replying.resolve()
          await settled
          t.equal(await outcome(app, redelivered(delivery), '/own'), recorded === 'complete' ? DUPLICATE : '200 again')
        })
      }
    }
  }

  t.test('whose send a hook has replaced: an error handler may have sent that, so the handler may run again', async t => {
    const over = deferred()
    const { store, next } = watchedStore()
    const app = await build(t, { idempotency: { store }, deadline: 10 })
    let kept: FastifyReply
    app.addHook('preHandler', async (_request, reply) => {
      kept = reply
      const { send } = reply
      reply.send = (payload: unknown) => send.call(reply, payload)
    })
    app.post('/own', marked, (_request, reply) => {
      over.promise.then(() => { kept.send('own') }, () => {})
      return reply
    })
    await listen(app)
    const released = next('release')
    t.equal(await outcome(app, sign(thin('batch.failed')), '/own'), '503 DEADLINE')
    over.resolve()
    await released
  })

  // An app whose answers wait before they are written.
  const waiting: Record<string, (app: FastifyInstance) => void> = {
    'an async onSend hook': app => { app.addHook('onSend', async () => { await tick() }) },
    'an async preSerialization hook': app => { app.addHook('preSerialization', async (_request, _reply, payload) => await tick().then(() => payload)) },
    'an async error handler': app => { app.setErrorHandler(async (error: Error, _request, reply) => await tick().then(() => reply.code(500).send({ error: error.message }))) }
  }
  for (const [name, set] of Object.entries(waiting)) {
    for (const handler of [(request: FastifyRequest) => { fail(request) }, async (request: FastifyRequest, reply: FastifyReply) => { await fail(request); return reply }]) {
      t.test(`at once, in failure, beside ${name}, ${handler.length === 1 ? 'and returns nothing' : 'async'}`, async t => {
        const { store, calls } = watchedStore()
        const app = await build(t, { idempotency: { store } })
        set(app)
        app.addHook('preHandler', async (request, reply) => { (request as Kept).kept = reply })
        app.post('/own', marked, handler)
        await listen(app)
        t.equal(await outcome(app, sign(thin('batch.failed')), '/own'), '500 {"error":"disk full"}')
        t.same(calls, ['begin', 'release'])
      })
    }
    function fail (request: FastifyRequest): FastifyReply {
      const { kept } = request as Kept
      return name === 'an async error handler' ? kept.send(new Error('disk full')) : kept.code(500).send({ error: 'disk full' })
    }
  }
})

t.test('a handler that destroys the response, or pipes to it from what fails', async t => {
  const ways: Record<string, (reply: FastifyReply) => void> = {
    'destroys it': reply => { reply.raw.destroy() },
    'destroys it later': reply => { setImmediate(() => { reply.raw.destroy() }) },
    'pipes to it': reply => { pipeline(createReadStream('/no/such/file'), reply.raw, () => {}) }
  }
  for (const [name, end] of Object.entries(ways)) {
    for (const handler of [(_request: FastifyRequest, reply: FastifyReply) => { end(reply); return reply }, async (_request: FastifyRequest, reply: FastifyReply) => { end(reply); return reply }]) {
      t.test(`${name}${handler.constructor.name === 'AsyncFunction' ? ', async' : ''}`, async t => {
        const { store, next } = watchedStore()
        const app = await build(t, { idempotency: { store } })
        let runs = 0
        app.post('/own', marked, function (request, reply) { return ++runs > 1 ? reply.send('again') : handler(request, reply) })
        await listen(app)
        const delivery = sign(thin('batch.failed'))
        const released = next('release')
        t.equal(await send(app, delivery, '/own'), '', 'as on a plain route')
        await released
        t.equal(await outcome(app, redelivered(delivery), '/own'), '200 again')
      })
    }
  }
})

t.test('a response that fails while the handler awaits the reply', async t => {
  const { store, calls } = watchedStore()
  const app = await build(t, { idempotency: { store } })
  app.post('/own', marked, async (_request, reply) => {
    setImmediate(() => { reply.raw.emit('error', new Error('broken')) })
    reply.then(() => { t.fail('it was not sent') }, undefined as never)
    await reply
  })
  await listen(app)
  t.match(await send(app, sign(thin('batch.failed')), '/own'), /^HTTP\/1.1 500 /)
  t.same(calls, ['begin', 'release'])
})

t.test('a function that wraps the handler goes on when the handler has ended, though it began its answer before', async t => {
  const { store, calls } = watchedStore()
  const app = await build(t, { idempotency: { store } })
  let isOpen = false
  app.addHook('onRoute', route => {
    const { handler } = route
    route.handler = async function (request, reply) {
      isOpen = true
      try {
        return await handler.call(this, request, reply)
      } finally {
        isOpen = false
      }
    }
  })
  app.post('/own', marked, async (_request, reply) => {
    reply.hijack()
    reply.raw.writeHead(200)
    reply.raw.write('a')
    await tick()
    reply.raw.end(isOpen ? 'b' : 'closed')
  })
  await listen(app)
  t.equal(await outcome(app, sign(thin('batch.failed')), '/own'), '200 ab')
  t.same(calls, ['begin', 'complete'])
})

t.test('a decorator of the app', async t => {
  type Decorated = FastifyReply & { tenant: string, jsend: { fail: (text: string) => void } }

  t.test('keeps what the handler sets', async t => {
    const tenants = new WeakMap<object, string>()
    const app = await build(t)
    app.decorateReply('tenant', {
      getter () { return tenants.get(this) },
      setter (this: FastifyReply, name: string) { tenants.set(this, name) }
    } as never)
    app.post('/own', marked, (_request, reply) => {
      (reply as Decorated).tenant = 'acme'
      return reply.send((reply as Decorated).tenant)
    })
    await listen(app)
    t.equal(await outcome(app, sign(thin('batch.failed')), '/own'), '200 acme')
  })

  t.test('replies for the handler, while the refusal is held too', async t => {
    const [holding, held] = [deferred(), deferred()]
    const { store, next } = watchedStore()
    const app = await build(t, { idempotency: { store }, deadline: 10 })
    app.decorateReply('jsend', { getter (this: FastifyReply) { return { fail: (text: string) => { this.code(500).send(text) } } } } as never)
    app.addHook('onSend', async () => {
      holding.resolve()
      await held.promise
    })
    app.post('/own', marked, (_request, reply) => {
      holding.promise.then(() => { (reply as Decorated).jsend.fail('disk full') }, () => {})
      return reply
    })
    await listen(app)
    const released = next('release')
    const answering = outcome(app, sign(thin('batch.failed')), '/own')
    await released
    held.resolve()
    t.equal(await answering, '503 DEADLINE')
  })
})

t.test('a handler that ends the raw response once the sender has gone', async t => {
  const endings: Record<string, ['complete' | 'release', Reply]> = {
    'without a hijack': ['complete', reply => reply.raw.end('own')],
    // It had not ended by then.
    'after a hijack': ['release', reply => {
      reply.hijack()
      reply.raw.end('own')
    }]
  }
  for (const [name, [recorded, end]] of Object.entries(endings)) {
    t.test(name, async t => {
      const [started, closed] = [deferred(), deferred()]
      const { store, next } = watchedStore()
      const app = await build(t, { idempotency: { store } })
      app.post('/own', marked, (_request, reply) => {
        reply.raw.once('close', () => {
          closed.resolve()
          setImmediate(() => { end(reply) })
        })
        started.resolve()
        return reply
      })
      await listen(app)
      const delivery = sign(thin('batch.failed'))
      const settled = next(recorded)
      const { socket } = await dialWith(app, delivery, '/own')
      await started.promise
      socket.destroy()
      await closed.promise
      await settled
    })
  }
})

t.test('a function that wraps the handler and returns what then() has returned, as @fastify/otel does', async t => {
  const { store, calls } = watchedStore()
  const app = Fastify() as FastifyInstance
  t.teardown(() => app.close())
  const failures: unknown[] = []
  app.addHook('onRoute', route => {
    const { handler } = route
    route.handler = function (request, reply) {
      const result = handler.call(this, request, reply) as FastifyReply | undefined
      if (result === undefined) return
      return (result.then as unknown as (fulfilled: () => void, rejected: (error: Error) => void) => unknown)(() => {
        if (request.headers['x-fails'] !== undefined) throw new Error('no span')
      }, error => { failures.push(error) })
    }
  })
  await app.register(openaiWebhook, { secret: SECRET, idempotency: { store } })
  app.post('/own', marked, (_request, reply) => {
    setImmediate(() => reply.code(500).send('disk full'))
    return reply
  })
  await listen(app)
  const delivery = sign(thin('batch.failed'))
  t.equal(await outcome(app, delivery, '/own'), '500 disk full')
  t.same(calls, ['begin', 'release'])
  const failing = redelivered(delivery)
  t.equal(await outcome(app, { ...failing, headers: { ...failing.headers, 'x-fails': 'yes' } }, '/own'), '500 disk full')
  t.same(failures, [])
})

t.test('a `send` of the handler\'s own', async t => {
  const sends: Record<string, [string, (reply: FastifyReply) => unknown]> = {
    'of an object that inherits from reply': ['200 own!', reply => {
      const loud = Object.create(reply) as FastifyReply
      loud.send = ((payload: unknown) => reply.send(`${String(payload)}!`)) as typeof reply.send
      return loud.send('own')
    }],
    'that is defined': ['200 own!', reply => {
      const { send } = reply
      Object.defineProperty(reply, 'send', { configurable: true, value: (payload: unknown) => send(`${String(payload)}!`) })
      Object.defineProperty(reply, 'loud', { configurable: true, value: true })
      return reply.send('own')
    }],
    'that is deleted': ['200 own!', reply => {
      reply.send = ((payload: unknown) => {
        delete (reply as Partial<FastifyReply>).send
        delete (reply as { loud?: boolean }).loud
        return reply.send(`${String(payload)}!`)
      }) as typeof reply.send
      return reply.send('own')
    }],
    'that throws': ['500 HANDLER_FAILED', reply => {
      reply.send = (() => { throw new Error('no') }) as typeof reply.send
      return reply.send('own')
    }]
  }
  for (const [name, [answer, end]] of Object.entries(sends)) {
    t.test(name, async t => {
      const { store, calls } = watchedStore()
      const app = await build(t, { idempotency: { store } })
      app.post('/own', marked, (_request, reply) => end(reply))
      await listen(app)
      t.equal(await outcome(app, sign(thin('batch.failed')), '/own'), answer)
      t.same(calls, ['begin', answer.startsWith('200') ? 'complete' : 'release'])
    })
  }

  for (const isOnce of [true, false]) {
    t.test(`and one of a hook's that throws ${isOnce ? 'once' : 'always'}: the claim is let go`, async t => {
      const { store, next } = watchedStore()
      const app = await build(t, { idempotency: { store } })
      let latest: FastifyReply
      app.addHook('preHandler', async (_request, reply) => {
        latest = reply
        const send = reply.send
        let isFirst = true
        reply.send = ((payload: unknown) => {
          if (isOnce && !isFirst) return send.call(reply, payload)
          isFirst = false
          throw new Error('no')
        }) as typeof reply.send
      })
      app.post('/own', marked, (_request, reply) => reply.send('own'))
      await listen(app)
      const released = next('release')
      const answering = outcome(app, sign(thin('batch.failed')), '/own')
      await released
      if (!isOnce) latest!.raw.writeHead(500).end()
      t.match(await answering, /^500 /)
    })
  }
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
    t.equal(reply.statusCode, 202)
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
