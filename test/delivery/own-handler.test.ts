import { Readable } from 'node:stream'
import type { FastifyInstance, FastifyReply, FastifyRequest, RouteHandlerMethod } from 'fastify'
import t from 'tap'
import { channels } from '../../lib/index.ts'
import type { OpenAIWebhookOptions, RefusedMessage } from '../../lib/index.ts'
import { build, post, sign, stoppedClock, thin } from '../support/deliveries.ts'
import { capturedLog, deferred, handled, listen, redelivered, send, watchedStore } from '../support/observe.ts'

// A marked route's own handler: the ways in which it may reply, and what the next delivery of the webhook-id gets.

const marked = { config: { openaiWebhook: {} } }
const RECEIVED = '200 {"received":true}'
const DUPLICATE = '200 {"received":true,"duplicate":true}'

async function answer (app: FastifyInstance, delivery = sign(thin('batch.failed'))): Promise<string> {
  const { statusCode, body } = await post(app, delivery, '/own')
  return `${statusCode} ${body}`
}

interface Route {
  app: FastifyInstance
  /** How often the handler has run. */
  runs: () => number
  store: ReturnType<typeof watchedStore>
  log: ReturnType<typeof capturedLog>
}

async function route (t: Parameters<typeof build>[0], handler: RouteHandlerMethod, options: OpenAIWebhookOptions = {}): Promise<Route> {
  const store = watchedStore()
  const log = capturedLog()
  const app = await build(t, { idempotency: { store: store.store }, ...options }, { logger: log.logger })
  let runs = 0
  app.post('/own', marked, function (request, reply) {
    runs++
    return handler.call(this, request, reply)
  })
  return { app, runs: () => runs, store, log }
}

const tick = (): Promise<void> => new Promise(resolve => setImmediate(resolve))

t.test('one that sets a status and returns nothing', async t => {
  const failures: Record<string, (reply: FastifyReply) => void> = {
    'code(503)': reply => { reply.code(503) },
    'status(422) and a header': reply => { reply.status(422).header('x-why', 'later') },
    'statusCode = 500': reply => { reply.statusCode = 500 },
    'code(304)': reply => { reply.code(304) }
  }
  const kinds: Record<string, (act: (reply: FastifyReply) => void) => RouteHandlerMethod> = {
    sync: act => (_request, reply) => { act(reply) },
    async: act => async (_request, reply) => { act(reply) },
    'async, after waiting': act => async (_request, reply) => {
      await tick()
      act(reply)
    }
  }
  for (const [kind, handler] of Object.entries(kinds)) {
    for (const [name, act] of Object.entries(failures)) {
      t.test(`${name}, ${kind}, answers as a plain route does, and runs again`, async t => {
        const own = await route(t, handler(act))
        // A plain route with such a sync handler never answers.
        own.app.post('/plain', kind === 'sync' ? kinds['async']!(act) : handler(act))
        await own.app.ready()
        const delivery = sign(thin('batch.failed'))
        const [mine, plain] = [await post(own.app, delivery, '/own'), await post(own.app, delivery, '/plain')]
        t.same([mine.statusCode, mine.body, mine.headers['x-why']], [plain.statusCode, plain.body, plain.headers['x-why']])
        t.same(own.store.calls, ['begin', 'release'])
        await post(own.app, redelivered(delivery), '/own')
        t.equal(own.runs(), 2)
      })
    }
    t.test(`code(202), ${kind}, is acknowledged`, async t => {
      const { app, store } = await route(t, handler(reply => { reply.code(202) }))
      t.equal(await answer(app), RECEIVED)
      t.same(store.calls, ['begin', 'complete'])
    })
  }
})

