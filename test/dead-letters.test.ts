import { join } from 'node:path'
import { runInNewContext } from 'node:vm'
import type { FastifyInstance } from 'fastify'
import Database from 'libsql'
import { Registry } from 'prom-client'
import t from 'tap'
import { background, channels, deadDelivery, memoryStore } from '../lib/index.ts'
import type { DeadDelivery, EnqueueMessage, Job, OpenAIWebhookOptions, Runner, RunnerHost } from '../lib/index.ts'
import { webhookMetrics } from '../lib/metrics.ts'
import { durable, sqliteStore } from '../lib/sqlite/index.ts'
import { build, post, sign, thin } from './support/deliveries.ts'
import { answer, batchFailed, until } from './support/faults.ts'
import { capturedLog, codeOf, deferred, messageOf, redelivered } from './support/observe.ts'
import type { LogLine } from './support/observe.ts'

// What fails is told, whatever the runner: with the user's own stack, and as dead once nothing will attempt it again.

type Teardown = { teardown: (fn: () => unknown) => void }

const ENDPOINT = '/webhooks/openai'
const JOB: Job = { webhookId: 'wh_1', timestamp: 1, endpoint: ENDPOINT, event: thin('batch.failed') }
const REF = { endpoint: ENDPOINT, webhookId: 'wh_1' }

/** What a reader of a stack looks for. */
function theHandlerOfTheUser (): never {
  throw new Error('no such customer')
}

const open = (file = ':memory:'): InstanceType<typeof Database> => new Database(file)

/** An app that listens, so that the process waits for attempts to come. */
async function listening (t: Teardown, options: OpenAIWebhookOptions, prepare: (app: FastifyInstance) => void = () => {}) {
  const log = capturedLog()
  const app = await build(t, options, { logger: log.logger })
  const died: DeadDelivery[] = []
  const errors: unknown[] = []
  app.openaiWebhook.onDead(delivery => { died.push(delivery) }).onError(error => { errors.push(error) })
  prepare(app)
  await app.listen({ port: 0, host: '127.0.0.1' })
  // Fastify's own line about an answer has the same text, and no delivery.
  const lines = (text: string): LogLine[] => log.lines.filter(({ msg, res, req }) => msg.startsWith(text) && res === undefined && req === undefined)
  return { app, log, died, errors, lines }
}

/** The messages of the channel `dead` until the test ends. */
function told (t: Teardown): DeadDelivery[] {
  const messages: DeadDelivery[] = []
  const listener = (message: DeadDelivery): void => { messages.push(message) }
  channels.dead.subscribe(listener)
  t.teardown(() => channels.dead.unsubscribe(listener))
  return messages
}

function metricsOf (t: Teardown): () => Promise<Record<string, number>> {
  const register = new Registry()
  const metrics = webhookMetrics({ register })
  t.teardown(() => metrics.close())
  return async () => Object.fromEntries((await register.metrics()).split('\n').filter(line => line !== '' && !line.startsWith('#')).map(line => {
    const [name, value] = line.split(' ')
    return [name!, Number(value)]
  }))
}

t.test('the user\'s own stack is in the log, and none of the plugin\'s log code', async t => {
  const failing = (app: FastifyInstance): void => {
    app.openaiWebhook.on('batch.failed', async () => theHandlerOfTheUser(), { name: 'bill' })
  }
  for (const [name, runner, message] of [
    ['inline', undefined, 'an event handler failed'],
    ['background', background(), 'webhook delivery is dead'],
    ['durable, with attempts left', durable(open(), { backoff: 60_000 }), 'webhook delivery failed and will be attempted again'],
    ['durable, without', durable(open(), { attempts: 1 }), 'webhook delivery is dead']
  ] as const) {
    const { app, lines } = await listening(t, runner === undefined ? {} : { runner }, failing)
    await post(app, batchFailed())
    await until('the line', () => lines(message).length === 1)
    const [{ err }] = lines(message) as [LogLine]
    const { stack, aggregateErrors: [each] = [] } = err as unknown as { stack: string, aggregateErrors?: Array<{ stack: string }> }
    t.match(stack, /^AggregateError: 1 of 1 handlers failed: no such customer\nhandler "bill": Error: no such customer\n +at .*theHandlerOfTheUser /, name)
    t.match(each!.stack, /^Error: no such customer\n +at .*theHandlerOfTheUser /, name)
    t.notMatch(JSON.stringify(err), /lib\/log/, name)
    t.equal(lines('webhook trouble').length, 0, `${name}: it is none`)
    await app.close()
  }
})

