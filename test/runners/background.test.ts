import t from 'tap'
import { background, memoryStore } from '../../lib/index.ts'
import type { BackgroundOptions, IdempotencyStore } from '../../lib/index.ts'
import { InProgress } from '../../lib/errors.ts'
import type { DeadDelivery, Job, RunnerHost } from '../../lib/runners/runner.ts'
import { build, post, sign, thin } from '../support/deliveries.ts'
import type { Signed } from '../support/deliveries.ts'
import { capturedLog, codeOf, deferred, redelivered } from '../support/observe.ts'
import type { Deferred } from '../support/observe.ts'

const RECEIVED = { received: true }
const DUPLICATE = { received: true, duplicate: true }

/** A delivery whose webhook-id says which one it is. */
function delivery (webhookId: string): Signed {
  return sign(thin('batch.failed'), { webhookId })
}

/** A handler that runs until it is told to end. It tells of each start. */
class Held {
  readonly #runs = new Map<string, Deferred<void>>()
  readonly #started = new Map<string, Deferred<void>>()
  /** The webhook-ids in the order in which their handlers were started. */
  readonly starts: string[] = []
  atOnce = 0
  mostAtOnce = 0

  readonly handler = async (_event: unknown, { webhookId }: { webhookId: string }): Promise<void> => {
    this.starts.push(webhookId)
    this.mostAtOnce = Math.max(this.mostAtOnce, ++this.atOnce)
    this.#of(this.#started, webhookId).resolve()
    await this.#of(this.#runs, webhookId).promise
    this.atOnce--
  }

  started (webhookId: string): Promise<void> {
    return this.#of(this.#started, webhookId).promise
  }

  end (...webhookIds: string[]): void {
    for (const webhookId of webhookIds) this.#of(this.#runs, webhookId).resolve()
  }

  #of (map: Map<string, Deferred<void>>, webhookId: string): Deferred<void> {
    let entry = map.get(webhookId)
    if (entry === undefined) map.set(webhookId, entry = deferred())
    return entry
  }
}

async function held (t: Parameters<typeof build>[0], options?: BackgroundOptions, store: IdempotencyStore = memoryStore()) {
  const log = capturedLog()
  const app = await build(t, { runner: background(options), idempotency: { store } }, { logger: log.logger })
  const handler = new Held()
  const told: Array<{ error: Error, info: object }> = []
  app.openaiWebhook.on('batch.failed', handler.handler).onError((error, info) => { told.push({ error, info }) })
  return { app, handler, told, log, send: async (webhookId: string) => await post(app, delivery(webhookId)) }
}

t.test('acknowledges before the handler has been started', async t => {
  const app = await build(t, { runner: background() })
  const order: string[] = []
  const ran = deferred()
  app.addHook('onSend', async () => { order.push('acknowledged') })
  app.openaiWebhook.on('batch.failed', () => {
    order.push('handled')
    ran.resolve()
  })
  const response = await post(app, delivery('wh_1'))
  t.equal(response.statusCode, 200)
  t.same(response.json(), RECEIVED)
  await ran.promise
  t.same(order, ['acknowledged', 'handled'])
})

t.test('acknowledges though the handler does not end', async t => {
  const { send, handler } = await held(t)
  t.equal((await send('wh_1')).statusCode, 200)
  await handler.started('wh_1')
  handler.end('wh_1')
})

t.test('runs as many deliveries at once as `concurrency` says, in the order in which they came', async t => {
  const { send, handler } = await held(t, { concurrency: 3 })
  const ids = Array.from({ length: 9 }, (_, n) => `wh_${n}`)
  for (const id of ids) t.equal((await send(id)).statusCode, 200)
  await handler.started('wh_2')
  t.same(handler.starts, ids.slice(0, 3))
  handler.end('wh_1')
  await handler.started('wh_3')
  t.same(handler.starts, ids.slice(0, 4))
  handler.end(...ids)
  await handler.started('wh_8')
  t.same(handler.starts, ids)
  t.equal(handler.mostAtOnce, 3)
})

