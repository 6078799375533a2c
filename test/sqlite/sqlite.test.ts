import { spawnSync } from 'node:child_process'
import { appendFileSync, closeSync, copyFileSync, mkdtempSync, openSync, renameSync, rmSync, statSync, truncateSync, writeSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setImmediate as turn } from 'node:timers/promises'
import t from 'tap'
import type { Test } from 'tap'
import type { DeadDelivery, Claim, IdempotencyStore, Job, OpenAIWebhookOptions, Runner, RunnerHost } from '../../lib/index.ts'
import { memoryStore } from '../../lib/index.ts'
import { durable, sqliteStore } from '../../lib/sqlite/index.ts'
import type { DurableOptions, DurableRunner, SqliteDatabase, SqliteStatement } from '../../lib/sqlite/index.ts'
import { build, stoppedClock, thin } from '../support/deliveries.ts'
import { IN_PROGRESS, Member, UNAVAILABLE, answer, batchFailed, effectsIn, until } from '../support/faults.ts'
import { deferred, listen, messageOf, redelivered } from '../support/observe.ts'
import { closeSqlite, openSqlite } from '../support/sqlite.mjs'
import type { Handle, HandleName } from '../support/sqlite.mjs'
import { Wire, request } from '../support/wire.ts'

type Teardown = { teardown: (fn: () => unknown) => void }

/** ms; does not run out while a test lasts. */
const LONG = 600_000
const HOUR = 3_600_000
const ENDPOINT = '/webhooks/openai'
/** node-sqlite.test.ts has all of this with the other one. */
const HANDLE = (process.env['SQLITE_HANDLE'] ?? 'libsql') as HandleName

/** Lets what has been scheduled run. */
async function turns (count: number): Promise<void> {
  for (let i = 0; i < count; i++) await turn()
}

/** A handle whose wait for locks is short, since it blocks the event loop. */
function open (t: Teardown, file: string): Handle {
  const db = openSqlite(file, HANDLE)
  db.exec('PRAGMA busy_timeout = 1')
  t.teardown(() => closeSqlite(db))
  return db
}

/** A receiver with a handler that tells which deliveries it ran for; then it does what `work` says. */
async function receiver (t: Teardown, options: OpenAIWebhookOptions) {
  const app = await build(t, { closeTimeout: 50, ...options })
  const told: Array<{ message: string, webhookId: string | undefined }> = []
  const ran: string[] = []
  const state = { app, told, ran, work: async (_webhookId: string): Promise<void> => {} }
  app.openaiWebhook.onError((error, { webhookId }) => {
    const { message } = (error.cause ?? error) as Error
    told.push({ message, webhookId })
  })
  app.openaiWebhook.on('batch.failed', async (_event, { webhookId }) => {
    ran.push(webhookId)
    await state.work(webhookId)
  })
  await listen(app)
  return state
}

const withStore = async (t: Teardown, db: Handle, options: OpenAIWebhookOptions = {}) =>
  await receiver(t, { idempotency: { store: sqliteStore(db), lease: LONG }, ...options })

/** A receiver that keeps its deliveries in the file of `db`. */
async function withDurable (t: Teardown, db: Handle, options: DurableOptions = {}, plugin: OpenAIWebhookOptions = {}) {
  const runner = durable(db, { backoff: 1, ...options })
  return Object.assign(await receiver(t, { runner, ...plugin }), { runner })
}

interface Row { key: string, job: string, state: string, attempts: number, due: number, error: string | null, ended: number | null }
const rows = (db: Handle): Row[] => db.prepare('SELECT * FROM openai_webhook_jobs ORDER BY key').all() as Row[]

t.test('a handle is made ready', async t => {
  await t.test('it waits for locks as long as the user said, or a second where nothing was said', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    const [own, none] = [open(t, file), openSqlite(file, HANDLE)]
    t.teardown(() => none.close())
    sqliteStore(own)
    sqliteStore(none)
    t.same(own.prepare('PRAGMA busy_timeout').all(), [{ timeout: 1 }])
    t.same(none.prepare('PRAGMA busy_timeout').all(), [{ timeout: 1_000 }])
    t.same(none.prepare('PRAGMA journal_mode').all(), [{ journal_mode: 'wal' }])
    t.same(none.prepare('PRAGMA synchronous').all(), [{ synchronous: 2 }])
  })

  await t.test('it waits for the lock that another process has on a new file, which SQLite itself does not', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    const [other, db] = [open(t, file), open(t, file)]
    db.exec('PRAGMA busy_timeout = 2000')
    other.exec('CREATE TABLE others (id)')
    other.exec('BEGIN IMMEDIATE')
    let asked = 0
    const handle = {
      prepare: (sql: string) => db.prepare(sql) as SqliteStatement,
      exec (sql: string) {
        // The other process is done when it has been asked for a second time.
        if (sql.includes('journal_mode') && ++asked === 2) other.exec('COMMIT')
        return db.exec(sql)
      }
    }
    const store = sqliteStore(handle)
    t.equal(asked, 2)
    t.match(await store.begin('key', LONG), { state: 'claimed' })
  })

  await t.test('and gives up when the wait is over', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    const [other, db] = [open(t, file), open(t, file)]
    other.exec('CREATE TABLE others (id)')
    other.exec('BEGIN IMMEDIATE')
    t.throws(() => sqliteStore(db), { message: 'database is locked' })
  })

  await t.test('a file that is no database is told at creation, in SQLite\'s words', async t => {
    const file = join(t.testdir({ 'webhooks.db': 'not a database, but text of some length\n'.repeat(100) }), 'webhooks.db')
    for (const create of [sqliteStore, durable]) {
      t.match(await messageOf(() => create(openSqlite(file, HANDLE))), 'file is not a database')
    }
  })

  await t.test('a read-only handle is told at creation, or by 503 where the table is there', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    open(t, file).exec('CREATE TABLE other (x)')
    const readonly = (): Handle => open(t, `file:${file}?mode=ro`)
    for (const create of [sqliteStore, durable]) {
      t.match(await messageOf(() => create(readonly())), 'attempt to write a readonly database')
      create(open(t, file))
    }
    const store = await withStore(t, readonly())
    t.equal(await answer(store.app, batchFailed('wh_1')), UNAVAILABLE)
    const queue = await withDurable(t, readonly())
    t.equal(await answer(queue.app, batchFailed('wh_2')), UNAVAILABLE)
    for (const { ran, told } of [store, queue]) {
      t.same(ran, [])
      t.match(told, [{ message: 'attempt to write a readonly database' }])
    }
  })
})