t.test('a delivery that dies', async t => {
  t.test('is told once as dead, and each attempt before as what it is', async t => {
    const messages = told(t)
    const metrics = metricsOf(t)
    const { app, died, errors, lines } = await listening(t, { runner: durable(open(), { attempts: 2, backoff: 1 }) }, app => {
      app.openaiWebhook
        .on('batch.failed', () => {}, { name: 'import' })
        .on('batch.failed', theHandlerOfTheUser, { name: 'bill' })
    })
    t.equal((await metrics())['webhook_dead_total'], 0, 'a first increment is seen')
    t.equal((await metrics())['webhook_dead_deliveries'], 0)
    const from = Date.now()
    await post(app, batchFailed('wh_1'))
    await until('it to be dead', async () => await app.openaiWebhook.deadLetters.count() === 1)
    const fields = { level: 50, webhookId: 'wh_1', eventType: 'batch.failed', endpoint: ENDPOINT }
    t.match(lines('webhook delivery'), [
      { ...fields, msg: 'webhook delivery failed and will be attempted again', attempt: 1, attempts: 2 },
      { ...fields, msg: 'webhook delivery is dead', attempt: 2 }
    ])
    t.equal(lines('webhook delivery').length, 2)
    const [dead] = await app.openaiWebhook.deadLetters.list()
    t.match(dead, {
      ...REF,
      timestamp: Number,
      event: { type: 'batch.failed', data: { id: 'batch_1' } },
      attempts: 2,
      errors: [{ handler: 'bill', message: 'no such customer', stack: /^Error: no such customer\n +at .*theHandlerOfTheUser / }],
      finished: ['import']
    })
    t.ok(dead!.diedAt >= from && dead!.diedAt <= Date.now())
    t.same([died, messages], [[dead], [dead]])
    t.match(errors, [{ code: 'FST_OPENAI_WEBHOOK_HANDLER_FAILED' }, { code: 'FST_OPENAI_WEBHOOK_HANDLER_FAILED' }], 'each failure is told to onError')
    t.match(await metrics(), { webhook_dead_total: 1, webhook_dead_deliveries: 1, webhook_trouble_total: 0 })
    t.equal(await answer(app, batchFailed('wh_1')), '200 duplicate', 'delivered again it stays dead')
    t.equal(await app.openaiWebhook.deadLetters.count(), 1)
  })

  t.test('under background() is told as dead too, and kept nowhere', async t => {
    const { app, died, lines } = await listening(t, { runner: background() }, app => {
      app.openaiWebhook.on('batch.failed', theHandlerOfTheUser)
    })
    await post(app, batchFailed('wh_1'))
    await app.close()
    t.match(died, [{ ...REF, attempts: 1, errors: [{ handler: '#0', message: 'no such customer' }], finished: [] }])
    t.match(lines('webhook delivery is dead'), [{ attempt: 1 }])
    t.equal(await codeOf(() => app.openaiWebhook.deadLetters.count()), 'NO_DEAD_LETTERS')
  })

  t.test('is told to every onDead handler; one that throws or rejects is logged, and changes nothing', async t => {
    const { app, died, lines } = await listening(t, { runner: background() }, app => {
      app.openaiWebhook
        .on('batch.failed', theHandlerOfTheUser)
        .onDead(() => { throw new Error('threw') })
        .onDead(async () => { throw new Error('rejected') })
        .onDead(delivery => { died.push(delivery) })
    })
    await post(app, batchFailed('wh_1'))
    await app.close()
    await until('both to be logged', () => lines('an onDead handler failed').length === 2)
    t.match(lines('an onDead handler failed').map(({ webhookId, err }) => [webhookId, err!.message]), [['wh_1', 'threw'], ['wh_1', 'rejected']])
    t.equal(died.length, 2)
    t.throws(() => app.openaiWebhook.onDead(() => {}), { code: 'FST_OPENAI_WEBHOOK_ALREADY_STARTED' })
  })

  t.test('of a store that failed has that for its error', async t => {
    const db = open()
    await durable(db).run(JOB)
    const { died } = await listening(t, {
      runner: durable(db, { attempts: 1 }),
      idempotency: { store: { ...memoryStore(), begin: () => { throw new Error('connect ECONNREFUSED') } } }
    })
    await until('it to be dead', () => died.length === 1)
    t.match(died, [{ errors: [{ handler: null, message: 'connect ECONNREFUSED', stack: /^Error: connect ECONNREFUSED\n +at / }], finished: [] }])
  })
})