t.test('a full queue', async t => {
  t.test('answers 503 and has room again when a delivery has been processed', async t => {
    const { app, send, handler, told } = await held(t, { concurrency: 1, maxQueue: 2 })
    for (const id of ['wh_1', 'wh_2', 'wh_3']) t.equal((await send(id)).statusCode, 200)
    const refused = delivery('wh_4')
    const response = await post(app, refused)
    t.equal(response.statusCode, 503)
    t.equal(response.headers['retry-after'], '5')
    t.equal(response.json().code, 'FST_OPENAI_WEBHOOK_OVERLOADED')
    t.match(told, [{ error: { code: 'FST_OPENAI_WEBHOOK_OVERLOADED' }, info: { webhookId: 'wh_4' } }])

    handler.end('wh_1')
    await handler.started('wh_2')
    t.equal((await post(app, redelivered(refused))).statusCode, 200)
    handler.end('wh_2', 'wh_3', 'wh_4')
    await handler.started('wh_4')
    t.same(handler.starts, ['wh_1', 'wh_2', 'wh_3', 'wh_4'])
  })

  t.test('may be no queue at all', async t => {
    const { send, handler } = await held(t, { concurrency: 2, maxQueue: 0 })
    t.same([(await send('wh_1')).statusCode, (await send('wh_2')).statusCode, (await send('wh_3')).statusCode], [200, 200, 503])
    handler.end('wh_1', 'wh_2')
  })

  t.test('acknowledges what is in it already', async t => {
    const { send, handler } = await held(t, { concurrency: 1, maxQueue: 1 })
    const answers: unknown[] = []
    for (const id of ['wh_running', 'wh_waiting', 'wh_running', 'wh_waiting']) {
      const response = await send(id)
      t.equal(response.statusCode, 200, id)
      answers.push(response.json())
    }
    t.same(answers, [RECEIVED, RECEIVED, DUPLICATE, DUPLICATE])
    t.equal((await send('wh_other')).statusCode, 503)
    handler.end('wh_running', 'wh_waiting')
    await handler.started('wh_waiting')
    t.same(handler.starts, ['wh_running', 'wh_waiting'])
  })
})

t.test('a webhook-id that comes again', async t => {
  t.test('is a duplicate while it waits, while it runs and afterwards', async t => {
    const store = memoryStore()
    const completed = deferred()
    const { send, handler } = await held(t, { concurrency: 1 }, {
      ...store,
      complete (...args) {
        store.complete(...args)
        if (args[0].endsWith('wh_2')) completed.resolve()
      }
    })
    t.same((await send('wh_1')).json(), RECEIVED)
    t.same((await send('wh_2')).json(), RECEIVED)
    t.same((await send('wh_2')).json(), DUPLICATE) // waits
    handler.end('wh_1')
    await handler.started('wh_2')
    t.same((await send('wh_2')).json(), DUPLICATE) // runs
    handler.end('wh_2')
    await completed.promise
    t.same((await send('wh_2')).json(), DUPLICATE)
    t.same(handler.starts, ['wh_1', 'wh_2'])
  })

  t.test('at another endpoint is another delivery', async t => {
    const { app, handler } = await held(t, { concurrency: 1 })
    app.openaiWebhook.route({ url: '/second' })
    t.equal((await post(app, delivery('wh_1'))).statusCode, 200)
    t.equal((await post(app, delivery('wh_1'), '/second')).statusCode, 200)
    await handler.started('wh_1')
    handler.end('wh_1')
    await app.close()
    t.same(handler.starts, ['wh_1', 'wh_1'])
  })
})

