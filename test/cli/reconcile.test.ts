import { stripVTControlCharacters } from 'node:util'
import t from 'tap'
import type { Test } from 'tap'
import { parse } from '../../lib/cli/command.ts'
import { reconcile, reconcileCommand } from '../../lib/cli/reconcile.ts'
import { run as runCommand } from '../support/command.ts'
import type { Given, Result } from '../support/command.ts'
import { build, SECRET } from '../support/deliveries.ts'
import { readDocument } from '../support/docs.ts'
import { OpenAIServer } from '../support/openai-server.ts'
import { unixTime } from '../support/time.ts'

const run = async (argv: string, given?: Given): Promise<Result> => await runCommand(['reconcile', ...argv.split(' ').filter(arg => arg !== '')], given)

async function setUp (t: Test, reconciles = true) {
  const now = unixTime()
  const server = await OpenAIServer.start(t, { pageSize: 100 })
  server.lists
    .set('/v1/batches', [60, 120, 5 * 86_400].map((ago, i) => ({ object: 'batch', id: `batch_${i}`, status: 'completed', created_at: now - ago - 100, completed_at: now - ago })))
    .set('/v1/fine_tuning/jobs', [])
    .set('/v1/videos', [])
    .set('/v1/evals/eval_1/runs', [{ object: 'eval.run', id: 'evalrun_1', status: 'failed', created_at: now - 30 }])
  const app = await build(t, { idempotency: { reconcile: reconciles } })
  const ran: string[] = []
  app.openaiWebhook.onAny(event => { ran.push(`${event.type} ${(event.data as { id: string }).id}`) })
  const url = `${await app.listen({ port: 0, host: '127.0.0.1' })}/webhooks/openai`
  const env = { OPENAI_API_KEY: server.apiKey, OPENAI_BASE_URL: server.url, OPENAI_WEBHOOK_SECRET: SECRET }
  /** As it is printed. */
  const time = (ago: number): string => new Date((now - ago) * 1_000).toISOString()
  return { server, app, ran, url, env, time, ask: async (argv: string, given: Given = {}) => await run(argv, { ...given, env: { ...env, ...given.env } }) }
}

const SKIPPED = 'agent.session.*: left out, the API answered 404\n'

t.test('nothing is delivered without --yes, and a second run does nothing', async t => {
  const { ran, url, ask, time } = await setUp(t)
  const dry = await ask(`--since 3d --url ${url} --eval eval_1`)
  t.same(dry, {
    code: 0,
    out: `${time(120)}  batch.completed  batch_1  listed
${time(60)}  batch.completed  batch_0  listed
${time(30)}  eval.run.failed  evalrun_1  listed
3 events, nothing delivered: --yes delivers them; what the receiver has processed it answers as a duplicate
`,
    err: SKIPPED
  })
  t.same(ran, [])
  t.match(await ask('--since 3d'), { code: 0, out: /^2 events, nothing/m }, 'a dry run needs no receiver')
  t.match(await ask('--since 3d --dry-run'), { code: 0, out: /^2 events, nothing/m })

  const first = await ask(`--since 3d --url ${url} --eval eval_1 --yes`)
  t.match(first, { code: 0, out: /3 events: 3 delivered, 0 processed before, 0 failed\n$/, err: SKIPPED })
  t.match(first.out, `${time(60)}  batch.completed  batch_0  delivered\n`)
  t.same(ran.sort(), ['batch.completed batch_0', 'batch.completed batch_1', 'eval.run.failed evalrun_1'])
  t.match(await ask(`--since 3d --url ${url} --eval eval_1 --yes`), { code: 0, out: /3 events: 0 delivered, 3 processed before, 0 failed\n$/ })
  t.equal(ran.length, 3)
})

t.test('types, as lists and several times', async t => {
  const { ask, server } = await setUp(t)
  t.match(await ask('--since 3d --types batch.failed,video.* --types fine_tuning.job.*'), { code: 0, out: '0 events, nothing delivered\n', err: '' })
  t.same(server.calls.map(call => call.split('?')[0]), ['GET /v1/batches', 'GET /v1/fine_tuning/jobs', 'GET /v1/videos'])
  t.match(await ask('--since 3d --types batch.completed --types batch.failed --since 90s'), { out: /^1 event, nothing/m })
})

t.test('as JSON', async t => {
  const { ask, url } = await setUp(t)
  const lines = ({ out }: Result): unknown[] => out.trimEnd().split('\n').map(line => JSON.parse(line))
  t.match(lines(await ask('--since 3d --json', { isTTY: true })), [{ id: 'batch_1', outcome: 'listed' }, { id: 'batch_0' }, { summary: { events: 2, dryRun: true } }])
  const delivered = lines(await ask(`--since 3d --json --yes --url ${url}`, { isTTY: true }))
  t.match(delivered.at(-1), { summary: { events: 2, delivered: 2, duplicates: 0, failed: 0, dryRun: false } })
  t.match(delivered[0], { type: 'batch.completed', webhookId: /^wh_reconciled_/, outcome: 'delivered', status: 200 })
})

