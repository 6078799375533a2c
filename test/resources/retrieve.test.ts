import OpenAI from 'openai'
import t from 'tap'
import { officialEntries } from '../../lib/events/index.ts'
import { retrieve } from '../../lib/resources/index.ts'
import { sampleEvent } from '../../lib/testing/index.ts'
import type { SampleType } from '../../lib/testing/index.ts'
import { OpenAIServer } from '../support/openai-server.ts'

/** As it is at run time: any event, any options. */
const fetchAny = retrieve as (client: object, event: object, options?: object) => Promise<object>

const clientOf = (server: OpenAIServer): OpenAI => new OpenAI({ apiKey: server.apiKey, baseURL: server.url, maxRetries: 0 })

const PATHS: ReadonlyArray<readonly [string, (id: string) => string]> = [
  ['agent.environment.', id => `/agents/environments/${id}`],
  ['agent.session.', id => `/agents/sessions/${id}`],
  ['batch.', id => `/batches/${id}`],
  ['eval.run.', id => `/evals/eval_1/runs/${id}`],
  ['fine_tuning.job.', id => `/fine_tuning/jobs/${id}`],
  ['response.', id => `/responses/${id}`],
  ['safety.alert.created', id => `/safety/alerts/${id}`],
  ['safety.org_alert.created', id => `/safety/alerts/${id}`],
  ['safety.warning_issued', id => `/safety/cases/${id}`],
  ['safety.deactivation_issued', id => `/safety/cases/${id}`],
  ['video.', id => `/videos/${id}`]
]
const INSTEAD: Readonly<Record<string, string>> = {
  'realtime.call.incoming': 'client.realtime.calls.accept(event.data.call_id, …)',
  'live.call.incoming': 'client.live.sessions.accept(event.data.session_id, …)',
  'live.transport.incoming': 'client.live.sessions.accept(event.data.session_id, …)',
  'live.transport.connected': 'SidebandWS',
  'safety_identifier.blocked': 'event.data has all there is'
}

t.test('every event gives its resource, or says what to call instead', async t => {
  const server = await OpenAIServer.start(t)
  const client = clientOf(server)
  // What a client has that is older than these services.
  const old = { get: client.get.bind(client), beta: {}, batches: {} }
  for (const type of Object.keys(officialEntries) as SampleType[]) {
    const event = sampleEvent(type)
    const path = PATHS.find(([family]) => type.startsWith(family))?.[1]
    if (path === undefined) {
      const refused = { code: 'FST_OPENAI_WEBHOOK_NO_RESOURCE', message: `${type}: ` }
      await t.rejects(fetchAny(client, event), refused)
      await t.rejects(fetchAny(client, event), { message: INSTEAD[type]! })
      continue
    }
    const { id } = event.data as { id: string }
    server.resources.set(`GET /v1${path(id)}`, { id, object: 'as the API has it' })
    for (const each of [client, old]) {
      t.match(await fetchAny(each, event, { evalId: 'eval_1' }), { id, object: 'as the API has it' }, type)
      t.equal(server.calls.at(-1), `GET /v1${path(id)}`)
      const beta = server.requests.at(-1)!.headers['openai-beta']
      t.equal(beta, type.startsWith('agent.') ? 'agents=v1' : undefined)
    }
  }
})

t.test('events of types that are not known here have none', async t => {
  for (const type of ['file.processed', 'toString', 'batch', 'safety.new', '']) {
    await t.rejects(fetchAny({}, { type, data: { id: 'x' } }), { code: 'FST_OPENAI_WEBHOOK_NO_RESOURCE' }, type)
  }
})

t.test('what is no event, or comes before the client, is told', async t => {
  const event = sampleEvent('batch.failed')
  for (const [client, given, message] of [
    [{}, 'batch_1', 'retrieve(): expected an event, as handlers get it, got a value of type string'],
    [event, { get () {} }, 'retrieve(): expected an event, as handlers get it, got an object without a type'],
    [{}, null, 'retrieve(): expected an event, as handlers get it, got an object without a type'],
    [undefined, event, 'retrieve(): expected a client of the openai package as the first argument, got undefined']
  ]) await t.rejects(fetchAny(client as never, given as never), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message })
})

t.test('a run of an eval is asked for with the eval\'s id', async t => {
  for (const options of [undefined, {}, { evalId: '' }, { evalId: 7 }]) {
    await t.rejects(fetchAny({}, sampleEvent('eval.run.failed'), options), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: 'expected evalId to be an id' })
  }
})

t.test('an id that leads elsewhere is not asked for', async t => {
  const server = await OpenAIServer.start(t)
  const client = clientOf(server)
  for (const id of ['', '.', '..', 'a b', 'é', '\u0000', 'x'.repeat(257), 7, undefined]) {
    await t.rejects(fetchAny(client, { type: 'batch.failed', data: { id } }), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS' })
  }
  await t.rejects(fetchAny(client, { type: 'batch.failed' }), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS' })
  t.same(server.calls, [])

  for (const each of [client, { get: client.get.bind(client) }]) {
    await t.rejects(fetchAny(each, { type: 'batch.failed', data: { id: '../files/file-1?x#y' } }), { message: /^404 / })
    t.equal(server.calls.at(-1), 'GET /v1/batches/..%2Ffiles%2Ffile-1%3Fx%23y')
  }
})

t.test('the signal gives the call up, and the API\'s refusals are the SDK\'s errors', async t => {
  const server = await OpenAIServer.start(t)
  const client = clientOf(server)
  const abort = new AbortController()
  server.resources.set('GET /v1/batches/batch_1', reply => {
    reply.hijack()
    abort.abort()
  })
  await t.rejects(retrieve(client, sampleEvent('batch.failed', { data: { id: 'batch_1' } }), { signal: abort.signal }), { name: 'Error', message: 'Request was aborted.' })
  await t.rejects(retrieve(client, sampleEvent('batch.failed', { data: { id: 'batch_2' } })), { message: /^404 / })
})
