import Fastify from 'fastify'
import type { FastifyInstance, RouteShorthandOptions } from 'fastify'
import t from 'tap'
import openaiWebhook from '../../lib/index.ts'
import type { RouteOverrides, Verifier, WebhookRouteOptions } from '../../lib/index.ts'
import { build, post, sign, SECRET, thin } from '../support/deliveries.ts'
import { codeOf, deferred, messageOf, redelivered } from '../support/observe.ts'

const OTHER = `whsec_${Buffer.from('a secret of the second endpoint').toString('base64')}`
const RECEIVED = '{"received":true}'
const marked = { config: { openaiWebhook: {} } }

async function answer (app: FastifyInstance, url: string, delivery = sign(thin('batch.failed'))): Promise<string> {
  const { statusCode, body } = await post(app, delivery, url)
  return `${statusCode} ${body}`
}

async function code (app: FastifyInstance, url: string, delivery = sign(thin('batch.failed'))): Promise<string> {
  const response = await post(app, delivery, url)
  return `${response.statusCode} ${response.json<{ code: string }>().code.replace('FST_OPENAI_WEBHOOK_', '')}`
}

t.test('the route of our own', async t => {
  t.test('is POST /webhooks/openai', async t => {
    const app = await build(t)
    t.equal(await answer(app, '/webhooks/openai'), `200 ${RECEIVED}`)
    t.equal((await app.inject({ method: 'GET', url: '/webhooks/openai' })).statusCode, 404)
  })

  t.test('goes where `path` says', async t => {
    const app = await build(t, { path: '/hooks/:tenant' })
    const seen: string[] = []
    app.openaiWebhook.on('batch.failed', (_event, { endpoint, request }) => { seen.push(endpoint, (request!.params as { tenant: string }).tenant) })
    t.equal(await answer(app, '/hooks/acme'), `200 ${RECEIVED}`)
    t.equal((await post(app, sign(thin('batch.failed')))).statusCode, 404)
    t.same(seen, ['/hooks/:tenant', 'acme'])
  })

  t.test('is left out by `path: false`, and then no secret is needed at boot', async t => {
    const app = Fastify()
    t.teardown(() => app.close())
    await app.register(openaiWebhook, { path: false })
    app.openaiWebhook.route({ url: '/own', secret: SECRET })
    t.equal((await post(app, sign(thin('batch.failed')))).statusCode, 404)
    t.equal(await answer(app, '/own'), `200 ${RECEIVED}`)
  })
})

