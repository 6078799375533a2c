import type { ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { basename, join } from 'node:path'
import { createInterface } from 'node:readline'
import pg from 'pg'
import t from 'tap'
import { durable } from '../lib/sqlite/index.ts'
import { SECRET, sign, thin } from './support/deliveries.ts'
import { codeBlocks, interfaceProperties, readDocument, readDocuments, ROOT, tableRows } from './support/docs.ts'
import { deferred } from './support/observe.ts'
import { PostgresServer, postgresMissing } from './support/postgres.ts'
import { environment, spawnProgram } from './support/program.mjs'
import { RedisServer, redisMissing } from './support/redis.ts'
import { long } from './support/size.ts'
import { HANDLES, missing, openSqlite } from './support/sqlite.mjs'
import type { HandleName } from './support/sqlite.mjs'

const RECEIVED = '{"received":true}'
const DUPLICATE = '{"received":true,"duplicate":true}'

interface Teardown { teardown: (fn: () => unknown) => void }

/** A program that runs in a process of its own, with the lines that it has written. */
class Program {
  readonly #child: ChildProcess
  readonly #exited: Promise<unknown[]>
  readonly #waiting = new Set<() => void>()
  readonly lines: string[] = []
  #ended = false
  #origin = ''

  constructor (t: Teardown, path: string, env: Record<string, string> = {}, args: string[] = []) {
    this.#child = spawnProgram([join(ROOT, path), ...args], {
      env: { ...environment, OPENAI_WEBHOOK_SECRET: SECRET, PORT: '0', ...env },
      stdio: ['ignore', 'pipe', 'pipe']
    })
    this.#exited = once(this.#child, 'exit')
    t.teardown(async () => {
      this.#child.kill('SIGKILL')
      await this.#exited
    })
    for (const output of [this.#child.stdout!, this.#child.stderr!]) {
      createInterface(output).on('line', line => {
        this.lines.push(line)
        this.#look()
      })
    }
    this.#child.on('close', () => {
      this.#ended = true
      this.#look()
    })
  }

  /** A receiver that listens. */
  static async receiver (t: Teardown, path: string, env: Record<string, string>): Promise<Program> {
    const program = new Program(t, path, env)
    program.#origin = /http:[^"\s]+/.exec(await program.line(/Server listening at/))![0]
    return program
  }

  /** The first line that matches, once it has been written. */
  line (wanted: RegExp): Promise<string> {
    return new Promise((resolve, reject) => {
      const look = (): void => {
        const found = this.lines.find(line => wanted.test(line))
        if (found === undefined && !this.#ended) return
        this.#waiting.delete(look)
        if (found === undefined) reject(new Error(`ended without a line ${String(wanted)}:\n${this.lines.join('\n')}`))
        else resolve(found)
      }
      this.#waiting.add(look)
      look()
    })
  }

  /** Delivers `batch.completed`, signed. @returns status and body */
  async deliver (webhookId: string): Promise<string> {
    const { headers, body } = sign(thin('batch.completed', { id: batchOf(webhookId) }), { webhookId })
    const response = await fetch(`${this.#origin}/webhooks/openai`, { method: 'POST', headers, body })
    return `${response.status} ${await response.text()}`
  }

  /** The ids whose handler has run, in order. */
  get handled (): string[] {
    return this.lines.filter(line => line.includes('"batch completed"'))
      .map(line => JSON.parse(line) as { webhookId: string, batch: string })
      .map(({ webhookId, batch }) => batch === batchOf(webhookId) ? webhookId : `${webhookId} with ${batch}`)
  }

  async untilHandled (webhookId: string): Promise<void> {
    await this.line(new RegExp(`"webhookId":"${webhookId}".*"batch completed"`))
  }

  /** @returns exit code, signal and the levels of the warnings and errors that were logged */
  async end (signal: NodeJS.Signals | undefined): Promise<unknown[]> {
    if (signal !== undefined) this.#child.kill(signal)
    const exit = await this.#exited
    if (!this.#ended) await once(this.#child, 'close')
    return [...exit, ...this.lines.filter(line => /"level":[4-6]0/.test(line))]
  }

  #look (): void {
    for (const look of this.#waiting) look()
  }
}

const batchOf = (webhookId: string): string => `batch_of_${webhookId}`

/** The example with the handle, as docs/recipes/sqlite.md says. @param dir within the package, so that its name leads to what is built */
function withHandle (example: string, handle: HandleName, dir: string): string {
  if (handle === 'libsql') return example
  const text = readFileSync(join(ROOT, example), 'utf8')
  const file = join(dir, basename(example))
  writeFileSync(file, text.replace("import Database from 'libsql'", "import { DatabaseSync as Database } from 'node:sqlite'"))
  return file.slice(ROOT.length)
}

for (const handle of HANDLES) {
  for (const example of ['docs/examples/sqlite.mjs', 'docs/examples/sqlite-durable.mjs']) {
    t.test(`${example} with ${handle} handles a delivery once, over a restart too`, { skip: missing[handle] }, async t => {
      const dir = t.testdir()
      const env = { SQLITE_FILE: join(dir, 'webhooks.db') }
      const path = withHandle(example, handle, dir)
      const first = await Program.receiver(t, path, env)
      t.equal(await first.deliver('wh_1'), `200 ${RECEIVED}`)
      await first.untilHandled('wh_1')
      t.same(await first.end('SIGTERM'), [0, null])

      const second = await Program.receiver(t, path, env)
      t.equal(await second.deliver('wh_1'), `200 ${DUPLICATE}`)
      t.equal(await second.deliver('wh_2'), `200 ${RECEIVED}`)
      await second.untilHandled('wh_2')
      t.same(await second.end('SIGINT'), [0, null])
      t.same([first.handled, second.handled], [['wh_1'], ['wh_2']])
    })
  }

  t.test(`docs/examples/sqlite-durable.mjs with ${handle} runs what was pending when it starts, and what sqlite-dead.mjs requeues`, { skip: missing[handle] }, async t => {
    const dir = t.testdir()
    // Node tells whoever opens its SQLite that it is new.
    const env = { SQLITE_FILE: join(dir, 'webhooks.db'), NODE_NO_WARNINGS: '1' }
    const job = (webhookId: string) => ({
      webhookId, timestamp: 1_750_861_210, endpoint: '/webhooks/openai', event: thin('batch.completed', { id: batchOf(webhookId) })
    })
    const db = openSqlite(env.SQLITE_FILE, handle)
    t.teardown(() => db.close())
    const failing = durable(db, { attempts: 1 })
    const died = deferred()
    await failing.start?.({ process () { throw new Error('disk full') }, report: died.resolve })
    await failing.run(job('wh_dead'))
    await died.promise
    await failing.close?.()
    await durable(db).run(job('wh_pending'))

    const receiver = await Program.receiver(t, withHandle('docs/examples/sqlite-durable.mjs', handle, dir), env)
    await receiver.untilHandled('wh_pending')
    const dead = 'wh_dead batch.completed, 1 attempts: disk full'
    const list = withHandle('docs/examples/sqlite-dead.mjs', handle, dir)
    const listing = new Program(t, list, env, ['wh_other'])
    t.same(await listing.end(undefined), [0, null])
    t.same(listing.lines, [`dead ${dead}`])
    const requeueing = new Program(t, list, env, ['wh_dead'])
    t.same(await requeueing.end(undefined), [0, null])
    t.same(requeueing.lines, [`requeued ${dead}`])
    await receiver.untilHandled('wh_dead')
    t.same(await receiver.end('SIGTERM'), [0, null])
  })
}

long(t, 'docs/examples/postgres.mjs needs nothing, and shows what an inbox does', {}, async t => {
  const program = new Program(t, 'docs/examples/postgres.mjs')
  t.same(await program.end(undefined), [0, null])
  t.same(program.lines, [
    'A handler that fails after its update: 500 [ { imports: 0 } ]',
    'OpenAI delivers again: 200 [ { imports: 1 } ]',
    'And once more, to a replica that knows nothing of it: 200 [ { imports: 1 } ]'
  ])
})

/** What an example says about its table. */
function tableOf (path: string): string {
  return /create table .*\)/.exec(readFileSync(path, 'utf8'))![0]
}