t.test('what failed in the last attempt is told where that cannot be recorded, and it is dead when it can', async t => {
  const file = join(t.testdir(), 'webhooks.db')
  const [db, other] = [open(file), open(file)]
  db.exec('PRAGMA busy_timeout = 1')
  const { app, died, lines } = await listening(t, { runner: durable(db, { attempts: 1, lease: 50 }) }, app => {
    app.openaiWebhook.on('batch.failed', () => {
      other.exec('BEGIN IMMEDIATE')
      theHandlerOfTheUser()
    })
  })
  await post(app, batchFailed('wh_1'))
  await until('both to be told', () => lines('webhook delivery failed').length === 1 && lines('webhook trouble').some(({ webhookId }) => webhookId === 'wh_1'))
  t.equal(lines('webhook delivery failed')[0]!.msg, 'webhook delivery failed')
  t.ok(lines('webhook trouble').every(({ err }) => err?.message === 'database is locked'))
  t.same(died, [])
  other.exec('ROLLBACK')
  await until('it to be dead', () => died.length === 1)
  t.match(died, [{ attempts: 1, errors: [{ handler: '#0', message: 'no such customer', stack: /theHandlerOfTheUser/ }], finished: [] }])
})

t.test('whatever is thrown is kept, and cut where it is long', async t => {
  const HUGE = 'x'.repeat(1_000_000)
  const chain = (length: number): Error => new Error(`cause ${length}`, length === 0 ? {} : { cause: chain(length - 1) })
  const cases: Array<[thrown: unknown, expected: { message?: unknown, stack?: unknown }]> = [
    ['a text', { message: 'a text', stack: '' }],
    [null, { message: 'threw null', stack: '' }],
    [7, { message: 'threw number', stack: '' }],
    [{ reason: 'unknown' }, { message: 'threw object', stack: '' }],
    [runInNewContext('new Error("of another realm")'), { message: 'of another realm', stack: /^Error: of another realm\n/ }],
    [new Error(HUGE), { message: 'x'.repeat(2_000) }],
    [chain(9), { message: 'cause 9', stack: /^Error: cause 9\n[^]*\ncaused by: Error: cause 8\n[^]*\ncaused by: Error: cause 6\n/ }],
    [new AggregateError([new Error('the first'), new Error('the second')], 'all failed'), { message: 'all failed', stack: /AggregateError: all failed\n[^]*caused by: Error: the first\n[^]*caused by: Error: the second\n/ }],
    [Object.assign(new Error('no stack'), { stack: undefined }), { message: 'no stack', stack: '' }],
    [Object.defineProperty(new Error(), 'message', { get () { throw new Error('a getter that throws') } }), { message: 'an error that cannot be read' }],
    [Object.defineProperty(new Error('unreadable'), 'stack', { get () { throw new Error('a getter that throws') } }), { message: 'unreadable', stack: '' }]
  ]
  for (const [thrown, expected] of cases) {
    const { app, died, lines } = await listening(t, { runner: background() }, app => {
      app.openaiWebhook.on('batch.failed', () => { throw thrown })
    })
    await post(app, batchFailed())
    await app.close()
    const [error] = died[0]!.errors
    t.match(error, { handler: '#0', ...expected })
    t.ok(error!.message.length <= 2_000 && error!.stack.length <= 5_000)
    t.equal(lines('webhook delivery is dead').length, 1)
    t.ok(JSON.stringify(lines('webhook delivery is dead')).length < 60_000)
  }

  t.test('and of many handlers so many', async t => {
    const { app, died } = await listening(t, { runner: background() }, app => {
      for (let nth = 0; nth < 30; nth++) app.openaiWebhook.on('batch.failed', () => { throw new Error(`failure ${nth}`) })
    })
    await post(app, batchFailed())
    await app.close()
    t.same(died[0]!.errors.map(({ message }) => message), Array.from({ length: 20 }, (_, nth) => `failure ${nth}`))
  })

  t.test('a cause that cannot be read is left alone', async t => {
    const error = Object.defineProperty(new Error('an answer'), 'cause', { get () { throw new Error('a getter that throws') } })
    t.match(deadDelivery(JOB, 3, error, 7), { ...JOB, attempts: 3, errors: [{ handler: null, message: 'an answer' }], finished: [], diedAt: 7 })
    t.match(deadDelivery(JOB, 3, undefined).errors, [{ handler: null, message: 'threw undefined', stack: '' }])
  })
})

