import Fastify from 'fastify'
import t from 'tap'
import openaiWebhook from '../../lib/index.ts'
import { build, post, sign, SECRET, thin } from '../support/deliveries.ts'
import { codeOf } from '../support/observe.ts'

const OTHER = `whsec_${Buffer.from('a secret of the second endpoint').toString('base64')}`

t.test('one registration a scope: a second one there or below is refused', async t => {
  const app = await build(t)

  t.equal(await codeOf(() => app.register(openaiWebhook, { secret: SECRET, path: '/again' })), 'ALREADY_REGISTERED')
})

t.test('a second registration in a child scope is refused', async t => {
  const app = await build(t)
  const register = app.register(async child => {
    await child.register(openaiWebhook, { secret: SECRET, path: '/again' })
  })

  t.equal(await codeOf(() => register), 'ALREADY_REGISTERED')
})

t.test('siblings have secrets, handlers and paths of their own', async t => {
  const app = Fastify()
  t.teardown(() => app.close())
  const seen: string[] = []
  await app.register(async left => {
    await left.register(openaiWebhook, { secret: SECRET, path: '/left' })
    left.openaiWebhook.on('batch.failed', () => { seen.push('left') })
  })
  await app.register(async right => {
    await right.register(openaiWebhook, { secret: OTHER, path: '/right' })
    right.openaiWebhook.on('batch.failed', () => { seen.push('right') })
  })
  const status = async (url: string, secret: string): Promise<number> =>
    (await post(app, sign(thin('batch.failed'), { secret }), url)).statusCode

  t.equal(await status('/left', SECRET), 200)
  t.equal(await status('/right', OTHER), 200)
  t.equal(await status('/left', OTHER), 401)
  t.equal(await status('/right', SECRET), 401)
  t.same(seen, ['left', 'right'])
  t.notOk(app.hasDecorator('openaiWebhook'), 'the scope above has none')
})

t.test('the same webhook-id at two endpoints is two deliveries', async t => {
  const app = await build(t)
  const seen: string[] = []
  app.openaiWebhook
    .route({ url: '/second' })
    .on('batch.failed', (_event, { endpoint }) => { seen.push(endpoint) })
  const delivery = sign(thin('batch.failed'))

  t.equal((await post(app, delivery)).body, '{"received":true}')
  t.equal((await post(app, delivery, '/second')).body, '{"received":true}')
  t.equal((await post(app, delivery, '/second')).body, '{"received":true,"duplicate":true}')
  t.same(seen, ['/webhooks/openai', '/second'])
})

t.test('a delivery replayed to another endpoint', async t => {
  await t.test('runs the handlers there too, where that has the same secret', async t => {
    const app = await build(t)
    const seen: string[] = []
    app.openaiWebhook
      .route({ url: '/second', on: { 'batch.failed': () => { seen.push('of the route') } } })
      .on('batch.failed', (_event, { endpoint }) => { seen.push(endpoint) })
    app.post('/marked', { config: { openaiWebhook: {} } }, async () => { seen.push('marked') })
    const delivery = sign(thin('batch.failed'))
    for (const url of ['/webhooks/openai', '/second', '/marked']) {
      t.same((await post(app, delivery, url)).json(), { received: true }, `${url} has not processed it`)
      t.same((await post(app, delivery, url)).json(), { received: true, duplicate: true }, `${url} has`)
    }
    t.same(seen, ['/webhooks/openai', '/second', 'of the route', 'marked'])
  })

  await t.test('is refused, where that has a secret of its own', async t => {
    const app = await build(t)
    app.openaiWebhook.route({ url: '/second', secret: OTHER }).on('batch.failed', () => {})
    const delivery = sign(thin('batch.failed'))
    t.equal((await post(app, delivery)).statusCode, 200)
    t.equal((await post(app, delivery, '/second')).statusCode, 401)
  })
})

t.test('a route is one endpoint, at however many URLs it is reached', async t => {
  const app = Fastify({ routerOptions: { caseSensitive: false, ignoreTrailingSlash: true } })
  t.teardown(() => app.close())
  await app.register(openaiWebhook, { secret: SECRET, path: '/hooks/:project' })
  const seen: string[] = []
  app.openaiWebhook.route({ url: '/any/*' }).on('batch.failed', (_event, { endpoint }) => { seen.push(endpoint) })
  app.post('/marked/:project', { config: { openaiWebhook: {} } }, async () => { seen.push('marked') })
  for (const urls of [['/hooks/one', '/hooks/two', '/hooks/one?a=1', '/HOOKS/one/'], ['/any/one', '/any/two/three'], ['/marked/one', '/marked/two']]) {
    const delivery = sign(thin('batch.failed'))
    const answers = await Promise.all(urls.map(async url => (await post(app, delivery, url)).json<object>()))
    t.same(answers, urls.map((_url, i) => i === 0 ? { received: true } : { received: true, duplicate: true }), urls.join(' '))
  }
  t.same(seen, ['/hooks/:project', '/any/*', 'marked'])
})

