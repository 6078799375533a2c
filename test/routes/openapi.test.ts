import { createHmac } from 'node:crypto'
import { join } from 'node:path'
import { Readable } from 'node:stream'
import { pathToFileURL } from 'node:url'
import swagger from '@fastify/swagger'
import type { FastifyDynamicSwaggerOptions } from '@fastify/swagger'
import swaggerUi from '@fastify/swagger-ui'
import { Validator } from '@seriousme/openapi-schema-validator'
import { Type } from '@sinclair/typebox'
import type { TSchema } from '@sinclair/typebox'
import { type as arktype } from 'arktype'
import Fastify from 'fastify'
import type { FastifyInstance } from 'fastify'
import t from 'tap'
import type { Test } from 'tap'
import { Type as TypeBox1 } from 'typebox'
import ts from 'typescript'
import * as v from 'valibot'
import * as z from 'zod'
import openaiWebhook, { guideEvents, memoryStore, standardWebhooks, xOpenAISignature } from '../../lib/index.ts'
import type { AnySchema, IdempotencyStore, OpenAIWebhookOptions, Verifier } from '../../lib/index.ts'
import { officialEntries } from '../../lib/events/index.ts'
import { deliver, faultNames, forge, redeliver, sampleEvent, sampleTypes, sign, testSecret } from '../../lib/testing/index.ts'
import { codeBlocks, readDocument, tableRows } from '../support/docs.ts'
import { isLong } from '../support/size.ts'

const URL_ = '/webhooks/openai'
const validator = new Validator()
const INFO = { title: 'test', version: '1.0.0' }
const PREFIX = 'FST_OPENAI_WEBHOOK_'

interface Schema {
  title?: string
  description?: string
  enum?: unknown[]
  example?: unknown
  examples?: unknown[]
  oneOf?: Schema[]
  properties?: Record<string, Schema>
}

interface Operation {
  summary: string
  tags: string[]
  security: unknown[]
  /** In Swagger 2. */
  consumes?: string[]
  parameters?: Array<{ in: string, name: string, required: boolean, schema?: Schema }>
  requestBody: { required: boolean, content: Record<string, { schema: Schema }> }
  responses: Record<string, { description: string, headers?: Record<string, unknown>, content: Record<string, { schema: Schema }> }>
}

interface Document {
  openapi?: string
  swagger?: string
  paths: Record<string, { post: Operation }>
}

interface Options {
  swagger?: FastifyDynamicSwaggerOptions
  webhook?: OpenAIWebhookOptions
  /** Adds routes once both are registered. */
  routes?: (app: FastifyInstance) => void
}

const openapi = (version = '3.1.0'): FastifyDynamicSwaggerOptions => ({ openapi: { openapi: version, info: INFO } })

async function build (t: Test, { swagger: swaggerOptions = openapi(), webhook, routes }: Options = {}): Promise<FastifyInstance> {
  const app = Fastify() as FastifyInstance
  t.teardown(() => app.close())
  await app.register(swagger, swaggerOptions)
  await app.register(openaiWebhook, { secret: testSecret, ...webhook })
  routes?.(app)
  await app.ready()
  return app
}

/** As it goes out: what is not JSON, such as TypeBox's symbols, is gone. */
const documentOf = (app: FastifyInstance): Document => JSON.parse(JSON.stringify(app.swagger())) as Document

const operationOf = (app: FastifyInstance, url = URL_): Operation => documentOf(app).paths[url]!.post

const schemaOf = ({ content }: { content: Record<string, { schema: Schema }> }): Schema => content['application/json']!.schema

const bodyOf = (app: FastifyInstance, url?: string): Schema => schemaOf(operationOf(app, url).requestBody)

/** Documented codes by status. */
function codesOf ({ responses }: Operation): Record<string, unknown[]> {
  return Object.fromEntries(Object.entries(responses)
    .map(([status, response]) => [status, schemaOf(response).properties?.['code']?.enum ?? []])
    .filter(([, codes]) => codes!.length > 0))
}

/** Tells whether a value fits a schema of a document, by Fastify's own validator. */
async function fitter (t: Test, schemas: Record<string, object>): Promise<(name: string, value: unknown) => Promise<boolean>> {
  const app = Fastify({ ajv: { customOptions: { coerceTypes: false, removeAdditional: false, useDefaults: false, strict: false } } })
  t.teardown(() => app.close())
  for (const [name, body] of Object.entries(schemas)) app.post(`/${name}`, { schema: { body } }, async () => null)
  await app.ready()
  return async (name, value) => {
    const { statusCode } = await app.inject({ method: 'POST', url: `/${name}`, headers: { 'content-type': 'application/json' }, payload: JSON.stringify(value) })
    return statusCode === 200
  }
}