const replies: Record<string, [RouteHandlerMethod, string]> = {
  'async, returning nothing': [async () => {}, RECEIVED],
  'async, returning nothing after a while': [async () => { await tick() }, RECEIVED],
  'async, returning a value': [async () => ({ own: true }), '200 {"own":true}'],
  'async, returning null': [async () => null, '200 null'],
  'async, sending and returning the reply': [async (_request, reply) => reply.code(201).send({ own: true }), '201 {"own":true}'],
  'async, sending and returning nothing': [async (_request, reply) => { reply.code(201).send({ own: true }) }, '201 {"own":true}'],
  'async, returning the reply and sending later': [
    async (_request, reply) => {
      setImmediate(() => reply.send('later'))
      return reply
    },
    '200 later'
  ],
  'async, with a status of its own and nothing else': [async (_request, reply) => { reply.code(204).send() }, '204 '],
  'sync, returning nothing': [() => {}, RECEIVED],
  'sync, returning a value': [() => ({ own: true }), '200 {"own":true}'],
  'sync, sending': [(_request, reply) => { reply.send('sent') }, '200 sent'],
  'sync, sending and returning the reply': [(_request, reply) => reply.send('sent'), '200 sent'],
  'sync, returning the reply and sending later': [
    (_request, reply) => {
      setImmediate(() => reply.send('later'))
      return reply
    },
    '200 later'
  ],
  'a thenable that is no promise': [
    () => ({ then (resolve: (value: string) => void) { setImmediate(resolve, 'thenable') } }),
    '200 thenable'
  ]
}

for (const [name, [handler, expected]] of Object.entries(replies)) {
  t.test(`a handler that is ${name}`, async t => {
    for (const hooked of [false, true]) {
      const { app, runs } = await route(t, handler)
      if (hooked) {
        app.addHook('onSend', async (_request, _reply, payload) => {
          await tick()
          return payload
        })
      }
      const delivery = sign(thin('batch.failed'))
      const when = hooked ? 'with an async onSend hook of the app' : 'alone'
      t.equal(await answer(app, delivery), expected, when)
      t.equal(await answer(app, redelivered(delivery)), DUPLICATE, when)
      t.equal(runs(), 1, when)
    }
  })
}

t.test('`this` is the scope of the route', async t => {
  const app = await build(t)
  let seen: FastifyInstance | undefined
  let scope: FastifyInstance | undefined
  await app.register(async child => {
    scope = child
    child.post('/own', marked, async function () { seen = this })
  })
  t.equal(await answer(app), RECEIVED)
  t.equal(seen, scope)
})

t.test('the store hears of the answer before the sender does', async t => {
  const store = watchedStore()
  const completed = deferred()
  const app = await build(t, {
    idempotency: {
      store: {
        ...store.store,
        async complete (...args) {
          await completed.promise
          await store.store.complete(...args)
        }
      }
    }
  })
  app.post('/own', marked, async (_request, reply) => reply.send('sent'))
  let answered = false
  const answering = answer(app).then(text => {
    answered = true
    return text
  })
  await store.next('begin')
  await tick()
  t.equal(answered, false)
  completed.resolve()
  t.equal(await answering, '200 sent')
})

/** Fastify has text serialized as well where the type is JSON, and throws what the serializer throws. */
const unserializable = (reply: FastifyReply): FastifyReply => reply.type('application/json').serializer(() => { throw new Error('no text') })

const failures: Record<string, [RouteHandlerMethod, number]> = {
  'answers 4xx': [async (_request, reply) => reply.code(422).send({ retry: true }), 422],
  'answers 3xx': [async (_request, reply) => reply.redirect('/elsewhere'), 302],
  'answers 5xx without a body': [(_request, reply) => { reply.code(503).send() }, 503],
  rejects: [async () => { throw new Error('disk full') }, 500],
  throws: [() => { throw new Error('disk full') }, 500],
  'throws an error with a status of its own': [() => { throw Object.assign(new Error('teapot'), { statusCode: 418 }) }, 418],
  'sends an error': [async (_request, reply) => reply.send(new Error('disk full')), 500],
  'sends what its serializer fails for': [async (_request, reply) => unserializable(reply).send('own'), 500],
  'returns what its serializer fails for': [async (_request, reply) => {
    unserializable(reply)
    return 'own'
  }, 500],
  'returns nothing, with a serializer that fails': [async (_request, reply) => { unserializable(reply) }, 500],
  'returns nothing at once, with a serializer that fails': [(_request, reply) => { unserializable(reply) }, 500],
  // Fastify throws after its onSend hooks what it cannot write: the store has heard of the failure by then.
  'sends a failure that has no text': [async (_request, reply) => reply.code(400).type('text/plain').send({ no: 'text' }), 500],
  'returns a Response that fails': [async () => new Response('busy', { status: 409 }), 409],
  'writes its failure to the raw response': [async (_request, reply) => {
    reply.hijack()
    reply.raw.writeHead(507).end()
  }, 507]
}