t.test('`prefix` goes before the path', async t => {
  const app = await build(t, { prefix: '/v1' })
  const seen: string[] = []
  app.openaiWebhook.on('batch.failed', (_event, { endpoint }) => { seen.push(endpoint) })

  t.equal((await post(app, sign(thin('batch.failed')), '/v1/webhooks/openai')).statusCode, 200)
  t.equal((await post(app, sign(thin('batch.failed')))).statusCode, 404)
  t.same(seen, ['/v1/webhooks/openai'])
})

t.test('`prefix` adds to that of the scope', async t => {
  const app = Fastify()
  t.teardown(() => app.close())
  const seen: string[] = []
  await app.register(async api => {
    await api.register(openaiWebhook, { secret: SECRET, prefix: '/hooks', path: '/openai' })
    api.openaiWebhook.on('batch.failed', (_event, { endpoint }) => { seen.push(endpoint) })
  }, { prefix: '/api' })

  t.equal((await post(app, sign(thin('batch.failed')), '/api/hooks/openai')).statusCode, 200)
  t.same(seen, ['/api/hooks/openai'])
})

t.test('other routes parse what they parsed before', async t => {
  const app = Fastify()
  t.teardown(() => app.close())
  app.addContentTypeParser('application/vnd.ledger', { parseAs: 'string' }, (_request, body, done) => done(null, { ledger: body }))
  app.post('/before', async request => ({ got: request.body }))
  await app.register(openaiWebhook, { secret: SECRET })
  app.post('/after', async request => ({ got: request.body, webhook: request.openaiWebhook }))
  await app.register(async child => {
    child.addContentTypeParser('application/octet-stream', { parseAs: 'buffer' }, (_request, body, done) => done(null, body))
    child.post('/bytes', async request => (request.body as Buffer).toString('hex'))
    child.post('/child', async request => ({ got: request.body }))
  })
  const body = async (url: string, contentType: string, payload: string | Buffer): Promise<string> =>
    (await app.inject({ method: 'POST', url, headers: { 'content-type': contentType }, payload })).body

  for (const url of ['/before', '/child']) {
    t.equal(await body(url, 'application/json', '{"a":[1]}'), '{"got":{"a":[1]}}', url)
    t.equal(await body(url, 'text/plain', 'plain'), '{"got":"plain"}', url)
    t.equal(await body(url, 'application/vnd.ledger', '7'), '{"got":{"ledger":"7"}}', url)
  }
  t.equal(await body('/after', 'application/json', '{"a":[1]}'), '{"got":{"a":[1]},"webhook":null}')
  t.equal(await body('/bytes', 'application/octet-stream', Buffer.from([0, 0xff])), '00ff')
  t.match(await body('/after', 'application/json', '{"__proto__":1}'), /FST_ERR_CTP_INVALID_JSON_BODY|Object contains forbidden prototype property/)
  t.equal((await post(app, sign(thin('batch.failed')))).statusCode, 200, 'and the webhook is received beside them')
})

t.test('a parser of the app\'s does not reach the receiving route', async t => {
  const app = Fastify()
  t.teardown(() => app.close())
  const parsed: string[] = []
  app.removeAllContentTypeParsers()
  app.addContentTypeParser('*', { parseAs: 'string' }, (_request, body, done) => {
    parsed.push(String(body))
    done(null, {})
  })
  await app.register(openaiWebhook, { secret: SECRET })
  const seen: string[] = []
  app.openaiWebhook.on('batch.failed', event => { seen.push(event.data.id) })

  t.equal((await post(app, sign(thin('batch.failed')))).statusCode, 200)
  t.equal((await post(app, sign(thin('batch.failed'), { secret: OTHER }))).statusCode, 401)
  t.same([seen, parsed], [['res_1'], []])
})

t.test('the plugin names itself, so that others can depend on it', async t => {
  const app = await build(t)
  t.ok(app.hasPlugin('fastify-openai-webhook'))
})
