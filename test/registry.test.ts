import Fastify from 'fastify'
import type { FastifyInstance } from 'fastify'
import t from 'tap'
import openaiWebhook, { channels, guideEvents, memoryStore } from '../lib/index.ts'
import type { EventType, FailureInfo, OpenAIWebhook } from '../lib/index.ts'
import { build, post, sign, SECRET, thin } from './support/deliveries.ts'
import { capturedLog, codeOf, messageOf, redelivered } from './support/observe.ts'

const session = { id: 'session_1', environment_type: 'none' }

/** Delivers one event of each type; for each, what its handlers left in `seen`. */
async function deliverAll (app: FastifyInstance, seen: string[], types: string[], url?: string): Promise<Record<string, string[]>> {
  const result: Record<string, string[]> = {}
  for (const type of types) {
    seen.length = 0
    const { statusCode, body } = await post(app, sign(thin(type, session)), url)
    result[type] = statusCode === 200 && body === '{"received":true}' ? [...seen] : [`answered ${statusCode} ${body}`]
  }
  return result
}

t.test('handlers by name, by several names and by family', async t => {
  const app = await build(t)
  const seen: string[] = []
  app.openaiWebhook
    .on('batch.failed', ({ type }) => { seen.push(`name ${type}`) })
    .on(['batch.completed', 'response.completed'], ({ type }) => { seen.push(`names ${type}`) })
    .on('batch.*', ({ type }) => { seen.push(`family ${type}`) })
    .on('agent.session.*', ({ type }) => { seen.push(`inner ${type}`) })
    .on('agent.*', ({ type }) => { seen.push(`outer ${type}`) })

  t.same(await deliverAll(app, seen, [
    'batch.failed', 'batch.completed', 'response.completed', 'response.failed', 'agent.session.idle', 'agent.environment.ready'
  ]), {
    'batch.failed': ['name batch.failed', 'family batch.failed'],
    'batch.completed': ['names batch.completed', 'family batch.completed'],
    'response.completed': ['names response.completed'],
    'response.failed': [],
    'agent.session.idle': ['inner agent.session.idle', 'outer agent.session.idle'],
    'agent.environment.ready': ['outer agent.environment.ready']
  })
})

t.test('a type that has no schema goes to onAny and onUnhandled alone, whatever family it is of', async t => {
  const app = await build(t)
  const seen: string[] = []
  const to = (name: string) => () => { seen.push(name) }
  app.openaiWebhook.on('batch.*', to('family')).onAny(to('onAny')).onUnhandled(to('onUnhandled'))
  app.openaiWebhook.route({ url: '/own', on: { 'batch.*': to('of the route') } })
  app.post('/marked', { config: { openaiWebhook: { on: { 'batch.*': to('of the marked route') } } }, handler: app.openaiWebhook.handler })

  const unknown = ['batch.new_thing', 'batch.item.failed', 'batch.*', 'batch', 'batches.failed', 'constructor']
  const everywhere = ['onAny', 'onUnhandled']
  for (const url of ['/webhooks/openai', '/own', '/marked']) {
    t.same(await deliverAll(app, seen, unknown, url), Object.fromEntries(unknown.map(type => [type, everywhere])), url)
  }
  t.match(await deliverAll(app, seen, ['batch.failed']), { 'batch.failed': ['onAny', 'family'] }, 'one that has a schema does not')
})

t.test('and tells no handler that it is handled', async t => {
  const app = await build(t)
  const unhandled: string[] = []
  const hear = (message: unknown): void => { unhandled.push((message as { event: { type: string } }).event.type) }
  channels.unhandled.subscribe(hear)
  t.teardown(() => { channels.unhandled.unsubscribe(hear) })
  app.openaiWebhook.on('batch.*', () => { t.fail('a family took it') })
  await deliverAll(app, [], ['batch.new_thing'])
  t.same(unhandled, ['batch.new_thing'])
})

t.test('a handler that several of its patterns match runs once', async t => {
  const app = await build(t)
  const seen: string[] = []
  app.openaiWebhook.on(['batch.failed', 'batch.*', 'batch.failed'], ({ type }) => { seen.push(type) })

  t.same(await deliverAll(app, seen, ['batch.failed', 'batch.expired']), {
    'batch.failed': ['batch.failed'],
    'batch.expired': ['batch.expired']
  })
})

t.test('one function registered twice is two handlers', async t => {
  const app = await build(t)
  const seen: string[] = []
  const handler = ({ type }: { type: string }): void => { seen.push(type) }
  app.openaiWebhook.on('batch.failed', handler).on('batch.*', handler)

  t.same(await deliverAll(app, seen, ['batch.failed']), { 'batch.failed': ['batch.failed', 'batch.failed'] })
})