t.test('a locked file stalls the event loop for one wait, not for one a delivery', async t => {
  const BUSY_TIMEOUT = 2_000
  const LOCKED = { message: 'database is locked' }

  /** A handle whose file can be locked, on a clock that only its waits and the test move. It tells how long each BEGIN could wait. */
  function lockable (t: Test) {
    const db = openSqlite(':memory:', HANDLE)
    db.exec(`PRAGMA busy_timeout = ${BUSY_TIMEOUT}`)
    const state = { locked: false, now: 1_000_000, waits: [] as number[], handle: { prepare: db.prepare.bind(db), exec }, timeout }
    t.intercept(performance, 'now', { value: () => state.now })

    function timeout (): number {
      const [busy] = db.prepare('PRAGMA busy_timeout').all() as [{ timeout: number }]
      return busy.timeout
    }

    function exec (sql: string): void {
      if (sql.startsWith('BEGIN')) {
        state.waits.push(timeout())
        if (state.locked) {
          state.now += timeout()
          throw new Error(LOCKED.message)
        }
      }
      db.exec(sql)
    }
    return state
  }

  const job = (webhookId: string): Job => ({ webhookId, timestamp: 1, endpoint: ENDPOINT, event: { type: 'batch.failed' } })
  const users: Record<string, (handle: SqliteDatabase) => (id: string) => Promise<unknown>> = {
    sqliteStore: handle => {
      const store = sqliteStore(handle)
      return async id => await store.begin(id, LONG)
    },
    durable: handle => {
      const runner = durable(handle)
      return async id => await runner.run(job(id))
    },
    'both on one handle, by turns': handle => {
      const [store, runner] = [sqliteStore(handle), durable(handle)]
      let turn = 0
      return async id => await (turn++ % 2 === 0 ? store.begin(id, LONG) : runner.run(job(id)))
    }
  }
  for (const [name, use] of Object.entries(users)) {
    await t.test(name, async t => {
      const state = lockable(t)
      const write = use(state.handle)
      let id = 0
      const waits = async (times: number): Promise<number[]> => {
        state.waits.length = 0
        for (let i = 0; i < times; i++) {
          const key = `wh_${id++}`
          if (state.locked) await t.rejects(write(key), LOCKED)
          else await write(key)
          t.equal(state.timeout(), BUSY_TIMEOUT, 'the user\'s own wait is on the handle')
        }
        return [...state.waits]
      }
      t.same(await waits(2), [BUSY_TIMEOUT, BUSY_TIMEOUT], 'each may wait while the file can be written')

      state.locked = true
      t.same(await waits(20), [BUSY_TIMEOUT, ...Array(19).fill(0)], 'the first one waits, as long as the user has said')

      state.locked = false
      t.same(await waits(3), [0, BUSY_TIMEOUT, BUSY_TIMEOUT], 'once one succeeds, each may wait again')

      state.locked = true
      t.same(await waits(2), [BUSY_TIMEOUT, 0])
      state.now += 10 * BUSY_TIMEOUT - 1
      t.same(await waits(1), [0])
      state.now += 1
      t.same(await waits(3), [BUSY_TIMEOUT, 0, 0], 'one more may wait when ten times as long has passed: a delivery that comes much later has not failed yet')
    })
  }

  await t.test('a failure of another kind does not stop the waiting', async t => {
    const state = lockable(t)
    const store = sqliteStore(state.handle)
    state.handle.exec('BEGIN')
    await t.rejects(async () => await store.begin('wh_1', LONG), { message: /transaction within a transaction/ })
    state.handle.exec('COMMIT')
    state.waits.length = 0
    t.match(await store.begin('wh_1', LONG), { state: 'claimed' })
    t.same(state.waits, [BUSY_TIMEOUT])
  })

  await t.test('a wait that the user changes meanwhile is the one that is left', async t => {
    const state = lockable(t)
    const store = sqliteStore(state.handle)
    state.locked = true
    await t.rejects(async () => await store.begin('wh_1', LONG), LOCKED)
    state.handle.exec('PRAGMA busy_timeout = 300')
    await t.rejects(async () => await store.begin('wh_1', LONG), LOCKED)
    t.equal(state.timeout(), 300)
    state.locked = false
    t.match(await store.begin('wh_1', LONG), { state: 'claimed' })
    t.equal(state.timeout(), 300)
  })

  await t.test('what SQLite itself does with a lock of another connection', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    const [db, other] = [open(t, file), open(t, file)]
    db.exec('PRAGMA busy_timeout = 100')
    const begun: number[] = []
    const store = sqliteStore({
      prepare: sql => db.prepare(sql) as SqliteStatement,
      exec (sql) {
        if (sql.startsWith('BEGIN')) begun.push((db.prepare('PRAGMA busy_timeout').all() as [{ timeout: number }])[0].timeout)
        return db.exec(sql)
      }
    })
    other.exec('BEGIN IMMEDIATE')
    begun.length = 0
    for (let i = 0; i < 5; i++) await t.rejects(async () => await store.begin(`wh_${i}`, LONG), LOCKED)
    t.same(begun, [100, 0, 0, 0, 0])
    other.exec('COMMIT')
    t.match(await store.begin('wh_1', LONG), { state: 'claimed' })
    t.same(db.prepare('PRAGMA busy_timeout').all(), [{ timeout: 100 }])
  })
})

