import { execFile } from 'node:child_process'
import { promisify } from 'node:util'
import * as TypeBox034 from '@sinclair/typebox'
import { type as arktype } from 'arktype'
import t from 'tap'
import { Type } from 'typebox'
import { Format } from 'typebox/format'
import * as v from 'valibot'
import * as z from 'zod'
import type { AnySchema, StandardSchema } from '../../lib/index.ts'
import { build, outcome, post, sign } from '../support/deliveries.ts'
import { capturedLog, messageOf } from '../support/observe.ts'

const run = promisify(execFile)

/** Stands in payloads; no answer may hold it. */
const MARKER = 'MARKER-7f3a'
const TYPE = 'acme.order.paid'
const RECEIVED = '200 {"received":true}'

const order = (data: unknown = { id: 'o_1', cents: 100 }): object => ({ id: 'evt_1', created_at: 1, type: TYPE, data })

const SCHEMAS: Record<string, AnySchema> = {
  'TypeBox 0.34': TypeBox034.Type.Object({
    type: TypeBox034.Type.Literal(TYPE),
    data: TypeBox034.Type.Object({ id: TypeBox034.Type.String(), cents: TypeBox034.Type.Integer(), note: TypeBox034.Type.Optional(TypeBox034.Type.String()) })
  }),
  'TypeBox 1.x': Type.Object({ type: Type.Literal(TYPE), data: Type.Object({ id: Type.String(), cents: Type.Integer(), note: Type.Optional(Type.String()) }) }),
  Zod: z.object({ type: z.literal(TYPE), data: z.object({ id: z.string(), cents: z.int(), note: z.string().default('none') }) }),
  Valibot: v.object({ type: v.literal(TYPE), data: v.object({ id: v.string(), cents: v.pipe(v.number(), v.integer()), note: v.optional(v.string(), 'none') }) }),
  ArkType: arktype({ type: `'${TYPE}'`, data: { id: 'string', cents: 'number.integer', note: "string = 'none'" } })
}

/** Of a user's own making. */
function standard (validate: (value: unknown) => unknown): StandardSchema {
  return { '~standard': { version: 1, vendor: 'acme', validate: validate as StandardSchema['~standard']['validate'] } }
}

for (const [library, schema] of Object.entries(SCHEMAS)) {
  t.test(library, async t => {
    const app = await build(t, { events: { [TYPE]: schema } })
    const seen: unknown[] = []
    app.openaiWebhook.on(TYPE as never, event => { seen.push(event) })
    const event = order({ id: 'o_1', cents: 100, added: [MARKER] })
    t.equal(await outcome(app, sign(event)), RECEIVED)
    t.same(seen, [event], 'the event is checked, and not changed')

    const wrong: Array<[unknown, RegExp]> = [
      [{ id: 'o_1', cents: MARKER }, /: \/data\/cents/],
      [{ id: [MARKER], cents: 1.5 }, /\/data\/id.*\/data\/cents|\/data\/cents.*\/data\/id/],
      [{ id: 'o_1' }, /: \/data/],
      [MARKER, /: \/data/],
      [null, /: \/data/]
    ]
    for (const [data, message] of wrong) {
      const { statusCode, json, body } = await post(app, sign(order(data)))
      t.equal(statusCode, 400)
      t.match(json(), { code: 'FST_OPENAI_WEBHOOK_INVALID_EVENT', message })
      t.notMatch(body, MARKER)
    }
    t.equal(seen.length, 1)

    const { headers, body } = sign(event)
    t.same(await app.openaiWebhook.unwrap(body, headers), event)
    // Of Valibot's no JSON Schema tells the type.
    const misnamed = messageOf(async () => { await build(t, { events: { 'acme.order.payed': schema } }) })
    t.equal(await misnamed, library === 'Valibot' ? '' : 'expected events["acme.order.payed"] to have the type "acme.order.payed", got the literal "acme.order.paid"')
  })
}

