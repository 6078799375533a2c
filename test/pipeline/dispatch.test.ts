import Fastify from 'fastify'
import t from 'tap'
import openaiWebhook from '../../lib/index.ts'
import type { EventContext, FailureInfo } from '../../lib/index.ts'
import { build, post, sign, SECRET, thin } from '../support/deliveries.ts'
import { capturedLog, deferred, handled, redelivered, watchedStore } from '../support/observe.ts'

const RECEIVED = '{"received":true}'
const DUPLICATE = '{"received":true,"duplicate":true}'

/** An app whose store, log and onError are watched. */
async function watched (t: Parameters<typeof build>[0]) {
  const log = capturedLog()
  const { store, calls } = watchedStore()
  const app = await build(t, { idempotency: { store } }, { logger: log.logger })
  const told: Array<{ error: Error & { code?: string }, info: FailureInfo }> = []
  app.openaiWebhook.onError((error, info) => { told.push({ error, info }) })
  return { app, calls, told, log }
}

t.test('an event that nobody handles is acknowledged', async t => {
  const app = await build(t)
  for (const type of ['batch.failed', 'comet.landed']) {
    const { statusCode, headers, body } = await post(app, sign(thin(type)))
    t.same([statusCode, headers['content-type'], body], [200, 'application/json; charset=utf-8', RECEIVED], type)
  }
})

t.test('a webhook-id is processed once', async t => {
  const { app, calls } = await watched(t)
  const seen: string[] = []
  app.openaiWebhook.on('batch.failed', event => { seen.push(event.data.id) })
  const delivery = sign(thin('batch.failed'))

  t.equal((await post(app, delivery)).body, RECEIVED)
  t.equal((await post(app, delivery)).body, DUPLICATE)
  t.equal((await post(app, redelivered(delivery))).body, DUPLICATE)
  t.equal((await post(app, sign(thin('batch.failed')))).body, RECEIVED, 'another webhook-id is another delivery')
  t.same(seen, ['res_1', 'res_1'])
  t.same(calls, ['begin', 'complete', 'begin', 'begin', 'begin', 'complete'])
})

t.test('handlers run beside each other, and the answer waits for all', async t => {
  const app = await build(t)
  const order: string[] = []
  const second = deferred()
  app.openaiWebhook
    .on('batch.failed', async () => {
      order.push('first starts')
      await second.promise
      order.push('first ends')
    })
    .on('batch.failed', async () => {
      order.push('second starts')
      await null
      order.push('second ends')
      second.resolve()
    })
    .on('batch.failed', () => { order.push('third, sync') })

  t.equal((await post(app, sign(thin('batch.failed')))).body, RECEIVED)
  t.same(order, ['first starts', 'second starts', 'third, sync', 'second ends', 'first ends'])
})

t.test('handlers of several kinds succeed together', async t => {
  const { app, calls } = await watched(t)
  const seen: string[] = []
  const thenable = (name: string) => (): Promise<void> => ({
    then (resolve: () => void) {
      setImmediate(() => {
        seen.push(name)
        resolve()
      })
    }
  }) as Promise<void>
  app.openaiWebhook
    .on('batch.failed', thenable('thenable'))
    .on('batch.failed', () => { seen.push('sync') })
    .on('batch.failed', async () => { seen.push('async') })
    .on('batch.failed', (() => 'a value') as () => void)

  t.equal((await post(app, sign(thin('batch.failed')))).body, RECEIVED)
  t.same(seen, ['sync', 'async', 'thenable'])
  // The last success completes the delivery, and needs no checkpoint.
  t.same(calls, ['begin', 'checkpoint #1', 'checkpoint #3', 'checkpoint #2', 'complete'])
})

