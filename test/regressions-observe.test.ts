import { AsyncLocalStorage } from 'node:async_hooks'
import { Readable } from 'node:stream'
import { Kind, Type, TypeRegistry } from '@sinclair/typebox'
import type { TSchema } from '@sinclair/typebox'
import Fastify from 'fastify'
import type { FastifyBaseLogger, FastifyInstance, RequestPayload } from 'fastify'
import t from 'tap'
import openaiWebhook, { background, memoryStore } from '../lib/index.ts'
import type { Job, RunnerHost } from '../lib/index.ts'
import { channels } from '../lib/channels.ts'
import { RefusalLog } from '../lib/log.ts'
import { build, post, SECRET, sign, thin } from './support/deliveries.ts'
import type { Signed } from './support/deliveries.ts'
import { capturedLog, codeOf, deferred, handled, redelivered } from './support/observe.ts'

// What was found by attacking the pipeline where it is fast, and where it is observed.

const RECEIVED = '200 {"received":true}'
const DUPLICATE = '200 {"received":true,"duplicate":true}'
const marked = { config: { openaiWebhook: {} } }

type Tap = typeof t

/** The status, with the code of a refusal or else the body. */
async function answer (app: FastifyInstance, delivery = sign(thin('batch.failed')), url = '/webhooks/openai'): Promise<string> {
  const { statusCode, body } = await post(app, delivery, url)
  const code = /"code":"(?:FST_OPENAI_WEBHOOK_)?(\w+)"/.exec(body)?.[1]
  return `${statusCode} ${code ?? body}`
}

// An injected request keeps no socket open, and the timer of a deadline alone keeps no process alive.
const alive = setInterval(() => {}, 1_000)
t.teardown(() => clearInterval(alive))

const closeTimeout = 2_000

/** Closes the app, which has nothing left to wait for. */
async function drain (t: Pick<Tap, 'ok'>, app: FastifyInstance): Promise<void> {
  const startedAt = performance.now()
  await app.close()
  t.ok(performance.now() - startedAt < closeTimeout / 2, 'drained')
}

t.test('what has a `then` and is no promise', async t => {
  const thenables: Record<string, () => unknown> = {
    'a getter that throws': () => ({ get then () { throw new Error('no') } }),
    'a method that throws': () => ({ then () { throw new Error('no') } }),
    'a method that returns nothing': () => ({ then (_resolve: unknown, reject: (error: Error) => void) { setImmediate(reject, new Error('no')) } })
  }
  for (const [name, make] of Object.entries(thenables)) {
    for (const begin of ['sync', 'async']) {
      t.test(`${name}: a runner that answers with it after an ${begin} begin() has failed, and the retry does not hang`, async t => {
        const store = memoryStore()
        const app = await build(t, {
          idempotency: { store: { ...store, begin: (...args) => begin === 'sync' ? store.begin(...args) : Promise.resolve(store.begin(...args)) } },
          runner: { run: () => make() as Promise<void> },
          deadline: 100,
          closeTimeout
        })
        const delivery = sign(thin('batch.failed'))
        t.equal(await answer(app, delivery), '503 UNAVAILABLE')
        t.equal(await answer(app, redelivered(delivery)), '503 UNAVAILABLE')
        await drain(t, app)
      })
    }

    for (const method of ['checkpoint', 'complete', 'release'] as const) {
      t.test(`${name}: a store whose ${method}() answers with it loses no answer`, async t => {
        const app = await build(t, { idempotency: { store: { ...memoryStore(), [method]: make } }, deadline: 100, closeTimeout })
        app.openaiWebhook.on('batch.failed', () => { if (method === 'release') throw new Error('disk full') })
        app.openaiWebhook.onAny(() => {})
        t.equal(await answer(app), method === 'release' ? '500 HANDLER_FAILED' : RECEIVED)
        await drain(t, app)
      })
    }
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
      t.equal(await answer(app, delivery), RECEIVED)
      t.equal(await answer(app, redelivered(delivery)), DUPLICATE)
      t.equal(await answer(app, { ...delivery, body: Buffer.from('{}') }), '401 INVALID_SIGNATURE')
      await drain(t, app)
    })
  }

  t.test('nor the process, at the end of a window of refusals', async t => {
    const log = { isLevelEnabled: () => true, warn () { throw new Error('ENOSPC') } } as unknown as FastifyBaseLogger
    const refusals = new RefusalLog(log)
    for (let i = 0; i < 6; i++) refusals.write(log, 'CODE', 401, { endpoint: '/' })
    t.doesNotThrow(() => refusals.flush())
  })
})