t.test('.route()', async t => {
  t.test('runs the app\'s handlers and its own, with a secret of its own', async t => {
    const app = await build(t)
    const seen: string[] = []
    app.openaiWebhook.on('batch.failed', () => { seen.push('app') })
    await app.register(async child => {
      child.openaiWebhook.route({
        url: '/batches',
        secret: OTHER,
        on: {
          'batch.failed': [() => { seen.push('route, first') }, () => { seen.push('route, second') }],
          'batch.*': ({ type }) => { seen.push(`route ${type}`) }
        }
      })
    }, { prefix: '/api' })

    t.equal(await answer(app, '/api/batches', sign(thin('batch.failed'), { secret: OTHER })), `200 ${RECEIVED}`)
    t.same(seen.splice(0), ['app', 'route, first', 'route, second', 'route batch.failed'])
    t.equal(await code(app, '/api/batches'), '401 INVALID_SIGNATURE')
    t.equal(await answer(app, '/webhooks/openai'), `200 ${RECEIVED}`)
    t.same(seen, ['app'])
  })

  t.test('is named as Fastify names it, under a prefix that ends with a slash too', async t => {
    const app = await build(t, { path: false })
    const named: string[] = []
    app.openaiWebhook.onAny((_event, { endpoint, request }) => { named.push(endpoint, String(request!.routeOptions.url)) })
    for (const prefix of ['/api/', '/']) await app.register(async child => { child.openaiWebhook.route({ url: '/hook' }) }, { prefix })
    for (const url of ['/api/hook', '/hook']) t.equal(await answer(app, url), `200 ${RECEIVED}`)
    t.same(named, ['/api/hook', '/api/hook', '/hook', '/hook'])
  })

  t.test('an onUnhandled handler counts what the route handles', async t => {
    const app = await build(t)
    const seen: string[] = []
    app.openaiWebhook
      .onUnhandled((_event, { endpoint }) => { seen.push(endpoint) })
      .route({ url: '/batches', on: { 'batch.*': () => {} } })

    t.equal(await answer(app, '/batches'), `200 ${RECEIVED}`)
    t.equal(await answer(app, '/webhooks/openai'), `200 ${RECEIVED}`)
    t.same(seen, ['/webhooks/openai'])
  })

  t.test('its handler replies once the event handlers have succeeded', async t => {
    const app = await build(t)
    const order: string[] = []
    const { promise: released, resolve: release } = deferred()
    app.openaiWebhook.on('batch.failed', async () => {
      await released
      order.push('event handler')
    })
    app.openaiWebhook
      .route({
        url: '/own',
        handler: async (request, reply) => {
          order.push('handler')
          reply.code(202)
          return { id: (request.body as { id: string }).id, webhookId: request.openaiWebhook.webhookId, bytes: request.openaiWebhook.rawBody.length }
        }
      })
      .route({ url: '/silent', handler: async () => { order.push('silent') } })
    const delivery = sign(thin('batch.failed'))
    const answered = answer(app, '/own', delivery)
    release()

    t.equal(await answered, `202 {"id":"evt_1","webhookId":"${delivery.headers['webhook-id']}","bytes":${delivery.body.length}}`)
    t.equal(await answer(app, '/silent'), `200 ${RECEIVED}`)
    t.same(order, ['event handler', 'handler', 'event handler', 'silent'])
  })

  t.test('its handler does not run when an event handler failed, and runs when the retry succeeds', async t => {
    const app = await build(t)
    const seen: string[] = []
    let broken = true
    app.openaiWebhook
      .on('batch.failed', () => { seen.push('first') })
      .on('batch.failed', () => {
        if (broken) throw new Error('disk full')
        seen.push('second')
      })
      .route({ url: '/own', handler: async () => { seen.push('handler') } })
    const delivery = sign(thin('batch.failed'))

    t.equal(await code(app, '/own', delivery), '500 HANDLER_FAILED')
    broken = false
    t.equal(await answer(app, '/own', redelivered(delivery)), `200 ${RECEIVED}`)
    t.equal(await answer(app, '/own', redelivered(delivery)), '200 {"received":true,"duplicate":true}')
    t.same(seen, ['first', 'second', 'handler'])
  })

  t.test('event handlers that succeeded do not run again because its handler failed', async t => {
    const app = await build(t)
    const seen: string[] = []
    let broken = true
    app.openaiWebhook
      .on('batch.failed', async () => { seen.push('event handler') })
      .route({
        url: '/own',
        handler: async () => {
          seen.push('handler')
          if (broken) throw new Error('no answer')
        }
      })
    const delivery = sign(thin('batch.failed'))

    t.equal((await post(app, delivery, '/own')).statusCode, 500)
    broken = false
    t.equal(await answer(app, '/own', redelivered(delivery)), `200 ${RECEIVED}`)
    t.same(seen, ['event handler', 'handler', 'handler'])
  })

  t.test('takes our own handler as no handler', async t => {
    const app = await build(t)
    app.openaiWebhook.route({ url: '/own', handler: app.openaiWebhook.handler })
    t.equal(await answer(app, '/own'), `200 ${RECEIVED}`)
  })

  t.test('overrides tolerance and bodyLimit, and leaves those of the other routes', async t => {
    const app = await build(t, { bodyLimit: 400, tolerance: 60 })
    app.openaiWebhook.route({ url: '/wide', bodyLimit: 4_000, tolerance: 600 })
    const old = sign(thin('batch.failed'), { timestamp: Math.floor(Date.now() / 1000) - 300 })
    const large = sign(thin('batch.failed', { id: 'x'.repeat(400) }))

    t.equal(await code(app, '/webhooks/openai', old), '401 TIMESTAMP_OUT_OF_TOLERANCE')
    t.equal(await answer(app, '/wide', old), `200 ${RECEIVED}`)
    t.equal((await post(app, large)).statusCode, 413)
    t.equal(await answer(app, '/wide', large), `200 ${RECEIVED}`)
  })

  t.test('takes a verifier of its own', async t => {
    const app = await build(t)
    const seen: string[] = []
    const trusting: Verifier = ({ headers }) => ({ webhookId: String(headers['x-id']), timestamp: Math.floor(Date.now() / 1000) })
    app.openaiWebhook.onAny((_event, { webhookId }) => { seen.push(webhookId) }).route({ url: '/trusting', verifier: trusting })
    const send = (url: string) => app.inject({ method: 'POST', url, headers: { 'x-id': 'seven' }, payload: thin('batch.failed') })

    t.equal((await send('/trusting')).statusCode, 200)
    t.equal((await send('/webhooks/openai')).statusCode, 401)
    t.same(seen, ['seven'])
  })

  t.test('refuses names it does not know, and handlers that can never run', async t => {
    const app = await build(t)
    const route = (options: object) => messageOf(() => app.openaiWebhook.route({ url: '/own', ...options } as WebhookRouteOptions))

    t.match(await route({ tolerence: 5 }), /unknown option "tolerence", did you mean "tolerance"\?/)
    t.match(await route({ deadline: 5 }), /unknown option "deadline"/)
    t.match(await route({ tolerance: '5' }), /expected tolerance to be a whole number of seconds, 1 or more, got "5"/)
    t.match(await route({ on: { 'batch.faild': () => {} } }), /unknown event type "batch\.faild", did you mean "batch\.failed"\?/)
    t.match(await route({ on: { 'batch.failed': 'handler' } }), /expected a handler function, got string/)
    for (const on of [null, [], 'batch.failed', () => {}]) t.match(await route({ on }), /expected on to be an object of handlers by event type, got/)
    t.equal(await codeOf(() => app.openaiWebhook.route({ url: '/own', tolerance: 0 })), 'INVALID_OPTIONS')
    t.equal(await codeOf(() => app.openaiWebhook.route({ url: '/own', secret: 'sk-proj-1' })), 'INVALID_SECRET')
    t.match(await route({ handler: 'reply' }), /expected handler to be a function, got "reply"/)
    t.match(await route({ handlr: async () => {} }), /unknown option "handlr", did you mean "handler"\?/)
    t.match(await route({ prefix: '/v1' }), /unknown option "prefix"/)
    t.match(await route({ url: 'own' }), /expected url to be a path that begins with "\/"/)
    t.match(await route({ url: undefined }), /expected url to be a path that begins with "\/", got nothing/)
    t.match(await messageOf(() => app.openaiWebhook.route(undefined as unknown as WebhookRouteOptions)), /expected options to be an object, got undefined/)
  })
})

