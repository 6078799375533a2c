import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { pathToFileURL } from 'node:url'
import pg from 'pg'
import type { PoolClient } from 'pg'
import t from 'tap'
import { show } from '../../lib/checks.ts'
import { memoryStore } from '../../lib/index.ts'
import type { EventContext, EventHandler, IdempotencyStore } from '../../lib/index.ts'
import { migration, postgresInbox, postgresStore } from '../../lib/postgres/index.ts'
import { build, post, sign, stoppedClock, thin } from '../support/deliveries.ts'
import { codeBlocks, readDocument } from '../support/docs.ts'
import { capturedLog, deferred } from '../support/observe.ts'
import { PostgresServer, postgresMissing } from '../support/postgres.ts'
import { CuttingProxy } from '../support/proxy.ts'

const INVALID_OPTIONS = 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS'

let server: PostgresServer
let databases = 0

/** A pool on a database of its own. */
async function fresh (t: { teardown: (fn: () => unknown) => void }, options: pg.PoolConfig = {}): Promise<pg.Pool> {
  const database = `test_${++databases}`
  const admin = new pg.Client({ port: server.port, host: '127.0.0.1', user: 'postgres', database: 'postgres' })
  await admin.connect()
  await admin.query(`CREATE DATABASE ${database} TEMPLATE template0`)
  await admin.end()
  return poolOf(t, { database, ...options })
}

function poolOf (t: { teardown: (fn: () => unknown) => void }, options: pg.PoolConfig): pg.Pool {
  const pool = new pg.Pool({ host: '127.0.0.1', port: server.port, user: 'postgres', ...options })
  t.teardown(async () => await pool.end())
  return pool
}

async function withEffects (pool: pg.Pool): Promise<pg.Pool> {
  await pool.query('CREATE TABLE effects (row text)')
  return pool
}

async function effects (pool: pg.Pool): Promise<string[]> {
  return (await pool.query('SELECT row FROM effects ORDER BY row')).rows.map(({ row }) => row as string)
}

const add = async (tx: PoolClient, row: string): Promise<unknown> => await tx.query('INSERT INTO effects VALUES ($1)', [row])

let deliveries = 0
const warnings: Array<[object, string]> = []
const log = { warn: (fields: object, message: string) => { warnings.push([fields, message]) } }
const contextOf = (webhookId = `wh_${++deliveries}`): EventContext =>
  ({ webhookId, timestamp: 1, endpoint: '/webhooks/openai', log, signal: new AbortController().signal }) as unknown as EventContext

const run = async (handler: EventHandler<object>, context = contextOf()): Promise<void> => { await handler.call({} as never, {}, context) }

async function until (what: string, holds: () => Promise<boolean> | boolean): Promise<void> {
  for (let tries = 0; !await holds(); tries++) {
    if (tries > 1_000) throw new Error(`expected ${what}`)
    await sleep(5)
  }
}

/** Another session waits for a lock. */
async function waiting (pool: pg.Pool): Promise<boolean> {
  return (await pool.query('SELECT 1 FROM pg_locks WHERE NOT granted')).rows.length > 0
}

t.before(async () => {
  if (postgresMissing === false) server = await PostgresServer.start(t, '-c', 'deadlock_timeout=20ms', '-c', 'max_connections=200')
})

t.test('what cannot serve is told when it is given', async t => {
  const pool = { totalCount: 0, connect () {}, query () {}, on () {}, options: { max: 4 } } as never
  const large = { totalCount: 0, connect () {}, query () {}, on () {} } as never
  for (const [name, create] of Object.entries({ postgresStore, postgresInbox } as unknown as Record<string, (db: unknown, options?: object) => unknown>)) {
    for (const db of [{}, null, { query () {} }, { connect () {} }]) {
      t.throws(() => create(db), { code: INVALID_OPTIONS, message: `${name}: expected a Pool of pg, or a PGlite` })
    }
    for (const table of ['', 'a.b.c', 'a b', 'a"b', '1a', 'é', 'x'.repeat(57), 1, null]) {
      t.throws(() => create(large, { table }), { code: INVALID_OPTIONS, message: `${name}: expected table to be a name, or schema.name, of letters, digits, _ and $, at most 56 characters each, got ${show(table)}` })
    }
  }
  t.throws(() => postgresInbox(pool), {
    code: INVALID_OPTIONS,
    message: 'postgresInbox: expected a pool of at least 8 clients, one for each of its `concurrency` transactions, got one of 4: raise the pool\'s max, or lower concurrency'
  })
  t.ok(postgresInbox(pool, { concurrency: 4 }))
  t.ok(postgresInbox(large), 'a pool that tells no size')
  for (const [option, unit] of [['retention', 'ms'], ['lockTimeout', 'ms'], ['idleTimeout', 'ms'], ['concurrency', 'transactions']] as const) {
    t.throws(() => postgresInbox(large, { [option]: 0 }), { code: INVALID_OPTIONS, message: `postgresInbox: expected ${option} to be a whole number of ${unit}, 1 or more, got 0` })
  }
  t.throws(() => postgresInbox(undefined, { table: 'no name' }), { code: INVALID_OPTIONS })
})

t.test('migration() prints what is created, table by table', async t => {
  t.match(migration(), /CREATE TABLE IF NOT EXISTS "openai_webhook_deliveries"[^]*CREATE TABLE IF NOT EXISTS "openai_webhook_inbox"/)
  t.equal(migration({ tables: { store: false, inbox: false } }), '')
  t.match(migration({ tables: { store: 'app.seen', inbox: false } }), /^SELECT 1 FROM pg_advisory_xact_lock\(\d+\);\nCREATE TABLE IF NOT EXISTS "app"\."seen" [^]*CREATE INDEX IF NOT EXISTS "seen_forget" ON "app"\."seen" \(forget\);\n$/)
  t.throws(() => migration({ tables: { inbox: 'a;b' } }), { code: INVALID_OPTIONS, message: 'migration: expected tables.inbox to be a name, or schema.name, of letters, digits, _ and $, at most 56 characters each, got "a;b"' })
})