const Recursive = Type.Recursive(This => Type.Object({ name: Type.String(), children: Type.Array(This) }))

/** Schemas of a user's own: what TypeBox has beside plain objects. */
const OWN_EVENTS: Record<string, AnySchema> = {
  'own.described': Type.Object({ type: Type.Literal('own.described'), data: Type.Object({}) }, { title: 'Mine', description: 'My own words.' }),
  'own.untyped': Type.Object({ type: Type.String(), data: Type.Object({ count: Type.Integer() }) }),
  'own.intersection': Type.Intersect([Type.Object({ type: Type.Literal('own.intersection') }), Type.Object({ data: Type.Object({ id: Type.String() }) })]),
  'own.nullable': Type.Object({
    type: Type.Literal('own.nullable'),
    data: Type.Object({ maybe: Type.Union([Type.String(), Type.Null()], { default: null }), level: Type.Union([Type.Literal(1), Type.Literal('high')]) })
  }),
  'own.names': Type.Object({
    type: Type.Literal('own.names'),
    // Names that mean something in a schema, as names of properties.
    data: Type.Object({ examples: Type.String(), const: Type.String(), type: Type.Number({ examples: [1, 2] }), list: Type.Array(Type.String({ examples: ['a'] })) })
  }),
  'own.record': Type.Object({ type: Type.Literal('own.record'), data: Type.Record(Type.String(), Type.Integer()) }),
  'own.typebox1': TypeBox1.Object({ type: TypeBox1.Literal('own.typebox1'), data: TypeBox1.Object({ count: TypeBox1.Integer() }) }),
  'own.cyclic1': TypeBox1.Cyclic({ Tree: TypeBox1.Object({ type: TypeBox1.Literal('own.cyclic1'), data: TypeBox1.Optional(TypeBox1.Ref('Tree')) }) }, 'Tree'),
  'own.zod': z.object({ type: z.literal('own.zod'), data: z.object({ count: z.int(), note: z.string().optional() }) }),
  'own.arktype': arktype({ type: "'own.arktype'", data: { count: 'number.integer' } }),
  'own.valibot': v.object({ type: v.literal('own.valibot'), data: v.object({ count: v.number() }) })
}

const IDENTIFIED: Record<string, TSchema> = {
  'own.identified': Type.Object({ type: Type.Literal('own.identified'), data: Type.Object({}) }, { $id: 'OwnIdentified' }),
  'own.recursive': Type.Object({ type: Type.Literal('own.recursive'), data: Recursive })
}

/** Standard, but with a header of its own checked first. */
const wrapping: Verifier = Object.assign((...[delivery, keys]: Parameters<Verifier>) => standardWebhooks()(delivery, keys), {
  checkHeaders: standardWebhooks().checkHeaders!
})

const foreign: Verifier = ({ headers }) => ({ webhookId: String(headers['x-id']), timestamp: Date.now() / 1000 })