t.test('the five side by side, beside OpenAI\'s own', async t => {
  const events = Object.fromEntries(Object.entries({
    typebox034: TypeBox034.Type.Object({ data: TypeBox034.Type.Boolean() }),
    typebox1: Type.Object({ data: Type.Boolean() }),
    zod: z.object({ data: z.boolean() }),
    valibot: v.object({ data: v.boolean() }),
    arktype: arktype({ data: 'boolean' }),
    unsafe: Type.Unsafe({ type: 'object', properties: { data: { type: 'boolean' } } })
  }).map(([name, schema]) => [`acme.${name}`, schema]))
  const app = await build(t, { events })
  for (const type of Object.keys(events)) {
    t.equal(await outcome(app, sign({ type, data: true })), RECEIVED, type)
    t.equal(await outcome(app, sign({ type, data: 1 })), '400 INVALID_EVENT', type)
  }
  t.equal(await outcome(app, sign({ type: 'batch.failed', data: 1 })), '400 INVALID_EVENT')
})

t.test('TypeBox 1.x: the user\'s copy compiles, with the formats that were registered there', async t => {
  Format.Set('order-id', value => value.startsWith('o_'))
  t.teardown(() => { Format.Clear() })
  const app = await build(t, { events: { [TYPE]: Type.Object({ data: Type.Object({ id: Type.String({ format: 'order-id' }) }) }) } })
  t.equal(await outcome(app, sign(order({ id: 'o_1' }))), RECEIVED)
  t.match((await post(app, sign(order({ id: MARKER })))).json(), { statusCode: 400, message: /: \/data\/id \(must match format "order-id"\)$/ })
})

t.test('TypeBox 1.x: what a refinement of the user\'s says may quote the value', async t => {
  const id = Type.Refine(Type.String(), value => value !== MARKER, value => `not ${value}`)
  const app = await build(t, { events: { [TYPE]: Type.Object({ data: Type.Object({ id }) }) } })
  const { statusCode, body } = await post(app, sign(order({ id: MARKER })))
  t.equal(statusCode, 400)
  t.match(body, ': /data/id"')
  t.notMatch(body, MARKER)
})

t.test('a module that is to compile schemas and is not there is told at boot', async t => {
  const hooks = `export async function resolve (name, context, next) {
    if (name === 'typebox/compile') throw Object.assign(new Error("Cannot find package 'typebox'"), { code: 'ERR_MODULE_NOT_FOUND' })
    return await next(name, context)
  }`
  const url = (source: string): string => `data:text/javascript,${encodeURIComponent(source)}`
  const program = `
    import { register } from 'node:module'
    import { compilersFor } from ${JSON.stringify(new URL('../../lib/pipeline/validators.ts', import.meta.url))}
    register(${JSON.stringify(url(hooks))})
    await compilersFor({ type: { '~kind': 'Object' } }).catch(({ code, message }) => { console.log(code, message) })`
  // Not a user's program: what it covers counts.
  const { stdout } = await run(process.execPath, ['--import=./test/support/typescript.js', '--input-type=module', '--eval', program])
  t.equal(stdout, 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS expected the module "typebox/compile", which compiles the schemas in `events`, to be installed beside fastify-openai-webhook, got: Cannot find package \'typebox\'\n')
})

