import { join } from 'node:path'
import { setImmediate as turn } from 'node:timers/promises'
import t from 'tap'
import { memoryStore } from '../../lib/index.ts'
import type { OpenAIWebhookOptions, RunnerHost } from '../../lib/index.ts'
import { Database } from '../../lib/sqlite/database.ts'
import type { SqliteDatabase, SqliteStatement } from '../../lib/sqlite/index.ts'
import { durable, sqliteStore } from '../../lib/sqlite/index.ts'
import { build } from '../support/deliveries.ts'
import { IN_PROGRESS, UNAVAILABLE, answer, batchFailed, until } from '../support/faults.ts'
import { deferred, listen, redelivered } from '../support/observe.ts'
import { closeSqlite, openSqlite } from '../support/sqlite.mjs'
import type { Handle } from '../support/sqlite.mjs'

type Context = { teardown: (fn: () => unknown) => void, testdir: () => string }

/** ms; does not run out while a test lasts. */
const LONG = 600_000
const ENDPOINT = '/webhooks/openai'

/** A handle that tells of its transactions, and in which COMMIT may go wrong. */
interface Watched {
  db: Handle
  handle: SqliteDatabase
  /** As they are run. */
  transactions: string[]
  commit: (commit: () => unknown) => unknown
  commits: () => number
}

function watched (t: Context): Watched {
  const db = openSqlite(join(t.testdir(), 'webhooks.db'), 'libsql')
  db.exec('PRAGMA busy_timeout = 1')
  t.teardown(() => closeSqlite(db))
  const state: Watched = {
    db,
    transactions: [],
    commit: commit => commit(),
    handle: {
      prepare: (sql: string) => db.prepare(sql) as SqliteStatement,
      exec (sql: string) {
        if (!/^(?:BEGIN|COMMIT|ROLLBACK)/.test(sql)) return db.exec(sql)
        state.transactions.push(sql)
        return sql === 'COMMIT' ? state.commit(() => db.exec(sql)) : db.exec(sql)
      }
    },
    commits: () => state.transactions.filter(sql => sql === 'COMMIT').length
  }
  return state
}

interface JobRow { key: string, state: string, attempts: number, due: number }
const jobs = (db: Handle): JobRow[] => db.prepare('SELECT key, state, attempts, due FROM openai_webhook_jobs ORDER BY key').all() as JobRow[]
const claims = (db: Handle): unknown[] => db.prepare('SELECT key, done, token IS NOT NULL AS held FROM openai_webhook_deliveries ORDER BY key').all()

async function receiving (t: Context, options: OpenAIWebhookOptions, handler: (webhookId: string) => void | Promise<void> = () => {}) {
  const app = await build(t, options)
  const ran: string[] = []
  app.openaiWebhook.on('batch.failed', (_event, { webhookId }) => {
    ran.push(webhookId)
    return handler(webhookId)
  })
  await listen(app)
  return { app, ran }
}