t.test('a failure', async t => {
  t.test('is answered without its text, told to onError with every error, and logged', async t => {
    const { app, told, log } = await watched(t)
    app.openaiWebhook
      .on('batch.failed', () => { throw new Error('secret: disk full') })
      .on('batch.failed', async () => { throw new TypeError('secret: no such table') })
      .on('batch.failed', () => {})
    const delivery = sign(thin('batch.failed'))
    const { statusCode, headers, body } = await post(app, delivery)

    t.equal(statusCode, 500)
    t.equal(headers['retry-after'], undefined)
    t.same(JSON.parse(body), {
      statusCode: 500, code: 'FST_OPENAI_WEBHOOK_HANDLER_FAILED', error: 'Internal Server Error', message: 'an event handler failed'
    })
    t.equal(told.length, 1)
    const { error, info } = told[0]!
    t.equal(error.code, 'FST_OPENAI_WEBHOOK_HANDLER_FAILED')
    t.same(info, { endpoint: '/webhooks/openai', webhookId: delivery.headers['webhook-id'], event: thin('batch.failed') })
    const cause = error.cause as AggregateError
    t.type(cause, AggregateError)
    t.match(cause.message, /^2 of 3 handlers failed/)
    t.same(cause.errors.map(({ message }: Error) => message), ['secret: disk full', 'secret: no such table'])
    const lines = log.errors().filter(({ err }) => err?.aggregateErrors !== undefined)
    t.equal(lines.length, 1)
    t.match(lines[0], { endpoint: '/webhooks/openai', webhookId: delivery.headers['webhook-id'], eventType: 'batch.failed', msg: 'an event handler failed' })
    t.same(lines[0]!.err!.aggregateErrors!.map(({ message }) => message), ['secret: disk full', 'secret: no such table'])
  })

  t.test('is retried with the handlers that have not succeeded, and no others', async t => {
    const { app, calls } = await watched(t)
    const seen: string[] = []
    const broken = new Set(['sync broken', 'async broken'])
    const run = (name: string): void => {
      seen.push(name)
      if (broken.has(name)) throw new Error(name)
    }
    app.openaiWebhook
      .on('batch.failed', () => run('sync broken'))
      .on('batch.failed', () => run('sync'))
      .on('batch.failed', async () => run('async broken'))
      .on('batch.*', async () => run('async'), { name: 'ledger' })
      .onAny(() => run('any'))
    const delivery = sign(thin('batch.failed'))

    t.equal((await post(app, delivery)).statusCode, 500)
    t.same(seen.splice(0), ['any', 'sync broken', 'sync', 'async broken', 'async'])
    t.same(calls.splice(0), ['begin', 'checkpoint #4', 'checkpoint #1', 'checkpoint ledger', 'release'])

    broken.delete('async broken')
    t.equal((await post(app, redelivered(delivery))).statusCode, 500)
    t.same(seen.splice(0), ['sync broken', 'async broken'])
    t.same(calls.splice(0), ['begin', 'checkpoint #2', 'release'])

    broken.clear()
    t.equal((await post(app, redelivered(delivery))).body, RECEIVED)
    t.same(seen.splice(0), ['sync broken'])
    t.equal((await post(app, redelivered(delivery))).body, DUPLICATE)
    t.same(seen, [])
  })

  t.test('waits for the handlers that still run', async t => {
    const app = await build(t)
    const slow = deferred()
    const started = deferred()
    let ended = false
    let answered = false
    app.openaiWebhook
      .on('batch.failed', () => { throw new Error('at once') })
      .on('batch.failed', async () => {
        started.resolve()
        await slow.promise
        ended = true
      })
    const answer = post(app, sign(thin('batch.failed'))).then(({ statusCode }) => {
      answered = true
      return statusCode
    })
    await started.promise
    await new Promise(resolve => setImmediate(resolve))
    t.notOk(answered)
    slow.resolve()
    t.equal(await answer, 500)
    t.ok(ended)
  })

  const thrown: Record<string, unknown> = {
    null: null,
    undefined,
    'a string': 'disk full',
    'an object': { secret: 'disk full' },
    'a huge message': new Error('x'.repeat(1_000_000)),
    'an error with a status of its own': Object.assign(new Error('teapot'), { statusCode: 418, code: 'TEAPOT' }),
    'an error with a code like ours': Object.assign(new Error('a lie'), { statusCode: 401, code: 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE' })
  }
  for (const [name, value] of Object.entries(thrown)) {
    t.test(`of ${name}, thrown or rejected with`, async t => {
      const { app, told, calls } = await watched(t)
      app.openaiWebhook
        .on('batch.failed', () => { throw value })
        .on('batch.completed', async () => { throw value })
      for (const type of ['batch.failed', 'batch.completed']) {
        const { statusCode, body } = await post(app, sign(thin(type)))
        t.equal(statusCode, 500)
        t.equal(body, '{"statusCode":500,"code":"FST_OPENAI_WEBHOOK_HANDLER_FAILED","error":"Internal Server Error","message":"an event handler failed"}')
        const { errors } = told.shift()!.error.cause as AggregateError
        t.equal(errors.length, 1)
        t.equal(errors[0], value)
      }
      t.same(calls, ['begin', 'release', 'begin', 'release'])
    })
  }

  t.test('of a thenable that rejects', async t => {
    const { app, told } = await watched(t)
    const error = new Error('disk full')
    app.openaiWebhook.on('batch.failed', () => ({ then (_resolve: unknown, reject: (error: Error) => void) { reject(error) } }) as unknown as Promise<void>)

    t.equal((await post(app, sign(thin('batch.failed')))).statusCode, 500)
    t.equal((told[0]!.error.cause as AggregateError).errors[0], error)
  })

  t.test('reaches an error handler that was set after the plugin', async t => {
    const app = await build(t)
    app.setErrorHandler((error: Error & { code?: string }, _request, reply) => reply.code(599).send(error.code))
    app.openaiWebhook.on('batch.failed', () => { throw new Error('disk full') })
    const { statusCode, body } = await post(app, sign(thin('batch.failed')))
    t.same([statusCode, body], [599, 'FST_OPENAI_WEBHOOK_HANDLER_FAILED'])
    t.equal((await app.inject({ method: 'POST', url: '/webhooks/openai', payload: {} })).body, 'FST_OPENAI_WEBHOOK_MISSING_HEADER')
  })

  t.test('reaches the app\'s error handler', async t => {
    const app = Fastify()
    t.teardown(() => app.close())
    app.setErrorHandler((error: Error & { code?: string }, _request, reply) => reply.code(599).send(error.code))
    await app.register(openaiWebhook, { secret: SECRET })
    app.openaiWebhook.on('batch.failed', () => { throw new Error('disk full') })
    const { statusCode, body } = await post(app, sign(thin('batch.failed')))
    t.same([statusCode, body], [599, 'FST_OPENAI_WEBHOOK_HANDLER_FAILED'])
  })
})

t.test('a handler gets the event and its context', async t => {
  const log = capturedLog()
  const app = await build(t, {}, { logger: log.logger })
  let seen!: { event: unknown, context: EventContext, request: EventContext['request'] }
  app.openaiWebhook.on('batch.failed', (event, context) => {
    seen = { event, context, request: context.request }
    context.log.info('handled')
    context.log.warn('twice')
  })
  const delivery = sign({ ...thin('batch.failed'), added_later: [1] })
  await post(app, delivery)

  const { event, context, request } = seen
  const webhookId = delivery.headers['webhook-id']!
  t.same(event, { ...thin('batch.failed'), added_later: [1] })
  t.equal(context.webhookId, webhookId)
  t.equal(context.timestamp, Number(delivery.headers['webhook-timestamp']))
  t.equal(context.endpoint, '/webhooks/openai')
  t.type(context.signal, AbortSignal)
  t.notOk(context.signal.aborted)
  t.equal(request!.headers['webhook-id'], webhookId)
  t.same(request!.openaiWebhook.rawBody, delivery.body)
  const bindings = { webhookId, eventType: 'batch.failed', endpoint: '/webhooks/openai', reqId: request!.id }
  t.match(log.lines.filter(line => 'webhookId' in line), [{ ...bindings, msg: 'handled' }, { ...bindings, msg: 'twice' }])
  t.equal(context.log, context.log, 'one child logger a delivery')
})

t.test('`log` may be taken apart from the context, and works without a logger', async t => {
  const app = await build(t, {}, { logger: false })
  const seen: string[] = []
  app.openaiWebhook.on('batch.failed', (_event, { log, webhookId, signal, ...rest }) => {
    log.error({ webhookId, aborted: signal.aborted }, 'nothing is written')
    seen.push(typeof rest)
  })
  t.equal((await post(app, sign(thin('batch.failed')))).body, RECEIVED)
  t.same(seen, ['object'])
})

t.test('a second delivery of a running webhook-id', async t => {
  for (const fails of [false, true]) {
    t.test(`gets the answer of the first, which ${fails ? 'fails' : 'succeeds'}`, async t => {
      const { app, calls } = await watched(t)
      const { promise, resolve } = deferred()
      const second = handled(app, 3)
      let runs = 0
      app.openaiWebhook.on('batch.failed', async () => {
        runs++
        await promise
        if (fails) throw new Error('disk full')
      })
      const delivery = sign(thin('batch.failed'))
      const answers = Promise.all([post(app, delivery), post(app, redelivered(delivery)), post(app, redelivered(delivery))])
      await second
      resolve()

      const expected = fails ? 500 : 200
      t.same((await answers).map(({ statusCode }) => statusCode), [expected, expected, expected])
      if (!fails) t.same((await answers).map(({ body }) => body), [RECEIVED, RECEIVED, RECEIVED])
      t.equal(runs, 1)
      t.same(calls, ['begin', fails ? 'release' : 'complete'])
    })
  }

  t.test('is verified as the first was', async t => {
    const { app } = await watched(t)
    const { promise, resolve } = deferred()
    const started = deferred()
    app.openaiWebhook.on('batch.failed', async () => {
      started.resolve()
      await promise
    })
    const delivery = sign(thin('batch.failed'))
    const first = post(app, delivery)
    await started.promise
    t.equal((await post(app, { ...delivery, body: Buffer.from('{}') })).statusCode, 401)
    resolve()
    t.equal((await first).statusCode, 200)
  })
})