t.test('a schema that is asynchronous', async t => {
  const EXPECTED = `expected events["${TYPE}"] to be a synchronous schema that can be compiled, got: a validator that answers with a promise: expected a synchronous one`
  const atBoot: Record<string, AnySchema> = {
    'of Valibot': v.objectAsync({ type: v.literal(TYPE) }),
    'of Zod, as a whole': z.unknown().refine(async () => true),
    'that never answers': standard(async () => await new Promise(() => {})),
    'that rejects': standard(async () => { throw new Error(MARKER) }),
    'a thenable': standard(() => ({ then () {} }))
  }
  for (const [name, schema] of Object.entries(atBoot)) {
    t.equal(await messageOf(async () => { await build(t, { events: { [TYPE]: schema } }) }), EXPECTED, `${name}, at boot`)
  }

  // Only some events take the asynchronous way.
  const later: Record<string, AnySchema> = {
    'of Zod, somewhere within': z.object({ type: z.literal(TYPE), data: z.object({ id: z.string().refine(async () => true) }) }),
    'that never answers': standard(event => 'data' in (event as object) ? new Promise(() => {}) : { value: event }),
    'that rejects': standard(async event => { if ('data' in (event as object)) throw new Error(MARKER) })
  }
  later['that rejects'] = standard(event => 'data' in (event as object) ? Promise.reject(new Error(MARKER)) : { value: event })
  for (const [name, schema] of Object.entries(later)) {
    const log = capturedLog()
    const app = await build(t, { events: { [TYPE]: schema } }, { logger: log.logger })
    let ran = 0
    app.openaiWebhook.onAny(() => { ran++ })
    const { statusCode, json } = await post(app, sign(order()))
    t.equal(statusCode, 400, name)
    t.match(json(), { code: 'FST_OPENAI_WEBHOOK_INVALID_EVENT', message: 'the event does not have the shape of its type, acme.order.paid: its schema failed' })
    t.match(log.errors(), [{ msg: 'a schema failed, and the delivery was refused', code: 'FST_OPENAI_WEBHOOK_INVALID_EVENT', endpoint: '/webhooks/openai', webhookId: /^wh_/, err: { message: /answers with a promise/ } }])
    t.equal(ran, 0)
  }
})

t.test('a validator that throws, or answers what it may not, refuses', async t => {
  const throwing = (thrown: unknown) => (): never => { throw thrown }
  const answers: Array<() => unknown> = [
    () => { throw new Error(MARKER) }, throwing(null), throwing({ get message () { throw new Error(MARKER) } }),
    () => undefined, () => null, () => true, () => 'text'
  ]
  for (const answer of answers) {
    const log = capturedLog()
    const app = await build(t, { events: { [TYPE]: standard(answer) } }, { logger: log.logger })
    const { statusCode, body } = await post(app, sign(order()))
    t.equal(statusCode, 400)
    t.match(body, 'its schema failed')
    t.notMatch(body, MARKER)
    t.equal(log.errors().length, 1)
    const { headers, body: bytes } = sign(order())
    await t.rejects(app.openaiWebhook.unwrap(bytes, headers), { code: 'FST_OPENAI_WEBHOOK_INVALID_EVENT' })
  }
  const log = capturedLog()
  const app = await build(t, { events: { [TYPE]: standard(answers[0]!) } }, { logger: log.logger })
  for (let nth = 0; nth < 8; nth++) await post(app, sign(order()))
  t.equal(log.errors().length, 5, 'bounded, as refusals are')
})

t.test('issues', async t => {
  const cases: Array<[unknown, string]> = [
    [[], 'the event as a whole'],
    [[{ message: MARKER }], 'the event as a whole'],
    [[{ message: MARKER, path: [] }, { message: MARKER, path: ['data'] }], 'the event as a whole, /data'],
    [[{ message: MARKER, path: ['data', { key: 'list' }, 0, Symbol('s'), 'a/b~c'] }], '/data/list/0/Symbol(s)/a~1b~0c'],
    [[{ message: '1', path: ['data'] }, { message: '2', path: ['data'] }, { message: '3', path: ['id'] }], '/data, /id'],
    [Array.from({ length: 100 }, (_, index) => ({ message: MARKER, path: ['x'.repeat(200), index] })), `/${'x'.repeat(200)}/0, /${'x'.repeat(200)}/1`.slice(0, 400)]
  ]
  for (const [issues, message] of cases) {
    const app = await build(t, { events: { [TYPE]: standard(() => ({ issues })) } })
    t.same((await post(app, sign(order()))).json(), {
      statusCode: 400, code: 'FST_OPENAI_WEBHOOK_INVALID_EVENT', error: 'Bad Request', message: `the event does not have the shape of its type, ${TYPE}: ${message}`
    })
  }
})

t.test('`validate` may use `this`', async t => {
  const schema: StandardSchema & { '~standard': { fits: boolean } } = {
    '~standard': { version: 1, vendor: 'acme', fits: true, validate (value) { return (this as unknown as { fits: boolean }).fits ? { value } : { issues: [] } } }
  }
  const app = await build(t, { events: { [TYPE]: schema } })
  t.equal(await outcome(app, sign(order())), RECEIVED)
})