t.test('handlers are started in the order of their registration, over all scopes', async t => {
  const app = await build(t)
  const seen: string[] = []
  app.openaiWebhook.on('batch.*', () => { seen.push('first') })
  await app.register(async child => { child.openaiWebhook.on('batch.failed', () => { seen.push('second, in a child') }) })
  app.openaiWebhook.on('batch.failed', () => { seen.push('third') }).on(['batch.*'], () => { seen.push('fourth') })

  t.same(await deliverAll(app, seen, ['batch.failed']), { 'batch.failed': ['first', 'second, in a child', 'third', 'fourth'] })
})

t.test('onAny sees every verified event, onUnhandled those that no `on` handler matched', async t => {
  const app = await build(t)
  const seen: string[] = []
  app.openaiWebhook
    .on('batch.failed', () => { seen.push('on') })
    .onAny(() => { seen.push('onAny') })
    .onUnhandled(({ type }) => { seen.push(`onUnhandled ${type}`) })

  t.same(await deliverAll(app, seen, ['batch.failed', 'batch.completed', 'comet.landed']), {
    'batch.failed': ['onAny', 'on'],
    'batch.completed': ['onAny', 'onUnhandled batch.completed'],
    'comet.landed': ['onAny', 'onUnhandled comet.landed']
  })
})

t.test('a forged delivery reaches neither onAny nor onUnhandled', async t => {
  const app = await build(t)
  const seen: string[] = []
  app.openaiWebhook.onAny(() => { seen.push('onAny') }).onUnhandled(() => { seen.push('onUnhandled') })

  const { statusCode } = await post(app, sign(thin('comet.landed'), { secret: `whsec_${Buffer.from('another').toString('base64')}` }))
  t.equal(statusCode, 401)
  t.same(seen, [])
})

t.test('misspelt types and families are refused, with the nearest known name', async t => {
  const app = await build(t)
  const on = (type: unknown) => messageOf(() => app.openaiWebhook.on(type as EventType, () => {}))

  t.match(await on('batch.faild'), /unknown event type "batch\.faild", did you mean "batch\.failed"\?/)
  t.match(await on('bach.*'), /unknown event type "bach\.\*", did you mean "batch\.\*"\?/)
  t.match(await on('agent.sesion.*'), /did you mean "agent\.session\.\*"\?/)
  t.match(await on('invoice.paid'), /unknown event type "invoice\.paid"; a type of your own needs a schema in the `events` option/)
  t.match(await on(['batch.failed', 'batch.finished!']), /unknown event type "batch\.finished!"/)
  for (const type of ['', '.*', 'batch*', 'batch.', 'batch.failed.*', 'toString']) t.match(await on(type), /unknown event type/, type)

  t.match(await on('fine_tuning.job.completed'), /, expected one of fine_tuning\.job\.cancelled, fine_tuning\.job\.failed, fine_tuning\.job\.succeeded; /, 'near another one, and not that')
  t.match(await on('*'), /"\*" is no pattern: onAny\(handler\) runs for every event/)

  t.match(await on([]), /expected an event type, a pattern such as "batch\.\*" or a non-empty array of them, got an empty array/)
  t.match(await on(undefined), /expected an event type, a pattern .*, got undefined/)
  t.match(await on(null), /expected an event type, a pattern .*, got null/)
  t.match(await on({ type: 'batch.failed' }), /expected an event type, a pattern .*, got object/)
  t.match(await on([7]), /expected an event type \(a string\), got number/)
  t.equal(await codeOf(() => app.openaiWebhook.on('batch.faild' as EventType, () => {})), 'INVALID_OPTIONS')
})

t.test('types of the older guide say where they come from, until they are there', async t => {
  const on = async (app: FastifyInstance, type: string): Promise<string> => await messageOf(() => app.openaiWebhook.on(type as EventType, () => {}))
  const app = await build(t)
  for (const type of ['batch.created', 'batch.in_progress', 'fine_tune.completed', 'fine_tune.*', 'file.*']) {
    t.equal(await on(app, type), `on(): "${type}" is known from an older guide alone: register the plugin with { events: guideEvents }, which fastify-openai-webhook exports`)
  }
  const guided = await build(t, { events: guideEvents })
  t.doesNotThrow(() => guided.openaiWebhook.on('batch.created' as EventType, () => {}).on('fine_tune.*' as EventType, () => {}))
})

