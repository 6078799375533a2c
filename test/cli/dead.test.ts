import { existsSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import Database from 'libsql'
import t from 'tap'
import type { Test } from 'tap'
import { deadCommand, dead } from '../../lib/cli/dead.ts'
import { parse } from '../../lib/cli/command.ts'
import type { Job } from '../../lib/index.ts'
import { durable } from '../../lib/sqlite/index.ts'
import { launch, start } from '../support/command.ts'
import { build, thin } from '../support/deliveries.ts'
import { readDocument } from '../support/docs.ts'
import { until } from '../support/faults.ts'
import { missing, openSqlite } from '../support/sqlite.mjs'
import type { Handle, HandleName } from '../support/sqlite.mjs'

const ENDPOINT = '/webhooks/openai'

/** The one that the command takes: two libraries do not see each other's locks in one process. */
const LIBRARY: HandleName = missing['node:sqlite'] === false ? 'node:sqlite' : 'libsql'

async function run (t: Test, argv: string[]): Promise<{ code: number | null, out: string, err: string }> {
  const session = start(t, ['dead', ...argv])
  const code = await session.ended
  return { code, out: session.out, err: session.err }
}

const job = (webhookId: string, more: Partial<Job> = {}): Job => ({ webhookId, timestamp: 1_750_861_210, endpoint: ENDPOINT, event: thin('batch.completed'), ...more })

/** A file with these dead in it, in this order. */
async function fileWith (t: Test, ...jobs: Job[]): Promise<{ file: string, db: Handle, runner: ReturnType<typeof durable> }> {
  const file = join(t.testdir(), 'webhooks.db')
  const db = openSqlite(file, LIBRARY)
  t.teardown(() => db.close())
  const runner = durable(db, { attempts: 1, concurrency: 1 })
  const app = await build(t, { runner })
  app.openaiWebhook
    .onAny(() => {}, { name: 'import' })
    .onAny(() => { throw new Error('no such\u001b[31m customer') }, { name: 'bill' })
  await app.ready()
  for (const [i, each] of jobs.entries()) {
    await runner.run(each)
    await until('it to be dead', () => runner.deadCount() === i + 1)
    db.prepare('UPDATE openai_webhook_jobs SET ended = ? WHERE ended > 1000').run(i)
  }
  await app.close()
  return { file, db, runner }
}

t.test('list shows the dead, the oldest first, and how to see the rest', async t => {
  const { file } = await fileWith(t, job('wh_1'), job('wh_2', { event: thin('batch.failed') }), job('wh_3', { endpoint: '/other', tenant: 'acme' }))
  const all = await run(t, ['list', '--sqlite', file])
  t.same([all.code, all.err], [0, ''])
  t.equal(all.out, `wh_1  batch.completed  ${ENDPOINT}  1970-01-01T00:00:00.000Z  1 attempt
  bill: no such?[31m customer
wh_2  batch.failed  ${ENDPOINT}  1970-01-01T00:00:00.001Z  1 attempt
  bill: no such?[31m customer
wh_3  batch.completed  /other of acme  1970-01-01T00:00:00.002Z  1 attempt
  bill: no such?[31m customer
`)
  const ids = async (...options: string[]): Promise<string[]> => {
    const { code, out } = await run(t, ['list', '--json', '--sqlite', file, ...options])
    t.equal(code, 0)
    return out.split('\n').filter(line => line !== '').map(line => (JSON.parse(line) as Job).webhookId)
  }
  t.same(await ids('--type', 'batch.failed'), ['wh_2'])
  t.same(await ids('--endpoint', '/other'), ['wh_3'])
  t.same(await ids('--tenant', 'acme'), ['wh_3'])
  t.same(await ids('--tenant', 'globex'), [])
  t.same(await ids('--limit', '2', '--all'), ['wh_1', 'wh_2', 'wh_3'])
  const first = await run(t, ['list', '--sqlite', file, '--limit', '2', '--type', 'batch.completed'])
  t.same([first.code, first.out.match(/^wh_\d/gm), first.err], [0, ['wh_1', 'wh_3'], ''])
  const one = await run(t, ['list', '--sqlite', file, '--limit', '1'])
  t.same([one.code, one.out.match(/^wh_\d/gm), one.err], [0, ['wh_1'], '2 more: --limit N or --all lists them\n'])
  t.same(await run(t, ['list', '--sqlite', file, '--type', 'batch.expired']), { code: 0, out: '', err: 'none of the 3 dead deliveries matches\n' })
  t.same(await run(t, ['requeue', '--all', '--sqlite', file, '--type', 'batch.expired']), { code: 0, out: '', err: 'none of the 3 dead deliveries matches\n' })
})

t.test('show tells of one: errors with their stacks, what had finished, the event', async t => {
  const { file, db, runner } = await fileWith(t, job('wh_1'), job('wh_2'), job('wh_2', { endpoint: '/other' }))
  const { code, out } = await run(t, ['show', 'wh_1', '--sqlite', file])
  t.equal(code, 0)
  t.match(out, /^wh_1 {2}batch\.completed {2}\/webhooks\/openai {2}1970-01-01T00:00:00\.000Z {2}1 attempt\n {2}finished: import\n\nhandler bill:\n {2}Error: no such\?\[31m customer\n {6}at .*dead\.test\.ts.*\n[^]*\nevent:\n {2}\{\n {4}"id": "evt_1",\n/)
  t.match(JSON.parse((await run(t, ['show', 'wh_1', '--json', '--sqlite', file])).out), runner.dead(1)[0])

  const unknown = await run(t, ['show', 'wh_9', '--sqlite', file])
  t.same(unknown, { code: 1, out: '', err: 'openai-webhook: wh_9: there is no such dead delivery\n' })
  const several = await run(t, ['show', 'wh_2', '--sqlite', file])
  t.same(several, { code: 1, out: '', err: 'openai-webhook: wh_2: there are several, at different endpoints or of different tenants: say which by --endpoint or --tenant\n' })
  t.match((await run(t, ['show', 'wh_2', '--sqlite', file, '--endpoint', '/other'])).out, /^wh_2 {2}batch\.completed {2}\/other {2}/)

  db.exec("UPDATE openai_webhook_jobs SET attempts = 3, failure = NULL WHERE key LIKE '%wh_1'") // as an older version left it
  t.match((await run(t, ['list', '--limit', '1', '--sqlite', file])).out, / {2}3 attempts\n {2}1 of 2 handlers failed: no such\?\[31m customer\n$/)
  t.match((await run(t, ['show', 'wh_1', '--sqlite', file])).out, / {2}3 attempts\n {2}finished: none\n\nno handler:\n {2}1 of 2 handlers failed: no such\?\[31m customer\n/)
})

t.test('requeue gives those that are named their attempts anew, all or none', async t => {
  const { file, db, runner } = await fileWith(t, job('wh_1'), job('wh_2'), job('wh_3', { event: thin('batch.failed') }), job('wh_4'))
  t.match(await run(t, ['requeue', 'wh_1', 'wh_9', '--sqlite', file]), { code: 1, out: '', err: /wh_9: there is no such dead delivery\n$/ })
  t.equal(runner.deadCount(), 4)
  t.same(await run(t, ['requeue', 'wh_1', 'wh_1', '--force', '--sqlite', file]), { code: 0, out: 'wh_1  requeued\n', err: '' })
  t.match(db.prepare("SELECT state, attempts FROM openai_webhook_jobs WHERE key LIKE '%wh_1'").all(), [{ state: 'pending', attempts: 0 }])
  t.same(await run(t, ['requeue', '--all', '--type', 'batch.failed', '--json', '--sqlite', file]), { code: 0, out: `{"webhookId":"wh_3","endpoint":"${ENDPOINT}","requeued":true}\n`, err: '' })
  t.same((await run(t, ['requeue', '--all', '--limit', '1', '--sqlite', file])).out, 'wh_2  requeued\n')
  t.same((await run(t, ['requeue', '--all', '--sqlite', file])).out, 'wh_4  requeued\n')
  t.same(await run(t, ['requeue', '--all', '--sqlite', file]), { code: 0, out: '', err: 'no dead deliveries; 4 with attempts left\n' })

  const app = await build(t, { runner: durable(db) })
  const ran: string[] = []
  app.openaiWebhook.onAny(() => { ran.push('import') }, { name: 'import' }).onAny((_event, { webhookId }) => { ran.push(webhookId) }, { name: 'bill' })
  await app.ready()
  await until('all to run', () => ran.length === 4)
  t.same(ran.sort(), ['wh_1', 'wh_2', 'wh_3', 'wh_4'], 'without the handler that had succeeded')
})

t.test('what an inbox may have forgotten is requeued by --force alone, and of all the others are', async t => {
  const { file, db, runner } = await fileWith(t, job('wh_1'), job('wh_2'))
  db.exec('UPDATE openai_webhook_jobs SET failure = json_set(failure, \'$.remembered\', json(\'{"bill":1,"import":1}\')) WHERE key LIKE \'%wh_2\'')
  const refused = { code: 1, out: '', err: 'openai-webhook: wh_2: it is older than what the inbox remembers, so an effect could happen twice: see by `show` what has failed, check whether it has taken effect, and say --force if it is to run again\n' }
  t.same(await run(t, ['requeue', 'wh_1', 'wh_2', '--sqlite', file]), refused)
  t.equal(runner.deadCount(), 2)
  t.same(await run(t, ['requeue', '--all', '--sqlite', file]), { code: 1, out: 'wh_1  requeued\n', err: refused.err.replace('openai-webhook: wh_2', '1 not requeued, such as wh_2') })
  t.equal(runner.deadCount(), 1)
  t.same(await run(t, ['requeue', '--all', '--limit', '1', '--sqlite', file]), { code: 1, out: '', err: refused.err.replace('openai-webhook: wh_2', '1 not requeued, such as wh_2') })
  t.same(await run(t, ['requeue', '--all', '--force', '--sqlite', file]), { code: 0, out: 'wh_2  requeued\n', err: '' })
})

t.test('what was requeued meanwhile is told', async t => {
  const { file } = await fileWith(t, job('wh_1'))
  const other = durable(openSqlite(file, LIBRARY))
  const terminal = { out: (text: string) => { told += text }, err () {}, isTTY: false, env: {}, signal: new AbortController().signal }
  let told = ''
  // The other one is faster between the look at the file and the write.
  const command = deadCommand([path => {
    const db = new Database(path)
    return {
      prepare: sql => db.prepare(sql) as never,
      exec (sql) {
        if (sql.startsWith('BEGIN')) other.requeue(job('wh_1'))
        return db.exec(sql)
      },
      close: () => db.close()
    }
  }])
  t.equal(await command.run(parse(['requeue', 'wh_1', '--sqlite', file], command.options), terminal), 1)
  t.equal(told, 'wh_1  was requeued meanwhile\n')
})

t.test('a file is never created, and nothing in one of something else', async t => {
  const dir = t.testdir({ 'empty.db': '', 'text.db': 'not a database, but text of some length\n'.repeat(100), directory: {} })
  const other = join(dir, 'other.db')
  new Database(other).exec('CREATE TABLE others (id)')
  const before = readdirSync(dir)
  for (const [name, told] of [
    ['none.db', 'there is no such file'], ['directory', 'there is no such file'], ['empty.db', 'it has no deliveries of durable()'],
    ['other.db', 'it has no deliveries of durable()'], ['text.db', 'file is not a database']
  ] as const) {
    t.same(await run(t, ['list', '--sqlite', join(dir, name)]), { code: 1, out: '', err: `openai-webhook: ${join(dir, name)}: ${told}\n` })
  }
  t.same(readdirSync(dir), before)
  t.same(new Database(other).prepare('SELECT name FROM sqlite_master').all(), [{ name: 'others' }])
})

t.test('a file that is locked is told', async t => {
  const { file, db } = await fileWith(t, job('wh_1'))
  const command = deadCommand([path => {
    const opened = openSqlite(path, LIBRARY)
    opened.exec('PRAGMA busy_timeout = 1')
    return opened as never
  }])
  db.exec('BEGIN EXCLUSIVE')
  const terminal = { out () {}, err () {}, isTTY: false, env: {}, signal: new AbortController().signal }
  await t.rejects(command.run(parse(['requeue', 'wh_1', '--sqlite', file], command.options), terminal), { message: `${file}: database is locked`, exitCode: 1 })
  db.exec('ROLLBACK')
})

t.test('the library is Node\'s own, else one of the working directory', async t => {
  const { file } = await fileWith(t, job('wh_1'))
  const opened: string[] = []
  const { getBuiltinModule } = process
  t.teardown(() => { process.getBuiltinModule = getBuiltinModule })
  process.getBuiltinModule = ((id: string) => id !== 'node:sqlite'
    ? getBuiltinModule(id)
    : {
        DatabaseSync: class extends Database {
          constructor (path: string) {
            super(path)
            opened.push(path)
          }
        }
      }) as typeof getBuiltinModule
  t.equal((await run(t, ['list', '--sqlite', file])).code, 0)
  t.same(opened, [file])
  process.getBuiltinModule = (() => undefined) as unknown as typeof getBuiltinModule
  t.equal((await run(t, ['list', '--sqlite', file])).code, 0, 'libsql')

  // Away from the packages of this project.
  const [elsewhere, before] = [mkdtempSync(join(tmpdir(), 'dead-')), process.cwd()]
  t.teardown(() => {
    process.chdir(before)
    rmSync(elsewhere, { recursive: true })
  })
  process.chdir(elsewhere)
  writeFileSync('empty.txt', '')
  t.same(await run(t, ['list', '--sqlite', 'empty.txt']), {
    code: 1, out: '', err: 'openai-webhook: this command needs Node 22.13 or later, or one of these packages here: npm i libsql, npm i better-sqlite3\n'
  })
  const broken = deadCommand([() => { throw new Error('was compiled\nfor another Node') }])
  const terminal = { out () {}, err () {}, isTTY: false, env: {}, signal: new AbortController().signal }
  await t.rejects(broken.run(parse(['list', '--sqlite', 'empty.txt'], broken.options), terminal), { message: 'empty.txt: was compiled?for another Node' })
})

t.test('a file of a version that kept no errors of handlers is read', async t => {
  const file = join(t.testdir(), 'webhooks.db')
  const db = openSqlite(file, LIBRARY)
  t.teardown(() => db.close())
  db.exec("CREATE TABLE openai_webhook_jobs (key TEXT PRIMARY KEY, job TEXT NOT NULL, state TEXT NOT NULL DEFAULT 'pending', attempts INTEGER NOT NULL DEFAULT 0, due INTEGER NOT NULL, error TEXT, ended INTEGER)")
  db.prepare("INSERT INTO openai_webhook_jobs (key, job, state, attempts, due, error, ended) VALUES (?, ?, 'dead', 16, 0, 'no such customer', 1)").run(`${ENDPOINT} wh_1`, JSON.stringify(job('wh_1')))
  t.match(await run(t, ['list', '--sqlite', file]), { code: 0, out: /^wh_1 .* 16 attempts\n {2}no such customer\n$/ })
})

t.test('the list is read while another process has the lock', async t => {
  const { file, db } = await fileWith(t, job('wh_1'))
  db.exec('BEGIN IMMEDIATE')
  t.match(await run(t, ['list', '--sqlite', file]), { code: 0, out: 'wh_1' })
  t.match(await run(t, ['show', 'wh_1', '--sqlite', file]), { code: 0 })
  t.match(await run(t, ['requeue', 'wh_1', '--sqlite', file]), { code: 1, err: /database is locked/ })
  db.exec('ROLLBACK')
  t.match(await run(t, ['requeue', 'wh_1', '--sqlite', file]), { code: 0 })
})

t.test('wrong usage is one line on stderr and exit code 2', async t => {
  const file = ['--sqlite', join(t.testdir(), 'none.db')]
  for (const [argv, told] of [
    [[], 'dead: expected one of list, show, requeue'],
    [['lits', ...file], 'dead: unknown action "lits", did you mean "list"?'],
    [['constructor', ...file], 'dead: unknown action "constructor"'],
    [['list'], 'missing --sqlite, the file of durable()'],
    [['list', '--sqlite', ''], 'missing --sqlite, the file of durable()'],
    [['list', 'wh_1', ...file], 'list: expected nothing more, got "wh_1"'],
    [['list', '--limit', '0', ...file], '--limit: expected a whole number, 1 or more, got "0"'],
    [['list', '--type', 'batch.*', ...file], '--type: expected one event type, such as batch.failed, got the pattern "batch.*"'],
    [['show', ...file], 'show: expected one webhook-id'],
    [['show', 'wh_1', 'wh_2', ...file], 'show: expected one webhook-id'],
    [['requeue', ...file], 'requeue: expected webhook-ids, or --all'],
    [['requeue', 'wh_1', '--all', ...file], 'requeue: expected webhook-ids, or --all'],
    [['requeue', 'wh_1', '--limit', '1', ...file], 'requeue: --limit is of no use without --all'],
    [['list', '--force', ...file], 'list: --force is of no use here'],
    [['show', 'wh_1', '--all', ...file], 'show: --all is of no use here']
  ] as Array<[string[], string]>) {
    t.same(await run(t, argv), { code: 2, out: '', err: `openai-webhook: ${told} (see --help)\n` })
  }
  t.notOk(existsSync(file[1]!))
})

t.test('help and docs/cli.md name every option', async t => {
  const section = readDocument('docs/cli.md').text.split(/^## /m).find(text => text.startsWith('dead\n'))!
  for (const option of Object.keys(dead.options)) {
    t.match(dead.help, new RegExp(`^  --${option} `, 'm'))
    t.match(section, new RegExp(`^\\| \`--${option}[ \`]`, 'm'))
  }
})

t.test('the built command does it', async t => {
  const { file, runner } = await fileWith(t, job('wh_1'))
  const requeued = launch(t, ['dead', 'requeue', 'wh_1', '--sqlite', file])
  t.equal(await requeued.ended, 0)
  t.equal(requeued.out, 'wh_1  requeued\n')
  t.equal(runner.deadCount(), 0)
})