t.test('a file locked by another connection', async t => {
  for (const lock of ['BEGIN IMMEDIATE', 'BEGIN EXCLUSIVE']) {
    await t.test(`${lock}, sqliteStore: 503 until it is released`, async t => {
      const file = join(t.testdir(), 'webhooks.db')
      const { app, ran, told } = await withStore(t, open(t, file))
      const other = open(t, file)
      const known = batchFailed('wh_known')
      t.equal(await answer(app, known), '200')
      const delivery = batchFailed()
      other.exec(lock)
      t.equal(await answer(app, delivery), UNAVAILABLE)
      t.equal(await answer(app, redelivered(delivery)), UNAVAILABLE)
      t.same(ran, ['wh_known'])
      t.equal(await answer(app, redelivered(known)), '200 duplicate', 'reading needs no lock')
      t.match(told, [{ message: 'database is locked' }, { message: 'database is locked' }])
      other.exec('ROLLBACK')
      t.equal(await answer(app, redelivered(delivery)), '200')
      t.equal(await answer(app, redelivered(delivery)), '200 duplicate')
      t.equal(ran.length, 2)
    })

    await t.test(`${lock}, durable: 503 until it is released`, async t => {
      const file = join(t.testdir(), 'webhooks.db')
      const db = open(t, file)
      const { app, ran } = await withDurable(t, db)
      const other = open(t, file)
      const delivery = batchFailed()
      other.exec(lock)
      t.equal(await answer(app, delivery), UNAVAILABLE)
      t.same(ran, [])
      other.exec('ROLLBACK')
      t.equal(await answer(app, redelivered(delivery)), '200')
      await until('the delivery to run', () => rows(db)[0]?.state === 'done')
      t.equal(ran.length, 1)
    })
  }

  await t.test('while a handler runs, sqliteStore: it was processed, which is forgotten once the lease is over', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    const db = open(t, file)
    const state = await withStore(t, db)
    const other = open(t, file)
    state.work = async () => { other.exec('BEGIN IMMEDIATE') }
    const delivery = batchFailed()
    t.equal(await answer(state.app, delivery), '200')
    t.same(state.told, [{ message: 'database is locked', webhookId: delivery.headers['webhook-id'] }])
    other.exec('ROLLBACK')
    t.equal(await answer(state.app, redelivered(delivery)), IN_PROGRESS)
    db.exec('UPDATE openai_webhook_deliveries SET ends = 0') // as if the lease were over
    state.work = async () => {}
    t.equal(await answer(state.app, redelivered(delivery)), '200')
    t.equal(state.ran.length, 2)
  })

  for (const [idempotency, runs] of [[undefined, 1], [false, 2]] as const) {
    const outcome = runs === 1 ? 'and found processed by the store' : 'and runs again without a store'
    await t.test(`while a job runs, durable: it is told, attempted again once the lease is over ${outcome}`, async t => {
      const file = join(t.testdir(), 'webhooks.db')
      const db = open(t, file)
      const state = await withDurable(t, db, { lease: 300 }, idempotency === undefined ? {} : { idempotency })
      const { app, ran, told } = state
      const other = open(t, file)
      state.work = async () => { if (ran.length === 1) other.exec('BEGIN IMMEDIATE') }
      t.equal(await answer(app, batchFailed('wh_1')), '200')
      // On a busy machine, trouble with the lease may be told before.
      await until('the trouble of the delivery to be told', () => told.some(({ webhookId }) => webhookId === 'wh_1'))
      t.ok(told.every(({ message }) => message === 'database is locked'))
      t.match(rows(db), [{ state: 'pending', attempts: 1 }])
      other.exec('ROLLBACK')
      await until('the job to be done', () => rows(db)[0]!.state === 'done')
      t.match(rows(db), [{ attempts: 2 }])
      t.equal(ran.length, runs)
    })
  }

  await t.test('what is acknowledged after it is in the file, for others to see', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    const db = open(t, file)
    const queue = await withDurable(t, db, {}, { idempotency: { store: sqliteStore(db) } })
    const other = open(t, file)
    queue.work = async webhookId => { if (webhookId === 'wh_1') other.exec('BEGIN IMMEDIATE') }
    t.equal(await answer(queue.app, batchFailed('wh_1')), '200')
    await until('the trouble to be told', () => queue.told.some(({ webhookId }) => webhookId === 'wh_1'))
    other.exec('ROLLBACK')
    for (const id of ['wh_2', 'wh_3']) {
      t.equal(await answer(queue.app, batchFailed(id)), '200')
      t.equal(rows(other).filter(({ key }) => key.endsWith(id)).length, 1)
    }
  })

  await t.test('inside a transaction that the user has open on the handle nothing is acknowledged', async t => {
    const db = open(t, join(t.testdir(), 'webhooks.db'))
    const store = await withStore(t, db)
    const queue = await withDurable(t, db)
    db.exec('BEGIN')
    for (const { app, ran, told } of [store, queue]) {
      t.equal(await answer(app, batchFailed()), UNAVAILABLE)
      t.match(told.at(-1), { message: 'cannot start a transaction within a transaction' })
      t.same(ran, [])
    }
    db.exec('ROLLBACK')
    for (const { app } of [store, queue]) t.equal(await answer(app, batchFailed()), '200')
  })

  await t.test('while jobs are due, durable: told, and they run when it is released', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    const db = open(t, file)
    const state = await withDurable(t, db, { concurrency: 1, attempts: 1 })
    const { app, ran, told } = state
    const finish = deferred()
    state.work = async () => await finish.promise
    t.equal(await answer(app, batchFailed('wh_1')), '200')
    t.equal(await answer(app, batchFailed('wh_2')), '200')
    await until('the first to start', () => ran.length === 1)
    const other = open(t, file)
    other.exec('BEGIN EXCLUSIVE')
    finish.resolve()
    await until('both to be told', () => told.length >= 2)
    t.same(told.slice(0, 2), [{ message: 'database is locked', webhookId: 'wh_1' }, { message: 'database is locked', webhookId: undefined }])
    t.same(ran, ['wh_1'])
    other.exec('ROLLBACK')
    await until('the second to run', () => rows(db)[1]!.state === 'done')
    t.same(ran, ['wh_1', 'wh_2'])
  })

  await t.test('while a job is renewed, durable: told, and it is still held', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    const db = open(t, file)
    const state = await withDurable(t, db, { lease: 900 })
    const { app, ran, told } = state
    const finish = deferred()
    state.work = async () => await finish.promise
    t.equal(await answer(app, batchFailed('wh_1')), '200')
    await until('the job to start', () => ran.length === 1)
    const other = open(t, file)
    other.exec('BEGIN IMMEDIATE')
    await until('the trouble to be told', () => told.length > 0)
    t.same(told[0], { message: 'database is locked', webhookId: undefined })
    other.exec('ROLLBACK')
    const { due } = rows(db)[0]!
    await until('it to be renewed', () => rows(db)[0]!.due > due)
    finish.resolve()
    await until('the job to be done', () => rows(db)[0]!.state === 'done')
    t.equal(ran.length, 1)
  })
})

function mountTmpfs (dir: string): string | undefined {
  const { error, stderr } = spawnSync('mount', ['-t', 'tmpfs', '-o', 'size=256k', 'tmpfs', dir], { encoding: 'utf8' })
  return error?.message ?? (stderr === '' ? undefined : stderr.trim())
}

const unmount = (dir: string): void => { spawnSync('umount', ['--lazy', dir]) }

/** Why the tests on a small file system cannot run here, by name; CI must run them. */
function unmountable (): string | false {
  if (process.env['CI'] !== undefined) return false
  const dir = mkdtempSync(join(tmpdir(), 'webhooks-'))
  const trouble = mountTmpfs(dir)
  if (trouble === undefined) unmount(dir)
  rmSync(dir, { recursive: true })
  return trouble !== undefined && `needs to mount a tmpfs (${trouble})`
}

/** A file system of 256 kB, to be filled and freed. */
function smallDisk (t: Teardown): { file: string, fill: () => void, free: () => void } {
  const dir = mkdtempSync(join(tmpdir(), 'webhooks-'))
  t.teardown(() => rmSync(dir, { recursive: true }))
  const trouble = mountTmpfs(dir)
  if (trouble !== undefined) throw new Error(trouble)
  t.teardown(() => unmount(dir))
  const filler = join(dir, 'filler')
  return {
    file: join(dir, 'webhooks.db'),
    fill () {
      for (const size of [4_096, 1]) {
        try {
          for (;;) appendFileSync(filler, Buffer.alloc(size))
        } catch {}
      }
    },
    free: () => rmSync(filler)
  }
}

t.test('a disk that is full', { skip: unmountable() }, async t => {
  await t.test('sqliteStore: 503, nothing forgotten, and recovery when there is room', async t => {
    const { file, fill, free } = smallDisk(t)
    const { app, ran, told } = await withStore(t, open(t, file))
    const known = batchFailed('wh_known')
    t.equal(await answer(app, known), '200')
    fill()
    const acknowledged = [known]
    let delivery = batchFailed('wh_0')
    // Until what is left of the log's last page is used up too.
    while (await answer(app, delivery) === '200') {
      acknowledged.push(delivery)
      delivery = batchFailed(`wh_${acknowledged.length}`)
    }
    const runs = ran.length
    t.equal(await answer(app, redelivered(delivery)), UNAVAILABLE)
    t.equal(ran.length, runs, 'no handler runs for what cannot be claimed')
    t.match(told.at(-1), { message: 'database or disk is full' })
    free()
    t.equal(await answer(app, redelivered(delivery)), '200')
    for (const each of [...acknowledged, delivery]) t.equal(await answer(app, redelivered(each)), '200 duplicate')
    t.equal(new Set(ran).size, ran.length, 'each ran once')
  })

  await t.test('durable: 503, all that was acknowledged runs, and recovery when there is room', async t => {
    const { file, fill, free } = smallDisk(t)
    const db = open(t, file)
    const { app, ran } = await withDurable(t, db, { lease: 300 })
    t.equal(await answer(app, batchFailed('wh_first')), '200')
    fill()
    const acknowledged = ['wh_first']
    let delivery = batchFailed('wh_0')
    while (await answer(app, delivery) === '200') {
      acknowledged.push(delivery.headers['webhook-id']!)
      delivery = batchFailed(`wh_${acknowledged.length}`)
    }
    t.equal(await answer(app, redelivered(delivery)), UNAVAILABLE)
    t.notOk(ran.includes(delivery.headers['webhook-id']!))
    free()
    t.equal(await answer(app, redelivered(delivery)), '200')
    acknowledged.push(delivery.headers['webhook-id']!)
    await until('all to be done', () => rows(db).filter(({ state }) => state === 'done').length === acknowledged.length)
    t.same(ran.sort(), acknowledged.sort(), 'each once')
  })

  await t.test('it is told at creation', async t => {
    const { file, fill } = smallDisk(t)
    fill()
    for (const create of [sqliteStore, durable]) t.match(await messageOf(() => create(open(t, file))), /full|I\/O error|unable to open/)
  })
})