t.test('the document validates, whatever is registered', async t => {
  const everything: Options = {
    webhook: { events: { ...guideEvents, ...OWN_EVENTS, ...IDENTIFIED }, prefix: '/api' },
    routes (app) {
      app.openaiWebhook
        .route({ url: '/replying', handler: async () => ({}) })
        .route({ url: '/tenants/:tenant/openai' })
        .route({ url: '/tenants/:tenant/replying', handler: async () => {} })
        .route({ url: '/guide', verifier: xOpenAISignature() })
        .route({ url: '/foreign', verifier: foreign })
    }
  }
  const paths = [`/api${URL_}`, '/replying', '/tenants/{tenant}/openai', '/tenants/{tenant}/replying', '/guide', '/foreign']
  const security = { securitySchemes: { key: { type: 'apiKey', name: 'key', in: 'header' } } } as const

  const cases: Record<string, FastifyDynamicSwaggerOptions> = {
    'OpenAPI 3.0, the default': { openapi: { info: INFO } },
    'OpenAPI 3.0.0': openapi('3.0.0'),
    'OpenAPI 3.1': openapi('3.1.0'),
    'OpenAPI 3.1 with const': { ...openapi('3.1.0'), convertConstToEnum: false },
    'OpenAPI 3.2': openapi('3.2.0'),
    'security on every route': { openapi: { info: INFO, components: security, security: [{ key: [] }] } },
    'a decorator of another name': { ...openapi(), decorator: 'documented' },
    'only what has tags': { ...openapi(), hideUntagged: true }
  }
  for (const [name, options] of Object.entries(cases)) {
    t.test(name, async t => {
      const app = await build(t, {
        ...everything,
        swagger: options,
        routes (app) {
          app.addSchema(IDENTIFIED['own.identified']!) // the app may know the schema too
          everything.routes!(app)
        }
      })
      if (options.decorator !== undefined) app.swagger = app.getDecorator(options.decorator)
      const document = documentOf(app)
      t.same(await validator.validate(structuredClone(document) as never), { valid: true })
      t.doesNotThrow(() => validator.resolveRefs(), 'every reference leads somewhere')
      t.equal(document.openapi, options.openapi!.openapi ?? '3.0.3')
      t.same(Object.keys(document.paths), paths)
      for (const path of paths) t.same(document.paths[path]!.post.security, [], `${path}: a signature is no security scheme`)
    })
  }

  t.test('Swagger 2', async t => {
    const app = await build(t, { ...everything, swagger: { swagger: { info: INFO } } })
    const document = documentOf(app)
    t.same(await validator.validate(structuredClone(document) as never), { valid: true })
    t.equal(document.swagger, '2.0')
    t.same(Object.keys(document.paths), paths)

    const { parameters, responses, consumes } = document.paths[`/api${URL_}`]!.post
    t.same(consumes, ['application/json'])
    const body = parameters!.find(({ name }) => name === 'body')!.schema!
    for (const type of [...Object.keys(officialEntries), 'file.processed', 'own.described']) t.match(body.properties!['type']!.description, `\`${type}\``)
    t.same(Object.keys(responses), ['200', '400', '401', '408', '409', '413', '415', '500', '503'])
  })

  t.test('as YAML', async t => {
    const app = await build(t, everything)
    t.same(await validator.validate(app.swagger({ yaml: true })), { valid: true })
    t.same(Object.keys((validator.specification as unknown as Document).paths), paths)
  })
})