t.test('what is written in one turn is one transaction', async t => {
  await t.test('and is answered once that is committed', async t => {
    const { db, handle, transactions, commits } = watched(t)
    const store = sqliteStore(handle)
    const runner = durable(handle)
    transactions.length = 0
    let answered = 0
    const writes = Array.from({ length: 50 }, async (_, n) => {
      const claim = await store.begin(`key ${n}`, LONG)
      answered++
      return claim
    })
    const queued = runner.run({ webhookId: 'wh_1', timestamp: 1, endpoint: ENDPOINT, event: { type: 'batch.failed' } })
    t.same(transactions, [], 'nothing is written at once')
    t.equal(answered, 0)
    const given = await Promise.all(writes)
    t.same(transactions, ['BEGIN IMMEDIATE', 'COMMIT'], 'a store and a runner on one handle share it')
    t.ok(given.every(({ state }) => state === 'claimed'))
    t.equal(await queued, undefined)
    t.equal(claims(db).length, 50)

    await Promise.all(given.map(async (claim, n) => { if (claim.state === 'claimed') await store.complete(`key ${n}`, claim.token, LONG) }))
    t.equal(commits(), 2)
  })

  await t.test('in which the first of two that claim the same has it', async t => {
    const { handle, transactions } = watched(t)
    const [store, other] = [sqliteStore(handle), sqliteStore(handle)]
    transactions.length = 0
    t.match(await Promise.all([store.begin('key', LONG), other.begin('key', LONG)]), [{ state: 'claimed' }, { state: 'running' }])
    t.same(transactions, ['BEGIN IMMEDIATE', 'COMMIT'])
  })

  await t.test('into which nothing else of the handle gets', async t => {
    const { db, handle } = watched(t)
    db.exec('CREATE TABLE orders (id)')
    const database = new Database(handle, 'CREATE TABLE ours (id)')
    const failing = database.write(() => {
      db.exec("INSERT INTO ours VALUES ('rolled back')")
      throw new Error('no')
    })
    db.exec("INSERT INTO orders VALUES ('of the user')")
    await t.rejects(failing, { message: 'no' })
    t.same(db.prepare('SELECT * FROM orders').all(), [{ id: 'of the user' }])
    t.same(db.prepare('SELECT * FROM ours').all(), [])
  })
})

t.test('a statement that fails takes none of its neighbours with it', async t => {
  const { db, handle } = watched(t)
  const database = new Database(handle, 'CREATE TABLE ours (id UNIQUE)')
  const insert = database.prepare('INSERT INTO ours VALUES (?)')
  const write = async (id: string): Promise<number | bigint> => await database.write(() => insert.run(id).changes)
  const results = await Promise.allSettled(['a', 'b', 'a', 'c'].map(write))
  t.same(results.map(({ status }) => status), ['fulfilled', 'fulfilled', 'rejected', 'fulfilled'])
  t.match((results[2] as PromiseRejectedResult).reason, { message: /UNIQUE/ })
  t.same(db.prepare('SELECT id FROM ours ORDER BY id').all(), [{ id: 'a' }, { id: 'b' }, { id: 'c' }])
})

t.test('a commit that fails', async t => {
  await t.test('answers all of its deliveries 503 and loses none', async t => {
    const state = watched(t)
    const { db, handle } = state
    const { app, ran } = await receiving(t, { idempotency: { store: sqliteStore(handle) } })
    const deliveries = Array.from({ length: 5 }, (_, n) => batchFailed(`wh_${n}`))
    state.commit = () => { throw new Error('database or disk is full') }
    t.same(await Promise.all(deliveries.map(async delivery => await answer(app, delivery))), Array(5).fill(UNAVAILABLE))
    t.same([ran, claims(db)], [[], []])
    state.commit = commit => commit()
    t.same(await Promise.all(deliveries.map(async delivery => await answer(app, redelivered(delivery)))), Array(5).fill('200'))
    t.equal(ran.length, 5)
  })

  await t.test('and was made all the same, as by a crash before the answer: claimed until the lease is over, and then processed once', async t => {
    const state = watched(t)
    const { db, handle } = state
    const { app, ran } = await receiving(t, { idempotency: { store: sqliteStore(handle), lease: LONG } })
    const delivery = batchFailed('wh_1')
    state.commit = commit => {
      commit()
      throw new Error('disk I/O error')
    }
    t.equal(await answer(app, delivery), UNAVAILABLE)
    state.commit = commit => commit()
    t.equal(await answer(app, redelivered(delivery)), IN_PROGRESS)
    t.same(ran, [])
    db.exec('UPDATE openai_webhook_deliveries SET ends = 0')
    t.equal(await answer(app, redelivered(delivery)), '200')
    t.equal(await answer(app, redelivered(delivery)), '200 duplicate')
    t.same(ran, ['wh_1'])
  })

  await t.test('and was made all the same: what is queued is queued once, and run once its attempt is over', async t => {
    const state = watched(t)
    const { db, handle } = state
    const { app, ran } = await receiving(t, { idempotency: { store: memoryStore() }, runner: durable(handle, { lease: LONG }) })
    const delivery = batchFailed('wh_1')
    state.commit = commit => {
      commit()
      throw new Error('disk I/O error')
    }
    t.equal(await answer(app, delivery), UNAVAILABLE)
    state.commit = commit => commit()
    t.equal(await answer(app, redelivered(delivery)), '200 duplicate')
    t.same(ran, [])
    db.exec('UPDATE openai_webhook_jobs SET due = 0') // as when the lease is over
    await until('it to be done', () => jobs(db)[0]!.state === 'done')
    t.same(ran, ['wh_1'])
  })

  await t.test('what can neither be written nor read is told by what kept it from being written', async t => {
    const { handle } = watched(t)
    const database = new Database(handle, 'CREATE TABLE ours (id)')
    handle.exec('BEGIN')
    const unreadable = (): never => { throw new Error('nor read') }
    await t.rejects(database.write(() => 'written', unreadable), { message: /within a transaction/ })
    t.equal(await database.write(() => 'written', () => 'read'), 'read')
    await t.rejects(database.write(() => 'written', () => undefined), { message: /within a transaction/ })
    handle.exec('COMMIT')
    t.equal(await database.write(() => 'written', unreadable), 'written')
  })
})