for (const [name, [handler, expected]] of Object.entries(failures)) {
  t.test(`a handler that ${name} is told of like a refusal, and runs again`, async t => {
    const refusals: unknown[] = []
    const listener = ({ code, statusCode, webhookId }: RefusedMessage): void => { refusals.push([code, statusCode, webhookId]) }
    channels.refused.subscribe(listener)
    t.teardown(() => channels.refused.unsubscribe(listener))
    let broken = true
    const { app, runs, log } = await route(t, function (request, reply) {
      return broken ? handler.call(this, request, reply) : { done: true }
    })
    const delivery = sign(thin('batch.failed'))

    t.equal((await post(app, delivery, '/own')).statusCode, expected)
    t.equal((await post(app, redelivered(delivery), '/own')).statusCode, expected)
    broken = false
    t.equal(await answer(app, redelivered(delivery)), '200 {"done":true}')
    const code = 'FST_OPENAI_WEBHOOK_HANDLER_FAILED'
    const webhookId = delivery.headers['webhook-id']
    t.same(refusals, [[code, expected, webhookId], [code, expected, webhookId]])
    t.match(log.lines.filter(({ msg, webhookId }) => msg === 'an event handler failed' && webhookId !== undefined), Array(2).fill({ code, webhookId, err: Object, reason: `the route's handler answered ${expected}` }))
    t.equal(await answer(app, redelivered(delivery)), DUPLICATE)
    t.equal(runs(), 3)
  })
}

t.test('a failure that Fastify\'s handlerTimeout answers while it is recorded is told of with that answer', async t => {
  const refusals: unknown[] = []
  const listener = ({ code, statusCode }: RefusedMessage): void => { refusals.push([code, statusCode]) }
  channels.refused.subscribe(listener)
  t.teardown(() => channels.refused.unsubscribe(listener))
  const { store } = watchedStore()
  const [releasing, answered] = [deferred(), deferred()]
  const release: typeof store.release = async (...args) => {
    releasing.resolve()
    await answered.promise
    await store.release(...args)
  }
  const app = await build(t, { idempotency: { store: { ...store, release } } })
  app.post('/own', { ...marked, handlerTimeout: 20 }, async (_request, reply) => {
    reply.code(422)
    return 'own'
  })
  await app.ready()
  const clock = stoppedClock(t)
  const answering = post(app, sign(thin('batch.failed')), '/own')
  await releasing.promise
  clock.advance(20)
  t.equal((await answering).statusCode, 503)
  answered.resolve()
  await app.close()
  t.same(refusals, [['FST_OPENAI_WEBHOOK_HANDLER_FAILED', 503]])
})

t.test('an error that an async onError hook holds until Fastify\'s handlerTimeout is over is the answer', async t => {
  const [holding, held] = [deferred(), deferred()]
  const { app } = await route(t, async () => {})
  app.addHook('onError', async () => {
    holding.resolve()
    await held.promise
  })
  app.post('/timed', { ...marked, handlerTimeout: 20 }, async () => { throw new Error('disk full') })
  await app.ready()
  const clock = stoppedClock(t)
  const answering = post(app, sign(thin('batch.failed')), '/timed')
  await holding.promise
  clock.advance(20)
  held.resolve()
  t.equal((await answering).statusCode, 500)
})

t.test('an answer that cannot be sent is a 500, as a plain route\'s, whether the store answers at once or later', async t => {
  for (const later of [false, true]) {
    const { store } = watchedStore()
    const complete: typeof store.complete = async (...args) => {
      await tick()
      await store.complete(...args)
    }
    const app = await build(t, { idempotency: { store: later ? { ...store, complete } : store } })
    const handler: RouteHandlerMethod = async (_request, reply) => reply.header('x-own', 'two\nlines').send('sent')
    app.post('/own', marked, handler)
    app.post('/plain', handler)
    const plain = await app.inject({ method: 'POST', url: '/plain' })
    t.equal(await answer(app), `500 ${plain.body}`)
    t.match(plain.body, 'ERR_INVALID_CHAR')
  }
})

