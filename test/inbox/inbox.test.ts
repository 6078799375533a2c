import { join } from 'node:path'
import { rmSync } from 'node:fs'
import t from 'tap'
import { memoryStore } from '../../lib/index.ts'
import type { EventContext, EventHandler } from '../../lib/index.ts'
import { durable, sqliteInbox, sqliteStore } from '../../lib/sqlite/index.ts'
import { build, post, sign, thin } from '../support/deliveries.ts'
import { until } from '../support/faults.ts'
import { HANDLES, closeSqlite, missing, openSqlite } from '../support/sqlite.mjs'
import type { Handle } from '../support/sqlite.mjs'

const INVALID_OPTIONS = 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS'

let deliveries = 0
const context = (fields: object = {}): EventContext => ({ webhookId: `wh_${++deliveries}`, timestamp: 1, endpoint: '/', signal: new AbortController().signal, ...fields }) as EventContext
const run = (handler: EventHandler<object>, given = context()): unknown => handler.call({} as never, {}, given)

function count (db: Handle, table: string): number {
  const [{ n }] = db.prepare(`SELECT count(*) AS n FROM ${table}`).all() as [{ n: number }]
  return n
}

for (const name of HANDLES) {
  t.test(`sqliteInbox, ${name}`, { skip: missing[name] }, async t => {
    const open = (t: { teardown: (fn: () => unknown) => void }, file = ':memory:'): Handle => {
      const db = openSqlite(file, name)
      t.teardown(() => { closeSqlite(db) })
      db.exec('CREATE TABLE IF NOT EXISTS effects (row TEXT)')
      return db
    }

    await t.test('work that is asynchronous is refused, or rolled back', async t => {
      const db = open(t)
      const inbox = sqliteInbox(db)
      t.throws(() => inbox.once('settle', async () => {}), { code: INVALID_OPTIONS, message: 'once(): expected a synchronous function after the name, got an async one' })
      t.throws(() => inbox.once('settle', 1 as never), { code: INVALID_OPTIONS, message: 'once(): expected a synchronous function after the name, got number' })
      let later!: Promise<unknown>
      const disguised = inbox.once('settle', tx => {
        tx.prepare('INSERT INTO effects VALUES (?)').run('before')
        later = Promise.resolve().then(() => tx.exec("INSERT INTO effects VALUES ('later')"))
        return later
      })
      t.throws(() => run(disguised), { code: 'FST_OPENAI_WEBHOOK_ASYNC_WORK', message: /handler "settle"/ })
      await t.rejects(later, { code: 'FST_OPENAI_WEBHOOK_TRANSACTION_OVER' })
      t.equal(count(db, 'effects'), 0)
      t.equal(count(db, 'openai_webhook_inbox'), 0)
    })

    await t.test('a transaction that SQLite has rolled back by itself is over, even for work that goes on', async t => {
      const db = open(t)
      db.exec('CREATE TABLE bills (id TEXT PRIMARY KEY)')
      const inbox = sqliteInbox(db)
      let conflict = 'ROLLBACK'
      const handler = inbox.once('settle', tx => {
        tx.exec("INSERT INTO effects VALUES ('before')")
        tx.exec("INSERT INTO bills VALUES ('1')")
        const again = tx.prepare(`INSERT OR ${conflict} INTO bills VALUES (?)`)
        t.throws(() => again.run('1'), /UNIQUE/)
        tx.exec("INSERT INTO effects VALUES ('after')")
      })
      const given = context()
      t.throws(() => run(handler, given), { code: 'FST_OPENAI_WEBHOOK_TRANSACTION_OVER' })
      t.same([count(db, 'effects'), count(db, 'bills'), count(db, 'openai_webhook_inbox')], [0, 0, 0])
      conflict = 'ABORT'
      run(handler, given)
      t.same([count(db, 'effects'), count(db, 'bills'), count(db, 'openai_webhook_inbox')], [2, 1, 1], 'a statement that fails alone is the work\'s to bear')
    })

    await t.test('what tx has made ends with it', async t => {
      const db = open(t)
      const inbox = sqliteInbox(db)
      const later: Array<Promise<unknown>> = []
      const works: Record<string, (tx: Handle) => () => unknown> = {
        'a statement': tx => {
          const insert = tx.prepare('INSERT INTO effects VALUES (?)')
          return () => insert.run('later')
        },
        'its method': tx => {
          const { run } = tx.prepare('INSERT INTO effects VALUES (?)')
          return () => run('later')
        },
        'rows that are left': tx => {
          tx.prepare('INSERT INTO effects VALUES (?)').run('one')
          const rows = tx.prepare('SELECT row FROM effects').iterate()
          t.match(rows.next(), { value: { row: 'one' } })
          return () => rows.next()
        }
      }
      for (const [what, work] of Object.entries(works)) {
        const disguised = inbox.once(what, tx => {
          const act = work(tx)
          later.push(Promise.resolve().then(act))
          return later.at(-1)
        })
        t.throws(() => run(disguised), { code: 'FST_OPENAI_WEBHOOK_ASYNC_WORK' }, what)
        await t.rejects(later.at(-1)!, { code: 'FST_OPENAI_WEBHOOK_TRANSACTION_OVER' }, what)
      }
      t.equal(count(db, 'effects'), 0)

      run(inbox.once('settle', tx => {
        const insert = tx.prepare('INSERT INTO effects VALUES (?)')
        for (const row of ['a', 'b', 'c']) insert.run(row)
        t.same([...tx.prepare('SELECT row FROM effects').iterate()].map(row => ({ ...row })), [{ row: 'a' }, { row: 'b' }, { row: 'c' }])
        t.match(tx.prepare('SELECT row FROM effects').get(), { row: 'a' })
        // Not read to its end: better-sqlite3 would neither commit nor roll back.
        tx.prepare('SELECT row FROM effects').iterate().next()
      }))
      t.equal(count(db, 'effects'), 3)
      t.equal(count(db, 'openai_webhook_inbox'), 1)
    })

    await t.test('over an app that was closed, with durable() and without', async t => {
      const file = join(t.testdir(), 'webhooks.db')
      const delivery = sign(thin('batch.failed'))
      for (const options of [{}, { idempotency: false as const }, { idempotency: false as const, durably: true }]) {
        const db = open(t, file)
        const { durably, ...rest } = options as { durably?: boolean }
        const app = await build(t, { idempotency: { store: sqliteStore(db) }, ...rest, ...(durably && { runner: durable(db) }) })
        let ran!: () => void
        const running = new Promise<void>(resolve => { ran = resolve })
        app.openaiWebhook
          .on('batch.failed', sqliteInbox(db).once('settle', (tx, event) => { tx.prepare('INSERT INTO effects VALUES (?)').run(event.data.id) }))
          .on('batch.failed', () => { ran() })
        t.equal((await post(app, delivery)).statusCode, 200)
        if (durably) await running
        await app.close()
        t.equal(count(db, 'effects'), 1)
        closeSqlite(db)
      }
    })

    await t.test('a file that is locked, or was deleted: the handler fails', async t => {
      const file = join(t.testdir(), 'webhooks.db')
      const [db, other] = [open(t, file), open(t, file)]
      db.exec('PRAGMA busy_timeout = 1')
      const handler = sqliteInbox(db).once('settle', tx => { tx.exec("INSERT INTO effects VALUES ('row')") })
      const given = context()
      other.exec('BEGIN IMMEDIATE')
      t.throws(() => run(handler, given), /locked/)
      other.exec('ROLLBACK')
      run(handler, given)
      run(handler, given)
      t.equal(count(db, 'effects'), 1)
      rmSync(file)
      t.throws(() => run(handler), /ENOENT/)
    })

    await t.test('first() and a query that answers something else, a handle that is closed', async t => {
      const db = open(t)
      const inbox = sqliteInbox(db)
      db.exec('BEGIN')
      for (const answer of [undefined, {}, Promise.resolve([])]) {
        t.throws(() => inbox.first(() => answer as never, 'settle', context()), { code: INVALID_OPTIONS, message: 'first(): expected query(text, values) to return rows, or an object that has them as `rows`, at once' })
      }
      t.throws(() => inbox.first(db as never, 'settle', context()), { code: INVALID_OPTIONS, message: /^first\(\): expected a function that runs a statement .* got a value of type object$/ })
      t.throws(() => inbox.first(() => [], '', context()), { code: INVALID_OPTIONS })
      for (const [none, got] of [[null, 'null'], [undefined, 'undefined'], [{}, 'a value of type object']]) {
        t.throws(() => inbox.first(() => [], 'settle', none as never), { code: INVALID_OPTIONS, message: `inbox: expected the context of a delivery for "settle", with its endpoint and webhookId, got ${got}` })
      }
      t.equal(inbox.first(() => ({ rows: [{}] }), 'settle', context()), true)
      t.equal(inbox.first(() => ({ rows: [] }), 'settle', context()), false)
      db.exec('ROLLBACK')
      closeSqlite(db)
      t.throws(() => inbox.first(() => [], 'settle', context()), /open/)
    })

    await t.test('a record is kept as long as its inbox keeps it, whatever another one of the file keeps', async t => {
      const db = open(t)
      const [long, short] = [sqliteInbox(db), sqliteInbox(db, { retention: 1 })]
      const given = context()
      const handler = long.once('settle', tx => { tx.exec("INSERT INTO effects VALUES ('row')") })
      run(handler, given)
      const other = short.once('bill', () => {})
      for (let i = 0; i < 100; i++) {
        run(other)
        await new Promise(resolve => setImmediate(resolve))
      }
      while (count(db, 'openai_webhook_inbox') > 100) await new Promise(resolve => setImmediate(resolve))
      run(handler, given)
      t.equal(count(db, 'effects'), 1)
    })

    await t.test('old records are deleted, whatever the rate; that they cannot be is logged and fails nothing', async t => {
      const db = open(t)
      const inbox = sqliteInbox(db, { retention: 60_000 })
      const warnings: unknown[] = []
      const log = { warn: (...args: unknown[]) => { warnings.push(args) } }
      const handler = inbox.once('settle', () => {})
      const old = db.prepare("INSERT INTO openai_webhook_inbox VALUES ('/', '', ?, 'settle', ?)")
      for (let i = 0; i < 250; i++) old.run(`old ${i}`, Date.now() - 61_000)
      for (let i = 0; i < 10; i++) run(handler, context({ log }))
      while (count(db, 'openai_webhook_inbox') !== 10) await new Promise(resolve => setImmediate(resolve))

      db.exec("CREATE TRIGGER no BEFORE DELETE ON openai_webhook_inbox BEGIN SELECT RAISE(ABORT, 'no'); END")
      old.run('old', 1)
      for (let i = 0; i < 100; i++) {
        run(handler, context({})) // without a log nobody is told
        await new Promise(resolve => setImmediate(resolve))
      }
      while (warnings.length === 0) {
        run(handler, context({ log }))
        await new Promise(resolve => setImmediate(resolve))
      }
      t.match(warnings, [[{ err: /no/ }, 'old records of the inbox could not be deleted']])
      await inbox.close()
    })
  })
}