t.test('a requeued delivery runs only what had not succeeded', async t => {
  /** Three handlers of which the second fails until it is told not to. */
  function handlers (app: FastifyInstance): { ran: string[], mend: () => void } {
    const ran: string[] = []
    let fails = true
    for (const name of ['import', 'bill', 'thank']) {
      app.openaiWebhook.on('batch.failed', () => {
        ran.push(name)
        if (name === 'bill' && fails) throw new Error('no such customer')
      }, { name })
    }
    return { ran, mend: () => { fails = false } }
  }

  t.test('at any age: whatever the store has forgotten', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    const first = await build(t, { runner: durable(open(file), { attempts: 1 }) })
    const before = handlers(first)
    await post(first, batchFailed('wh_1'))
    await until('it to be dead', async () => await first.openaiWebhook.deadLetters.count() === 1)
    await first.close()
    t.same(before.ran, ['import', 'bill', 'thank'])

    const runner = durable(open(file), { attempts: 2, backoff: 1 })
    const second = await build(t, { runner })
    const after = handlers(second)
    await second.listen({ port: 0, host: '127.0.0.1' })
    t.equal(await second.openaiWebhook.deadLetters.requeue(REF), true)
    await until('it to be dead again', () => runner.deadCount() === 1)
    t.same(after.ran, ['bill', 'bill'])
    t.match(runner.dead(), [{ attempts: 2, finished: ['import', 'thank'] }], 'it keeps what had finished in its first life')
    after.mend()
    t.equal(await second.openaiWebhook.deadLetters.requeue(runner.dead()[0]!, { force: true }), true)
    await until('it to be done', () => after.ran.length === 3 && runner.depth!() === 0)
    t.same(after.ran, ['bill', 'bill', 'bill'])
    t.equal(await second.openaiWebhook.deadLetters.requeue(REF), false)
  })

  t.test('an attempt after a restart does so too', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    const db = open(file)
    const first = await build(t, { runner: durable(db, { backoff: 60_000 }) })
    const before = handlers(first)
    await post(first, batchFailed('wh_1'))
    await until('the attempt to end', () => (db.prepare('SELECT error FROM openai_webhook_jobs').all() as Array<{ error: unknown }>)[0]?.error !== null)
    await first.close()
    t.same(before.ran, ['import', 'bill', 'thank'])
    db.exec('UPDATE openai_webhook_jobs SET due = 0')

    const second = await build(t, { runner: durable(db) })
    const after = handlers(second)
    after.mend()
    await second.ready()
    await until('it to run', () => after.ran.length > 0)
    await second.close()
    t.same(after.ran, ['bill'])
  })

  t.test('where the delivery comes again while it is started', async t => {
    let host!: RunnerHost
    let started: Promise<unknown> | undefined
    // It finds the requeued job while the delivery that came again has the claim.
    const runner: Runner = {
      start (startedBy) { host = startedBy },
      run (job) { started = Promise.resolve(host.process({ ...job, finished: ['import', 'thank'] })) }
    }
    const app = await build(t, { runner })
    const { ran, mend } = handlers(app)
    mend()
    await post(app, batchFailed('wh_1'))
    await started
    t.same(ran, ['bill'])
  })
})