t.test('a refused registration leaves nothing behind', async t => {
  const app = await build(t)
  const seen: string[] = []
  await codeOf(() => app.openaiWebhook.on(['batch.failed', 'batch.faild' as EventType], () => { seen.push('ran') }))

  t.same(await deliverAll(app, seen, ['batch.failed']), { 'batch.failed': [] })
})

t.test('what is not a function is no handler', async t => {
  const app = await build(t)
  const bad = (value: unknown) => value as () => void
  const { openaiWebhook: webhook } = app

  t.match(await messageOf(() => webhook.on('batch.failed', bad('handler'))), /on\(\): expected a handler function, got string/)
  t.match(await messageOf(() => webhook.on('batch.failed', bad(null))), /on\(\): expected a handler function, got null/)
  t.match(await messageOf(() => webhook.onAny(bad({}))), /onAny\(\): expected a handler function, got object/)
  t.match(await messageOf(() => webhook.onUnhandled(bad(undefined))), /onUnhandled\(\): expected a handler function, got undefined/)
  t.match(await messageOf(() => webhook.onError(bad(7))), /onError\(\): expected a function, got number/)
  t.equal(await codeOf(() => webhook.onError(bad(7))), 'INVALID_OPTIONS')
})

t.test('a handler\'s name is a short string, used once', async t => {
  const app = await build(t)
  const { openaiWebhook: webhook } = app
  const naming = (name: unknown) => messageOf(() => webhook.onAny(() => {}, { name: name as string }))

  webhook.on('batch.failed', () => {}, { name: 'ledger' })
  t.match(await naming('ledger'), /onAny\(\): the handler name "ledger" is taken/)
  t.match(await messageOf(() => webhook.onUnhandled(() => {}, { name: 'ledger' })), /onUnhandled\(\): the handler name "ledger" is taken/)
  for (const name of ['', 'x'.repeat(129), 'a\0b', 7, {}, null]) t.match(await naming(name), /expected `name` to be a string of 1 to 128 characters/)
  t.equal(await naming('x'.repeat(128)), '')
  t.equal(await codeOf(() => webhook.onAny(() => {}, { name: 'ledger' })), 'INVALID_OPTIONS')
})

t.test('registering ends when the app is ready', async t => {
  const app = await build(t)
  await app.ready()
  const { openaiWebhook: webhook } = app
  const late: Record<string, () => unknown> = {
    on: () => webhook.on('batch.failed', () => {}),
    onAny: () => webhook.onAny(() => {}),
    onUnhandled: () => webhook.onUnhandled(() => {}),
    onError: () => webhook.onError(() => {}),
    route: () => webhook.route({ url: '/late' })
  }
  for (const [method, call] of Object.entries(late)) {
    t.equal(await codeOf(call), 'ALREADY_STARTED', method)
    t.match(await messageOf(call), new RegExp(`app\\.openaiWebhook\\.${method}\\(\\) came after the app was ready`))
  }
})

t.test('every method answers with the scope it was called on', async t => {
  const app = await build(t)
  const chains = (webhook: OpenAIWebhook, url: string): boolean => [
    webhook.on('batch.failed', () => {}),
    webhook.onAny(() => {}),
    webhook.onUnhandled(() => {}),
    webhook.onError(() => {}),
    webhook.route({ url })
  ].every(answer => answer === webhook)

  t.ok(chains(app.openaiWebhook, '/root'))
  await app.register(async child => {
    t.ok(chains(child.openaiWebhook, '/child'))
    t.not(child.openaiWebhook, app.openaiWebhook)
    t.equal(child.openaiWebhook, child.openaiWebhook)
  })
})

t.test('`this` in a handler is the scope that it was registered in', async t => {
  const app = await build(t)
  const seen: Array<[string, FastifyInstance]> = []
  let inner!: FastifyInstance
  app.openaiWebhook.on('batch.failed', function () { seen.push(['root', this]) })
  await app.register(async child => {
    inner = child
    child.decorate('ledger', 'of the child')
    child.openaiWebhook
      .on('batch.failed', function () { seen.push(['child', this]) })
      .onAny(function () { seen.push(['child, any', this]) })
      .route({ url: '/own', on: { 'batch.failed': function () { seen.push(['child, route', this]) } } })
  })

  t.equal((await post(app, sign(thin('batch.failed')), '/own')).statusCode, 200)
  t.same(seen.map(([where]) => where), ['child, any', 'root', 'child', 'child, route'])
  for (const [where, scope] of seen) t.equal(scope, where === 'root' ? app : inner, where)
  t.ok(seen.at(-1)![1].hasDecorator('ledger'))
})