t.test('tables', { skip: postgresMissing }, async t => {
  await t.test('processes that start at the same instant do not collide', async t => {
    const pool = await fresh(t)
    const { database } = pool.options
    await Promise.all(Array.from({ length: 12 }, async (_, index) => {
      const own = poolOf(t, { database, max: 2 })
      await Promise.all([
        postgresStore(own).begin(`key ${index}`, 1_000),
        run(postgresInbox(own, { concurrency: 2 }).once('settle', () => {}))
      ])
    }))
    t.equal((await pool.query('SELECT 1 FROM openai_webhook_deliveries')).rows.length, 12)
    t.equal((await pool.query('SELECT 1 FROM openai_webhook_inbox')).rows.length, 12)
  })

  await t.test('so do programs that run migration() as they start', async t => {
    const pool = await fresh(t, { max: 12 })
    const clients = await Promise.all(Array.from({ length: 12 }, async () => await pool.connect()))
    t.teardown(() => { for (const client of clients) client.release() })
    for (let round = 0; round < 3; round++) {
      const sql = migration({ tables: { store: `seen_${round}`, inbox: `inbox_${round}` } })
      await t.resolves(Promise.all(clients.map(async client => await client.query(sql))))
    }
  })

  for (const [what, max, isThere] of [['one connection', 1, false], ['ten', 10, false], ['one, and the table is there', 1, true]] as const) {
    await t.test(`first() in transactions that hold every connection of the pool: ${what}`, async t => {
      const pool = await withEffects(await fresh(t, { max }))
      if (isThere) await pool.query(migration({ tables: { store: false } }))
      const sessions = poolOf(t, { database: pool.options.database })
      const inbox = postgresInbox(pool, { concurrency: 1 })
      const settle = async (context: EventContext, end: string): Promise<boolean> => {
        const client = await pool.connect()
        try {
          await client.query('BEGIN')
          const isFirst = await inbox.first(async (text, values) => await client.query(text, values), 'settle', context)
          if (isFirst) await add(client, context.webhookId)
          await client.query(end)
          return isFirst
        } finally {
          client.release()
        }
      }
      // One after the other where there is one connection, and each waits a second for another one.
      const contexts = Array.from({ length: max === 1 ? 3 : 12 }, () => contextOf())
      for (const [end, isFirst] of [['ROLLBACK', true], ['COMMIT', true], ['COMMIT', false]] as const) {
        t.same(await Promise.all(contexts.map(async context => await settle(context, end))), contexts.map(() => isFirst), end)
      }
      await run(inbox.once('another', async tx => await add(tx, 'another')))
      t.same(await effects(sessions), ['another', ...contexts.map(({ webhookId }) => webhookId)].sort())
    })
  }

  await t.test('first() twice in a transaction that is rolled back, and where the search path is another', async t => {
    const pool = await withEffects(await fresh(t, { max: 2 }))
    const inbox = postgresInbox(pool, { concurrency: 1 })
    const within = async (begin: string, end: string): Promise<boolean[]> => {
      const client = await pool.connect()
      try {
        await client.query(begin)
        const first = async (): Promise<boolean> => await inbox.first(async (text, values) => await client.query(text, values), 'settle', contextOf())
        const answers = [await first(), await first()]
        await client.query(end)
        return answers
      } finally {
        client.release()
      }
    }
    await pool.query('CREATE SCHEMA mine')
    const blocker = await pool.connect() // no connection is left for the creation
    t.same(await within('BEGIN', 'ROLLBACK'), [true, true])
    t.same(await within('BEGIN; SAVEPOINT one', 'ROLLBACK TO SAVEPOINT one; COMMIT'), [true, true])
    blocker.release()
    t.same(await within('BEGIN; SET LOCAL search_path = mine, public', 'COMMIT'), [true, true])
    t.same(await within('BEGIN', 'COMMIT'), [true, true])
    await run(inbox.once('another', () => {}))
    t.same((await pool.query("SELECT schemaname FROM pg_tables WHERE tablename = 'openai_webhook_inbox'")).rows, [{ schemaname: 'public' }])
  })

  await t.test('that are dropped while the app runs: the use after the next has them again', async t => {
    const pool = await withEffects(await fresh(t, { max: 2 }))
    const inbox = postgresInbox(pool, { concurrency: 1 })
    const store = postgresStore(pool)
    const work = inbox.once('settle', () => {})
    const first = async (): Promise<boolean> => {
      const client = await pool.connect()
      try {
        await client.query('BEGIN')
        return await inbox.first(async (text, values) => await client.query(text, values), 'import', contextOf())
      } finally {
        await client.query('COMMIT')
        client.release()
      }
    }
    const claimed = async (): Promise<string> => (await store.begin('key', 60_000)).state
    const drop = async (): Promise<void> => { await pool.query('DROP TABLE IF EXISTS openai_webhook_inbox, openai_webhook_deliveries') }
    const uses: Array<() => Promise<unknown>> = [async () => await run(work), first, claimed]
    for (const use of uses) {
      await use()
      await drop()
      await t.rejects(use, { message: /does not exist/ })
      await t.resolves(async () => { await use() })
    }
  })

  await t.test('a connection that the server ends in a transaction of the user\'s own ends no process', async t => {
    const pool = await withEffects(await fresh(t, { max: 2 }))
    const inbox = postgresInbox(pool, { concurrency: 1 })
    const client = await pool.connect()
    await client.query('BEGIN')
    t.equal(await inbox.first(async (text, values) => await client.query(text, values), 'settle', contextOf()), true)
    const { rows: [{ pid }] } = await client.query('SELECT pg_backend_pid() AS pid')
    const ended = new Promise(resolve => client.once('end', resolve))
    await pool.query('SELECT pg_terminate_backend($1)', [pid])
    await ended // before, an 'error' that nobody listens for
    await t.rejects(client.query('COMMIT'))
    client.release(true)
  })

  await t.test('a role that may create nothing, tables of another name, in another schema', async t => {
    const pool = await withEffects(await fresh(t))
    await pool.query(`CREATE SCHEMA hooks; CREATE ROLE ${pool.options.database} LOGIN; GRANT USAGE ON SCHEMA hooks TO ${pool.options.database}; GRANT ALL ON effects TO ${pool.options.database}`)
    const own = poolOf(t, { database: pool.options.database, user: pool.options.database })
    const tables = { store: 'hooks.Seen', inbox: 'hooks.inbox' }
    const stores = [true, false].map(migrate => postgresStore(own, { table: tables.store, migrate }))
    const inboxes = [true, false].map(migrate => postgresInbox(own, { table: tables.inbox, migrate }))
    for (const store of stores) await t.rejects(Promise.resolve(store.begin('key', 1_000)), { code: /^42/ })
    for (const inbox of inboxes) await t.rejects(run(inbox.once('settle', () => {})), { code: /^42/ })

    await pool.query(migration({ tables }))
    await pool.query(migration({ tables }))
    await pool.query(`GRANT ALL ON ALL TABLES IN SCHEMA hooks TO ${pool.options.database}`)
    for (const [index, store] of stores.entries()) t.match(await store.begin(`key ${index}`, 1_000), { state: 'claimed' }, 'with the same store, once the table is there')
    for (const inbox of inboxes) await run(inbox.once('settle', async tx => await tx.query("INSERT INTO effects VALUES ('made')")))
    t.same(await effects(pool), ['made', 'made'])
  })

  await t.test('a key and a handler name that no index and no text takes', async t => {
    const store = postgresStore(await fresh(t))
    const keys = ['x', 'y'].map(end => 'é'.repeat(2_400) + end)
    for (const key of keys) {
      const claim = await store.begin(key, 60_000) as { token: string }
      await store.checkpoint(key, claim.token, `a\u0000b\n${key.slice(-1)}`)
      await store.release(key, claim.token)
    }
    for (const key of keys) t.match(await store.begin(key, 60_000), { finished: [`a\u0000b\n${key.slice(-1)}`] })
  })
})

