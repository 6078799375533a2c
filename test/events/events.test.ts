import type { TObject, TProperties, TSchema } from '@sinclair/typebox'
import { Value } from '@sinclair/typebox/value'
import t from 'tap'
import { guideEntries, officialEntries, officialEvents } from '../../lib/events/index.ts'
import { guideEvents } from '../../lib/index.ts'
import { build, post, sign } from '../support/deliveries.ts'

// The public promise: every event type, the keys of its `data` ("?" where it may be absent), and whether
// `object: 'event'` is always there.
const SESSION = ['id', 'environment_type', 'environment_id?']
const SIP = ['sip_headers', 'sip_media_security?']

const OFFICIAL: Record<string, string[]> = {
  'agent.environment.expired': ['id'],
  'agent.environment.failed': ['id'],
  'agent.environment.ready': ['id'],
  'agent.environment.suspended': ['id'],
  'agent.session.action_required': ['id', 'required_action'],
  'agent.session.created': [...SESSION, 'connect?'],
  'agent.session.failed': SESSION,
  'agent.session.idle': SESSION,
  'agent.session.in_progress': SESSION,
  'batch.cancelled': ['id'],
  'batch.completed': ['id'],
  'batch.expired': ['id'],
  'batch.failed': ['id'],
  'eval.run.canceled': ['id'],
  'eval.run.failed': ['id'],
  'eval.run.succeeded': ['id'],
  'fine_tuning.job.cancelled': ['id'],
  'fine_tuning.job.failed': ['id'],
  'fine_tuning.job.succeeded': ['id'],
  'live.call.incoming': ['session_id', ...SIP],
  'live.transport.connected': ['session_id', 'type'],
  'live.transport.incoming': ['session_id', 'type', ...SIP],
  'realtime.call.incoming': ['call_id', ...SIP],
  'response.cancelled': ['id'],
  'response.completed': ['id'],
  'response.failed': ['id'],
  'response.incomplete': ['id'],
  'safety.alert.created': ['id'],
  'safety.deactivation_issued': ['id'],
  'safety.org_alert.created': ['id'],
  'safety.warning_issued': ['id'],
  'safety_identifier.blocked': ['safety_category', 'safety_identifier', 'model?', 'project_id?', 'request_id?'],
  'video.completed': ['id'],
  'video.failed': ['id']
}

const GUIDE: Record<string, string[]> = {
  'batch.completed': ['id', 'status?', 'output_file_id?', 'request_counts?'],
  'batch.created': ['id', 'object?', 'endpoint?', 'status?'],
  'batch.failed': ['id', 'status?', 'errors?'],
  'batch.in_progress': ['id', 'status?', 'request_counts?'],
  'file.processed': ['id', 'purpose?', 'status?', 'bytes?'],
  'fine_tune.completed': ['id', 'model?', 'status?', 'trained_tokens?'],
  'fine_tune.failed': ['id', 'status?', 'error?']
}

const MARKED = /^(?:agent\.|safety\.|live\.transport\.connected$)/

const propertiesOf = (schema: TSchema): TProperties => (schema as TObject).properties

function keysOf (schema: TSchema): string[] {
  const required: unknown[] = schema['required'] ?? []
  return Object.keys(propertiesOf(schema)).map(key => required.includes(key) ? key : `${key}?`).sort()
}

const eventOf = (type: string, data: object) => ({ id: 'evt_1', object: 'event', created_at: 1750861210, type, data })

t.test('OpenAI\'s 34 event types', async t => {
  t.same(Object.keys(officialEntries).sort(), Object.keys(OFFICIAL))
  t.equal(Object.keys(OFFICIAL).length, 34)
  for (const [type, { schema }] of Object.entries(officialEntries)) {
    t.same(keysOf(schema), ['created_at', 'data', 'id', MARKED.test(type) ? 'object' : 'object?', 'type'], type)
    t.same(keysOf(propertiesOf(schema)['data']!), OFFICIAL[type]!.toSorted(), `${type}: data`)
    t.equal((officialEvents as Record<string, TSchema>)[type], schema, `${type}: what validates is what the table has`)
  }
})

t.test('the guide\'s 5 event types and its fuller batch.completed and batch.failed', async t => {
  t.same(Object.keys(guideEntries).sort(), Object.keys(GUIDE))
  t.equal(Object.keys(GUIDE).filter(type => !(type in OFFICIAL)).length, 5)
  t.same(Object.keys(guideEvents).sort(), Object.keys(GUIDE))
  for (const [type, { schema }] of Object.entries(guideEntries)) {
    t.same(keysOf(schema), ['created_at?', 'data', 'id?', 'object?', 'type'], type)
    t.same(keysOf(propertiesOf(schema)['data']!), GUIDE[type]!.toSorted(), `${type}: data`)
    t.equal((guideEvents as Record<string, TSchema>)[type], schema, `${type}: what is exported is what the table has`)
  }
})

const all = [...Object.entries(officialEntries), ...Object.entries(guideEntries)] as [string, { description: string, schema: TSchema, sample: object }][]