t.test('a handler that fails', async t => {
  t.test('is told as dead, and runs again when the webhook-id comes again, without what had succeeded', async t => {
    const log = capturedLog()
    const app = await build(t, { runner: background() }, { logger: log.logger })
    const runs: string[] = []
    let told = deferred<{ error: Error, info: object }>()
    let done = deferred()
    let fails = true
    app.openaiWebhook
      .on('batch.failed', () => { runs.push('succeeds') })
      .on('batch.failed', async () => {
        runs.push('fails')
        if (fails) throw new Error('the database is gone')
        done.resolve()
      })
      .onError((error, info) => { told.resolve({ error, info }) })
    const first = delivery('wh_1')
    t.same((await post(app, first)).json(), RECEIVED)
    t.match(await told.promise, {
      error: { code: 'FST_OPENAI_WEBHOOK_HANDLER_FAILED', cause: { errors: [{ message: 'the database is gone' }] } },
      info: { webhookId: 'wh_1', endpoint: '/webhooks/openai', event: { type: 'batch.failed' } }
    })
    const [line, ...others] = log.errors()
    t.same(others, [])
    t.match(line, { msg: 'webhook delivery is dead', attempt: 1, webhookId: 'wh_1', endpoint: '/webhooks/openai', eventType: 'batch.failed', err: { message: /the database is gone/ } })
    t.same(runs, ['succeeds', 'fails'])

    told = deferred()
    done = deferred()
    fails = false
    t.same((await post(app, redelivered(first))).json(), RECEIVED)
    await done.promise
    t.same(runs, ['succeeds', 'fails', 'fails'])
  })

  t.test('makes room for the next', async t => {
    const app = await build(t, { runner: background({ concurrency: 1 }) })
    const told: string[] = []
    const last = deferred()
    app.openaiWebhook
      .on('batch.failed', (_event, { webhookId }) => {
        if (webhookId === 'wh_last') return last.resolve()
        throw new Error(webhookId)
      })
      .onError(({ cause }) => { told.push(...(cause as AggregateError).errors.map(({ message }: Error) => message)) })
    for (const id of ['wh_1', 'wh_2', 'wh_last']) t.equal((await post(app, delivery(id))).statusCode, 200)
    await last.promise
    t.same(told, ['wh_1', 'wh_2'])
  })
})

t.test('a store that cannot be reached when the delivery is to be processed is told, and the next delivery of it runs', async t => {
  const store = memoryStore()
  const unreachable = new Error('ECONNREFUSED')
  let begun = 0
  const { app, handler, told } = await held(t, {}, {
    ...store,
    // For the request, then for the runner.
    begin (...args) {
      if (++begun === 2) throw unreachable
      return store.begin(...args)
    }
  })
  const reported = deferred()
  app.openaiWebhook.onError(() => { reported.resolve() })
  const first = delivery('wh_1')
  t.equal((await post(app, first)).statusCode, 200)
  await reported.promise
  t.match(told, [{ error: { code: 'FST_OPENAI_WEBHOOK_UNAVAILABLE', cause: unreachable }, info: { webhookId: 'wh_1' } }])
  t.same((await post(app, redelivered(first))).json(), RECEIVED)
  await handler.started('wh_1')
  handler.end('wh_1')
})

t.test('handlers get no request, and the rest of the context', async t => {
  const app = await build(t, { runner: background() })
  const seen = deferred<object>()
  app.openaiWebhook.on('batch.failed', (_event, context) => {
    const { webhookId, endpoint, timestamp, signal } = context
    seen.resolve({ request: 'request' in context, webhookId, endpoint, timestamp: typeof timestamp, aborted: signal.aborted, log: typeof context.log.info })
  })
  await post(app, delivery('wh_1'))
  t.same(await seen.promise, { request: false, webhookId: 'wh_1', endpoint: '/webhooks/openai', timestamp: 'number', aborted: false, log: 'function' })
})

