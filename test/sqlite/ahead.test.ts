import { AsyncLocalStorage } from 'node:async_hooks'
import { join } from 'node:path'
import { setImmediate as turn } from 'node:timers/promises'
import t from 'tap'
import type { Test } from 'tap'
import type { Job, RunnerHost } from '../../lib/index.ts'
import { durable } from '../../lib/sqlite/index.ts'
import type { DurableOptions, DurableRunner } from '../../lib/sqlite/index.ts'
import { until } from '../support/faults.ts'
import { closeSqlite, openSqlite } from '../support/sqlite.mjs'
import type { Handle, HandleName } from '../support/sqlite.mjs'

// What durable() has put on record with its first attempt, and has not started since there is no room.

const LEASE = 30_000
const ENDPOINT = '/webhooks/openai'
const HANDLE = (process.env['SQLITE_HANDLE'] ?? 'libsql') as HandleName

const job = (webhookId: string): Job => ({ webhookId, timestamp: 1, endpoint: ENDPOINT, event: { type: 'batch.failed' } })

async function turns (count: number): Promise<void> {
  for (let i = 0; i < count; i++) await turn()
}

function open (t: Test, file: string): Handle {
  const db = openSqlite(file, HANDLE)
  db.exec('PRAGMA busy_timeout = 1')
  t.teardown(() => closeSqlite(db))
  return db
}

interface Row { key: string, state: string, attempts: number, due: number }
const rows = (db: Handle): Row[] => db.prepare('SELECT key, state, attempts, due FROM openai_webhook_jobs ORDER BY key').all() as Row[]

/** Processes that share a file. Their time of day moves when it is told to, and their leases are renewed likewise. */
function shared (t: Test) {
  const file = join(t.testdir(), 'webhooks.db')
  const clock = { now: Date.now() }
  t.intercept(Date, 'now', { value: () => clock.now })
  const renewals: Array<() => void> = []
  t.intercept(globalThis, 'setInterval', { value: (work: () => void) => ({ unref: () => { renewals.push(work) } }) })
  const started: string[] = []
  const told: string[] = []
  const letGo: string[] = []

  async function member (name: string, options: DurableOptions = {}) {
    const db = open(t, file)
    const runner = durable(db, { lease: LEASE, ...options })
    const running = new Map<string, () => void>()
    const host: RunnerHost = {
      async process ({ webhookId }) {
        started.push(`${name} ${webhookId}`)
        await new Promise<void>(resolve => { running.set(webhookId, resolve) })
      },
      keep: ({ webhookId }) => () => { letGo.push(`${name} ${webhookId}`) },
      report: error => { told.push(`${name}: ${(error as Error).message}`) }
    }
    await runner.start!(host)
    t.teardown(async () => {
      for (const finish of running.values()) finish()
      await runner.close!()
      closeSqlite(db)
    })
    return { db, runner, finish: (...webhookIds: string[]) => { for (const id of webhookIds) running.get(id)!() } }
  }
  return { clock, renewals, started, told, letGo, member, file }
}

async function runAll (runner: DurableRunner, ...webhookIds: string[]): Promise<void> {
  await Promise.all(webhookIds.map(async id => await runner.run(job(id))))
  await turns(3)
}

t.test('a process that was suspended for longer than the lease starts nothing that another has taken over', async t => {
  for (const renews of [false, true]) {
    await t.test(renews ? 'and has seen that as it renewed its leases' : 'and has not renewed its leases yet', async t => {
      const { clock, renewals, started, told, letGo, member } = shared(t)
      const one = await member('one', { concurrency: 1 })
      await runAll(one.runner, 'wh_1', 'wh_2', 'wh_3')
      t.same(started, ['one wh_1'])
      clock.now += LEASE
      const two = await member('two')
      await until('the other to take over', () => started.length === 4)
      two.finish('wh_2', 'wh_3')
      await turns(3)
      if (renews) {
        for (const renew of renewals) renew()
        await turns(3)
        t.same(letGo, ['one wh_2', 'one wh_3'], 'whoever has them may claim them')
      }
      for (const { finish } of [one, two]) finish('wh_1')
      await turns(5)
      t.same(started.slice(1).sort(), ['two wh_1', 'two wh_2', 'two wh_3'])
      t.same(letGo, ['one wh_2', 'one wh_3'])
      t.match(told, [/^one: the job was taken over while it ran/])
      t.match(rows(one.db), [{ attempts: 2 }, { state: 'done', attempts: 2 }, { state: 'done', attempts: 2 }])
    })
  }
})