t.test('a file that is taken away while it is open', async t => {
  const ways: Array<[name: string, message: string, away: (file: string) => void]> = [
    ['deleted', 'ENOENT', file => rmSync(file)],
    ['deleted with its log', 'ENOENT', file => { for (const suffix of ['', '-wal', '-shm']) rmSync(file + suffix) }],
    ['replaced by a copy', 'was replaced while it was open', file => {
      copyFileSync(file, `${file}.copy`)
      renameSync(`${file}.copy`, file)
    }],
    ['emptied', 'was emptied while it was open', file => truncateSync(file)],
    ['without its log', '-wal was deleted', file => { for (const suffix of ['-wal', '-shm']) rmSync(file + suffix) }],
    ['without the index of its log', '-shm was deleted', file => rmSync(`${file}-shm`)]
  ]
  for (const [name, message, away, before] of ways.flatMap(([name, ...way]) => [[name, ...way, ['wh_before']], [`${name}, before the first delivery`, ...way, []]] as const)) {
    await t.test(`${name}: 503, not an acknowledgement that would be lost`, async t => {
      const [storeFile, queueFile] = [join(t.testdir(), 'store.db'), join(t.testdirName, 'queue.db')]
      const store = await withStore(t, open(t, storeFile))
      const queue = await withDurable(t, open(t, queueFile))
      for (const [state, file] of [[store, storeFile], [queue, queueFile]] as const) {
        for (const webhookId of before) t.equal(await answer(state.app, batchFailed(webhookId)), '200')
        await until('them to run', () => state.ran.length === before.length)
        away(file)
        t.equal(await answer(state.app, batchFailed('wh_after')), UNAVAILABLE)
        await turn()
        t.same(state.ran, before)
        t.match(state.told.at(-1), { message })
      }
    })
  }

  await t.test('whose log is gone because the user has left WAL: it goes on', async t => {
    const db = open(t, join(t.testdir(), 'webhooks.db'))
    const { app } = await withStore(t, db)
    for (const mode of ['DELETE', 'WAL']) {
      t.equal(await answer(app, batchFailed()), '200')
      db.exec(`PRAGMA journal_mode = ${mode}`)
    }
    t.equal(await answer(app, batchFailed()), '200')
  })

  await t.test('and put back: it goes on', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    const { app, ran } = await withStore(t, open(t, file))
    renameSync(file, `${file}.away`)
    const delivery = batchFailed()
    t.equal(await answer(app, delivery), UNAVAILABLE)
    renameSync(`${file}.away`, file)
    t.equal(await answer(app, redelivered(delivery)), '200')
    t.equal(ran.length, 1)
  })

  await t.test('a database in memory has no file to lose', async t => {
    const { app } = await withStore(t, open(t, ':memory:'))
    const delivery = batchFailed()
    t.equal(await answer(app, delivery), '200')
    t.equal(await answer(app, redelivered(delivery)), '200 duplicate')
  })
})

/** Bytes: the first page of a file has its schema. */
const SCHEMA_PAGE = 4_096

t.test('a file with damaged pages: 503, and no handler runs', async t => {
  const dir = t.testdir()
  for (const [name, start] of [['store.db', withStore], ['queue.db', withDurable]] as const) {
    const file = join(dir, name)
    const before = openSqlite(file, HANDLE)
    name === 'store.db' ? sqliteStore(before) : durable(before)
    before.exec('PRAGMA wal_checkpoint(TRUNCATE)')
    before.close()
    const damaged = openSync(file, 'r+')
    const length = statSync(file).size - SCHEMA_PAGE
    writeSync(damaged, Buffer.alloc(length, 0xaa), 0, length, SCHEMA_PAGE)
    closeSync(damaged)
    const { app, ran, told } = await start(t, open(t, file))
    t.equal(await answer(app, batchFailed()), UNAVAILABLE, name)
    t.match(told.at(-1), { message: /malformed|not a database/ })
    t.same(ran, [])
  }
})

/** A handle before each of whose transactions something happens. */
const overtaken = (db: Handle, before: () => void): SqliteDatabase => ({
  prepare: sql => db.prepare(sql) as SqliteStatement,
  exec (sql) {
    if (sql.startsWith('BEGIN')) before()
    return db.exec(sql)
  }
})

t.test('sqliteStore: another process is faster between the look at the file and the lock', async t => {
  const file = join(t.testdir(), 'webhooks.db')
  const other = open(t, file)
  const later = Date.now() + LONG
  let overtake = ''
  const store = sqliteStore(overtaken(open(t, file), () => { other.exec(overtake) }))
  overtake = `INSERT INTO openai_webhook_deliveries (key, token, ends, forget) VALUES ('running', 'other', ${later}, ${later})`
  t.same(await store.begin('running', LONG), { state: 'running' })
  overtake = `INSERT INTO openai_webhook_deliveries (key, done, ends, forget) VALUES ('done', 1, 0, ${later})`
  t.same(await store.begin('done', LONG), { state: 'done' })
})

t.test('sqliteStore forgets what is old, and only that', async t => {
  const db = open(t, join(t.testdir(), 'webhooks.db'))
  const claim = async (store: IdempotencyStore, key: string): Promise<string> => {
    const begun = await store.begin(key, LONG)
    return begun.state === 'claimed' ? begun.token : ''
  }
  const before = sqliteStore(db)
  for (const [key, retention] of [['old', 1], ['young', LONG]] as const) await before.complete(key, await claim(before, key), retention)
  await before.release('unfinished', await claim(before, 'unfinished'))
  db.exec("UPDATE openai_webhook_deliveries SET forget = 1 WHERE key = 'old'")
  await sqliteStore(db).begin('another', LONG)
  t.same(db.prepare('SELECT key FROM openai_webhook_deliveries ORDER BY key').all(), [{ key: 'another' }, { key: 'unfinished' }, { key: 'young' }])
})