t.test('a delivery that another process has', async t => {
  const job: Job = { webhookId: 'wh_1', timestamp: 1, endpoint: '/webhooks/openai', event: { type: 'batch.failed' } }

  async function attempted (outcomes: Array<Error | undefined>, attempt: (runner: ReturnType<typeof background>, left: number) => unknown = () => {}): Promise<string[]> {
    const runner = background()
    const heard: string[] = []
    const host: RunnerHost = {
      async process () {
        heard.push('attempt')
        const error = outcomes.shift()
        attempt(runner, outcomes.length)
        if (error !== undefined) throw error
      },
      report (error) { heard.push(`trouble ${codeOfError(error)}`) },
      dead (_delivery, error) { heard.push(`dead ${codeOfError(error)}`) }
    }
    await runner.start?.(host)
    await runner.run(job)
    while (outcomes.length > 0) await new Promise(resolve => setImmediate(resolve))
    await runner.close?.()
    return heard
  }
  const codeOfError = (error: unknown): string => (error as { code?: string }).code ?? (error as Error).message

  t.same(await attempted([new InProgress(), new InProgress(), undefined]), ['attempt', 'attempt', 'attempt'], 'is waited for')
  t.same(await attempted([new InProgress(), new Error('the handler failed')]), ['attempt', 'attempt', 'dead the handler failed'], 'fails here once it was given up there')
  t.same(await attempted([new InProgress(), new InProgress(), undefined], (runner, left) => { if (left === 1) runner.close?.() }),
    ['attempt', 'attempt', 'attempt'], 'is waited for where the app closes meanwhile too')

  const order: string[] = []
  const runner = background({ concurrency: 2 })
  await runner.start?.({
    async process ({ webhookId }) {
      order.push(webhookId)
      if (webhookId !== 'wh_other' && order.length < 12) throw new InProgress()
    },
    report () {}
  })
  for (const webhookId of ['wh_1', 'wh_2', 'wh_other']) await runner.run({ ...job, webhookId })
  t.equal(await runner.run(job), 'duplicate')
  while (order.length < 12) await new Promise(resolve => setImmediate(resolve))
  await runner.close?.()
  t.same(order.slice(0, 3), ['wh_1', 'wh_2', 'wh_other'], 'holds up no other')
})

