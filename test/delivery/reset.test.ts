import { once } from 'node:events'
import { connect as connect2, constants } from 'node:http2'
import type { Http2ServerResponse } from 'node:http2'
import { PassThrough, Readable } from 'node:stream'
import Fastify from 'fastify'
import type { FastifyInstance, FastifyReply, FastifyRequest, FastifyServerOptions } from 'fastify'
import t from 'tap'
import type { Test } from 'tap'
import openaiWebhook from '../../lib/index.ts'
import type { OpenAIWebhookOptions } from '../../lib/index.ts'
import { SECRET, sign, thin } from '../support/deliveries.ts'
import type { Signed } from '../support/deliveries.ts'
import { until } from '../support/faults.ts'
import { capturedLog, deferred, dial, head, listen, redelivered, watchedStore } from '../support/observe.ts'

// A marked route's own handler whose sender does not wait for the answer: what the handler did counts, whatever has become
// of the response. An outcome that is never recorded keeps the delivery running: every retry of it would be answered 503.

type Protocol = 'HTTP/1.1' | 'HTTP/2'
const PROTOCOLS: Protocol[] = ['HTTP/1.1', 'HTTP/2']

type Teardown = { teardown: (fn: () => unknown) => void }

interface Sending {
  /** Resolves when the first bytes of the body of the answer are there. */
  begun: Promise<void>
  /** The answer as far as it came: its body, after its status where that came. */
  answer: Promise<string>
  reset: () => void
}

/** @param gone the sender has gone, and the server knows */
type Handler = (reply: FastifyReply, gone: Promise<void>, request: FastifyRequest) => unknown

interface Fixture {
  app: FastifyInstance
  send: (delivery: Signed) => Promise<Sending>
  runs: () => number
  /** How often the answer of each request has closed. */
  closes: readonly number[]
  /** How the store hears of the end of the first delivery's handler. */
  recorded: Promise<'complete' | 'release' | 'nothing'>
  /** Of the first delivery. */
  gone: Promise<void>
  started: Promise<void>
  /** Resolves when a sender has been refused, or could have been. */
  refused: Promise<void>
  codes: unknown[]
}

interface FixtureOptions extends OpenAIWebhookOptions {
  /** Whether the handler begins only once the sender has gone. */
  hold?: boolean
  errorHandler?: Parameters<FastifyInstance['setErrorHandler']>[0] | undefined
  prepare?: (app: FastifyInstance) => void
  /** The route's event handler. */
  on?: () => Promise<void>
}

async function fixture (t: Teardown, protocol: Protocol, handler: Handler, { hold = false, errorHandler, prepare, on, ...options }: FixtureOptions = {}): Promise<Fixture> {
  const { store, next } = watchedStore()
  const app = Fastify({ logger: capturedLog().logger, forceCloseConnections: true, ...(protocol === 'HTTP/2' && { http2: true }) } as FastifyServerOptions) as FastifyInstance
  t.teardown(() => app.close())
  const gone = deferred()
  const started = deferred()
  const refused = deferred()
  const codes: unknown[] = []
  const closes: number[] = []
  let runs = 0
  app.addHook('onRequest', (_request, { raw }, done) => {
    const nth = closes.push(0) - 1
    raw.on('close', () => {
      closes[nth]!++
      gone.resolve()
    })
    done()
  })
  app.addHook('preHandler', async () => {
    if (!hold || runs > 0) return
    started.resolve()
    await gone.promise
  })
  app.get('/slow', (_request, reply) => reply)
  app.get('/listeners', async ({ raw: { socket } }) => socket.listenerCount('close'))
  await app.register(openaiWebhook, { secret: SECRET, idempotency: { store }, ...options })
  if (errorHandler !== undefined) app.setErrorHandler(errorHandler)
  prepare?.(app)
  app.openaiWebhook.onError(error => {
    codes.push((error as { code?: unknown }).code)
    refused.resolve()
  })
  app.post('/own', { config: { openaiWebhook: on === undefined ? {} : { on: { 'batch.failed': on } } } }, function (request, reply) {
    if (++runs > 1) return { again: true }
    started.resolve()
    return handler(reply, gone.promise, request)
  })
  await listen(app)
  let timer: NodeJS.Timeout | undefined
  const recorded = Promise.race([
    next('complete').then(() => 'complete' as const),
    next('release').then(() => 'release' as const),
    new Promise<'nothing'>(resolve => { timer = setTimeout(resolve, 5_000, 'nothing') })
  ])
  t.teardown(() => clearTimeout(timer))
  const send = protocol === 'HTTP/2' ? await sender2(t, app) : sender1(app)
  return { app, send, runs: () => runs, closes, recorded, gone: gone.promise, started: started.promise, refused: refused.promise, codes }
}

