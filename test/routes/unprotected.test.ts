import Fastify from 'fastify'
import type { FastifyInstance } from 'fastify'
import t from 'tap'

// Apps that were there before the plugin was imported, as those of fastify-cli are: their routes are not seen from the first on.

type Declare = (app: FastifyInstance) => unknown

const apps = Array.from({ length: 5 }, () => Fastify() as FastifyInstance)
const { default: openaiWebhook } = await import('../../lib/index.ts')
const { post, sign, SECRET, thin } = await import('../support/deliveries.ts')
const { codeOf } = await import('../support/observe.ts')
t.teardown(() => Promise.all(apps.map(app => app.close())))

const register = (path: string): Declare => scope => scope.register(openaiWebhook, { secret: SECRET, path })
const below = (declare: Declare): Declare => app => app.register(async scope => { await declare(scope) })
const marked: Declare = scope => { scope.post('/marked', { config: { openaiWebhook: {} } }, async () => 'served') }
const plugin = below(register('/webhooks/openai'))

async function declared (...declarations: Declare[]): Promise<FastifyInstance> {
  const app = apps.pop()!
  for (const declare of declarations) await declare(app)
  return app
}

t.test('a marked route that no registration reaches is not served', async t => {
  for (const [where, early] of Object.entries({ 'in the parent': marked, 'in a sibling': below(marked) })) {
    const app = await declared(early, plugin)
    const response = await app.inject({ method: 'POST', url: '/marked', payload: {} })
    t.equal(response.statusCode, 500, where)
    t.match(response.json(), { code: 'FST_OPENAI_WEBHOOK_UNPROTECTED_ROUTE' })
  }
})

t.test('declared after the registration, it keeps the app from starting', async t => {
  for (const late of [marked, below(marked)]) {
    const app = await declared(plugin, late)
    t.equal(await codeOf(() => app.ready()), 'UNPROTECTED_ROUTE')
  }
})

t.test('routes that are not marked, and those of two registrations, are served', async t => {
  const app = await declared(scope => scope.post('/plain', async () => 'plain'), plugin, below(register('/second')))
  t.equal((await app.inject({ method: 'POST', url: '/plain', payload: {} })).body, 'plain')
  for (const url of ['/webhooks/openai', '/second']) t.equal((await post(app, sign(thin('batch.failed')), url)).statusCode, 200)
})