t.test('closing', async t => {
  t.test('runs what is queued first', async t => {
    const { app, send, handler } = await held(t, { concurrency: 2 })
    const ids = Array.from({ length: 7 }, (_, n) => `wh_${n}`)
    for (const id of ids) t.equal((await send(id)).statusCode, 200)
    let closed = false
    const closing = app.close().then(() => { closed = true })
    handler.end(...ids.slice(0, 5))
    await handler.started('wh_6')
    t.equal(closed, false)
    handler.end(...ids)
    await closing
    t.same(handler.starts, ids)
    t.equal(handler.atOnce, 0)
  })

  t.test('takes no new jobs, and acknowledges those that it still has', async t => {
    const job = (webhookId: string): Job => ({ webhookId, timestamp: 1, endpoint: '/', event: { type: 'batch.failed' } })
    const runner = background({ concurrency: 1 })
    const handler = new Held()
    const host: RunnerHost = {
      async process ({ webhookId }) { await handler.handler(undefined, { webhookId }) },
      report (error) { t.fail(String(error)) }
    }
    await runner.start?.(host)
    runner.run(job('wh_running'))
    runner.run(job('wh_waiting'))
    const closed = runner.close?.()
    t.equal(await codeOf(() => runner.run(job('wh_new'))), 'OVERLOADED')
    t.equal(await codeOf(() => runner.run(job('wh_running'))), 'none')
    t.equal(await codeOf(() => runner.run(job('wh_waiting'))), 'none')
    handler.end('wh_running', 'wh_waiting')
    await closed
    t.equal(await codeOf(() => runner.run(job('wh_waiting'))), 'OVERLOADED')
    t.same(handler.starts, ['wh_running', 'wh_waiting'])
  })

  t.test('holds the app no longer than closeTimeout', async t => {
    const app = await build(t, { runner: background({ concurrency: 1 }), closeTimeout: 20 })
    const signal = deferred<AbortSignal>()
    app.openaiWebhook.on('batch.failed', async (_event, context) => {
      signal.resolve(context.signal)
      await new Promise(() => {})
    })
    await post(app, delivery('wh_1'))
    const { aborted } = await signal.promise
    await app.close()
    t.same([aborted, (await signal.promise).aborted], [false, true])
  })

  t.test('starts nothing once closeTimeout is over, and tells what is lost', async t => {
    const app = await build(t, { runner: background({ concurrency: 1 }), closeTimeout: 20 })
    const started: string[] = []
    const dead: DeadDelivery[] = []
    const errors: unknown[] = []
    app.openaiWebhook.onDead(delivery => { dead.push(delivery) }).onError(error => { errors.push(error) })
    let isClosed = false
    app.addHook('onClose', async () => { isClosed = true })
    const end = deferred()
    app.openaiWebhook.on('batch.failed', async (_event, { webhookId }) => {
      started.push(`${webhookId} ${isClosed}`)
      await end.promise
    })
    for (const id of ['wh_1', 'wh_2', 'wh_3']) t.equal((await post(app, delivery(id))).statusCode, 200)
    await app.close()
    t.match(dead, ['wh_2', 'wh_3'].map(webhookId => ({ webhookId, attempts: 0, errors: [{ handler: null, message: /^closeTimeout was over before the handlers could start/ }] })))
    t.equal(errors.length, 2)
    end.resolve()
    await new Promise(resolve => setImmediate(() => setImmediate(resolve)))
    t.same(started, ['wh_1 false'])
    t.equal(dead.length, 2)
  })

  t.test('a delivery whose turn has come as closeTimeout ends is not started either', async t => {
    const runner = background({ concurrency: 1 })
    const told: string[] = []
    await runner.start?.({
      process () { told.push('started') },
      report () { told.push('trouble') },
      dead ({ webhookId, attempts }) { told.push(`${webhookId} dead, ${attempts} attempts`) }
    })
    for (const webhookId of ['wh_1', 'wh_2']) await runner.run({ webhookId, timestamp: 1, endpoint: '/', event: { type: 'batch.failed' } })
    const abort = new AbortController()
    const closed = runner.close?.(abort.signal)
    abort.abort()
    await closed
    t.same(told, ['wh_2 dead, 0 attempts', 'wh_1 dead, 0 attempts'])
  })

  t.test('waits for what another delivery holds, and tells what is lost if that takes too long', async t => {
    for (const isOver of [false, true]) {
      const runner = background({ concurrency: 1 })
      const told: string[] = []
      const abort = new AbortController()
      let attempts = 0
      await runner.start?.({
        process () {
          if (attempts === 2 && isOver) abort.abort()
          if (++attempts <= 3) throw new InProgress()
          told.push('processed')
        },
        report () { told.push('trouble') },
        dead ({ webhookId, attempts }) { told.push(`${webhookId} dead, ${attempts} attempts`) }
      })
      await runner.run({ webhookId: 'wh_1', timestamp: 1, endpoint: '/', event: { type: 'batch.failed' } })
      await runner.close?.(abort.signal)
      t.same(told, [isOver ? 'wh_1 dead, 0 attempts' : 'processed'])
    }
  })

  t.test('a runner that is told late that closeTimeout is over starts nothing either', async t => {
    const runner = background({ concurrency: 1 })
    const end = deferred()
    const told: string[] = []
    await runner.start?.({
      async process ({ webhookId }) {
        told.push(`${webhookId} started`)
        await end.promise
      },
      report () { told.push('trouble') },
      dead ({ webhookId }) { told.push(`${webhookId} dead`) }
    })
    for (const webhookId of ['wh_1', 'wh_2']) await runner.run({ webhookId, timestamp: 1, endpoint: '/', event: { type: 'batch.failed' } })
    await new Promise(resolve => setImmediate(resolve))
    const closed = runner.close?.(AbortSignal.abort())
    end.resolve()
    await closed
    t.same(told, ['wh_1 started', 'wh_2 dead'])
  })

  t.test('with nothing to do, or before anything was started', async t => {
    const app = await build(t, { runner: background() })
    await app.ready()
    await app.close()
    await background().close?.()
  })
})

t.test('wrong options are refused', async t => {
  for (const [options, name, min] of [
    [{ concurrency: 0 }, 'concurrency', 1], [{ concurrency: 1.5 }, 'concurrency', 1], [{ concurrency: -1 }, 'concurrency', 1],
    [{ concurrency: Number.POSITIVE_INFINITY }, 'concurrency', 1], [{ maxQueue: -1 }, 'maxQueue', 0], [{ maxQueue: Number.NaN }, 'maxQueue', 0]
  ] as const) {
    t.throws(() => background(options), {
      code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS',
      message: `background: expected ${name} to be a whole number of deliveries, ${min} or more, got ${Object.values(options)[0]}`
    })
  }
  t.throws(() => background({ concurrency: '10' as unknown as number }), { message: 'background: expected concurrency to be a whole number of deliveries, 1 or more, got "10"' })
  t.throws(() => background({ maxQueue: null as unknown as number }), { message: 'background: expected maxQueue to be a whole number of deliveries, 0 or more, got null' })
  t.doesNotThrow(() => background({ concurrency: 1, maxQueue: 0 }))
})
