import { join } from 'node:path'
import { PGlite } from '@electric-sql/pglite'
import pg from 'pg'
import type { PoolClient } from 'pg'
import t from 'tap'
import type { EventContext } from '../../lib/index.ts'
import { postgresInbox, postgresStore } from '../../lib/postgres/index.ts'
import { sqliteInbox } from '../../lib/sqlite/index.ts'
import { inboxContract, storeContract } from '../../lib/testing/index.ts'
import type { ContractCase, InboxUnderTest } from '../../lib/testing/index.ts'
import { PostgresServer, postgresMissing, startPgBouncer } from '../support/postgres.ts'
import { HANDLES, READING, closeSqlite, missing, openSqlite } from '../support/sqlite.mjs'
import type { Handle } from '../support/sqlite.mjs'

type Test = typeof t

async function keeps (t: Pick<Test, 'test'>, cases: ContractCase[]): Promise<void> {
  for (const { name, run } of cases) await t.test(name, run)
}

function onSqlite (db: Handle): InboxUnderTest<Handle> {
  db.exec('CREATE TABLE IF NOT EXISTS effects (row TEXT)')
  const add = (handle: Handle, row: string): void => { handle.prepare('INSERT INTO effects VALUES (?)').run(row) }
  // As the handle reads rows.
  const query = (text: string, values: string[]): unknown[] => db.prepare(text).all(...values)
  return {
    inbox: sqliteInbox(db),
    write: add,
    rows: () => db.prepare('SELECT row FROM effects').all().map(row => Array.isArray(row) ? row[0] : (row as { row: string }).row),
    transaction (work) {
      db.exec('BEGIN IMMEDIATE')
      try {
        work(query, row => { add(db, row) })
        db.exec('COMMIT')
      } catch (error) {
        db.exec('ROLLBACK')
        throw error
      }
    },
    outside: query
  }
}

function onPool (pool: pg.Pool): InboxUnderTest<PoolClient> {
  const insert = 'INSERT INTO effects VALUES ($1)'
  return {
    inbox: postgresInbox(pool),
    async write (tx, row) { await tx.query(insert, [row]) },
    rows: async () => (await pool.query('SELECT row FROM effects')).rows.map(({ row }) => row as string),
    async transaction (work) {
      const client = await pool.connect()
      try {
        await client.query('BEGIN')
        await work(async (text, values) => await client.query(text, values), async row => { await client.query(insert, [row]) })
        await client.query('COMMIT')
      } catch (error) {
        await client.query('ROLLBACK')
        throw error
      } finally {
        client.release()
      }
    },
    outside: async (text, values) => await pool.query(text, values)
  }
}

for (const { name, skip, open } of [...HANDLES.map(name => ({ name, skip: missing[name], open: (file: string) => openSqlite(file, name) })), ...READING]) {
  t.test(`sqliteInbox, ${name}`, { skip }, async t => {
    const db = open(join(t.testdir(), 'webhooks.db'))
    t.teardown(() => closeSqlite(db))
    const under = onSqlite(db)
    t.teardown(async () => await under.inbox.close?.())
    await keeps(t, inboxContract(() => under))
    for (const [ending, rows] of [['ROLLBACK', []], ['COMMIT', ['before']]] as const) {
      db.exec('DELETE FROM effects')
      const once = under.inbox.once(`settle after ${ending}`, tx => {
        under.write(tx, 'before')
        tx.prepare(ending).run()
        under.write(tx, 'after')
      })
      t.equal(await overAfter(once, ending), 'FST_OPENAI_WEBHOOK_TRANSACTION_OVER')
      t.same(await under.rows(), rows, `${ending}, and nothing after it`)
    }
  })
}

/** Runs a handler whose work ends its transaction. @returns the code of its error */
async function overAfter (handler: (this: never, event: object, context: EventContext) => unknown, webhookId: string): Promise<unknown> {
  try {
    await handler.call({} as never, {}, { webhookId, endpoint: '/', signal: new AbortController().signal } as EventContext)
    return 'none'
  } catch (error) {
    return (error as { code?: unknown }).code
  }
}

t.test('PGlite', async t => {
  const db = await PGlite.create()
  t.teardown(async () => await db.close())
  await db.exec('CREATE TABLE effects (row text)')
  const inbox = postgresInbox(db)
  t.teardown(async () => await inbox.close())
  const insert = 'INSERT INTO effects VALUES ($1)'
  await t.test('first() in a transaction is the first of all to need the table', async t => {
    const first = async (): Promise<boolean> => await db.transaction(async tx => (
      await inbox.first(async (text, values) => await tx.query(text, values), 'settle', { webhookId: 'wh_1', endpoint: '/' })))
    t.equal(await first(), true)
    t.equal(await first(), false)
  })
  await t.test('postgresInbox', async t => await keeps(t, inboxContract(() => ({
    inbox,
    async write (tx, row) { await tx.query(insert, [row]) },
    rows: async () => (await db.query<{ row: string }>('SELECT row FROM effects')).rows.map(({ row }) => row),
    async transaction (work) {
      await db.transaction(async tx => await work(async (text, values) => await tx.query(text, values), async row => { await tx.query(insert, [row]) }))
    },
    outside: async (text, values) => await db.query(text, values)
  }))))
  await t.test('work that says ROLLBACK is not taken for done, work that says COMMIT is', async t => {
    const context = { webhookId: 'wh_rollback', endpoint: '/', signal: new AbortController().signal } as EventContext
    let ending = 'ROLLBACK'
    let runs = 0
    const handler = inbox.once('settle', async tx => {
      runs++
      await tx.query(ending)
    })
    const run = async (): Promise<void> => { await handler.call({} as never, {}, context) }
    await t.rejects(run(), { code: 'FST_OPENAI_WEBHOOK_ROLLED_BACK' })
    ending = 'COMMIT'
    await run()
    await run()
    t.equal(runs, 2)
  })
  const store = postgresStore(db)
  await t.test('postgresStore', async t => await keeps(t, storeContract(() => store)))
})

t.test('PostgreSQL', { skip: postgresMissing }, async t => {
  const server = await PostgresServer.start(t)
  const ports = { 'by pg': server.port, 'by pg, through PgBouncer in transaction mode': await startPgBouncer(t, server) }
  for (const [name, port] of Object.entries(ports)) {
    await t.test(name, async t => {
      const pool = new pg.Pool({ host: '127.0.0.1', port, user: 'postgres', database: 'postgres' })
      t.teardown(async () => await pool.end())
      await pool.query('CREATE TABLE IF NOT EXISTS effects (row text)')
      const under = onPool(pool)
      t.teardown(async () => await under.inbox.close?.())
      await t.test('postgresInbox', async t => await keeps(t, inboxContract(() => under)))
      await t.test('work that has ended its transaction writes no more', async t => {
        for (const [ending, rows] of [['ROLLBACK', []], ['COMMIT', ['before']]] as const) {
          await pool.query('DELETE FROM effects')
          const once = under.inbox.once(`settle after ${ending}, ${name}`, async tx => {
            await under.write(tx, 'before')
            await tx.query(ending)
            await under.write(tx, 'after')
          })
          t.equal(await overAfter(once, ending), 'FST_OPENAI_WEBHOOK_TRANSACTION_OVER')
          t.same(await under.rows(), rows, `${ending}, and nothing after it`)
        }
        await pool.query('DELETE FROM effects')
      })
      const store = postgresStore(pool)
      await t.test('postgresStore', async t => await keeps(t, storeContract(() => store)))
    })
  }
})
