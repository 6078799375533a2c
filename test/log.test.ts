import { createHash } from 'node:crypto'
import { Type } from '@sinclair/typebox'
import type { FastifyInstance } from 'fastify'
import Fastify from 'fastify'
import Database from 'libsql'
import t from 'tap'
import openaiWebhook, { background, memoryStore } from '../lib/index.ts'
import type { Verifier } from '../lib/index.ts'
import { durable } from '../lib/sqlite/index.ts'
import { SECRET, build, outcome, post, sign, thin } from './support/deliveries.ts'
import { ENDPOINT, NAMED, REFUSED, forged, quiet, said, valid, withText } from './support/log-lines.ts'
import { capturedLog, closeTimeout, deferred, drained, redelivered } from './support/observe.ts'

t.test('context.log names the delivery', async t => {
  const log = capturedLog()
  const app = await build(t, {}, { logger: log.logger })
  app.openaiWebhook.on('batch.failed', (_event, { log }) => { log.info('in a handler') })
  await post(app, valid())
  const [line] = withText(log.lines, 'in a handler')
  t.same(said(line!), { level: 30, msg: 'in a handler', ...NAMED })
  t.equal(line!['reqId'], log.lines[0]!['reqId'], 'a child of the request\'s log')
})

t.test('context.log has the attempt where a runner counts them', async t => {
  const log = capturedLog()
  const app = await build(t, { runner: durable(new Database(':memory:'), { backoff: 1 }) }, { logger: log.logger })
  const ended = deferred()
  let starts = 0
  app.openaiWebhook.on('batch.failed', (_event, { log }) => {
    log.info('in a handler')
    if (++starts === 1) throw new Error('the handler failed')
    ended.resolve()
  })
  await app.listen({ port: 0, host: '127.0.0.1' }) // keeps the process waiting for the second attempt
  await post(app, valid())
  await ended.promise
  await app.close()
  t.same(withText(log.lines, 'in a handler').map(said), [1, 2].map(attempt => ({ level: 30, msg: 'in a handler', ...NAMED, attempt })))
  const [processed] = withText(log.lines, 'processed')
  t.match(said(processed!), { level: 30, ...NAMED, attempt: 2, handlers: 1 })
})

t.test('a delivery that is processed is one line, with how long its handlers took', async t => {
  const log = capturedLog()
  const app = await build(t, {}, { logger: log.logger, ...quiet })
  let took = 0
  app.openaiWebhook.on('batch.failed', () => {}).on('batch.failed', async () => {
    const start = performance.now()
    await new Promise(resolve => setTimeout(resolve, 20))
    took = performance.now() - start
  })
  await app.ready()
  const sentAt = performance.now()
  await post(app, valid())
  const answeredAfter = performance.now() - sentAt
  const [line, ...others] = log.lines
  t.same(others, [])
  const { ms, ...fields } = said(line!) as { ms: number }
  t.same(fields, { level: 30, msg: 'webhook delivery processed', ...NAMED, handlers: 2 })
  t.ok(ms >= Math.floor(took) && ms <= Math.ceil(answeredAfter), `${ms} ms, of which the handler ${took}`)
})

t.test('above its level the line is not made', async t => {
  const log = capturedLog()
  const app = await build(t, {}, { logger: { ...log.logger as object, level: 'error' } })
  const delivery = valid()
  for (const sent of [delivery, redelivered(delivery), forged()]) await post(app, sent)
  t.same(log.lines, [])
})

t.test('a logger of the user\'s that cannot say its level is written to', async t => {
  const lines: Array<[level: string, message: string]> = []
  const logger = {
    ...Object.fromEntries(['fatal', 'error', 'warn', 'info', 'debug', 'trace', 'silent'].map(level => [level, (_fields: object, message: string) => { lines.push([level, message]) }])),
    level: 'info',
    child () { return this }
  }
  const app = Fastify({ loggerInstance: logger as never, ...quiet }) as unknown as FastifyInstance
  t.teardown(() => app.close())
  await app.register(openaiWebhook, { secret: SECRET })
  await post(app, valid())
  await post(app, forged())
  t.same(lines, [['info', 'webhook delivery processed'], ['warn', REFUSED]])
})