t.test('sqliteInbox: what cannot serve is told when it is given', async t => {
  t.throws(() => sqliteInbox({} as never), { code: INVALID_OPTIONS })
  t.throws(() => sqliteInbox(openSqlite(':memory:'), { retention: 0 }), { code: INVALID_OPTIONS, message: 'sqliteInbox: expected retention to be a whole number of ms, 1 or more, got 0' })
})

t.test('the name of a handler', async t => {
  const db = openSqlite(':memory:')
  t.teardown(() => { db.close() })
  const inbox = sqliteInbox(db)
  const named = (name: string) => inbox.once(name, () => {})

  await t.test('is on record for the store, wherever the handler is registered', async t => {
    const finished: string[] = []
    const app = await build(t, {
      idempotency: {
        store: {
          begin: () => ({ state: 'claimed', token: '', finished: [] }),
          checkpoint: (_key, _token, handler) => { finished.push(handler) },
          complete () {},
          extend: () => true,
          release () {}
        }
      }
    })
    const fail = (): never => { throw new Error('so that each is recorded') }
    app.openaiWebhook
      .on('batch.failed', named('app'), { name: 'app' })
      .onAny(named('any'))
      .onUnhandled(named('unhandled'))
      .on('batch.failed', fail)
      .route({ url: '/own', on: { 'batch.failed': [named('own'), fail] } })
      .route({ url: '/other', on: { 'batch.failed': named('own') } })
    t.equal((await post(app, sign(thin('batch.failed')), '/own')).statusCode, 500)
    t.same(finished.sort(), ['any', 'app', 'own'])
  })

  await t.test('is not another one', async t => {
    const app = await build(t)
    t.throws(() => app.openaiWebhook.on('batch.failed', named('settle'), { name: 'other' }), {
      code: INVALID_OPTIONS, message: 'on(): expected the name that once() gave the handler, "settle", or none, got "other"'
    })
  })

  await t.test('is used once over the app\'s handlers, and over those and a route\'s', async t => {
    const taken = /^the handler name "settle" is taken/
    const app = await build(t)
    app.openaiWebhook.on('batch.failed', named('settle'))
    t.throws(() => app.openaiWebhook.on('batch.completed', named('settle')), { code: INVALID_OPTIONS })
    t.throws(() => app.openaiWebhook.route({ url: '/own', on: { 'batch.failed': [named('settle'), named('settle')] } }), { code: INVALID_OPTIONS })
    await t.resolves(async () => { await app.ready() })

    const marked = { config: { openaiWebhook: { on: { 'batch.failed': named('settle') } } } }
    for (const add of [
      (app: Awaited<ReturnType<typeof build>>) => { app.openaiWebhook.route({ url: '/own', on: { 'batch.failed': named('settle') } }) },
      (app: Awaited<ReturnType<typeof build>>) => { app.post('/marked', { ...marked, handler: app.openaiWebhook.handler }) }
    ]) {
      const app = await build(t)
      add(app)
      // It may come later.
      app.openaiWebhook.on('batch.failed', () => {}, { name: 'settle' })
      await t.rejects(Promise.resolve(app.ready()), { code: INVALID_OPTIONS, message: taken })
    }
  })
})

