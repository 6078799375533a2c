import { execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import { promisify } from 'node:util'
import { Type } from '@sinclair/typebox'
import t from 'tap'
import type { Test } from 'tap'
import { officialEntries } from '../../lib/events/index.ts'
import { ROOT } from '../support/docs.ts'

type Entries = Record<string, { schema: object }>

interface Package {
  version: string
  events: Map<string, object>
  subscribable: string[]
}

interface Drift {
  readPackage (folder: string): Promise<Package>
  compare (sdk: Package, entries: Entries): string[]
  drift (args: string[]): Promise<{ code: number, text: string }>
}

const { readPackage, compare, drift } = await import(new URL('../../docs/drift.mjs', import.meta.url).href) as Drift

const INSTALLED = join(ROOT, 'node_modules/openai')
const WEBHOOKS = readFileSync(join(INSTALLED, 'resources/webhooks/webhooks.d.ts'), 'utf8')
const installed = await readPackage(INSTALLED)

/** Nothing listens there. */
const NOWHERE = 'http://127.0.0.1:9'

/** As much of an `openai` package as is read. */
const packageOf = (webhooks: string) => ({
  'package.json': JSON.stringify({ name: 'openai', version: '99.0.0' }),
  resources: { webhooks: { 'webhooks.d.ts': webhooks } }
})

type Change = [from: string | RegExp, to: string]

/** Replaces the first match at or after a mark. */
function change (text: string, mark: string, [from, to]: Change): string {
  const start = text.indexOf(mark)
  const changed = text.slice(start).replace(from, to)
  if (start === -1 || changed === text.slice(start)) throw new Error(`${mark}: nothing is ${String(from)}`)
  return text.slice(0, start) + changed
}

/** The declarations of an event begin here. */
const event = (name: string): string => `export interface ${name}WebhookEvent {`
const subscriptions = 'export interface WebhookCreateParams {'
const ID = /id: string;(?=\s+\}\s+\})/

// What OpenAI may change, and the lines that tell of it.
const PLANTED: Array<[mark: string, ...Change, told: string[]]> = [
  [event('BatchFailed'), ID, 'id: string; region: string; counts?: { total: number }', [
    'batch.failed data.counts: not in the table',
    'batch.failed data.counts.total: not in the table',
    'batch.failed data.region: not in the table'
  ]],
  [event('BatchExpired'), ID, '', ['batch.expired data.id: in the table alone']],
  [event('BatchCompleted'), ID, 'id?: string', ['batch.completed data.id: always there in the table, may be absent in openai']],
  [event('BatchCancelled'), "object?: 'event'", "object: 'event'", ['batch.cancelled object: may be absent in the table, always there in openai']],
  [event('ResponseFailed'), ID, 'id: number', ['response.failed data.id: string in the table, number in openai']],
  [event('ResponseCompleted'), ID, 'id: string | null', ['response.completed data.id: string in the table, string | null in openai']],
  [event('ResponseCancelled'), ID, 'id: boolean', ['response.cancelled data.id: string in the table, boolean in openai']],
  [event('ResponseIncomplete'), ID, 'id: Imported.Id', ['response.incomplete data.id: string in the table, Imported.Id in openai']],
  [event('AgentSessionActionRequired'), "'function_call'", "'shell_call'", [
    'agent.session.action_required data.required_action.type: function_call in the table alone',
    'agent.session.action_required data.required_action.type: shell_call not in the table'
  ]],
  [event('RealtimeCallIncoming'), 'Array<Data.SipHeader>', 'string', [
    'realtime.call.incoming data.sip_headers: array in the table, string in openai',
    'realtime.call.incoming data.sip_headers[]: in the table alone',
    'realtime.call.incoming data.sip_headers[].name: in the table alone',
    'realtime.call.incoming data.sip_headers[].value: in the table alone'
  ]],
  [event('LiveCallIncoming'), 'value: string', 'value?: string', ['live.call.incoming data.sip_headers[].value: always there in the table, may be absent in openai']],
  [event('LiveTransportConnected'), "type: 'webrtc'", 'type: string', ['live.transport.connected data.type: only webrtc in the table, other values too in openai']],
  [event('LiveTransportIncoming'), "type: 'sip'", "type: 'sip' | 'h323'", ['live.transport.incoming data.type: h323 not in the table']],
  ['export type UnwrapWebhookEvent =', 'EvalRunFailedWebhookEvent', 'EvalRunPausedWebhookEvent', ['eval.run.failed: in the table alone', 'eval.run.paused: not in the table']],
  [event('EvalRunFailed'), '{', "{ type: 'eval.run.failed' }\nexport interface EvalRunPausedWebhookEvent {\n", []],
  [event('EvalRunPaused'), "type: 'eval.run.failed'", "type: 'eval.run.paused'", []],
  [subscriptions, "'eval.run.failed' | ", "'audio.completed' | ", ['audio.completed: not in the table']],
  [subscriptions, "'video.failed' | ", '', ['video.failed: in the table alone']]
]

