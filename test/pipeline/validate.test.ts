import { createHmac } from 'node:crypto'
import { Kind, Type, TypeRegistry } from '@sinclair/typebox'
import type { TSchema } from '@sinclair/typebox'
import fc from 'fast-check'
import Fastify from 'fastify'
import type { FastifyInstance } from 'fastify'
import Database from 'libsql'
import t from 'tap'
import type { Test } from 'tap'
import { guideEntries, officialEntries } from '../../lib/events/index.ts'
import type { EventEntry } from '../../lib/events/schema.ts'
import openaiWebhook, { background, guideEvents, inline } from '../../lib/index.ts'
import type { Job, OpenAIWebhookOptions, Runner, RunnerHost } from '../../lib/index.ts'
import { durable } from '../../lib/sqlite/index.ts'
import { build, post, SECRET, sign, thin } from '../support/deliveries.ts'
import type { Signed } from '../support/deliveries.ts'
import { until } from '../support/faults.ts'
import { codeOf } from '../support/observe.ts'

const OWN = '/webhooks/openai'
const MARKED = '/own'

/** Stands in payloads; no answer may hold it. */
const MARKER = 'MARKER-7f3a'

interface Fixture {
  app: FastifyInstance
  /** The events that reached a handler, on either route. */
  seen: unknown[]
}

async function fixture (t: Test, options: OpenAIWebhookOptions = {}): Promise<Fixture> {
  const app = await build(t, options)
  const seen: unknown[] = []
  app.openaiWebhook.onAny(event => { seen.push(event) })
  app.post(MARKED, { config: { openaiWebhook: {} } }, async ({ openaiWebhook }) => { seen.push(openaiWebhook.event) })
  await app.ready()
  return { app, seen }
}

/** Signs bytes, which need not be text. */
function signBytes (body: Buffer): Signed {
  const { headers } = sign('')
  const mac = createHmac('sha256', Buffer.from(SECRET.slice('whsec_'.length), 'base64'))
    .update(`${headers['webhook-id']}.${headers['webhook-timestamp']}.`).update(body).digest('base64')
  return { headers: { ...headers, 'webhook-signature': `v1,${mac}` }, body }
}

interface ErrorBody { code?: string, message: string }

async function refuses (t: Test, { app, seen }: Fixture, body: string | Buffer, code: string, name: string): Promise<ErrorBody> {
  seen.length = 0
  let told: ErrorBody = { message: '' }
  for (const url of [OWN, MARKED]) {
    const response = await post(app, signBytes(Buffer.from(body)), url)
    told = response.json() as ErrorBody
    t.match({ statusCode: response.statusCode, code: told.code }, { statusCode: 400, code: `FST_OPENAI_WEBHOOK_${code}` }, `${name} at ${url}`)
    t.notOk(response.body.includes(MARKER), 'nothing of the payload in the answer')
  }
  t.same(seen, [], 'no handler ran')
  return told
}

async function accepts (t: Test, { app, seen }: Fixture, event: unknown, name: string): Promise<void> {
  seen.length = 0
  for (const url of [OWN, MARKED]) {
    const { statusCode, body } = await post(app, sign(event), url)
    t.match({ statusCode, body }, { statusCode: 200, body: '{"received":true}' }, `${name} at ${url}`)
  }
  const expected: unknown = typeof event === 'string' ? JSON.parse(event) : event
  t.strictSame(seen, [expected, expected], 'handlers get the whole event')
}