t.test('an attempt that ended with its process, and was the last', async t => {
  /** A row as a crash in the only attempt leaves it. */
  async function crashed (file: string): Promise<InstanceType<typeof Database>> {
    const db = open(file)
    await durable(db).run(JOB)
    db.exec('UPDATE openai_webhook_jobs SET attempts = 1')
    return db
  }

  t.test('is dead with what the store knows to have succeeded', async t => {
    const db = await crashed(join(t.testdir(), 'webhooks.db'))
    const store = sqliteStore(db)
    const claim = await store.begin(`${ENDPOINT} wh_1`, 600_000)
    if (claim.state === 'claimed') {
      await store.checkpoint(`${ENDPOINT} wh_1`, claim.token, 'import')
      await store.release(`${ENDPOINT} wh_1`, claim.token)
    }
    const runner = durable(db, { attempts: 1 })
    const { died, errors, lines } = await listening(t, { runner, idempotency: { store } })
    await until('it to be dead', () => runner.deadCount() === 1)
    const expected = { ...REF, attempts: 1, errors: [{ handler: null, message: 'the process ended while the handlers ran' }], finished: ['import'] }
    t.match(runner.dead(), [expected])
    t.match(died, [expected])
    t.match(errors, [{ message: 'the process ended while the handlers ran' }])
    t.match(lines('webhook'), [{ msg: 'webhook delivery is dead', attempt: 1, webhookId: 'wh_1' }])
    t.match(await store.begin(`${ENDPOINT} wh_1`, 1), { state: 'claimed', finished: ['import'] }, 'the claim was given back')
  })

  t.test('is not dead where the store knows it to have been processed', async t => {
    const db = await crashed(join(t.testdir(), 'webhooks.db'))
    const store = sqliteStore(db)
    const claim = await store.begin(`${ENDPOINT} wh_1`, 600_000)
    if (claim.state === 'claimed') await store.complete(`${ENDPOINT} wh_1`, claim.token, 600_000)
    const runner = durable(db, { attempts: 1 })
    const { died, lines } = await listening(t, { runner, idempotency: { store } })
    await until('it to be done', () => runner.depth!() === 0)
    t.equal(runner.deadCount(), 0)
    t.same([died, lines('webhook')], [[], []])
  })

  t.test('waits for a store that cannot be reached', async t => {
    const db = await crashed(join(t.testdir(), 'webhooks.db'))
    const runner = durable(db, { attempts: 1, lease: 30 })
    let down = true
    const store = memoryStore()
    const { died, lines } = await listening(t, {
      runner,
      idempotency: {
        store: {
          ...store,
          begin (key, lease) {
            if (down) throw new Error('connect ECONNREFUSED')
            return store.begin(key, lease)
          }
        }
      }
    })
    await until('the trouble to be told', () => lines('webhook trouble').length > 0)
    t.equal(runner.deadCount(), 0)
    t.match(lines('webhook trouble'), [{ webhookId: 'wh_1' }])
    down = false
    await until('it to be dead', () => died.length === 1)
  })
})