t.test('both tables hold what is alive, whatever the rate', async t => {
  const RETENTION = 75 * HOUR
  /** More in one moment than a minute brings to most. */
  const BURST = 1_200
  const SLICE = 100

  for (const [name, table, create] of [
    ['sqliteStore', 'openai_webhook_deliveries', (db: Handle) => {
      const store = sqliteStore(db)
      return async (key: string) => {
        const claim = await store.begin(key, LONG)
        if (claim.state === 'claimed') await store.complete(key, claim.token, RETENTION)
      }
    }],
    ['durable', 'openai_webhook_jobs', (db: Handle) => {
      const runner = durable(db)
      const done = db.prepare("UPDATE openai_webhook_jobs SET state = 'done', ended = ? WHERE key = ?")
      return async (webhookId: string) => {
        await runner.run({ webhookId, timestamp: 1, endpoint: ENDPOINT, event: { type: 'batch.failed' } })
        done.run(Date.now(), `${ENDPOINT} ${webhookId}`)
      }
    }]
  ] as const) {
    await t.test(name, async t => {
      const db = openSqlite(':memory:', HANDLE)
      let receive = create(db)
      const counted = db.prepare(`SELECT count(*) AS count FROM ${table}`)
      const countedRows = (): number => (counted.all() as [{ count: number }])[0].count
      const clock = stoppedClock(t)
      let id = 0
      let mostDeleted = 0
      const burst = async (size: number): Promise<void> => {
        for (let i = 0; i < size; i++) {
          const before = countedRows()
          await receive(`wh_${id++}`)
          mostDeleted = Math.max(mostDeleted, before + 1 - countedRows())
        }
      }
      await burst(BURST)
      t.equal(countedRows(), BURST, 'nothing goes before its time')
      for (let i = 0; i < 2; i++) {
        clock.advance(RETENTION)
        await burst(BURST)
        t.equal(countedRows(), BURST, 'what has expired is gone once as many have come')
      }
      t.ok(mostDeleted <= SLICE, 'a request pays for few')

      clock.advance(RETENTION)
      await burst(BURST / SLICE + SLICE / 2)
      t.ok(countedRows() <= SLICE, 'what a burst has left goes with the few that come afterwards')

      clock.advance(RETENTION)
      receive = create(db)
      await burst(1)
      t.equal(countedRows(), 1, 'and with the first of a process')
    })
  }
})

t.test('the clock is set', async t => {
  const LEASE = 30_000
  const token = (claim: Claim): string => claim.state === 'claimed' ? claim.token : ''

  /** Two processes that share a file, and the time of day, which timers do not go by. */
  function shared (t: Test) {
    const file = join(t.testdir(), 'webhooks.db')
    const clock = { now: Date.now() }
    t.intercept(Date, 'now', { value: () => clock.now })
    return { handles: [open(t, file), open(t, file)] as const, clock }
  }

  await t.test('forward, sqliteStore: leases have run out, unless their holders renew them first; records are fenced', async t => {
    const { handles: [one, two], clock } = shared(t)
    const [mine, other] = [sqliteStore(one), sqliteStore(two)]
    const [lost, kept] = [token(await mine.begin('lost', LEASE)), token(await mine.begin('kept', LEASE))]
    clock.now += HOUR
    t.equal(await mine.extend('kept', kept, LEASE), true)
    t.same(await other.begin('kept', LEASE), { state: 'running' })
    t.match(await other.begin('lost', LEASE), { state: 'claimed' }, 'taken over, although its holder lives')
    t.equal(await mine.extend('lost', lost, LEASE), false)
    await mine.complete('lost', lost, LONG)
    t.same(await other.begin('lost', LEASE), { state: 'running' }, 'the first holder cannot complete it')
  })

  await t.test('back, sqliteStore: what was left by a crash is held for as long as the clock was set back', async t => {
    const { handles: [one, two], clock } = shared(t)
    const [mine, other] = [sqliteStore(one), sqliteStore(two)]
    await mine.begin('crashed', LEASE)
    const living = token(await mine.begin('living', LEASE))
    clock.now -= HOUR
    t.equal(await mine.extend('living', living, LEASE), true)
    clock.now += LEASE
    t.match(await other.begin('living', LEASE), { state: 'claimed' }, 'a lease that was renewed is by the new time')
    clock.now += HOUR - 1
    t.same(await other.begin('crashed', LEASE), { state: 'running' })
    clock.now += 1
    t.match(await other.begin('crashed', LEASE), { state: 'claimed' })
  })

  await t.test('either way, sqliteStore: what was processed is remembered for that much less, or longer', async t => {
    const { handles: [one], clock } = shared(t)
    const store = sqliteStore(one)
    await store.complete('done', token(await store.begin('done', LEASE)), 75 * HOUR)
    clock.now += 3 * HOUR
    clock.now += 72 * HOUR - 1
    t.same(await store.begin('done', LEASE), { state: 'done' }, 'the retention has 3 h over')
    clock.now -= HOUR
    clock.now += HOUR
    t.same(await store.begin('done', LEASE), { state: 'done' })
    clock.now += 1
    t.match(await store.begin('done', LEASE), { state: 'claimed' })
  })

  const job = (webhookId: string): Job => ({ webhookId, timestamp: 1, endpoint: ENDPOINT, event: { type: 'batch.failed' } })

  await t.test('forward, durable: another process takes over what runs; this one does not start it beside itself', async t => {
    const { handles, clock } = shared(t)
    const started: string[] = []
    const told: string[] = []
    const finish = deferred()
    const [one, two] = handles.map(db => durable(db, { lease: LONG })) as [DurableRunner, DurableRunner]
    const host = (name: string): RunnerHost => ({
      async process ({ webhookId }) {
        started.push(`${name} ${webhookId}`)
        if (webhookId === 'wh_1') await finish.promise
      },
      report: error => { told.push(`${name}: ${(error as Error).message}`) }
    })
    await one.start!(host('one'))
    await one.run(job('wh_1'))
    await turns(5)
    clock.now += HOUR
    await one.run(job('wh_2')) // has it look for what is due
    await turns(5)
    t.same(started, ['one wh_1', 'one wh_2'])
    await two.start!(host('two'))
    await turns(5)
    t.same(started, ['one wh_1', 'one wh_2', 'two wh_1'])
    finish.resolve()
    await turns(5)
    t.match(told, [/^one: the job was taken over while it ran/])
    t.same(rows(handles[0]).map(({ key, state }) => [key, state]), [[`${ENDPOINT} wh_1`, 'done'], [`${ENDPOINT} wh_2`, 'done']])
    await Promise.all([one.close!(), two.close!()])
  })

  await t.test('back, durable: what waits, waits for as long as the clock was set back, and runs', async t => {
    const { handles: [db], clock } = shared(t)
    const runner = durable(db)
    await runner.run(job('wh_1'))
    const ran: string[] = []
    clock.now -= HOUR
    await runner.start!({ process: ({ webhookId }) => { ran.push(webhookId) }, report: error => { throw error } })
    await runner.run(job('wh_2'))
    await turns(5)
    t.same(ran, ['wh_2'], 'what comes afterwards does not wait')
    clock.now += HOUR - 1
    await runner.run(job('wh_3'))
    await turns(5)
    t.same(ran, ['wh_2', 'wh_3'])
    clock.now += 1
    await until('the first to run', () => ran.length === 3)
    t.same(ran, ['wh_2', 'wh_3', 'wh_1'])
    await runner.close!()
  })
})