function sender1 (app: FastifyInstance): Fixture['send'] {
  return async delivery => {
    const { socket, received } = await dial(app)
    socket.write(Buffer.concat([Buffer.from(head(delivery, '/own')), delivery.body]))
    const begun = once(socket, 'data').then(() => {})
    return {
      begun,
      answer: received.then(text => text.replace(/^HTTP\/1\.1 (\d+)[^]*?\r\n\r\n/, '$1 ')),
      reset () { socket.resetAndDestroy() }
    }
  }
}

async function sender2 (t: Teardown, app: FastifyInstance): Promise<Fixture['send']> {
  const session = connect2(`http://127.0.0.1:${(app.server.address() as { port: number }).port}`)
  t.teardown(() => session.destroy())
  await once(session, 'connect')
  return async ({ headers, body }) => {
    const stream = session.request({ ...headers, ':method': 'POST', ':path': '/own' })
    stream.end(body)
    let answer = ''
    stream.on('response', ({ ':status': status }) => { answer = `${status} ${answer}` })
    stream.setEncoding('utf8').on('data', text => { answer += text })
    stream.on('error', () => {})
    return {
      begun: once(stream, 'data').then(() => {}),
      answer: new Promise(resolve => stream.once('close', () => { resolve(answer) })),
      reset () { stream.close(constants.NGHTTP2_CANCEL) }
    }
  }
}

type Due = 'is a duplicate' | 'runs again'

/** The retry, which gets an answer at once, and the right one. */
async function retried (t: Test, { send, runs, closes, recorded, codes }: Fixture, delivery: Signed, due: Due): Promise<void> {
  t.equal(await recorded, due === 'is a duplicate' ? 'complete' : 'release')
  const { answer } = await send(redelivered(delivery))
  t.match(await answer, due === 'is a duplicate' ? /^200 .*\{"received":true,"duplicate":true\}/ : /^200 .*\{"again":true\}/)
  t.equal(runs(), due === 'is a duplicate' ? 1 : 2)
  t.notOk(codes.includes('FST_OPENAI_WEBHOOK_DEADLINE'))
  t.ok(closes.every(times => times <= 1))
}

const failing = (): Readable => new Readable({ read () { this.destroy(new Error('no upstream')) } })