t.test('whatever `around` does, the traced work runs, once, and its end is the answer', async t => {
  const arounds: Record<string, (work: () => unknown) => unknown> = {
    'calls nothing': () => {},
    'throws before': () => { throw new Error('tracer') },
    'throws after': work => {
      work()
      throw new Error('tracer')
    },
    'calls twice': work => {
      work()
      return work()
    },
    'returns nothing': work => { work() }
  }
  for (const [name, around] of Object.entries(arounds)) {
    for (const channel of ['enqueue', 'delivery', 'handler'] as const) {
      t.test(`${name}: ${channel}`, async t => {
        const nothing = (): void => {}
        const subscribers = { start (message: object) { Object.assign(message, { around }) }, end: nothing, asyncStart: nothing, asyncEnd: nothing, error: nothing }
        const traced = channels[channel] as typeof channels.handler
        traced.subscribe(subscribers)
        t.teardown(() => { traced.unsubscribe(subscribers) })
        const app = await build(t, { deadline: 100, closeTimeout, ...(channel === 'enqueue' && { runner: background() }) })
        let runs = 0
        app.openaiWebhook.on('batch.failed', async () => {
          await null
          if (++runs === 1 && channel !== 'enqueue') throw new Error('disk full')
        })
        const delivery = sign(thin('batch.failed'))
        if (channel !== 'enqueue') t.equal(await answer(app, delivery), '500 HANDLER_FAILED')
        t.equal(await answer(app, redelivered(delivery)), RECEIVED)
        await drain(t, app)
        t.equal(runs, channel === 'enqueue' ? 1 : 2)
      })
    }
  }
})

t.test('a body that an earlier preParsing hook has put in place of the request\'s', async t => {
  /** An app whose bodies come in the chunks that `rechunk` makes of them, of a length that nobody declares. */
  async function rechunked (t: Parameters<typeof build>[0], rechunk: (body: Buffer) => unknown[]): Promise<FastifyInstance> {
    const app = Fastify()
    t.teardown(() => app.close())
    app.addHook('preParsing', async (request, _reply, payload) => {
      const chunks: Buffer[] = []
      for await (const chunk of payload) chunks.push(chunk as Buffer)
      delete request.headers['content-length']
      request.headers['transfer-encoding'] = 'chunked'
      return Readable.from(rechunk(Buffer.concat(chunks))) as RequestPayload
    })
    await app.register(openaiWebhook, { secret: SECRET })
    app.post('/own', marked, async () => ({ received: true }))
    return app
  }
  for (const url of ['/webhooks/openai', '/own']) {
    t.test(`${url}: is taken as Uint8Arrays, in one piece and in several`, async t => {
      const one = await rechunked(t, body => [new Uint8Array(body)])
      t.equal(await answer(one, undefined, url), RECEIVED)
      const two = await rechunked(t, body => [new Uint8Array(body.subarray(0, 9)), new Uint8Array(body.subarray(9))])
      t.equal(await answer(two, undefined, url), RECEIVED)
    })

    t.test(`${url}: is refused where its chunks are something else, and does not end the process`, async t => {
      for (const chunks of [[{ a: 1 }, { b: 2 }], [[1], [2]], [5]]) {
        const app = await rechunked(t, () => chunks)
        t.match(await answer(app, undefined, url), /^500 /)
      }
    })
  }
})

t.test('a delivery is not told or answered in the async context of another', async t => {
  const context = new AsyncLocalStorage<string>()

  /** Delivers both, the second while the first waits; what each request's onSend hook finds in its context. */
  async function contextsOf (app: FastifyInstance, first: Signed, second: Signed, both: () => void = () => {}): Promise<Array<string | undefined>> {
    const found: Array<string | undefined> = []
    app.addHook('onSend', async ({ headers }) => { found[Number(headers['x-nth'])] = context.getStore() })
    const nth = ({ headers, body }: Signed, n: number): Signed => ({ body, headers: { ...headers, 'x-nth': String(n) } })
    const bothHandled = handled(app, 2)
    const one = context.run('first', () => answer(app, nth(first, 0)))
    const two = context.run('second', () => answer(app, nth(second, 1)))
    await bothHandled
    both()
    await Promise.all([one, two])
    return found
  }

  t.test('at the deadline', async t => {
    const app = Fastify()
    t.teardown(() => app.close())
    await app.register(openaiWebhook, { secret: SECRET, deadline: 20 })
    const end = deferred()
    const told: unknown[] = []
    app.openaiWebhook.on('batch.failed', () => end.promise)
    app.openaiWebhook.onError(() => { told.push(context.getStore()) })
    const [, second] = await contextsOf(app, sign(thin('batch.failed')), sign(thin('batch.failed')))
    t.not(second, 'first')
    t.equal(told.length, 2)
    t.not(told[1], 'first')
    end.resolve()
  })

  t.test('as it joins another', async t => {
    const app = Fastify()
    t.teardown(() => app.close())
    await app.register(openaiWebhook, { secret: SECRET })
    const end = deferred()
    app.openaiWebhook.on('batch.failed', () => end.promise)
    const delivery = sign(thin('batch.failed'))
    const found = await contextsOf(app, delivery, redelivered(delivery), end.resolve)
    t.same(found, ['first', 'second'])
  })

  t.test('as its claim is renewed', async t => {
    const app = Fastify()
    t.teardown(() => app.close())
    const renewed = deferred<unknown>()
    const store = { ...memoryStore(), extend: () => { renewed.resolve(context.getStore()); return true } }
    await app.register(openaiWebhook, { secret: SECRET, idempotency: { store, lease: 30 } })
    app.openaiWebhook.on('batch.failed', async () => { await renewed.promise })
    t.equal(await context.run('first', () => answer(app)), RECEIVED)
    t.equal(await renewed.promise, undefined)
  })
})