/** What is sent on the connections of a pool from now on. */
function sentBy (pool: pg.Pool): string[] {
  const sent: string[] = []
  pool.on('connect', client => {
    const { query } = client
    client.query = function (this: PoolClient, text: string, ...rest: unknown[]) {
      sent.push(text)
      return Reflect.apply(query, this, [text, ...rest])
    } as never
  })
  return sent
}

t.test('postgresStore', { skip: postgresMissing }, async t => {
  await t.test('what comes in one turn is one statement', async t => {
    const pool = await fresh(t)
    const sent = sentBy(pool)
    const [store, other] = [postgresStore(pool), postgresStore(pool)]
    await store.begin('the first creates the table, and prunes', 1_000)
    await until('rows to be pruned', () => sent.some(text => text.includes('DELETE')))
    sent.length = 0
    const keys = Array.from({ length: 150 }, (_, n) => `key ${n}`)
    const claims = await Promise.all(keys.map(async key => await store.begin(key, 60_000)))
    t.ok(claims.every(({ state }) => state === 'claimed'))
    t.equal(sent.filter(text => text.includes('INSERT')).length, 2, 'of 100 at most')
    sent.length = 0
    const completed = await Promise.all(claims.map(async (claim, n) => await store.complete(keys[n]!, claim.state === 'claimed' ? claim.token : '', 60_000)))
    t.ok(completed.every(held => held === true))
    t.equal(sent.filter(text => text.includes('done = true')).length, 2)
    t.same(await Promise.all(keys.map(async key => await other.begin(key, 60_000))), keys.map(() => ({ state: 'done' })))
  })

  await t.test('what it asks twice of one delivery is answered in its order', async t => {
    const store = postgresStore(await fresh(t))
    const [first, second, another] = await Promise.all([store.begin('key', 60_000), store.begin('key', 60_000), store.begin('another', 60_000)])
    t.match([first, second, another], [{ state: 'claimed' }, { state: 'running' }, { state: 'claimed' }])
    const token = first.state === 'claimed' ? first.token : ''
    t.same(await Promise.all([store.complete('key', token, 60_000), store.complete('key', token, 60_000)]), [true, false])
  })

  await t.test('one that cannot be written fails no other', async t => {
    const store = postgresStore(await fresh(t))
    const [good, bad, other] = await Promise.allSettled([store.begin('good', 60_000), store.begin('no text has a \0', 60_000), store.begin('other', 60_000)])
    t.match([good, bad, other], [{ value: { state: 'claimed' } }, { status: 'rejected', reason: { message: /invalid byte sequence/ } }, { value: { state: 'claimed' } }])
  })

  await t.test('one whose row somebody has locked holds up no other for long', async t => {
    const pool = await fresh(t)
    const store = postgresStore(pool)
    const { token } = await store.begin('m', 60_000) as { token: string }
    await store.release('m', token)
    const client = await pool.connect()
    /** @returns what is answered for each, while the row of the second is locked and afterwards */
    async function whileLocked<Answer> (ask: (key: string) => Promise<Answer>): Promise<Answer[]> {
      await client.query("BEGIN; SELECT 1 FROM openai_webhook_deliveries WHERE key = 'm' FOR UPDATE")
      let answered = false
      const [a, m, z] = ['a', 'm', 'z'].map(ask)
      m!.finally(() => { answered = true })
      const others = await Promise.all([a!, z!])
      t.equal(answered, false)
      await client.query('ROLLBACK')
      return [others[0]!, await m!, others[1]!]
    }
    const tokens = new Map<string, string>()
    t.match(await whileLocked(async key => {
      const claim = await store.begin(key, 60_000)
      if (claim.state === 'claimed') tokens.set(key, claim.token)
      return claim
    }), Array(3).fill({ state: 'claimed' }))
    t.same(await whileLocked(async key => await store.complete(key, tokens.get(key)!, 60_000)), [true, true, true])
    client.release()
    t.same((await pool.query('SHOW lock_timeout')).rows, [{ lock_timeout: '0' }], 'of the statement alone')
  })

  await t.test('a connection that is cut before the answer: what it had claimed is claimed', async t => {
    const pool = await fresh(t, { max: 1 })
    const store = postgresStore(pool)
    await store.begin('the first creates the table', 1_000)
    let cut = false
    const client = await pool.connect()
    const { query } = client
    client.query = async function (this: PoolClient, ...args: unknown[]) {
      const result = await Reflect.apply(query, this, args)
      if (cut || !String(args[0]).includes('INSERT')) return result
      cut = true
      throw new Error('Connection terminated unexpectedly')
    } as never
    client.release()
    const claims = await Promise.all(['a', 'b'].map(async key => await store.begin(key, 60_000)))
    t.ok(cut)
    t.match(claims, [{ state: 'claimed' }, { state: 'claimed' }])
    for (const [index, claim] of claims.entries()) t.equal(await store.complete(['a', 'b'][index]!, (claim as { token: string }).token, 60_000), true)
  })

  await t.test('processes that get the same deliveries in other orders do not lock each other out', async t => {
    const pool = await fresh(t)
    const stores = [postgresStore(pool), postgresStore(pool)]
    const keys = Array.from({ length: 60 }, (_, n) => `key ${String(n).padStart(2, '0')}`)
    for (let round = 0; round < 10; round++) {
      const ids = keys.map(key => `${key} ${round}`)
      const answers = await Promise.all(stores.map(async (store, n) => await Promise.all((n === 0 ? ids : [...ids].reverse()).map(async id => await store.begin(id, 60_000)))))
      t.equal(answers.flat().filter(({ state }) => state === 'claimed').length, ids.length)
    }
  })

  for (const level of ['serializable', 'repeatable read']) {
    await t.test(`a database whose default is ${level}: deliveries that come at once fail no other`, async t => {
      const admin = await fresh(t)
      await admin.query(`ALTER DATABASE ${admin.options.database} SET default_transaction_isolation = '${level}'`)
      const stores = Array.from({ length: 3 }, () => postgresStore(poolOf(t, { database: admin.options.database })))
      const each = async (store: IdempotencyStore, key: string): Promise<string> => {
        const claim = await store.begin(key, 60_000)
        if (claim.state !== 'claimed') return claim.state
        await store.checkpoint(key, claim.token, 'first')
        await store.checkpoint(key, claim.token, 'second')
        return String(await store.complete(key, claim.token, 60_000))
      }
      for (let round = 0; round < 20; round++) {
        const keys = Array.from({ length: 20 }, (_, n) => `key ${round} ${n}`)
        const answers = await Promise.all(stores.flatMap(store => keys.map(async key => await each(store, key))))
        t.same(answers.filter(answer => answer === 'true').length, keys.length)
        t.ok(answers.every(answer => ['true', 'running', 'done'].includes(answer)), answers.join())
      }
    })
  }

  await t.test('a conflict that does not end fails in the end', async t => {
    const pool = await fresh(t)
    const store = postgresStore(pool)
    await store.begin('first', 60_000)
    await pool.query("CREATE FUNCTION no () RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no' USING ERRCODE = '40001'; END $$; CREATE TRIGGER no BEFORE INSERT ON openai_webhook_deliveries EXECUTE FUNCTION no ()")
    await t.rejects(Promise.resolve(store.begin('second', 60_000)), { code: '40001' })
  })

  await t.test('two round trips a delivery', async t => {
    const pool = await fresh(t)
    const sent = sentBy(pool)
    const app = await build(t, { idempotency: { store: postgresStore(pool) } })
    app.openaiWebhook.on('batch.failed', () => {})
    await post(app, sign(thin('batch.failed')))
    await until('rows to be pruned', () => sent.some(text => text.includes('DELETE')))
    sent.length = 0
    const delivery = sign(thin('batch.failed'))
    t.equal((await post(app, delivery)).body, '{"received":true}')
    t.equal(sent.length, 2)
    t.equal((await post(app, delivery)).body, '{"received":true,"duplicate":true}')
    t.equal(sent.length, 3)
  })

  await t.test('what is forgotten is deleted, whatever the rate', async t => {
    const pool = await fresh(t)
    const store = postgresStore(pool)
    await store.begin('first', 60_000)
    await pool.query("INSERT INTO openai_webhook_deliveries SELECT 'old ' || i, NULL, true, '', now(), now() FROM generate_series(1, 1050) i")
    for (let i = 0; i < 60; i++) await store.begin(`new ${i}`, 60_000)
    await until('old rows to be gone', async () => (await pool.query("SELECT 1 FROM openai_webhook_deliveries WHERE key LIKE 'old%'")).rows.length === 0)
    t.equal((await pool.query('SELECT 1 FROM openai_webhook_deliveries')).rows.length, 61)
    await pool.query('CREATE FUNCTION no () RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE \'no\'; END $$; CREATE TRIGGER no BEFORE DELETE ON openai_webhook_deliveries EXECUTE FUNCTION no ()')
    for (let i = 60; i < 120; i++) t.match(await store.begin(`new ${i}`, 60_000), { state: 'claimed' }, 'that it cannot be deleted fails no delivery')
  })

  await t.test('of two who find a run-out retention at once, one is told claimed and none done', async t => {
    const pool = await fresh(t)
    const store = postgresStore(pool)
    for (let round = 0; round < 5; round++) {
      const { token } = await store.begin(`key ${round}`, 60_000) as { token: string }
      await store.complete(`key ${round}`, token, 1)
      await sleep(5)
      const claims = await Promise.all(Array.from({ length: 8 }, async () => await store.begin(`key ${round}`, 60_000)))
      t.same(claims.map(({ state }) => state).sort(), ['claimed', ...Array.from({ length: 7 }, () => 'running')])
    }
  })

  await t.test('the server is read-only: 503, and afterwards 200', async t => {
    const pool = await fresh(t, { max: 1 })
    const { app, handled } = await receiver(t, pool)
    t.equal((await post(app, sign(thin('batch.failed')))).statusCode, 200)
    const admin = poolOf(t, { database: 'postgres' })
    await admin.query(`ALTER DATABASE ${pool.options.database} SET default_transaction_read_only = on`)
    const session = await pool.connect()
    await session.query('SET default_transaction_read_only = on')
    session.release()
    const delivery = sign(thin('batch.failed'))
    t.equal((await post(app, delivery)).statusCode, 503)
    t.equal((await post(app, delivery)).statusCode, 503)
    await admin.query(`ALTER DATABASE ${pool.options.database} SET default_transaction_read_only = off`)
    t.equal((await post(app, delivery)).statusCode, 200, 'a connection that was opened before is not used again')
    t.equal(handled.length, 2)
  })
})

