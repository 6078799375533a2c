import { createServer } from 'node:http'
import type { IncomingMessage, RequestListener, ServerResponse } from 'node:http'
import { createServer as createSecureServer } from 'node:https'
import { createServer as createSocketServer } from 'node:net'
import type { AddressInfo, Server, Socket } from 'node:net'
import { closeSync, existsSync, openSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { execFileSync } from 'node:child_process'
import { once } from 'node:events'
import type { FastifyInstance } from 'fastify'
import Database from 'libsql'
import t from 'tap'
import type { Test } from 'tap'
import { listen as listenCommand } from '../../lib/cli/listen.ts'
import { main } from '../../lib/cli/main.ts'
import { replay } from '../../lib/cli/replay.ts'
import { formatSaved, header, parseSaved } from '../../lib/cli/saved.ts'
import { trigger } from '../../lib/cli/trigger.ts'
import { background, guideEvents } from '../../lib/index.ts'
import type { OpenAIWebhookOptions } from '../../lib/index.ts'
import { durable } from '../../lib/sqlite/index.ts'
import { sampleTypes, sign } from '../../lib/testing/index.ts'
import { launch, launchSource, runSource, start } from '../support/command.ts'
import type { Session } from '../support/command.ts'
import { build, SECRET, thin } from '../support/deliveries.ts'
import { readDocument } from '../support/docs.ts'
import { until } from '../support/faults.ts'
import { TLS } from '../support/tls.ts'
import { CHUNKED, chunk, head, LAST_CHUNK, listen, request, Wire } from '../support/wire.ts'

const CODE = 'FST_OPENAI_WEBHOOK_'
const env = { OPENAI_WEBHOOK_SECRET: SECRET }

/** A real receiver on a socket; what it got, by event type. */
async function receiver (t: Test, options: OpenAIWebhookOptions = {}, prepare: (app: FastifyInstance) => void = () => {}): Promise<{ url: string, got: string[], app: FastifyInstance }> {
  const app = await build(t, { events: guideEvents, ...options })
  const got: string[] = []
  app.openaiWebhook.onAny(event => { got.push(event.type) })
  prepare(app)
  return { url: `http://127.0.0.1:${await listen(app)}/webhooks/openai`, got, app }
}

async function opened (t: Test, server: Server): Promise<number> {
  const sockets = new Set<Socket>()
  server.on('connection', (socket: Socket) => {
    sockets.add(socket)
    socket.on('error', () => {})
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(async () => {
    for (const socket of sockets) socket.destroy()
    server.close()
    await once(server, 'close')
  })
  return (server.address() as AddressInfo).port
}

/** Any HTTP server, for what a receiver may do. */
async function answering (t: Test, listener: RequestListener): Promise<string> {
  return `http://127.0.0.1:${await opened(t, createServer(listener))}/hook`
}

async function bytesOf (message: IncomingMessage): Promise<Buffer> {
  return Buffer.concat(await message.toArray() as Buffer[])
}

/** One that nobody listens on. */
async function refusing (t: Test): Promise<string> {
  const server = createSocketServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  server.close()
  await once(server, 'close')
  return `http://127.0.0.1:${port}/hook`
}

/** In a terminal's words: the exit code, then what was written. */
async function run (t: Test, argv: readonly string[], options?: Parameters<typeof start>[2]): Promise<{ code: number | null, out: string, err: string }> {
  const session = start(t, argv, { env, ...options })
  return { code: await session.ended, out: session.out, err: session.err }
}

const jsonLines = (text: string): Array<Record<string, unknown>> => text.trimEnd().split('\n').map(line => JSON.parse(line) as Record<string, unknown>)

// The program

t.test('without a command, or asked for help, it tells what there is', async t => {
  const usage = await run(t, [])
  t.same([usage.code, usage.out], [2, ''])
  for (const name of ['trigger', 'listen', 'replay', 'diagnose', 'endpoints']) t.match(usage.err, new RegExp(`^  ${name} +\\w.+$`, 'm'))
  for (const word of ['--help', '-h', 'help']) t.same(await run(t, [word]), { code: 0, out: usage.err, err: '' })
})

t.test('each command has a help of its own, with an example', async t => {
  for (const name of ['trigger', 'listen', 'replay', 'diagnose', 'endpoints']) {
    const help = await run(t, [name, '--help'])
    t.same([help.code, help.err], [0, ''])
    t.match(help.out, new RegExp(`^Usage: openai-webhook ${name}[^]+openai-webhook ${name}`))
    t.match(help.out, '--json')
    t.notOk(help.out.split('\n').some(line => line.length > 125), 'fits a terminal')
    t.same(await run(t, ['help', name]), help)
    t.same(await run(t, [name, '-h']), help)
  }
})

t.test('help and docs/cli.md name every option', async t => {
  const sections = readDocument('docs/cli.md').text.split(/^## /m)
  for (const command of [trigger, listenCommand, replay]) {
    const name = /openai-webhook (\w+)/.exec(command.help)![1]!
    const rows = sections.find(text => text.startsWith(`${name}\n`))!.split('\n').filter(line => line.startsWith('|'))
    for (const option of Object.keys(command.options)) {
      t.match(command.help, new RegExp(`^  --${option} `, 'm'), `${name} --help: --${option}`)
      t.ok(rows.some(row => row.includes(`\`--${option} `) || row.includes(`\`--${option}\``)), `docs/cli.md ${name}: --${option}`)
    }
  }
})

t.test('tells its version', async t => {
  const { version } = JSON.parse(readFileSync('package.json', 'utf8')) as { version: string }
  for (const word of ['--version', '-v']) t.same(await run(t, [word]), { code: 0, out: `${version}\n`, err: '' })
})

t.test('output that cannot be written is a failure, and said', { skip: existsSync('/dev/full') ? false : 'needs /dev/full, which this system has not' }, async t => {
  const full = openSync('/dev/full', 'w')
  t.teardown(() => closeSync(full))
  t.match(runSource(['--version'], full), { status: 1, stderr: 'openai-webhook: cannot write the output: ENOSPC\n' })
})

t.test('wrong usage is one line on stderr and exit code 2', async t => {
  const to = ['--url', 'http://127.0.0.1:9/hook']
  const wrong: Array<[argv: string[], told: string]> = [
    [['triger'], 'unknown command "triger", did you mean "trigger"? (see --help)'],
    [['constructor'], 'unknown command "constructor" (see --help)'],
    [['help', 'lisen'], 'unknown command "lisen", did you mean "listen"? (see --help)'],
    [['trigger', 'all', '--ulr', 'x'], 'Unknown option \'--ulr\', did you mean "--url"? (see --help)'],
    [['trigger', 'all', '--secret', 'a', '--secret-file', 'b', ...to], '--secret and --secret-file both say the secret: give one of them (see --help)'],
    [['trigger', 'all', '--zzzzzzzz'], 'Unknown option \'--zzzzzzzz\' (see --help)'],
    [['trigger', 'all', '--url'], 'Option \'--url <value>\' argument missing (see --help)'],
    [['trigger', 'all', '--url', '--json'], 'Option \'--url\' argument is ambiguous. (see --help)'],
    [['trigger', 'all', '--queued', ...to], '--queued says what is right for the second delivery of --duplicate (see --help)'],
    [['trigger', '--url', 'http://127.0.0.1:9'], 'missing an event type, such as batch.completed, \'batch.*\' or all (see --help)'],
    [['trigger', 'batch.faild', ...to], 'unknown event type "batch.faild", did you mean "batch.failed"? (see --help)'],
    [['trigger', 'bach.*', ...to], 'unknown event type "bach.*", did you mean "batch.*"? (see --help)'],
    [['trigger', 'nothing.like.it', ...to], 'unknown event type "nothing.like.it" (see --help)'],
    [['trigger', 'fine_tuning.job.completed', ...to], 'unknown event type "fine_tuning.job.completed", expected one of fine_tuning.job.cancelled, fine_tuning.job.failed, fine_tuning.job.succeeded (see --help)'],
    [['trigger', 'all', '--url', '127.0.0.1:3000'], '--url: expected an address such as http://127.0.0.1:3000/webhooks/openai, got "127.0.0.1:3000" (see --help)'],
    [['trigger', 'all', '--url', 'ftp://localhost/'], '--url: expected an address such as http://127.0.0.1:3000/webhooks/openai, got "ftp://localhost/" (see --help)'],
    [['trigger', 'all', '--url', 'http://me:pass@localhost/'], '--url: expected an address without user name and password (see --help)'],
    [['trigger', 'all', '--count', '0', ...to], '--count: expected a whole number, 1 or more, got "0" (see --help)'],
    [['trigger', 'all', '--count', '1e3', ...to], '--count: expected a whole number, 1 or more, got "1e3" (see --help)'],
    [['trigger', 'all', '--rate', '0.5', ...to], '--rate: expected a whole number, 1 or more, got "0.5" (see --help)'],
    [['trigger', 'all', '--timeout', '2147483648', ...to], '--timeout: expected at most 2147483647 ms, got 2147483648 (see --help)'],
    [['trigger', 'all', '--data', 'data.id', ...to], '--data: expected PATH=VALUE such as data.id=batch_1, got "data.id" (see --help)'],
    [['trigger', 'all', '--data', 'data.list.0=a', '--data', 'data.list.foo=b', ...to], '--data: expected an index of an array, 0 to 1, got "foo" (see --help)'],
    [['trigger', 'all', '--data', 'data.list.0=a', '--data', 'data.list.4294967294.b=c', ...to], '--data: expected an index of an array, 0 to 1, got "4294967294" (see --help)'],
    [['trigger', 'all', '--data', '=1', ...to], '--data: expected PATH=VALUE such as data.id=batch_1, got "=1" (see --help)'],
    [['trigger', 'all', '--data', 'data..id=1', ...to], '--data: expected PATH=VALUE such as data.id=batch_1, got "data..id=1" (see --help)'],
    [['trigger', 'batch.failed', '--data', 'data.id.x=1', ...to], '--data: data.id of batch.failed is not an object, so it has no x (see --help)'],
    [['replay', ...to], 'missing a FILE to send (see --help)'],
    [['replay', 'x.http'], 'missing --url, the address to deliver to (see --help)'],
    [['listen', '3000'], 'unexpected argument "3000" (see --help)'],
    [['listen', '--port', '65536'], '--port: expected at most 65535, got 65536 (see --help)'],
    [['listen', '--port', 'http'], '--port: expected a whole number, 0 or more, got "http" (see --help)'],
    [['listen', '--path', 'hook'], '--path: expected a path such as /webhooks/openai, got "hook" (see --help)'],
    [['listen', '--path', '/:id'], '--path: expected a path such as /webhooks/openai, got "/:id" (see --help)'],
    [['listen', '--forward-to', 'x'], '--forward-to: expected an address such as http://127.0.0.1:3000/webhooks/openai, got "x" (see --help)']
  ]
  for (const [argv, told] of wrong) t.same(await run(t, argv), { code: 2, out: '', err: `openai-webhook: ${told}\n` }, argv.join(' '))
})

t.test('what cannot be done is one line on stderr and exit code 1', async t => {
  const dir = t.testdir({
    file: 'not a delivery',
    'no-end.http': 'webhook-id: wh_1\n',
    'no-id.http': 'content-type: application/json\n\n{}',
    'odd.http': 'webhook-id: a\u0000b\n\n{}',
    'secret.txt': 'sk-proj-1\r\n'
  })
  const at = (name: string): string => join(dir, name)
  const url = await refusing(t)
  const failing: Array<[argv: string[], told: string, env?: Record<string, string>]> = [
    [['trigger', 'all', '--url', url], `cannot deliver to ${url}: the connection was refused; is the receiver running?`],
    [['trigger', 'all', '--url', url, '--rate', '1000'], `cannot deliver to ${url}: the connection was refused; is the receiver running?`],
    [['trigger', 'all', '--url', url], 'no signing secret: set OPENAI_WEBHOOK_SECRET or give --secret-file FILE', {}],
    [['trigger', 'all', '--url', url], 'no signing secret: set OPENAI_WEBHOOK_SECRET or give --secret-file FILE', { OPENAI_WEBHOOK_SECRET: '' }],
    [['trigger', 'all', '--url', url, '--secret-file', at('none')], `cannot read ${at('none')}: ENOENT`],
    [['trigger', 'all', '--url', url, '--secret-file', at('secret.txt')],
      'expected the endpoint\'s signing secret (whsec_…), got an API key (sk-…): copy the secret shown when the webhook endpoint was created'],
    [['replay', at('no-id.http'), '--resign', '--url', url, '--secret', 'whsec_%'],
      'expected base64 after "whsec_" in the signing secret, got other characters, a cut or nothing: copy it again whole'],
    [['listen'], 'the signing secret begins or ends with white space or a quote: remove it where the secret is set', { OPENAI_WEBHOOK_SECRET: '"whsec_AAAA"' }],
    [['replay', at('none'), '--url', url], `cannot read ${at('none')}: ENOENT`],
    [['replay', dir, '--url', url], `cannot read ${dir}: EISDIR`],
    [['replay', '/dev/zero', '--url', url], 'cannot read /dev/zero: expected at most 64 MiB'],
    [['replay', at('file'), '--url', url], `${at('file')}: not a saved delivery: no empty line ends its headers`],
    [['replay', at('no-end.http'), '--url', url], `${at('no-end.http')}: not a saved delivery: no empty line ends its headers`],
    [['replay', at('odd.http'), '--url', url], `cannot deliver to ${url}: Invalid character in header content ["webhook-id"]`],
    [['listen', '--save', join(at('file'), 'x')], `cannot make the directory ${join(at('file'), 'x')}: ENOTDIR`],
    [['listen', '--port', '0', '--host', '192.0.2.1'], 'cannot listen on port 0 of 192.0.2.1: listen EADDRNOTAVAIL: address not available 192.0.2.1']
  ]
  for (const [argv, told, given = env] of failing) {
    const { code, err } = await run(t, argv, { env: given })
    t.same([code, err], [1, `openai-webhook: ${told}\n`], argv.join(' '))
  }
})

t.test('even what was not foreseen is one line', async t => {
  let told = ''
  const code = await main(['--version'], {
    out () { throw new RangeError('no room') },
    err (text) { told += text },
    isTTY: false,
    env: {},
    signal: new AbortController().signal
  })
  t.same([code, told], [1, 'openai-webhook: unexpected: RangeError: no room\n'])
})

t.test('a secret that is not of the usual form is told, and not shown', async t => {
  const secret = 'some text of one\'s own'
  const { url } = await receiver(t, { secret })
  const file = join(t.testdir({ secret: `${secret}\n` }), 'secret')
  for (const [argv, given] of [[['--secret-file', file], {}], [['--secret', secret], {}], [[], { OPENAI_WEBHOOK_SECRET: secret }]] as const) {
    const { code, out, err } = await run(t, ['trigger', 'batch.failed', '--url', url, ...argv], { env: given })
    t.equal(code, 0)
    t.equal(err, 'openai-webhook: a signing secret does not begin with "whsec_": its UTF-8 bytes are used as the key, as OpenAI\'s SDKs do; if it is OpenAI\'s, copy it again whole\n')
    t.notMatch(out + err, secret)
  }
})

// trigger

t.test('trigger all delivers every type to a real receiver', async t => {
  const { url, got } = await receiver(t)
  const session = launch(t, ['trigger', 'all', '--url', url], { env })
  t.equal(await session.ended, 0, session.err)
  t.equal(session.err, '')
  const lines = session.out.trimEnd().split('\n')
  t.equal(lines.length, sampleTypes.length + 1)
  for (const [i, type] of sampleTypes.entries()) t.match(lines[i], new RegExp(`^${type} +200  received  \\d+\\.\\d ms$`))
  t.match(lines.at(-1), /^39 deliveries in \d+\.\d\d s: 39 × 200, p50 \d+\.\d ms, p99 \d+\.\d ms$/)
  t.same(got, sampleTypes)
})

t.test('trigger takes families and types, each once', async t => {
  const { url, got } = await receiver(t)
  t.equal((await run(t, ['trigger', 'video.*', 'eval.run.failed', 'video.failed', '--url', url])).code, 0)
  t.same(got, ['video.completed', 'video.failed', 'eval.run.failed'])
})

t.test('trigger tells of a resource of its own with each delivery', async t => {
  const { url } = await receiver(t, { idempotency: { reconcile: true } })
  const { code, out } = await run(t, ['trigger', 'batch.completed', 'video.failed', 'fine_tuning.job.succeeded', '--count', '3', '--url', url])
  t.equal(code, 0)
  t.same(out.match(/received|duplicate/g), Array(9).fill('received'))
})

t.test('trigger --json is an object a line, and a summary', async t => {
  const { url } = await receiver(t)
  const { code, out } = await run(t, ['trigger', 'video.*', '--url', url, '--json'], { isTTY: true })
  t.equal(code, 0)
  const [first, second, last] = jsonLines(out)
  t.match(first, { type: 'video.completed', webhookId: /^wh_/, status: 200, code: null, duplicate: false, ms: Number })
  t.match(second, { type: 'video.failed' })
  t.match(last, { summary: { deliveries: 2, answers: { 200: 2 }, p50: Number, p99: Number, seconds: Number } })
})

t.test('trigger --data sets fields of the event', async t => {
  const bodies: Array<Record<string, unknown>> = []
  const url = await answering(t, (request, response) => {
    bytesOf(request).then(bytes => {
      bodies.push(JSON.parse(bytes.toString()) as Record<string, unknown>)
      response.end('{}')
    })
  })
  const data = ['data.id=batch_1', 'data.request_counts.failed=7', 'data.errors=["a",{"b":null}]', 'data.errors.1.b=x=y\n', 'data.note=', 'data.list.0.a=7', 'data.list.1=b', 'data.metadata.12=c', 'id="1"', 'data.__proto__.x=true']
  t.equal((await run(t, ['trigger', 'batch.in_progress', '--url', url, ...data.flatMap(each => ['--data', each])])).code, 0)
  const [event] = bodies
  t.match(event, { id: '1', type: 'batch.in_progress', data: { id: 'batch_1', request_counts: { total: Number, failed: 7 }, errors: ['a', { b: 'x=y\n' }], note: '', list: [{ a: 7 }, 'b'], metadata: { 12: 'c' } } })
  const sent = event!['data'] as object
  t.ok(Object.hasOwn(sent, '__proto__'), 'as any other name')
  t.notOk('x' in {}, 'nothing here has changed')
  t.equal((await run(t, ['trigger', 'all', '--url', url, '--data', 'data={"id":"1"}'])).code, 0)
  t.same(bodies.at(-1)!['data'], { id: '1' }, 'objects are replaced')
})

t.test('trigger --duplicate delivers each again, which must be taken for what it is', async t => {
  const { url, got } = await receiver(t)
  const right = await run(t, ['trigger', 'video.*', '--duplicate', '--count', '2', '--url', url])
  t.equal(right.code, 0)
  t.same(right.out.match(/received|duplicate/g), Array(4).fill(['received', 'duplicate']).flat())
  t.match(right.out, '8 × 200,')
  t.same(got, ['video.completed', 'video.failed', 'video.completed', 'video.failed'])

  const { url: forgetful } = await receiver(t, { idempotency: false })
  const wrong = await run(t, ['trigger', 'video.failed', '--duplicate', '--url', forgetful])
  t.equal(wrong.code, 1)
  t.match(wrong.out, /^video\.failed {2}200 {2}received {2}.+\nvideo\.failed {2}200 {2}received, expected duplicate {2}.+\n2 deliveries .+: 1 × 200, 1 × 200 received, expected duplicate,/)
  t.match(wrong.err, /^the receiver took the second for a new delivery: .*\(then give --queued\)\n$/)
  const queued = await run(t, ['trigger', 'video.failed', '--duplicate', '--queued', '--url', forgetful])
  t.same([queued.code, queued.err], [0, ''])
  t.match(queued.out, '2 × 200,')
})

t.test('trigger --duplicate is right about every runner of the package that queues', async t => {
  for (const runner of [background(), durable(new Database(':memory:'))]) {
    const { url } = await receiver(t, { runner })
    const right = await run(t, ['trigger', 'all', '--duplicate', '--url', url])
    t.equal(right.code, 0, right.out)
  }
})

t.test('trigger names what was not answered 200, and ends with 1', async t => {
  const { url, app } = await receiver(t, { secret: `whsec_${Buffer.from('another').toString('base64')}` })
  const refused = await run(t, ['trigger', 'video.*', '--url', url])
  t.equal(refused.code, 1)
  t.match(refused.out, /^video\.failed +401 {2}FST_OPENAI_WEBHOOK_INVALID_SIGNATURE {2}/m)
  t.match(refused.out, /: 2 × 401 FST_OPENAI_WEBHOOK_INVALID_SIGNATURE, p50/)
  const lost = await run(t, ['trigger', 'batch.failed', '--url', `${url}/elsewhere`])
  t.match(lost, { code: 1, err: /^the app has no POST route at that path: the plugin's own is its `path` \(\/webhooks\/openai\)/ })
  t.equal(refused.err, 'the receiver has another signing secret than this command: start both with the same OPENAI_WEBHOOK_SECRET, or give the receiver\'s by --secret-file FILE\n')
  t.match(jsonLines((await run(t, ['trigger', 'video.failed', '--json', '--url', url])).out), [{ status: 401, code: `${CODE}INVALID_SIGNATURE` }, {}])

  const nowhere = await run(t, ['trigger', 'video.failed', '--url', `${url}/x`])
  t.match(nowhere.out, /404 {2}Not Found {2}/, 'an answer without a code')
  await app.close()

  const odd = await answering(t, (_request, response) => { response.writeHead(299).end('{"code":"\\u001b[31mred\\nline"}') })
  t.match((await run(t, ['trigger', 'video.failed', '--url', odd])).out, '299  ?[31mred?line  ', 'a receiver cannot steer the terminal')
  const unknown = await answering(t, (_request, response) => { response.writeHead(299).end('null') })
  t.match((await run(t, ['trigger', 'video.failed', '--url', unknown])).out, /^video\.failed {2}299 {4}\d.+\n1 delivery in .+: 1 × 299, p50/)
})

t.test('trigger does not follow a redirect, as OpenAI does not', async t => {
  let requests = 0
  const url = await answering(t, (_request, response) => {
    requests++
    response.writeHead(307, { location: '/elsewhere' }).end()
  })
  t.match(await run(t, ['trigger', 'video.failed', '--url', url]), { code: 1, out: '307  Temporary Redirect' })
  t.equal(requests, 1)
})

t.test('trigger goes on past a receiver that breaks off, is silent or does not speak HTTP', async t => {
  const breaks = async (answer: (socket: Socket) => void): Promise<string> => {
    const port = await opened(t, createSocketServer(socket => { socket.once('data', () => answer(socket)) }))
    return `http://127.0.0.1:${port}/hook`
  }
  const partly = 'HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n{}'
  const receivers: Array<[url: string, code: string]> = [
    [await breaks(socket => socket.destroy()), 'ECONNRESET'],
    [await breaks(socket => socket.end(partly)), 'ECONNRESET'],
    [await breaks(socket => socket.end('SSH-2.0-OpenSSH\r\n\r\n')), 'HPE_INVALID_CONSTANT'],
    [await breaks(() => {}), 'TIMEOUT'],
    [await breaks(socket => socket.write(partly)), 'TIMEOUT']
  ]
  for (const [url, code] of receivers) {
    const patience = code === 'TIMEOUT' ? ['--timeout', '60'] : []
    const { code: exit, out, err } = await run(t, ['trigger', 'video.*', '--url', url, ...patience])
    t.same([exit, err], [1, ''], code)
    t.match(out, new RegExp(`^video\\.completed  ---  ${code}  .+\nvideo\\.failed     ---  ${code}  .+\n2 deliveries in \\S+ s: 2 × ${code}\n$`))
  }
  const { out } = await run(t, ['trigger', 'video.failed', '--json', '--url', receivers[0]![0]])
  t.match(jsonLines(out), [{ status: null, code: 'ECONNRESET' }, { summary: { p50: null, p99: null } }])
  const switches = await breaks(socket => socket.write('HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n'))
  t.match(await run(t, ['trigger', 'video.failed', '--url', switches]), { code: 1, out: /^video\.failed {2}101 /, err: '' })
})

t.test('trigger delivers over a new connection when the receiver has closed the one that was open', async t => {
  let connections = 0
  const port = await opened(t, createSocketServer(socket => {
    connections++
    socket.once('data', () => {
      socket.write('HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}')
      socket.once('data', () => socket.destroy())
    })
  }))
  t.match(await run(t, ['trigger', 'video.failed', '--count', '3', '--url', `http://127.0.0.1:${port}/`]), { code: 0, out: '3 × 200' })
  t.equal(connections, 3)
})

t.test('trigger reads no more of an answer than it needs', async t => {
  const url = await answering(t, (_request, response) => {
    const more = (): void => { while (response.write(Buffer.alloc(65_536, ' '))); }
    response.on('drain', more)
    more()
  })
  t.match(await run(t, ['trigger', 'video.failed', '--url', url]), { code: 0, out: '1 × 200' })
})

t.test('trigger speaks https, with a certificate that it trusts', async t => {
  const port = await opened(t, createSecureServer(TLS, (_request, response) => { response.end('{}') }))
  const argv = ['trigger', 'video.failed', '--url', `https://127.0.0.1:${port}/hook`]
  t.match(await run(t, argv), { code: 1, out: '', err: `openai-webhook: cannot deliver to https://127.0.0.1:${port}/hook: self-signed certificate` })
  const file = join(t.testdir({ 'cert.pem': TLS.cert }), 'cert.pem')
  const session = launch(t, argv, { env: { ...env, NODE_EXTRA_CA_CERTS: file } })
  t.equal(await session.ended, 0, session.err)

  const plain = (await receiver(t)).url.replace('http:', 'https:')
  t.match(await run(t, ['trigger', 'video.failed', '--url', plain]), { code: 1, err: `openai-webhook: cannot deliver to ${plain}: it does not speak https\n` })
})

t.test('trigger shows a bar in place of many lines, on a terminal', async t => {
  const { url } = await receiver(t, {}, app => { app.openaiWebhook.on('video.failed', () => { throw new Error('no') }) })
  const argv = ['trigger', 'video.*', '--count', '11', '--url', url]
  const { code, out } = await run(t, argv, { isTTY: true })
  t.equal(code, 1)
  const frames = out.split('\r')
  t.equal(frames.length, 23)
  t.equal(frames[1], `${'█'.repeat(1)}${'░'.repeat(29)} 1/22  \x1b[32m1 × 200\x1b[39m\x1b[K`)
  t.match(frames[22], `${'█'.repeat(30)} 22/22  \x1b[32m11 × 200\x1b[39m, \x1b[31m11 × 500 ${CODE}HANDLER_FAILED\x1b[39m\x1b[K\n22 deliveries in `)

  const piped = await run(t, argv)
  t.notOk(['\r', '\x1b'].some(steering => piped.out.includes(steering)), 'neither colour nor bar elsewhere')
  t.equal(piped.out.split('\n').length, 24)
  t.match((await run(t, ['trigger', 'video.completed', '--url', url], { isTTY: true })).out, '  \x1b[32m200\x1b[39m  received  \x1b[2m', 'colour, and no bar for a few')
})

t.test('trigger --rate starts deliveries on time, whatever the answers take', async t => {
  const held: ServerResponse[] = []
  const url = await answering(t, (_request, response) => {
    held.push(response)
    if (held.length === 3) for (const each of held) each.end('{}')
  })
  t.match(await run(t, ['trigger', 'video.failed', '--count', '3', '--rate', '50', '--url', url]), { code: 0, out: '3 × 200' }, 'none is answered before the third has come')
})

t.test('trigger --rate has a bounded number on their way', async t => {
  let now = 0
  let most = 0
  const url = await answering(t, (_request, response) => {
    most = Math.max(most, ++now)
    setImmediate(() => {
      now--
      response.end('{}')
    })
  })
  const session = launch(t, ['trigger', 'video.failed', '--count', '300', '--rate', '1000000', '--url', url], { env })
  t.equal(await session.ended, 0)
  t.match(session.out, '300 × 200')
  t.equal(session.err, '', 'no warning of listeners that pile up')
  t.ok(most <= 256, `${most} at once`)
  t.match(await run(t, ['trigger', 'video.failed', '--count', '300', '--rate', '1000000', '--url', url]), { code: 0, out: '300 × 200' })
})

t.test('Ctrl-C ends trigger, with the summary of what was answered', async t => {
  for (const rate of [[], ['--rate', '1']]) {
    let requests = 0
    let arrived = (): void => {}
    const secondArrived = new Promise<void>(resolve => { arrived = resolve })
    const url = await answering(t, (_request, response) => {
      if (++requests === 1) response.end('{}')
      else arrived()
    })
    const session = start(t, ['trigger', 'video.failed', '--count', '9', '--url', url, ...rate], { env })
    await (rate.length === 0 ? secondArrived : session.shows(/received/))
    session.interrupt()
    t.equal(await session.ended, 1)
    t.match(session.out, /\n1 delivery in .+: 1 × 200/)
    t.equal(session.err, 'openai-webhook: interrupted\n')
  }
})

// The saved form

t.test('a saved delivery is read back byte for byte', async t => {
  const saved = {
    headers: [['Webhook-Id', 'wh_1'], ['x-odd', 'a: b'], ['x-latin', 'caf\xe9'], ['x-empty', ''], ['X-Odd', 'again']] as Array<[string, string]>,
    body: Buffer.from([0x0d, 0x0a, 0x0d, 0x0a, 0xff, 0x00, 0xe2, 0x98, 0x8e, 0x0a])
  }
  const bytes = formatSaved(saved)
  t.equal(bytes.toString('latin1'), 'Webhook-Id: wh_1\nx-odd: a: b\nx-latin: caf\xe9\nx-empty: \nX-Odd: again\n\n\r\n\r\n\xff\0\xe2\x98\x8e\n')
  t.same(parseSaved(bytes), saved)
  t.same(parseSaved(formatSaved({ headers: [], body: Buffer.alloc(0) })), { headers: [], body: Buffer.alloc(0) })
  t.equal(header(saved, 'webhook-id'), 'wh_1')
  t.equal(header(saved, 'x-odd'), 'a: b')
  t.equal(header(saved, 'webhook-signature'), undefined)
})

t.test('a request copied off the wire is one too', async t => {
  const body = Buffer.from('{"a":\r\n1}\n')
  const wire = Buffer.concat([Buffer.from('POST /hook HTTP/1.1\r\nWebhook-Id:wh_1\r\nX-A:  b \t\r\n\r\n'), body])
  t.same(parseSaved(wire), { headers: [['Webhook-Id', 'wh_1'], ['X-A', 'b']], body })
  t.throws(() => parseSaved(Buffer.from('a: 1\nPOST / HTTP/1.1\n\n')), { message: 'not a saved delivery: line 2 is not "Name: value"' })
  t.throws(() => parseSaved(Buffer.from('{\n"a": 1\n}\n\n')), { message: 'not a saved delivery: line 1 is not "Name: value"' })
})

// listen and replay

/** `listen` on a free port; resolves to where. */
async function listening (session: Session): Promise<{ url: string, port: number }> {
  const [, url, port] = await session.shows(/^listening on (http:\S+:(\d+)\S*)$/m)
  return { url: url!, port: Number(port) }
}

const savedIn = (dir: string): string[] => readdirSync(dir).sort().map(name => join(dir, name))

t.test('listen, trigger, save and replay: the round trip is byte for byte', async t => {
  const dir = join(t.testdir(), 'deep', 'saved')
  const listener = launch(t, ['listen', '--port', '0', '--save', dir], { env })
  const { url, port } = await listening(listener)
  const sent = launch(t, ['trigger', 'batch.completed', '--duplicate', '--url', url], { env })
  t.equal(await sent.ended, 0)

  // A body that any rewriting would change, with headers that any tidying would.
  const body = Buffer.from('{\r\n"type" : "batch.failed", "id":"evt_1","created_at":1.0, "data":{"id":"\\u00e9\u2028☎"},\t"a":1,"a":2 }\r\n')
  const signed = sign(body, { secret: SECRET, webhookId: 'wh_odd' })
  const lines: Array<[string, string]> = [
    ['X-Custom', 'caf\xe9'],
    ['Content-Type', 'application/json; charset=utf-8'],
    ['WEBHOOK-ID', 'wh_odd'],
    ['x-custom', 'again'],
    ['Webhook-Timestamp', signed['webhook-timestamp']],
    ['webhook-signature', signed['webhook-signature']]
  ]
  const wire = await Wire.open(t, port)
  await wire.write(request(lines, body))
  t.match(await wire.answer(), { status: 200, body: '{"received":true}' })
  await listener.shows(/wh_odd +200 received/)

  const files = savedIn(dir)
  t.equal(files.length, 3)
  const file = files[2]!
  t.match(file, /[/\\]\d{8}T\d{6}\.\d{3}Z-wh_odd\.http$/)
  const saved = parseSaved(readFileSync(file))
  t.same(saved.body, body)
  t.same(saved.headers, [['host', 'localhost'], ...lines, ['content-length', String(body.length)]])
  t.equal(statSync(file).mode & 0o077, 0, 'for nobody else to read')

  const got: Array<{ rawHeaders: string[], body: Buffer }> = []
  const collector = await answering(t, (request, response) => {
    bytesOf(request).then(bytes => {
      got.push({ rawHeaders: request.rawHeaders, body: bytes })
      response.end('{}')
    })
  })
  const replayed = launch(t, ['replay', file, '--url', collector], { env: {} })
  t.equal(await replayed.ended, 0, replayed.err)
  t.match(replayed.out, new RegExp(`^${file.replaceAll(/[.\\]/g, '\\$&')}  200  received  \\d+\\.\\d ms\n$`))
  t.same(got[0]!.body, body)
  t.same(got[0]!.rawHeaders, ['Host', new URL(collector).host, ...lines.flat(), 'Content-Length', String(body.length), 'Connection', 'keep-alive'])

  const again = launch(t, ['replay', ...files, '--json', '--url', url], { env: {} })
  t.equal(await again.ended, 0, again.err)
  t.match(jsonLines(again.out), files.map(file => ({ file, status: 200, code: null, duplicate: true, ms: Number })), 'the receiver knows them all')

  listener.interrupt()
  t.equal(await listener.ended, 0)
  t.equal(listener.err, '')
  t.match(listener.out, new RegExp(`^listening on .+\ninspector on .+\nsaving to ${dir}\n\\d\\d:\\d\\d:\\d\\d  batch\\.completed {17}wh_\\w{32}  200 received   batch_\\w+  \\d+\\.\\d ms\n.+ 200 duplicate  batch_`))
})

t.test('replay: what a receiver refuses for its age it takes once signed again', async t => {
  const dir = t.testdir({})
  const body = Buffer.concat([Buffer.from(JSON.stringify(thin('batch.failed', { id: 'b' }))), Buffer.from('\r\n')])
  const timestamp = Math.floor(Date.now() / 1000) - 86_400
  const file = join(dir, 'old.http')
  writeFileSync(file, formatSaved({ headers: [['Content-Type', 'application/json'], ...Object.entries(sign(body, { secret: SECRET, webhookId: 'wh_old', timestamp })).slice(1)], body }))
  const seen: string[] = []
  const { url } = await receiver(t, {}, app => {
    app.openaiWebhook.onAny((_event, { webhookId, request }) => { seen.push(webhookId, String(request!.openaiWebhook.rawBody)) })
  })
  const stale = await run(t, ['replay', file, '--url', url])
  t.match(stale, { code: 1, out: `${file}  401  ${CODE}TIMESTAMP_OUT_OF_TOLERANCE  ` })
  t.match(jsonLines((await run(t, ['replay', file, '--json', '--url', url])).out), [{ status: 401, code: `${CODE}TIMESTAMP_OUT_OF_TOLERANCE` }])
  const renewed = await run(t, ['replay', file, file, '--resign', '--url', url])
  t.match(jsonLines((await run(t, ['replay', file, '--resign', '--json', '--url', url])).out), [{ file, status: 200, code: null, duplicate: true }])
  t.equal(renewed.code, 0)
  t.match(renewed.out, /200 {2}received .+\n.+200 {2}duplicate /, 'the webhook-id is kept')
  t.same(seen, ['wh_old', body.toString()])
  const strangers = join(dir, 'none.http')
  writeFileSync(strangers, 'content-type: application/json\n\n{}')
  t.match(await run(t, ['replay', strangers, file, '--resign', '--url', url]), {
    code: 0, out: /^\S+old\.http {2}200 .*\n$/, err: `openai-webhook: ${strangers}: left out, it has no webhook-id to sign again\n`
  })
  t.match(await run(t, ['replay', strangers, '--resign', '--url', url]), { code: 1, out: '' }, 'nothing was sent')
  const wrong = await run(t, ['replay', file, '--resign', '--secret', 'whsec_AAAA', '--url', url])
  t.match(wrong, { code: 1, out: `401  ${CODE}INVALID_SIGNATURE` })
})

t.test('trigger delivers to README\'s receiver unless it is told another', async t => {
  let told = ''
  // Interrupted, since something else may listen there.
  const terminal = { out () {}, err (text: string) { told += text }, isTTY: false, env: { OPENAI_WEBHOOK_SECRET: SECRET }, signal: AbortSignal.abort() }
  t.equal(await main(['trigger', 'batch.failed'], terminal), 1)
  t.equal(told, 'openai-webhook: interrupted\n')
  t.match(trigger.help, '--url URL            the receiver (http://127.0.0.1:3000/webhooks/openai)')
})

t.test('replay sends nothing unless it can send everything, and tells of a receiver that is silent', async t => {
  const dir = t.testdir({ 'good.http': 'webhook-id: wh_1\n\n{}' })
  let requests = 0
  const url = await answering(t, () => { requests++ })
  const good = join(dir, 'good.http')
  t.match(await run(t, ['replay', good, join(dir, 'none'), '--url', url]), { code: 1, out: '', err: /cannot read .+none: ENOENT\n$/ })
  t.equal(requests, 0)
  t.match(await run(t, ['replay', good, '--timeout', '60', '--url', url]), { code: 1, out: `${good}  ---  TIMEOUT  `, err: '' })
  t.match(jsonLines((await run(t, ['replay', good, '--timeout', '60', '--json', '--url', url])).out), [{ file: good, status: null, code: 'TIMEOUT' }])
})

t.test('listen without a secret makes one, and tells how to deliver with it', async t => {
  for (const given of [{}, { OPENAI_WEBHOOK_SECRET: '' }]) {
    const listener = start(t, ['listen', '--port', '0'], { env: given })
    const { url } = await listening(listener)
    const [, secret, shown] = await listener.shows(/OPENAI_WEBHOOK_SECRET=(whsec_\S+) npx fastify-openai-webhook trigger batch\.completed --url (\S+)\n/)
    t.equal(shown, url)
    t.equal((await run(t, ['trigger', 'batch.completed', '--url', url], { env: { OPENAI_WEBHOOK_SECRET: secret! } })).code, 0)
    await listener.shows(/batch\.completed .+ 200 received/)
    listener.interrupt()
    t.equal(await listener.ended, 0)
  }
})

t.test('listen with a secret does not show it', async t => {
  const listener = start(t, ['listen', '--port', '0', '--path', '/hook', '--secret', SECRET])
  const { url } = await listening(listener)
  t.match(url, /\/hook$/)
  t.equal((await run(t, ['trigger', 'batch.failed', '--url', url])).code, 0)
  await listener.shows(/batch\.failed .+ 200 received/)
  t.notMatch(listener.out + listener.err, SECRET.slice(6))
})

t.test('listen says why it refuses, and what to do', async t => {
  const dir = t.testdir({})
  const listener = start(t, ['listen', '--port', '0', '--save', dir], { env })
  const { url, port } = await listening(listener)
  const wire = await Wire.open(t, port)
  const event = JSON.stringify(thin('batch.failed', { id: 'b' }))
  const deliver = async (headers: Record<string, string>, body: Buffer | string = event, path?: string, method?: string): Promise<number> => {
    await wire.write(request(Object.entries(headers), Buffer.from(body), path, method))
    return (await wire.answer()).status
  }
  const now = Math.floor(Date.now() / 1000)
  const signed = (timestamp = now, body: Buffer | string = event): Record<string, string> => sign(body, { secret: SECRET, timestamp })

  t.equal(await deliver(sign(event)), 401)
  const [, file] = await listener.shows(/401 FST_OPENAI_WEBHOOK_INVALID_SIGNATURE {2}b .+\n {10}no signature matches .+; to see why: npx fastify-openai-webhook diagnose (\S+)\n/)
  t.equal(parseSaved(readFileSync(file!)).body.toString(), event)

  t.equal(await deliver(signed(now - 900)), 401)
  await listener.shows(/TIMESTAMP_OUT_OF_TOLERANCE .+\n.+: signed 90\d s ago; an old delivery, which replay --resign renews, or a clock that is off\n/)
  t.equal(await deliver(signed(now + 900)), 401)
  await listener.shows(/signed (?:900|89\d) s ahead; one of the two clocks is off\n/)
  t.equal(await deliver({ 'content-type': 'application/json' }, ''), 401)
  await listener.shows(/POST \/webhooks\/openai +- +401 FST_OPENAI_WEBHOOK_MISSING_HEADER .+\n +the webhook-timestamp header is missing or empty\n/)
  const latin = Buffer.from([0xff])
  t.equal(await deliver(signed(now, latin), latin), 400)
  await listener.shows(/INVALID_BODY .+\n +the signed body is not an event: /)
  t.equal(await deliver({ ...signed(), 'content-type': 'text/plain' }), 415)
  await listener.shows(/415 /)
  t.equal(await deliver(signed(), event, '/elsewhere'), 404)
  await listener.shows(/POST \/elsewhere .+ 404 Not Found .+\n +this receiver takes POST \/webhooks\/openai alone\n/)
  t.equal(await deliver({}, '', '/webhooks/openai', 'PUT'), 404)
  await listener.shows(/PUT \/webhooks\/openai .+ 404/)

  const rude = JSON.stringify({ type: '\x1b[2J\nfaked line', data: null })
  t.equal(await deliver({ ...signed(), 'webhook-id': '../../x\xa0y' }, rude), 401)
  await listener.shows(/ \?\[2J\?faked line +\.\.\/\.\.\/x\?y +401 FST_OPENAI_WEBHOOK_INVALID_ID/)
  t.equal(await deliver({ ...signed(), 'webhook-id': `wh_${'x'.repeat(5000)}` }), 401)
  await listener.shows(/wh_x+ .*401 FST_OPENAI_WEBHOOK_INVALID_ID.+\n.+\n(?=[^]*INVALID_ID|$)/)

  const names = readdirSync(dir).sort()
  t.equal(names.length, 8, 'all that came to its path')
  t.ok(names.every(name => /^\d{8}T\d{6}\.\d{3}Z-[\w-]{1,100}\.http$/.test(name)), 'and no other place')
  t.ok(names.some(name => name.endsWith('-______x_y.http')))
  t.ok(names.some(name => name.endsWith('Z-none.http')))
  t.equal(listener.err, '')

  const json = start(t, ['listen', '--port', '0', '--json'], { env })
  const [, address] = await json.shows(/^\{"listening":"(http[^"]+)","inspector":"http[^"]+\/openai-webhook"\}\n/)
  const other = await Wire.open(t, Number(new URL(address!).port))
  await other.write(request(Object.entries(sign(event)), Buffer.from(event)))
  await other.answer()
  await other.write(request([], Buffer.alloc(0)))
  await other.answer()
  await json.shows(/MISSING_HEADER.+\n/)
  t.match(jsonLines(json.out).slice(1), [
    { time: /Z$/, type: 'batch.failed', webhookId: /^wh_/, status: 401, code: `${CODE}INVALID_SIGNATURE`, duplicate: false, ms: Number, file: null, hint: /diagnose FILE, with what --save DIR keeps$/ },
    { type: null, webhookId: null }
  ])
  t.equal((await run(t, ['trigger', 'batch.failed', '--url', address!])).code, 0)
  await json.shows(/"status":200.+\n/)
  t.match(jsonLines(json.out).at(-1), { code: null, hint: null })
  t.match(json.err, /^listening on /, 'for people, beside the data')
  t.match(url, /^http:/)
})

t.test('listen serves the inspector to this machine: it sends samples, and is no delivery itself', async t => {
  const dir = t.testdir()
  const listener = start(t, ['listen', '--port', '0', '--save', dir], { env: { OPENAI_WEBHOOK_SECRET: SECRET } })
  const { url, port } = await listening(listener)
  const [, address] = await listener.shows(/^inspector on (http:\S+)$/m)
  t.equal(address, `http://127.0.0.1:${port}/openai-webhook`)
  t.match(await (await fetch(address!)).text(), /<script type="module" src="openai-webhook\/page\.js">/)
  const response = await fetch(`${address}/api/deliver`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', origin: new URL(address!).origin },
    body: JSON.stringify({ endpoint: new URL(url).pathname, url: new URL(url).pathname, body: JSON.stringify(thin('batch.failed')) })
  })
  t.same(await response.json(), { status: 200, body: '{"received":true}' })
  await listener.shows(/batch\.failed .+ 200 received/)
  t.equal(readdirSync(dir).length, 1)

  const forwarding = start(t, ['listen', '--port', '0', '--forward-to', url], { env: { OPENAI_WEBHOOK_SECRET: SECRET } })
  const { port: other } = await listening(forwarding)
  t.equal((await fetch(`http://127.0.0.1:${other}/openai-webhook`)).status, 404)
  t.notMatch(forwarding.out, /inspector/)
})

t.test('listen reads a bounded body', async t => {
  const dir = t.testdir({})
  const listener = start(t, ['listen', '--port', '0', '--save', dir], { env })
  const { port } = await listening(listener)
  const big = Buffer.alloc(100_000, ' ')
  const wire = await Wire.open(t, port)
  await wire.write(request(Object.entries(sign(big, { secret: SECRET })), big))
  t.equal((await wire.answer()).status, 413, 'as the plugin answers')
  t.same(parseSaved(readFileSync(savedIn(dir)[0]!)).body, big, 'and still saved')

  const declared = await Wire.open(t, port)
  await declared.write(head([...Object.entries(sign('')), ['content-length', '1048577']]))
  t.match(await declared.answer(), { status: 413, headers: { connection: 'close' } })
  const streamed = await Wire.open(t, port)
  await streamed.write(Buffer.concat([head([...Object.entries(sign('')), ...CHUNKED]), chunk(Buffer.alloc(1_048_577)), LAST_CHUNK]))
  t.equal((await streamed.answer()).status, 413)
  await listener.shows(/(?:413 FST_ERR_CTP_BODY_TOO_LARGE[^]*){3}/)
  t.equal(readdirSync(dir).length, 1)
})

t.test('a delivery that cannot be saved is told, and received', async t => {
  const dir = join(t.testdir(), 'saved')
  const listener = start(t, ['listen', '--port', '0', '--save', dir], { env })
  const { url } = await listening(listener)
  rmSync(dir, { recursive: true })
  t.equal((await run(t, ['trigger', 'batch.failed', '--url', url])).code, 0)
  t.match(listener.err, /^openai-webhook: cannot write .+\.http: ENOENT\n$/)
})

t.test('listen on a taken port is one line', async t => {
  const { url } = await receiver(t)
  const { port } = new URL(url)
  for (const run of [launch, start]) {
    const session = run(t, ['listen', '--port', port], { env })
    t.equal(await session.ended, 1)
    t.equal(session.err, `openai-webhook: cannot listen on port ${port} of 127.0.0.1: it is taken; choose another with --port\n`)
    t.equal(session.out, '')
  }
})

t.test('listen takes an IPv6 address', async t => {
  const listener = start(t, ['listen', '--port', '0', '--host', '::1'], { env })
  const { url } = await listening(listener)
  t.match(url, /^http:\/\/\[::1\]:\d+\/webhooks\/openai$/)
  t.equal((await run(t, ['trigger', 'batch.failed', '--url', url])).code, 0)
})

t.test('listen that is interrupted before it listens ends all the same', async t => {
  const listener = start(t, ['listen', '--port', '0'], { env })
  listener.interrupt()
  t.equal(await listener.ended, 0)
})

// Forwarding

t.test('listen --forward-to hands on what verifies, unchanged, and answers as the receiver does', async t => {
  const got: Array<{ rawHeaders: string[], body: string }> = []
  let handler = (): void => {}
  const { url: target } = await receiver(t, {}, app => {
    app.openaiWebhook.onAny((_event, { request }) => {
      got.push({ rawHeaders: request!.raw.rawHeaders, body: String(request!.openaiWebhook.rawBody) })
      handler()
    })
    app.addHook('onSend', async (_request, reply) => { reply.header('x-receiver', 'mine').header('set-cookie', ['a=1', 'b=2']) })
  })
  const listener = start(t, ['listen', '--port', '0', '--forward-to', target], { env })
  const { port, url } = await listening(listener)
  t.match(listener.out, `forwarding to ${target}\n`)

  const body = '{ "type":"batch.failed",\r\n"data":{"id":"\\u00e9"},"id":"e","created_at":1 }\n'
  const signed = sign(body, { secret: SECRET, webhookId: 'wh_f' })
  const lines = [['Content-Type', 'application/json; x=y'], ['WEBHOOK-Id', 'wh_f'], ['webhook-timestamp', signed['webhook-timestamp']], ['webhook-signature', signed['webhook-signature']]] as Array<[string, string]>
  const wire = await Wire.open(t, port)
  await wire.write(request(lines, Buffer.from(body)))
  t.match(await wire.answer(), { status: 200, body: '{"received":true}', headers: { 'content-type': 'application/json; charset=utf-8', 'x-receiver': 'mine', 'set-cookie': 'b=2' } })
  t.equal(got[0]!.body, body)
  t.same(got[0]!.rawHeaders, ['Host', new URL(target).host, ...lines.flat(), 'Content-Length', String(body.length), 'Connection', 'keep-alive'])

  await wire.write(request(lines, Buffer.from(body)))
  t.match(await wire.answer(), { status: 200, body: '{"received":true,"duplicate":true}' }, 'the receiver tells duplicates')
  await listener.shows(/200 received [^]+200 duplicate /)

  handler = () => { throw new Error('no') }
  t.match(await run(t, ['trigger', 'batch.completed', '--url', url]), { code: 1, out: `500  ${CODE}HANDLER_FAILED` })
  await listener.shows(/500 FST_OPENAI_WEBHOOK_HANDLER_FAILED .+\n +an event handler failed\n/)
  t.equal(got.length, 2)

  t.match(await run(t, ['trigger', 'batch.completed', '--secret', 'whsec_AAAA', '--url', url]), { code: 1, out: `401  ${CODE}INVALID_SIGNATURE` })
  t.equal(got.length, 2, 'what does not verify is not handed on')
})

t.test('listen --forward-to says which of the two refuses a signature', async t => {
  const { url: target } = await receiver(t, { secret: `whsec_${Buffer.alloc(32, 1).toString('base64')}` })
  const listener = start(t, ['listen', '--port', '0', '--forward-to', target], { env })
  const { url } = await listening(listener)
  t.match(await run(t, ['trigger', 'batch.completed', '--url', url]), { code: 1, out: `401  ${CODE}INVALID_SIGNATURE` })
  await listener.shows(/401 FST_OPENAI_WEBHOOK_INVALID_SIGNATURE .+\n +http:\/\/127\.0\.0\.1:\d+ answers that no signature matches .+: the app there has another signing secret\n/)

  const without = start(t, ['listen', '--port', '0', '--forward-to', target], { env: {} })
  await without.shows(/no signing secret was given, so what OpenAI sends is refused here: give the secret of the app behind, .+\n/)
})

t.test('listen --forward-to leaves media types and unknown answers to the receiver', async t => {
  const answers = [[202, ''], [422, 'no JSON']] as const
  let requests = 0
  const target = await answering(t, (_request, response) => {
    const [status, body] = answers[requests++]!
    response.writeHead(status, { 'content-type': 'text/plain' }).end(body)
  })
  const listener = start(t, ['listen', '--port', '0', '--forward-to', target], { env })
  const { port } = await listening(listener)
  const wire = await Wire.open(t, port)
  const body = JSON.stringify(thin('video.failed'))
  for (const [status, text] of answers) {
    await wire.write(request(Object.entries({ ...sign(body, { secret: SECRET }), 'content-type': 'text/plain' }), Buffer.from(body)))
    const answer = await wire.answer()
    t.same([answer.status, answer.body], [status, text])
  }
  await listener.shows(/202 Accepted[^]+422 Unprocessable Entity/)
})

t.test('listen --forward-to passes on an answer that is too long without its body', async t => {
  const target = await answering(t, (_request, response) => { response.writeHead(200, { 'content-type': 'text/plain', 'content-encoding': 'gzip', 'x-own': 'yes' }).end(Buffer.alloc(3_000_000)) })
  const listener = start(t, ['listen', '--port', '0', '--forward-to', target], { env })
  const { port } = await listening(listener)
  const wire = await Wire.open(t, port)
  const body = JSON.stringify(thin('video.failed'))
  await wire.write(request(Object.entries(sign(body, { secret: SECRET })), Buffer.from(body)))
  const { status, headers, body: answer } = await wire.answer()
  t.match({ status, headers, answer }, { status: 200, headers: { 'content-length': '0', 'content-encoding': undefined, 'x-own': 'yes' }, answer: '' })
  await listener.shows(/200 received .+\n.+longer than 1048576 bytes, so it was passed on without its body\n/)
})

t.test('listen --forward-to answers 503 when the receiver cannot be reached or does not answer', async t => {
  const silent = await answering(t, () => {})
  const receivers = [
    [await refusing(t), 'the connection was refused; is the receiver running?', []],
    [silent, 'the receiver did not answer: TIMEOUT', ['--timeout', '60']]
  ] as const
  for (const [target, told, patience] of receivers) {
    const listener = start(t, ['listen', '--port', '0', '--forward-to', target, ...patience], { env })
    const { port } = await listening(listener)
    const wire = await Wire.open(t, port)
    const body = JSON.stringify(thin('video.failed'))
    await wire.write(request(Object.entries(sign(body, { secret: SECRET })), Buffer.from(body)))
    t.match(await wire.answer(), { status: 503, headers: { 'retry-after': '5' } })
    const [line] = await listener.shows(/503 Service Unavailable .+\n.+\n/)
    t.match(line, told)
  }
})

t.test('Ctrl-C ends listen while a delivery is with the receiver', async t => {
  let arrived = (): void => {}
  const there = new Promise<void>(resolve => { arrived = resolve })
  const target = await answering(t, () => arrived())
  const listener = launchSource(t, ['listen', '--port', '0', '--forward-to', target], env)
  const { url } = await listening(listener)
  const sent = start(t, ['trigger', 'video.failed', '--url', url], { env })
  await there
  listener.interrupt()
  t.equal(await listener.ended, 0, listener.err)
  t.equal(listener.err, '')
  t.equal(await sent.ended, 1)
})

// The bin

t.test('the bin ends quietly when nobody reads on', async t => {
  const { url } = await receiver(t)
  const argv = ['trigger', 'all', '--url', url]
  for (const session of [launch(t, argv, { env }), launchSource(t, argv, env)]) {
    session.hangUp()
    t.equal(await session.ended, 0)
    t.equal(session.err, '')
  }
})

t.test('what the bin sends, and its exit code, do not depend on a reader', async t => {
  for (const begin of [(argv: string[]) => launch(t, argv, { env }), (argv: string[]) => launchSource(t, argv, env)]) {
    let requests = 0
    const url = await answering(t, (_request, response) => {
      requests++
      response.writeHead(500).end('{}')
    })
    const session = begin(['trigger', 'video.failed', '--count', '20', '--url', url])
    session.hangUp()
    t.equal(await session.ended, 1)
    t.equal(requests, 20)
  }
})

t.test('listen ends when nobody reads on', async t => {
  for (const listener of [launch(t, ['listen', '--port', '0'], { env }), launchSource(t, ['listen', '--port', '0'], env)]) {
    const { url } = await listening(listener)
    listener.hangUp()
    const body = JSON.stringify(thin('batch.failed'))
    await fetch(url, { method: 'POST', headers: sign(body, { secret: SECRET }), body }).catch(() => {}) // it may end before it has answered
    t.equal(await listener.ended, 0)
    t.equal(listener.err, '')
  }
})

t.test('Ctrl-C ends the bin although it waits for a pipe that nobody writes to', async t => {
  const dir = t.testdir({ 'no-id.http': 'content-type: a/b\n\n{}' })
  const pipe = join(dir, 'pipe')
  execFileSync('mkfifo', [pipe])
  const session = launchSource(t, ['replay', '--resign', join(dir, 'no-id.http'), pipe, '--url', 'http://127.0.0.1:1'], env)
  await until('it to read its files', () => session.err !== '')
  session.interrupt()
  t.equal(await session.ended, null, 'by the signal')
  t.match(session.err, /^.*left out.*\n$/)
})

t.test('the bin, run as a child: every failure is one line and its exit code', async t => {
  const url = await refusing(t)
  const failures: Array<[argv: string[], code: number, told: RegExp, given?: Record<string, string>]> = [
    [['lisen'], 2, /unknown command "lisen", did you mean "listen"\?/],
    [['trigger', 'all', '--url', url], 1, /the connection was refused/],
    [['trigger', 'all', '--url', url], 1, /no signing secret/, {}]
  ]
  for (const [argv, code, told, given = env] of failures) {
    const session = launch(t, argv, { env: given })
    t.equal(await session.ended, code, argv.join(' '))
    t.equal(session.out, '')
    t.match(session.err, told)
    t.match(session.err, /^openai-webhook: [^\n]+\n$/, 'one line')
  }
  const usage = launchSource(t, [])
  t.equal(await usage.ended, 2)
  t.match(usage.err, /^Usage: /m)
})