t.test('signed bodies that are no events', async t => {
  const all = await fixture(t)
  const event = thin('batch.failed', { id: MARKER })
  const text = JSON.stringify(event)
  const withBytes = (...bytes: number[]) => Buffer.concat([Buffer.from('{"type":"batch.failed","id":"'), Buffer.from(bytes), Buffer.from(`${MARKER}"}`)])

  for (const [name, body] of Object.entries<string | Buffer>({
    empty: '',
    'white space': ' \n',
    'cut short': text.slice(0, -1),
    'a character': MARKER[0]!,
    'two documents': `${text}${text}`,
    'a trailing comma': `${text.slice(0, -1)},}`,
    'single quotes': `{'type':'${MARKER}'}`,
    'a comment': `${text}// ${MARKER}`,
    NaN: `{"type":"batch.failed","data":NaN,"m":"${MARKER}"}`,
    'a line end inside a string': `{"type":"batch\n${MARKER}"}`,
    'form data': `type=batch.failed&id=${MARKER}`,
    'a byte order mark': `\ufeff${text}`,
    'UTF-16': Buffer.from(text, 'utf16le'),
    'UTF-16 with a byte order mark': Buffer.from(`\ufeff${text}`, 'utf16le'),
    'a byte that is not UTF-8': withBytes(0xff),
    'a lone continuation byte': withBytes(0x80),
    'a cut sequence': withBytes(0xe4, 0xb8),
    'an overlong sequence': withBytes(0xc0, 0xaf),
    'an encoded surrogate': withBytes(0xed, 0xa0, 0x80),
    'beyond Unicode': withBytes(0xf4, 0x90, 0x80, 0x80),
    'a __proto__ key': `{"__proto__":{"x":"${MARKER}"},${text.slice(1)}`,
    'a __proto__ key further down': `{"type":"unknown.type","data":[{"a":{"__proto__":"${MARKER}"}}]}`,
    'an escaped __proto__ key': `{"\\u005f_proto_\\u005F":null,${text.slice(1)}`,
    'constructor.prototype keys': `{"constructor":{"prototype":{"x":"${MARKER}"}},${text.slice(1)}`,
    'constructor.prototype keys further down': `{"type":"unknown.type","data":{"constructor":{"prototype":1}},"m":"${MARKER}"}`,
    null: 'null',
    'a number': '1',
    true: 'true',
    'a string': `"${MARKER}"`,
    'an array': '[]',
    'an array of an event': `[${text}]`,
    'an empty object': '{}',
    'no type': JSON.stringify({ ...event, type: undefined }),
    ...Object.fromEntries([null, 1, true, [MARKER], ['batch.failed'], { [MARKER]: 'batch.failed' }]
      .map(type => [`type: ${JSON.stringify(type)}`, JSON.stringify({ ...event, type })])),
    '20,000 arrays in each other': `${'['.repeat(20_000)}${']'.repeat(20_000)}`,
    '20,000 arrays, never closed': '['.repeat(20_000),
    '10,000 objects in each other': `${'{"a":'.repeat(10_000)}1${'}'.repeat(10_000)}`,
    'a __proto__ key under 5,000 objects': `{"type":"unknown.type","data":${'{"a":'.repeat(5_000)}{"__proto__":1}${'}'.repeat(5_000)}}`
  })) {
    await refuses(t, all, body, 'INVALID_BODY', name)
  }
  t.equal(({} as { x?: unknown }).x, undefined)
})

t.test('what only looks wrong', async t => {
  const all = await fixture(t)
  const event = JSON.stringify(thin('batch.failed'))
  for (const [name, body] of Object.entries({
    'white space around it': ` \r\n\t${event}\n`,
    'the text __proto__ as a value': JSON.stringify(thin('batch.failed', { id: '__proto__', note: '"__proto__":' })),
    'a constructor that is no object': JSON.stringify(thin('batch.failed', { id: 'batch_1', constructor: null, other: { constructor: 'x' } })),
    'a lone surrogate, escaped': '{"id":"evt_1","created_at":1,"type":"batch.failed","data":{"id":"\\ud800"}}',
    'a key twice': `{"type":"x",${event.slice(1)}`,
    'object left out': JSON.stringify({ ...thin('batch.failed'), object: undefined })
  })) {
    await accepts(t, all, body, name)
  }
})

