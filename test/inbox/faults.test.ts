import type { ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import pg from 'pg'
import type { PoolClient } from 'pg'
import t from 'tap'
import { memoryStore } from '../../lib/index.ts'
import { postgresInbox } from '../../lib/postgres/index.ts'
import { sqliteInbox } from '../../lib/sqlite/index.ts'
import { redisStore } from '../../lib/stores/redis.ts'
import { SECRET, build, post } from '../support/deliveries.ts'
import { answer, batchFailed, deliverUntil200, redisClient, until } from '../support/faults.ts'
import { deferred, redelivered } from '../support/observe.ts'
import { PostgresServer, postgresMissing } from '../support/postgres.ts'
import { forkProgram } from '../support/program.mjs'
import { RedisServer, redisMissing } from '../support/redis.ts'
import { long } from '../support/size.ts'
import { openSqlite } from '../support/sqlite.mjs'
import { Wire, request } from '../support/wire.ts'

// An effect that is made through an inbox is there exactly once, whatever fails: each of these with the real thing.

type Teardown = { teardown: (fn: () => unknown) => void }

let server: PostgresServer
let databases = 0

t.before(async () => {
  if (postgresMissing === false) server = await PostgresServer.start(t)
})

/** A database of its own, with a table of effects. */
async function fresh (t: Teardown): Promise<{ url: string, admin: pg.Pool, effects: () => Promise<string[]> }> {
  const name = `faults_${++databases}`
  const root = poolOf(t, { connectionString: server.url, max: 1 })
  await root.query(`CREATE DATABASE ${name} TEMPLATE template0`)
  const url = server.url.replace(/postgres$/, name)
  const admin = poolOf(t, { connectionString: url, max: 2 })
  await admin.query('CREATE TABLE effects (webhook_id text)')
  return { url, admin, effects: async () => (await admin.query('SELECT webhook_id FROM effects ORDER BY 1')).rows.map(row => (row as { webhook_id: string }).webhook_id) }
}

function poolOf (t: Teardown, options: pg.PoolConfig): pg.Pool {
  const pool = new pg.Pool(options)
  pool.on('error', () => {})
  t.teardown(async () => await pool.end())
  return pool
}

const add = async (tx: PoolClient, webhookId: string): Promise<unknown> => await tx.query('INSERT INTO effects VALUES ($1)', [webhookId])

long(t, 'a process that is stopped for longer than its lease, and goes on', {}, async t => {
  const LEASE = 200

  async function start (t: Teardown, options: object): Promise<{ child: ChildProcess, port: number }> {
    const child = forkProgram(fileURLToPath(new URL('../support/processes/zombie.mjs', import.meta.url)), [JSON.stringify({ secret: SECRET, lease: LEASE, ...options })])
    t.teardown(async () => {
      const exited = once(child, 'exit')
      child.kill('SIGKILL')
      await exited
    })
    const [{ port }] = await once(child, 'message') as [{ port: number }]
    return { child, port }
  }

  async function send (t: Teardown, port: number, delivery: ReturnType<typeof batchFailed>): Promise<number> {
    const wire = await Wire.open(t, port)
    await wire.write(request(Object.entries(delivery.headers), delivery.body))
    const { status } = await wire.answer()
    wire.socket.destroy()
    return status
  }

  const databases: Record<string, { skip: string | false, open: (t: Teardown & { testdir: () => string }) => Promise<{ options: { postgresUrl?: string, file?: string, goesOn?: string }, effects: () => Promise<string[]> }> }> = {
    PostgreSQL: {
      skip: postgresMissing,
      async open (t) {
        const { url, effects } = await fresh(t)
        return { options: { postgresUrl: url }, effects }
      }
    },
    SQLite: {
      skip: false,
      async open (t) {
        const dir = t.testdir()
        const file = join(dir, 'app.db')
        const db = openSqlite(file)
        t.teardown(() => { db.close() })
        db.exec('PRAGMA journal_mode = WAL; CREATE TABLE effects (webhook_id TEXT)')
        return { options: { file, goesOn: join(dir, 'go on') }, effects: async () => db.prepare('SELECT webhook_id FROM effects').all().map(row => (row as { webhook_id: string }).webhook_id) }
      }
    }
  }

  for (const [name, { skip, open }] of Object.entries(databases)) {
    await t.test(name, { skip }, async t => {
      const { options, effects } = await open(t)
      const other = await start(t, options)
      const made: string[] = []
      for (const { pauses, idleTimeout, takenOver } of [
        { pauses: 'before', takenOver: true },
        { pauses: 'within', takenOver: false },
        ...(name === 'PostgreSQL' ? [{ pauses: 'within', idleTimeout: 100, takenOver: true }] : [])
      ]) {
        await t.test(pauses === 'before' ? 'before its transaction' : `within its transaction${takenOver ? ', which PostgreSQL ends' : ''}`, async t => {
          const zombie = await start(t, { ...options, pauses, idleTimeout })
          const delivery = batchFailed(`wh_${made.length}`)
          const stopped = once(zombie.child, 'message')
          const late = send(t, zombie.port, delivery)
          t.same(await stopped, [{ at: pauses }, undefined])
          zombie.child.kill('SIGSTOP')

          const statuses = new Set<number>()
          const takes = async (): Promise<boolean> => {
            const status = await send(t, other.port, redelivered(delivery))
            statuses.add(status)
            return status === 200
          }
          if (takenOver) {
            await until('the other one to take it over', takes)
          } else {
            // Whatever the lease says, the transaction holds the effect.
            await until('the other one to be kept out', async () => await takes() || statuses.has(500) || statuses.has(503))
            t.notOk(statuses.has(200))
            t.same(await effects(), made)
          }
          zombie.child.kill('SIGCONT')
          if (pauses === 'within' && options.goesOn !== undefined) writeFileSync(options.goesOn, '')
          zombie.child.send('go on')
          t.equal(await late, pauses === 'within' && takenOver ? 500 : 200)
          await until('the delivery to be acknowledged', takes)
          made.push(`wh_${made.length}`)
          t.same(await effects(), made)
        })
      }
    })
  }
})

t.test('a store that was flushed', { skip: redisMissing }, async t => {
  const { port } = await RedisServer.start(t)
  const redis = redisClient(t, port)
  const db = openSqlite(':memory:')
  t.teardown(() => { db.close() })
  db.exec('CREATE TABLE effects (webhook_id TEXT)')
  const app = await build(t, { idempotency: { store: redisStore(redis) } })
  app.openaiWebhook.on('batch.failed', sqliteInbox(db).once('settle', (tx, _event, { webhookId }) => { tx.prepare('INSERT INTO effects VALUES (?)').run(webhookId) }))
  const delivery = batchFailed('wh_1')
  t.equal(await answer(app, delivery), '200')
  t.equal(await answer(app, redelivered(delivery)), '200 duplicate')
  await redis.flushall()
  t.equal(await answer(app, redelivered(delivery)), '200', 'the store knows nothing of it')
  t.equal(db.prepare('SELECT 1 FROM effects').all().length, 1)
})

t.test('PostgreSQL fails the handler, and the retry makes the effect', { skip: postgresMissing }, async t => {
  interface Fault {
    pool?: pg.PoolConfig
    /** @returns what mends it */
    cause: (pool: pg.Pool, admin: pg.Pool) => Promise<() => Promise<unknown> | unknown>
    work?: (tx: PoolClient, broken: boolean) => Promise<unknown>
  }
  const readOnly: Fault['cause'] = async (pool, admin) => {
    const { database } = (await admin.query('SELECT current_database() AS database')).rows[0] as { database: string }
    const set = async (state: string): Promise<void> => { await admin.query(`ALTER DATABASE ${database} SET default_transaction_read_only = ${state}`) }
    await set('on')
    // So that those that the pool has are of this time.
    const clients = await Promise.all([pool.connect(), pool.connect()])
    for (const client of clients) client.release(true)
    return async () => await set('off')
  }
  const faults: Record<string, Fault> = {
    'a pool that is exhausted': {
      async cause (pool) {
        const clients = await Promise.all([pool.connect(), pool.connect()])
        pool.options.connectionTimeoutMillis = 50
        return () => {
          pool.options.connectionTimeoutMillis = 0
          for (const client of clients) client.release()
        }
      }
    },
    'a server that is read-only': { cause: readOnly },
    'a statement that takes too long': {
      pool: { statement_timeout: 300 },
      cause: async () => () => {},
      work: async (tx, broken) => { if (broken) await tx.query('SELECT pg_sleep(60)') }
    },
    'a server that hangs': {
      pool: { query_timeout: 300, connectionTimeoutMillis: 300 },
      async cause () {
        server.signal('SIGSTOP')
        return () => { server.signal('SIGCONT') }
      }
    },
    'a server that goes down, and comes back': {
      async cause () {
        await server.stop()
        return async () => { await server.start() }
      }
    },
    'a session that is ended': {
      async cause () { return () => {} },
      work: async (tx, broken) => { if (broken) await tx.query('SELECT pg_terminate_backend(pg_backend_pid())') }
    }
  }
  for (const [name, { pool: options, cause, work }] of Object.entries(faults)) {
    await t.test(name, async t => {
      const { url, admin, effects } = await fresh(t)
      const pool = poolOf(t, { connectionString: url, max: 2, ...options })
      let broken = false
      const app = await build(t, { idempotency: { store: memoryStore() } })
      app.openaiWebhook.on('batch.failed', postgresInbox(pool, { concurrency: 2 }).once('settle', async (tx, _event, { webhookId }) => {
        await add(tx, webhookId)
        await work?.(tx, broken)
      }))
      // On a busy machine, creating the table may take as long as the timeouts of some of these.
      await deliverUntil200(app, batchFailed('wh_0'))
      const mend = await cause(pool, admin)
      broken = true
      const deliveries = ['wh_1', 'wh_2', 'wh_3'].map(batchFailed)
      t.same(await Promise.all(deliveries.map(async delivery => await answer(app, delivery))), Array.from({ length: 3 }, () => '500 HANDLER_FAILED'))
      await mend()
      broken = false
      // The connection that is still there may have to fail first.
      for (const delivery of deliveries) t.equal((await deliverUntil200(app, redelivered(delivery))).at(-1), '200')
      t.same(await effects(), ['wh_0', 'wh_1', 'wh_2', 'wh_3'])
    })
  }

  await t.test('two of the user\'s own transactions that race under SERIALIZABLE', async t => {
    const { url, effects } = await fresh(t)
    const pool = poolOf(t, { connectionString: url })
    const inbox = postgresInbox(pool)
    const snapshots = [deferred(), deferred()]
    let begun = 0
    const apps = [await build(t), await build(t)]
    for (const app of apps) {
      app.openaiWebhook.on('batch.failed', async (_event, context) => {
        const client = await pool.connect()
        try {
          await client.query('BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT FROM effects')
          snapshots[begun++]?.resolve()
          await Promise.all(snapshots.map(async ({ promise }) => await promise))
          if (await inbox.first(async (text, values) => await client.query(text, values), 'settle', context)) await add(client, context.webhookId)
          await client.query('COMMIT')
        } catch (error) {
          await client.query('ROLLBACK')
          throw error
        } finally {
          client.release()
        }
      }, { name: 'settle' })
    }
    const delivery = batchFailed('wh_1')
    const statuses = (await Promise.all(apps.map(async app => await post(app, delivery)))).map(({ statusCode }) => statusCode)
    t.same(statuses.sort(), [200, 500])
    for (const app of apps) t.equal((await post(app, redelivered(delivery))).statusCode, 200)
    t.same(await effects(), ['wh_1'])
  })
})
