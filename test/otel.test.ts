import { EventEmitter, once } from 'node:events'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { FastifyOtelInstrumentation } from '@fastify/otel'
import type { FastifyOtelInstrumentationOpts } from '@fastify/otel'
import { ROOT_CONTEXT, SpanKind, SpanStatusCode, context, diag, propagation, trace } from '@opentelemetry/api'
import type { Attributes, ContextManager, Span, TextMapPropagator, TracerProvider } from '@opentelemetry/api'
import { InMemorySpanExporter, NodeTracerProvider, SimpleSpanProcessor } from '@opentelemetry/sdk-trace-node'
import type { ReadableSpan, SpanProcessor } from '@opentelemetry/sdk-trace-node'
import * as conventions from '@opentelemetry/semantic-conventions/incubating'
import Fastify from 'fastify'
import type { FastifyInstance } from 'fastify'
import Database from 'libsql'
import t from 'tap'
import type { Test } from 'tap'
import { channels } from '../lib/channels.ts'
import openaiWebhook, { background, memoryStore } from '../lib/index.ts'
import type { IdempotencyStore, OpenAIWebhookOptions, Runner, RunnerHost } from '../lib/index.ts'
import { Unavailable } from '../lib/errors.ts'
import { webhookTracing } from '../lib/otel.ts'
import type { WebhookTracingOptions } from '../lib/otel.ts'
import { bullmq } from '../lib/runners/bullmq.ts'
import type { SqliteDatabase } from '../lib/sqlite/database.ts'
import { durable } from '../lib/sqlite/index.ts'
import { SECRET, post, sign, thin } from './support/deliveries.ts'
import type { Signed } from './support/deliveries.ts'
import { codeBlocks, readDocument } from './support/docs.ts'
import { deferred, redelivered } from './support/observe.ts'
import { environment, forkProgram, spawnProgram } from './support/program.mjs'
import { RedisServer, redisMissing } from './support/redis.ts'
import { Wire, head, listen } from './support/wire.ts'

const URL_PATH = '/webhooks/openai'

/** What a tracer has exported, and when. */
class Recorder {
  readonly #exporter = new InMemorySpanExporter()
  readonly #ended = new EventEmitter()
  readonly provider: NodeTracerProvider