async function receiver (t: { teardown: (fn: () => unknown) => void }, pool: pg.Pool): Promise<{ app: Awaited<ReturnType<typeof build>>, handled: string[] }> {
  const handled: string[] = []
  const app = await build(t, { idempotency: { store: postgresStore(pool) } })
  app.openaiWebhook.on('batch.failed', (_event, { webhookId }) => { handled.push(webhookId) })
  return { app, handled }
}

t.test('a server that hangs, a pool that is exhausted, a server that restarts: 503, and afterwards 200', { skip: postgresMissing }, async t => {
  const own = await PostgresServer.start(t)
  const config = { host: '127.0.0.1', port: own.port, user: 'postgres', database: 'postgres' }
  const pool = poolOf(t, config)
  const exhausted = poolOf(t, { ...config, max: 1 })
  const receivers = [await receiver(t, pool), await receiver(t, exhausted)]
  for (const { app } of receivers) t.equal((await post(app, sign(thin('batch.failed')))).statusCode, 200)

  const client = await exhausted.connect()
  const deliveries = receivers.map(() => sign(thin('batch.failed')))
  own.signal('SIGSTOP')
  const hung = await Promise.all(receivers.map(async ({ app }, index) => (await post(app, deliveries[index]!)).statusCode))
  t.same(hung, [503, 503])
  own.signal('SIGCONT')
  client.release()
  for (const [index, { app, handled }] of receivers.entries()) {
    const delivery = index === 0 ? sign(thin('batch.failed')) : deliveries[index]!
    t.equal((await post(app, delivery)).statusCode, 200)
    t.equal(handled.length, 2)
  }

  const busy = await pool.connect()
  busy.on('error', () => {})
  await own.stop()
  const delivery = sign(thin('batch.failed'))
  for (const { app } of receivers) t.equal((await post(app, delivery)).statusCode, 503)
  await own.start()
  for (const { app } of receivers) {
    const { statusCode, body } = await post(app, delivery)
    t.equal(statusCode, 200, body)
  }
  busy.release(true)
})