t.test('durable over a restart', async t => {
  await t.test('what was acknowledged before a crash and had not run is run', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    const effects = join(t.testdirName, 'effects')
    const crashing = await Member.start(t, { effects, runner: 'durable', file, handle: HANDLE, lease: 100, hangs: true })
    const wire = await Wire.open(t, crashing.port)
    const ids = Array.from({ length: 20 }, (_, i) => `wh_${String(i).padStart(2, '0')}`)
    for (const id of ids) {
      const { headers, body } = batchFailed(id)
      await wire.write(request(Object.entries(headers), body))
      t.equal((await wire.answer()).status, 200)
    }
    await until('ten to be started', () => effectsIn(effects).length === 10)
    await crashing.kill()

    const db = open(t, file)
    const after = await withDurable(t, db)
    await until('all to be done', () => rows(db).every(({ state }) => state === 'done'))
    t.same(after.ran.sort(), ids)
    const attempts = new Map(rows(db).map(({ job, attempts }) => [(JSON.parse(job) as Job).webhookId, attempts]))
    for (const { webhookId } of effectsIn(effects)) t.equal(attempts.get(webhookId), 2, 'a start without an end is an attempt')
    // On a machine that is busy for longer than the lease, such a one is given back.
    t.ok([...attempts.values()].every(count => count <= 2), 'one that was about to be costs at most one')
  })

  await t.test('what had run does not run again when it is delivered again', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    const db = open(t, file)
    const before = await withDurable(t, db)
    const delivery = batchFailed('wh_1')
    t.equal(await answer(before.app, delivery), '200')
    await until('it to be done', () => rows(db)[0]?.state === 'done')
    await before.app.close()
    db.close()

    const after = await withDurable(t, open(t, file))
    t.equal(await answer(after.app, redelivered(delivery)), '200 duplicate')
    t.equal(await answer(after.app, batchFailed('wh_2')), '200')
    await until('the second to run', () => after.ran.length > 0)
    t.same(after.ran, ['wh_2'])
  })

  await t.test('starts that ended in a crash use up the attempts', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    const effects = join(t.testdirName, 'effects')
    for (let attempt = 1; attempt <= 2; attempt++) {
      const crashing = await Member.start(t, { effects, runner: 'durable', file, handle: HANDLE, lease: 100, hangs: true })
      if (attempt === 1) {
        const { headers, body } = batchFailed('wh_1')
        const wire = await Wire.open(t, crashing.port)
        await wire.write(request(Object.entries(headers), body))
        t.equal((await wire.answer()).status, 200)
      }
      await until('it to be started', () => effectsIn(effects).length === attempt)
      await crashing.kill()
    }
    const db = open(t, file)
    const last = await withDurable(t, db, { attempts: 3 })
    last.work = async () => { throw new Error('the last attempt') }
    await until('it to be dead', () => rows(db)[0]!.state === 'dead')
    t.same(last.ran, ['wh_1'])
    t.match(last.runner.dead(), [{ webhookId: 'wh_1', attempts: 3, errors: [{ handler: '#0', message: 'the last attempt' }] }])
  })

  await t.test('and where none is left, it is dead without another; of several runners one tells', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    const db = open(t, file)
    await durable(db).run({ webhookId: 'wh_1', timestamp: 1, endpoint: ENDPOINT, event: { type: 'batch.failed' } })
    db.exec('UPDATE openai_webhook_jobs SET attempts = 2') // as two starts would leave it
    const runners = [await withDurable(t, db, { attempts: 2 }), await withDurable(t, open(t, file), { attempts: 2 })]
    await until('it to be dead', () => rows(db)[0]!.state === 'dead')
    t.match(runners[0]!.runner.dead(), [{ webhookId: 'wh_1', attempts: 2, errors: [{ handler: null, message: 'the process ended while the handlers ran' }] }])
    for (const { app } of runners) t.equal(await answer(app, batchFailed()), '200')
    await until('the others to run', () => runners.flatMap(({ ran }) => ran).length === 2)
    t.notOk(runners.flatMap(({ ran }) => ran).includes('wh_1'))
    t.match(runners.flatMap(({ told }) => told), [{ message: 'the process ended while the handlers ran', webhookId: 'wh_1' }])
  })

  await t.test('what was done 75 h ago is forgotten; what is pending or dead is kept', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    const db = open(t, file)
    const before = await withDurable(t, db, { attempts: 1 })
    before.work = async webhookId => { if (webhookId === 'wh_dead') throw new Error('dead') }
    for (const id of ['wh_dead', 'wh_old', 'wh_young']) t.equal(await answer(before.app, batchFailed(id)), '200')
    await until('all to end', () => rows(db).every(({ state }) => state !== 'pending'))
    await before.app.close()
    db.prepare("UPDATE openai_webhook_jobs SET ended = ? WHERE key NOT LIKE '%young'").run(Date.now() - 75 * HOUR - 1)
    db.prepare("INSERT INTO openai_webhook_jobs (key, job, due) SELECT 'future', job, ? FROM openai_webhook_jobs LIMIT 1").run(Date.now() + HOUR)
    const after = await withDurable(t, db)
    t.equal(await answer(after.app, batchFailed('wh_new')), '200')
    await until('it to be done', () => rows(db).some(({ key, state }) => key.endsWith('wh_new') && state === 'done'))
    db.exec("DELETE FROM openai_webhook_jobs WHERE key LIKE '%new'")
    t.same(rows(db).map(({ key, state }) => [key, state]), [[`${ENDPOINT} wh_dead`, 'dead'], [`${ENDPOINT} wh_young`, 'done'], ['future', 'pending']])
  })
})