t.test('a marked route', async t => {
  t.test('runs its own handler in the place of the app\'s handlers', async t => {
    const app = await build(t)
    const seen: string[] = []
    app.openaiWebhook
      .on('batch.failed', () => { seen.push('app') })
      .onAny(() => { seen.push('app, any') })
      .onUnhandled(() => { seen.push('app, unhandled') })
    app.post('/own', marked, async request => {
      const { event, rawBody, webhookId, timestamp, endpoint } = request.openaiWebhook
      seen.push('own')
      return { endpoint, type: event.type, bytes: rawBody.toString('base64'), webhookId, timestamp, parsed: (request.body as { id: string }).id }
    })
    const delivery = sign(thin('batch.failed'))

    t.same((await post(app, delivery, '/own')).json(), {
      endpoint: '/own',
      type: 'batch.failed',
      bytes: delivery.body.toString('base64'),
      webhookId: delivery.headers['webhook-id'],
      timestamp: Number(delivery.headers['webhook-timestamp']),
      parsed: 'evt_1'
    })
    t.same(seen, ['own'])
  })

  t.test('runs the handlers in its config first', async t => {
    const app = await build(t)
    const seen: string[] = []
    app.openaiWebhook.on('batch.failed', () => { seen.push('app') })
    app.post('/own', { config: { openaiWebhook: { on: { 'batch.*': async () => { seen.push('config') } } } } }, async () => { seen.push('own') })

    t.equal(await answer(app, '/own'), `200 ${RECEIVED}`)
    t.same(seen, ['config', 'own'])
  })

  t.test('binds the handlers in its config to its scope', async t => {
    const app = await build(t)
    let scope: FastifyInstance | undefined
    let seen: FastifyInstance | undefined
    await app.register(async child => {
      scope = child
      child.post('/own', { config: { openaiWebhook: { on: { 'batch.failed': function () { seen = this } } } } }, async () => {})
    })
    t.equal(await answer(app, '/own'), `200 ${RECEIVED}`)
    t.ok(seen === scope)
  })

  t.test('has a URL of its own', async t => {
    const app = await build(t)
    const at = (host: string) => codeOf(() => app.post('/own', { ...marked, constraints: { host } }, async () => {}))
    t.equal(await at('a.test'), 'none')
    t.equal(await at('b.test'), 'INVALID_ROUTE')
  })

  t.test('dispatches to the app and to its config by `app.openaiWebhook.handler`', async t => {
    const app = await build(t)
    const seen: string[] = []
    app.openaiWebhook.on('batch.failed', () => { seen.push('app') })
    app.post('/own', { config: { openaiWebhook: { on: { 'batch.failed': () => { seen.push('config') } } } } }, app.openaiWebhook.handler)
    await app.register(async child => { child.post('/child', marked, child.openaiWebhook.handler) })

    const delivery = sign(thin('batch.failed'))
    t.equal(await answer(app, '/own', delivery), `200 ${RECEIVED}`)
    t.equal(await answer(app, '/own', redelivered(delivery)), '200 {"received":true,"duplicate":true}')
    t.same(seen.splice(0), ['app', 'config'])
    t.equal(await answer(app, '/child'), `200 ${RECEIVED}`)
    t.same(seen, ['app'])
  })

  t.test('has overrides', async t => {
    const app = await build(t)
    app.post('/own', { config: { openaiWebhook: { secret: [OTHER, SECRET], tolerance: 900, bodyLimit: 300 } } }, async () => {})
    app.post('/fastify', { ...marked, bodyLimit: 300 }, async () => {})
    const timestamp = Math.floor(Date.now() / 1000) - 600

    t.equal(await answer(app, '/own', sign(thin('batch.failed'), { secret: OTHER, timestamp })), `200 ${RECEIVED}`)
    t.equal(await answer(app, '/own', sign(thin('batch.failed'), { timestamp })), `200 ${RECEIVED}`)
    const large = sign(thin('batch.failed', { id: 'x'.repeat(300) }))
    t.equal(await code(app, '/own', large), '413 FST_ERR_CTP_BODY_TOO_LARGE')
    t.equal(await code(app, '/fastify', large), '413 FST_ERR_CTP_BODY_TOO_LARGE')
  })

  t.test('refuses what is not signed before its own hooks and handler', async t => {
    const app = await build(t)
    const seen: string[] = []
    app.post('/own', {
      ...marked,
      preValidation: async () => { seen.push('preValidation') }
    }, async () => { seen.push('own') })

    t.equal(await code(app, '/own', sign(thin('batch.failed'), { secret: OTHER })), '401 INVALID_SIGNATURE')
    t.equal((await app.inject({ method: 'POST', url: '/own', payload: {} })).statusCode, 401)
    t.same(seen, [])
  })

  t.test('is refused at boot where it cannot be verified', async t => {
    const app = await build(t)
    const handler = async (): Promise<void> => {}
    const fault = (options: object) => messageOf(() => app.route({ method: 'POST', url: '/own', handler, ...marked, ...options }))

    t.match(await fault({ method: 'GET' }), /route GET \/own: expected the method POST alone/)
    t.match(await fault({ method: ['POST', 'PUT'] }), /route POST,PUT \/own: expected the method POST alone/)
    t.match(await fault({ schema: { body: {} } }), /schema\.body would be checked before the signature/)
    for (const config of ['yes', true, null, [], 1]) {
      t.match(await fault({ config: { openaiWebhook: config } }), /expected config\.openaiWebhook to be an object, such as \{\}/, JSON.stringify(config))
    }
    t.equal(await codeOf(() => app.route({ method: 'GET', url: '/own', handler, ...marked })), 'INVALID_ROUTE')
    t.match(await fault({ config: { openaiWebhook: { tolerence: 5 } } }), /unknown option "tolerence", did you mean "tolerance"\?/)
    t.equal(await codeOf(() => app.post('/own', { config: { openaiWebhook: { bodyLimit: 0 } } }, handler)), 'INVALID_OPTIONS')
    t.match(await fault({ config: { openaiWebhook: { on: [] } } }), /expected on to be an object of handlers by event type, got an array/)
  })

  t.test('may say its method in an array, and have schemas for all but the body', async t => {
    const app = await build(t)
    app.route({
      method: ['POST'],
      url: '/own',
      ...marked,
      schema: {
        headers: { type: 'object', required: ['webhook-id'], properties: { 'x-region': { enum: ['eu'] } } },
        response: { 200: { type: 'object', properties: { type: { type: 'string' } } } }
      },
      handler: async request => ({ type: request.openaiWebhook.event.type, hidden: true })
    })
    const delivery = sign(thin('batch.failed'))

    t.equal((await post(app, { ...delivery, headers: { ...delivery.headers, 'x-region': 'us' } }, '/own')).statusCode, 400)
    t.equal(await answer(app, '/own', delivery), '200 {"type":"batch.failed"}')
  })

  t.test('asks for nothing by `config: { openaiWebhook: undefined }`', async t => {
    const app = await build(t)
    app.post('/plain', { config: { openaiWebhook: undefined } as RouteShorthandOptions['config'] & object }, async request => ({ webhook: request.openaiWebhook }))
    t.equal((await app.inject({ method: 'POST', url: '/plain', payload: {} })).body, '{"webhook":null}')
  })

  t.test('works in a child scope, under a prefix, with or without a slash', async t => {
    const app = await build(t)
    const seen: string[] = []
    const on: RouteOverrides['on'] = { 'batch.failed': (_event, { endpoint }) => { seen.push(endpoint) } }
    await app.register(async child => {
      child.post('/own', { config: { openaiWebhook: { on } } }, child.openaiWebhook.handler)
      child.post('/', marked, async () => 'both')
    }, { prefix: '/api' })

    t.equal(await answer(app, '/api/own'), `200 ${RECEIVED}`)
    t.same(seen, ['/api/own'])
    for (const url of ['/api', '/api/']) {
      t.equal(await answer(app, url), '200 both', url)
      t.equal(await code(app, url, sign(thin('batch.failed'), { secret: OTHER })), '401 INVALID_SIGNATURE', url)
    }
  })

  t.test('keeps the hooks that the user gave it, in order', async t => {
    const app = await build(t)
    const seen: string[] = []
    const step = (name: string) => async (): Promise<void> => { seen.push(name) }
    app.post('/functions', {
      ...marked,
      onRequest: step('onRequest'),
      preParsing: async (_request, _reply, payload) => {
        seen.push('preParsing')
        return payload
      },
      preValidation: step('preValidation'),
      preHandler: step('preHandler'),
      onSend: async (_request, reply, payload) => {
        seen.push('onSend')
        reply.header('x-hook', 'ran')
        return payload
      }
    }, async () => { seen.push('own') })
    app.post('/arrays', {
      ...marked,
      onRequest: [step('onRequest 1'), step('onRequest 2')],
      preParsing: [
        async (_request, _reply, payload) => {
          seen.push('preParsing 1')
          await new Promise(resolve => setImmediate(resolve))
          return payload
        },
        (_request, _reply, payload, done) => {
          seen.push('preParsing 2')
          done(null, payload)
        }
      ],
      preHandler: [step('preHandler 1'), step('preHandler 2')],
      onSend: [
        async (_request, _reply, payload) => `${String(payload)}1`,
        (_request, _reply, payload, done) => done(null, `${String(payload)}2`)
      ]
    }, async request => (request.body as { id: string }).id)

    const response = await post(app, sign(thin('batch.failed')), '/functions')
    t.equal(response.headers['x-hook'], 'ran')
    t.equal(response.body, RECEIVED)
    t.same(seen.splice(0), ['onRequest', 'preParsing', 'preValidation', 'preHandler', 'own', 'onSend'])
    t.equal(await answer(app, '/arrays'), '200 evt_112')
    t.same(seen, ['onRequest 1', 'onRequest 2', 'preParsing 1', 'preParsing 2', 'preHandler 1', 'preHandler 2'])
  })

  t.test('has hooks of the app run for it as for any route', async t => {
    const app = await build(t)
    const seen: string[] = []
    app.addHook('preHandler', async request => { seen.push(request.openaiWebhook!.event.type) })
    app.post('/own', marked, async () => {})
    t.equal(await answer(app, '/own'), `200 ${RECEIVED}`)
    t.same(seen, ['batch.failed'])
  })
})

