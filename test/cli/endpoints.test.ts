import { execFile } from 'node:child_process'
import { cp, mkdir, mkdtemp, readFile, rm, symlink } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { promisify, stripVTControlCharacters } from 'node:util'
import t from 'tap'
import type { Command } from '../../lib/cli/command.ts'
import { CommandError, EXIT, parse } from '../../lib/cli/command.ts'
import { endpoints, endpointsCommand } from '../../lib/cli/endpoints.ts'
import { officialEntries } from '../../lib/events/index.ts'
import { testSecret } from '../../lib/testing/index.ts'
import { run as runCommand } from '../support/command.ts'
import type { Given, Result } from '../support/command.ts'
import { build } from '../support/deliveries.ts'
import { OpenAIServer } from '../support/openai-server.ts'
import { freePort } from '../support/port.mjs'
import { environment, runProgram } from '../support/program.mjs'

const exec = promisify(execFile)
const root = resolve(import.meta.dirname, '../..')
const bin = join(root, 'dist/cli/bin.js')

const env = Object.fromEntries(Object.entries(environment).filter(([name]) => !name.startsWith('OPENAI_')))

/** Runs `openai-webhook endpoints …` in this process. */
const run = async (argv: string, given?: Given): Promise<Result> =>
  await runCommand(['endpoints', ...argv.match(/'[^']*'|\S+/g)!.map(arg => arg.replaceAll("'", ''))], given)

/** Runs it against the server, with its API key. */
async function ask (server: OpenAIServer, argv: string, given: Given = {}): Promise<Result> {
  return await run(argv, { ...given, env: { OPENAI_API_KEY: server.apiKey, OPENAI_BASE_URL: server.url, ...given.env } })
}

const lines = (text: string): string[] => text.trimEnd().split('\n')

t.test('list shows the endpoints of all pages', async t => {
  const server = await OpenAIServer.start(t, { pageSize: 2 })
  const added = ['one', 'two', 'three', 'four', 'five'].map(name => server.add({ name }))

  const { code, out } = await ask(server, 'list')
  t.equal(code, EXIT.ok)
  t.same(lines(out).filter(line => line.startsWith('whe_')), added.map(({ id, name }) => `${id}  ${name}`))
  t.match(out, `secret       ${added[4]!.signing_secret_hint}\n`)
  t.same(server.calls, [
    'GET /v1/webhook_endpoints',
    `GET /v1/webhook_endpoints?after=${added[1]!.id}`,
    `GET /v1/webhook_endpoints?after=${added[3]!.id}`
  ])

  const json = await ask(server, 'list --json')
  t.same(lines(json.out).map(line => JSON.parse(line)), added, 'what the API answers, one object a line')
})

t.test('list says so when there is no endpoint', async t => {
  const server = await OpenAIServer.start(t)
  t.same(await ask(server, 'list'), { code: EXIT.ok, out: '', err: 'the project of this API key has no webhook endpoints\n' })
})

t.test('what others have named reaches the terminal without escape sequences, and colour only a terminal', async t => {
  const server = await OpenAIServer.start(t)
  const { id } = server.add({ name: 'red \u001b[31m\u009b31m\nalert' })
  const plain = await ask(server, 'list')
  t.match(plain.out, `${id}  red ?[31m?31m alert\n`)
  const coloured = await ask(server, 'list', { isTTY: true })
  t.not(coloured.out, plain.out)
  t.equal(stripVTControlCharacters(coloured.out), plain.out)
})

t.test('an endpoint without a hint of its secret is shown', async t => {
  const server = await OpenAIServer.start(t)
  server.answers.push({ status: 200, body: { object: 'list', data: [{ ...server.add(), signing_secret_hint: null }], has_more: false } })
  t.match((await ask(server, 'list')).out, 'secret       no hint')
})

t.test('create prints the signing secret once, as the line for the environment', async t => {
  const server = await OpenAIServer.start(t)
  const { code, out, err } = await ask(server, "create --name 'my orders' --url https://example.com/hook --event-types batch.completed,batch.failed --event-types batch.completed")
  t.equal(code, EXIT.ok)
  t.equal(err, '')
  t.same(server.requests.map(({ call, body }) => ({ call, body })), [{
    call: 'POST /v1/webhook_endpoints',
    body: { name: 'my orders', url: 'https://example.com/hook', event_types: ['batch.completed', 'batch.failed'] }
  }])
  const { id } = server.endpoints[0]!
  t.match(out, `${id}  my orders`)
  t.same(lines(out).filter(line => line.includes(server.secrets.get(id)!)), [`OPENAI_WEBHOOK_SECRET=${server.secrets.get(id)!}`])

  const json = await ask(server, 'create --name two --url https://example.com/two --event-types batch.failed --json')
  const document = JSON.parse(json.out) as { id: string, signing_secret: string }
  t.match(document, { object: 'webhook_endpoint', name: 'two', event_types: ['batch.failed'] })
  t.equal(document.signing_secret, server.secrets.get(document.id))
})

t.test('families, "all" and newer types are looked up in what the project can receive', async t => {
  const eventTypes = ['batch.completed', 'batch.failed', 'response.completed', 'image.completed']
  const server = await OpenAIServer.start(t, { eventTypes })
  const create = async (types: string): Promise<Result> => await ask(server, `create --name x --url https://example.com --event-types '${types}' --json`)
  const created = async (types: string): Promise<string[]> => (JSON.parse((await create(types)).out) as { event_types: string[] }).event_types

  t.same(await created('batch.completed, batch.*'), ['batch.completed', 'batch.failed'], 'each once')
  t.same(await created('all'), eventTypes)
  t.same(await created('image.completed'), ['image.completed'])
  t.same(server.calls.filter(call => call.startsWith('GET')), Array(3).fill('GET /v1/webhook_event_types'))

  const count = server.endpoints.length
  t.same(await create('batch.complete'), {
    code: EXIT.usage,
    out: '',
    err: 'openai-webhook: unknown event type "batch.complete", did you mean "batch.completed"?: openai-webhook endpoints event-types lists them (see --help)\n'
  })
  t.match(await create('nothing.*'), { code: EXIT.usage, err: 'unknown event type "nothing.*"' })
  t.equal(server.endpoints.length, count, 'nothing was created')

  t.match(await create('safety.alert.created'), { code: EXIT.failed, err: "answered 400 invalid_value: Invalid value: 'safety.alert.created'." }, 'a known type that the project cannot receive is the API\'s to refuse')
})

t.test('update changes what is given, and replaces the set of event types', async t => {
  const server = await OpenAIServer.start(t)
  const { id } = server.add()
  const { code, out } = await ask(server, `update ${id} --name renamed`)
  t.equal(code, EXIT.ok)
  t.match(out, `${id}  renamed`)
  await ask(server, `update ${id} --url https://example.com/new --event-types batch.*`)
  t.same(server.requests.filter(({ call }) => call.startsWith('POST')).map(({ body }) => body), [
    { name: 'renamed' },
    { url: 'https://example.com/new', event_types: ['batch.completed', 'batch.failed'] }
  ])
  t.match(JSON.parse((await ask(server, `update ${id} --name again --json`)).out), { id, name: 'again', url: 'https://example.com/new' })
})

t.test('delete asks for --yes', async t => {
  const server = await OpenAIServer.start(t)
  const { id } = server.add()
  t.match(await ask(server, `delete ${id}`), { code: EXIT.usage, err: `delete: ${id} and its secret would be gone for good; confirm it with --yes` })
  t.equal(server.endpoints.length, 1)
  t.same(server.requests, [])
  t.same(await ask(server, `delete ${id} --yes`), { code: EXIT.ok, out: `deleted ${id}\n`, err: '' })
  t.equal(server.endpoints.length, 0)

  const other = server.add().id
  t.same(JSON.parse((await ask(server, `delete ${other} --yes --json`)).out), { object: 'webhook_endpoint.deleted', id: other, deleted: true })
})

t.test('rotate-secret keeps the old secret, and prints what accepts both', async t => {
  const server = await OpenAIServer.start(t)
  const { id } = server.add()
  const old = server.secrets.get(id)!
  const { code, out } = await ask(server, `rotate-secret ${id}`, { env: { OPENAI_WEBHOOK_SECRET: old } })
  t.equal(code, EXIT.ok)
  t.same(server.requests.map(({ call, body }) => ({ call, body })), [
    { call: `POST /v1/webhook_endpoints/${id}/rotate_secret`, body: { keep_old_secret_active_for_24_hours: true } }
  ])
  const secret = server.secrets.get(id)!
  t.notOk(out.includes(old), 'the old secret is not printed')
  t.equal(out.split(secret).length - 1, 1, 'the new one once')

  // What it prints is put into a shell and a file, and receives deliveries under both secrets.
  const environment = lines(out).filter(line => line.startsWith('OPENAI_WEBHOOK_SECRET'))
  const code24h = /^await app\.register[\s\S]*?^}\)$/m.exec(out)![0]
  t.match(await readFile(join(root, 'docs/cli.md'), 'utf8'), code24h, 'docs/cli.md shows the same code')
  const dir = t.testdir({
    'receiver.mjs': `
import Fastify from 'fastify'
import openaiWebhook from 'fastify-openai-webhook'
import { deliver, sampleEvent } from 'fastify-openai-webhook/testing'
const app = Fastify()
${code24h}
for (const secret of process.argv.slice(2)) console.log((await deliver(app, sampleEvent('batch.failed'), { secret })).statusCode)
`
  })
  const script = ['set -a', ...environment, 'exec "$0" "$@"'].join('\n')
  const secrets = [secret, old, testSecret]
  const receive = async (script: string, secret: string): Promise<string[]> =>
    lines((await exec('sh', ['-c', script, process.execPath, join(dir, 'receiver.mjs'), ...secrets], { env: { ...env, OPENAI_WEBHOOK_SECRET: secret } })).stdout)
  t.same(await receive(script, old), ['200', '200', '401'])
  t.same(await receive('exec "$0" "$@"', secret), ['200', '401', '401'], 'the code stays when the old secret is removed')
})