t.test('request.openaiWebhook of a marked route is the context of first()', async t => {
  const db = openSqlite(':memory:')
  t.teardown(() => { db.close() })
  db.exec('CREATE TABLE effects (row TEXT)')
  const inbox = sqliteInbox(db)
  // It remembers nothing by itself.
  const app = await build(t, { idempotency: false })
  let fails = true
  await app.register(async scope => {
    for (const url of ['/one', '/other']) {
      scope.post(url, { config: { openaiWebhook: {} } }, async request => {
        db.exec('BEGIN IMMEDIATE')
        try {
          if (inbox.first((text, values) => db.prepare(text).all(...values), 'settle', request.openaiWebhook)) {
            db.prepare('INSERT INTO effects VALUES (?)').run(request.openaiWebhook.endpoint)
          }
          if (fails) throw new Error('after the effect')
          db.exec('COMMIT')
        } catch (error) {
          db.exec('ROLLBACK')
          throw error
        }
      })
    }
  }, { prefix: '/teams' })
  const delivery = sign(thin('batch.failed'))
  t.equal((await post(app, delivery, '/teams/one')).statusCode, 500)
  t.equal(count(db, 'effects'), 0)
  fails = false
  for (const url of ['/teams/one', '/teams/one', '/teams/other']) t.equal((await post(app, delivery, url)).body, '{"received":true}')
  t.same(db.prepare('SELECT row FROM effects').all().map(row => (row as { row: string }).row), ['/teams/one', '/teams/other'], 'an endpoint each')
})