t.test('a delivery that comes out of a queue is on the app\'s log', async t => {
  const log = capturedLog()
  const app = await build(t, { runner: background() }, { logger: log.logger, ...quiet })
  app.openaiWebhook.on('batch.failed', () => {})
  await post(app, valid())
  await app.close()
  const [line] = log.lines
  t.match(said(line!), { level: 30, msg: 'webhook delivery processed', ...NAMED, handlers: 1, ms: Number })
  t.notOk('reqId' in line!)
})

t.test('a duplicate is one line, with where it had been seen', async t => {
  const log = capturedLog()
  const app = await build(t, {}, { logger: log.logger, ...quiet })
  const delivery = valid()
  await post(app, delivery)
  await post(app, redelivered(delivery))
  t.same(said(log.lines[1]!), { level: 30, msg: 'webhook delivery is a duplicate', ...NAMED, state: 'processed' })
})

t.test('what a command of ioredis was given is on no line, though its error has it', async t => {
  const log = capturedLog()
  const store = memoryStore()
  const failure = (): Error => Object.assign(new Error('WRONGPASS'), { command: { name: 'hello', args: ['3', 'AUTH', 'user', 'hunter2'] } })
  store.begin = () => { throw failure() }
  const app = await build(t, { idempotency: { store } }, { logger: log.logger })
  app.openaiWebhook.on('batch.failed', () => {
    const inOthers = Object.assign(new Error('EXECABORT'), { previousErrors: [failure()], lastNodeError: failure() })
    throw new AggregateError([failure(), Object.assign(inOthers, { self: inOthers })], 'no effect', { cause: failure() })
  })
  t.equal(await outcome(app, valid()), '503 UNAVAILABLE')
  store.begin = memoryStore().begin
  t.equal(await outcome(app, valid()), '500 HANDLER_FAILED')
  t.match(JSON.stringify(log.lines), /WRONGPASS.*no effect.*EXECABORT/)
  t.notMatch(JSON.stringify(log.lines), /hunter2/)
})

t.test('names that no schema bounds are cut, and left out where they are no text', async t => {
  const log = capturedLog()
  const app = await build(t, { events: { 'acme.long': Type.Object({ type: Type.String() }) } }, { logger: log.logger, ...quiet })
  await post(app, sign({ type: 'acme.long', id: 7 }))
  await post(app, sign({ type: `made.up.${'x'.repeat(1_000)}`, id: 'y'.repeat(1_000) }))
  const [first, second] = log.lines
  t.notOk('eventId' in first!)
  t.equal(second!['eventId'], 'y'.repeat(256))
  t.equal((second!['eventType'] as string).length, 256)
})

t.test('what a verifier or a schema of the user\'s makes long is cut', async t => {
  const long = 'x'.repeat(3_000)
  const log = capturedLog()
  let verify = (): { webhookId: string, timestamp: number } => ({ webhookId: long, timestamp: Math.floor(Date.now() / 1_000) })
  const app = await build(t, { verifier: (() => verify()) as Verifier, events: { [long]: Type.Object({ type: Type.Literal(long), data: Type.Object({}) }) } }, { logger: log.logger, ...quiet })
  await post(app, sign({ type: long }))
  verify = () => { throw Object.assign(new Error('no'), { code: long, statusCode: 401 }) }
  await post(app, sign({ type: long }))
  const [shape, code] = withText(log.lines, REFUSED)
  t.equal((shape!['webhookId'] as string).length, 256)
  t.equal((shape!['reason'] as string).length, 1_000)
  t.equal((code!['code'] as string).length, 256)
})

