import { once } from 'node:events'
import type { FastifyInstance } from 'fastify'
import t from 'tap'
import { background, inline, memoryStore } from '../../lib/index.ts'
import type { IdempotencyStore, OpenAIWebhookOptions } from '../../lib/index.ts'
import { build, post, sign, thin } from '../support/deliveries.ts'
import type { Signed } from '../support/deliveries.ts'
import { capturedLog, deferred, dial, head, listen, redelivered, send, watchedStore } from '../support/observe.ts'
import { spawnProgram } from '../support/program.mjs'

/** A closeTimeout that a test would not outlive: closing did not wait for it. */
const NEVER = 2 ** 30

const turn = async (): Promise<void> => await new Promise(resolve => setImmediate(resolve))

const statusOf = (answer: string): number => Number(answer.slice('HTTP/1.1 '.length, 'HTTP/1.1 200'.length))

t.test('a handler that never ends', async t => {
  t.test('is answered at the deadline, is not started again, and does not hold up others or the closing of the app', async t => {
    const app = await build(t, { deadline: 30, closeTimeout: 30 })
    const signals: AbortSignal[] = []
    app.openaiWebhook
      .on('batch.failed', async (_event, { signal }) => {
        signals.push(signal)
        await new Promise(() => {})
      })
      .on('batch.completed', async () => { await turn() })
    await listen(app)
    const delivery = sign(thin('batch.failed'))
    for (const attempt of [delivery, redelivered(delivery), redelivered(redelivered(delivery))]) {
      t.match(await send(app, attempt), /^HTTP\/1\.1 503 [^]*retry-after: 5\r\n[^]*FST_OPENAI_WEBHOOK_DEADLINE/)
    }
    t.equal(statusOf(await send(app, sign(thin('batch.completed')))), 200)
    t.equal(signals.length, 1)
    t.equal(signals[0]!.aborted, false)
    await app.close()
    t.equal(signals[0]!.aborted, true)
  })

  t.test('because what it returned never settles', async t => {
    const app = await build(t, { deadline: 30, closeTimeout: 30 })
    app.openaiWebhook.on('batch.failed', () => ({ then () {} }) as unknown as Promise<void>)
    await listen(app)
    t.match(await send(app, sign(thin('batch.failed'))), /^HTTP\/1\.1 503 [^]*FST_OPENAI_WEBHOOK_DEADLINE/)
    await app.close()
  })
})

t.test('a claim that a store has not made whole starts no handler', async t => {
  const claims = [undefined, null, {}, { state: 'taken' }, { state: 'claimed', finished: [] }, { state: 'claimed', token: 7, finished: [] }, { state: 'claimed', token: '1' }, { state: 'claimed', token: '1', finished: 'a' }]
  for (const claim of claims) {
    const app = await build(t, { idempotency: { store: { ...memoryStore(), begin: () => claim as never } } })
    let runs = 0
    app.openaiWebhook.on('batch.failed', () => { runs++ })
    t.match((await post(app, sign(thin('batch.failed')))).json(), { code: 'FST_OPENAI_WEBHOOK_UNAVAILABLE' })
    t.equal(runs, 0)
  }
})

t.test('a connection that is kept alive does not keep a closing app open', async t => {
  for (const [name, { url, ends, status }] of Object.entries({
    'a handler that never ends': { url: '/webhooks/openai', ends: false, status: 503 },
    'a handler that ends after closeTimeout': { url: '/webhooks/openai', ends: true, status: 200 },
    'a route\'s own handler that would start after closeTimeout': { url: '/own', ends: true, status: 503 }
  })) {
    const app = await build(t, { deadline: ends ? 4_500 : 100, closeTimeout: 10, path: '/webhooks/openai' })
    const started = deferred()
    const handler = async (_event: unknown, { signal }: { signal: AbortSignal }): Promise<void> => {
      started.resolve()
      await new Promise<void>(resolve => { if (ends) signal.addEventListener('abort', () => setTimeout(resolve, 20)) })
    }
    app.openaiWebhook.on('batch.failed', handler)
    let isOwnStarted = false
    app.openaiWebhook.route({ url: '/own', handler: async () => { isOwnStarted = true } })
    await listen(app)
    const delivery = sign(thin('batch.failed'))
    const { socket, received } = await dial(app)
    socket.write(head({ ...delivery, headers: { ...delivery.headers, connection: 'keep-alive' } }, url))
    socket.write(delivery.body)
    await started.promise
    await app.close()
    const answer = await received
    t.equal(statusOf(answer), status, name)
    t.match(answer, /\r\nconnection: close\r\n/i, name)
    t.notOk(isOwnStarted, 'the app has closed what it uses')
  }
})