t.test('a dead delivery that an inbox may have forgotten is requeued by force alone', async t => {
  const NEEDS_FORCE = {
    code: 'FST_OPENAI_WEBHOOK_NEEDS_FORCE',
    message: 'the delivery wh_1 is older than what the inbox remembers of its handler "settle", whose effect could happen twice: check whether it has happened, and pass { force: true } if the handler is to run again'
  }
  const REF = { endpoint: '/webhooks/openai', webhookId: 'wh_1' }
  const fail = (): never => { throw new Error('each time') }
  type App = Awaited<ReturnType<typeof build>>

  /** An app whose delivery is dead, by handlers on a file with inboxes that forget at once, or late. */
  async function dead (t: { teardown: (fn: () => unknown) => void }, add: (app: App, db: Handle) => void, attempts = 1) {
    const db = openSqlite(':memory:')
    t.teardown(() => { db.close() })
    const runner = durable(db, { attempts, backoff: 0 })
    const app = await build(t, { runner })
    add(app, db)
    await post(app, sign(thin('batch.failed'), { webhookId: 'wh_1' }))
    await until('it to be dead', () => runner.deadCount() === 1)
    return { app, db, runner, deadLetters: app.openaiWebhook.deadLetters }
  }
  const brief = (db: Handle) => sqliteInbox(db, { retention: 1 })

  await t.test('by once()', async t => {
    const { deadLetters, runner } = await dead(t, (app, db) => { app.openaiWebhook.on('batch.failed', brief(db).once('settle', fail)) })
    await t.rejects(deadLetters.requeue(REF), NEEDS_FORCE)
    t.throws(() => runner.requeue(REF), NEEDS_FORCE)
    t.equal(await deadLetters.count(), 1)
    t.equal(await deadLetters.requeue(REF, { force: true }), true)
    await until('it to be dead again', () => runner.deadCount() === 1)
    await t.rejects(deadLetters.requeue(REF), NEEDS_FORCE, 'what may have happened in its first life is not remembered any better')
  })

  await t.test('by first(), in a handler that failed before it in the attempts that came after', async t => {
    const { deadLetters } = await dead(t, (app, db) => {
      const inbox = brief(db)
      let attempts = 0
      app.openaiWebhook.on('batch.failed', (_event, context) => {
        if (++attempts > 1) fail()
        db.exec('BEGIN')
        inbox.first((text, values) => db.prepare(text).all(...values), 'settle', context)
        db.exec('ROLLBACK')
        fail()
      }, { name: 'settle' })
    }, 3)
    await t.rejects(deadLetters.requeue(REF), NEEDS_FORCE)
  })

  await t.test('by the one of two inboxes that forgets first', async t => {
    const { deadLetters, runner } = await dead(t, (app, db) => {
      const [late, early] = [sqliteInbox(db), brief(db)]
      app.openaiWebhook.on('batch.failed', (_event, context) => {
        for (const inbox of [late, early, late]) {
          db.exec('BEGIN')
          inbox.first((text, values) => db.prepare(text).all(...values), 'settle', context)
          db.exec('ROLLBACK')
        }
        fail()
      }, { name: 'settle' })
    })
    const { timestamp, remembered } = runner.dead()[0]!
    t.same(remembered, { settle: timestamp * 1_000 + 1 })
    await t.rejects(deadLetters.requeue(REF), NEEDS_FORCE)
  })

  await t.test('where its process ended in the last attempt, by any inbox that there is', async t => {
    const db = openSqlite(':memory:')
    t.teardown(() => { db.close() })
    const runner = durable(db, { attempts: 1 })
    const app = await build(t, { runner })
    brief(db)
    app.openaiWebhook.on('batch.failed', () => {}, { name: 'settle' })
    db.prepare('INSERT INTO openai_webhook_jobs (key, job, attempts, due) VALUES (?, ?, 1, 0)').run('/webhooks/openai wh_1', JSON.stringify({ ...REF, timestamp: 1, event: thin('batch.failed') }))
    await app.ready()
    await until('it to be dead', () => runner.deadCount() === 1)
    t.match(runner.dead(), [{ remembered: { settle: 1_001 } }])
    await t.rejects(app.openaiWebhook.deadLetters.requeue(REF), NEEDS_FORCE)
  })

  await t.test('where its process ended in an earlier attempt, and no handler came as far as the inbox since', async t => {
    for (const how of ['the store is down', 'the handler fails before it'] as const) {
      const db = openSqlite(':memory:')
      t.teardown(() => { db.close() })
      const runner = durable(db, { attempts: 3, backoff: 0 })
      const begin = (): never => { throw new Error('the store is down') }
      const app = await build(t, { runner, ...(how === 'the store is down' && { idempotency: { store: { ...memoryStore(), begin } } }) })
      brief(db)
      app.openaiWebhook.on('batch.failed', fail, { name: 'settle' })
      db.prepare('INSERT INTO openai_webhook_jobs (key, job, attempts, due) VALUES (?, ?, 1, 0)').run('/webhooks/openai wh_1', JSON.stringify({ ...REF, timestamp: 1, event: thin('batch.failed') }))
      await app.ready()
      await until('it to be dead', () => runner.deadCount() === 1)
      t.match(runner.dead(), [{ attempts: 3, remembered: { settle: 1_001 } }], how)
      await t.rejects(app.openaiWebhook.deadLetters.requeue(REF), NEEDS_FORCE)
    }
  })

  await t.test('but not where the end of an attempt could not be recorded by a process that goes on', async t => {
    for (const attempts of [1, 2]) {
      const file = join(t.testdir(), 'webhooks.db')
      const [db, other] = [openSqlite(file), openSqlite(file)]
      t.teardown(() => { for (const handle of [db, other]) handle.close() })
      db.exec('PRAGMA busy_timeout = 1')
      const runner = durable(db, { attempts, lease: 50, backoff: 0 })
      const app = await build(t, { runner })
      brief(db)
      let starts = 0
      const troubles: unknown[] = []
      app.openaiWebhook.on('batch.failed', () => {
        if (++starts === 1) other.exec('BEGIN IMMEDIATE')
        fail()
      }, { name: 'settle' }).onError(error => { troubles.push(error) })
      await app.listen({ port: 0, host: '127.0.0.1' })
      await post(app, sign(thin('batch.failed'), { webhookId: 'wh_1' }))
      await until('the trouble to be told', () => troubles.some(error => (error as Error).message === 'database is locked'))
      other.exec('ROLLBACK')
      await until('it to be dead', () => runner.deadCount() === 1)
      t.match(runner.dead(), [{ attempts, errors: [{ handler: 'settle', message: 'each time' }] }])
      t.notOk('remembered' in runner.dead()[0]!)
      t.equal(await app.openaiWebhook.deadLetters.requeue(REF), true)
    }
  })

  await t.test('and any other is requeued at any age', async t => {
    for (const add of [
      (app: App, db: Handle) => { app.openaiWebhook.on('batch.failed', sqliteInbox(db).once('settle', fail)) },
      (app: App, db: Handle) => { app.openaiWebhook.on('batch.failed', brief(db).once('settle', () => {})).on('batch.failed', fail) },
      (app: App, db: Handle) => { app.openaiWebhook.on('batch.completed', brief(db).once('settle', () => {})).on('batch.failed', fail) }
    ]) {
      const { deadLetters } = await dead(t, add)
      t.equal(await deadLetters.requeue(REF), true)
    }
  })
})