t.test('rotate-secret --revoke-old-secret ends the old one', async t => {
  const server = await OpenAIServer.start(t)
  const { id } = server.add()
  const { out } = await ask(server, `rotate-secret ${id} --revoke-old-secret`)
  t.same(server.requests.map(({ body }) => body), [{ keep_old_secret_active_for_24_hours: false }])
  t.match(out, `\nOPENAI_WEBHOOK_SECRET=${server.secrets.get(id)!}\n`)
  t.notMatch(out, 'PREVIOUS')

  const document = JSON.parse((await ask(server, `rotate-secret ${id} --json`)).out) as object
  t.match(document, { id, signing_secret: server.secrets.get(id)! })
})

t.test('test has a sample delivered, and fails unless it was answered 200', async t => {
  const server = await OpenAIServer.start(t)
  const types: string[] = []
  const right = server.add()
  const app = await build(t, { secret: server.secrets.get(right.id)! })
  app.openaiWebhook.onAny(({ type }) => { types.push(type) })
  right.url = `${await app.listen({ port: 0, host: '127.0.0.1' })}/webhooks/openai`
  const wrong = server.add({ url: right.url })

  t.same(await ask(server, `test ${right.id} batch.failed`), { code: EXIT.ok, out: 'batch.failed: the endpoint answered 200\n', err: '' })
  t.same(types, ['batch.failed'])
  t.match(await ask(server, `test ${wrong.id} batch.failed`), { code: EXIT.failed, out: 'batch.failed: the endpoint answered 401, which OpenAI takes for a failure' })

  const { code, out } = await ask(server, `test ${wrong.id} batch.completed --json`)
  t.equal(code, EXIT.failed)
  t.same(JSON.parse(out), { object: 'webhook_endpoint.test', webhook_endpoint_id: wrong.id, event_type: 'batch.completed', success: true, status_code: 401 })

  t.match(await ask(server, `test ${right.id} 'batch.*'`), { code: EXIT.usage, err: 'test: expected one event type, got "batch.*"' })
})