t.test('what a queue could not carry', async t => {
  /** A list or object in each other, `levels` of them. */
  const nested = (levels: number, open: string, close: string): string => `${open.repeat(levels)}0${close.repeat(levels)}`
  /** The event is a level of its own. */
  const withField = (json: string, type = 'new.type'): string => `{"id":"evt_1","object":"event","created_at":1750861210,"type":"${type}","data":{"id":"batch_1"},"more":${json}}`
  // JSON of strange, but whole things: each is to come out of a queue as it went in.
  const carried: Record<string, string> = {
    '99 lists in a field': withField(nested(99, '[', ']')),
    '99 objects in a field': withField(nested(99, '{"a":', '}')),
    'of a known type': withField(nested(99, '[', ']'), 'batch.failed'),
    'many lists beside each other': withField(`[${Array(10_000).fill('[[]]').join()}]`),
    'many keys': withField(`{${Array.from({ length: 5_000 }, (_, i) => `"k${i}":${i}`).join()}}`),
    'keys of all kinds': withField('{"":1,"0":1,"-1":1,"constructor":1,"toString":1,"hasOwnProperty":1,"toJSON":1,"then":1,"\\u0000":1,"\\ud800":1}'),
    'a long string': withField(JSON.stringify('x'.repeat(60_000))),
    'a long key': withField(`{"${'x'.repeat(60_000)}":1}`),
    'a long type': withField('1', 'x'.repeat(60_000)),
    'lone surrogates': withField('"\\ud800 \\udfff"'),
    'a NUL, and separators of lines': withField('"\\u0000 \u2028\u2029 \\u2028"'),
    'a NUL in the type': withField('1', 'new.\\u0000type'),
    'the largest and the smallest numbers': withField('[1.7976931348623157e308,-1.7976931348623157e308,5e-324,1e-999,9007199254740993,1e20,1e21]'),
    'what looks like what is refused': withField(JSON.stringify('1e999 __proto__ [[[['))
  }
  const refused: Record<string, string> = {
    '100 lists in a field': withField(nested(100, '[', ']')),
    '100 objects in a field': withField(nested(100, '{"a":', '}')),
    'deep behind what is flat': withField(`[[],{},{"a":[{}]},${nested(99, '[', ']')}]`),
    '10,000 lists': withField(nested(10_000, '[', ']')),
    '10,000 objects': withField(nested(10_000, '{"a":', '}')),
    '30,000 lists': withField(nested(30_000, '[', ']')),
    'of a known type': withField(nested(10_000, '[', ']'), 'batch.failed'),
    'where a known type has another shape': JSON.stringify({ ...thin('batch.failed'), data: '@' }).replace('"@"', nested(10_000, '[', ']')),
    Infinity: withField('1e999'),
    'minus Infinity, further down': withField('[0,{"a":[-1e309]}]'),
    'a number of many digits': withField('9'.repeat(400)),
    'a __proto__ key': withField('{"__proto__":1}'),
    '__proto__, escaped': withField('{"\\u005f_proto__":{}}')
  }

  const text = (value: unknown): string => JSON.stringify(value)
  // As the tests of a queue's own do: what comes out is what JSON.parse makes of JSON.stringify's text.
  function queue (): Runner {
    let host: RunnerHost
    return {
      start (startedBy) { host = startedBy },
      async run (job) { await host.process(JSON.parse(text(job)) as Job) }
    }
  }
  const runners: Record<string, () => Runner> = { inline, background, durable: () => durable(new Database(':memory:')), 'a queue': queue }

  for (const [name, runner] of Object.entries(runners)) {
    await t.test(name, async t => {
      const app = await build(t, { runner: runner() })
      const seen: unknown[] = []
      app.openaiWebhook.onAny(event => { seen.push(event) })
      app.post(MARKED, { config: { openaiWebhook: {} }, handler: app.openaiWebhook.handler })
      await app.ready()
      for (const url of name === 'inline' ? [OWN, MARKED] : [OWN]) {
        for (const [what, body] of Object.entries(carried)) {
          seen.length = 0
          const { statusCode, body: answer } = await post(app, sign(body), url)
          t.same([statusCode, answer], [200, '{"received":true}'], what)
          await until('the handler to run', () => seen.length === 1)
          t.same(seen, [JSON.parse(body)], `${what}: the event is whole`)
        }
        seen.length = 0
        for (const [what, body] of Object.entries(refused)) {
          const { statusCode, body: answer } = await post(app, sign(body), url)
          t.match({ statusCode, ...JSON.parse(answer) as object }, { statusCode: 400, code: 'FST_OPENAI_WEBHOOK_INVALID_BODY' }, what)
        }
      }
      await app.close()
      t.same(seen, [], 'no handler ran for what was refused')
    })
  }
  await t.test('unwrap()', async t => {
    const app = await build(t)
    for (const body of Object.values(refused)) {
      const signed = sign(body)
      await t.rejects(app.openaiWebhook.unwrap(signed.body, signed.headers), { code: 'FST_OPENAI_WEBHOOK_INVALID_BODY' })
    }
  })
})