/** What a handler may do once its sender has gone, or while it goes. */
const endings: Record<string, [Due, (reply: FastifyReply) => unknown]> = {
  'returns nothing': ['is a duplicate', () => {}],
  'returns a value': ['is a duplicate', () => ({ own: true })],
  'sends text': ['is a duplicate', reply => reply.send('own')],
  'returns the reply, and sends later': ['is a duplicate', reply => {
    setImmediate(() => reply.send('own'))
    return reply
  }],
  'returns the reply, and ends the raw answer later': ['is a duplicate', reply => {
    setImmediate(() => reply.raw.end('own'))
    return reply
  }],
  'returns the reply, and ends the raw answer of a failure later': ['runs again', reply => {
    setImmediate(() => reply.raw.writeHead(500).end('no'))
    return reply
  }],
  'sends a failure': ['runs again', reply => reply.code(422).send('no')],
  throws: ['runs again', () => { throw new Error('disk full') }],
  'throws an error with a status of its own': ['runs again', () => { throw Object.assign(new Error('teapot'), { statusCode: 418 }) }],
  'sends a stream': ['is a duplicate', reply => reply.send(Readable.from(['own']))],
  'sends a stream that has not ended': ['is a duplicate', reply => {
    const stream = new PassThrough()
    stream.write('own')
    return reply.send(stream)
  }],
  'sends a stream that fails when it is closed': ['is a duplicate', reply => (
    reply.send(new Readable({ read () { this.push('own') }, destroy (_error, done) { done(new Error('aborted')) } })))],
  'returns a Response': ['is a duplicate', () => new Response('own')],
  'returns a Response that is a failure': ['runs again', () => new Response('no', { status: 500 })],
  'sends a stream, and throws': ['runs again', reply => {
    reply.send(Readable.from(['own']))
    throw new Error('disk full')
  }],
  'hijacks, and ends the answer': ['is a duplicate', reply => { reply.hijack().raw.writeHead(202).end('raw') }],
  'hijacks, and ends it as a failure': ['runs again', reply => { reply.hijack().raw.writeHead(500).end('raw') }],
  'hijacks, and sets the status of a failure': ['runs again', reply => {
    reply.hijack().raw.statusCode = 503
    reply.raw.end()
  }],
  'hijacks, and leaves the answer open': ['runs again', reply => { reply.hijack() }],
  'hijacks, and throws': ['runs again', reply => {
    reply.hijack()
    throw new Error('disk full')
  }],
  'hijacks, ends the answer, and throws': ['runs again', reply => {
    reply.hijack().raw.end('raw')
    throw new Error('disk full')
  }],
  'writes the raw answer': ['is a duplicate', reply => { reply.raw.writeHead(200).end('raw') }],
  'writes the raw answer of a failure': ['runs again', reply => { reply.raw.writeHead(500).end('raw') }]
}