t.test('event-types marks those that have no schema here', async t => {
  const server = await OpenAIServer.start(t, { eventTypes: [...Object.keys(officialEntries), 'image.completed'] })
  const { code, out } = await ask(server, 'event-types')
  t.equal(code, EXIT.ok)
  t.same(lines(out), [...Object.keys(officialEntries), 'image.completed  no schema here: goes to onAny and onUnhandled handlers'])
  const json = await ask(server, 'event-types --json')
  t.same(lines(json.out).slice(-2).map(line => JSON.parse(line)), [
    { type: Object.keys(officialEntries).at(-1), schema: true },
    { type: 'image.completed', schema: false }
  ])
})

t.test('wrong usage is told before anything is asked of OpenAI', async t => {
  const server = await OpenAIServer.start(t)
  const wrong: Array<[string, string]> = [
    ['--json', 'endpoints: expected one of list, create, update, delete, rotate-secret, test, event-types'],
    ['lst', 'endpoints: unknown action "lst", did you mean "list"?'],
    ['toString', 'endpoints: unknown action "toString"'],
    ['list whe_1', 'list: expected nothing more, got "whe_1"'],
    ['update', 'update: expected ID, got nothing'],
    ['test whe_1', 'test: expected ID and TYPE, got "whe_1"'],
    ['rotate-secret ../files', 'rotate-secret: expected an endpoint\'s id such as whe_123, got "../files"'],
    ["delete '' --yes", 'delete: expected an endpoint\'s id such as whe_123, got ""'],
    ['list --name x', 'list: --name is of no use here'],
    ['create --url https://example.com --event-types all', 'create: expected --name NAME'],
    ["create --name '' --url https://example.com --event-types all", 'create: expected --name NAME'],
    ['create --name x --event-types all', 'create: expected --url URL'],
    ['create --name x --url https://example.com', 'create: expected --event-types TYPES'],
    ['create --name x --url https://example.com --event-types ,', '--event-types: expected at least one event type'],
    ['update whe_1', 'update: expected --name, --url or --event-types'],
    ['list --base-url ftp://example.com', 'expected an http(s) URL as the base URL, got "ftp://example.com"'],
    ['list --base-url example.com', 'expected an http(s) URL as the base URL, got "example.com"'],
    ['list --limit 3', "Unknown option '--limit'"]
  ]
  for (const [argv, message] of wrong) {
    t.same(await ask(server, argv), { code: EXIT.usage, out: '', err: `openai-webhook: ${message} (see --help)\n` }, argv)
  }
  t.same(server.requests, [])
})