// Everything below is derived from the table: a new event is covered by being in it.

function whole (type: string, { sample }: EventEntry): Record<string, unknown> {
  return { id: 'evt_1', object: 'event', created_at: 1750861210, type, data: sample }
}

type Path = ReadonlyArray<string | number>

const ABSENT = Symbol('absent')

interface Change { path: Path, value: unknown }

/** A copy in which one field is replaced or left out. */
function changed (event: unknown, [key, ...rest]: Path, value: unknown): unknown {
  if (key === undefined) return value
  const copy = (Array.isArray(event) ? [...event] : { ...(event as object) }) as Record<string | number, unknown>
  if (rest.length === 0 && value === ABSENT) delete copy[key]
  else copy[key] = changed(copy[key], rest, value)
  return copy
}

const ONE_OF_EACH = {
  string: MARKER,
  number: 7_384_501.5,
  boolean: true,
  null: null,
  array: [MARKER],
  object: { [MARKER]: MARKER }
}

/** Values that a schema does not take. */
function wrongValues (schema: TSchema): unknown[] {
  const alternatives = (schema['anyOf'] as TSchema[] | undefined) ?? [schema]
  if (alternatives.some(each => 'const' in each)) return [...Object.values(ONE_OF_EACH), '', `${String(schema['const'])} `]
  const kinds = alternatives.map(each => each['type'] as string)
  const wrong = Object.entries(ONE_OF_EACH).filter(([kind]) => !kinds.includes(kind)).map(([, value]) => value as unknown)
  return kinds.includes('integer') ? [...wrong, '1750861210'] : wrong
}

interface Field { path: Path, schema: TSchema, required: boolean }

/** Every field of a schema, at the places where the sample has it. */
function * fields (schema: TSchema, sample: unknown, path: Path = []): Generator<Field> {
  const properties = schema['properties'] as Record<string, TSchema> | undefined
  for (const [name, inner] of Object.entries(properties ?? {})) {
    const value = (sample as Record<string, unknown> | undefined)?.[name]
    if (value === undefined) throw new Error(`the sample has no ${[...path, name].join('.')}, so nothing under it is tried`)
    const at = [...path, name]
    yield { path: at, schema: inner, required: (schema['required'] as string[] | undefined ?? []).includes(name) }
    yield * fields(inner, value, at)
  }
  if (schema['type'] === 'array') {
    const at = [...path, (sample as unknown[]).length - 1]
    yield { path: at, schema: schema['items'] as TSchema, required: false }
    yield * fields(schema['items'] as TSchema, (sample as unknown[]).at(-1), at)
  }
}

function fieldsOf (type: string, entry: EventEntry): Field[] {
  // Another `type` is another event; that it is a string is an earlier check.
  return [...fields(entry.schema, whole(type, entry))].filter(({ path }) => path.join() !== 'type')
}

function * faultsOf (type: string, entry: EventEntry): Generator<Change> {
  for (const { path, schema, required } of fieldsOf(type, entry)) {
    if (required) yield { path, value: ABSENT }
    for (const value of wrongValues(schema)) yield { path, value }
  }
}