t.test('the body is the union of the event schemas', async t => {
  const officialTypes = Object.keys(officialEntries)

  t.test('each type that OpenAI sends has its member, in its words', async t => {
    const { oneOf } = bodyOf(await build(t))
    t.same(oneOf!.map(({ title }) => title), [...officialTypes, 'any other type'])
    t.same(oneOf!.slice(0, -1).map(({ description }) => description), Object.values(officialEntries).map(({ description }) => description))
    t.same(oneOf!.slice(0, -1).map(({ properties }) => properties!['type']!.enum), officialTypes.map(type => [type]))
    t.equal(operationOf(await build(t)).requestBody.required, true)
  })

  t.test('so have the guide\'s and those of the `events` option, in place of a known one too', async t => {
    const { oneOf } = bodyOf(await build(t, { webhook: { events: { ...guideEvents, ...OWN_EVENTS } } }))
    const byTitle = new Map(oneOf!.map(member => [member.title, member]))
    for (const type of Object.keys(guideEvents)) t.ok(byTitle.get(type)?.properties?.['data'], type)
    t.match(byTitle.get('batch.completed')!.description, 'with the fields that the guide shows')
    t.match(byTitle.get('Mine'), { description: 'My own words.' })
    for (const type of Object.keys(OWN_EVENTS).filter(type => type !== 'own.described')) t.ok(byTitle.has(type), type)
    t.equal(oneOf!.length, new Set([...officialTypes, ...Object.keys(guideEvents), ...Object.keys(OWN_EVENTS)]).size + 1)
  })

  t.test('known values of an open enum are told: all of them, or one where the version has no more', async t => {
    const action = (app: FastifyInstance): Schema => bodyOf(app).oneOf!
      .find(({ title }) => title === 'agent.session.action_required')!.properties!['data']!.properties!['required_action']!.properties!['type']!
    const values = ['computer_use_approval_request', 'mcp_approval_request', 'function_call', 'environment_connection']
    t.same(action(await build(t, { swagger: openapi('3.1.0') })), { type: 'string', examples: values })
    t.same(action(await build(t, { swagger: openapi('3.0.3') })), { type: 'string', example: values[0] })
  })

  for (const version of isLong ? ['3.0.3', '3.1.0'] : ['3.0.3']) {
    t.test(`what fits the schema is what the plugin accepts, in OpenAPI ${version}`, async t => {
      const app = await build(t, { swagger: openapi(version), webhook: { events: { ...guideEvents, ...OWN_EVENTS } } })
      const fits = await fitter(t, { event: bodyOf(app) })
      const right: object[] = [
        ...sampleTypes.map(type => sampleEvent(type)),
        { type: 'own.described', data: {} },
        { type: 'own.untyped', data: { count: 1 } },
        { type: 'own.intersection', data: { id: '1' } },
        { type: 'own.nullable', data: { maybe: null, level: 'high' } },
        { type: 'own.names', data: { examples: 'a', const: 'b', type: 1, list: [] } },
        { type: 'own.record', data: { any: 1 } },
        ...['typebox1', 'zod', 'arktype', 'valibot'].map(library => ({ type: `own.${library}`, data: { count: 1, more: true } })),
        { type: 'own.cyclic1', data: { type: 'own.cyclic1' } },
        { type: 'brand.new', data: 7 },
        { type: 'brand.new', data: { count: 1 } },
        { ...sampleEvent('batch.failed'), data: { id: 'batch_1', count: 1 } },
        { type: 'brand.new' }
      ]
      const wrong: unknown[] = [
        ...sampleTypes.map(type => ({ ...sampleEvent(type), data: undefined })),
        ...sampleTypes.map(type => ({ ...sampleEvent(type), data: [] })),
        { type: 'own.untyped', data: { count: 'many' } },
        { type: 'own.intersection', data: {} },
        { type: 'own.nullable', data: { maybe: 1, level: 1 } },
        { type: 'own.nullable', data: { maybe: null, level: 2 } },
        { type: 'own.names', data: { examples: ['a'], const: 'b', type: 1, list: [] } },
        { type: 'own.record', data: { any: 'x' } },
        ...['typebox1', 'zod', 'arktype'].map(library => ({ type: `own.${library}`, data: { count: 1.5 } })),
        { type: 'own.zod', data: { count: 1, note: 7 } },
        { type: 7 },
        { data: {} },
        {},
        'text'
      ]
      for (const [events, status] of [[right, 200], [wrong, 400]] as const) {
        for (const event of events) {
          const text = JSON.stringify(event)
          t.equal((await deliver(app, text)).statusCode, status, text)
          t.equal(await fits('event', event), status === 200, `in the document: ${text}`)
        }
      }
    })
  }
})

t.test('the headers are those of the verifier', async t => {
  const routes = (app: FastifyInstance): void => {
    app.openaiWebhook
      .route({ url: '/guide', verifier: xOpenAISignature() })
      .route({ url: '/wrapped', verifier: wrapping })
      .route({ url: '/foreign', verifier: foreign })
  }
  const app = await build(t, { routes })
  const headersOf = (url: string): string[] => (operationOf(app, url).parameters ?? [])
    .map(({ in: place, name, required }) => {
      t.same([place, required], ['header', true], `${url} ${name}`)
      return name
    })

  const body = JSON.stringify(sampleEvent('batch.failed'))
  const timestamp = String(Math.floor(Date.now() / 1000))
  const guide = {
    'X-OpenAI-Signature': createHmac('sha256', testSecret).update(`${timestamp}.${body}`).digest('hex'),
    'X-OpenAI-Timestamp': timestamp
  }
  const standard = Object.fromEntries(Object.entries(standardHeaders(body)))
  for (const [url, headers] of [[URL_, standard], ['/wrapped', standard], ['/guide', guide]] as const) {
    const names = headersOf(url)
    t.same(names, Object.keys(headers), url)
    const send = async (sent: Record<string, string>) => await app.inject({ method: 'POST', url, headers: { ...sent, 'content-type': 'application/json' }, payload: body })
    for (const name of names) {
      const { [name]: _absent, ...others } = headers as Record<string, string>
      t.match((await send(others)).json(), { statusCode: 401, code: `${PREFIX}MISSING_HEADER` }, `${url} without ${name}`)
    }
    t.equal((await send(headers)).statusCode, 200, `${url} needs no more`)

    const schemas = Object.fromEntries(operationOf(app, url).parameters!.map(({ name, schema }) => [name, schema!]))
    const fits = await fitter(t, schemas)
    for (const [name, value] of Object.entries(headers)) {
      t.equal(await fits(name, value), true, `${url} ${name} is as documented`)
      t.equal(await fits(name, ''), false, `${url} ${name}: so is that it may not be empty`)
    }
  }
  t.same(headersOf('/foreign'), [], 'what a verifier of the user\'s reads is not known')
})