t.test('a terminal has a bar, and a line for what fails', async t => {
  const { ask, url, time } = await setUp(t)
  const { out } = await ask(`--since 3d --yes --url ${url}`, { isTTY: true })
  t.match(out, '\rbatch.*: 2 found so far\x1b[K')
  t.match(out, '\r██████████████████████████████ 2/2  batch.completed\x1b[K\r\x1b[K2 events: 2 delivered')
  const failed = await ask(`--since 3d --yes --url ${url}x`, { isTTY: true })
  t.equal(failed.code, 1)
  t.match(stripVTControlCharacters(failed.out), `\r${time(60)}  batch.completed  batch_0  failed 404 FST_ERR_NOT_FOUND\n`.replace(' FST_ERR_NOT_FOUND', ''))
  t.match(failed.out, /2 events: 0 delivered, 0 processed before, 2 failed\n$/)
  t.match((await ask('--since 3d', { isTTY: true })).out, `\r\x1b[K${time(120)}  batch.completed  batch_1  listed\n`)
})

t.test('what the receiver refuses is told, with exit code 1', async t => {
  const { ask, url, time } = await setUp(t)
  const { code, out } = await ask(`--since 3d --yes --url ${url}`, { env: { OPENAI_WEBHOOK_SECRET: `whsec_${Buffer.alloc(32).toString('base64')}` } })
  t.equal(code, 1)
  t.match(out, `${time(60)}  batch.completed  batch_0  failed 401 FST_OPENAI_WEBHOOK_INVALID_SIGNATURE\n`)
  t.match(await ask('--since 3d --yes --url http://127.0.0.1:9'), { code: 1, out: /batch_0 {2}failed (?:ECONNREFUSED|UNREACHABLE)\n/ })
})

t.test('it goes no further back than the receiver remembers', async t => {
  const { ask, server } = await setUp(t)
  t.match(await ask('--since 6d'), { code: 2, err: /--since: expected at most the 75 h that the receiver remembers/ })
  t.same(server.calls, [])
  t.match(await ask('--since 6d --retention 30d'), { code: 0, out: /^3 events/m })
  t.match(await ask('--since 6d --retention long'), { code: 2, err: /--retention: expected a time such as 75h/ })
  t.match(await ask(`--since ${new Date(Date.now() - 3_600_000).toISOString()}`), { code: 0, out: /^2 events/m })
})

t.test('wrong usage is told before anything is asked', async t => {
  const { ask, server, env } = await setUp(t)
  for (const [argv, said] of [
    ['', 'missing --since'], ['--since soon', '--since: expected how long ago'], ['--since 3d --yes', 'missing --url'], ['--since 3d --yes --dry-run', 'expected --yes or --dry-run, got both'], ['--since 3d --url ftp://x', '--url: expected an address'],
    ['now --since 3d', 'expected options alone, got "now"'], ['--since 3d --types response.*', 'it has no list for "response.*"'], ['--since 3d --types eval.run.*', /^openai-webhook: expected evals to be/],
    ['--since 3d --timeout x', '--timeout'], ['--sinse 3d', 'did you mean']
  ] as ReadonlyArray<[string, string | RegExp]>) {
    const { code, out, err } = await ask(argv)
    t.same({ code, out }, { code: 2, out: '' }, argv)
    t.match(err, said)
  }
  t.match(await run('--since 3d', { env: { ...env, OPENAI_API_KEY: '' } }), { code: 2, err: 'no API key' })
  t.match(await run('--since 3d --yes --url http://127.0.0.1:1', { env: { ...env, OPENAI_WEBHOOK_SECRET: '' } }), { code: 1, err: 'no signing secret' })
  t.same(server.calls, [])
  t.match(await run('--help'), { code: 0, out: /^Usage: openai-webhook reconcile / })
})

t.test('what the API refuses is told without the key; what is no API\'s is told', async t => {
  const { ask, server } = await setUp(t)
  const refused = await ask('--since 3d', { env: { OPENAI_API_KEY: 'sk-proj-wrong' } })
  t.match(refused, { code: 1, err: /answered 401 invalid_api_key: Incorrect API key provided: \[API key\]\./ })
  server.resources.set('GET /v1/batches?limit=100', '<html>')
  t.match(await ask('--since 3d', { isTTY: true }), { code: 1, out: '\r\x1b[K', err: /GET \/batches was answered with something else/ })
})

t.test('it can be interrupted', async t => {
  const { ask, server } = await setUp(t)
  const abort = new AbortController()
  server.resources.set('GET /v1/batches?limit=100', reply => {
    reply.hijack()
    abort.abort()
  })
  t.match(await ask('--since 3d', { signal: abort.signal }), { code: 1, err: 'openai-webhook: interrupted\n' })
})

t.test('help and docs/cli.md name every option', async t => {
  const section = readDocument('docs/cli.md').text.split(/^## /m).find(text => text.startsWith('reconcile\n'))!
  const rows = section.split('\n').filter(line => line.startsWith('|'))
  for (const option of Object.keys(reconcile.options)) {
    t.match(reconcile.help, new RegExp(`^  --${option} `, 'm'), `--help: --${option}`)
    t.ok(rows.some(row => row.includes(`\`--${option} `) || row.includes(`\`--${option}\``)), `docs/cli.md: --${option}`)
  }
  t.notOk(reconcile.help.split('\n').some(line => line.length > 125), 'fits a terminal')
})

t.test('without the openai package it says what to install', async t => {
  const command = reconcileCommand(async () => { throw Object.assign(new Error('no'), { code: 'ERR_MODULE_NOT_FOUND' }) })
  const terminal = { out () {}, err () {}, isTTY: false, env: { OPENAI_API_KEY: 'sk-1' }, signal: new AbortController().signal }
  await t.rejects(command.run(parse(['--since', '3d'], command.options), terminal), { message: /npm i openai/ })
})