for (const protocol of PROTOCOLS) {
  for (const [name, [due, ending]] of Object.entries(endings)) {
    t.test(`${protocol}: a sender that has gone before the handler begins, which ${name}: the retry ${due}`, async t => {
      const own = await fixture(t, protocol, async reply => await ending(reply), { hold: true })
      const delivery = sign(thin('batch.failed'))
      const { reset } = await own.send(delivery)
      await own.started
      reset()
      await retried(t, own, delivery, due)
    })

    t.test(`${protocol}: a sender that goes while the handler runs, which then ${name}: the retry ${due}`, async t => {
      const own = await fixture(t, protocol, async (reply, gone) => {
        await gone
        return await ending(reply)
      })
      const delivery = sign(thin('batch.failed'))
      const { reset } = await own.send(delivery)
      await own.started
      reset()
      await retried(t, own, delivery, due)
    })
  }

  const cutOff: Record<string, [Due, Handler]> = {
    'a stream of which a part is out': ['is a duplicate', reply => {
      const source = new PassThrough()
      source.write('part')
      return reply.send(source)
    }],
    'a stream of which a part is out, before the handler throws': ['runs again', async (reply, gone) => {
      const source = new PassThrough()
      source.write('part')
      reply.send(source)
      await gone
      throw new Error('disk full')
    }],
    'a stream of which a part is out, before the handler returns': ['is a duplicate', async (reply, gone) => {
      const source = new PassThrough()
      source.write('part')
      reply.send(source)
      await gone
    }],
    'a raw answer that is never ended': ['runs again', reply => {
      reply.hijack().raw.writeHead(200)
      reply.raw.write('part')
    }],
    'a raw answer, before the handler ends it': ['is a duplicate', async (reply, gone) => {
      reply.hijack().raw.writeHead(200)
      reply.raw.write('part')
      await gone
      reply.raw.end('rest')
    }],
    'a raw answer, before the handler throws': ['runs again', async (reply, gone) => {
      reply.hijack().raw.writeHead(200)
      reply.raw.write('part')
      await gone
      throw new Error('disk full')
    }]
  }
  for (const [name, [due, handler]] of Object.entries(cutOff)) {
    t.test(`${protocol}: a sender that cuts off ${name}: the retry ${due}`, async t => {
      const own = await fixture(t, protocol, handler)
      const delivery = sign(thin('batch.failed'))
      const { begun, reset } = await own.send(delivery)
      await begun
      reset()
      await own.gone
      await retried(t, own, delivery, due)
    })
  }

  const waitedFor: Record<string, [Due, RegExp, Handler]> = {
    'a stream': ['is a duplicate', /^200 [^]*whole/, reply => reply.send(Readable.from(['whole']))],
    'a stream that fails': ['runs again', /^500 /, () => failing()],
    'a stream that fails half way': ['runs again', /^200 [^]*part/, reply => {
      const source = new PassThrough()
      source.write('part')
      setImmediate(() => source.destroy(new Error('no upstream')))
      return reply.send(source)
    }],
    'a web stream that fails half way': ['runs again', /^200 [^]*part/, reply => reply.send(new ReadableStream({
      start (controller) { controller.enqueue('part') },
      async pull () {
        await new Promise(resolve => setImmediate(resolve))
        throw new Error('no upstream')
      }
    }))],
    'a hijacked answer': ['is a duplicate', /^202 [^]*raw/, reply => { reply.hijack().raw.writeHead(202).end('raw') }],
    'a hijacked answer, and a handler that throws then': ['is a duplicate', /^200 [^]*raw/, async (reply, gone) => {
      reply.hijack().raw.end('raw')
      await gone
      throw new Error('after the answer')
    }],
    'a hijacked answer that closes before the handler returns': ['is a duplicate', /^200 [^]*raw/, async (reply, gone) => {
      reply.hijack().raw.end('raw')
      await gone
    }],
    'a hijacked answer that is a failure': ['runs again', /^500 /, reply => { reply.hijack().raw.writeHead(500).end() }],
    'a raw answer': ['is a duplicate', /^200 [^]*raw/, reply => { reply.raw.end('raw') }],
    'a response that the handler destroys': ['runs again', /^$/, reply => { reply.hijack().raw.destroy() }]
  }
  for (const [name, [due, expected, handler]] of Object.entries(waitedFor)) {
    t.test(`${protocol}: a sender that waits for ${name}: the retry ${due}`, async t => {
      const own = await fixture(t, protocol, handler)
      const delivery = sign(thin('batch.failed'))
      const { answer } = await own.send(delivery)
      t.match(await answer, expected)
      await retried(t, own, delivery, due)
    })
  }

  for (const [name, [due, ending]] of Object.entries({
    'returns nothing': endings['returns nothing'],
    'sends text': endings['sends text'],
    'sends a failure': endings['sends a failure'],
    throws: endings['throws']
  } as typeof endings)) {
    for (const handles of [false, true]) {
      t.test(`${protocol}: a sender that goes before the deadline, after which the handler ${name}${handles ? ', with an error handler of the app' : ''}: the retry ${due}`, async t => {
        const late = deferred()
        const own = await fixture(t, protocol, async reply => {
          await late.promise
          return await ending(reply)
        }, { deadline: 20, errorHandler: handles ? (error, _request, reply) => reply.code((error as { statusCode: number }).statusCode).send('handled') : undefined })
        const delivery = sign(thin('batch.failed'))
        const { reset } = await own.send(delivery)
        await own.started
        reset()
        await own.refused
        own.codes.length = 0
        late.resolve()
        await retried(t, own, delivery, due)
      })
    }
  }
}

/** What a handler may do with a response that is over. */
const pipings: Record<string, (reply: FastifyReply) => void> = {
  'pipes to the raw answer': ({ raw }) => { Readable.from(['a', 'b', 'c']).pipe(raw) },
  'writes the head, and pipes to the raw answer': ({ raw }) => {
    if (!raw.headersSent) raw.writeHead(200)
    Readable.from(['a', 'b', 'c']).pipe(raw)
  }
}