for (const [name, entries, options] of [
  ['official', officialEntries, {}],
  ['guide', guideEntries, { events: guideEvents }]
] as Array<[string, Record<string, EventEntry>, OpenAIWebhookOptions]>) {
  t.test(`${name} events`, async t => {
    const all = await fixture(t, options)

    t.test('every sample is valid', async t => {
      for (const [type, entry] of Object.entries(entries)) await accepts(t, all, whole(type, entry), type)
    })

    t.test('every field, absent or of a wrong kind, is refused by its path alone', async t => {
      const { app, seen } = all
      for (const [type, entry] of Object.entries(entries)) {
        seen.length = 0
        const wrong: unknown[] = []
        let tried = 0
        for (const { path, value } of faultsOf(type, entry)) {
          tried++
          const event = { ...changed(whole(type, entry), path, value) as object, unknown_field: MARKER }
          const { statusCode, body } = await post(app, sign(event))
          const { code, message } = JSON.parse(body) as ErrorBody
          const right = statusCode === 400 && code === 'FST_OPENAI_WEBHOOK_INVALID_EVENT' &&
            message.includes(`/${path.join('/')} (`) && !body.includes(MARKER) && !body.includes('7384501')
          if (!right) wrong.push({ path: path.join('.'), value, statusCode, body })
        }
        t.same(wrong, [], `${type}: ${tried} faults`)
        t.ok(tried > 5)
        t.same(seen, [], 'no handler ran')
      }
    })

    t.test('optional fields may be absent', async t => {
      for (const [type, entry] of Object.entries(entries)) {
        for (const { path, required } of fieldsOf(type, entry)) {
          if (required || typeof path.at(-1) === 'number') continue
          await accepts(t, all, changed(whole(type, entry), path, ABSENT), `${type} without ${path.join('.')}`)
        }
      }
    })

    t.test('fields that are not known are kept, in every object', async t => {
      for (const [type, entry] of Object.entries(entries)) {
        const objects = [[], ...fieldsOf(type, entry).filter(({ schema }) => schema['type'] === 'object').map(({ path }) => path)]
        let event: unknown = whole(type, entry)
        for (const path of objects) event = changed(event, [...path, 'new_field'], { nested: [1, null, 'text'] })
        await accepts(t, all, event, `${type}: ${objects.length} objects`)
      }
    })

    t.test('known values are not the only ones', async t => {
      for (const [type, entry] of Object.entries(entries)) {
        for (const { path, schema } of fieldsOf(type, entry)) {
          if (schema['examples'] === undefined) continue
          await accepts(t, all, changed(whole(type, entry), path, 'a_value_of_next_year'), `${type}, ${path.join('.')}`)
        }
      }
    })
  })
}

t.test('official events have their envelope, guide events may lack it', async t => {
  const official = await fixture(t)
  const guide = await fixture(t, { events: guideEvents })
  const bare = { type: 'batch.completed', data: { id: 'batch_abc123', status: 'completed' } }
  await accepts(t, guide, bare, 'guideEvents')
  const { message } = await refuses(t, official, JSON.stringify(bare), 'INVALID_EVENT', 'without guideEvents')
  t.match(message, '/id (')
  t.match(message, '/created_at (')
  await accepts(t, official, { type: 'file.processed', data: MARKER }, 'a guide type is unknown without them')
  await refuses(t, guide, JSON.stringify({ type: 'file.processed', data: MARKER }), 'INVALID_EVENT', 'and checked with them')
})

t.test('a type that is not known is acknowledged, whatever its shape', async t => {
  const all = await fixture(t)
  for (const type of ['batch.exploded', 'batch.*', 'batch', '', ' batch.failed', 'BATCH.FAILED', '__proto__', 'constructor', 'toString', 'hasOwnProperty', 'x'.repeat(10_000), '\u0000']) {
    await accepts(t, all, { type, data: null, id: 1 }, JSON.stringify(type.slice(0, 20)))
  }
})