function standardHeaders (body: string): Record<string, string> {
  const id = 'wh_1'
  const timestamp = String(Math.floor(Date.now() / 1000))
  const key = Buffer.from(testSecret.replace('whsec_', ''), 'base64')
  return {
    'webhook-id': id,
    'webhook-timestamp': timestamp,
    'webhook-signature': `v1,${createHmac('sha256', key).update(`${id}.${timestamp}.${body}`).digest('base64')}`
  }
}

t.test('every answer is documented with its code', async t => {
  /** Of docs/errors.md: what a route of the plugin answers to a sender. */
  const catalogue: Record<string, string[]> = { 408: ['FST_OPENAI_WEBHOOK_BODY_TIMEOUT'], 413: ['FST_ERR_CTP_BODY_TOO_LARGE'], 415: ['FST_ERR_CTP_INVALID_MEDIA_TYPE'] }
  const { path, text } = readDocument('docs/errors.md')
  for (const [first, status] of tableRows({ path, text: text.slice(text.indexOf('## Verify'), text.indexOf('## Queued and dead deliveries')) })) {
    const code = /^`(FST_[A-Z_]+)`$/.exec(first!)?.[1]
    // No sender is answered with it.
    if (code === `${PREFIX}UNKNOWN_TENANT`) continue
    if (code !== undefined) (catalogue[status!] ??= []).push(code)
  }
  t.same(Object.keys(catalogue), ['400', '401', '408', '409', '413', '415', '500', '503'], 'the sections that are read have them all')

  t.test('as docs/errors.md lists them', async t => {
    const operation = operationOf(await build(t))
    t.same(codesOf(operation), catalogue)
    t.same(Object.keys(operation.responses), ['200', ...Object.keys(catalogue)])
    for (const [status, codes] of Object.entries(catalogue)) {
      for (const code of codes) t.match(operation.responses[status]!.description, `\`${code}\``)
    }
  })

  t.test('with the headers of the guide there is no id that could be invalid', async t => {
    const operation = operationOf(await build(t, { webhook: { verifier: xOpenAISignature() } }))
    t.same(codesOf(operation), { ...catalogue, 401: catalogue['401']!.filter(code => code !== `${PREFIX}INVALID_ID`) })
  })

  for (const [whose, webhook, routes] of [
    ['a verifier', { verifier: foreign, path: '/any' }, undefined],
    ['a handler', { path: false }, (app: FastifyInstance) => app.openaiWebhook.route({ url: '/any', handler: async () => {} })]
  ] as const) {
    t.test(`where ${whose} of the user's may answer too, no list of codes is said to be complete`, async t => {
      const operation = operationOf(await build(t, { webhook, ...(routes !== undefined && { routes }) }), '/any')
      t.same(codesOf(operation), {})
      for (const [status, codes] of Object.entries(catalogue)) {
        const { description } = operation.responses[status]!
        const own = codes.filter(code => !(whose === 'a verifier' && code === `${PREFIX}MISSING_HEADER`))
        t.same(description.match(/FST_[A-Z_]+/g), own, description)
      }
      t.equal('default' in operation.responses, whose === 'a handler', 'a handler may answer anything')
    })
  }

  t.test('and what is answered is as documented', async t => {
    const failing = (state: Partial<IdempotencyStore>): OpenAIWebhookOptions => ({ idempotency: { store: { ...memoryStore(), ...state } } })
    const app = await build(t, { webhook: { bodyLimit: 2_000 } })
    const broken = await build(t, { routes: app => app.openaiWebhook.onAny(() => { throw new Error('no') }) })
    const running = await build(t, { webhook: failing({ begin: () => ({ state: 'running' }) }) })
    const unreachable = await build(t, { webhook: failing({ begin: () => { throw new Error('no') } }) })
    const slow = await build(t, { webhook: { bodyTimeout: 1 } })
    await slow.listen({ port: 0, host: '127.0.0.1' }) // its socket keeps the process alive, the timer does not
    const endless = new Readable({ read () {} })
    const first = await deliver(app, sampleEvent('batch.failed'))
    const answers = [
      first,
      await redeliver(app, first),
      ...await Promise.all(faultNames.map(async fault => await forge(app, fault))),
      await deliver(app, ' '.repeat(2_001)),
      await slow.inject({ method: 'POST', url: '/webhooks/openai', headers: { ...sign('') }, payload: endless }),
      await deliver(app, sampleEvent('batch.failed'), { headers: { 'content-type': 'text/plain' } }),
      await deliver(broken, sampleEvent('batch.failed')),
      await deliver(running, sampleEvent('batch.failed')),
      await deliver(unreachable, sampleEvent('batch.failed'))
    ]
    const { responses } = operationOf(app)
    t.same([...new Set(answers.map(({ statusCode }) => String(statusCode)))].sort(), Object.keys(responses), 'each status has been answered')

    const fits = await fitter(t, Object.fromEntries(Object.entries(responses).map(([status, response]) => [status, schemaOf(response)])))
    for (const { statusCode, headers, body } of answers) {
      t.equal(await fits(String(statusCode), JSON.parse(body)), true, body)
      t.equal('retry-after' in headers, responses[statusCode]!.headers?.['Retry-After'] !== undefined, `${statusCode} Retry-After`)
    }
    t.equal(await fits('401', { ...JSON.parse(answers.find(({ statusCode }) => statusCode === 401)!.body), code: 'ANOTHER' }), false)
  })
})