/** What one handler makes of a delivery, and of its retry; beside it one that succeeds. */
async function outcome (t: Parameters<typeof build>[0], handler: () => unknown, options?: OpenAIWebhookOptions) {
  const log = capturedLog()
  const app = await build(t, { closeTimeout: NEVER, ...options }, { logger: log.logger })
  const told: Error[] = []
  let beside = 0
  app.openaiWebhook
    .on('batch.failed', handler as () => void)
    .on('batch.failed', () => { beside++ })
    .onError(error => { told.push(error) })
  const first = sign(thin('batch.failed'))
  const answers: string[] = []
  for (const delivery of [first, redelivered(first)]) {
    const { statusCode, body } = await post(app, delivery)
    const { code, duplicate } = JSON.parse(body) as { code?: string, duplicate?: boolean }
    answers.push([statusCode, code?.replace('FST_OPENAI_WEBHOOK_', '') ?? (duplicate === true ? 'duplicate' : '')].join(' ').trim())
  }
  await app.close()
  return { answers, told, beside, log }
}

const FAILED = ['500 HANDLER_FAILED', '500 HANDLER_FAILED']
const PROCESSED = ['200', '200 duplicate']

t.test('what a handler returns is waited for if it has a `then`, and settles once', async t => {
  type Settle = (value?: unknown) => void
  const returned: Record<string, { handler: () => unknown, answers: string[], fails?: string }> = {
    'resolves, then rejects': {
      handler: () => ({ then (resolve: Settle, reject: Settle) { resolve(); reject(new Error('late')) } }),
      answers: PROCESSED
    },
    'rejects, then resolves': {
      handler: () => ({ then (resolve: Settle, reject: Settle) { reject(new Error('first')); resolve() } }),
      answers: FAILED,
      fails: 'first'
    },
    'throws after it has resolved': {
      handler: () => ({ then (resolve: Settle) { resolve(); throw new Error('late') } }),
      answers: PROCESSED
    },
    'throws before it has settled': {
      handler: () => ({ then () { throw new Error('at once') } }),
      answers: FAILED,
      fails: 'at once'
    },
    'is resolved with one that rejects': {
      handler: () => ({ then (resolve: Settle) { resolve(Promise.reject(new Error('inner'))) } }),
      answers: FAILED,
      fails: 'inner'
    },
    'is a promise that is rejected a turn after it was resolved': {
      handler: async () => await new Promise<void>((resolve, reject) => {
        resolve()
        setImmediate(() => { reject(new Error('late')) })
      }),
      answers: PROCESSED
    },
    'is no thenable: its `then` is no function': { handler: () => ({ then: 'later' }), answers: PROCESSED },
    'is a value': { handler: () => false, answers: PROCESSED },
    'is a function': {
      handler: () => Object.assign(() => {}, { then (_resolve: Settle, reject: Settle) { reject(new Error('of a function')) } }),
      answers: FAILED,
      fails: 'of a function'
    },
    'cannot be read': {
      handler: () => ({ get then () { throw new Error('a getter') } }),
      answers: FAILED,
      fails: 'a getter'
    }
  }
  for (const [name, { handler, answers, fails }] of Object.entries(returned)) {
    const seen = await outcome(t, handler)
    t.same(seen.answers, answers, name)
    t.equal(seen.beside, 1, `${name}: the handler beside it ran once`)
    t.same(seen.told.map(({ cause }) => (cause as AggregateError).errors.map(({ message }: Error) => message)), fails === undefined ? [] : [[fails], [fails]], name)
  }
})