for (const protocol of PROTOCOLS) {
  for (const [name, act] of Object.entries(pipings)) {
    for (const isSync of [true, false]) {
      const kind = isSync ? 'a handler' : 'an async handler'
      const handler = (late: Promise<void>): Handler => {
        const start = (reply: FastifyReply): FastifyReply => {
          late.then(() => act(reply), () => {})
          return reply
        }
        return isSync ? start : async reply => await start(reply)
      }

      t.test(`${protocol}: ${kind} that returns the reply, and ${name} once the deadline's answer is out: the retry runs again`, async t => {
        const late = deferred()
        const own = await fixture(t, protocol, handler(late.promise), { deadline: 20 })
        const delivery = sign(thin('batch.failed'))
        const { answer } = await own.send(delivery)
        t.match(await answer, /^503 /)
        await own.refused
        own.codes.length = 0
        late.resolve()
        await retried(t, own, delivery, 'runs again')
      })

      t.test(`${protocol}: ${kind} that returns the reply, and ${name} once the sender has gone: the retry runs again`, async t => {
        const late = deferred()
        const own = await fixture(t, protocol, handler(late.promise))
        const delivery = sign(thin('batch.failed'))
        const { reset } = await own.send(delivery)
        await own.started
        reset()
        await own.gone
        late.resolve()
        await retried(t, own, delivery, 'runs again')
      })
    }
  }
}

for (const protocol of PROTOCOLS) {
  for (const [name, act] of Object.entries({ 'ends the raw answer': ({ raw }: FastifyReply): void => { raw.end('own') }, ...pipings })) {
    t.test(`${protocol}: a sender that has gone before the deadline, and a handler that starts after it, returns the reply, and ${name}: the retry runs again`, async t => {
      const [handling, handled] = [deferred(), deferred()]
      const own = await fixture(t, protocol, reply => {
        setImmediate(() => { act(reply) })
        return reply
      }, {
        deadline: 50,
        async on () {
          handling.resolve()
          await handled.promise
        }
      })
      const delivery = sign(thin('batch.failed'))
      const { reset } = await own.send(delivery)
      await handling.promise
      reset()
      await own.refused
      own.codes.length = 0
      handled.resolve()
      await retried(t, own, delivery, 'runs again')
    })
  }
}

/** As some hooks clean up. */
const cleaners: Record<string, (app: FastifyInstance) => void> = {
  'an onResponse hook': app => { app.addHook('onResponse', async (_request, { raw }) => { raw.destroy() }) },
  'a listener of its close': app => {
    app.addHook('onRequest', async (_request, { raw }) => { raw.on('close', () => raw.destroy()) })
  },
  'a listener of its socket\'s errors': app => {
    app.addHook('onRequest', async ({ raw: { socket } }, { raw }) => { socket.on('error', () => raw.destroy()) })
  }
}

/** How a handler may go on that is not told that its response is over. */
const lasting: Record<string, (late: Promise<void>) => Handler> = {
  'returns the reply, and sends later': late => reply => {
    late.then(() => reply.send('own'), () => {})
    return reply
  },
  'is async, and returns nothing': late => async () => await late,
  'is async, and returns a value': late => async () => {
    await late
    return 'own'
  }
}

for (const protocol of PROTOCOLS) {
  for (const [whose, clean] of Object.entries(cleaners)) {
    for (const [name, handler] of Object.entries(lasting)) {
      for (const isRefused of [true, false]) {
        t.test(`${protocol}: an answer that ${whose} destroys once ${isRefused ? 'the deadline\'s is out' : 'the sender has gone'} is not the end of a handler that ${name}: the retry is a duplicate`, async t => {
          const late = deferred()
          const own = await fixture(t, protocol, handler(late.promise), { prepare: clean, ...(isRefused && { deadline: 20 }) })
          const delivery = sign(thin('batch.failed'))
          const { answer, reset } = await own.send(delivery)
          await own.started
          if (isRefused) {
            t.match(await answer, /^503 /)
            await own.refused
            own.codes.length = 0
          } else {
            reset()
          }
          await own.gone
          await new Promise(resolve => setImmediate(resolve))
          late.resolve()
          await retried(t, own, delivery, 'is a duplicate')
        })
      }
    }
  }
}