t.test('@fastify/swagger-ui shows it', async t => {
  const app = Fastify({ forceCloseConnections: true }) as FastifyInstance
  t.teardown(() => app.close())
  await app.register(swagger, openapi())
  await app.register(swaggerUi, { routePrefix: '/docs' })
  await app.register(openaiWebhook, { secret: testSecret, events: guideEvents })
  const address = await app.listen({ port: 0, host: '127.0.0.1' })

  const page = await fetch(`${address}/docs`)
  t.equal(page.status, 200)
  t.match(page.headers.get('content-type'), /^text\/html/)
  const html = await page.text()
  t.match(html, 'id="swagger-ui"')
  const sources = [...html.matchAll(/(?:src|href)="([^"]+)"/g)].map(([, source]) => new URL(source!, `${address}/docs/`))
  t.ok(sources.some(({ pathname }) => pathname === '/docs/static/swagger-ui-bundle.js'))
  for (const source of sources) {
    const response = await fetch(source)
    t.ok((await response.arrayBuffer()).byteLength > 0, source.pathname)
    t.equal(response.status, 200)
  }

  const json = await (await fetch(`${address}/docs/json`)).json() as Document
  t.same(await validator.validate(structuredClone(json) as never), { valid: true })
  t.same(Object.keys(json.paths), [URL_], 'and no route of the page\'s')
  const operation = json.paths[URL_]!.post
  t.match(operation, { summary: /OpenAI/, tags: ['OpenAI webhooks'] })
  t.ok(schemaOf(operation.requestBody).oneOf!.some(({ title }) => title === 'file.processed'))

  const yaml = await (await fetch(`${address}/docs/yaml`)).text()
  t.same(await validator.validate(yaml), { valid: true })
  t.match(yaml, `  ${URL_}:\n    post:`)
})