t.test('an error of any form is an error', async t => {
  const thrown: Record<string, () => unknown> = {
    'without a prototype': () => Object.create(null),
    'that says it is no answer of ours': () => Object.assign(new Error('forged'), { statusCode: 200, code: 'FST_OPENAI_WEBHOOK_OVERLOADED' }),
    'that cannot be turned into JSON': () => Object.assign(new Error('no JSON'), { toJSON () { throw new Error('toJSON') } }),
    'that is its own cause': () => {
      const error = new Error('a circle')
      error.cause = error
      return error
    },
    'of many errors': () => new AggregateError(Array.from({ length: 100 }, (_, n) => new Error(String(n)))),
    'that is frozen': () => Object.freeze(new Error('frozen')),
    'that is a revoked proxy': revoked,
    'whose message is no text': () => Object.assign(new Error(), { message: { text: 'x' } }),
    'with a field that cannot be read': () => unreadable('response', true),
    'that is a bigint': () => 1n,
    'that is a symbol': () => Symbol('thrown'),
    'that is a function': () => () => {}
  }
  for (const property of ['toString', 'name', 'message', 'stack', 'cause', 'code', 'statusCode']) thrown[`whose ${property} cannot be read`] = () => unreadable(property)
  for (const [name, error] of Object.entries(thrown)) {
    for (const [how, handler] of Object.entries({
      thrown: () => { throw error() },
      rejected: async () => { throw error() }
    })) {
      const { answers, told, beside, log } = await outcome(t, handler)
      t.same(answers, FAILED, `${name}, ${how}`)
      t.equal(beside, 1, `${name}, ${how}: the handler beside it ran once`)
      t.equal(told.length, 2, `${name}, ${how}: told`)
      t.ok(log.errors().length >= 2, `${name}, ${how}: logged`)
    }
  }
})

/** An error with a getter that throws. */
function unreadable (property: string, enumerable = false): Error {
  return Object.defineProperty(new Error('unreadable'), property, { enumerable, get () { throw new Error(`reading ${property}`) } })
}

function revoked (): object {
  const { proxy, revoke } = Proxy.revocable({}, {})
  revoke()
  return proxy
}

function raise (error: unknown): never {
  throw error
}

t.test('an error that cannot be read does no harm elsewhere', async t => {
  for (const [name, error] of Object.entries({ 'a frozen one': Object.freeze(new Error('frozen')), 'an unreadable one': unreadable('stack'), 'a revoked proxy': revoked() })) {
    t.test(`${name}: rejected by an onError handler`, async t => {
      const log = capturedLog()
      const app = await build(t, {}, { logger: log.logger })
      app.openaiWebhook
        .on('batch.failed', async () => { throw error })
        .onError(() => { raise(error) })
        .onError(async () => { raise(error) })
      t.equal((await post(app, sign(thin('batch.failed')))).json().code, 'FST_OPENAI_WEBHOOK_HANDLER_FAILED')
      await turn()
      t.equal(log.errors().filter(({ msg }) => msg === 'an onError handler failed').length, 2)
    })

    t.test(`${name}: thrown by a route's own handler, before and after its answer`, async t => {
      const app = await build(t)
      app.openaiWebhook.route({ url: '/before', handler: async () => { raise(error) } })
      app.openaiWebhook.route({
        url: '/after',
        async handler (_request, reply) {
          reply.send({ mine: true })
          raise(error)
        }
      })
      t.equal((await post(app, sign(thin('batch.failed')), '/before')).json().code, 'FST_OPENAI_WEBHOOK_HANDLER_FAILED')
      t.same((await post(app, sign(thin('batch.failed')), '/after')).json(), { mine: true })
    })

    t.test(`${name}: of a queue that cannot be reached`, async t => {
      const app = await build(t, { runner: { async run () { throw error } } })
      app.openaiWebhook.on('batch.failed', () => {})
      t.equal((await post(app, sign(thin('batch.failed')))).json().code, 'FST_OPENAI_WEBHOOK_UNAVAILABLE')
    })
  }
})

