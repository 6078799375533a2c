import Fastify from 'fastify'
import t from 'tap'
import openaiWebhook, { channels, inline, memoryStore } from '../../lib/index.ts'
import type { Claim } from '../../lib/index.ts'
import { build, outcome, post, SECRET, sign, thin } from '../support/deliveries.ts'
import { closeTimeout, codeOf, drained, redelivered } from '../support/observe.ts'

// What a user's store or runner may answer.

const RECEIVED = '200 {"received":true}'

// An injected request keeps no socket open, and the timer of a deadline alone keeps no process alive.
const alive = setInterval(() => {}, 1_000)
t.teardown(() => clearInterval(alive))

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
        t.equal(await outcome(app, delivery), '503 UNAVAILABLE')
        t.equal(await outcome(app, redelivered(delivery)), '503 UNAVAILABLE')
        await drained(t, app)
      })
    }

    for (const method of ['checkpoint', 'complete', 'release'] as const) {
      t.test(`${name}: a store whose ${method}() answers with it loses no answer`, async t => {
        const app = await build(t, { idempotency: { store: { ...memoryStore(), [method]: make } }, deadline: 100, closeTimeout })
        app.openaiWebhook.on('batch.failed', () => { if (method === 'release') throw new Error('disk full') })
        app.openaiWebhook.onAny(() => {})
        t.equal(await outcome(app), method === 'release' ? '500 HANDLER_FAILED' : RECEIVED)
        await drained(t, app)
      })
    }
  }
})

t.test('a promise that has a `then` of its own is waited for all the same', async t => {
  type Callback = (value?: unknown) => unknown
  const thens: Record<string, (promise: Promise<unknown>) => (resolved: Callback, rejected?: Callback) => unknown> = {
    'one that throws': () => () => { throw new Error('no') },
    'one that never calls back': () => () => new Promise<never>(() => {}),
    'one that returns nothing': promise => (resolved, rejected) => { Promise.prototype.then.call(promise, resolved, rejected) },
    'one that calls back at once': () => resolved => { resolved() }
  }
  for (const [name, thenOf] of Object.entries(thens)) {
    const odd = <T>(value: T | Error): Promise<T> => {
      const promise = new Promise<T>((resolve, reject) => setImmediate(() => { if (value instanceof Error) reject(value); else resolve(value) }))
      return Object.assign(promise, { then: thenOf(promise) })
    }

    for (const others of [0, 1]) {
      t.test(`${name}: of the second handler of ${2 + others}, traced or not`, async t => {
        for (const traced of [false, true]) {
          const app = await build(t, { closeTimeout })
          if (traced) {
            const listener = (): void => {}
            channels.handler.asyncEnd.subscribe(listener)
            t.teardown(() => { channels.handler.asyncEnd.unsubscribe(listener) })
          }
          let runs = 0
          app.openaiWebhook.on('batch.failed', async () => {}) // an async one before, so that a promise is waited for already
          app.openaiWebhook.on('batch.failed', () => odd(++runs === 1 ? new Error('disk full') : undefined))
          if (others === 1) app.openaiWebhook.on('batch.failed', () => {})
          const delivery = sign(thin('batch.failed'))
          t.equal(await outcome(app, delivery), '500 HANDLER_FAILED')
          t.equal(await outcome(app, redelivered(delivery)), RECEIVED)
          t.equal(runs, 2)
          await drained(t, app)
        }
      })
    }

    t.test(`${name}: of the only handler`, async t => {
      const app = await build(t, { closeTimeout })
      let runs = 0
      app.openaiWebhook.on('batch.failed', () => odd(++runs === 1 ? new Error('disk full') : undefined))
      const delivery = sign(thin('batch.failed'))
      t.equal(await outcome(app, delivery), '500 HANDLER_FAILED')
      t.equal(await outcome(app, redelivered(delivery)), RECEIVED)
      await drained(t, app)
    })

    t.test(`${name}: of a route's own handler`, async t => {
      const app = await build(t, { closeTimeout })
      app.openaiWebhook.route({ url: '/own', handler: () => odd({ own: true }) })
      const { statusCode, body } = await post(app, sign(thin('batch.failed')), '/own')
      t.equal(`${statusCode} ${body}`, '200 {"own":true}')
      await drained(t, app)
    })

    t.test(`${name}: of a runner`, async t => {
      const app = await build(t, { runner: { run: () => odd(undefined) }, closeTimeout })
      t.equal(await outcome(app), RECEIVED)
      await drained(t, app)
    })

    for (const method of ['begin', 'checkpoint', 'complete', 'release'] as const) {
      t.test(`${name}: of a store's ${method}()`, async t => {
        const store = memoryStore()
        const app = await build(t, { idempotency: { store: { ...store, [method]: (...args: [never, never, never]) => odd((store[method] as (...args: unknown[]) => unknown)(...args)) } }, closeTimeout })
        app.openaiWebhook.on('batch.failed', () => { if (method === 'release') throw new Error('disk full') })
        app.openaiWebhook.onAny(() => {})
        t.equal(await outcome(app), method === 'release' ? '500 HANDLER_FAILED' : RECEIVED)
        await drained(t, app)
      })
    }
  }

  t.test('and one that cannot be waited for has failed', async t => {
    const app = await build(t, { closeTimeout })
    app.openaiWebhook.on('batch.failed', () => Object.defineProperty(Promise.resolve(), 'constructor', { get () { throw new Error('no') } }))
    t.equal(await outcome(app), '500 HANDLER_FAILED')
    await drained(t, app)
  })
})

t.test('what a runner rejects with is answered as an error, even if it is none', async t => {
  const noError: unknown = { code: 'FST_OPENAI_WEBHOOK_OVERLOADED', statusCode: 503 }
  const app = await build(t, { runner: { run: async () => { throw noError } } })
  t.equal(await outcome(app), '503 UNAVAILABLE')
})

t.test('a store that answers begin with what is no claim has failed', async t => {
  const answers: Record<string, unknown> = { nothing: undefined, null: null, 'a state of its own': { state: 'pending' }, 'a claim without `finished`': { state: 'claimed', token: 'a' } }
  for (const [name, claim] of Object.entries(answers)) {
    for (const begin of [() => claim as Claim, async () => claim as Claim]) {
      const app = await build(t, { idempotency: { store: { ...memoryStore(), begin } } })
      let runs = 0
      app.openaiWebhook.on('batch.failed', () => { runs++ })
      const delivery = sign(thin('batch.failed'))
      t.equal(await outcome(app, delivery), '503 UNAVAILABLE', name)
      t.equal(await outcome(app, redelivered(delivery)), '503 UNAVAILABLE', name)
      t.equal(runs, 0, name)
    }
  }
})

t.test('a runner serves one registration: a second one would have its deliveries handled by the first', async t => {
  const app = Fastify()
  t.teardown(() => app.close())
  const runner = inline()
  for (const path of ['/a', '/b']) {
    app.register(async scope => { await scope.register(openaiWebhook, { secret: SECRET, path, runner }) })
  }
  t.equal(await codeOf(() => app.ready()), 'INVALID_OPTIONS')

  t.test('and another once that has closed', async t => {
    const runner = inline()
    for (let i = 0; i < 2; i++) {
      const app = await build(t, { runner })
      t.equal(await outcome(app), RECEIVED)
      await app.close()
    }
  })
})