t.test('nothing is validated or written by the document', async t => {
  /** Throws where Fastify would have a schema compiled. */
  const strict = (app: FastifyInstance): void => {
    app.setValidatorCompiler(({ httpPart }) => { throw new Error(`compiled the schema of the ${String(httpPart)}`) })
    app.setSerializerCompiler(({ httpStatus }) => { throw new Error(`compiled the schema of answers ${String(httpStatus)}`) })
  }

  t.test('verification comes first, and the plugin\'s own validation after it', async t => {
    const schemas: unknown[] = []
    const app = await build(t, {
      routes (app) {
        strict(app)
        app.addHook('onRequest', async ({ routeOptions }) => { schemas.push(routeOptions.schema) })
      }
    })
    app.swagger()
    const post = async (payload: string, headers: Record<string, string> = {}) =>
      await app.inject({ method: 'POST', url: URL_, headers: { 'content-type': 'application/json', ...headers }, payload })
    for (const payload of ['{"type":7}', '{}', '[]', 'not json', '']) {
      t.match((await post(payload)).json(), { statusCode: 401, code: `${PREFIX}MISSING_HEADER` }, payload)
    }
    t.match((await post('{}', { 'webhook-id': 'x'.repeat(257), 'webhook-timestamp': 'now', 'webhook-signature': 'v1,' })).json(), { statusCode: 401, code: `${PREFIX}INVALID_ID` })
    t.match((await forge(app, 'changed body')).json(), { statusCode: 401, code: `${PREFIX}INVALID_SIGNATURE` })
    t.match((await forge(app, 'wrong shape')).json(), { statusCode: 400, code: `${PREFIX}INVALID_EVENT` })
    t.match((await forge(app, 'not json')).json(), { statusCode: 400, code: `${PREFIX}INVALID_BODY` })
    t.equal((await forge(app, 'unknown type')).statusCode, 200)
    t.same([...new Set(schemas)], [undefined], 'the route has no schema')
  })

  t.test('the event reaches the handler as it came', async t => {
    const seen: unknown[] = []
    const app = await build(t, { routes: app => app.openaiWebhook.onAny(event => { seen.push(event) }) })
    app.swagger()
    const event = { ...sampleEvent('batch.failed'), created_at: 1, extra: { kept: [1, '2', null] } }
    t.equal((await deliver(app, event)).statusCode, 200)
    t.same(seen, [event])
    t.match((await deliver(app, { ...event, created_at: '1' })).json(), { code: `${PREFIX}INVALID_EVENT` }, 'no value is made to fit')
  })

  t.test('answers of the app\'s error handler and of a route\'s own handler are not cut', async t => {
    const app = await build(t, {
      routes (app) {
        strict(app)
        app.setErrorHandler((error: Error & { code?: string, statusCode?: number }, _request, reply) =>
          reply.code(error.statusCode ?? 500).send({ code: error.code, docs: 'https://example.com', nested: { extra: [1] } }))
        app.openaiWebhook.route({ url: '/replying', handler: async () => ({ received: 'yes', mine: { extra: [1] } }) })
      }
    })
    app.swagger()
    t.same((await forge(app, 'wrong shape')).json(), { code: `${PREFIX}INVALID_EVENT`, docs: 'https://example.com', nested: { extra: [1] } })
    t.same((await forge(app, 'bad signature')).json(), { code: `${PREFIX}INVALID_SIGNATURE`, docs: 'https://example.com', nested: { extra: [1] } })
    t.same((await deliver(app, sampleEvent('batch.failed'), { url: '/replying' })).json(), { received: 'yes', mine: { extra: [1] } })
  })
})

t.test('nothing is built until the document is', async t => {
  let read = 0
  const Counted = Type.Object({ type: Type.Literal('own.counted'), data: Type.Object({}) })
  Object.defineProperty(Counted, 'toJSON', { value () { read++; return { ...Counted } } })
  const webhook = { secret: testSecret, events: { 'own.counted': Counted } }

  const without = Fastify() as FastifyInstance
  t.teardown(() => without.close())
  await without.register(openaiWebhook, webhook)
  t.equal((await deliver(without, { type: 'own.counted', data: {} })).statusCode, 200)
  t.equal(read, 0, 'not without @fastify/swagger')

  const app = await build(t, { webhook })
  t.equal((await deliver(app, { type: 'own.counted', data: {} })).statusCode, 200)
  t.equal(read, 0)
  t.ok(bodyOf(app).oneOf!.some(({ title }) => title === 'own.counted'))
  t.equal(read, 1)
})

t.test('an app\'s `transform` that knows schemas of one kind only is not given ours', async t => {
  const asked: string[] = []
  const app = await build(t, {
    swagger: {
      ...openapi(),
      transform ({ schema, url }) {
        asked.push(url)
        if (schema !== undefined && !('mine' in schema)) throw new TypeError('expected a schema of mine')
        return { schema, url }
      }
    },
    routes: app => app.get('/mine', { schema: { mine: true } as object }, async () => null)
  })
  t.same(Object.keys(documentOf(app).paths), [URL_, '/mine'])
  t.same(asked, ['/mine'])
})