t.test('an answer that a hook of the app sends while the handler runs counts as the handler\'s', async t => {
  for (const [first, slow, retried] of [['of the hook', false, DUPLICATE], [new Error('of the hook'), false, '200 again'], [new Error('of the hook'), true, DUPLICATE]] as const) {
    const { app, runs } = await route(t, async (_request, reply) => {
      if (runs() > 1) return 'again'
      finish.resolve()
      await answered.promise
      reply.send('of the handler')
      await tick()
    })
    const finish = deferred()
    const answered = deferred()
    app.addHook('preHandler', async (_request, reply) => {
      const { send } = reply
      if (runs() === 0) finish.promise.then(() => { send.call(reply, first) }).then(answered.resolve, answered.resolve)
    })
    if (slow) app.addHook('onError', async () => { await tick() })
    const delivery = sign(thin('batch.failed'))
    t.match(await answer(app, delivery), 'of the hook')
    t.equal(await answer(app, redelivered(delivery)), retried)
  }
})

t.test('a status that a hook has set before the handler runs, while its error is held, is not the handler\'s', async t => {
  const held = deferred()
  const { app, runs } = await route(t, async (_request, reply) => { reply.send({ ok: true }) })
  app.addHook('preHandler', async (_request, reply) => {
    if (runs() > 0) return
    setImmediate(() => reply.code(503).send(new Error('of the hook')))
  })
  app.addHook('onError', async () => {
    held.resolve()
    await new Promise(resolve => setTimeout(resolve, 20))
  })
  const early = deferred()
  app.post('/early', { config: { openaiWebhook: { on: { 'batch.failed': async () => { await held.promise; early.resolve() } } } } }, async (_request, reply) => {
    await early.promise
    reply.send({ ok: true })
  })
  const delivery = sign(thin('batch.failed'))
  t.equal((await post(app, delivery, '/early')).statusCode, 503)
  t.equal((await post(app, redelivered(delivery), '/early')).body, '{"received":true,"duplicate":true}')
})

t.test('a failure of the handler\'s own, while a hook\'s is held, counts once the handler has ended', async t => {
  const [held, letGo, end] = [deferred(), deferred(), deferred()]
  const { app, runs, log } = await route(t, async (_request, reply) => {
    if (runs() > 1) return 'again'
    app.log.info('started')
    await held.promise
    reply.code(500).send('of the handler')
    letGo.resolve()
    await end.promise
  })
  app.addHook('preHandler', async (_request, reply) => {
    if (runs() > 0) return
    const { send } = reply
    const limit = async (): Promise<void> => {
      while (!log.lines.some(({ msg }) => msg === 'started')) await tick()
      send.call(reply, new Error('of the hook'))
    }
    limit().catch(t.error)
  })
  app.addHook('onError', async () => {
    held.resolve()
    await letGo.promise
  })
  const delivery = sign(thin('batch.failed'))
  t.match(await answer(app, delivery), 'of the hook')
  const joined = answer(app, redelivered(delivery))
  while (runs() === 1 && !log.lines.some(({ msg }) => msg === 'webhook delivery is a duplicate')) await tick()
  t.equal(runs(), 1)
  end.resolve()
  t.match(await joined, /^500 /)
  t.equal(await answer(app, redelivered(delivery)), '200 again')
})

t.test('a handler that throws after its answer is logged, and has been answered', async t => {
  const { app, runs, log } = await route(t, async (_request, reply) => {
    reply.send('sent')
    throw new Error('after the answer')
  })
  const delivery = sign(thin('batch.failed'))

  t.equal(await answer(app, delivery), '200 sent')
  t.equal(await answer(app, redelivered(delivery)), DUPLICATE)
  t.equal(runs(), 1)
  t.same(log.errors().map(({ msg, err }) => [msg, err!.message]), [['a webhook route\'s handler failed after the answer', 'after the answer']])
})

t.test('a handler that throws while an onSend hook still has its answer has been answered too', async t => {
  const { app, runs } = await route(t, async (_request, reply) => {
    reply.send('sent')
    throw new Error('after the answer')
  })
  app.addHook('onSend', async (_request, _reply, payload) => {
    await tick()
    return payload
  })
  const delivery = sign(thin('batch.failed'))

  t.equal(await answer(app, delivery), '200 sent')
  t.equal(await answer(app, redelivered(delivery)), DUPLICATE)
  t.equal(runs(), 1)
})