t.test('a huge error is neither answered nor logged at its length', async t => {
  const huge = (): Error => new Error('x'.repeat(50_000_000))
  for (const [name, handlers] of Object.entries<(app: FastifyInstance) => void>({
    'of an event handler': app => { app.openaiWebhook.on('batch.failed', async () => { throw huge() }) },
    'thrown as text': app => { app.openaiWebhook.on('batch.failed', () => raise(huge().message)) },
    'of an onError handler': app => {
      app.openaiWebhook.on('batch.failed', async () => { throw new Error('small') })
      app.openaiWebhook.onError(() => { throw huge() })
    }
  })) {
    let logged = 0
    const app = await build(t, {}, { logger: { level: 'info', stream: { write (line: string) { logged += line.length } } } })
    handlers(app)
    const { statusCode, body } = await post(app, sign(thin('batch.failed')))
    t.equal(statusCode, 500, name)
    t.ok(body.length < 500, `${name}: ${body.length} characters in the answer`)
    t.ok(logged > 0 && logged < 100_000, `${name}: ${logged} in the log`)
  }
})

t.test('what a handler left behind is the process\'s business, and does not change the answer', async t => {
  const program = `
    import Fastify from 'fastify'
    import openaiWebhook from 'fastify-openai-webhook'
    import { sign, testSecret } from 'fastify-openai-webhook/testing'
    const told = []
    const app = Fastify()
    await app.register(openaiWebhook, { secret: testSecret })
    app.openaiWebhook.on('batch.failed', async () => { Promise.reject(new Error('left behind')) })
    app.openaiWebhook.on('batch.failed', async () => { setImmediate(() => { throw new Error('thrown later') }) })
    app.openaiWebhook.onError(error => { told.push(error.message) })
    const body = JSON.stringify(${JSON.stringify(thin('batch.failed'))})
    const seen = []
    const both = new Promise(resolve => {
      process.on('unhandledRejection', ({ message }) => { seen.push('rejection: ' + message) })
      process.on('uncaughtException', ({ message }) => { seen.push('exception: ' + message); resolve() })
    })
    const { statusCode } = await app.inject({ method: 'POST', url: '/webhooks/openai', headers: sign(body), payload: body })
    await both
    await app.close()
    console.log(JSON.stringify({ statusCode, told, seen }))
  `
  const child = spawnProgram(['--input-type=module', '--eval', program], { stdio: ['ignore', 'pipe', 'inherit'] })
  let output = ''
  child.stdout.setEncoding('utf8').on('data', text => { output += String(text) })
  t.same(await once(child, 'close'), [0, null])
  t.same(JSON.parse(output), { statusCode: 200, told: [], seen: ['rejection: left behind', 'exception: thrown later'] })
})

t.test('a handler that keeps the event loop for itself for a while', async t => {
  const app = await build(t, { deadline: 1 })
  const order: string[] = []
  app.openaiWebhook
    .on('batch.failed', async () => {
      order.push('begins')
      await new Promise<void>(resolve => {
        let ticks = 300_000
        const next = (): void => { --ticks === 0 ? resolve() : process.nextTick(next) }
        process.nextTick(next)
      })
      order.push('ends')
    })
    .on('batch.completed', () => { order.push('another') })
  await listen(app)
  const [starving, starved] = await Promise.all([send(app, sign(thin('batch.failed'))), send(app, sign(thin('batch.completed')))])
  // No timer ran meanwhile, that of the deadline included.
  t.same([statusOf(starving), statusOf(starved)], [200, 200])
  t.match(order.join(), /begins,ends/)
  t.equal(order.length, 3)
})

t.test('an event that a handler changes', async t => {
  for (const [name, runner] of Object.entries({ 'inline()': inline, 'background()': background })) {
    t.test(`is changed for those that run after it, and is as it arrived when it comes again: ${name}`, async t => {
      const app = await build(t, { runner: runner() })
      const seen: unknown[] = []
      let failed = deferred()
      let again = deferred()
      app.openaiWebhook
        .on('batch.failed', event => {
          seen.push(JSON.parse(JSON.stringify(event)))
          const changeable = event as Partial<typeof event>
          delete changeable.data
          changeable.type = 'batch.completed' as 'batch.failed'
          changeable.id = 'evt_changed'
        })
        .on('batch.failed', event => {
          seen.push([event.id, event.data?.id])
          if (event.data === undefined) throw new Error('no data')
          again.resolve()
        })
        .onError(() => { failed.resolve() })
      const first = sign(thin('batch.failed', { id: 'batch_1' }))
      await post(app, first)
      await failed.promise
      t.same(seen.splice(0), [thin('batch.failed', { id: 'batch_1' }), ['evt_changed', undefined]])

      failed = deferred()
      again = deferred()
      t.equal((await post(app, redelivered(first))).statusCode, 200)
      await again.promise
      t.same(seen.splice(0), [['evt_1', 'batch_1']])
      if (runner === inline) t.same((await post(app, redelivered(first))).json(), { received: true, duplicate: true })
    })
  }
})