long(t, 'docs/examples/postgres-replica.mjs imports a batch once, in another process and over a restart too', { skip: postgresMissing }, async t => {
  const server = await PostgresServer.start(t)
  const env = { DATABASE_URL: server.url }
  const path = 'docs/examples/postgres-replica.mjs'
  const client = new pg.Client(server.url)
  await client.connect()
  await client.query(tableOf(path))
  const [first, other] = await Promise.all([Program.receiver(t, path, env), Program.receiver(t, path, env)])
  t.equal(await first.deliver('wh_1'), `200 ${RECEIVED}`)
  t.equal(await other.deliver('wh_1'), `200 ${DUPLICATE}`)
  t.equal(await other.deliver('wh_2'), `200 ${RECEIVED}`)
  t.same(await first.end('SIGTERM'), [0, null])

  await client.query('DELETE FROM openai_webhook_deliveries')
  const restarted = await Program.receiver(t, path, env)
  t.equal(await restarted.deliver('wh_1'), `200 ${RECEIVED}`, 'though the store has forgotten it')
  t.same([first.handled, other.handled, restarted.handled], [['wh_1'], ['wh_2'], []])
  t.equal((await client.query('SELECT FROM imports')).rows.length, 2)
  await client.end()
  t.same(await other.end('SIGTERM'), [0, null])
  t.same(await restarted.end('SIGINT'), [0, null])
})