t.test('an answer that an onSend hook turns into a failure is a failure', async t => {
  const { app, runs, store } = await route(t, async (_request, reply) => reply.send('sent'))
  let broken = true
  app.addHook('onSend', async (_request, _reply, payload) => {
    if (broken) throw new Error('the hook failed')
    return payload
  })
  await listen(app)
  const delivery = sign(thin('batch.failed'))
  const released = store.next('release')

  t.match(await send(app, delivery, '/own'), /^HTTP\/1\.1 500 /)
  await released
  broken = false
  t.match(await send(app, redelivered(delivery), '/own'), /sent$/)
  t.equal(runs(), 2)
})

t.test('what a handler throws reaches the error handler of its scope', async t => {
  const { app } = await route(t, async () => { throw new Error('disk full') })
  app.setErrorHandler((error: Error, _request, reply) => reply.code(507).send(`handled: ${(error.cause as AggregateError).errors}`))

  t.equal(await answer(app), '507 handled: Error: disk full')
})

t.test('an error handler of the route answers as on a plain route, in whatever way', async t => {
  const ways: Record<string, (error: unknown, request: FastifyRequest, reply: FastifyReply) => unknown> = {
    sends: (_error, _request, reply) => { reply.code(507).send('sent') },
    'returns a promise': async (_error, _request, reply) => { reply.code(507); return 'returned' },
    throws: () => { throw new Error('the error handler failed') },
    'throws later': async () => { throw new Error('the error handler failed') }
  }
  for (const [name, errorHandler] of Object.entries(ways)) {
    const { app } = await route(t, async () => {})
    const fails = async (): Promise<never> => { throw new Error('disk full') }
    app.post('/failing', { ...marked, errorHandler: errorHandler as never }, fails)
    app.post('/plain', { errorHandler: errorHandler as never }, fails)
    const [ours, plain] = await Promise.all(['/failing', '/plain'].map(async url => await post(app, sign(thin('batch.failed')), url)))
    t.same([ours!.statusCode, ours!.body], [plain!.statusCode, plain!.body], name)
    t.ok(ours!.statusCode >= 500, name)
  }
})

t.test('a hijacked reply', async t => {
  t.test('counts as the answer that it is, once the connection has it', async t => {
    const { app, runs, store } = await route(t, (_request, reply) => {
      reply.hijack()
      setImmediate(() => {
        reply.raw.writeHead(202, { 'content-length': 3, connection: 'close' })
        reply.raw.end('raw')
      })
    })
    await listen(app)
    const delivery = sign(thin('batch.failed'))
    const completed = store.next('complete')

    t.match(await send(app, delivery, '/own'), /^HTTP\/1\.1 202 [^]*raw$/)
    await completed
    t.match(await send(app, redelivered(delivery), '/own'), /"duplicate":true/)
    t.equal(runs(), 1)
  })

  t.test('may have been closed when the handler returns', async t => {
    const { app, runs, store } = await route(t, async (_request, reply) => {
      reply.hijack()
      const closed = new Promise(resolve => reply.raw.once('close', resolve))
      reply.raw.end('raw')
      await closed
    })
    await listen(app)
    const delivery = sign(thin('batch.failed'))
    const completed = store.next('complete')

    t.match(await send(app, delivery, '/own'), /^HTTP\/1\.1 200 [^]*raw/)
    await completed
    t.match(await send(app, redelivered(delivery), '/own'), /"duplicate":true/)
    t.equal(runs(), 1)
  })

  t.test('may be returned', async t => {
    const { app, runs, store } = await route(t, (_request, reply) => {
      reply.hijack().raw.end('raw')
      return reply
    })
    await listen(app)
    const delivery = sign(thin('batch.failed'))
    const completed = store.next('complete')

    t.match(await send(app, delivery, '/own'), /raw/)
    await completed
    t.match(await send(app, redelivered(delivery), '/own'), /"duplicate":true/)
    t.equal(runs(), 1)
  })

  t.test('counts though the handler throws after it', async t => {
    const { app, store, log } = await route(t, async (_request, reply) => {
      reply.hijack().raw.end('raw')
      throw new Error('after the answer')
    })
    await listen(app)
    const completed = store.next('complete')

    t.match(await send(app, sign(thin('batch.failed')), '/own'), /raw/)
    await completed
    t.ok(log.errors().some(({ err }) => err?.message === 'after the answer'))
  })

  t.test('that fails, or breaks off, lets the next delivery run', async t => {
    const endings: RouteHandlerMethod[] = [
      (_request, reply) => { reply.hijack().raw.writeHead(500).end() },
      (_request, reply) => { reply.hijack().raw.destroy() },
      (_request, reply) => {
        reply.hijack().raw.writeHead(200, { 'content-length': 10 })
        reply.raw.write('cut', () => reply.raw.destroy())
      },
      () => ({ done: true })
    ]
    const { app, runs, store } = await route(t, function (request, reply) { return endings.shift()!.call(this, request, reply) })
    await listen(app)
    const delivery = sign(thin('batch.failed'))
    const answers: string[] = []
    while (answers.length < 3) {
      const released = store.next('release')
      answers.push(await send(app, redelivered(delivery), '/own'))
      await released
    }

    t.match(answers[0], /^HTTP\/1\.1 500 /)
    t.equal(answers[1], '')
    t.match(answers[2], /cut$/)
    t.match(await send(app, redelivered(delivery), '/own'), /\{"done":true\}$/)
    t.equal(runs(), 4)
  })
})