t.test('what has been waited for in vain is not asked for again, one by one', async t => {
  let connects = 0
  const pool = { totalCount: 0, connect () { connects++ }, query () {}, on () {} }
  const store = postgresStore(pool as never, { migrate: false })
  const clock = stoppedClock(t)
  const asked = Promise.allSettled(['a', 'b', 'c'].map(async key => await store.begin(key, 1_000)))
  await until('it to be asked for', () => connects > 0)
  clock.advance(4_000)
  t.match(await asked, Array(3).fill({ status: 'rejected', reason: { message: /^no connection to PostgreSQL within 4000 ms/ } }))
  t.equal(connects, 1)
})

t.test('postgresInbox', { skip: postgresMissing }, async t => {
  await t.test('an effect is made once by apps that share nothing but the database, and by a route\'s own handlers', async t => {
    const pool = await withEffects(await fresh(t))
    const { logger, lines } = capturedLog()
    const apps = await Promise.all(Array.from({ length: 3 }, async () => {
      const app = await build(t, { idempotency: { store: memoryStore() } }, { logger: logger! })
      const inbox = postgresInbox(pool)
      app.openaiWebhook.on('batch.completed', inbox.once('settle', async (tx, event) => await add(tx, `app ${event.data.id}`)))
      app.openaiWebhook.route({ url: '/own', on: { 'batch.completed': inbox.once('own', async (tx, event) => await add(tx, `route ${event.data.id}`)) } })
      return app
    }))
    const delivery = sign(thin('batch.completed', { id: 'batch_1' }))
    const answers = await Promise.all(apps.flatMap(app => [post(app, delivery), post(app, delivery, '/own')]))
    t.same(answers.map(({ statusCode }) => statusCode), [200, 200, 200, 200, 200, 200], JSON.stringify(lines))
    t.same(await effects(pool), ['app batch_1', 'app batch_1', 'route batch_1'], 'an endpoint each')
  })

  await t.test('a swallowed error: PostgreSQL rolls back, the handler fails', async t => {
    const pool = await withEffects(await fresh(t))
    let swallows = true
    const handler = postgresInbox(pool).once('settle', async tx => {
      await add(tx, 'effect')
      if (swallows) await tx.query('SELECT 1 / 0').catch(() => {})
    })
    const context = contextOf()
    await t.rejects(run(handler, context), { code: 'FST_OPENAI_WEBHOOK_ROLLED_BACK', message: /handler "settle"/ })
    t.same(await effects(pool), [])
    swallows = false
    await run(handler, context)
    t.same(await effects(pool), ['effect'])
  })

  await t.test('work that ends the transaction by itself: what it rolled back is not taken for done', async t => {
    const pool = await withEffects(await fresh(t))
    let ending: string[] = []
    const handler = postgresInbox(pool).once('settle', async tx => {
      await add(tx, 'effect')
      for (const statement of ending) await tx.query(statement)
    })
    const context = contextOf()
    for (ending of [['ROLLBACK'], ['ROLLBACK; BEGIN']]) {
      await t.rejects(run(handler, context), { code: 'FST_OPENAI_WEBHOOK_ROLLED_BACK', message: /the work said ROLLBACK/ })
      t.same(await effects(pool), [])
    }
    ending = ['ROLLBACK', 'BEGIN']
    await t.rejects(run(handler, context), { code: 'FST_OPENAI_WEBHOOK_TRANSACTION_OVER' })
    t.same(await effects(pool), [])
    ending = ['COMMIT']
    await run(handler, context)
    t.same(await effects(pool), ['effect'])
    ending = []
    await run(handler, context)
    t.same(await effects(pool), ['effect'], 'it has its record')
    await run(handler)
    t.same(await effects(pool), ['effect', 'effect'], 'the client serves on')
  })

  await t.test('what was not awaited is committed, or fails the handler; tx stays the pool\'s', async t => {
    const pool = await withEffects(await fresh(t, { max: 1 }))
    const inbox = postgresInbox(pool, { concurrency: 1 })
    await run(inbox.once('settle', tx => {
      t.equal((tx as PoolClient & { database: string }).database, pool.options.database)
      add(tx, 'effect').catch(() => {})
      tx.release()
    }))
    await t.rejects(run(inbox.once('settle', tx => { tx.query('nonsense').catch(() => {}) })), { code: 'FST_OPENAI_WEBHOOK_ROLLED_BACK' })
    t.same(await effects(pool), ['effect'])
    t.equal(pool.idleCount, 1)
  })

  await t.test('so many transactions at once, and no more', async t => {
    const pool = await withEffects(await fresh(t, { max: 4 }))
    let running = 0
    let most = 0
    let runs = 0
    const enough = deferred<undefined>()
    const handler = postgresInbox(pool, { concurrency: 2 }).once('settle', async tx => {
      most = Math.max(most, ++running)
      if (++runs === 2) enough.resolve(undefined)
      await enough.promise
      await tx.query('SELECT 1')
      running--
      if (runs % 3 === 0) throw new Error('one that fails lets the next one in')
    })
    await Promise.allSettled(Array.from({ length: 20 }, async () => await run(handler)))
    t.same([runs, most], [20, 2])
  })

  await t.test('READ COMMITTED, whatever the database\'s default', async t => {
    const pool = await fresh(t)
    await pool.query(`ALTER DATABASE ${pool.options.database} SET default_transaction_isolation = 'serializable'`)
    const own = poolOf(t, { database: pool.options.database })
    let level
    await run(postgresInbox(own).once('settle', async tx => { level = (await tx.query('SHOW transaction_isolation')).rows }))
    t.same(level, [{ transaction_isolation: 'read committed' }])
    t.same((await own.query('SHOW lock_timeout')).rows, [{ lock_timeout: '0' }], 'nothing is left on the connection')
  })

  await t.test('another holder is waited for, so long', async t => {
    const pool = await withEffects(await fresh(t))
    const patient = postgresInbox(pool)
    const impatient = postgresInbox(pool, { lockTimeout: 20 })
    const context = contextOf()
    const entered = deferred<undefined>()
    const finish = deferred<undefined>()
    const first = run(patient.once('settle', async tx => {
      entered.resolve(undefined)
      await finish.promise
      await add(tx, 'first')
    }), context)
    await entered.promise
    await t.rejects(run(impatient.once('settle', async tx => await add(tx, 'impatient')), context), { code: '55P03' })
    const second = run(patient.once('settle', async tx => await add(tx, 'second')), context)
    await until('the second to wait', async () => await waiting(pool))
    finish.resolve(undefined)
    await Promise.all([first, second])
    t.same(await effects(pool), ['first'])
  })

  await t.test('a transaction in which nothing happens is ended, and the process is not', async t => {
    const pool = await withEffects(await fresh(t))
    const context = contextOf()
    const inbox = postgresInbox(pool, { idleTimeout: 200 })
    await t.rejects(run(inbox.once('settle', async tx => {
      await add(tx, 'idle')
      await new Promise(resolve => tx.once('error', resolve))
    }), context), /connection/i)
    await t.rejects(run(inbox.once('settle', async tx => {
      await add(tx, 'idle')
      await new Promise(resolve => tx.once('error', resolve))
      throw new Error('what the work fails with')
    }), context), /what the work fails with/)
    await run(inbox.once('settle', async tx => await add(tx, 'effect')), context)
    t.same(await effects(pool), ['effect'])
  })

  await t.test('work that waits for something else is not waited for once its connection is gone: others go on, and the pool ends', async t => {
    const pool = await withEffects(await fresh(t, { max: 2 }))
    const inbox = postgresInbox(pool, { idleTimeout: 200, concurrency: 2 })
    const late = deferred<undefined>()
    let tx: PoolClient | undefined
    const hung = inbox.once('hung', async given => {
      tx = given
      await late.promise
      await add(given, 'late')
    })
    const idle = { code: '25P03' }
    await Promise.all([t.rejects(run(hung), idle), t.rejects(run(hung), idle)])
    await run(inbox.once('settle', async tx => await add(tx, 'effect')))
    t.same(await effects(pool), ['effect'])
    await t.rejects(add(tx!, 'late'))
    late.resolve(undefined)
    await until('the pool to have no client of theirs', () => pool.totalCount === pool.idleCount)
    t.same(await effects(pool), ['effect'])
  })

  await t.test('a connection that is cut between COMMIT and its answer: the effect is neither doubled nor lost', async t => {
    const pool = await withEffects(await fresh(t))
    const proxy = await CuttingProxy.start(t, server.port)
    const cut = poolOf(t, { database: pool.options.database, port: proxy.port })
    const app = await build(t)
    app.openaiWebhook.on('batch.failed', postgresInbox(cut).once('settle', async (tx, event, { webhookId }) => await add(tx, webhookId)))
    await post(app, sign(thin('batch.failed'), { webhookId: 'wh_0' }))
    for (let i = 1; i <= 5; i++) {
      const delivery = sign(thin('batch.failed'), { webhookId: `wh_${i}` })
      proxy.cuts = 1
      t.equal((await post(app, delivery)).statusCode, 500)
      t.equal(proxy.cuts, 0)
      t.equal((await post(app, delivery)).statusCode, 200)
    }
    t.same(await effects(pool), ['wh_0', 'wh_1', 'wh_2', 'wh_3', 'wh_4', 'wh_5'])
  })

  await t.test('a connection that ends in the instant in which it is ready does not end the process', async t => {
    const pool = await withEffects(await fresh(t))
    const proxy = await CuttingProxy.start(t, server.port)
    const cut = poolOf(t, { database: pool.options.database, port: proxy.port })
    const handler = postgresInbox(cut).once('settle', async tx => await add(tx, 'effect'))
    const context = contextOf()
    proxy.stillborn = 1
    await t.rejects(run(handler, context), /connection/i)
    t.equal(proxy.stillborn, 0)
    await run(handler, context)
    t.same(await effects(pool), ['effect'])
  })

  await t.test('two handlers that deadlock: one fails, and is run again by the retry', async t => {
    const pool = await withEffects(await fresh(t))
    await pool.query("CREATE TABLE accounts (id text PRIMARY KEY); INSERT INTO accounts VALUES ('a'), ('b')")
    const app = await build(t)
    const inbox = postgresInbox(pool)
    const both = [deferred<undefined>(), deferred<undefined>()]
    const locking = (name: string, order: string[], mine: number) => inbox.once(name, async tx => {
      await tx.query('SELECT 1 FROM accounts WHERE id = $1 FOR UPDATE', [order[0]])
      both[mine]!.resolve(undefined)
      await both[1 - mine]!.promise
      await tx.query('SELECT 1 FROM accounts WHERE id = $1 FOR UPDATE', [order[1]])
      await add(tx, name)
    })
    app.openaiWebhook.on('batch.failed', locking('one', ['a', 'b'], 0)).on('batch.failed', locking('two', ['b', 'a'], 1))
    const delivery = sign(thin('batch.failed'))
    t.equal((await post(app, delivery)).statusCode, 500)
    t.equal((await effects(pool)).length, 1)
    t.equal((await post(app, delivery)).statusCode, 200)
    t.same(await effects(pool), ['one', 'two'])
  })

  await t.test('first() under SERIALIZABLE: a racing holder fails, and is told false by its retry', async t => {
    const pool = await withEffects(await fresh(t))
    const inbox = postgresInbox(pool)
    const context = contextOf()
    await run(inbox.once('another', () => {}))
    const clients = [await pool.connect(), await pool.connect()] as const
    t.teardown(() => { for (const client of clients) client.release() })
    const ask = async (client: PoolClient): Promise<boolean> => await inbox.first(async (text, values) => await client.query(text, values), 'settle', context)
    for (const client of clients) await client.query('BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT 1 FROM effects')
    t.equal(await ask(clients[0]), true)
    const second = ask(clients[1])
    second.catch(() => {})
    await until('the second to wait', async () => await waiting(pool))
    await clients[0].query('COMMIT')
    await t.rejects(second, { code: '40001' })
    await clients[1].query('ROLLBACK; BEGIN ISOLATION LEVEL SERIALIZABLE')
    t.equal(await ask(clients[1]), false)
    await clients[1].query('COMMIT')
  })

  await t.test('without a pool: first() alone, which creates nothing, and deletes what is old where it is', async t => {
    const pool = await fresh(t)
    const inbox = postgresInbox(undefined, { table: 'records', retention: 60_000 })
    t.same(Object.keys(inbox), ['first'])
    const client = await pool.connect()
    t.teardown(() => { client.release() })
    const query = async (text: string, values: string[]): Promise<unknown[]> => (await client.query(text, values)).rows
    await client.query('BEGIN')
    await t.rejects(inbox.first(query, 'settle', contextOf()), { code: '42P01' })
    await client.query('ROLLBACK')
    await client.query(migration({ tables: { store: false, inbox: 'records' } }))
    await client.query("INSERT INTO records SELECT '/', '', 'old ' || i, 'settle', now() - interval '2 minutes' FROM generate_series(1, 150) i")
    for (let i = 0; i < 100; i++) {
      await client.query('BEGIN')
      t.equal(await inbox.first(query, 'settle', contextOf()), true)
      await client.query('COMMIT')
    }
    t.same((await client.query('SELECT count(*)::int FROM records')).rows, [{ count: 100 }])
  })

  await t.test('a query that answers something else', async t => {
    const inbox = postgresInbox(undefined)
    for (const answer of [undefined, {}, { rows: 1 }, 'rows']) {
      await t.rejects(inbox.first(async () => answer, 'settle', contextOf()), { code: INVALID_OPTIONS, message: 'first(): expected query(text, values) to resolve to rows, or to an object that has them as `rows`' })
    }
    const missing = { code: INVALID_OPTIONS, message: /^first\(\): expected a function that runs a statement .* got a value of type object$/ }
    await t.rejects(inbox.first({ query: async () => [] } as never, 'settle', contextOf()), missing)
    await t.rejects(postgresInbox(new pg.Pool()).first({} as never, 'settle', contextOf()), missing)
    await t.rejects(inbox.first(async () => [], '', contextOf()), { code: INVALID_OPTIONS })
    await t.rejects(inbox.first(async () => [], 'settle', contextOf()), { code: 'FST_OPENAI_WEBHOOK_NO_TRANSACTION' })
    await t.rejects(inbox.first(async () => [[true, true]], 'settle', contextOf()), { code: 'FST_OPENAI_WEBHOOK_NO_TRANSACTION' })
  })

  await t.test('a record is kept as long as its inbox keeps it, whatever another one of the table keeps', async t => {
    const pool = await fresh(t)
    let runs = 0
    const kept = postgresInbox(pool).once('settle', () => { runs++ })
    const short = postgresInbox(pool, { retention: 1 })
    const other = short.once('bill', () => {})
    const context = contextOf()
    await run(kept, context)
    const rows = async (): Promise<number> => (await pool.query('SELECT 1 FROM openai_webhook_inbox')).rows.length
    for (let i = 0; i < 100; i++) await run(other)
    await until('some of the other to be gone', async () => await rows() <= 100)
    await run(kept, context)
    t.equal(runs, 1)
    await short.close()
  })

  await t.test('old records are deleted, whatever the rate; that they cannot be is logged and fails nothing', async t => {
    const pool = await fresh(t)
    const inbox = postgresInbox(pool, { retention: 60_000 })
    const handler = inbox.once('settle', () => {})
    await run(handler)
    await pool.query("INSERT INTO openai_webhook_inbox SELECT '/', '', 'old ' || i, 'settle', now() - interval '2 minutes' FROM generate_series(1, 1050) i")
    await Promise.all(Array.from({ length: 60 }, async () => await run(handler)))
    const old = async (): Promise<number> => (await pool.query("SELECT 1 FROM openai_webhook_inbox WHERE webhook_id LIKE 'old%'")).rows.length
    await until('old rows to be gone', async () => await old() === 0)
    await pool.query('CREATE FUNCTION no () RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE \'no\'; END $$; CREATE TRIGGER no BEFORE DELETE ON openai_webhook_inbox EXECUTE FUNCTION no ()')
    warnings.length = 0
    for (let i = 0; i < 60; i++) await run(handler)
    await until('the failure to be logged', () => warnings.length > 0)
    t.match(warnings[0], [{ err: { message: 'no' } }, 'old records of the inbox could not be deleted'])

    const marked = { webhookId: 'wh_marked', endpoint: '/' }
    for (let i = 0; i < 60; i++) {
      const client = await pool.connect()
      await client.query('BEGIN')
      await inbox.first(async (text, values) => await client.query(text, values), 'settle', { ...marked, webhookId: `wh_marked_${i}` })
      await client.query('COMMIT')
      client.release()
    }
    await inbox.close()
    await inbox.close()
    for (let i = 0; i < 60; i++) await run(handler)
  })
})