t.test('durable attempts again what failed', async t => {
  /** ms that each attempt was put off by. */
  async function delays (t: Teardown & { testdir: () => string }, options: DurableOptions): Promise<{ delays: number[], state: Awaited<ReturnType<typeof withDurable>>, db: Handle }> {
    const db = open(t, join(t.testdir(), 'webhooks.db'))
    const state = await withDurable(t, db, options)
    state.work = async () => { throw new Error(`failure ${state.ran.length}`) }
    const clock = stoppedClock(t)
    await answer(state.app, batchFailed('wh_1'))
    const delays: number[] = []
    for (let attempt = 1; ; attempt++) {
      await until('the attempt to be recorded', () => rows(db)[0]!.error === `1 of 1 handlers failed: failure ${attempt}`)
      const [row] = rows(db)
      if (row!.state === 'dead') return { delays, state, db }
      const wait = row!.due - Date.now()
      delays.push(wait)
      clock.advance(wait - 1)
      await turn()
      if (state.ran.length !== attempt) throw new Error('it was attempted too early')
      clock.advance(1)
    }
  }

  await t.test('and where a later version attempts it less often, it is dead with what its last attempt ended with', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    const before = await withDurable(t, open(t, file), { attempts: 16, backoff: 20 })
    before.work = async () => { throw new Error(`failure ${before.ran.length}`) }
    await answer(before.app, batchFailed('wh_1'))
    // Or more often: the third attempt may come before the second is seen.
    await until('it to have failed twice', () => /failure (?:[2-9]|1\d)$/.test(rows(open(t, file))[0]?.error ?? ''))
    await before.app.close()
    const { attempts, error } = rows(open(t, file))[0]!
    const after = await withDurable(t, open(t, file), { attempts: 2 })
    const died: DeadDelivery[] = []
    await until('it to be dead', async () => (died[0] = (await after.app.openaiWebhook.deadLetters.list())[0]!) !== undefined)
    t.match(died, [{ attempts, errors: [{ message: error!.replace('1 of 1 handlers failed: ', ''), stack: /^Error: failure \d+\n +at .*sqlite\.test/ }] }])
    t.same(after.ran, [])
    await until('it to be told', () => after.told.length > 0)
    t.match(after.told, [{ message: /^failure/, webhookId: 'wh_1' }])
  })

  await t.test('after waits that double, less a random part of up to half', async t => {
    const { delays: waits, state } = await delays(t, { attempts: 8, backoff: 1_000 })
    t.equal(waits.length, 7)
    waits.forEach((wait, i) => t.ok(wait >= 500 * 2 ** i && wait <= 1_000 * 2 ** i, `${wait} ms after attempt ${i + 1}`))
    t.equal(state.ran.length, 8)
    t.equal(state.told.filter(({ webhookId }) => webhookId === 'wh_1').length, 8, 'each failure is told')
  })

  await t.test('of at most an hour', async t => {
    const { delays: waits } = await delays(t, { attempts: 4, backoff: 3 * HOUR })
    t.equal(waits.length, 3)
    waits.forEach(wait => t.ok(wait >= HOUR / 2 && wait <= HOUR, `${wait} ms`))
  })

  await t.test('and keeps as dead what used up its attempts, for a person to look at and requeue', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    const db = open(t, file)
    const state = await withDurable(t, db, { attempts: 2 })
    const { app, ran, runner } = state
    state.work = async () => { throw new Error('no such batch'.padEnd(5_000, '.')) }
    const from = Date.now()
    for (const id of ['wh_1', 'wh_2', 'wh_3']) {
      t.equal(await answer(app, batchFailed(id)), '200')
      await until('it to be dead', () => runner.dead().some(({ webhookId }) => webhookId === id))
    }
    t.same(ran, ['wh_1', 'wh_1', 'wh_2', 'wh_2', 'wh_3', 'wh_3'])
    const [dead] = runner.dead(1)
    t.match(dead, { endpoint: ENDPOINT, webhookId: 'wh_1', event: { type: 'batch.failed', data: { id: 'batch_1' } }, attempts: 2, errors: [{ handler: '#0', message: /^no such batch/ }] })
    t.ok(dead!.errors[0]!.message.length <= 2_000 && dead!.diedAt >= from && dead!.diedAt <= Date.now())
    t.same(runner.dead().map(({ webhookId }) => webhookId), ['wh_1', 'wh_2', 'wh_3'], 'oldest first')
    t.same(runner.dead(2).map(({ webhookId }) => webhookId), ['wh_1', 'wh_2'])
    t.equal(await answer(app, batchFailed('wh_2')), '200 duplicate', 'delivered again, it stays as it is')
    t.same(runner.dead().length, 3)

    t.equal(runner.requeue(dead!), true)
    await until('it to use up its attempts again', () => runner.dead().length === 3 && ran.length === 8)
    state.work = async () => {}
    t.equal(runner.requeue({ endpoint: ENDPOINT, webhookId: 'wh_1' }), true)
    t.equal(runner.requeue({ endpoint: ENDPOINT, webhookId: 'wh_1' }), false, 'it is not dead any more')
    await until('it to be done', () => rows(db)[0]!.state === 'done')
    t.equal(runner.requeue({ endpoint: ENDPOINT, webhookId: 'wh_1' }), false)
    t.equal(runner.requeue({ endpoint: ENDPOINT, webhookId: 'wh_unknown' }), false)
    t.match(rows(db)[0], { attempts: 1, error: null })
    t.same(runner.dead().map(({ webhookId }) => webhookId), ['wh_2', 'wh_3'])
    rmSync(`${file}-wal`)
    t.throws(() => runner.requeue({ endpoint: ENDPOINT, webhookId: 'wh_2' }), { message: /-wal was deleted/ }, 'it would be lost with the log')
  })

  await t.test('and keeps what can be told of any failure', async t => {
    const db = open(t, join(t.testdir(), 'webhooks.db'))
    const failures: unknown[] = [null, 'a text', new Error('an error'), new Error('an answer', { cause: new Error('its cause') })]
    for (const [i, failure] of failures.entries()) {
      const runner = durable(db, { attempts: 1 })
      await runner.start!({ process: async () => { throw failure }, report () {} })
      await runner.run({ webhookId: `wh_${i}`, timestamp: 1, endpoint: ENDPOINT, event: { type: 'batch.failed' } })
      await until('it to be dead', () => runner.dead().length === i + 1)
      await runner.close!(new AbortController().signal)
    }
    t.same(rows(db).map(({ error }) => error), ['null', 'a text', 'an error', 'its cause'])
  })

  await t.test('and not what succeeded of it', async t => {
    const db = open(t, join(t.testdir(), 'webhooks.db'))
    const app = await build(t, { runner: durable(db, { backoff: 1 }), idempotency: { store: sqliteStore(db) } })
    const ran: string[] = []
    app.openaiWebhook.on('batch.failed', () => { ran.push('first') })
    app.openaiWebhook.on('batch.failed', () => {
      ran.push('second')
      if (ran.length === 2) throw new Error('only once')
    })
    await listen(app)
    t.equal(await answer(app, batchFailed()), '200')
    await until('it to be done', () => rows(db)[0]?.state === 'done')
    t.same(ran, ['first', 'second', 'second'])
  })
})

t.test('durable runners on one file', async t => {
  await t.test('never run one job at once, and each job once', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    const db = open(t, file)
    db.exec('PRAGMA busy_timeout = 1000')
    const running = new Set<string>()
    const ran: string[] = []
    let overlaps = 0
    const members = [await withDurable(t, db), await withDurable(t, open(t, file)), await withDurable(t, open(t, file))]
    for (const state of members) {
      state.work = async webhookId => {
        if (running.has(webhookId)) overlaps++
        running.add(webhookId)
        ran.push(webhookId)
        for (let i = 0; i < 5; i++) await turn()
        running.delete(webhookId)
      }
    }
    const ids = Array.from({ length: 300 }, (_, i) => `wh_${i}`)
    await Promise.all(ids.map(async (id, i) => await answer(members[i % 3]!.app, batchFailed(id))))
    await until('all to be done', () => rows(db).filter(({ state }) => state === 'done').length === ids.length)
    t.equal(overlaps, 0)
    t.same(ran.sort(), ids.sort())
  })

  await t.test('what was taken over while it ran is told, and left to the other', async t => {
    for (const fails of [false, true]) {
      const db = open(t, join(t.testdir(), 'webhooks.db'))
      const state = await withDurable(t, db, { lease: LONG })
      const { app, told } = state
      state.work = async () => {
        db.exec('UPDATE openai_webhook_jobs SET due = due + 1') // as another one that takes it would
        if (fails) throw new Error('the late one failed')
      }
      t.equal(await answer(app, batchFailed('wh_1')), '200')
      await until('it to be told', () => told.length === (fails ? 2 : 1))
      t.match(told[0], { message: /^the job was taken over while it ran/, webhookId: 'wh_1' })
      t.match(rows(db), [{ state: 'pending', attempts: 1, error: null }])
      await app.close()
      db.close()
    }
  })

  await t.test('what runs here longer than its lease is not started beside itself', async t => {
    const db = open(t, join(t.testdir(), 'webhooks.db'))
    const state = await withDurable(t, db, { lease: LONG })
    const finish = deferred()
    state.work = async webhookId => {
      if (webhookId !== 'wh_1' || state.ran.filter(each => each === 'wh_1').length > 1) return
      db.exec('UPDATE openai_webhook_jobs SET due = 0') // as a blocked event loop leaves it
      await finish.promise
    }
    t.equal(await answer(state.app, batchFailed('wh_1')), '200')
    await until('it to start', () => state.ran.length === 1)
    t.equal(await answer(state.app, batchFailed('wh_2')), '200')
    await until('the other to be done', () => rows(db)[1]!.state === 'done')
    t.same(state.ran, ['wh_1', 'wh_2'])
    t.match(rows(db)[0], { attempts: 1 })
    finish.resolve()
    await until('it to be done in another attempt', () => rows(db)[0]!.state === 'done')
    t.match(rows(db)[0], { attempts: 2 })
  })

  await t.test('of two that find a due job, one runs it', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    const db = open(t, file)
    let overtake = (): void => {}
    const runner = durable(overtaken(open(t, file), () => overtake()))
    for (const webhookId of ['wh_1', 'wh_2']) {
      await runner.run({ webhookId, timestamp: 1, endpoint: ENDPOINT, event: { type: 'batch.failed' } })
    }
    const ran: string[] = []
    overtake = () => { db.exec(`UPDATE openai_webhook_jobs SET due = ${Date.now() + LONG} WHERE key LIKE '% wh_2' AND attempts = 0`) }
    await runner.start!({ process: ({ webhookId }) => { ran.push(webhookId) }, report: error => { throw error } })
    await until('the first to be done', () => rows(db).some(({ state }) => state === 'done'))
    t.same(ran, ['wh_1'])
    t.match(rows(db), [{ state: 'done', attempts: 1 }, { state: 'pending', attempts: 0 }])
    await runner.close!(new AbortController().signal)
  })

  await t.test('of two that find a job without attempts left, one tells', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    const db = open(t, file)
    const jobs = ['wh_1', 'wh_2'].map(webhookId => ({ webhookId, timestamp: 1, endpoint: ENDPOINT, event: { type: 'batch.failed' } }))
    for (const job of jobs) await durable(db).run(job)
    db.exec('UPDATE openai_webhook_jobs SET attempts = 2')
    let transactions = -1
    const runner = durable(overtaken(open(t, file), () => {
      // The first is to make the file ready, the second takes them.
      if (transactions++ === 1) db.exec("UPDATE openai_webhook_jobs SET state = 'dead', error = 'told by the other', ended = 1 WHERE key LIKE '% wh_2'")
    }), { attempts: 2 })
    const told: Array<string | undefined> = []
    await runner.start!({ process: () => {}, report: (_error, job) => { told.push(job?.webhookId) } })
    await until('both to be dead', () => runner.dead().length === 2)
    await turn()
    t.same(told, ['wh_1'])
    await runner.close!(new AbortController().signal)
  })

  await t.test('a job of another process is found within a second', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    const db = open(t, file)
    const working = await withDurable(t, db)
    await until('it to have nothing to do', () => rows(db).length === 0)
    const receiving = durable(open(t, file)) // not started
    await receiving.run({ webhookId: 'wh_1', timestamp: 1, endpoint: ENDPOINT, event: { type: 'batch.failed' } })
    await until('the job to run', () => working.ran.length === 1)
  })
})