t.test('durable() beside sqliteStore() on one handle', async t => {
  await t.test('makes three commits of a delivery: claimed; queued; processed and done', async t => {
    const { db, handle, transactions, commits } = watched(t)
    const { app, ran } = await receiving(t, { idempotency: { store: sqliteStore(handle) }, runner: durable(handle) })
    transactions.length = 0
    t.equal(await answer(app, batchFailed('wh_1')), '200')
    await until('it to be done', () => jobs(db)[0]?.state === 'done')
    t.equal(commits(), 3)
    t.match(claims(db), [{ done: 1, held: 0 }])
    t.match(jobs(db), [{ attempts: 1 }])
    t.same(ran, ['wh_1'])
  })

  await t.test('keeps the claim for its handlers: what comes again before they start is a duplicate', async t => {
    const { db, handle } = watched(t)
    const finish = deferred()
    const { app, ran } = await receiving(t, { idempotency: { store: sqliteStore(handle) }, runner: durable(handle, { concurrency: 1 }) }, async () => await finish.promise)
    t.equal(await answer(app, batchFailed('wh_1')), '200')
    await until('the first to start', () => ran.length === 1)
    const waiting = batchFailed('wh_2')
    t.equal(await answer(app, waiting), '200')
    t.match(claims(db), [{ held: 1 }, { held: 1 }])
    t.equal(await answer(app, redelivered(waiting)), '200 duplicate')
    finish.resolve()
    await until('both to be done', () => jobs(db).every(({ state }) => state === 'done'))
    t.same(ran, ['wh_1', 'wh_2'])
  })

  await t.test('gives back what waits for room when the app closes, and what has just been queued', async t => {
    const { db, handle } = watched(t)
    const finish = deferred()
    const options: OpenAIWebhookOptions = { idempotency: { store: sqliteStore(handle) }, runner: durable(handle, { concurrency: 1 }) }
    const { app, ran } = await receiving(t, options, async () => await finish.promise)
    t.equal(await answer(app, batchFailed('wh_1')), '200')
    await until('the first to start', () => ran.length === 1)
    t.equal(await answer(app, batchFailed('wh_2')), '200')
    const closed = app.close()
    await until('the second to be given back', () => jobs(db)[1]!.attempts === 0)
    t.ok(jobs(db)[1]!.due <= Date.now())
    finish.resolve()
    await closed
    t.same(ran, ['wh_1'])
    t.match(claims(db), [{ done: 1, held: 0 }, { done: 0, held: 0 }])

    const next = await receiving(t, { idempotency: { store: sqliteStore(handle) }, runner: durable(handle) })
    await until('it to be done', () => jobs(db).every(({ state }) => state === 'done'))
    t.same(next.ran, ['wh_2'])
  })
})