t.test('a mistake in a verifier of the user\'s is a line at error, and what it refuses on purpose is not', async t => {
  const log = capturedLog()
  let verify = (): unknown => undefined
  const app = await build(t, { verifier: (() => verify()) as Verifier }, { logger: log.logger, ...quiet })
  await app.ready()
  const faults: Array<[() => unknown, object]> = [
    [() => (undefined as unknown as string).length, { type: 'TypeError', message: /undefined/, stack: /log\.test\.ts/ }],
    [() => { throw new ReferenceError('secrte is not defined') }, { type: 'ReferenceError', message: 'secrte is not defined' }],
    [async () => ({ webhookId: 'wh_1', timestamp: Date.now() / 1000 }), { message: 'expected the verifier to return { webhookId, timestamp }, got a promise: a verifier answers at once' }],
    [() => {}, { message: 'expected the verifier to return { webhookId, timestamp }, got undefined' }],
    [() => null, { message: 'expected the verifier to return { webhookId, timestamp }, got null' }]
  ]
  for (const [fault, err] of faults) {
    verify = fault
    log.lines.length = 0
    t.equal(await outcome(app, valid()), '401 INVALID_SIGNATURE', 'the sender learns nothing of it')
    t.match(log.lines, [{ level: 50, msg: 'the verifier failed, and the delivery was refused', code: 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE', endpoint: ENDPOINT, err }])
    t.equal(log.lines.length, 1)
  }

  log.lines.length = 0
  await outcome(app, valid())
  t.same(log.lines, [], 'bounded: strangers may bring it about')
  verify = () => { throw new Error('no match') }
  await outcome(app, valid())
  t.match(log.lines, [{ level: 40, msg: REFUSED, code: 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE' }])
  log.lines.length = 0
  await app.close()
  t.match(log.lines, [{ code: 'VERIFIER_FAILED', suppressed: 1 }])
})

t.test('a delivery that handlers failed is one line at error, with what each of them threw', async t => {
  const log = capturedLog()
  const app = await build(t, {}, { logger: log.logger, ...quiet })
  app.openaiWebhook
    .on('batch.failed', () => { throw new TypeError('the first failed') })
    .on('batch.failed', async () => { throw new Error('the second failed') })
    .on('batch.failed', () => {})
  const answer = await post(app, valid())
  t.notMatch(answer.body, /the first failed/)
  const [line, ...others] = log.lines
  t.same(others, [], 'and not refused or processed on another one')
  t.match(line, {
    level: 50,
    msg: 'an event handler failed',
    ...NAMED,
    code: 'FST_OPENAI_WEBHOOK_HANDLER_FAILED',
    err: {
      type: 'AggregateError',
      message: '2 of 3 handlers failed: the first failed; the second failed',
      aggregateErrors: [{ type: 'TypeError', message: 'the first failed', stack: /log\.test\.ts/ }, { type: 'Error', message: 'the second failed' }]
    }
  })
})

t.test('a store that fails is one line at error, with why', async t => {
  const log = capturedLog()
  const app = await build(t, { idempotency: { store: { ...memoryStore(), begin () { throw new Error('connect ECONNREFUSED') } } } }, { logger: log.logger, ...quiet })
  await post(app, valid())
  t.equal(log.lines.length, 1)
  t.match(log.lines[0], { level: 50, code: 'FST_OPENAI_WEBHOOK_UNAVAILABLE', ...NAMED, err: { type: 'Error', message: 'connect ECONNREFUSED' } })
})

t.test('what is thrown is cut where it is huge, and replaced where it cannot be read', async t => {
  const HUGE = 'x'.repeat(1_000_000)
  const unreadable = Object.defineProperty(new Error(), 'message', { get () { throw new Error('a getter that throws') } })
  const named = Object.assign(new RangeError(HUGE), { name: 'AcmeError' })
  const circular = new Error('round')
  const chain = (length: number): Error => new Error('deep', length === 0 ? {} : { cause: chain(length - 1) })
  const stackless = Object.assign(new Error('no stack'), { stack: undefined })
  for (const [name, thrown, expected] of [
    ['an error', named, { type: 'Error', message: 'x'.repeat(10_000) }],
    ['an error with a huge stack', Object.assign(new Error('short'), { stack: HUGE }), { message: 'short', stack: 'x'.repeat(10_000) }],
    ['an error with a huge cause', new Error('short', { cause: new Error(HUGE, { cause: 'small' }) }), { message: `short: ${'x'.repeat(10_000)}` }],
    ['an error with causes without end', chain(1_000), { message: /^(?:deep: ){5}deep$/ }],
    ['an error that is its own cause', Object.assign(circular, { cause: circular }), { message: /^round/ }],
    ['an error without a stack', stackless, { message: 'no stack' }],
    ['a text', HUGE, 'x'.repeat(10_000)],
    ['an object', { reason: 'not an error' }, { reason: 'not an error' }],
    ['an error that cannot be read', unreadable, { message: 'an error that cannot be read' }]
  ] as const) {
    const log = capturedLog()
    const app = await build(t, {}, { logger: log.logger })
    app.openaiWebhook.onAny(() => { throw new Error('the handler failed') }).onError(() => { throw thrown })
    t.equal((await post(app, valid())).statusCode, 500)
    const [line] = withText(log.lines, 'an onError handler failed')
    t.match(line!.err, expected, name)
    t.ok(JSON.stringify(line).length < 50_000, name)
  }
})

t.test('what an app redacts stays out, and its serializers are asked', async t => {
  const log = capturedLog()
  const hashed = (value: unknown): string => createHash('sha256').update(String(value)).digest('hex').slice(0, 8)
  const app = Fastify({
    ...quiet,
    logger: { ...log.logger as object, redact: ['eventId', 'err.stack'], serializers: { endpoint: (value: unknown) => `at ${String(value)}` } }
  }) as unknown as FastifyInstance
  t.teardown(() => app.close())
  await app.register(async scope => {
    await scope.register(openaiWebhook, { secret: SECRET })
    scope.openaiWebhook.on('batch.failed', (_event, { log }) => { log.info('in a handler') })
  }, { logSerializers: { webhookId: hashed } })
  await post(app, valid())
  const fields = { ...NAMED, eventId: '[Redacted]', webhookId: hashed('wh_1'), endpoint: `at ${ENDPOINT}` }
  t.same(said(log.lines[0]!), { level: 30, msg: 'in a handler', ...fields })
  t.match(said(log.lines[1]!), { msg: 'webhook delivery processed', ...fields })
})

t.test('the logLevel of a scope cuts the lines of its routes, and those of no other', async t => {
  const log = capturedLog()
  const app = Fastify({ logger: log.logger }) as unknown as FastifyInstance
  t.teardown(() => app.close())
  await app.register(async scope => await scope.register(openaiWebhook, { secret: SECRET }), { logLevel: 'error' })
  app.post('/other', () => ({}))
  await post(app, valid())
  await post(app, forged())
  t.same(log.lines, [])
  await post(app, valid(), '/other')
  t.same(log.lines.map(({ msg }) => msg), ['incoming request', 'request completed'])
})

t.test('logLevel and logSerializers of the registration are for the plugin\'s own route', async t => {
  const log = capturedLog()
  const app = Fastify({ logger: log.logger }) as unknown as FastifyInstance
  t.teardown(() => app.close())
  await app.register(openaiWebhook, { secret: SECRET, prefix: '/v1', logLevel: 'warn', logSerializers: { endpoint: () => 'serialized' } })
  await post(app, forged(), '/v1/webhooks/openai')
  t.match(log.lines, [{ level: 40, msg: REFUSED, endpoint: 'serialized', code: 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE', statusCode: 401 }])
  t.equal(log.lines.length, 1)
})

t.test('Fastify\'s own line about an error is there once, whatever error handler there is', async t => {
  const OWN = 'an error handler of the app\'s'
  for (const [when, handled] of [['none', []], ['before', [OWN]], ['after', [OWN]]] as const) {
    const log = capturedLog()
    const app = Fastify({ logger: log.logger }) as unknown as FastifyInstance
    t.teardown(() => app.close())
    const setErrorHandler = (): void => {
      app.setErrorHandler((error, request, reply) => {
        request.log.info(OWN)
        reply.send(error)
      })
    }
    if (when === 'before') setErrorHandler()
    await app.register(openaiWebhook, { secret: SECRET })
    if (when === 'after') setErrorHandler()
    await post(app, forged())
    t.same(log.lines.map(({ msg }) => msg), ['incoming request', REFUSED, ...handled, 'no signature matches the body and the signing secret', 'request completed'], when)
  }
})

t.test('a line that cannot be written fails no delivery', async t => {
  for (const kind of ['sync', 'async']) {
    t.test(`${kind} store`, async t => {
      const { logger } = capturedLog()
      const hooks = {
        logMethod (this: object, args: unknown[], method: (...args: unknown[]) => void): void {
          if (args.some(arg => typeof arg === 'string' && arg.startsWith('webhook delivery'))) throw new Error('ENOSPC')
          method.apply(this, args)
        }
      }
      const store = memoryStore()
      const begin: typeof store.begin = (...args) => kind === 'sync' ? store.begin(...args) : Promise.resolve(store.begin(...args))
      const app = await build(t, { idempotency: { store: { ...store, begin } }, deadline: 100, closeTimeout }, { logger: { ...(logger as object), hooks } as never })
      app.openaiWebhook.on('batch.failed', () => {})
      const delivery = sign(thin('batch.failed'))
      t.equal(await outcome(app, delivery), '200 {"received":true}')
      t.equal(await outcome(app, redelivered(delivery)), '200 {"received":true,"duplicate":true}')
      t.equal(await outcome(app, { ...delivery, body: Buffer.from('{}') }), '401 INVALID_SIGNATURE')
      await drained(t, app)
    })
  }
})