t.test('a file of an older version', async t => {
  const OLD = `
    CREATE TABLE openai_webhook_jobs (
      key TEXT PRIMARY KEY, job TEXT NOT NULL,
      state TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'done', 'dead')),
      attempts INTEGER NOT NULL DEFAULT 0, due INTEGER NOT NULL, error TEXT, ended INTEGER
    ) WITHOUT ROWID`
  const row = "INSERT INTO openai_webhook_jobs (key, job, state, attempts, due, error, ended) VALUES (?, ?, 'dead', 16, 0, ?, ?)"

  t.test('is given the column that it lacks, and its dead are read', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    const db = open(file)
    db.exec(OLD)
    const jobs = ['wh_1', 'wh_2'].map(webhookId => ({ ...JOB, webhookId }))
    db.prepare(row).run(`${ENDPOINT} wh_1`, JSON.stringify(jobs[0]), '1 of 2 handlers failed: no such customer', 1)
    db.prepare(row).run(`${ENDPOINT} wh_2`, JSON.stringify(jobs[1]), null, 2)
    const runners = [durable(db), durable(open(file)), durable(db)]
    for (const runner of runners) {
      t.same(runner.dead(), [
        { ...jobs[0], attempts: 16, errors: [{ handler: null, message: '1 of 2 handlers failed: no such customer', stack: '' }], finished: [], diedAt: 1 },
        { ...jobs[1], attempts: 16, errors: [{ handler: null, message: '', stack: '' }], finished: [], diedAt: 2 }
      ])
    }
    t.equal(runners[0]!.requeue(REF), true)
    t.same(runners[1]!.dead().map(({ webhookId }) => webhookId), ['wh_2'])
  })

  t.test('may be written by both: the last one counts, and what had finished is kept', async t => {
    const db = open()
    const runner = durable(db, { attempts: 1 })
    const app = await build(t, { runner })
    app.openaiWebhook.on('batch.failed', () => {}, { name: 'import' }).on('batch.failed', theHandlerOfTheUser, { name: 'bill' })
    await post(app, batchFailed('wh_1'))
    await until('it to be dead', () => runner.deadCount() === 1)
    db.exec("UPDATE openai_webhook_jobs SET attempts = 3, error = 'as the older one says'")
    t.match(runner.dead(), [{ attempts: 3, errors: [{ handler: null, message: 'as the older one says' }], finished: ['import'] }])
  })
})

t.test('deadLetters', async t => {
  t.test('is refused where the runner keeps none', async t => {
    for (const runner of [undefined, background(), { run () {} }]) {
      const { deadLetters } = (await build(t, runner === undefined ? {} : { runner })).openaiWebhook
      for (const ask of [() => deadLetters.list(), () => deadLetters.count(), () => deadLetters.requeue(REF)]) {
        t.equal(await codeOf(ask), 'NO_DEAD_LETTERS')
        t.match(await messageOf(ask), /^the runner keeps no dead deliveries: expected durable\(\), bullmq\(\), pgboss\(\), or one with dead\(\)/)
      }
    }
  })

  t.test('asks any runner that has them, as its own methods', async t => {
    class Keeping implements Runner {
      readonly asked: unknown[] = []
      run (): void {}
      dead (...args: unknown[]): DeadDelivery[] {
        this.asked.push(['dead', ...args])
        return [deadDelivery(JOB, 3, new Error('failed'), 1)]
      }

      async deadCount (): Promise<number> {
        this.asked.push(['deadCount'])
        return 7
      }

      async requeue (...args: unknown[]): Promise<boolean> {
        this.asked.push(['requeue', ...args])
        return true
      }
    }
    const runner = new Keeping()
    const metrics = metricsOf(t)
    const app = await build(t, { runner })
    const { deadLetters } = app.openaiWebhook
    t.match(await deadLetters.list(), [{ webhookId: 'wh_1', attempts: 3 }])
    await deadLetters.list({ limit: 5, type: 'batch.failed' })
    t.equal(await deadLetters.count(), 7)
    const [delivery] = await deadLetters.list({ limit: 1 })
    t.equal(await deadLetters.requeue(delivery!), true)
    t.equal(await deadLetters.requeue({ ...REF, tenant: 'acme' }, { force: true }), true)
    t.same(runner.asked, [
      ['dead', 100, undefined], ['dead', 5, 'batch.failed'], ['deadCount'], ['dead', 1, undefined],
      ['requeue', REF, { force: false }], ['requeue', { ...REF, tenant: 'acme' }, { force: true }]
    ])
    await app.ready()
    t.match(await metrics(), { webhook_dead_deliveries: 7, webhook_queue_depth: 0 })
  })

  t.test('tells a wrong argument', async t => {
    const { deadLetters } = (await build(t, { runner: durable(open()) })).openaiWebhook
    for (const ask of [
      () => deadLetters.list({ limit: 0 }), () => deadLetters.list({ limit: '1' as never }), () => deadLetters.list({ type: 7 as never }),
      () => deadLetters.requeue({ webhookId: 'wh_1' } as never), () => deadLetters.requeue({ endpoint: ENDPOINT } as never), () => deadLetters.requeue(undefined as never),
      () => deadLetters.requeue(REF, { force: 'false' as never })
    ]) {
      t.match(await messageOf(ask), /^deadLetters\.\w+\(\): expected /)
      t.equal(await codeOf(ask), 'INVALID_OPTIONS')
    }
    const runner = durable(open())
    t.throws(() => runner.dead({ limit: 1 } as never), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: 'durable: dead(): expected limit to be a whole number of deliveries, 1 or more, got a value of type object' })
    t.throws(() => runner.requeue(REF, { forc: true } as never), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: 'durable: requeue(): unknown option "forc", did you mean "force"?' })
    const app = await build(t)
    t.throws(() => app.openaiWebhook.onDead('a listener' as never), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: 'onDead(): expected a function, got string' })
  })

  t.test('of several tenants keeps them apart', async t => {
    const db = open()
    const runner = durable(db, { attempts: 1 })
    await runner.start!({ process: async () => { throw new Error('failed') }, report () {} })
    for (const tenant of ['acme', 'globex']) runner.run({ ...JOB, tenant })
    await until('both to be dead', () => runner.deadCount() === 2)
    t.equal(runner.requeue(REF), false)
    t.equal(runner.requeue({ ...REF, tenant: 'acme' }), true)
    await runner.close!()
  })
})