t.test('the base URL keeps no password, and is the option\'s before the environment\'s', async t => {
  const server = await OpenAIServer.start(t)
  const { err } = await run('list --base-url https://me:hunter2@example.com/v1', { env: { OPENAI_API_KEY: server.apiKey } })
  t.equal(err, 'openai-webhook: expected a base URL without a user name and password (see --help)\n')
  t.match(await run('list --base-url https://me@example.com', { env: { OPENAI_API_KEY: server.apiKey } }), { code: EXIT.usage })
  t.match(await ask(server, `list --base-url ${server.url}`, { env: { OPENAI_BASE_URL: 'http://127.0.0.1:9/v1' } }), { code: EXIT.ok })
  t.equal(server.requests.length, 1)
})

t.test('the API key has to be one', async t => {
  const told = async (env: Record<string, string>): Promise<Result> => await run('list', { env })
  t.same(await told({}), { code: EXIT.usage, out: '', err: 'openai-webhook: no API key: set OPENAI_API_KEY to a key of the project\n' })
  t.match(await told({ OPENAI_API_KEY: ' ' }), { code: EXIT.usage, err: 'no API key' })
  const secret = await told({ OPENAI_API_KEY: testSecret })
  t.match(secret, { code: EXIT.usage, err: 'OPENAI_API_KEY holds a signing secret (whsec_…), expected an API key (sk-…)' })
  t.notOk(secret.err.includes(testSecret))
  for (const apiKey of ['sk-proj\ntest', 'sk-proj…', 'sk proj']) {
    t.same(await told({ OPENAI_API_KEY: apiKey }), { code: EXIT.usage, out: '', err: 'openai-webhook: OPENAI_API_KEY holds white space or a character that no API key has\n' })
  }
})