t.test('which routes are in the document', async t => {
  const register = async (t: Test, ...plugins: Array<(app: FastifyInstance) => unknown>): Promise<FastifyInstance> => {
    const app = Fastify() as FastifyInstance
    t.teardown(() => app.close())
    for (const plugin of plugins) await plugin(app)
    await app.ready()
    return app
  }
  const theirs = (app: FastifyInstance): void => { app.register(swagger, openapi()) }
  const ours = (app: FastifyInstance): void => { app.register(openaiWebhook, { secret: testSecret }) }
  const awaited = (plugin: typeof ours) => async (app: FastifyInstance): Promise<void> => {
    plugin(app)
    await app.after()
  }

  t.test('those of a registration after @fastify/swagger, awaited or not', async t => {
    t.same(Object.keys(documentOf(await register(t, awaited(theirs), awaited(ours))).paths), [URL_])
    t.same(Object.keys(documentOf(await register(t, theirs, ours)).paths), [URL_])
  })

  t.test('not those of one before it, which work all the same', async t => {
    for (const plugins of [[awaited(ours), awaited(theirs)], [ours, theirs]]) {
      const app = await register(t, ...plugins)
      t.same(documentOf(app).paths, {})
      t.equal((await deliver(app, sampleEvent('batch.failed'))).statusCode, 200)
    }
  })

  t.test('those of scopes, each with its own prefix, events and verifier', async t => {
    const app = await register(t, awaited(theirs), async app => {
      await app.register(async scope => {
        await scope.register(openaiWebhook, { secret: testSecret, events: OWN_EVENTS })
        await scope.register(async inner => { inner.openaiWebhook.route({ url: '/inner', verifier: xOpenAISignature() }) }, { prefix: '/v2' })
      }, { prefix: '/one' })
      await app.register(async scope => { await scope.register(openaiWebhook, { secret: testSecret, path: '/hook' }) }, { prefix: '/two' })
    })
    t.same(Object.keys(documentOf(app).paths), [`/one${URL_}`, '/one/v2/inner', '/two/hook'])
    const types = (url: string): unknown[] => bodyOf(app, url).oneOf!.map(({ title }) => title)
    t.same([`/one${URL_}`, '/one/v2/inner', '/two/hook'].map(url => types(url).includes('own.record')), [true, true, false])
    t.same(operationOf(app, '/one/v2/inner').parameters!.map(({ name }) => name), ['X-OpenAI-Signature', 'X-OpenAI-Timestamp'])
  })
})

t.test('the examples of docs/recipes/openapi.md', async t => {
  const blocks = codeBlocks(readDocument('docs/recipes/openapi.md')).filter(({ language }) => language === 'ts')

  /** The app that a block makes. */
  async function example (t: Test, index: number): Promise<FastifyInstance> {
    const { outputText } = ts.transpileModule(blocks[index]!.code, { compilerOptions: { target: ts.ScriptTarget.ES2023, module: ts.ModuleKind.ESNext } })
    const plugin = new URL('../../lib/index.ts', import.meta.url).href
    const directory = t.testdir({ 'example.mjs': `${outputText.replace("'fastify-openai-webhook'", `'${plugin}'`)}\nexport { app }\n` })
    t.intercept(process, 'env', { value: { ...process.env, OPENAI_WEBHOOK_SECRET: testSecret, CALLS_SECRET: testSecret } })
    const { app } = await import(pathToFileURL(join(directory, 'example.mjs')).href) as { app: FastifyInstance }
    t.teardown(() => app.close())
    await app.ready()
    return app
  }
  t.equal(blocks.length, 3)

  t.test('the page', async t => {
    const app = await example(t, 0)
    t.equal((await app.inject('/documentation')).statusCode, 200)
    const document = (await app.inject('/documentation/json')).json<Document>()
    t.equal(document.openapi, '3.1.0')
    t.same(Object.keys(document.paths), [URL_])
  })

  t.test('hidden, and tagged otherwise', async t => {
    const app = await example(t, 1)
    t.same(Object.keys(documentOf(app).paths), [URL_])
    const operation = operationOf(app)
    t.same(operation.tags, ['integrations'])
    t.ok(schemaOf(operation.requestBody).oneOf, 'and documented as ever')
    for (const url of [URL_, '/webhooks/internal']) t.equal((await deliver(app, sampleEvent('batch.failed'), { url })).statusCode, 200, url)
  })

  t.test('a marked route', async t => {
    const app = await example(t, 2)
    t.same(Object.keys(documentOf(app).paths), ['/calls'])
    t.match(operationOf(app, '/calls'), { summary: 'Incoming calls', tags: ['integrations'] })
    t.same(bodyOf(app, '/calls').properties!['type']!.enum, ['realtime.call.incoming'])
    t.match((await app.inject({ method: 'POST', url: '/calls', payload: { type: 7 } })).json(), { statusCode: 401, code: `${PREFIX}MISSING_HEADER` })
    t.equal((await deliver(app, sampleEvent('realtime.call.incoming'), { url: '/calls' })).statusCode, 200)
    t.equal((await deliver(app, sampleEvent('batch.failed'), { url: '/calls' })).statusCode, 200, 'its body is not checked by the document')
  })
})