long(t, 'docs/examples/pgboss.mjs queues a delivery once, and handles it once, in any process', { skip: postgresMissing }, async t => {
  const server = await PostgresServer.start(t)
  const env = { DATABASE_URL: server.url }
  const path = 'docs/examples/pgboss.mjs'
  const client = new pg.Client(server.url)
  await client.connect()
  await client.query(tableOf(path))
  const [first, other] = await Promise.all([Program.receiver(t, path, env), Program.receiver(t, path, env)])
  t.equal(await first.deliver('wh_1'), `200 ${RECEIVED}`)
  // While either handles it, a duplicate is told 409.
  await Promise.any([first, other].map(async program => await program.line(/"webhookId":"wh_1".*"webhook delivery processed"/)))
  t.equal(await other.deliver('wh_1'), `200 ${DUPLICATE}`)
  t.equal(await other.deliver('wh_2'), `200 ${RECEIVED}`)
  while ((await client.query('SELECT FROM imports')).rows.length < 2) await new Promise(resolve => setTimeout(resolve, 10))
  t.same(await first.end('SIGTERM'), [0, null])
  t.same(await other.end('SIGINT'), [0, null])
  t.same([...first.handled, ...other.handled].sort(), ['wh_1', 'wh_2'])
  t.same((await client.query('SELECT batch FROM imports ORDER BY batch')).rows, [{ batch: 'batch_of_wh_1' }, { batch: 'batch_of_wh_2' }])
  await client.end()
})

long(t, 'with Redis', { skip: redisMissing }, async t => {
  t.test('docs/examples/redis.mjs handles a delivery once, in another process and over a restart too', async t => {
    const { port } = await RedisServer.start(t)
    const env = { REDIS_URL: `redis://127.0.0.1:${port}` }
    const path = 'docs/examples/redis.mjs'
    const [first, other] = await Promise.all([Program.receiver(t, path, env), Program.receiver(t, path, env)])
    t.equal(await first.deliver('wh_1'), `200 ${RECEIVED}`)
    t.equal(await other.deliver('wh_1'), `200 ${DUPLICATE}`)
    t.same(await first.end('SIGTERM'), [0, null])
    t.same(await other.end('SIGINT'), [0, null])

    const restarted = await Program.receiver(t, path, env)
    t.equal(await restarted.deliver('wh_1'), `200 ${DUPLICATE}`)
    t.equal(await restarted.deliver('wh_2'), `200 ${RECEIVED}`)
    t.same(await restarted.end('SIGTERM'), [0, null])
    t.same([first.handled, other.handled, restarted.handled], [['wh_1'], [], ['wh_2']])
  })

  t.test('docs/examples/bullmq-receiver.mjs queues, docs/examples/bullmq-worker.mjs handles a delivery once', async t => {
    const { port } = await RedisServer.start(t)
    const env = { REDIS_URL: `redis://127.0.0.1:${port}` }
    const receiver = await Program.receiver(t, 'docs/examples/bullmq-receiver.mjs', env)
    t.equal(await receiver.deliver('wh_1'), `200 ${RECEIVED}`)
    const worker = new Program(t, 'docs/examples/bullmq-worker.mjs', env)
    await worker.line(/"working"/)
    await worker.untilHandled('wh_1')
    t.same(await worker.end('SIGTERM'), [0, null])
    t.same(await receiver.end('SIGTERM'), [0, null])

    const restarted = await Program.receiver(t, 'docs/examples/bullmq-receiver.mjs', env)
    // Queued after the duplicate: once this one has been handled, the duplicate would have been.
    for (const [id, answer] of [['wh_1', DUPLICATE], ['wh_2', RECEIVED]] as const) t.equal(await restarted.deliver(id), `200 ${answer}`)
    const other = new Program(t, 'docs/examples/bullmq-worker.mjs', env)
    await other.untilHandled('wh_2')
    t.same(await other.end('SIGINT'), [0, null])
    t.same(await restarted.end('SIGINT'), [0, null])
    t.same([worker.handled, other.handled], [['wh_1'], ['wh_2']])
  })
})