t.test('every entry describes itself and has a valid, full sample', async t => {
  for (const [type, { description, schema, sample }] of all) {
    t.match(description, /^[A-Z].+[^.]\.$/, `${type}: a sentence`)
    t.ok(Value.Check(schema, eventOf(type, sample)), `${type}: the sample is valid`)
    t.notOk(Value.Check(schema, eventOf(`${type}x`, sample)), `${type}: under its own type alone`)
    const unknown = Object.keys(sample).filter(key => !(key in propertiesOf(propertiesOf(schema)['data']!)))
    t.same(unknown, [], `${type}: the sample has no field that the schema lacks`)
  }
  const guide = all.slice(Object.keys(officialEntries).length)
  for (const [type, { schema, sample }] of guide) {
    t.ok(Value.Check(schema, { type, data: sample }), `${type}: of the guide, needs no more than type and data`)
  }
})

// As OpenAI's reference, guides and answers have them. The part after `C-` is documented by one example alone.
const ID: Record<string, RegExp> = {
  'agent.environment': /^env_[0-9a-f]{32}$/,
  'agent.session': /^sess_[0-9a-f]{32}$/,
  batch: /^batch_[0-9a-f]{32}$/,
  call_id: /^rtc_[0-9a-f]{32}$/,
  environment_id: /^env_[0-9a-f]{32}$/,
  'eval.run': /^evalrun_[0-9a-f]{32}$/,
  file: /^file-[0-9A-Za-z]{22}$/,
  fine_tune: /^ft-[0-9A-Za-z]{24}$/,
  'fine_tuning.job': /^ftjob-[0-9A-Za-z]{24}$/,
  output_file_id: /^file-[0-9A-Za-z]{22}$/,
  project_id: /^proj_[0-9A-Za-z]{24}$/,
  request_id: /^req_[0-9a-f]{32}$/,
  response: /^resp_[0-9a-f]{48}$/,
  'safety.alert': /^alert_[0-9a-f]{32}$/,
  'safety.deactivation_issued': /^C-[0-9a-z]+$/,
  'safety.org_alert': /^alert_[0-9a-f]{32}$/,
  'safety.warning_issued': /^C-[0-9a-z]+$/,
  session_id: /^live_[0-9a-f]{32}$/,
  video: /^video_[0-9a-f]{48}$/
}

t.test('the ids in samples are shaped like OpenAI\'s own', async t => {
  for (const [type, { sample }] of all) {
    const ids = Object.entries(sample).filter(([key]) => /(?:^|_)id$/.test(key))
    t.ok(ids.length > 0, type)
    for (const [key, id] of ids) {
      const name = key === 'id' ? Object.keys(ID).find(start => type === start || type.startsWith(`${start}.`))! : key
      t.match(id, ID[name]!, `${type}: ${key}`)
    }
  }
})

/** A copy with one more field in every object. */
function opened (value: unknown): unknown {
  if (Array.isArray(value)) return value.map(opened)
  if (typeof value !== 'object' || value === null) return value
  const copy = Object.entries(value).map(([key, inner]) => [key, opened(inner)])
  return { ...Object.fromEntries(copy), not_listed: { any: ['thing', null] } }
}

t.test('objects are open at every depth: what is not listed is accepted', async t => {
  for (const [type, { schema, sample }] of all) {
    t.ok(Value.Check(schema, opened(eventOf(type, sample))), type)
  }
})

t.test('enums of which some values are known accept others', async t => {
  const open: Record<string, object> = {
    'realtime.call.incoming': { sip_media_security: 'dtls' },
    'live.call.incoming': { sip_media_security: 'dtls' },
    'live.transport.incoming': { sip_media_security: 'dtls' },
    'agent.session.action_required': { required_action: { type: 'something_new' } },
    'agent.session.created': { environment_type: 'moon_hosted' },
    'agent.session.failed': { environment_type: 'moon_hosted' },
    'agent.session.idle': { environment_type: 'moon_hosted' },
    'agent.session.in_progress': { environment_type: 'moon_hosted' }
  }
  const entries: Record<string, { schema: TSchema, sample: object }> = officialEntries
  for (const [type, other] of Object.entries(open)) {
    const { schema, sample } = entries[type]!
    t.ok(Value.Check(schema, eventOf(type, { ...sample, ...other })), type)
  }
  const closed = entries['live.transport.incoming']!
  t.notOk(Value.Check(closed.schema, eventOf('live.transport.incoming', { ...closed.sample, type: 'webrtc' })), 'a literal does not')
})

t.test('null stands for an absent value where OpenAI has it so, and nowhere else', async t => {
  const nullable = new Set(['safety_identifier.blocked/model', 'safety_identifier.blocked/project_id', 'safety_identifier.blocked/request_id'])
  for (const [type, { schema, sample }] of all) {
    for (const key of Object.keys(propertiesOf(propertiesOf(schema)['data']!))) {
      const name = `${type}/${key}`
      t.equal(Value.Check(schema, eventOf(type, { ...sample, [key]: null })), nullable.has(name), name)
    }
  }
})

t.test('the guide\'s schemas are taken by the events option, and keep the guide\'s fields', async t => {
  const seen: unknown[] = []
  const app = await build(t, { events: guideEvents })
  app.openaiWebhook.onAny(event => { seen.push(event) })
  await app.ready()
  const events = Object.entries(guideEntries).map(([type, { sample }]) => ({ type, data: sample }))
  for (const event of events) t.equal((await post(app, sign(event))).statusCode, 200, event.type)
  t.same(seen, events)

  const strict = await build(t)
  t.equal((await post(strict, sign(events.find(({ type }) => type === 'batch.completed')))).statusCode, 400, 'without them, OpenAI\'s own envelope is asked for')
})