t.test('two deliveries of a webhook-id at once', async t => {
  /** Delivers twice; the second comes while the handler of the first waits, and then `finish` has it go on. */
  async function both (app: FastifyInstance, finish: () => void): Promise<string[]> {
    const delivery = sign(thin('batch.failed'))
    const second = handled(app, 2)
    const answers = Promise.all([answer(app, delivery), answer(app, redelivered(delivery))])
    await second
    finish()
    return await answers
  }

  t.test('run the handler once, and both are answered', async t => {
    const { promise, resolve } = deferred()
    const { app, runs } = await route(t, async () => {
      await promise
      return { own: true }
    })
    t.same((await both(app, resolve)).sort(), ['200 {"own":true}', RECEIVED])
    t.equal(runs(), 1)
  })

  t.test('both come again when it failed', async t => {
    const { promise, resolve } = deferred()
    const { app, runs } = await route(t, async (_request, reply) => {
      await promise
      return reply.code(422).send('no')
    })
    const answers = (await both(app, resolve)).sort()
    t.equal(answers[0], '422 no')
    t.match(answers[1], /^500 .*FST_OPENAI_WEBHOOK_HANDLER_FAILED/)
    t.equal(runs(), 1)
  })
})

t.test('a handler that still runs at the deadline', async t => {
  interface Overdue extends Route {
    /** What the sender was told at the deadline. */
    refusal: string
    retry: () => Promise<string>
  }

  /** Delivers to a handler that goes on once the sender has its answer, and waits until its end is recorded. */
  async function overdue (t: Parameters<typeof build>[0], ending: RouteHandlerMethod): Promise<Overdue> {
    const refused = deferred()
    let first = true
    const own = await route(t, async function (request, reply) {
      if (!first) return { again: true }
      first = false
      await refused.promise
      return await ending.call(this, request, reply)
    }, { deadline: 20 })
    await listen(own.app) // its socket keeps the process alive until the deadline, whose timer does not
    const delivery = sign(thin('batch.failed'))
    const { statusCode, headers, body } = await post(own.app, delivery, '/own')
    const recorded = Promise.race([own.store.next('complete'), own.store.next('release')])
    refused.resolve()
    await recorded
    const refusal = `${statusCode} ${headers['retry-after']} ${(JSON.parse(body) as { code: string }).code}`
    return { ...own, refusal, retry: () => answer(own.app, redelivered(delivery)) }
  }
  const REFUSAL = '503 5 FST_OPENAI_WEBHOOK_DEADLINE'

  const endings: Record<string, RouteHandlerMethod> = {
    'returns nothing': async () => {},
    'returns a value': async () => ({ own: true }),
    'sends and returns nothing': async (_request, reply) => { reply.send({ own: true }) }
  }
  for (const [name, ending] of Object.entries(endings)) {
    t.test(`and then ${name} does not run again`, async t => {
      const { refusal, retry, runs } = await overdue(t, ending)
      t.equal(refusal, REFUSAL)
      t.equal(await retry(), DUPLICATE)
      t.equal(runs(), 1)
    })
  }

  t.test('and then throws is logged, and runs again', async t => {
    const { refusal, retry, runs, log } = await overdue(t, async () => { throw new Error('disk full') })
    t.equal(refusal, REFUSAL)
    t.equal(await retry(), '200 {"again":true}')
    t.equal(runs(), 2)
    t.ok(log.errors().some(({ msg, err }) => msg === 'an event handler failed' && err!.message.endsWith('disk full')))
  })

  t.test('and sends after having returned the reply does not run again', async t => {
    const { refusal, retry, runs } = await overdue(t, (_request, reply) => {
      setImmediate(() => reply.send('late'))
      return { then () {} } // stands for a callback: nothing but the reply tells of its end
    })
    t.equal(refusal, REFUSAL)
    t.equal(await retry(), DUPLICATE)
    t.equal(runs(), 1)
  })

  // By the handler, or by a hook of the app that has a time limit of its own, while an async hook holds the deadline's refusal.
  for (const by of ['itself', 'a hook of the app'] as const) {
    for (const held of by === 'itself' ? [undefined] : ['onSend', 'onError'] as const) {
      t.test(`and then has a failure sent by ${by}, held by ${held ?? 'nothing'}: it runs on, and not beside itself`, async t => {
        const [started, refusing, letGo, failed, end] = [deferred<{ reply: FastifyReply }>(), deferred(), deferred(), deferred(), deferred()]
        const { app, runs, log, store: { calls } } = await route(t, async (_request, reply) => {
          if (runs() > 1) return 'again'
          started.resolve({ reply })
          if (by === 'itself') {
            await refusing.promise
            reply.code(500).send('busy')
            failed.resolve()
          }
          await end.promise
        }, { deadline: 1_000 })
        if (held !== undefined) {
          app.addHook(held as 'onError', async () => {
            if (runs() > 1) return
            refusing.resolve()
            await letGo.promise
          })
        }
        await app.ready()
        const clock = stoppedClock(t)
        const delivery = sign(thin('batch.failed'))
        const first = answer(app, delivery)
        const { reply } = await started.promise
        clock.advance(1_000)
        if (by === 'itself') {
          await first
          refusing.resolve()
          await failed.promise
        } else {
          await refusing.promise
          reply.code(503).send('too slow')
          letGo.resolve()
        }
        t.match(await first, /^503 /)
        const joined = answer(app, redelivered(delivery))
        while (runs() === 1 && !log.lines.some(({ state }) => state === 'joined')) await tick()
        t.equal(runs(), 1)
        t.notOk(calls.includes('release'))
        end.resolve()
        t.match(await joined, /^500 .*HANDLER_FAILED/)
        t.equal(await answer(app, redelivered(delivery)), '200 again')
      })
    }
  }

  const swallowed: Record<string, RouteHandlerMethod> = {
    'and returns a value, for want of a return': async (_request, reply) => {
      reply.send(new Error('database down'))
      return { received: true }
    },
    'and sends 200 then': async (_request, reply) => {
      reply.code(500).send({})
      await tick()
      reply.code(200).send({})
    },
    'and sends a success then': async (_request, reply) => {
      reply.send(new Error('database down'))
      await tick()
      reply.send({ ok: true })
    }
  }
  for (const [name, ending] of Object.entries(swallowed)) {
    t.test(`and then sends a failure ${name}: the first counts`, async t => {
      const { refusal, retry, runs } = await overdue(t, ending)
      t.equal(refusal, REFUSAL)
      t.equal(await retry(), '200 {"again":true}')
      t.equal(runs(), 2)
    })
  }

  t.test('with its answer in an onSend hook is not answered for', async t => {
    const held = deferred()
    const sending = deferred()
    const { app, runs, store } = await route(t, async (_request, reply) => reply.send('own'), { deadline: 1_000 })
    app.addHook('onSend', async (_request, _reply, payload) => {
      sending.resolve()
      await held.promise
      return payload
    })
    await app.ready()
    const clock = stoppedClock(t)
    const delivery = sign(thin('batch.failed'))
    const answering = answer(app, delivery)
    await sending.promise
    clock.advance(1_000)
    held.resolve()

    t.equal(await answering, '200 own')
    t.same(store.calls, ['begin', 'complete'])
    t.equal(await answer(app, redelivered(delivery)), DUPLICATE)
    t.equal(runs(), 1)
  })

  const startings: Record<string, RouteHandlerMethod> = {
    'returns nothing': async () => {},
    'returns a value': async () => ({ own: true }),
    'sends, async': async (_request, reply) => reply.send({ own: true }),
    'sends, sync': (_request, reply) => { reply.send({ own: true }) }
  }
  for (const [name, handler] of Object.entries(startings)) {
    t.test(`because event handlers took so long, and then ${name}, does not run again`, async t => {
      const refused = deferred()
      const { store, calls, next } = watchedStore()
      const app = await build(t, { idempotency: { store }, deadline: 20 })
      let runs = 0
      app.openaiWebhook
        .on('batch.failed', async () => { await refused.promise })
        .route({
          url: '/own',
          handler (request, reply) {
            runs++
            return handler.call(this, request, reply)
          }
        })
      await listen(app)
      const delivery = sign(thin('batch.failed'))
      t.equal((await post(app, delivery, '/own')).statusCode, 503)
      const completed = next('complete')
      refused.resolve()
      await completed
      t.equal(await answer(app, redelivered(delivery)), DUPLICATE)
      t.equal(runs, 1)
      t.same(calls, ['begin', 'checkpoint #0', 'complete', 'begin'])
    })
  }

  t.test('is joined by the retry', async t => {
    const refused = deferred()
    const { app, runs } = await route(t, async () => { await refused.promise }, { deadline: 20 })
    const second = handled(app, 2)
    await listen(app)
    const delivery = sign(thin('batch.failed'))
    t.equal((await post(app, delivery, '/own')).statusCode, 503)
    const retried = answer(app, redelivered(delivery))
    await second
    refused.resolve()
    t.equal(await retried, RECEIVED)
    t.equal(runs(), 1)
  })
})