t.test('closing the app in a burst of 200 deliveries drops nothing that was accepted', async t => {
  for (const [name, options] of Object.entries<OpenAIWebhookOptions>({
    'inline()': {},
    'inline(), an asynchronous store': { idempotency: { store: asynchronous() } },
    'background()': { runner: background({ concurrency: 5, maxQueue: 60 }) },
    'background(), an asynchronous store': { runner: background({ concurrency: 5, maxQueue: 60 }), idempotency: { store: asynchronous() } }
  })) {
    t.test(name, async t => {
      const app = await build(t, { closeTimeout: NEVER, ...options })
      const started = deferred()
      const release = deferred()
      const ran = new Map<string, string[]>()
      let starts = 0
      const handler = async (label: string, webhookId: string): Promise<void> => {
        if (++starts === 10) started.resolve()
        await release.promise
        for (let turns = webhookId.length % 3 + starts % 5; turns > 0; turns--) await turn()
        ran.set(webhookId, [...ran.get(webhookId) ?? [], label])
      }
      app.openaiWebhook
        .on('batch.failed', async (_event, { webhookId }) => await handler('first', webhookId))
        .on('batch.failed', async (_event, { webhookId }) => await handler('second', webhookId))
      await listen(app)

      const deliveries = Array.from({ length: 200 }, (_, n) => sign(thin('batch.failed'), { webhookId: `wh_${n}` }))
      const half = await Promise.all(deliveries.slice(0, 50).map(async delivery => await cutShort(app, delivery)))
      const answers = deliveries.slice(50, 150).map(async delivery => await send(app, delivery))
      await started.promise
      const closed = app.close()
      answers.push(...deliveries.slice(150).map(async delivery => await send(app, delivery).catch(() => '')))
      for (const { finish } of half) finish()
      release.resolve()
      const statuses = (await Promise.all([...half.map(async ({ answer }) => await answer), ...answers])).map(statusOf)
      await closed

      const accepted = deliveries.filter((_, n) => statuses[n] === 200).map(({ headers }) => headers['webhook-id']!)
      t.ok(accepted.length >= 5, `${accepted.length} were answered 200`)
      t.ok(accepted.length < 200, `${200 - accepted.length} were not`)
      t.same([...ran.keys()].sort(), accepted.sort(), 'those and no others have been processed')
      t.ok([...ran.values()].every(labels => labels.length === 2 && labels[0] !== labels[1]), 'by both handlers, once each')
    })
  }
})

/** A memory store that takes its time. */
function asynchronous (): IdempotencyStore {
  const store = memoryStore()
  return {
    async begin (...args) { await turn(); return await store.begin(...args) },
    async checkpoint (...args) { await turn(); await store.checkpoint(...args) },
    async complete (...args) { await turn(); await store.complete(...args) },
    async extend (...args) { await turn(); return await store.extend(...args) },
    async release (...args) { await turn(); await store.release(...args) }
  }
}

/** Sends all but the end of a delivery. */
async function cutShort (app: FastifyInstance, delivery: Signed, url?: string) {
  const { socket, received } = await dial(app)
  const middle = delivery.body.length - 10
  await new Promise(resolve => socket.write(Buffer.concat([Buffer.from(head(delivery, url)), delivery.body.subarray(0, middle)]), resolve))
  return { socket, answer: received, finish () { socket.write(delivery.body.subarray(middle)) } }
}