t.test('a route that asks for verification and cannot have it fails closed', async t => {
  t.test('declared before the plugin had loaded', async t => {
    const app = Fastify()
    t.teardown(() => app.close())
    const seen: string[] = []
    app.register(openaiWebhook, { secret: SECRET })
    app.post('/early', marked, async () => { seen.push('early') })
    app.post('/string', { config: { openaiWebhook: 'yes' } as RouteShorthandOptions['config'] & object }, async () => { seen.push('string') })
    app.post('/plain', async () => 'plain')
    await app.ready()

    t.equal(await code(app, '/early'), '500 UNPROTECTED_ROUTE')
    t.equal(await code(app, '/early', sign(thin('batch.failed'), { secret: OTHER })), '500 UNPROTECTED_ROUTE')
    const unsigned = await app.inject({ method: 'POST', url: '/early', payload: {} })
    t.equal(unsigned.statusCode, 500)
    t.match(unsigned.json<{ message: string }>().message, /route POST \/early .* declare the route below `await app\.register/)
    t.equal(await code(app, '/string'), '500 UNPROTECTED_ROUTE')
    t.same(seen, [])
    t.equal((await app.inject({ method: 'POST', url: '/plain', payload: {} })).body, 'plain')
  })

  t.test('in a child scope that was declared before the plugin', async t => {
    const app = Fastify()
    t.teardown(() => app.close())
    const seen: string[] = []
    await app.register(async child => { child.post('/early', marked, async () => { seen.push('early') }) })
    await app.register(openaiWebhook, { secret: SECRET })

    t.equal(await code(app, '/early'), '500 UNPROTECTED_ROUTE')
    t.same(seen, [])
  })

  t.test('our handler on a route that is not marked', async t => {
    const app = await build(t)
    const seen: string[] = []
    app.openaiWebhook.onAny(() => { seen.push('ran') })
    app.post('/unmarked', app.openaiWebhook.handler)

    t.equal(await code(app, '/unmarked'), '500 UNPROTECTED_ROUTE')
    t.match((await app.inject({ method: 'POST', url: '/unmarked', payload: {} })).json(), { message: /is not marked, so nothing verifies it: add config: \{ openaiWebhook: \{\} \}/ })
    t.same(seen, [])
  })
})