t.test('an event handler\'s success is on record before the route\'s own handler runs, however long that takes', async t => {
  const { store, calls } = watchedStore()
  const recording = deferred()
  const slow = {
    ...store,
    async checkpoint (key: string, token: string, handler: string) {
      await recording.promise
      await store.checkpoint(key, token, handler)
    }
  }
  const app = await build(t, { path: false, idempotency: { store: slow } })
  app.post('/own', { config: { openaiWebhook: { on: { 'batch.failed': () => { recording.resolve() } } } } }, async () => { calls.push('own handler') })
  t.equal(await answer(app), RECEIVED)
  t.same(calls, ['begin', 'checkpoint route#0', 'own handler', 'complete'])
})

t.test('how a route\'s own handler has failed is told, however it says so', async t => {
  const ways: Record<string, RouteHandlerMethod> = {
    throws: async () => { throw new Error('disk full') },
    'sends the error': async (_request, reply) => reply.send(new Error('disk full')),
    'returns the error': async () => new Error('disk full'),
    'sends a stream that fails at once': async (_request, reply) => reply.send(new Readable({ read () { this.destroy(new Error('disk full')) } }))
  }
  for (const [name, handler] of Object.entries(ways)) {
    const log = capturedLog()
    const app = await build(t, {}, { logger: log.logger, forceCloseConnections: true })
    const told = deferred<Error>()
    app.openaiWebhook.onError(error => { told.resolve(error) })
    app.post('/own', { config: { openaiWebhook: {} }, errorHandler: (_error, _request, reply) => { reply.code(500).send('no') } }, handler)
    await send(await listen(app), sign(thin('batch.failed')), '/own')
    t.match(await told.promise, { code: 'FST_OPENAI_WEBHOOK_HANDLER_FAILED', cause: { errors: [{ message: 'disk full' }] } }, name)
    t.ok(log.errors().some(({ err }) => /disk full/.test(JSON.stringify(err))), name)
  }
})