t.test('durable()', async t => {
  const job = (webhookId: string) => ({ webhookId, timestamp: 1, endpoint: ENDPOINT, event: { type: 'batch.failed' } })
  const hostOf = (process: RunnerHost['process'], told: unknown[] = []): RunnerHost => ({ process, report: error => { told.push(error) } })

  await t.test('runs no more at once than it may, and those in the order in which they came', async t => {
    const { db, handle } = watched(t)
    const runner = durable(handle, { concurrency: 2 })
    const running = new Set<string>()
    const started: string[] = []
    let most = 0
    await runner.start!(hostOf(async ({ webhookId }) => {
      started.push(webhookId)
      running.add(webhookId)
      most = Math.max(most, running.size)
      await turn()
      running.delete(webhookId)
    }))
    const ids = Array.from({ length: 300 }, (_, n) => `wh_${String(n).padStart(3, '0')}`)
    await Promise.all(ids.map(async id => await runner.run(job(id))))
    await until('all to be done', () => jobs(db).every(({ state }) => state === 'done'))
    t.equal(most, 2)
    t.same(started.slice(0, 200), ids.slice(0, 200))
    t.same(started.sort(), ids, 'beyond 200 the file is looked into for what is due')
    t.equal(runner.depth!(), 0)
    await runner.close!()
  })

  await t.test('does not spend a last attempt on what waits for room', async t => {
    const { db, handle } = watched(t)
    const runner = durable(handle, { concurrency: 1, attempts: 1 })
    const finish = deferred()
    await runner.start!(hostOf(async () => await finish.promise))
    await Promise.all(['wh_1', 'wh_2', 'wh_3'].map(async id => await runner.run(job(id))))
    t.same(jobs(db).map(({ attempts }) => attempts), [1, 0, 0])
    await turn()
    t.equal(runner.depth!(), 2)
    finish.resolve()
    await until('all to be done', () => jobs(db).every(({ state }) => state === 'done'))
    await runner.close!()
  })

  await t.test('what was being queued as the app closed is left to the next process', async t => {
    const { db, handle } = watched(t)
    const runner = durable(handle)
    const ran: string[] = []
    await runner.start!(hostOf(({ webhookId }) => { ran.push(webhookId) }))
    const queued = runner.run(job('wh_1'))
    const closed = runner.close!()
    t.equal(await queued, undefined)
    await closed
    t.match(jobs(db), [{ state: 'pending', attempts: 0 }])
    t.same(ran, [])
  })

  await t.test('what cannot be given back is told, and left to its lease', async t => {
    const state = watched(t)
    const told: unknown[] = []
    const runner = durable(state.handle, { concurrency: 1 })
    const finish = deferred()
    await runner.start!(hostOf(async () => await finish.promise, told))
    await Promise.all(['wh_1', 'wh_2'].map(async id => await runner.run(job(id))))
    await turn()
    state.commit = () => { throw new Error('database or disk is full') }
    const closed = runner.close!()
    await until('it to be told', () => told.length === 1)
    state.commit = commit => commit()
    finish.resolve()
    await closed
    t.match(told, [{ message: 'database or disk is full' }])
    t.match(jobs(state.db), [{ state: 'done' }, { state: 'pending', attempts: 1 }])
  })

  await t.test('a success that is recorded in the commit that renews it counts', async t => {
    const { db, handle, transactions, commits } = watched(t)
    let renew = (): void => {}
    t.intercept(globalThis, 'setInterval', { value: (work: () => void) => ({ unref: () => { renew = work } }) })
    const told: unknown[] = []
    const runner = durable(handle, { lease: LONG })
    const finish = deferred()
    await runner.start!(hostOf(async (_job, _attempt, onSuccess) => {
      await finish.promise
      await onSuccess?.()
    }, told))
    await runner.run(job('wh_1'))
    await turn()
    transactions.length = 0
    renew()
    finish.resolve()
    await until('it to be done', () => jobs(db)[0]!.state === 'done')
    t.equal(commits(), 1)
    t.same(told, [])
    await runner.close!()
  })
})