for (const protocol of PROTOCOLS) {
  t.test(`${protocol}: a sender that goes while an onSend hook works, which then fails: the retry runs again`, async t => {
    const [sending, late] = [deferred(), deferred()]
    const own = await fixture(t, protocol, async reply => {
      reply.send({ own: true })
      await late.promise
    }, {
      prepare (app) {
        app.addHook('onSend', async () => {
          if (own.runs() > 1 || own.closes[0] !== 0) return
          sending.resolve()
          await own.gone
          throw new Error('the commit failed')
        })
      }
    })
    const delivery = sign(thin('batch.failed'))
    const { reset } = await own.send(delivery)
    await sending.promise
    reset()
    await own.gone
    await new Promise(resolve => setImmediate(resolve))
    late.resolve()
    await retried(t, own, delivery, 'runs again')
  })

  for (const hasBegun of [false, true]) {
    t.test(`${protocol}: a sender that goes while the handler pipes to the raw answer, which has ${hasBegun ? '' : 'not '}begun: the retry runs again`, async t => {
      const own = await fixture(t, protocol, reply => {
        const stream = new PassThrough()
        if (hasBegun) stream.write('own')
        stream.pipe(reply.raw)
        return reply
      })
      const delivery = sign(thin('batch.failed'))
      const { reset, begun } = await own.send(delivery)
      await own.started
      if (hasBegun) await begun
      reset()
      await retried(t, own, delivery, 'runs again')
    })
  }
}

for (const isPipelined of [false, true]) {
  t.test(`a response${isPipelined ? ', pipelined,' : ''} that the handler destroys as its connection breaks: the retry runs again`, async t => {
    const plain = await fixture(t, 'HTTP/1.1', (reply, _gone, request) => {
      request.raw.socket.destroy()
      reply.raw.destroy()
      return reply
    })
    const own = isPipelined ? pipelined(plain) : plain
    const delivery = sign(thin('batch.failed'))
    await own.send(delivery)
    await retried(t, own, delivery, 'runs again')
  })
}

for (const fails of [false, true]) {
  t.test(`a handler that starts while the deadline's refusal is streamed, which ${fails ? 'fails' : 'ends'} then: the retry is a duplicate`, async t => {
    const refusal = new Readable({ read () {} })
    const [late, over] = [deferred(), deferred()]
    const own = await fixture(t, 'HTTP/1.1', reply => {
      over.promise.then(() => reply.send('own'), () => {})
      return reply
    }, { deadline: 20, on: async () => { await late.promise }, errorHandler: (_error, _request, reply) => { reply.code(503).send(refusal) } })
    const delivery = sign(thin('batch.failed'))
    const { begun } = await own.send(delivery)
    refusal.push('no')
    await begun
    late.resolve()
    await own.started
    if (fails) refusal.destroy(new Error('no upstream'))
    else refusal.push(null)
    await own.gone
    own.codes.length = 0
    over.resolve()
    await retried(t, own, delivery, 'is a duplicate')
  })
}

/** Behind a request whose answer does not come: the response has no connection yet. */
function pipelined ({ app, send, ...own }: Fixture): Fixture {
  let isFirst = true
  return {
    ...own,
    app,
    async send (delivery) {
      if (!isFirst) return await send(delivery)
      isFirst = false
      const { socket, received } = await dial(app)
      socket.write(Buffer.concat([Buffer.from(`GET /slow HTTP/1.1\r\nhost: a\r\n\r\n${head(delivery, '/own')}`), delivery.body]))
      return { begun: received.then(() => {}), answer: received, reset () { socket.resetAndDestroy() } }
    }
  }
}

for (const [name, [due, ending]] of Object.entries(endings)) {
  for (const when of ['has ended', 'ends', 'begins'] as const) {
    t.test(`HTTP/1.1, pipelined: a connection that goes when the handler ${when}, which ${name}: the retry ${due}`, async t => {
      const own = pipelined(await fixture(t, 'HTTP/1.1', async (reply, gone) => {
        if (when === 'ends') await gone
        return await ending(reply)
      }, { hold: when === 'begins' }))
      const delivery = sign(thin('batch.failed'))
      const { reset } = await own.send(delivery)
      await own.started
      await new Promise(resolve => setImmediate(resolve))
      reset()
      await retried(t, own, delivery, due)
    })
  }
}