t.test('nothing differs between the table and the installed openai', async t => {
  t.ok(installed.events.size >= 31)
  t.ok(installed.subscribable.includes('video.completed'))
  t.same(compare(installed, officialEntries), [])
})

t.test('what openai has changed is told', async t => {
  const changed = PLANTED.reduce((text, [mark, from, to]) => change(text, mark, [from, to]), WEBHOOKS)
  const sdk = await readPackage(t.testdir(packageOf(changed)))
  t.equal(sdk.version, '99.0.0')
  t.same(compare(sdk, officialEntries).sort(), PLANTED.flatMap(([,,, told]) => told).sort())
})

t.test('what the table has changed is told', async t => {
  const { 'batch.failed': gone, ...entries } = officialEntries
  const planted: Entries = {
    ...entries,
    'batch.paused': gone,
    'batch.expired': { schema: Type.Object({ ...entries['batch.expired'].schema.properties, trace: Type.Optional(Type.String()) }) },
    'batch.completed': { schema: Type.Partial(entries['batch.completed'].schema) }
  }
  t.same(compare(installed, planted), [
    'batch.completed created_at: may be absent in the table, always there in openai',
    'batch.completed data: may be absent in the table, always there in openai',
    'batch.completed id: may be absent in the table, always there in openai',
    'batch.completed type: may be absent in the table, always there in openai',
    'batch.expired trace: in the table alone',
    'batch.failed: not in the table',
    'batch.paused: in the table alone'
  ])
})

t.test('a package that declares its events elsewhere is not taken for one without events', async t => {
  await t.rejects(readPackage(t.testdir(packageOf('export {}\n'))), { message: /^expected openai 99\.0\.0 to declare UnwrapWebhookEvent in resources\/webhooks\/webhooks\.d\.ts, found none/ })
  await t.rejects(readPackage(t.testdir({ 'package.json': '{ "version": "99.0.0" }' })), { message: /to declare UnwrapWebhookEvent/ })
})

t.test('npm run drift', async t => {
  t.test('downloads the newest package, and fails when something differs', async t => {
    const { env } = use(t, await serve(t, change(WEBHOOKS, event('BatchFailed'), [ID, 'id: string; region: string'])))
    const script = spawn(process.execPath, [join(ROOT, 'docs/drift.mjs')], { env, stdio: ['ignore', 'pipe', 'inherit'] })
    const [out, [code]] = await Promise.all([text(script.stdout), once(script, 'close')])
    t.equal(out, 'openai 99.0.0 and the event table differ:\n  batch.failed data.region: not in the table\n')
    t.equal(code, 1)
  })

  t.test('compares with the installed package, and succeeds when nothing differs', async t => {
    use(t, NOWHERE)
    const { version, events, subscribable } = installed
    t.same(await drift(['--installed']), {
      code: 0,
      text: `openai ${version}: nothing differs in its ${events.size} typed events and ${subscribable.length} event types of endpoints`
    })
  })

  t.test('says that it has compared nothing: without a network, without npm, with an argument that it does not know', async t => {
    use(t, NOWHERE)
    t.same(await drift([]), {
      code: 2,
      text: 'nothing was compared: the newest openai package could not be fetched (npm error code ECONNREFUSED); npm run drift -- --installed compares with the installed one'
    })
    use(t, NOWHERE, { PATH: '' })
    t.match(await drift([]), { code: 2, text: /could not be fetched \(spawn npm ENOENT\)/ })
    t.same(await drift(['--instaled']), { code: 2, text: 'nothing was compared: expected no argument but --installed, got --instaled' })
  })
})

/** Has npm ask this registry alone. It is started in another folder, where the test run's loader is not. */
function use (t: Test, registry: string, others: NodeJS.ProcessEnv = {}): { env: NodeJS.ProcessEnv } {
  const env = { ...process.env, NODE_OPTIONS: '', npm_config_registry: registry, npm_config_cache: join(t.testdirName, 'cache'), ...others }
  t.intercept(process, 'env', { value: env })
  return { env }
}

/** A registry that has one package: `openai` 99.0.0 with these types. */
async function serve (t: Test, webhooks: string): Promise<string> {
  const dir = t.testdir({ package: packageOf(webhooks) })
  await promisify(execFile)('tar', ['-czf', 'openai.tgz', 'package'], { cwd: dir })
  const archive = readFileSync(join(dir, 'openai.tgz'))
  const server = createServer(({ url }, response) => {
    if (url === '/openai.tgz') return response.end(archive)
    const dist = { tarball: `${address}/openai.tgz` }
    response.end(JSON.stringify({ name: 'openai', 'dist-tags': { latest: '99.0.0' }, versions: { '99.0.0': { name: 'openai', version: '99.0.0', dist } } }))
  })
  t.teardown(() => server.close())
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const address = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  return address
}