t.test('the user\'s own events', async t => {
  const count = (minimum: number) => Type.Object({ type: Type.Literal('order.paid'), data: Type.Object({ count: Type.Integer({ minimum }) }) })
  const names = Array.from({ length: 12 }, (_, i) => `field_${i}_${'x'.repeat(90)}`)
  const all = await fixture(t, {
    events: {
      'order.paid': count(1),
      'batch.failed': Type.Object({ type: Type.Literal('batch.failed'), reason: Type.String() }),
      'order.long': Type.Object(Object.fromEntries(names.map(name => [name, Type.String()]))),
      'order.many': Type.Object({ type: Type.Literal('order.many'), list: Type.Array(Type.Integer()) })
    }
  })

  t.test('are checked', async t => {
    await accepts(t, all, { type: 'order.paid', data: { count: 1 } }, 'valid')
    const { message } = await refuses(t, all, JSON.stringify({ type: 'order.paid', data: { count: 0, note: MARKER } }), 'INVALID_EVENT', 'a constraint')
    t.match(message, '/data/count (')
  })

  t.test('replace the shape of a known type', async t => {
    await accepts(t, all, { type: 'batch.failed', reason: 'none' }, 'valid')
    const { message } = await refuses(t, all, JSON.stringify(thin('batch.failed', { id: MARKER })), 'INVALID_EVENT', 'of OpenAI\'s shape')
    t.match(message, '/reason (')
  })

  t.test('with many faults, the answer stays short', async t => {
    const many = await refuses(t, all, JSON.stringify({ type: 'order.many', list: Array.from({ length: 3_000 }, () => MARKER) }), 'INVALID_EVENT', 'many')
    t.match(many.message, '/list/0 (')
    t.equal(many.message.match(/\/list\//g)?.length, 5)
    const long = await refuses(t, all, JSON.stringify({ type: 'order.long', note: MARKER }), 'INVALID_EVENT', 'long')
    t.match(long.message, `/${names[0]!} (`)
    t.ok(long.message.length < 500)
  })
})

t.test('no mutation of a valid delivery is accepted', async t => {
  const all = await fixture(t)
  const { app, seen } = all
  const events = Object.entries(officialEntries as Record<string, EventEntry>).map(([type, entry]) => whole(type, entry))
  const anEvent = fc.constantFrom(...events)
  const url = fc.constantFrom(OWN, MARKED)
  /** A place in anything, as a fraction of its length. */
  const place = fc.double({ min: 0, max: 1, maxExcluded: true, noNaN: true })
  const at = (fraction: number, { length }: { length: number }) => Math.floor(fraction * length)

  async function refused (delivery: Signed, to: string): Promise<boolean> {
    seen.length = 0
    const { statusCode } = await post(app, delivery, to)
    return (statusCode === 400 || statusCode === 401) && seen.length === 0
  }

  t.test('unchanged it is', async () => {
    await fc.assert(fc.asyncProperty(anEvent, url, async (event, to) => {
      seen.length = 0
      const { statusCode } = await post(app, sign(event), to)
      return statusCode === 200 && seen.length === 1
    }), { numRuns: 200 })
  })

  t.test('a byte of the body', async () => {
    await fc.assert(fc.asyncProperty(anEvent, url, place, fc.integer({ min: 1, max: 255 }), async (event, to, where, bits) => {
      const { headers, body } = sign(event)
      const index = at(where, body)
      body[index] = body[index]! ^ bits
      return await refused({ headers, body }, to)
    }), { numRuns: 1_000 })
  })

  t.test('bytes left out, put in or repeated', async () => {
    await fc.assert(fc.asyncProperty(anEvent, url, place, fc.uint8Array({ maxLength: 8 }), fc.nat({ max: 8 }), async (event, to, where, inserted, left) => {
      const { headers, body } = sign(event)
      const index = at(where, body)
      const mutated = Buffer.concat([body.subarray(0, index), inserted, body.subarray(index + left)])
      fc.pre(!mutated.equals(body))
      return await refused({ headers, body: mutated }, to)
    }), { numRuns: 500 })
  })

  t.test('a character of a signed header', async () => {
    const name = fc.constantFrom('webhook-id', 'webhook-timestamp', 'webhook-signature')
    // node:http reads header values as Latin-1.
    await fc.assert(fc.asyncProperty(anEvent, url, name, place, fc.integer({ min: 1, max: 255 }), async (event, to, header, where, char) => {
      const { headers, body } = sign(event)
      const value = headers[header]!
      const index = at(where, value)
      const mutated = `${value.slice(0, index)}${String.fromCharCode(char)}${value.slice(index + 1)}`
      fc.pre(mutated !== value)
      return await refused({ headers: { ...headers, [header]: mutated }, body }, to)
    }), { numRuns: 1_000 })
  })

  t.test('the parts of two deliveries in one', async () => {
    const parts = fc.tuple(fc.boolean(), fc.boolean(), fc.boolean(), fc.boolean()).filter(each => each.includes(true) && each.includes(false))
    await fc.assert(fc.asyncProperty(fc.tuple(anEvent, anEvent).filter(([one, other]) => one !== other), url, parts, async ([one, other], to, [id, timestamp, signature, content]) => {
      const now = Math.floor(Date.now() / 1000)
      const a = sign(one, { timestamp: now })
      const b = sign(other, { timestamp: now - 1 })
      const take = (fromA: boolean, name: string) => (fromA ? a : b).headers[name]!
      return await refused({
        headers: {
          'content-type': 'application/json',
          'webhook-id': take(id, 'webhook-id'),
          'webhook-timestamp': take(timestamp, 'webhook-timestamp'),
          'webhook-signature': take(signature, 'webhook-signature')
        },
        body: (content ? a : b).body
      }, to)
    }), { numRuns: 500 })
  })
})

t.test('a schema that throws as it is checked fails the delivery, and no other', async t => {
  let thrown: unknown
  TypeRegistry.Set('Throwing', () => { throw thrown })
  t.teardown(() => { TypeRegistry.Delete('Throwing') })
  const schema = Type.Object({ type: Type.Literal('own.event'), data: { [Kind]: 'Throwing' } as unknown as TSchema })
  const app = await build(t, { events: { 'own.event': schema } })
  app.post('/own', { config: { openaiWebhook: {} } }, async () => ({}))
  const told: unknown[] = []
  let runs = 0
  app.openaiWebhook.onAny(() => { runs++ }).onError(error => { told.push(error) })
  const delivered: object = { webhookId: 'wh_1', timestamp: 1, event: thin('batch.failed') }
  for (const url of ['/webhooks/openai', '/own']) {
    const deliver = async (event: object): Promise<number> => {
      const { headers, body } = sign(event)
      return (await app.inject({ method: 'POST', url, headers, payload: body })).statusCode
    }
    for (thrown of [new Error('no way to tell'), 'a text', null, delivered]) {
      t.equal(await deliver({ ...thin('batch.failed'), type: 'own.event' }), 400, `${url} ${String(thrown)}`)
      const { code, cause } = told.pop() as { code: string, cause: Error }
      t.equal(code, 'FST_OPENAI_WEBHOOK_INVALID_EVENT')
      if (thrown instanceof Error) t.equal(cause, thrown)
      else t.equal(cause.message, 'a schema threw what is no Error')
    }
    t.equal(runs, 0)
    t.equal(await deliver(thin('batch.failed')), 200, url)
    runs = 0
  }
})

t.test('a schema that TypeBox cannot compile is a coded error at boot, with its event type', async t => {
  const schemas: Record<string, TSchema> = {
    'an unknown kind': Type.Object({ data: { [Kind]: 'Nope' } as unknown as TSchema }),
    'a reference to nothing': Type.Ref('nope')
  }
  for (const [name, schema] of Object.entries(schemas)) {
    const app = Fastify()
    app.register(openaiWebhook, { secret: SECRET, events: { 'own.event': schema } })
    let message = ''
    t.equal(await codeOf(async () => {
      await app.ready().then(undefined, (error: Error) => {
        message = error.message
        throw error
      })
    }), 'INVALID_OPTIONS', name)
    t.match(message, 'events["own.event"]')
    await app.close()
  }
})