t.test('HTTP/1.1, pipelined: a connection that goes in the turn of an answer closes it once', async t => {
  const [turn, started, gone] = [deferred(), deferred(), deferred()]
  let closes = 0
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(openaiWebhook, { secret: SECRET, path: false })
  app.get('/first', async () => {
    await turn.promise
    return 'first'
  })
  const watch = (_request: FastifyRequest, { raw }: FastifyReply, done: () => void): void => {
    raw.on('close', () => {
      closes++
      gone.resolve()
    })
    done()
  }
  app.post('/own', { config: { openaiWebhook: {} }, onRequest: watch }, async () => {
    started.resolve()
    await gone.promise
    return 'own'
  })
  await listen(app)
  const { socket } = await dial(app)
  const delivery = sign(thin('batch.failed'))
  socket.write(Buffer.concat([Buffer.from(`GET /first HTTP/1.1\r\nhost: a\r\n\r\n${head(delivery, '/own')}`), delivery.body]))
  await started.promise
  turn.resolve()
  await once(socket, 'data')
  socket.resetAndDestroy()
  await gone.promise
  for (let turns = 0; turns < 3; turns++) await new Promise(resolve => setImmediate(resolve))
  t.equal(closes, 1)
})

t.test('HTTP/1.1, pipelined: a connection that lives on keeps nothing of its answers', async t => {
  const { app, runs } = await fixture(t, 'HTTP/1.1', async reply => await reply.send('own'))
  const { socket, received } = await dial(app)
  const listeners = 'GET /listeners HTTP/1.1\r\nhost: a\r\n\r\n'
  const deliveries = Array.from({ length: 5 }, () => sign(thin('batch.failed'))).flatMap(delivery => [Buffer.from(head(delivery, '/own').replace(/connection: close\r\n/i, '')), delivery.body])
  socket.write(Buffer.concat([Buffer.from(listeners), ...deliveries]))
  await until('all to run', () => runs() === 5)
  socket.end(listeners)
  const [before, after] = (await received).matchAll(/\r\n\r\n(\d+)/g)
  t.equal(after?.[1], before?.[1])
})

t.test('inject, as @fastify/aws-lambda has it', async t => {
  const answers: Record<string, [Due, number, Handler]> = {
    text: ['is a duplicate', 200, () => 'own'],
    'a stream': ['is a duplicate', 200, () => Readable.from(['a', 'b'])],
    'a stream that fails': ['runs again', 500, () => failing()],
    'a Response': ['is a duplicate', 200, () => new Response('own')],
    'a Response that is a failure': ['runs again', 503, () => new Response('no', { status: 503 })],
    'a Response with a status of its own': ['is a duplicate', 200, reply => {
      reply.code(502)
      return new Response('own', { status: 200 })
    }],
    'a hijacked answer': ['is a duplicate', 202, reply => { reply.hijack().raw.writeHead(202).end('raw') }],
    'a hijacked answer that is a failure': ['runs again', 500, reply => { reply.hijack().raw.writeHead(500).end('raw') }]
  }
  for (const [name, [due, status, handler]] of Object.entries(answers)) {
    for (const payloadAsStream of [false, true]) {
      t.test(`${name}${payloadAsStream ? ', read as a stream' : ''}: the retry ${due}`, async t => {
        const own = await fixture(t, 'HTTP/1.1', handler)
        const { headers, body } = sign(thin('batch.failed'))
        const answer = await own.app.inject({ method: 'POST', url: '/own', headers, payload: body, payloadAsStream })
        t.equal(answer.statusCode, status)
        await retried(t, own, { headers, body }, due)
      })
    }
  }
})

t.test('HTTP/2: an answer by the stream itself', async t => {
  for (const [status, due] of [[200, 'is a duplicate'], [500, 'runs again']] as const) {
    const own = await fixture(t, 'HTTP/2', reply => {
      const { stream } = reply.hijack().raw as unknown as Http2ServerResponse
      stream.respond({ ':status': status })
      stream.end('raw')
    })
    const delivery = sign(thin('batch.failed'))
    t.equal(await (await own.send(delivery)).answer, `${status} raw`)
    await retried(t, own, delivery, due)
  }
})