t.test('recipes show the examples as they are, and all of them', async t => {
  const examples = readdirSync(join(ROOT, 'docs/examples')).filter(name => name.endsWith('.mjs'))
    .map(name => ({ name, text: readFileSync(join(ROOT, 'docs/examples', name), 'utf8') }))
  // Projects of other tools are built from what their pages print, by test:long.
  const builtByTests = readFileSync(join(ROOT, 'test/long/neighbours.test.ts'), 'utf8')
  const shown = readDocuments().filter(({ path }) => path.startsWith('docs/recipes/') && !builtByTests.includes(path))
    .flatMap(codeBlocks)
    .filter(({ language }) => language === 'js')
  for (const { path, line, code } of shown) {
    t.ok(examples.some(({ text }) => text.includes(code)), `${path}:${line} stands in a file of docs/examples`)
  }
  for (const { name, text } of examples.filter(({ name }) => !/^(?:demo|send)/.test(name))) {
    t.ok(shown.some(({ code }) => code === text), `docs/examples/${name} stands in a recipe`)
  }
})

long(t, 'docs/reliability.md: the contracts run under the frameworks that it shows', {}, async t => {
  const blocks = codeBlocks(readDocument('docs/reliability.md')).filter(({ code }) => code.includes('fastify-openai-webhook/testing'))
  t.equal(blocks.length, 2)
  for (const { line, code } of blocks) {
    // Within the package, so that its name leads to what is published.
    const file = join(t.testdir({ 'contract.mjs': code }), 'contract.mjs')
    // node:test writes for people by default, since Node 23 where nobody looks too.
    const program = new Program(t, file.slice(ROOT.length), { NODE_OPTIONS: '--test-reporter=tap' })
    t.same(await program.end(undefined), [0, null], `docs/reliability.md:${line}`)
    t.match(program.lines.join('\n'), /^ok 1 - /m)
    t.notMatch(program.lines.join('\n'), /^not ok/m)
  }
})

t.test('docs/options.md lists every option of stores and runners with its default', async t => {
  const rows = tableRows(readDocument('docs/options.md'))
  for (const [of, file, name] of [
    ['background()', 'lib/runners/background.ts', 'BackgroundOptions'],
    ['durable()', 'lib/sqlite/durable.ts', 'DurableOptions'],
    ['bullmq()', 'lib/runners/bullmq.ts', 'BullMQOptions'],
    ['pgboss()', 'lib/runners/pgboss.ts', 'PgBossOptions']
  ] as const) {
    const properties = interfaceProperties(file).get(name)!
    const listed = new Map(rows.filter(([first]) => first!.startsWith(`\`${of}\` `)).map(([first, fallback]) => [first!.slice(of.length + 4, -1), fallback!.replaceAll('`', '')]))
    t.same([...listed.keys()], [...properties.keys()], of)
    for (const [option, { fallback = '' }] of properties) t.equal(listed.get(option), fallback, `${of} ${option}`)
  }
})