t.test('a sender that goes away', async t => {
  /** Resolves when a connection has ended. */
  function gone (app: FastifyInstance): Promise<void> {
    const { promise, resolve } = deferred()
    app.addHook('onRequest', (request, _reply, done) => {
      request.raw.socket.once('close', () => { resolve() })
      done()
    })
    return promise
  }

  async function receiver (t: Parameters<typeof build>[0]) {
    const { store, calls, next } = watchedStore()
    const log = capturedLog()
    const app = await build(t, { closeTimeout: NEVER, idempotency: { store } }, { logger: log.logger })
    const started = deferred()
    const release = deferred()
    const ended: string[] = []
    async function handler (): Promise<void> {
      started.resolve()
      await release.promise
      ended.push('ended')
    }
    app.openaiWebhook.on('batch.failed', handler)
    app.openaiWebhook.route({ url: '/replies', handler: async () => await handler() })
    app.post('/marked', { config: { openaiWebhook: {} } }, async () => await handler())
    app.post('/dispatches', { config: { openaiWebhook: {} } }, app.openaiWebhook.handler)
    const aborted = gone(app)
    await listen(app)
    return { app, calls, next, log, started: started.promise, release: release.resolve, aborted, ended }
  }

  for (const url of ['/webhooks/openai', '/marked']) {
    t.test(`before its body has ended, at ${url}: nothing runs, and the retry is processed`, async t => {
      const { app, calls, aborted, ended, release, log } = await receiver(t)
      release()
      const delivery = sign(thin('batch.failed'))
      const { socket, answer } = await cutShort(app, delivery, url)
      socket.destroy()
      await aborted
      t.equal(await answer, '')
      t.same([calls, ended], [[], []])

      t.equal(statusOf(await send(app, redelivered(delivery), url)), 200)
      t.same(ended, ['ended'])
      t.same(log.errors(), [])
      await app.close()
    })
  }

  for (const [url, runs] of [['/webhooks/openai', 1], ['/dispatches', 1], ['/marked', 1], ['/replies', 2]] as const) {
    t.test(`before the answer, at ${url}: the handlers run to their end, and the retry is a duplicate`, async t => {
      const { app, calls, next, started, release, aborted, ended, log } = await receiver(t)
      const delivery = sign(thin('batch.failed'))
      const { socket, received } = await dial(app)
      socket.write(Buffer.concat([Buffer.from(head(delivery, url)), delivery.body]))
      await started
      socket.destroy()
      await aborted
      const settled = Promise.race([next('complete'), next('release')])
      release()
      await settled
      t.equal(calls.at(-1), 'complete')
      t.equal(await received, '')
      t.equal(ended.length, runs)

      t.match(await send(app, redelivered(delivery), url), /^HTTP\/1\.1 200 [^]*\{"received":true,"duplicate":true\}$/)
      t.equal(ended.length, runs)
      t.same(log.errors(), [])
      await app.close()
    })
  }

  t.test('and comes again while the handlers still run: it joins them', async t => {
    const { app, started, release, aborted, ended } = await receiver(t)
    const delivery = sign(thin('batch.failed'))
    const { socket } = await dial(app)
    socket.write(Buffer.concat([Buffer.from(head(delivery)), delivery.body]))
    await started
    socket.destroy()
    await aborted
    const retry = send(app, redelivered(delivery))
    release()
    t.equal(statusOf(await retry), 200)
    t.same(ended, ['ended'])
    await app.close()
  })

  t.test('hundreds of times leaves nothing behind', async t => {
    const app = await build(t, { closeTimeout: NEVER, idempotency: { store: memoryStore({ max: 10 }) } })
    let ended = 0
    const all = deferred()
    let atOnce = 0
    app.addHook('onRequest', (request, _reply, done) => {
      request.raw.socket.once('close', () => { if (++ended === 400) all.resolve() })
      done()
    })
    const release = deferred()
    app.openaiWebhook.on('batch.failed', async () => {
      atOnce++
      await release.promise
      atOnce--
    })
    await listen(app)
    for (let round = 0; round < 4; round++) {
      await Promise.all(Array.from({ length: 100 }, async (_, n) => {
        const delivery = sign(thin('batch.failed'))
        const { socket, finish } = await cutShort(app, delivery)
        // Half of them before the body has ended.
        if (n % 2 === 0) finish()
        setImmediate(() => socket.destroy())
      }))
    }
    await all.promise
    release.resolve()
    await app.close()
    t.equal(atOnce, 0)
  })
})