t.test('errors of the API are one line with status, code and message', async t => {
  const server = await OpenAIServer.start(t)
  const said = (message: string): Result => ({ code: EXIT.failed, out: '', err: `openai-webhook: ${server.url} answered ${message}\n` })
  const answered = async (status: number, body: object | string, argv = 'create --name x --url https://example.com --event-types batch.failed'): Promise<Result> => {
    server.answers.push({ status, body, headers: { 'content-type': typeof body === 'string' ? 'text/html' : 'application/json' } })
    return await ask(server, argv)
  }

  t.same(await ask(server, 'list', { env: { OPENAI_API_KEY: 'sk-wrong' } }),
    said('401 invalid_api_key: Incorrect API key provided: [API key]. (the API key was refused: see OPENAI_API_KEY)'), 'the key is not printed, though the API quotes it')
  t.same(await ask(server, 'update whe_none --name x'),
    said("404 webhook_endpoint_not_found: No webhook endpoint found with id 'whe_none'. (is the id right, and the API key that of a project that has it and may use this API?)"))
  t.same(await ask(server, 'list', { env: { OPENAI_BASE_URL: server.url.replace('/v1', '') } }), {
    code: EXIT.failed,
    out: '',
    err: `openai-webhook: ${server.url.replace('/v1', '')} answered 404 invalid_request_error: Invalid URL (GET /webhook_endpoints) (is the id right, and the API key that of a project that has it and may use this API?)\n`
  })
  t.same(await answered(403, { error: { message: 'Missing scopes:\n  api.webhooks.write', type: null, param: null, code: null } }), said('403: Missing scopes: api.webhooks.write'))
  const page = await answered(502, `<html>\n\u001b[2J${'x'.repeat(5000)}`)
  t.match(page.err, /answered 502: <html> \?\[2Jx{100,300}\n$/, 'a proxy\'s page is cut')
})

t.test('what changes something is asked once, what reads again', async t => {
  const server = await OpenAIServer.start(t)
  const { id } = server.add()
  const busy = { status: 503, body: { error: { message: 'busy', type: 'server_error', param: null, code: null } }, headers: { 'retry-after-ms': '1' } }
  const writes = ['create --name x --url https://example.com --event-types batch.failed', `update ${id} --name x`, `delete ${id} --yes`, `rotate-secret ${id}`, `test ${id} batch.failed`]
  for (const argv of writes) {
    server.answers.push(busy)
    t.match(await ask(server, argv), { code: EXIT.failed, err: 'answered 503 server_error: busy' }, argv)
  }
  t.equal(server.requests.length, writes.length)
  server.answers.push(busy, busy)
  t.match(await ask(server, 'list'), { code: EXIT.ok, out: id })
  t.equal(server.requests.length, writes.length + 3)
})

t.test('an address that answers, but is not the API, is not believed', async t => {
  const server = await OpenAIServer.start(t)
  const { id } = server.add()
  for (const argv of ['list', 'event-types', 'create --name x --url https://example.com --event-types batch.failed', `rotate-secret ${id}`, `delete ${id} --yes`, `test ${id} batch.failed`]) {
    for (const [type, body] of [['text/html', '<html>Welcome'], ['application/json', argv === 'list' ? '{"object":' : '{"ok":true}']] as const) {
      server.answers.push({ status: 200, body, headers: { 'content-type': type } })
      t.match(await ask(server, argv), { code: EXIT.failed, out: '', err: /^openai-webhook: unexpected answer from http:\S+: .+\n$/ }, `${argv} ${type}`)
    }
  }
  server.answers.push({ status: 200, body: '', headers: { 'content-length': '0' } })
  t.match(await ask(server, `delete ${id} --yes`), { code: EXIT.failed, err: 'expected a webhook_endpoint.deleted' })
})

t.test('an API that cannot be reached is named', async t => {
  const server = await OpenAIServer.start(t)
  const url = `http://127.0.0.1:${await freePort()}/v1`
  const refused = await ask(server, 'create --name x --url https://example.com --event-types batch.failed', { env: { OPENAI_BASE_URL: url } })
  t.same(refused, { code: EXIT.failed, out: '', err: `openai-webhook: cannot reach ${url}: ECONNREFUSED\n` })
})

t.test('an API that leads in a circle is told', async t => {
  const server = await OpenAIServer.start(t)
  server.resources.set('DELETE /v1/webhook_endpoints/whe_1', reply => reply.redirect(`${server.url}/webhook_endpoints/whe_1`, 307))
  t.same(await ask(server, 'delete whe_1 --yes'), { code: EXIT.failed, out: '', err: `openai-webhook: cannot reach ${server.url}: redirect count exceeded\n` })
})

t.test('Ctrl-C ends it', async t => {
  const server = await OpenAIServer.start(t)
  t.same(await ask(server, 'list', { signal: AbortSignal.abort() }), { code: EXIT.failed, out: '', err: 'openai-webhook: interrupted\n' })
})

t.test('the openai package is asked for when it is missing, too old or broken', async t => {
  const told = async (command: Command): Promise<unknown> => {
    const terminal = { out: () => {}, err: () => {}, isTTY: false, env: { OPENAI_API_KEY: 'sk-test' }, signal: new AbortController().signal }
    return await command.run(parse(['list'], command.options), terminal).catch((error: unknown) => error)
  }
  type Load = Parameters<typeof endpointsCommand>[0]
  const missing: Load = async () => { throw Object.assign(new Error('Cannot find package'), { code: 'ERR_MODULE_NOT_FOUND' }) }
  t.same(await told(endpointsCommand(missing)), new CommandError('this command needs the openai package: npm i openai@latest'))
  const broken: Load = async () => { throw new SyntaxError('Unexpected token\nin a file') }
  t.same(await told(endpointsCommand(broken)), new CommandError('the openai package cannot be loaded: SyntaxError: Unexpected token in a file'))
  // openai 6 verifies webhooks; it does not manage their endpoints.
  const old = (async () => ({ OpenAI: class { webhooks = { unwrap () {} } } })) as unknown as Load
  t.same(await told(endpointsCommand(old)), new CommandError('this command needs a newer openai package, one that has webhook endpoints: npm i openai@latest'))
})

t.test('help names every option', async t => {
  const { code, out } = await run('--help')
  t.equal(code, EXIT.ok)
  for (const option of Object.keys(endpoints.options)) t.match(out, `--${option}`)
})

t.test('the bin, in a process of its own', async t => {
  const server = await OpenAIServer.start(t)
  const child = async (script: string, ...argv: string[]): Promise<Result> => {
    const options = { env: { ...env, OPENAI_API_KEY: server.apiKey, OPENAI_BASE_URL: server.url, OPENAI_LOG: 'debug' } }
    return await runProgram([script, 'endpoints', ...argv], options).then(
      ({ stdout, stderr }) => ({ code: 0, out: stdout, err: stderr }),
      (error: { code: number, stdout: string, stderr: string }) => ({ code: error.code, out: error.stdout, err: error.stderr })
    )
  }
  const created = await child(bin, 'create', '--name', 'orders', '--url', 'https://example.com', '--event-types', 'batch.*', '--json')
  t.match(created, { code: EXIT.ok, err: '' }, 'the SDK logs nothing of its own')
  t.match(JSON.parse(created.out), { name: 'orders', event_types: ['batch.completed', 'batch.failed'] })
  t.match(await child(bin, 'list'), { code: EXIT.ok, out: /^whe_\w+ {2}orders\n/, err: '' })
  t.match(await child(bin, 'delete', 'whe_none', '--yes'), { code: EXIT.failed, out: '', err: /^openai-webhook: \S+ answered 404 [^\n]+\n$/ })

  // As installed beside everything but openai.
  const consumer = await mkdtemp(join(tmpdir(), 'endpoints-'))
  t.teardown(() => rm(consumer, { recursive: true }))
  const modules = join(consumer, 'node_modules')
  const installed = join(modules, 'fastify-openai-webhook')
  await mkdir(modules)
  await cp(join(root, 'dist'), join(installed, 'dist'), { recursive: true })
  await cp(join(root, 'package.json'), join(installed, 'package.json'))
  const { dependencies } = JSON.parse(await readFile(join(root, 'package.json'), 'utf8')) as { dependencies: Record<string, string> }
  for (const name of [...Object.keys(dependencies), 'fastify']) {
    await mkdir(join(modules, name, '..'), { recursive: true })
    await symlink(join(root, 'node_modules', name), join(modules, name))
  }
  t.same(await child(join(installed, 'dist/cli/bin.js'), 'list'), { code: EXIT.failed, out: '', err: 'openai-webhook: this command needs the openai package: npm i openai@latest\n' })
})