t.test('durable and app.close()', async t => {
  await t.test('waits for what runs, starts nothing, and takes nothing', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    const db = open(t, file)
    const state = await withDurable(t, db, { concurrency: 1 }, { closeTimeout: LONG })
    const { app, ran, runner } = state
    const finish = deferred()
    state.work = async () => await finish.promise
    t.equal(await answer(app, batchFailed('wh_1')), '200')
    t.equal(await answer(app, batchFailed('wh_2')), '200')
    await until('the first to start', () => ran.length === 1)
    const closing = runner.close!(new AbortController().signal)
    t.match(await messageOf(() => runner.run({ webhookId: 'wh_3', timestamp: 1, endpoint: ENDPOINT, event: { type: 'batch.failed' } })), 'no room')
    finish.resolve()
    await closing
    await app.close()
    t.same(ran, ['wh_1'])
    t.same(rows(db).map(({ state }) => state), ['done', 'pending'])
  })
})

/** Leaves a job that waits for its first attempt. */
function leave (db: Handle): void {
  const job: Job = { webhookId: 'wh_1', timestamp: 1, endpoint: ENDPOINT, event: thin('batch.failed') }
  db.prepare('INSERT INTO openai_webhook_jobs (key, job, due) VALUES (?, ?, 0)').run('left', JSON.stringify(job))
}

t.test('an attempt whose store answers once closeTimeout is over is given back, and costs none', async t => {
  for (const attempts of [1, 2]) {
    const db = open(t, join(t.testdir(), `${attempts}.db`))
    const asked = deferred()
    const granted = deferred()
    const memory = memoryStore()
    const store: IdempotencyStore = {
      ...memory,
      async begin (key, lease) {
        asked.resolve()
        await granted.promise
        return await memory.begin(key, lease)
      }
    }
    const runner = durable(db, { attempts, backoff: 1 })
    leave(db)
    const { app, ran } = await receiver(t, { runner, closeTimeout: 20, idempotency: { store } })
    await asked.promise
    await app.close()
    granted.resolve()
    while (rows(db)[0]!.attempts > 0) await turn()
    t.match(rows(db), [{ state: 'pending', attempts: 0 }])
    t.same(ran, [])
  }
})

t.test('an attempt that waits for another process when closeTimeout is over is given back before the app is closed', async t => {
  for (const attempts of [1, 2]) {
    const file = join(t.testdir(), `${attempts}.db`)
    const db = open(t, file)
    const asked = deferred()
    const store: IdempotencyStore = {
      ...memoryStore(),
      begin () {
        asked.resolve()
        return { state: 'running' }
      }
    }
    const runner = durable(db, { attempts, backoff: 1 })
    leave(db)
    const { app, ran } = await receiver(t, { runner, closeTimeout: 1, idempotency: { store } })
    await asked.promise
    await app.close()
    db.close()
    t.match(rows(open(t, file)), [{ state: 'pending', attempts: 0 }])
    t.same(ran, [])
  }
})

t.test('what ends as closeTimeout does is on record before the app is closed, though store and runner share a handle', async t => {
  for (const [outcome, attempts, left] of [
    ['fails', 1, [{ state: 'dead', attempts: 1, error: 'stopped' }]],
    ['fails', 2, [{ state: 'pending', attempts: 1, error: 'stopped' }]],
    ['succeeds', 1, [{ state: 'done', attempts: 1 }]]
  ] as const) {
    const file = join(t.testdir(), `${outcome}-${attempts}.db`)
    const db = open(t, file)
    const started = deferred()
    const app = await build(t, { runner: durable(db, { attempts }), closeTimeout: 20, idempotency: { store: sqliteStore(db) } })
    for (const name of ['import', 'bill', 'thank']) {
      app.openaiWebhook.on('batch.failed', async (_event, { signal }) => {
        await new Promise(resolve => {
          signal.addEventListener('abort', resolve)
          if (name === 'thank') started.resolve()
        })
        if (outcome === 'fails' && name === 'bill') throw new Error('stopped')
      }, { name })
    }
    await listen(app)
    t.equal(await answer(app, batchFailed('wh_1')), '200')
    await started.promise
    await app.close()
    db.close()
    t.match(rows(open(t, file)), left, `it ${outcome}, ${attempts} attempts`)
  }
})

t.test('an attempt whose store answers as closeTimeout ends is given back before the app is closed', async t => {
  const file = join(t.testdir(), 'webhooks.db')
  const db = open(t, file)
  const asked = deferred()
  const aborted = deferred()
  const stored = sqliteStore(db)
  const store: IdempotencyStore = {
    ...stored,
    async begin (key, lease) {
      asked.resolve()
      await aborted.promise
      return await stored.begin(key, lease)
    }
  }
  const queue = durable(db, { attempts: 1 })
  const runner: Runner = {
    ...queue,
    async close (signal) {
      signal?.addEventListener('abort', () => { aborted.resolve() })
      await queue.close?.(signal)
    }
  }
  leave(db)
  const { app, ran } = await receiver(t, { runner, closeTimeout: 20, idempotency: { store } })
  await asked.promise
  await app.close()
  db.close()
  t.match(rows(open(t, file)), [{ state: 'pending', attempts: 0 }])
  t.same(ran, [])
})