t.test('a job says whether its route had handlers of its own', async t => {
  const received: Job[] = []
  const queue = (): Runner & { host?: RunnerHost } => ({
    start (host) { this.host = host },
    run (job) { received.push(job) },
    depth: () => 0
  })
  const receiver = await build(t, { runner: queue() })
  receiver.openaiWebhook.on('batch.failed', () => {})
  receiver.openaiWebhook.route({ url: '/own', on: { 'batch.failed': () => {} } })
  receiver.openaiWebhook.route({ url: '/none', on: { 'batch.failed': [] } })
  for (const url of [ENDPOINT, '/own', '/none']) await post(receiver, batchFailed('wh_1'), url)
  t.same(received.map(({ endpoint, routeHandlers }) => [endpoint, routeHandlers]), [[ENDPOINT, undefined], ['/own', true], ['/none', undefined]])
  const own = JSON.parse(JSON.stringify(received[1])) as Job // as a queue carries it

  for (const [name, prepare, runs] of [
    ['no such route', () => {}, undefined],
    ['a route without them', (app: FastifyInstance) => app.openaiWebhook.route({ url: '/own' }), undefined],
    ['the same route', (app: FastifyInstance, ran: string[]) => app.openaiWebhook.route({ url: '/own', on: { 'batch.failed': () => { ran.push('route') } } }), ['app', 'route']]
  ] as const) {
    t.test(`a process with ${name} ${runs === undefined ? 'fails it' : 'runs it'}`, async t => {
      const runner = queue()
      const log = capturedLog()
      const worker = await build(t, { runner }, { logger: log.logger })
      const ran: string[] = []
      worker.openaiWebhook.on('batch.failed', () => { ran.push('app') })
      prepare(worker, ran)
      await worker.ready()
      const processed = codeOf(() => runner.host!.process(own, 1))
      t.equal(await processed, runs === undefined ? 'MISSING_ROUTE' : 'none')
      t.same(ran, runs ?? [])
      await runner.host!.process({ ...own, endpoint: '/elsewhere', routeHandlers: undefined as never }, 1)
      t.equal(ran.at(-1), 'app', 'one that had none is run by the app\'s handlers')
    })
  }

  t.test('under durable() it is attempted again, told as trouble, and found by the process that has the route', async t => {
    const file = join(t.testdir(), 'webhooks.db')
    durable(open(file)).run(own)
    const without = await listening(t, { runner: durable(open(file), { backoff: 1 }) })
    await until('it to be told', () => without.lines('webhook trouble').length > 1)
    t.match(without.lines('webhook trouble')[0], { attempt: 1, endpoint: '/own', err: { message: /^the delivery was received at \/own, which has handlers of its own, and this process has no such route/ } })
    await without.app.close()
    const ran = deferred()
    await listening(t, { runner: durable(open(file), { backoff: 1 }) }, app => {
      app.openaiWebhook.route({ url: '/own', on: { 'batch.failed': () => { ran.resolve() } } })
    })
    await ran.promise
  })
})