t.test('what nobody has taken over meanwhile is started, and has not lost an attempt', async t => {
  for (const renews of [false, true]) {
    await t.test(renews ? 'once its lease was renewed' : 'before its lease is renewed', async t => {
      const { clock, renewals, started, told, member } = shared(t)
      const { db, runner, finish } = await member('one', { concurrency: 1 })
      await runAll(runner, 'wh_1', 'wh_2')
      clock.now += LEASE
      if (renews) {
        for (const renew of renewals) renew()
        await turns(2)
        t.ok(rows(db).every(({ due }) => due > clock.now))
      }
      finish('wh_1')
      await until('the second to start', () => started.length === 2)
      finish('wh_2')
      await until('both to be done', () => rows(db).every(({ state }) => state === 'done'))
      t.same(started, ['one wh_1', 'one wh_2'])
      t.same(rows(db).map(({ attempts }) => attempts), [1, 1])
      t.same(told, [])
    })
  }
})

t.test('what waits is not started while nothing can be written, since it would have to run again', async t => {
  for (const another of [true, false]) {
    await t.test(`afterwards it is, ${another ? 'with the next delivery' : 'within a second'}`, async t => {
      const { started, told, member } = shared(t)
      const { db, runner, finish } = await member('one', { concurrency: 1 })
      await runAll(runner, 'wh_1', 'wh_2', 'wh_3')
      const { exec } = db
      let isFull = true
      t.intercept(db as { exec: (sql: string) => unknown }, 'exec', {
        value (sql: string) {
          if (isFull && sql === 'COMMIT') throw new Error('database or disk is full')
          return Reflect.apply(exec, db, [sql])
        }
      })
      finish('wh_1')
      await until('that to be told', () => told.length === 1)
      finish('wh_2') // was started before it was known
      await until('that to be told', () => told.length === 2)
      await turns(5)
      t.same(started, ['one wh_1', 'one wh_2'])
      isFull = false
      if (another) await runner.run(job('wh_4'))
      await until('the third to start', () => started.length === 3)
      t.same(started.at(-1), 'one wh_3')
    })
  }
})

t.test('a lease begins when there is the lock to write it, not when that was asked for', async t => {
  const { clock, started, member } = shared(t)
  const { db, runner, finish } = await member('one', { concurrency: 1 })
  const due = (): number => rows(db).at(-1)!.due
  const queued = runner.run(job('wh_1'))
  clock.now += LEASE
  await queued
  t.equal(due(), clock.now + LEASE)
  await until('it to start', () => started.length === 1)

  db.exec(`INSERT INTO openai_webhook_jobs (key, job, due) VALUES ('${ENDPOINT} wh_2', '${JSON.stringify(job('wh_2'))}', 0)`)
  finish('wh_1')
  await runner.run(job('wh_1')) // has it look for what is due
  const exec = db.exec.bind(db)
  t.intercept(db as { exec: (sql: string) => unknown }, 'exec', {
    value (sql: string) {
      if (/^BEGIN/.test(sql)) clock.now += LEASE
      return exec(sql)
    }
  })
  await until('what was due to start', () => started.length === 2)
  t.equal(due(), clock.now + LEASE)
})

t.test('a job that cannot be read is told, and stops neither the process nor the others', async t => {
  const { started, told, member, file } = shared(t)
  const db = open(t, file)
  const receiving = durable(db) // not started
  for (const id of ['wh_1', 'wh_2']) await receiving.run(job(id))
  db.exec("UPDATE openai_webhook_jobs SET job = '{' WHERE key LIKE '% wh_1'")
  const { finish } = await member('one', { concurrency: 1 })
  await until('the other to start', () => started.length > 0)
  finish('wh_2')
  await until('the other to be done', () => rows(db)[1]!.state === 'done')
  t.match(told, [/^one: .*JSON/])
  t.match(rows(db)[0], { state: 'pending', attempts: 1 })
})

t.test('leases are renewed in the async context of no request', async t => {
  const { member, started } = shared(t)
  const context = new AsyncLocalStorage<string>()
  const found: unknown[] = []
  t.intercept(globalThis, 'setInterval', {
    value () {
      found.push(context.getStore())
      return { unref () {} }
    }
  })
  const { runner } = await member('one')
  await context.run('first', async () => await runner.run(job('wh_1')))
  await until('it to start', () => started.length === 1)
  t.same(found, [undefined])
})