t.test('onError is told of every kind of failure, with what is known by then', async t => {
  const app = await build(t, { bodyLimit: 300, idempotency: false })
  app.post('/own', { config: { openaiWebhook: {} } }, async () => {})
  const told: Array<[string | undefined, FailureInfo]> = []
  app.openaiWebhook
    .on('batch.failed', () => { throw new Error('disk full') })
    .onError((error, info) => { told.push([(error as Error & { code?: string }).code, info]) })
  const own = { endpoint: '/webhooks/openai' }
  const good = sign(thin('batch.failed'))
  const expect = async (what: string, answer: { statusCode: number }, status: number, code: string, info: FailureInfo): Promise<void> => {
    t.equal(answer.statusCode, status, what)
    t.same(told.splice(0), [[code, info]], what)
  }

  await expect('a header absent', await post(app, { ...good, headers: { ...good.headers, 'webhook-id': '' } }),
    401, 'FST_OPENAI_WEBHOOK_MISSING_HEADER', own)
  await expect('a bad signature', await post(app, { ...good, headers: { ...good.headers, 'webhook-signature': `v1,${'A'.repeat(43)}=` } }),
    401, 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE', own)
  await expect('a signed body that is no JSON', await post(app, sign('{', { webhookId: 'wh_1' })),
    400, 'FST_OPENAI_WEBHOOK_INVALID_BODY', { ...own, webhookId: 'wh_1' })
  await expect('a signed event of the wrong shape', await post(app, sign(thin('batch.failed', {}), { webhookId: 'wh_2' })),
    400, 'FST_OPENAI_WEBHOOK_INVALID_EVENT', { ...own, webhookId: 'wh_2' })
  await expect('a handler failure', await post(app, good),
    500, 'FST_OPENAI_WEBHOOK_HANDLER_FAILED', { ...own, webhookId: good.headers['webhook-id']!, event: thin('batch.failed') })
  await expect('a body over the limit', await post(app, sign(thin('batch.failed', { id: 'x'.repeat(300) }))),
    413, 'FST_ERR_CTP_BODY_TOO_LARGE', own)
  await expect('another content type', await post(app, { ...good, headers: { ...good.headers, 'content-type': 'text/plain' } }),
    415, 'FST_ERR_CTP_INVALID_MEDIA_TYPE', own)

  const marked = { endpoint: '/own' }
  await expect('a bad signature at a marked route', await post(app, { ...good, headers: { ...good.headers, 'webhook-signature': 'v1,' } }, '/own'),
    401, 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE', marked)
  await expect('a body over the limit of a marked route', await post(app, sign(thin('batch.failed', { id: 'x'.repeat(300) })), '/own'),
    413, 'FST_ERR_CTP_BODY_TOO_LARGE', marked)
  await expect('another content type at a marked route', await post(app, { ...good, headers: { ...good.headers, 'content-type': 'text/plain' } }, '/own'),
    415, 'FST_ERR_CTP_INVALID_MEDIA_TYPE', marked)
})

t.test('an onError handler that fails changes nothing, and is logged', async t => {
  const log = capturedLog()
  const app = await build(t, {}, { logger: log.logger })
  const told: string[] = []
  app.openaiWebhook
    .on('batch.failed', () => { throw new Error('disk full') })
    .onError(() => { throw new Error('thrown by onError') })
    .onError(async () => { throw new Error('rejected by onError') })
    .onError(() => { told.push('still told') })

  const answer = await post(app, sign(thin('batch.failed')))
  t.equal(answer.statusCode, 500)
  t.equal(answer.json<{ code: string }>().code, 'FST_OPENAI_WEBHOOK_HANDLER_FAILED')
  t.same(told, ['still told'])
  const failures = log.errors().filter(({ msg }) => msg === 'an onError handler failed')
  t.same(failures.map(({ err }) => err!.message), ['thrown by onError', 'rejected by onError'])
})

t.test('handler names tell a retry what has finished, whatever the order of registration is by then', async t => {
  const store = memoryStore()
  const delivery = sign(thin('batch.failed'))
  const seen: string[] = []
  const deployed = async (names: string[], failing: string): Promise<number> => {
    const app = Fastify()
    t.teardown(() => app.close())
    await app.register(openaiWebhook, { secret: SECRET, idempotency: { store } })
    for (const name of names) {
      app.openaiWebhook.on('batch.failed', () => {
        if (name === failing) throw new Error(name)
        seen.push(name)
      }, { name })
    }
    return (await post(app, seen.length === 0 ? delivery : redelivered(delivery))).statusCode
  }

  t.equal(await deployed(['ledger', 'mail'], 'mail'), 500)
  t.equal(await deployed(['audit', 'mail', 'ledger'], 'none'), 200)
  t.same(seen, ['ledger', 'audit', 'mail'])
})