t.test('a delivery that is queued already is answered as a duplicate, where the runner can tell', async t => {
  const messages: EnqueueMessage[] = []
  const listener = (message: unknown): void => { messages.push({ ...message as EnqueueMessage }) }
  channels.enqueue.asyncEnd.subscribe(listener as never)
  t.teardown(() => channels.enqueue.asyncEnd.unsubscribe(listener as never))
  const known = new Set<string>()
  function take ({ webhookId }: Job): 'duplicate' | undefined {
    if (known.has(webhookId)) return 'duplicate'
    known.add(webhookId)
    return undefined
  }
  for (const [how, run] of [
    ['soon', take],
    ['later', async (job: Job) => take(job)],
    ['never', () => {}]
  ] as const) {
    t.test(how, async t => {
      messages.length = 0
      const metrics = metricsOf(t)
      const log = capturedLog()
      const app = await build(t, { runner: { run, depth: () => 0 } }, { logger: log.logger })
      const delivery = sign(thin('batch.failed'), { webhookId: `wh_${how}` })
      const second = how === 'never' ? '200' : '200 duplicate'
      t.same([await answer(app, delivery), await answer(app, redelivered(delivery))], ['200', second])
      t.same(messages.map(({ duplicate }) => duplicate), [false, how !== 'never'])
      const counted = await metrics()
      t.same([counted['webhook_events_total{event_type="batch.failed",status="queued"}'], counted['webhook_events_total{event_type="batch.failed",status="duplicate"}']], how === 'never' ? [2, undefined] : [1, 1])
      t.equal(counted['webhook_duplicates_total{state="queued"}'], how === 'never' ? 0 : 1)
      t.match(log.lines.filter(({ msg }) => msg === 'webhook delivery is a duplicate'), how === 'never' ? [] : [{ state: 'queued', webhookId: `wh_${how}` }])
    })
  }
  t.test('durable() tells of what waits, has been done and is dead', async t => {
    const runner = durable(open(), { attempts: 1 })
    const app = await build(t, { runner })
    app.openaiWebhook.on('batch.failed', (_event, { webhookId }) => { if (webhookId === 'wh_dead') throw new Error('failed') })
    for (const id of ['wh_done', 'wh_dead']) {
      t.equal(await answer(app, batchFailed(id)), '200')
      await until('it to end', () => runner.depth!() === 0)
      t.equal(await answer(app, batchFailed(id)), '200 duplicate')
    }
  })
})

t.test('a claim that was lost before its success was recorded is told, once', async t => {
  for (const [name, complete, expected] of [
    ['a store that says so', () => false, 1],
    ['a store that says so later', async () => false, 1],
    ['a store that says nothing', () => {}, 0],
    ['a store that holds it', () => true, 0]
  ] as const) {
    const { app, errors, lines } = await listening(t, { idempotency: { store: { ...memoryStore(), complete }, lease: 7_000 } })
    t.equal(await answer(app, batchFailed('wh_1')), '200', name)
    t.equal(lines('webhook trouble').length, expected, name)
    if (expected === 1) t.match(errors, [{ message: `the claim on ${ENDPOINT} wh_1 was lost: its lease of 7000 ms ran out before its success was on record: what took it over may run it again` }])
  }

  t.test('and not again where the renewal has told it', async t => {
    const { app, errors } = await listening(t, { idempotency: { store: { ...memoryStore(), extend: () => false, complete: () => false }, lease: 30 } }, app => {
      app.openaiWebhook.on('batch.failed', async () => { await until('it to be told', () => errors.length > 0) })
    })
    t.equal(await answer(app, batchFailed('wh_1')), '200')
    t.match(errors, [{ message: /ran out before it could be renewed$/ }])
    t.equal(errors.length, 1)
  })
})