t.test('a refusal by an app\'s hook is told, though its code is a number', async t => {
  const { lines, logger } = capturedLog()
  const app = await build(t, {}, { logger })
  app.addHook('preValidation', async () => { throw Object.assign(new Error('duplicate key'), { code: 11000 }) })
  const told: unknown[] = []
  app.openaiWebhook.onError((error: Error & { code?: unknown }) => { told.push(error.code) })
  t.equal(await answer(app), '500 11000')
  t.same(told, [11000])
  t.equal(lines.find(({ msg }) => msg === 'webhook delivery refused')?.['code'], '11000')
})

t.test('refusals are counted under their own code, however many others there are', async t => {
  const lines: Array<{ code: string, endpoint?: string, suppressed?: number }> = []
  const log = { isLevelEnabled: () => true, warn: (line: typeof lines[number]) => { lines.push(line) } } as unknown as FastifyBaseLogger
  const refusals = new RefusalLog(log)
  const write = (code: string, endpoint: string): void => refusals.write(log, code, 401, { endpoint })
  for (let i = 0; i < 10; i++) write('FIRST', '/a')
  for (let i = 0; i < 5_000; i++) write(`CODE_${i}`, `/${i}`)
  for (let i = 0; i < 10; i++) write('FIRST', '/a')
  refusals.flush()
  const counted = lines.filter(({ suppressed }) => suppressed !== undefined)
  t.match(counted, [{ code: 'FIRST', endpoint: '/a', suppressed: 15 }, { code: 'others', endpoint: undefined, suppressed: 4_796 }])
  t.equal(counted.length, 2)
})

t.test('what a queue adds to a job is not taken for a part of the messages about it', async t => {
  const ended: Array<{ error?: unknown }> = []
  const nothing = (): void => {}
  const subscribers = { start: nothing, end: nothing, asyncStart: nothing, asyncEnd (message: { error?: unknown }) { ended.push(message) }, error: nothing }
  channels.delivery.subscribe(subscribers)
  t.teardown(() => { channels.delivery.unsubscribe(subscribers) })
  let host: RunnerHost | undefined
  const app = await build(t, { runner: { start (startedBy) { host = startedBy }, run () {} } })
  let runs = 0
  app.openaiWebhook.on('batch.failed', () => { runs++ })
  await app.ready()
  const job: Job = { webhookId: 'wh_1', timestamp: 1, endpoint: '/webhooks/openai', event: thin('batch.failed') }
  await host?.process({ ...job, error: 'the last attempt\'s', around: 'the clock' } as Job)
  t.equal(runs, 1)
  t.equal(ended.length, 1)
  t.equal(ended[0]?.error, undefined)
})

t.test('a schema that throws as it is checked fails the delivery, and no other', async t => {
  let thrown: unknown
  TypeRegistry.Set('Throwing', () => { throw thrown })
  t.teardown(() => { TypeRegistry.Delete('Throwing') })
  const schema = Type.Object({ type: Type.Literal('own.event'), data: { [Kind]: 'Throwing' } as unknown as TSchema })
  const app = await build(t, { events: { 'own.event': schema } })
  app.post('/own', { config: { openaiWebhook: {} } }, async () => ({}))
  const told: unknown[] = []
  let runs = 0
  app.openaiWebhook.onAny(() => { runs++ }).onError(error => { told.push('cause' in error ? error.cause : error) })
  const delivered: object = { webhookId: 'wh_1', timestamp: 1, event: thin('batch.failed') }
  for (const url of ['/webhooks/openai', '/own']) {
    const deliver = async (event: object): Promise<number> => {
      const { headers, body } = sign(event)
      return (await app.inject({ method: 'POST', url, headers, payload: body })).statusCode
    }
    for (thrown of [new Error('no way to tell'), 'a text', null, delivered]) {
      t.equal(await deliver({ ...thin('batch.failed'), type: 'own.event' }), 500, `${url} ${String(thrown)}`)
      t.equal(told.pop(), thrown)
    }
    t.equal(runs, 0)
    t.equal(await deliver(thin('batch.failed')), 200, url)
    runs = 0
  }
})

t.test('a schema that TypeBox cannot compile is a coded error at boot, with its event type', async t => {
  const schemas: Record<string, TSchema> = {
    'an unknown kind': Type.Object({ data: { [Kind]: 'Nope' } as unknown as TSchema }),
    'a reference to nothing': Type.Ref('nope')
  }
  for (const [name, schema] of Object.entries(schemas)) {
    const app = Fastify()
    app.register(openaiWebhook, { secret: SECRET, events: { 'own.event': schema } })
    let message = ''
    t.equal(await codeOf(async () => {
      await app.ready().then(undefined, (error: Error) => {
        message = error.message
        throw error
      })
    }), 'INVALID_OPTIONS', name)
    t.match(message, 'events["own.event"]')
    await app.close()
  }
})