  constructor () {
    const announce: SpanProcessor = {
      onStart () {},
      onEnd: () => { this.#ended.emit('span') },
      forceFlush: async () => {},
      shutdown: async () => {}
    }
    this.provider = new NodeTracerProvider({ spanProcessors: [new SimpleSpanProcessor(this.#exporter), announce] })
  }

  reset (): void {
    this.#exporter.reset()
  }

  get spans (): ReadableSpan[] {
    return this.#exporter.getFinishedSpans()
  }

  all (name: string): ReadableSpan[] {
    return this.spans.filter(span => span.name === name)
  }

  /** The one span of that name. */
  one (name: string): ReadableSpan {
    const found = this.all(name)
    if (found.length !== 1) throw new Error(`expected one span "${name}", got ${found.length}`)
    return found[0]!
  }

  /** Resolves when as many spans of that name have ended. */
  async ended (name: string, count = 1): Promise<void> {
    while (this.all(name).length < count) await once(this.#ended, 'span')
  }

  /** The spans, indented by their parents; children in the order of the alphabet. */
  tree (): string[] {
    const ids = new Set(this.spans.map(span => span.spanContext().spanId))
    const below = (parent: string | undefined, depth: number): string[] => this.spans
      .filter(({ parentSpanContext }) => (ids.has(parentSpanContext?.spanId ?? '') ? parentSpanContext!.spanId : undefined) === parent)
      .sort((a, b) => labelOf(a).localeCompare(labelOf(b)))
      .flatMap(span => ['  '.repeat(depth) + labelOf(span), ...below(span.spanContext().spanId, depth + 1)])
    return below(undefined, 0)
  }
}

/** @fastify/otel puts the source of the plugin's functions into its names. */
function labelOf ({ name, attributes }: ReadableSpan): string {
  return String(attributes['fastify.type'] ?? name)
}

const recorder = new Recorder()
recorder.provider.register()
t.beforeEach(() => { recorder.reset() })

/** What users do in a handler. */
const work = (name = 'work'): void => { trace.getTracer('user').startSpan(name).end() }

interface TracedOptions extends OpenAIWebhookOptions {
  /** Of @fastify/otel; `false`: without it. */
  otel?: FastifyOtelInstrumentationOpts | false
  tracing?: WebhookTracingOptions | false
}

/** An app with @fastify/otel and with spans for deliveries, unless told otherwise; closed when the test ends. */
async function traced (t: Test, { otel = {}, tracing = {}, ...options }: TracedOptions = {}): Promise<FastifyInstance> {
  const app = Fastify() as FastifyInstance
  if (tracing !== false) {
    const { close } = webhookTracing(tracing)
    t.teardown(close)
  }
  t.teardown(() => app.close())
  if (otel !== false) await app.register(new FastifyOtelInstrumentation({ instrumentHooks: false, ...otel }).plugin())
  await app.register(openaiWebhook, { secret: SECRET, ...options })
  return app
}

const delivery = (webhookId = 'wh_1'): Signed => sign(thin('batch.failed'), { webhookId })

/** Sends the head of a delivery, and its body once the head has been taken: then it comes by an event of the socket's. */
async function postInTwo (t: Test, app: FastifyInstance, { headers, body }: Signed, url = URL_PATH): Promise<number> {
  const taken = deferred()
  app.addHook('onRequest', (_request, _reply, done) => {
    done()
    taken.resolve()
  })
  const wire = await Wire.open(t, await listen(app))
  await wire.write(head([...Object.entries(headers), ['content-length', String(body.length)]], url))
  await taken.promise
  await wire.write(body)
  return (await wire.answer()).status
}

/** A store that answers later, as one behind a network does. */
function distant (store: IdempotencyStore = memoryStore()): IdempotencyStore {
  const later = async <T>(answer: () => T): Promise<Awaited<T>> => {
    await new Promise(resolve => setImmediate(resolve))
    return await answer()
  }
  return {
    begin: async (...args) => await later(() => store.begin(...args)),
    checkpoint: async (...args) => { await later(() => store.checkpoint(...args)) },
    complete: async (...args) => { await later(() => store.complete(...args)) },
    extend: async (...args) => await later(() => store.extend(...args)),
    release: async (...args) => { await later(() => store.release(...args)) }
  }
}

t.test('with @fastify/otel alone', async t => {
  t.test('what a handler traces hangs under the request that brought its delivery', async t => {
    for (const store of [memoryStore(), distant()]) {
      recorder.reset()
      const app = await traced(t, { tracing: false, idempotency: { store } })
      app.openaiWebhook
        .on('batch.failed', () => { work('in a synchronous handler') })
        .on('batch.failed', async (_event, { webhookId }) => {
          work('before an await')
          await new Promise(resolve => setImmediate(resolve))
          work(`after it, for ${webhookId}`)
        })
      await Promise.all(['wh_1', 'wh_2'].map(async id => t.equal((await post(app, delivery(id))).statusCode, 200)))
      t.same(recorder.tree(), ['wh_1', 'wh_2'].flatMap(id => [
        'request', '  request-handler', `    after it, for ${id}`, '    before an await', '    in a synchronous handler'
      ]))
    }
  })

  t.test('over a socket, when the body comes after the head, and without its span for the route\'s handler', async t => {
    const app = await traced(t, { tracing: false, otel: { instrumentHandler: false } })
    app.openaiWebhook.on('batch.failed', () => { work() })
    t.equal(await postInTwo(t, app, delivery()), 200)
    t.same(recorder.tree(), ['request', '  work'])
  })

  t.test('with spans for hooks, in the handlers of a further endpoint and in a marked route\'s own handler', async t => {
    const app = await traced(t, { tracing: false, otel: { instrumentHooks: true } })
    app.openaiWebhook.route({ url: '/further', on: { 'batch.failed': () => { work('further') } } })
    app.post('/marked', { config: { openaiWebhook: {} } }, async () => {
      await new Promise(resolve => setImmediate(resolve))
      work('marked')
    })
    for (const url of ['/further', '/marked']) t.equal((await post(app, delivery(), url)).statusCode, 200)
    for (const name of ['further', 'marked']) {
      const parent = recorder.spans.find(span => span.spanContext().spanId === recorder.one(name).parentSpanContext?.spanId)
      t.equal(parent?.attributes['fastify.type'], 'request-handler')
    }
  })

  t.test('the retry of a failed delivery is traced by its own request', async t => {
    const app = await traced(t, { tracing: false })
    let runs = 0
    app.openaiWebhook.on('batch.failed', async () => {
      work(`run ${++runs}`)
      if (runs === 1) throw new Error('not yet')
    })
    const first = delivery()
    t.equal((await post(app, first)).statusCode, 500)
    t.equal((await post(app, redelivered(first))).statusCode, 200)
    t.same(recorder.tree(), ['request', '  request-handler', '    run 1', 'request', '  request-handler', '    run 2'])
  })

  t.test('a marked route\'s `on` handlers hang under the request too, whenever the body comes', async t => {
    const app = await traced(t, { tracing: false })
    app.post('/marked', { config: { openaiWebhook: { on: { 'batch.failed': () => { work('on') } } } } }, async () => { work('own') })
    t.equal(await postInTwo(t, app, delivery(), '/marked'), 200)
    t.same(recorder.tree(), ['request', '  on', '  request-handler', '    own'])
  })

  t.test('background(): a delivery that waited for another one hangs under its own request', async t => {
    const app = await traced(t, { tracing: false, runner: background({ concurrency: 1 }) })
    const accepted = deferred()
    app.openaiWebhook.on('batch.failed', async (_event, { webhookId }) => {
      await accepted.promise
      work(webhookId)
    })
    const ids = ['wh_1', 'wh_2', 'wh_3']
    for (const id of ids) await post(app, delivery(id))
    accepted.resolve()
    await recorder.ended('wh_3')
    t.same(recorder.tree(), ids.flatMap(id => ['request', '  request-handler', `    ${id}`]))
  })

  t.test('durable(): a delivery out of the file hangs under no other one\'s request', async t => {
    const db = new Database(join(t.testdir(), 'jobs.db')) as unknown as SqliteDatabase & { close: () => void }
    const app = await traced(t, { tracing: false, runner: durable(db, { concurrency: 1 }) })
    app.openaiWebhook.on('batch.failed', async () => { work() })
    for (const id of ['wh_1', 'wh_2']) await post(app, delivery(id))
    await recorder.ended('work', 2)
    await app.close()
    db.close()
    t.same(recorder.all('work').map(({ parentSpanContext }) => parentSpanContext), [undefined, undefined])
  })

  t.test('a marked route that dispatches needs its handler left alone, and says so', async t => {
    const app = await traced(t, { tracing: false })
    app.openaiWebhook.on('batch.failed', () => { work() })
    app.post('/marked', { config: { openaiWebhook: {}, otel: { instrumentHandler: false } } }, app.openaiWebhook.handler)
    app.post('/wrapped', { config: { openaiWebhook: {} } }, app.openaiWebhook.handler)
    t.equal((await post(app, delivery(), '/marked')).statusCode, 200)
    t.equal(recorder.all('work').length, 1)
    t.match((await post(app, delivery(), '/wrapped')).json(), { statusCode: 500, code: 'FST_OPENAI_WEBHOOK_INVALID_ROUTE', message: /@fastify\/otel/ })
  })
})

t.test('a delivery in the request', async t => {
  t.test('is a span under the request\'s, with one below it for each handler, which is active while the handler runs', async t => {
    const app = await traced(t, { idempotency: { store: distant() } })
    app.openaiWebhook
      .on('batch.failed', async () => {
        await new Promise(resolve => setImmediate(resolve))
        work()
      }, { name: 'import-batch' })
      .onAny(() => { work() }, { name: 'audit' })
    t.equal((await post(app, delivery())).statusCode, 200)
    t.same(recorder.tree(), [
      'request',
      '  request-handler',
      `    process ${URL_PATH}`,
      '      handler audit',
      '        work',
      '      handler import-batch',
      '        work'
    ])
    t.equal(new Set(recorder.spans.map(span => span.spanContext().traceId)).size, 1)
    const { kind, links, status, instrumentationScope } = recorder.one(`process ${URL_PATH}`)
    t.same([kind, links, status], [SpanKind.CONSUMER, [], { code: SpanStatusCode.UNSET }])
    t.equal(instrumentationScope.name, 'fastify-openai-webhook')
    t.equal(recorder.one('handler audit').kind, SpanKind.INTERNAL)
  })

  t.test('has the attributes of the messaging conventions, and those of the event', async t => {
    const app = await traced(t)
    app.openaiWebhook.on('batch.failed', () => {}, { name: 'import-batch' })
    const sent = delivery()
    await post(app, sent)
    const attributes: Attributes = {
      [conventions.ATTR_MESSAGING_SYSTEM]: 'openai_webhook',
      [conventions.ATTR_MESSAGING_SYSTEM_NAME]: 'openai_webhook',
      [conventions.ATTR_MESSAGING_OPERATION_NAME]: 'process',
      [conventions.ATTR_MESSAGING_OPERATION_TYPE]: conventions.MESSAGING_OPERATION_TYPE_VALUE_PROCESS,
      [conventions.ATTR_MESSAGING_DESTINATION_NAME]: URL_PATH,
      [conventions.ATTR_MESSAGING_MESSAGE_ID]: 'wh_1',
      'openai.webhook.event.type': 'batch.failed',
      'openai.webhook.event.id': 'evt_1'
    }
    t.same(recorder.one(`process ${URL_PATH}`).attributes, { ...attributes, [conventions.ATTR_MESSAGING_MESSAGE_BODY_SIZE]: sent.body.length })
    t.same(recorder.one('handler import-batch').attributes, { ...attributes, 'openai.webhook.handler': 'import-batch' })
  })

  t.test('of a type that is not known may have an id that is none', async t => {
    const app = await traced(t)
    await post(app, sign({ type: 'new.type', id: { not: 'text' } }))
    const { attributes } = recorder.one(`process ${URL_PATH}`)
    t.equal(attributes['openai.webhook.event.type'], 'new.type')
    t.notOk('openai.webhook.event.id' in attributes)
  })

  t.test('continues the trace that the request came with', async t => {
    const app = await traced(t)
    const { headers, body } = delivery()
    await post(app, { headers: { ...headers, traceparent: '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01' }, body })
    t.equal(recorder.one(`process ${URL_PATH}`).spanContext().traceId, '0af7651916cd43dd8448eb211c80319c')
  })

  t.test('is a trace of its own where nobody traces the request', async t => {
    const app = await traced(t, { otel: false })
    app.openaiWebhook.on('batch.failed', () => { work() }, { name: 'a' })
    await post(app, delivery())
    t.same(recorder.tree(), [`process ${URL_PATH}`, '  handler a', '    work'])
  })

  t.test('hangs under the request\'s span though a hook has lost its context', async t => {
    const app = await traced(t, { otel: { instrumentHandler: false } })
    const elsewhere = new EventEmitter()
    app.addHook('preHandler', (_request, _reply, done) => {
      elsewhere.once('go', done)
      setImmediate(() => { context.with(ROOT_CONTEXT, () => elsewhere.emit('go')) })
    })
    app.openaiWebhook.on('batch.failed', () => { work() }, { name: 'a' })
    t.equal((await post(app, delivery())).statusCode, 200)
    t.same(recorder.tree(), ['request', `  process ${URL_PATH}`, '    handler a', '      work'])
  })

  t.test('is a trace of its own on a route that @fastify/otel does not trace', async t => {
    const app = await traced(t)
    app.post('/untraced', { config: { openaiWebhook: {}, otel: false } }, async () => {})
    t.equal((await post(app, delivery(), '/untraced')).statusCode, 200)
    t.same(recorder.tree(), ['process /untraced'])
  })

  t.test('on a marked route has spans for the route\'s `on`, and lasts until the route\'s own handler has answered', async t => {
    const app = await traced(t)
    app.post('/marked', { config: { openaiWebhook: { on: { 'batch.failed': () => { work('on') } } } } }, async () => {
      await new Promise(resolve => setImmediate(resolve))
      work('own')
      return { ok: true }
    })
    t.equal(await postInTwo(t, app, delivery(), '/marked'), 200)
    t.same(recorder.tree(), ['request', '  process /marked', '    handler route#0', '      on', '  request-handler', '    own'])
  })

  t.test('without a context manager is a tree all the same, though no span is active', async t => {
    context.disable()
    t.teardown(() => {
      for (const api of [context, propagation, trace]) api.disable()
      recorder.provider.register()
    })
    const app = await traced(t, { otel: false })
    app.openaiWebhook.on('batch.failed', () => { work() }, { name: 'a' })
    t.equal((await post(app, delivery())).statusCode, 200)
    t.same(recorder.tree(), [`process ${URL_PATH}`, '  handler a', 'work'])
  })

  t.test('that comes again makes no second span, whether it is joined or a duplicate', async t => {
    const app = await traced(t)
    const running = deferred()
    const started = deferred()
    app.openaiWebhook.on('batch.failed', async () => {
      started.resolve()
      await running.promise
    }, { name: 'a' })
    const first = delivery()
    const answers = [post(app, first)]
    await started.promise
    const joined = deferred()
    const listener = (): void => { joined.resolve() }
    channels.duplicate.subscribe(listener)
    t.teardown(() => channels.duplicate.unsubscribe(listener))
    answers.push(post(app, redelivered(first)))
    await joined.promise
    running.resolve()
    for (const { statusCode } of await Promise.all(answers)) t.equal(statusCode, 200)
    t.same((await post(app, first)).json(), { received: true, duplicate: true })
    t.equal(recorder.all('request').length, 3)
    t.equal(recorder.all(`process ${URL_PATH}`).length, 1)
    t.equal(recorder.all('handler a').length, 1)
  })

  t.test('that is retried has a span for each attempt, and none for a handler that had succeeded', async t => {
    const app = await traced(t)
    let fails = true
    app.openaiWebhook
      .on('batch.failed', () => {}, { name: 'succeeds' })
      .on('batch.failed', () => { if (fails) throw new Error('not yet') }, { name: 'fails' })
    const first = delivery()
    t.equal((await post(app, first)).statusCode, 500)
    fails = false
    t.equal((await post(app, redelivered(first))).statusCode, 200)
    t.same(recorder.all(`process ${URL_PATH}`).map(({ status }) => status.code), [SpanStatusCode.ERROR, SpanStatusCode.UNSET])
    t.same(recorder.all('handler fails').map(({ status }) => status.code), [SpanStatusCode.ERROR, SpanStatusCode.UNSET])
    t.equal(recorder.all('handler succeeds').length, 1)
  })
})

/** What a span says of its failure. */
function failureOf ({ status, attributes, events }: ReadableSpan): object {
  return {
    type: attributes[conventions.ATTR_ERROR_TYPE],
    status: status.code === SpanStatusCode.ERROR ? status.message : undefined,
    exceptions: events.map(({ attributes = {} }) => `${String(attributes[conventions.ATTR_EXCEPTION_TYPE])}: ${String(attributes[conventions.ATTR_EXCEPTION_MESSAGE])}`)
  }
}

t.test('a failure', async t => {
  t.test('of handlers is on their spans and on the delivery\'s, whatever they threw', async t => {
    const app = await traced(t)
    const unreadable = new Error('unreadable')
    Object.defineProperty(unreadable, 'message', { get () { throw new Error('no message') } })
    const reset = Object.assign(new Error('read ECONNRESET'), { code: 'ECONNRESET' })
    const thrown = { type: new TypeError('not a function'), code: reset, text: 'a text', nothing: null, object: { secret: SECRET }, unreadable }
    for (const [name, error] of Object.entries(thrown)) {
      app.openaiWebhook.on('batch.failed', name === 'type' ? () => { throw error } : async () => { throw error }, { name })
    }
    app.openaiWebhook.on('batch.failed', () => {}, { name: 'succeeds' })
    t.equal((await post(app, delivery())).statusCode, 500)

    t.strictSame(Object.fromEntries(Object.keys(thrown).map(name => [name, failureOf(recorder.one(`handler ${name}`))])), {
      type: { type: 'TypeError', status: 'not a function', exceptions: ['TypeError: not a function'] },
      code: { type: 'ECONNRESET', status: 'read ECONNRESET', exceptions: ['ECONNRESET: read ECONNRESET'] },
      text: { type: '_OTHER', status: 'a text', exceptions: ['_OTHER: a text'] },
      nothing: { type: '_OTHER', status: 'threw null', exceptions: ['_OTHER: threw null'] },
      object: { type: '_OTHER', status: 'threw object', exceptions: ['_OTHER: threw object'] },
      unreadable: { type: '_OTHER', status: 'an error that cannot be read', exceptions: ['_OTHER: an error that cannot be read'] }
    })
    t.match(recorder.one('handler type').events[0]!.attributes![conventions.ATTR_EXCEPTION_STACKTRACE], /otel\.test/)
    t.strictSame(failureOf(recorder.one('handler succeeds')), { type: undefined, status: undefined, exceptions: [] })

    const { type, status, exceptions } = failureOf(recorder.one(`process ${URL_PATH}`)) as { type: string, status: string, exceptions: string[] }
    t.equal(type, 'FST_OPENAI_WEBHOOK_HANDLER_FAILED')
    t.match(status, /^6 of 7 handlers failed: not a function; /)
    t.strictSame(exceptions.sort(), [
      'ECONNRESET: read ECONNRESET', 'TypeError: not a function',
      '_OTHER: a text', '_OTHER: an error that cannot be read', '_OTHER: threw null', '_OTHER: threw object'
    ])
  })

  t.test('of a handler that threw an AggregateError is that error', async t => {
    const app = await traced(t)
    app.openaiWebhook.on('batch.failed', () => { throw new AggregateError([new Error('one'), new Error('two')], 'both failed') }, { name: 'a' })
    await post(app, delivery())
    t.strictSame(failureOf(recorder.one('handler a')), { type: 'AggregateError', status: 'both failed', exceptions: ['AggregateError: both failed'] })
    t.match(failureOf(recorder.one(`process ${URL_PATH}`)), { exceptions: ['AggregateError: both failed'] })
  })

  t.test('of a queue is what it failed with, and not what the sender is told', async t => {
    const reset = Object.assign(new Error('read ECONNRESET'), { code: 'ECONNRESET' })
    const errors = [reset, new Unavailable({ cause: reset })]
    const app = await traced(t, { runner: { async run () { throw errors.shift() }, depth: () => 0 } })
    for (const type of ['ECONNRESET', 'FST_OPENAI_WEBHOOK_UNAVAILABLE']) {
      recorder.reset()
      t.equal((await post(app, delivery())).statusCode, 503)
      t.strictSame(failureOf(recorder.one(`send ${URL_PATH}`)), { type, status: 'read ECONNRESET', exceptions: ['ECONNRESET: read ECONNRESET'] })
    }
  })

  t.test('of a route\'s own handler is on the delivery\'s span: what it threw, or that it did not answer 2xx', async t => {
    const app = await traced(t)
    const config = { openaiWebhook: {} }
    app.post('/throws', { config }, async () => { throw new Error('no database') })
    app.post('/refuses', { config }, async (_request, reply) => await reply.code(429).send())
    for (const url of ['/throws', '/refuses']) await post(app, delivery(), url)
    await recorder.ended('process /refuses')
    t.strictSame(failureOf(recorder.one('process /throws')), {
      type: 'FST_OPENAI_WEBHOOK_HANDLER_FAILED', status: '1 of 1 handlers failed: no database', exceptions: ['Error: no database']
    })
    t.strictSame(failureOf(recorder.one('process /refuses')), {
      type: 'FST_OPENAI_WEBHOOK_HANDLER_FAILED',
      status: 'an event handler failed',
      exceptions: ['FST_OPENAI_WEBHOOK_HANDLER_FAILED: an event handler failed']
    })
  })
})

t.test('no span has anything of the payload, of the secret or of the signature', async t => {
  const app = await traced(t, { runner: background() })
  app.openaiWebhook.on('batch.failed', () => { throw new Error('failed') }, { name: 'a' })
  const sent = sign(thin('batch.failed', { id: 'batch_of_a_customer' }), { webhookId: 'wh_1' })
  await post(app, sent)
  await recorder.ended(`process ${URL_PATH}`)
  const text = JSON.stringify(recorder.spans.map(({ name, status, attributes, links, events }) => ({ name, status, attributes, links, events })))
  t.match(text, /wh_1/)
  for (const secret of ['batch_of_a_customer', SECRET, SECRET.slice(6), sent.headers['webhook-signature']!.slice(3)]) t.notMatch(text, new RegExp(secret.replaceAll(/[+/]/g, '\\$&')))
})

t.test('a queued delivery', async t => {
  t.test('is a trace of its own, which links to the span in the request that put it into the queue', async t => {
    const app = await traced(t, { runner: background() })
    app.openaiWebhook.on('batch.failed', async () => {
      await new Promise(resolve => setImmediate(resolve))
      work()
    }, { name: 'a' })
    const sent = delivery()
    t.equal((await post(app, sent)).statusCode, 200)
    await recorder.ended(`process ${URL_PATH}`)
    t.same(recorder.tree(), [`process ${URL_PATH}`, '  handler a', '    work', 'request', '  request-handler', `    send ${URL_PATH}`])

    const accepted = recorder.one(`send ${URL_PATH}`)
    t.equal(accepted.kind, SpanKind.PRODUCER)
    t.same(accepted.attributes, {
      [conventions.ATTR_MESSAGING_SYSTEM]: 'openai_webhook',
      [conventions.ATTR_MESSAGING_SYSTEM_NAME]: 'openai_webhook',
      [conventions.ATTR_MESSAGING_OPERATION_NAME]: 'send',
      [conventions.ATTR_MESSAGING_OPERATION_TYPE]: conventions.MESSAGING_OPERATION_TYPE_VALUE_SEND,
      [conventions.ATTR_MESSAGING_DESTINATION_NAME]: URL_PATH,
      [conventions.ATTR_MESSAGING_MESSAGE_ID]: 'wh_1',
      [conventions.ATTR_MESSAGING_MESSAGE_BODY_SIZE]: sent.body.length,
      'openai.webhook.event.type': 'batch.failed',
      'openai.webhook.event.id': 'evt_1'
    })
    const processed = recorder.one(`process ${URL_PATH}`)
    t.equal(processed.kind, SpanKind.CONSUMER)
    t.equal(processed.parentSpanContext, undefined)
    const { traceId, spanId } = accepted.spanContext()
    t.not(processed.spanContext().traceId, traceId)
    t.match(processed.links, [{ context: { traceId, spanId, isRemote: true } }])
    t.equal(processed.links.length, 1)
  })

  t.test('that waited for another one has nothing of that one\'s trace', async t => {
    const app = await traced(t, { runner: background({ concurrency: 1 }) })
    const accepted = deferred()
    app.openaiWebhook.on('batch.failed', async () => {
      await accepted.promise
      work()
    }, { name: 'a' })
    const ids = ['wh_1', 'wh_2', 'wh_3']
    for (const id of ids) t.equal((await post(app, delivery(id))).statusCode, 200)
    accepted.resolve()
    await recorder.ended(`process ${URL_PATH}`, 3)
    const sent = recorder.all(`send ${URL_PATH}`)
    const processed = recorder.all(`process ${URL_PATH}`)
    t.same(sent.map(({ attributes }) => attributes['messaging.message.id']), ids)
    t.same(processed.map(({ attributes }) => attributes['messaging.message.id']), ids)
    t.same(processed.map(({ links }) => links.map(({ context }) => context.spanId)), sent.map(span => [span.spanContext().spanId]))
    t.equal(new Set(recorder.spans.map(span => span.spanContext().traceId)).size, 6)
    t.equal(recorder.tree().filter(line => line === '    work').length, 3)
  })

  t.test('in a file has a span for each attempt, all with the same link, and says which attempt it is', async t => {
    const db = new Database(join(t.testdir(), 'jobs.db')) as unknown as SqliteDatabase & { close: () => void }
    const app = await traced(t, { runner: durable(db, { backoff: 1 }) })
    let runs = 0
    app.openaiWebhook.on('batch.failed', () => { if (++runs === 1) throw new Error('not yet') }, { name: 'a' })
    await listen(app) // the wait for the next attempt does not keep a process alive
    t.equal((await post(app, delivery())).statusCode, 200)
    await recorder.ended(`process ${URL_PATH}`, 2)
    const { spanId } = recorder.one(`send ${URL_PATH}`).spanContext()
    t.same(recorder.all(`process ${URL_PATH}`).map(({ links, attributes, status }) => [links.map(({ context }) => context.spanId), attributes['openai.webhook.attempt'], status.code]), [
      [[spanId], 1, SpanStatusCode.ERROR],
      [[spanId], 2, SpanStatusCode.UNSET]
    ])
    await app.close()
    db.close()
  })

  t.test('that comes again while it waits or runs makes no second span of its processing', async t => {
    const app = await traced(t, { runner: background({ concurrency: 1 }) })
    const running = deferred()
    const started = deferred()
    app.openaiWebhook.on('batch.failed', async () => {
      started.resolve()
      await running.promise
    }, { name: 'a' })
    for (const id of ['wh_runs', 'wh_waits']) await post(app, delivery(id))
    await started.promise
    for (const id of ['wh_runs', 'wh_waits']) t.equal((await post(app, delivery(id))).statusCode, 200)
    running.resolve()
    await recorder.ended(`process ${URL_PATH}`, 2)
    await app.close()
    t.equal(recorder.all(`process ${URL_PATH}`).length, 2)
    t.equal(recorder.all('handler a').length, 2)
  })

  t.test('that the queue refuses has that on the span in the request', async t => {
    const app = await traced(t, { runner: background({ concurrency: 1, maxQueue: 0 }) })
    const running = deferred()
    app.openaiWebhook.on('batch.failed', async () => { await running.promise })
    await post(app, delivery('wh_1'))
    t.equal((await post(app, delivery('wh_2'))).statusCode, 503)
    t.match(failureOf(recorder.all(`send ${URL_PATH}`)[1]!), { type: 'FST_OPENAI_WEBHOOK_OVERLOADED', status: /no room/ })
    running.resolve()
    await recorder.ended(`process ${URL_PATH}`)
  })

  t.test('has the span in the request active while it is queued, and takes no baggage along, which nobody has signed', async t => {
    let host!: RunnerHost
    const carriers: unknown[] = []
    const runner: Runner = {
      start (startedBy) { host = startedBy },
      // As where a worker of the same process is faster than the queue's own answer.
      async run (job) {
        carriers.push(job.carrier)
        await new Promise(resolve => setImmediate(resolve))
        work('queue')
        await host.process(job)
      },
      depth: () => 0
    }
    const app = await traced(t, { runner })
    let baggage: unknown = 'not seen'
    app.openaiWebhook.on('batch.failed', () => { baggage = propagation.getActiveBaggage() }, { name: 'a' })
    const { headers, body } = delivery()
    t.equal((await post(app, { headers: { ...headers, baggage: 'tenant=of-a-stranger' }, body })).statusCode, 200)
    t.same(recorder.tree(), [`process ${URL_PATH}`, '  handler a', 'request', '  request-handler', `    send ${URL_PATH}`, '      queue'])
    const { traceId, spanId } = recorder.one(`send ${URL_PATH}`).spanContext()
    t.same(carriers, [{ traceparent: `00-${traceId}-${spanId}-01` }])
    t.equal(recorder.one(`process ${URL_PATH}`).links[0]?.context.spanId, spanId)
    t.equal(baggage, undefined)
  })

  t.test('that nobody traced when it was accepted is a trace without a link', async t => {
    const app = await traced(t, { runner: background(), otel: false, tracing: false })
    app.openaiWebhook.on('batch.failed', () => { work() }, { name: 'a' })
    await post(app, delivery())
    const { close } = webhookTracing()
    t.teardown(close)
    await recorder.ended(`process ${URL_PATH}`)
    t.same(recorder.tree(), [`process ${URL_PATH}`, '  handler a', '    work'])
    t.same(recorder.one(`process ${URL_PATH}`).links, [])
  })
})

/** Other processes are users' programs: nothing of a test runner's in their environment. */

interface WorkerSpan {
  name: string
  kind: SpanKind
  traceId: string
  spanId: string
  parentSpanId?: string
  status: { code: SpanStatusCode, message?: string }
  attributes: Attributes
  links: Array<{ context: { traceId: string, spanId: string } }>
  events: Array<{ name: string, attributes: Attributes }>
}

t.test('a worker in another process links to the request that accepted the delivery', { skip: redisMissing }, async t => {
  const redis = await RedisServer.start(t)
  const worker = forkProgram(fileURLToPath(new URL('support/processes/otel-worker.mjs', import.meta.url)), [String(redis.port)])
  const exited = once(worker, 'exit')
  t.teardown(async () => {
    worker.kill('SIGKILL')
    await exited
  })
  const spans: WorkerSpan[] = []
  const ready = deferred()
  const done = deferred()
  worker.on('message', ({ span }: { span?: WorkerSpan }) => {
    if (span === undefined) return ready.resolve()
    spans.push(span)
    if (span.name === `process ${URL_PATH}` && span.attributes['openai.webhook.attempt'] === 2) done.resolve()
  })
  await Promise.race([ready.promise, exited.then(() => { throw new Error('the worker ended before it was ready') })])

  const app = await traced(t, { runner: bullmq({ connection: { host: '127.0.0.1', port: redis.port }, worker: false, backoff: 1 }) })
  t.equal((await post(app, delivery())).statusCode, 200)
  t.same(recorder.tree(), ['request', '  request-handler', `    send ${URL_PATH}`])
  const accepted = recorder.one(`send ${URL_PATH}`).spanContext()
  t.equal(accepted.traceId, recorder.one('request').spanContext().traceId)
  await done.promise

  const named = (name: string): WorkerSpan[] => spans.filter(span => span.name === name)
  const processed = named(`process ${URL_PATH}`)
  t.equal(processed.length, 2)
  for (const { kind, parentSpanId, traceId, links } of processed) {
    t.same([kind, parentSpanId], [SpanKind.CONSUMER, undefined])
    t.not(traceId, accepted.traceId)
    t.same(links.map(({ context: { traceId, spanId } }) => ({ traceId, spanId })), [{ traceId: accepted.traceId, spanId: accepted.spanId }])
  }
  t.match(processed[0], {
    attributes: { 'messaging.message.id': 'wh_1', 'messaging.destination.name': URL_PATH, 'openai.webhook.attempt': 1, 'error.type': 'FST_OPENAI_WEBHOOK_HANDLER_FAILED' },
    status: { code: SpanStatusCode.ERROR, message: '1 of 1 handlers failed: the first attempt fails' },
    events: [{ name: 'exception', attributes: { 'exception.message': 'the first attempt fails' } }]
  })
  t.equal(processed[1]?.status.code, SpanStatusCode.UNSET)
  t.notOk('messaging.message.body.size' in processed[0]!.attributes, 'the bytes are not in the queue')
  t.same(named('handler import-batch').map(({ parentSpanId }) => parentSpanId), processed.map(({ spanId }) => spanId))
  t.same(named('work').map(({ parentSpanId }) => parentSpanId), named('handler import-batch').map(({ spanId }) => spanId))

  worker.send('close')
  t.same(await exited, [0, null], 'it ends by itself')
})

t.test('the recipe\'s program traces a delivery, and exports what it has traced before it ends', async t => {
  const { code } = codeBlocks(readDocument('docs/recipes/opentelemetry.md')).find(({ language }) => language === 'js')!
  const file = join(t.testdir({ 'app.mjs': code }), 'app.mjs')
  const program = spawnProgram([file], { env: { ...environment, OPENAI_WEBHOOK_SECRET: SECRET, PORT: '0' }, stdio: ['ignore', 'pipe', 'inherit'] })
  const ended = once(program, 'close')
  t.teardown(async () => {
    program.kill('SIGKILL')
    await ended
  })
  let output = ''
  const url = deferred<string>()
  program.stdout.setEncoding('utf8').on('data', (text: string) => {
    output += text
    const [found] = /http:\/\/[\w.:]+(?=")/.exec(output) ?? []
    if (found !== undefined) url.resolve(found)
  })
  const { headers, body } = sign(thin('batch.completed'), { webhookId: 'wh_1' })
  const origin = await Promise.race([url.promise, ended.then(() => { throw new Error('the program ended before it listened') })])
  const { status } = await fetch(origin + URL_PATH, { method: 'POST', headers, body })
  t.equal(status, 200)
  program.kill('SIGTERM')
  t.same(await ended, [0, null])
  for (const name of ['request', `process ${URL_PATH}`, 'handler import-batch']) t.match(output, `name: '${name}'`)
})

t.test('webhookTracing', async t => {
  t.test('takes a tracer provider of the user\'s own', async t => {
    const own = new Recorder()
    const app = await traced(t, { tracing: { tracerProvider: own.provider } })
    app.openaiWebhook.on('batch.failed', () => {}, { name: 'a' })
    await post(app, delivery())
    t.same(own.tree(), [`process ${URL_PATH}`, '  handler a'])
    t.same(recorder.tree(), ['request', '  request-handler'])
    const parent = own.one(`process ${URL_PATH}`).parentSpanContext
    t.equal(parent?.traceId, recorder.one('request').spanContext().traceId)
  })

  t.test('uses a global one that is registered later', async t => {
    trace.disable()
    t.teardown(() => { trace.setGlobalTracerProvider(recorder.provider) })
    const app = await traced(t, { otel: false })
    app.openaiWebhook.on('batch.failed', () => {}, { name: 'a' })
    t.equal((await post(app, delivery('wh_1'))).statusCode, 200)
    t.same(recorder.tree(), [])
    trace.setGlobalTracerProvider(recorder.provider)
    await post(app, delivery('wh_2'))
    t.same(recorder.tree(), [`process ${URL_PATH}`, '  handler a'])
  })

  t.test('refuses what is no tracer provider', async t => {
    for (const [tracerProvider, got] of [[null, 'null'], [{}, 'a value of type object'], ['global', 'a value of type string']] as const) {
      t.throws(() => webhookTracing({ tracerProvider: tracerProvider as unknown as TracerProvider }), {
        code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: `webhookTracing: expected tracerProvider to have the method getTracer, got ${got}`
      })
    }
    t.notOk(channels.delivery.hasSubscribers)
  })

  t.test('makes each span once, over several registrations of the plugin', async t => {
    const app = await traced(t, { otel: false })
    const other = await traced(t, { otel: false, tracing: false, path: '/other' })
    for (const each of [app, other]) each.openaiWebhook.on('batch.failed', () => {}, { name: 'a' })
    await post(app, delivery())
    await post(other, delivery(), '/other')
    t.same(recorder.tree(), ['process /other', '  handler a', `process ${URL_PATH}`, '  handler a'])
  })

  t.test('with several tracer providers makes a tree for each', async t => {
    const own = new Recorder()
    const { close } = webhookTracing({ tracerProvider: own.provider })
    t.teardown(close)
    const app = await traced(t, { otel: false })
    app.openaiWebhook.on('batch.failed', () => { work() }, { name: 'a' })
    t.equal((await post(app, delivery())).statusCode, 200)
    t.same(own.tree(), [`process ${URL_PATH}`, '  handler a'])
    t.same(recorder.tree(), [`process ${URL_PATH}`, '  handler a', 'work'])
    t.equal(recorder.one('work').parentSpanContext?.spanId, own.one('handler a').spanContext().spanId, 'one of them is active')
  })

  t.test('is refused while another one has the same tracer provider', async t => {
    const { close } = webhookTracing()
    t.throws(() => webhookTracing(), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: /^webhookTracing: expected a tracer provider that is not in use, got one that has a webhookTracing\(\) already/ })
    close()
    const next = webhookTracing()
    t.teardown(next.close)
    close()
    t.throws(() => webhookTracing(), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS' }, 'the first one is closed again, which changes nothing')
  })

  t.test('once closed makes no more spans, and costs nothing', async t => {
    const { close } = webhookTracing()
    t.same([channels.enqueue, channels.delivery, channels.handler].map(({ hasSubscribers }) => hasSubscribers), [true, true, true])
    close()
    t.same([channels.enqueue, channels.delivery, channels.handler].map(({ hasSubscribers }) => hasSubscribers), [false, false, false])
    close()
    const app = await traced(t, { tracing: false })
    app.openaiWebhook.on('batch.failed', () => {})
    t.equal((await post(app, delivery())).statusCode, 200)
    t.same(recorder.tree(), ['request', '  request-handler'])
  })

  t.test('keeps nothing of what has ended', async t => {
    const told: unknown[] = []
    const tell = (...args: unknown[]): void => { told.push(...args) }
    diag.setLogger({ error: tell, warn: tell, info () {}, debug () {}, verbose () {} })
    t.teardown(() => { diag.disable() })
    const { close } = webhookTracing()
    const app = await traced(t, { tracing: false })
    app.openaiWebhook.on('batch.failed', () => {}, { name: 'a' })
    t.equal((await post(app, delivery())).statusCode, 200)
    close()
    t.same(told, [], 'the SDK warns of a span that is ended twice')
  })

  t.test('ends the spans of what is running when it is closed', async t => {
    const { close } = webhookTracing()
    const app = await traced(t, { tracing: false, otel: false })
    const running = deferred()
    const started = deferred()
    app.openaiWebhook.on('batch.failed', async () => {
      started.resolve()
      await running.promise
    }, { name: 'a' })
    const answer = post(app, delivery())
    await started.promise
    close()
    t.same(recorder.tree(), [`process ${URL_PATH}`, '  handler a'])
    running.resolve()
    t.equal((await answer).statusCode, 200)
    t.equal(recorder.spans.length, 2)
  })
})

t.test('a tracer that throws loses no delivery', async t => {
  const broken = (): never => { throw new Error('the tracer is broken') }
  const told: unknown[] = []
  t.before(() => {
    const tell = (...args: unknown[]): void => { told.push(...args) }
    diag.setLogger({ error: tell, warn: tell, info () {}, debug () {}, verbose () {} })
  })
  t.teardown(() => { diag.disable() })
  t.beforeEach(() => { told.length = 0 })

  /** One delivery that succeeds and one whose handler fails, which each run their handler once. */
  async function delivered (t: Test, options: TracedOptions): Promise<void> {
    const app = await traced(t, { otel: false, ...options })
    const runs: string[] = []
    app.openaiWebhook.on('batch.failed', async (_event, { webhookId }) => {
      runs.push(webhookId)
      if (webhookId === 'wh_fails') throw new Error('the handler failed')
    })
    const reported = deferred<Error>()
    app.openaiWebhook.onError(error => { reported.resolve(error) })
    const queued = options.runner !== undefined
    t.equal((await post(app, delivery('wh_1'))).statusCode, 200)
    t.equal((await post(app, delivery('wh_fails'))).statusCode, queued ? 200 : 500)
    t.match(await reported.promise, { code: 'FST_OPENAI_WEBHOOK_HANDLER_FAILED', cause: { errors: [{ message: 'the handler failed' }] } })
    t.same(runs, ['wh_1', 'wh_fails'])
    t.match(told.slice(0, 3), ['fastify-openai-webhook', 'a delivery could not be traced', { message: 'the tracer is broken' }])
  }

  t.test('when it starts a span', async t => {
    for (const runner of [undefined, background()]) {
      await delivered(t, { tracing: { tracerProvider: { getTracer: () => ({ startSpan: broken, startActiveSpan: broken }) } }, ...(runner && { runner }) })
    }
  })

  for (const method of ['setAttribute', 'setStatus', 'recordException', 'end', 'spanContext'] as const) {
    t.test(`in the method ${method} of a span`, async t => {
      for (const runner of [undefined, background()]) {
        const tracerProvider: TracerProvider = {
          getTracer (name) {
            const tracer = recorder.provider.getTracer(name)
            return {
              startSpan: (...args): Span => Object.defineProperty(tracer.startSpan(...args), method, { value: broken }),
              startActiveSpan: broken
            }
          }
        }
        await delivered(t, { tracing: { tracerProvider }, ...(runner && { runner }) })
      }
    })
  }

  t.test('when it enters a context, or leaves it', async t => {
    const real = (context as unknown as { _getContextManager: () => ContextManager })._getContextManager()
    for (const leaves of [false, true]) {
      context.disable()
      context.setGlobalContextManager({
        active: () => real.active(),
        with (active, fn, thisArg, ...args) {
          if (leaves) real.with(active, fn, thisArg, ...args)
          return broken()
        },
        bind: (active, target) => real.bind(active, target),
        enable () { return this },
        disable () { return this }
      })
      await delivered(t, { tracing: { tracerProvider: new Recorder().provider } })
    }
    context.disable()
    context.setGlobalContextManager(real)
  })

  t.test('when it passes its context on, or reads it', async t => {
    const broke: TextMapPropagator = { inject: broken, extract: broken, fields: () => [] }
    propagation.disable()
    propagation.setGlobalPropagator(broke)
    await delivered(t, { runner: background() })
    for (const api of [context, propagation, trace]) api.disable()
    recorder.provider.register()
  })
})