t.test('the recipes, as they stand in docs/recipes/postgres.md, with the real libraries', { skip: postgresMissing }, async t => {
  const document = readDocument('docs/recipes/postgres.md')
  const lines = document.text.split('\n')
  const first = lines.indexOf('## In a transaction of your own')
  const recipes = codeBlocks(document).filter(({ language, code, line }) => line > first && language === 'ts' && !code.includes('@prisma/client')).map(({ line, code }) => ({
    code, name: lines.slice(0, line).findLast(text => text.startsWith('### '))!.slice(4)
  }))
  t.same(recipes.map(({ name }) => name), ['node-postgres', 'postgres.js', 'Drizzle, with node-postgres', 'Drizzle, with postgres.js', 'Kysely', 'Knex'])
  for (const { name, code } of recipes) {
    await t.test(name, async t => {
      const pool = await fresh(t)
      await pool.query("CREATE TABLE orders (batch text PRIMARY KEY, imports int NOT NULL, CHECK (imports < 100)); INSERT INTO orders VALUES ('batch_1', 100 - 1)")
      t.intercept(process, 'env', { value: { ...process.env, DATABASE_URL: `postgres://postgres@127.0.0.1:${server.port}/${pool.options.database}` } })
      const text = `const { app } = globalThis.recipe\n${code}`
      const dir = t.testdir({ '1.ts': text, '2.ts': text })

      /** An app that remembers nothing of another one's. */
      const replica = async (copy: number): Promise<Awaited<ReturnType<typeof build>>> => {
        const app = await build(t)
        t.intercept(globalThis, 'recipe' as keyof typeof globalThis, { value: { app } as never, configurable: true, writable: true })
        await import(pathToFileURL(join(dir, `${copy}.ts`)).href)
        return app
      }
      const [one, other] = [await replica(1), await replica(2)]
      const delivery = sign(thin('batch.completed', { id: 'batch_1' }))
      t.equal((await post(one, delivery)).statusCode, 500, 'what fails is undone')
      await pool.query('UPDATE orders SET imports = 0')
      t.same((await Promise.all([post(one, delivery), post(other, delivery)])).map(({ statusCode }) => statusCode), [200, 200])
      t.same((await pool.query('SELECT imports FROM orders')).rows, [{ imports: 1 }])
      await Promise.all([one.close(), other.close()])
    })
  }
})
