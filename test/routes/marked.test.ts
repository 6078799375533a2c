import Fastify from 'fastify'
import type { FastifyInstance } from 'fastify'
import t from 'tap'
import openaiWebhook from '../../lib/index.ts'
import { build as buildApp, outcome, SECRET, sign, thin } from '../support/deliveries.ts'
import { codeOf, messageOf } from '../support/observe.ts'

// A route that asks for verification is never served without it, wherever it stands.

type Declare = (app: FastifyInstance) => unknown

const marked = { config: { openaiWebhook: {} } }
const plugin: Declare = scope => scope.register(openaiWebhook, { secret: SECRET })
const own: Declare = scope => scope.post('/marked', marked, async () => 'served')

async function build (t: { teardown: (fn: () => unknown) => void }, declare: Declare): Promise<FastifyInstance> {
  const app = Fastify() as FastifyInstance
  t.teardown(() => app.close())
  await declare(app)
  return app
}

const elsewhere: Record<string, Declare> = {
  'in the parent, before': async app => {
    own(app)
    await app.register(async scope => { await plugin(scope) })
  },
  'in the parent, after': async app => {
    await app.register(async scope => { await plugin(scope) })
    own(app)
  },
  'in a sibling, before': async app => {
    await app.register(async scope => { own(scope) })
    await app.register(async scope => { await plugin(scope) })
  },
  'in a sibling, after': async app => {
    await app.register(async scope => { await plugin(scope) })
    await app.register(async scope => { await scope.register(async below => { own(below) }) })
  },
  'in an app without the plugin': own
}

t.test('a marked route that no registration reaches keeps the app from starting', async t => {
  for (const [where, declare] of Object.entries(elsewhere)) {
    const started = await build(t, declare)
    t.match(await messageOf(() => started.ready()), /^route POST \/marked asks for webhook verification but fastify-openai-webhook is registered neither in its scope nor in one above/, where)
  }
  const started = await build(t, own)
  t.equal(await codeOf(() => started.ready()), 'UNPROTECTED_ROUTE')
})

t.test('a misspelt mark is refused at boot', async t => {
  const handler = async (): Promise<string> => 'served'
  for (const key of ['openaiWebhok', 'openaiWebhooks', 'openAIWebhook', 'openai_webhook', 'openai-webhook', 'OpenaiWebHook']) {
    const fault = `route POST /marked: config.${key} asks for nothing, did you mean config.openaiWebhook?`
    const declare: Declare = scope => scope.post('/marked', { config: { [key]: {} } }, handler)
    const inScope = build(t, async app => {
      await plugin(app)
      declare(app)
    })
    t.equal(await messageOf(() => inScope), fault)
    const outside = await build(t, async app => {
      declare(app)
      await app.register(async scope => { await plugin(scope) })
    })
    t.equal(await messageOf(() => outside.ready()), fault)
    const early = await build(t, async app => {
      app.register(openaiWebhook, { secret: SECRET })
      declare(app)
    })
    t.equal(await codeOf(() => early.ready()), 'INVALID_ROUTE')
    const other = await build(t, declare)
    await other.ready()
  }
  const beside = build(t, async app => {
    await plugin(app)
    app.route({ method: 'POST', url: '/marked', openaiWebhook: {}, handler } as never)
  })
  t.match(await messageOf(() => beside), /: the route option openaiWebhook asks for nothing, did you mean config\.openaiWebhook\?$/)
})

t.test('other keys are the user\'s', async t => {
  const started = await build(t, async app => {
    await plugin(app)
    app.post('/plain', { config: { webhook: {}, openai: {}, openaiWebhooks: undefined, openaiWebhookUrl: '/x', rateLimit: false } as object }, async () => 'plain')
  })
  t.equal((await started.inject({ method: 'POST', url: '/plain', payload: {} })).body, 'plain')
})

t.test('a route that is given the config of a verified one is verified too', async t => {
  const app = await buildApp(t)
  app.addHook('onRoute', function ({ url, config }) {
    if (url !== '/own') return
    this.post('/copy', { config: { ...config } }, async () => 'copy')
  })
  app.post('/own', marked, async () => 'own')
  const forged = sign(thin('batch.failed'), { secret: 'whsec_bm90IHRoZSBzZWNyZXQ=' })
  for (const url of ['/own', '/copy']) {
    t.equal(await outcome(app, forged, url), '401 INVALID_SIGNATURE')
    t.equal(await outcome(app, undefined, url), `200 ${url.slice(1)}`)
  }
})
