import { join } from 'node:path'
import { PgBoss } from 'pg-boss'
import type { JobInsert } from 'pg-boss'
import pg from 'pg'
import t from 'tap'
import type { DeadDelivery, Job } from '../../lib/index.ts'
import { pgboss } from '../../lib/runners/pgboss.ts'
import { build, sign, stoppedClock, thin } from '../support/deliveries.ts'
import { Member, answer, batchFailed, effectsIn, until } from '../support/faults.ts'
import { capturedLog, deferred, listen, redelivered } from '../support/observe.ts'
import { newQueue, queueing, startedBoss } from '../support/pgboss.ts'
import { PostgresServer, postgresMissing } from '../support/postgres.ts'
import { keepsTenantsApart } from '../support/tenants.ts'

type Teardown = { teardown: (fn: () => unknown) => void }

const ENDPOINT = '/webhooks/openai'
const skip = postgresMissing
/** No poll comes while a test lasts. */
const NO_POLLING = { pollingIntervalSeconds: 600 }

let server: PostgresServer

t.before(async () => {
  if (skip === false) server = await PostgresServer.start(t)
})

/** Statements of the test's own, beside pg-boss. */
function admin (t: Teardown): pg.Pool {
  const pool = new pg.Pool({ connectionString: server.url, max: 1 })
  t.teardown(async () => await pool.end())
  return pool
}

async function states (boss: PgBoss, name: string): Promise<Record<string, number>> {
  const counts: Record<string, number> = {}
  for (const { state } of await boss.findJobs(name)) counts[state] = (counts[state] ?? 0) + 1
  return counts
}

/** As NOTIFY does for jobs that another process has queued. */
function notify (boss: PgBoss, queueName: string): void {
  for (const { id, name } of boss.getWipData()) if (name === queueName) boss.notifyWorker(id)
}

/** As if what is running had been silent for an hour, or had been running for one, and pg-boss looked for such. */
async function lapsed (boss: PgBoss, pool: pg.Pool, name: string, column: 'heartbeat_on' | 'started_on' = 'heartbeat_on'): Promise<void> {
  await pool.query(`UPDATE pgboss.job SET ${column} = now() - interval '2 hours' WHERE name = $1`, [name])
  await pool.query('UPDATE pgboss.queue SET monitor_on = NULL WHERE name = $1', [name])
  await boss.supervise(name)
}

t.test('queued once', { skip }, async t => {
  t.test('a delivery that two receivers get, under an id that tells its endpoint, tenant and webhook-id', async t => {
    const boss = await startedBoss(t, server)
    const one = await queueing(t, boss, { worker: false })
    const other = await queueing(t, await startedBoss(t, server), { worker: false, queueName: one.queueName })
    const delivery = batchFailed('wh_twice')
    const answers = await Promise.all([answer(one.app, delivery), answer(other.app, redelivered(delivery)), answer(one.app, redelivered(delivery))])
    t.ok(answers.includes('200') && answers.every(text => text === '200' || text === '200 duplicate'), answers.join(', '))
    t.equal(await answer(other.app, redelivered(delivery)), '200 duplicate')
    t.same(await states(boss, one.queueName), { created: 1 })

    const runner = pgboss({ boss, worker: false, queueName: newQueue() })
    await runner.start!({ process () {}, report () {} })
    const job = { webhookId: 'wh_1', timestamp: 1, endpoint: '/a', event: { type: 'batch.failed' } }
    const jobs = [job, { ...job, endpoint: '/b' }, { ...job, webhookId: 'wh_2' }, { ...job, tenant: 'acme' }]
    const results = await Promise.all([...jobs, ...jobs].map(async each => await runner.run(each)))
    // Which of two that come at once is there first is PostgreSQL's to say.
    for (const n of jobs.keys()) t.same(new Set([results[n], results[n + jobs.length]]), new Set([undefined, 'duplicate']))
    await runner.close!()
    await t.rejects(async () => await runner.run(job), { code: 'FST_OPENAI_WEBHOOK_OVERLOADED' })
    await t.rejects(async () => await pgboss({ boss }).run(job), { code: 'FST_OPENAI_WEBHOOK_OVERLOADED' }, 'nor before it was started')
  })

  t.test('what comes in one turn is one statement; what cannot be queued fails no other', async t => {
    const boss = await startedBoss(t, server)
    const calls: number[] = []
    const insert = boss.insert.bind(boss)
    boss.insert = async (name: string, jobs: JobInsert[], options?: object) => {
      calls.push(jobs.length)
      if (jobs.some(({ data }) => JSON.stringify(data).includes('wh_bad'))) throw new Error('it cannot be queued')
      return await insert(name, jobs, options)
    }
    const runner = pgboss({ boss, worker: false, queueName: newQueue() })
    await runner.start!({ process () {}, report () {} })
    const run = async (id: string): Promise<unknown> => await Promise.resolve(runner.run({ webhookId: id, timestamp: 1, endpoint: ENDPOINT, event: { type: 'batch.failed' } })).catch(error => (error as Error).message)
    const ids = Array.from({ length: 150 }, (_, i) => `wh_${i}`)
    t.same(await Promise.all(ids.map(run)), ids.map(() => undefined))
    t.same(calls, [100, 50])
    calls.length = 0
    t.same(await Promise.all(['wh_0', 'wh_new', 'wh_bad', 'wh_other'].map(run)), ['duplicate', undefined, 'it cannot be queued', undefined])
    t.same(calls, [4, 1, 1, 1, 1])
    t.equal(await runner.depth!(), 152)
  })

  t.test('what comes while two statements are under way shares the next one, and does not wait for statements that hang', async t => {
    const boss = await startedBoss(t, server)
    const calls: string[][] = []
    const answers: Array<ReturnType<typeof deferred<void>>> = []
    boss.insert = async (_name: string, jobs: JobInsert[]) => {
      calls.push(jobs.map(({ data }) => (JSON.parse((data as { delivery: string }).delivery) as Job).webhookId))
      answers.push(deferred<void>())
      await answers.at(-1)!.promise
      return jobs.map(({ id }) => id!)
    }
    const runner = pgboss({ boss, worker: false, queueName: newQueue() })
    await runner.start!({ process () {}, report () {} })
    const clock = stoppedClock(t)
    const runs: Array<Promise<unknown>> = []
    const come = async (...ids: string[]): Promise<void> => {
      for (const webhookId of ids) runs.push(Promise.resolve(runner.run({ webhookId, timestamp: 1, endpoint: ENDPOINT, event: { type: 'batch.failed' } })))
      await new Promise(resolve => setImmediate(resolve))
      await new Promise(resolve => setImmediate(resolve))
    }
    await come('wh_1')
    await come('wh_2')
    await come('wh_3')
    await come('wh_4', 'wh_5')
    t.same(calls, [['wh_1'], ['wh_2']])
    answers[0]!.resolve()
    await until('the next statement', () => calls.length === 3)
    await come('wh_6')
    t.same(calls, [['wh_1'], ['wh_2'], ['wh_3', 'wh_4', 'wh_5']])
    clock.advance(1_000)
    clock.exit()
    await until('those that hang to count no longer', () => calls.length === 4)
    t.same(calls[3], ['wh_6'])
    for (const each of answers) each.resolve()
    t.same(await Promise.all(runs), runs.map(() => undefined))
  })

  t.test('with whatever JSON can say', async t => {
    const boss = await startedBoss(t, server)
    const odd = 'a\u0000b\ud800 \\u0000 é "'
    const seen: unknown[] = []
    const app = await build(t, { runner: pgboss({ boss, queueName: newQueue(), attempts: 1 }) })
    app.openaiWebhook.onAny(event => {
      seen.push(event)
      throw new Error(odd)
    })
    await listen(app)
    const event = thin(`custom.${odd}`, { id: odd })
    t.equal(await answer(app, sign(event)), '200')
    const { deadLetters } = app.openaiWebhook
    await until('it to be dead', async () => await deadLetters.count() === 1)
    const asSent = JSON.parse(JSON.stringify(event)) as typeof event
    t.same(seen, [asSent])
    t.match(await deadLetters.list({ type: asSent.type }), [{ event: asSent, errors: [{ message: odd }] }])
    t.same(await deadLetters.list({ type: 'custom.other' }), [])
  })
})

t.test('workers', { skip }, async t => {
  t.test('a backlog is worked off without a poll between, and what comes is run at once: in the same process', async t => {
    const boss = await startedBoss(t, server)
    const receiving = await queueing(t, boss, { worker: false })
    const ids = Array.from({ length: 30 }, (_, i) => `wh_${i}`)
    for (const id of ids) t.equal(await answer(receiving.app, batchFailed(id)), '200')
    const working = await queueing(t, boss, { queueName: receiving.queueName, worker: { concurrency: 2, ...NO_POLLING } })
    await until('all to run', () => working.ran.length === ids.length)
    t.same([...working.ran].sort(), ids.sort())
    for (const id of ['wh_new_1', 'wh_new_2', 'wh_new_3']) {
      t.equal(await answer(working.app, batchFailed(id)), '200')
      await until('it to run', () => working.ran.at(-1) === id)
    }
  })

  t.test('in another process they are told by PostgreSQL, where their PgBoss listens to it', async t => {
    const receiving = await queueing(t, await startedBoss(t, server), { worker: false })
    const listening = await startedBoss(t, server, { useListenNotify: true })
    const working = await queueing(t, listening, { queueName: receiving.queueName, worker: NO_POLLING })
    for (const id of ['wh_1', 'wh_2', 'wh_3']) {
      t.equal(await answer(receiving.app, batchFailed(id)), '200')
      await until('it to run', () => working.ran.includes(id))
    }
    t.same(working.ran, ['wh_1', 'wh_2', 'wh_3'])
  })

  t.test('one at a time means that', async t => {
    const boss = await startedBoss(t, server)
    const state = await queueing(t, boss, { worker: { concurrency: 1 } })
    let [running, most] = [0, 0]
    state.work = async () => {
      most = Math.max(most, ++running)
      await new Promise(resolve => setImmediate(resolve))
      running--
    }
    const ids = Array.from({ length: 10 }, (_, i) => `wh_${i}`)
    await Promise.all(ids.map(async id => await answer(state.app, batchFailed(id))))
    await until('all to run', () => state.ran.length === ids.length)
    t.equal(most, 1)
  })

  t.test('as many are fetched together as may run at once', async t => {
    const boss = await startedBoss(t, server)
    const receiving = await queueing(t, boss, { worker: false })
    const { queueName } = receiving
    const ids = Array.from({ length: 60 }, (_, i) => `wh_${i}`)
    await Promise.all(ids.map(async id => { t.equal(await answer(receiving.app, batchFailed(id)), '200') }))
    const calls = t.capture(boss, 'work', boss.work)
    let [running, most] = [0, 0]
    const ran: string[] = []
    for (const [concurrency, batchSize] of [[3, undefined], [4, 2]] as const) {
      const runner = pgboss({ boss, queueName, worker: { concurrency, ...(batchSize !== undefined && { batchSize }), ...NO_POLLING } })
      await runner.start!({
        report () {},
        async process ({ webhookId }) {
          most = Math.max(most, ++running)
          await new Promise(resolve => setImmediate(resolve))
          running--
          ran.push(webhookId)
        }
      })
      await until('all to run', () => ran.length === ids.length)
      await runner.close!()
      t.same(ran.sort(), ids.sort())
      const size = batchSize ?? concurrency
      t.equal(most, size)
      t.ok(calls().every(({ args }) => (args[1] as { batchSize: number }).batchSize <= size))
      t.same(await states(boss, queueName), { completed: ids.length })
      await boss.deleteAllJobs(queueName)
      await Promise.all(ids.map(async id => { t.equal(await answer(receiving.app, batchFailed(`${id}_again`)), '200') }))
      ids.splice(0, ids.length, ...ids.map(id => `${id}_again`))
      most = ran.length = 0
    }
  })

  t.test('a slow one holds up no other: they are recorded and attempted again beside it, and more are fetched', async t => {
    const boss = await startedBoss(t, server)
    const receiving = await queueing(t, boss, { worker: false, attempts: 2, backoff: 0 })
    const { queueName } = receiving
    const deliver = async (id: string): Promise<void> => { t.equal(await answer(receiving.app, batchFailed(id)), '200') }
    for (const id of ['wh_slow', 'wh_fails_once', 'wh_quick', 'wh_fourth']) await deliver(id)
    const [finish, end] = [deferred(), deferred()]
    let [running, most] = [0, 0]
    const ran: string[] = []
    const app = await build(t, { runner: pgboss({ boss, queueName, worker: { concurrency: 3, ...NO_POLLING } }) })
    app.openaiWebhook.on('batch.failed', async (_event, { webhookId }) => {
      most = Math.max(most, ++running)
      try {
        if (webhookId === 'wh_slow') await finish.promise
        if (webhookId === 'wh_ends') await end.promise
        ran.push(webhookId)
        if (webhookId === 'wh_fails_once' && ran.indexOf(webhookId) === ran.length - 1) throw new Error('no such customer')
      } finally {
        running--
      }
    })
    await app.ready()
    await until('all others to be done', async () => (await states(boss, queueName))['completed'] === 3)
    t.same(await states(boss, queueName), { active: 1, completed: 3 })
    t.same(ran.sort(), ['wh_fails_once', 'wh_fails_once', 'wh_fourth', 'wh_quick'])

    for (const id of ['wh_ends', 'wh_more', 'wh_and_more']) await deliver(id)
    notify(boss, queueName)
    await until('what came since to be done', async () => (await states(boss, queueName))['completed'] === 5)
    t.same(await states(boss, queueName), { active: 2, completed: 5 })
    end.resolve()
    await until('it to be recorded', async () => (await states(boss, queueName))['completed'] === 6)
    t.same(await states(boss, queueName), { active: 1, completed: 6 })
    finish.resolve()
    await until('it to be recorded too', async () => (await states(boss, queueName))['completed'] === 7)
    t.ok(most <= 3, String(most))
    await app.close()
  })

  t.test('one that dies beside a slow one is recorded and told at once', async t => {
    const boss = await startedBoss(t, server)
    const receiving = await queueing(t, boss, { worker: false, attempts: 1, backoff: 60_000 })
    const { queueName } = receiving
    for (const id of ['wh_dies', 'wh_slow', 'wh_slow_too']) t.equal(await answer(receiving.app, batchFailed(id)), '200')
    const working = await queueing(t, boss, { queueName, worker: { concurrency: 2, ...NO_POLLING } })
    const finish = deferred()
    working.work = async () => {
      if (working.ran.at(-1) === 'wh_dies') throw new Error('no such customer')
      await finish.promise
    }
    await until('it to be told', () => working.died.length === 1)
    await until('all to run', () => working.ran.length === 3)
    t.same(await states(boss, queueName), { active: 2, failed: 1 })
    t.match(working.died, [{ webhookId: 'wh_dies', attempts: 1, errors: [{ message: 'no such customer' }] }])
    t.match(await working.app.openaiWebhook.deadLetters.list(), working.died)
    finish.resolve()
    await until('the others to be done', async () => (await states(boss, queueName))['completed'] === 2)
    t.same(working.ran.sort(), ['wh_dies', 'wh_slow', 'wh_slow_too'])
    t.equal(working.died.length, 1)
  })

  t.test('one whose last attempt has ended in another process dies with what that had ended with, beside a slow one too', async t => {
    const boss = await startedBoss(t, server)
    const receiving = await queueing(t, boss, { worker: false, attempts: 1, backoff: 0 })
    const { queueName } = receiving
    t.equal(await answer(receiving.app, batchFailed('wh_dies')), '200')
    const [job] = await boss.fetch(queueName)
    const failure = { attempts: 1, errors: [{ handler: 'work', message: 'no such customer', stack: 'Error: no such customer\n    at work' }], finished: [] }
    await boss.fail(queueName, job!.id, { failure: JSON.stringify(failure) })
    for (const id of ['wh_slow', 'wh_slow_too']) t.equal(await answer(receiving.app, batchFailed(id)), '200')
    const working = await queueing(t, boss, { queueName, worker: { concurrency: 2, ...NO_POLLING } })
    const finish = deferred()
    working.work = async () => { await finish.promise }
    await until('it to be told', () => working.died.length === 1)
    t.match(working.died, [{ webhookId: 'wh_dies', attempts: 1, errors: failure.errors }])
    await until('the others to run', () => working.ran.length === 2)
    t.same(await states(boss, queueName), { active: 2, failed: 1 })
    finish.resolve()
    await until('the others to be done', async () => (await states(boss, queueName))['completed'] === 2)
    t.same(working.ran.sort(), ['wh_slow', 'wh_slow_too'])
  })

  t.test('what cannot be recorded at once is recorded with its batch', async t => {
    const boss = await startedBoss(t, server)
    const receiving = await queueing(t, boss, { worker: false })
    const { queueName } = receiving
    for (const id of ['wh_slow', 'wh_quick', 'wh_third']) t.equal(await answer(receiving.app, batchFailed(id)), '200')
    const complete = boss.complete.bind(boss)
    const refused = deferred()
    boss.complete = async () => {
      boss.complete = complete
      refused.resolve()
      throw new Error('not now')
    }
    const working = await queueing(t, boss, { queueName, worker: { concurrency: 2, ...NO_POLLING } })
    const finish = deferred()
    working.work = async () => { if (working.ran.at(-1) === 'wh_slow') await finish.promise }
    await refused.promise
    await until('the next to be done', async () => (await states(boss, queueName))['completed'] === 1)
    t.same(await states(boss, queueName), { active: 2, completed: 1 })
    finish.resolve()
    await until('all to be done', async () => (await states(boss, queueName))['completed'] === 3)
    t.equal(working.ran.length, 3)
  })

  t.test('a PgBoss that was stopped too soon is told of, and ends the app all the same', async t => {
    const boss = await startedBoss(t, server)
    const state = await queueing(t, boss, { worker: { concurrency: 1 } })
    const [begun, finish] = [deferred(), deferred()]
    state.work = async () => {
      begun.resolve()
      await finish.promise
    }
    t.equal(await answer(state.app, batchFailed('wh_1')), '200')
    await begun.promise
    await until('its worker to fetch no more', () => boss.getWipData().every(({ state }) => state === 'stopping'))
    boss.work = async () => { throw new Error('Workers are disabled. pg-boss is stopped') }
    finish.resolve()
    await until('it to be told', () => state.told.some(message => message.includes('pg-boss is stopped')))
    await state.app.close()
    t.same(await states(boss, state.queueName), { completed: 1 })
  })

  t.test('a job that is none of ours fails alone', async t => {
    const boss = await startedBoss(t, server)
    const receiving = await queueing(t, boss, { worker: false })
    const { queueName } = receiving
    await boss.insert(queueName, [{ data: { delivery: 'a person\'s' }, retryLimit: 0 }])
    t.equal(await answer(receiving.app, batchFailed('wh_1')), '200')
    const working = await queueing(t, boss, { queueName, worker: { concurrency: 2, batchSize: 2, ...NO_POLLING } })
    await until('both to be done', async () => Object.keys(await states(boss, queueName)).every(state => state === 'failed' || state === 'completed'))
    t.same(await states(boss, queueName), { completed: 1, failed: 1 })
    t.same(working.ran, ['wh_1'])
    t.equal((await boss.getQueue(queueName))!.retryLimit, 16, 'as often as a delivery is attempted, where it does not say itself')
  })

  t.test('app.close() waits for what runs, leaves what waits to the next worker, and the PgBoss to its user', async t => {
    const boss = await startedBoss(t, server)
    const [begun, closing, finish] = [deferred(), deferred(), deferred()]
    const queueName = newQueue()
    const runner = pgboss({ boss, queueName, worker: { concurrency: 1 } })
    const first = await queueing(t, boss, { queueName }, {
      runner: {
        ...runner,
        async close (signal) {
          const closed = runner.close?.(signal)
          closing.resolve()
          await closed
        }
      }
    })
    let ended = false
    first.work = async () => {
      begun.resolve()
      await finish.promise
      ended = true
    }
    t.equal(await answer(first.app, batchFailed('wh_running')), '200')
    await begun.promise
    t.equal(await answer(first.app, batchFailed('wh_waiting')), '200')
    const closed = first.app.close()
    await closing.promise
    finish.resolve()
    await closed
    t.equal(ended, true)
    t.same(await states(boss, queueName), { completed: 1, created: 1 }, 'what ran is on record, and its PgBoss goes on')
    t.equal(boss.listenerCount('error'), 1, 'and has no listener of ours')
    const next = await queueing(t, boss, { queueName })
    await until('the other to run', () => next.ran.length === 1)
    t.same([first.ran, next.ran], [['wh_running'], ['wh_waiting']])
  })

  t.test('one that dies while the app closes outlives what pg-boss deletes, and the next worker tells of it', async t => {
    const boss = await startedBoss(t, server)
    const pool = admin(t)
    const receiving = await queueing(t, boss, { worker: false, attempts: 1 })
    const { queueName } = receiving
    for (const id of ['wh_dies', 'wh_slow']) t.equal(await answer(receiving.app, batchFailed(id)), '200')
    const [fail, finish] = [deferred(), deferred()]
    const first = await queueing(t, boss, { queueName, worker: { concurrency: 2, ...NO_POLLING } })
    first.work = async () => {
      if (first.ran.at(-1) !== 'wh_dies') return await finish.promise
      await fail.promise
      throw new Error('no such customer')
    }
    await until('both to run', () => first.ran.length === 2)
    const closed = first.app.close()
    fail.resolve()
    await until('its death to wait for a worker', async () => (await states(boss, queueName))['retry'] === 1)
    finish.resolve()
    await closed
    t.same(await states(boss, queueName), { completed: 1, retry: 1 })
    const { rows: [job] } = await pool.query('SELECT start_after < now() AS due, keep_until > now() + interval \'9 years\' AS kept FROM pgboss.job WHERE name = $1', [queueName])
    t.same(job, { due: true, kept: true })
    await pool.query('UPDATE pgboss.queue SET maintain_on = NULL, monitor_on = NULL WHERE name = $1', [queueName])
    await boss.supervise(queueName)
    t.same(await states(boss, queueName), { completed: 1, retry: 1 })
    const next = await queueing(t, boss, { queueName, attempts: 1 })
    await until('it to be told', () => next.died.length === 1)
    t.match(next.died, [{ webhookId: 'wh_dies', attempts: 1, errors: [{ message: 'no such customer' }] }])
    t.same(next.ran, [])
  })

  t.test('closed by a handler, it takes no further job', async t => {
    const boss = await startedBoss(t, server)
    const receiving = await queueing(t, boss, { worker: false })
    for (const id of ['wh_1', 'wh_2']) t.equal(await answer(receiving.app, batchFailed(id)), '200')
    const runner = pgboss({ boss, queueName: receiving.queueName, worker: { concurrency: 1 } })
    const closed = deferred<Promise<void>>()
    await runner.start!({
      report () {},
      process () { closed.resolve(Promise.resolve(runner.close!())) }
    })
    await closed.promise
    t.same(await states(boss, receiving.queueName), { completed: 1, created: 1 })
  })

  t.test('one that is killed while it runs a job: another process does it, once it has been silent for too long', async t => {
    const boss = await startedBoss(t, server)
    const effects = join(t.testdir(), 'effects')
    // The queue of those that are told no name.
    const receiving = await queueing(t, boss, { worker: false, queueName: 'openai-webhook' })
    const options = { effects, runner: 'pgboss', postgresUrl: server.url, path: false, worker: { pollingIntervalSeconds: 0.5 } } as const
    const killed = await Member.start(t, { ...options, hangs: true })
    t.equal(await answer(receiving.app, batchFailed('wh_taken_over')), '200')
    await until('the job to be started', () => effectsIn(effects).length === 1)
    await killed.kill()
    const other = await Member.start(t, options)
    t.same(await states(boss, 'openai-webhook'), { active: 1 })
    await lapsed(boss, admin(t), 'openai-webhook')
    await until('the job to be done', async () => (await states(boss, 'openai-webhook'))['completed'] === 1)
    t.same(effectsIn(effects), [{ webhookId: 'wh_taken_over', pid: killed.pid }, { webhookId: 'wh_taken_over', pid: other.pid }])
    await other.close()
  })

  t.test('another one runs only what has not succeeded, though it shares no store', async t => {
    const boss = await startedBoss(t, server)
    const ran: string[] = []
    const queueName = newQueue()
    const worker = async (name: string, fails: boolean): Promise<() => Promise<void>> => {
      const app = await build(t, { runner: pgboss({ boss, queueName, backoff: 600_000 }) })
      app.openaiWebhook.on('batch.failed', () => { ran.push(`${name} import`) }, { name: 'import' })
      app.openaiWebhook.on('batch.failed', () => {
        ran.push(`${name} bill`)
        if (fails) throw new Error('no such customer')
      }, { name: 'bill' })
      await listen(app)
      if (fails) t.equal(await answer(app, batchFailed('wh_1')), '200')
      return async () => await app.close()
    }
    const close = await worker('first', true)
    await until('the first attempt', async () => (await states(boss, queueName))['retry'] === 1)
    await close()
    await admin(t).query('UPDATE pgboss.job SET start_after = now() WHERE name = $1', [queueName])
    await worker('second', false)
    await until('the second attempt', async () => (await states(boss, queueName))['completed'] === 1)
    t.same(ran, ['first import', 'first bill', 'second bill'])
  })

  t.test('one without the route leaves its deliveries to another', async t => {
    const boss = await startedBoss(t, server)
    const queueName = newQueue()
    const receiving = await build(t, { runner: pgboss({ boss, queueName, worker: false, backoff: 0, attempts: 1_000 }) })
    receiving.openaiWebhook.route({ url: '/own', on: { 'batch.failed': () => {} } })
    await listen(receiving)
    const lacking = await queueing(t, boss, { queueName })
    const { headers, body } = batchFailed('wh_1')
    t.equal((await receiving.inject({ method: 'POST', url: '/own', headers, payload: body })).statusCode, 200)
    await until('it to be told', () => lacking.told.length > 0)
    t.match(lacking.told[0], /^wh_1 .*\/own/)
    t.same(lacking.ran, [])
    await lacking.app.close()
    const ran: string[] = []
    const having = await build(t, { path: false, runner: pgboss({ boss, queueName }) })
    having.openaiWebhook.route({ url: '/own', on: { 'batch.failed': (_event, { webhookId }) => { ran.push(webhookId) } } })
    await listen(having)
    await until('it to run', () => ran.length === 1)
  })

  t.test('a PgBoss that was not started fails the boot, and says so', async t => {
    const app = await build(t, { runner: pgboss({ boss: new PgBoss(server.url) }) })
    await t.rejects(async () => await app.ready(), { message: /Call start\(\)/ })
  })

  t.test('a queue whose policy drops jobs fails the boot, and says so', async t => {
    const boss = await startedBoss(t, server)
    for (const policy of ['short', 'singleton', 'stately', 'exclusive'] as const) {
      const queueName = newQueue()
      await boss.createQueue(queueName, { policy })
      const app = await build(t, { runner: pgboss({ boss, queueName }) })
      await t.rejects(async () => await app.ready(), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: `pgboss: expected the queue "${queueName}" to have the policy standard, got ${policy}` })
    }
  })

  t.test('trouble of the queue is told, and that of others to those who listen, or else here', async t => {
    const boss = await startedBoss(t, server)
    const runner = pgboss({ boss, queueName: newQueue(), worker: false })
    const reported: unknown[] = []
    await runner.start!({ process () {}, report (error) { reported.push(error) } })
    boss.emit('error', { message: 'of another queue', queue: 'other' } as never)
    t.same(reported, [])
    boss.emit('error', { message: 'a fetch failed', stack: 'Error: a fetch failed\n    at fetch', queue: `queue-${Number.NaN}` } as never)
    t.same(reported, [])
    const own = new Error('Connection terminated')
    boss.emit('error', own)
    t.same(reported, [own])
    boss.removeAllListeners('error')
    await runner.close!()
    const unheard = pgboss({ boss, queueName: 'unheard', worker: false })
    await unheard.start!({ process () {}, report (error) { reported.push(error) } })
    boss.emit('error', { message: 'of another queue', stack: 'Error: of another queue\n    at fetch', queue: 'other' } as never)
    t.match(reported[1], { message: 'of another queue', stack: /at fetch/, queue: 'other' })
    t.ok(reported[1] instanceof Error)
    boss.on('error', () => {})
    boss.emit('error', { message: 'a fetch failed', queue: 'unheard' } as never)
    t.equal((reported[2] as Error).message, 'a fetch failed')
    await unheard.close!()
  })
})

t.test('dead deliveries', { skip }, async t => {
  t.test('are told once, with the user\'s own stack; requeued, only the others run', async t => {
    const boss = await startedBoss(t, server)
    const log = capturedLog()
    const queueName = newQueue()
    const app = await build(t, { runner: pgboss({ boss, queueName, attempts: 2, backoff: 0 }) }, { logger: log.logger })
    const { deadLetters } = app.openaiWebhook
    const ran: string[] = []
    let fails = true
    app.openaiWebhook.on('batch.failed', () => { ran.push('import') }, { name: 'import' })
    app.openaiWebhook.on('batch.failed', function bill () {
      ran.push('bill')
      if (fails) throw new Error('no such customer')
    }, { name: 'bill' })
    const died: unknown[] = []
    app.openaiWebhook.onDead(delivery => { died.push(delivery) })
    await listen(app)
    t.equal(await answer(app, batchFailed('wh_1')), '200')
    await until('it to be told', () => died.length === 1)
    const lines = log.lines.filter(({ webhookId, level }) => level === 50 && webhookId === 'wh_1')
    const err = { stack: /handler "bill": Error: no such customer\n +at .*bill/ }
    t.match(lines, [
      { msg: 'webhook delivery failed and will be attempted again', attempt: 1, attempts: 2, err },
      { msg: 'webhook delivery is dead', attempt: 2, err }
    ])
    t.equal(lines.length, 2)
    const [dead] = await deadLetters.list()
    t.same(died, [dead])
    t.match(dead, { webhookId: 'wh_1', attempts: 2, finished: ['import'], errors: [{ handler: 'bill', message: 'no such customer', stack: /^Error: no such customer\n +at .*bill/ }] })
    const [job] = await boss.findJobs(`${queueName}-dead`)
    t.match(job, { sourceName: queueName, sourceOutput: { message: 'bill: no such customer' }, data: { type: 'batch.failed' } }, 'for people who look at pg-boss')
    t.equal(await answer(app, batchFailed('wh_1')), '200 duplicate')

    t.equal(await deadLetters.requeue(dead!), true, 'it fails once more')
    await until('it to be dead again', async () => died.length === 2 && await deadLetters.count() === 1)
    t.same(ran, ['import', 'bill', 'bill', 'bill', 'bill'], 'with attempts anew')
    t.match(await deadLetters.list(), [{ attempts: 2, finished: ['import'] }])

    fails = false
    const requeued = await Promise.all([deadLetters.requeue(dead!), deadLetters.requeue(dead!)])
    t.same(requeued.sort(), [false, true], 'one of two')
    await until('it to be done', async () => (await states(boss, queueName))['completed'] === 1)
    t.same(ran.slice(5), ['bill'])
    t.equal(await deadLetters.count(), 0)
    t.equal(await deadLetters.requeue(dead!), false)
  })

  t.test('all of them, requeued by a process that only receives, though it was killed once while it did', async t => {
    const boss = await startedBoss(t, server)
    const state = await queueing(t, boss, { attempts: 1, worker: { pollingIntervalSeconds: 0.5 } })
    state.work = async () => { throw new Error('no such batch') }
    const ids = ['wh_1', 'wh_2', 'wh_3']
    for (const id of ids) {
      t.equal(await answer(state.app, batchFailed(id)), '200')
      await until('it to be dead', () => state.died.length === ids.indexOf(id) + 1)
    }
    const { deadLetters } = (await queueing(t, boss, { queueName: state.queueName, worker: false })).app.openaiWebhook
    t.same((await deadLetters.list()).map(({ webhookId, finished }) => [webhookId, finished]), ids.map(id => [id, []]))
    state.work = async () => {}
    const deleteJob = boss.deleteJob.bind(boss)
    boss.deleteJob = async () => { throw new Error('killed') }
    await t.rejects(deadLetters.requeue({ endpoint: ENDPOINT, webhookId: 'wh_1' }), { message: 'killed' })
    boss.deleteJob = deleteJob
    for (const dead of await deadLetters.list()) t.equal(await deadLetters.requeue(dead), dead.webhookId !== 'wh_1')
    await until('all to run', () => state.ran.length === 6)
    t.same(state.ran.slice(3).sort(), ids)
    t.equal(await deadLetters.count(), 0)
  })

  t.test('by a process that ended in an earlier attempt: the next one is told what an inbox may remember', async t => {
    const boss = await startedBoss(t, server)
    const queueName = newQueue()
    const host = { report () {}, process (): never { throw new Error('no such customer') } }
    const first = pgboss({ boss, queueName, attempts: 3, backoff: 0, worker: false })
    await first.start!(host)
    const ref = { webhookId: 'wh_1', endpoint: ENDPOINT }
    await first.run({ ...ref, timestamp: 1, event: { type: 'batch.failed' } })
    t.equal((await boss.fetch(queueName)).length, 1, 'as a worker does that is killed then')
    await lapsed(boss, admin(t), queueName)
    const jobs: Job[] = []
    const second = pgboss({ boss, queueName, attempts: 3, backoff: 0, worker: { concurrency: 1 } })
    await second.start!({
      ...host,
      interrupted: job => {
        jobs.push(job)
        return { ...job, remembered: { bill: 1 } }
      }
    })
    await until('it to be dead', async () => await second.deadCount!() === 1)
    t.match(jobs, [ref], 'once: the next has an end on record')
    t.match(await second.dead!(), [{ ...ref, attempts: 3, remembered: { bill: 1 } }])
    await t.rejects(async () => await second.requeue!(ref), { code: 'FST_OPENAI_WEBHOOK_NEEDS_FORCE' })
    await second.close!()
    await first.close!()
  })

  t.test('by a process that ended in the last attempt: the store knows what had succeeded', async t => {
    const boss = await startedBoss(t, server)
    const pool = admin(t)
    const recorded: Record<string, () => unknown> = {
      wh_unknown: () => undefined,
      wh_partly: () => ({ done: false, finished: ['import'], remembered: { import: 1 } }),
      wh_done: () => ({ done: true, finished: [] }),
      wh_trouble: () => {
        if (failures++ < 2) throw new Error('the store is down')
        return { done: false, finished: ['import'] }
      }
    }
    let failures = 0
    const queueName = newQueue()
    const told: unknown[] = []
    const host = { process () {}, report (error: unknown) { told.push((error as Error).message) }, dead ({ webhookId, attempts, finished, errors }: { webhookId: string, attempts: number, finished: readonly string[], errors: ReadonlyArray<{ message: string }> }) { told.push([webhookId, attempts, finished, errors[0]!.message]) } }
    const first = pgboss({ boss, queueName, attempts: 1, backoff: 0, worker: false })
    await first.start!(host)
    for (const webhookId of Object.keys(recorded)) await first.run({ webhookId, timestamp: 1, endpoint: ENDPOINT, event: { type: 'batch.failed' } })
    t.equal((await boss.fetch(queueName, { batchSize: 4 })).length, 4, 'as a worker does that is killed then')
    await lapsed(boss, pool, queueName)
    t.same(await states(boss, queueName), { retry: 4 })

    const second = pgboss({ boss, queueName, attempts: 1, worker: { concurrency: 1 } })
    await second.start!({ ...host, recorded: ({ webhookId }) => recorded[webhookId]!() as never, process () { told.push('ran') } })
    await until('all to be seen to', async () => (await states(boss, queueName))['completed'] === 1 && await second.deadCount!() === 3)
    await second.close!()
    const message = 'the process ended, or the job expired, while the handlers ran'
    t.same(new Set(told), new Set(['the store is down', ['wh_unknown', 1, [], message], ['wh_partly', 1, ['import'], message], ['wh_trouble', 1, ['import'], message]]))
    t.equal(told.length, 5, 'not dead before the store can say')

    const withoutStore = pgboss({ boss, queueName, worker: { concurrency: 1 } })
    await withoutStore.start!(host)
    t.equal(await withoutStore.requeue!({ endpoint: ENDPOINT, webhookId: 'wh_partly' }), true)
    await withoutStore.close!()
  })

  t.test('one whose death could not be recorded has its own error in the log, and in the dead letter where the process lives on', async t => {
    const boss = await startedBoss(t, server)
    const pool = admin(t)
    const log = capturedLog()
    const queueName = newQueue()
    const app = await build(t, { runner: pgboss({ boss, queueName, attempts: 1, backoff: 0, worker: { concurrency: 1 } }) }, { logger: log.logger })
    const died: DeadDelivery[] = []
    app.openaiWebhook.onDead(delivery => { died.push(delivery) })
    let ran = 0
    app.openaiWebhook.on('batch.failed', () => {
      ran++
      throw new Error('no such batch')
    }, { name: 'work' })
    await listen(app)
    await pool.query(`
      CREATE SEQUENCE settlings;
      CREATE FUNCTION cut () RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF NEW.state = 'failed' AND nextval('settlings') = 1 THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF;
        RETURN NEW;
      END $$;
      CREATE TRIGGER cut BEFORE INSERT OR UPDATE ON pgboss.job FOR EACH ROW EXECUTE FUNCTION cut ()`)
    t.teardown(async () => await pool.query('DROP TRIGGER cut ON pgboss.job; DROP FUNCTION cut; DROP SEQUENCE settlings'))
    t.equal(await answer(app, batchFailed('wh_1')), '200')
    await until('it to be told', () => died.length > 0)
    t.match(died, [{ attempts: 1, errors: [{ handler: 'work', message: 'no such batch', stack: /no such batch\n +at / }] }])
    t.match(await app.openaiWebhook.deadLetters.list(), died)
    t.match(log.lines.filter(({ webhookId, level }) => level === 50 && webhookId === 'wh_1'), [{ msg: 'webhook delivery is dead', err: { stack: /no such batch/ } }])
    t.equal(ran, 1)
    await app.close()
  })

  t.test('one that could not be recorded before the process ends has its own error in the log', async t => {
    const boss = await startedBoss(t, server)
    const pool = admin(t)
    const log = capturedLog()
    const queueName = newQueue()
    const app = await build(t, { runner: pgboss({ boss, queueName, attempts: 1, worker: { concurrency: 1 } }) }, { logger: log.logger })
    app.openaiWebhook.on('batch.failed', async () => {
      await lapsed(boss, pool, queueName, 'started_on')
      throw new Error('no such batch')
    }, { name: 'work' })
    await listen(app)
    t.equal(await answer(app, batchFailed('wh_1')), '200')
    await until('it to wait', async () => (await states(boss, queueName))['retry'] === 1)
    await app.close()
    t.match(log.lines.filter(({ webhookId, level }) => level === 50 && webhookId === 'wh_1'), [{ attempt: 1, err: { stack: /no such batch\n +at / } }])
  })

  t.test('one that lapsed while its last attempt ran is told by the next one, not by that', async t => {
    const boss = await startedBoss(t, server)
    const pool = admin(t)
    const state = await queueing(t, boss, { attempts: 1, worker: { concurrency: 1 } })
    const [begun, fail] = [deferred(), deferred()]
    state.work = async () => {
      begun.resolve()
      await fail.promise
      throw new Error('too late')
    }
    t.equal(await answer(state.app, batchFailed('wh_1')), '200')
    await begun.promise
    await lapsed(boss, pool, state.queueName, 'started_on')
    t.same(await states(boss, state.queueName), { retry: 1 })
    fail.resolve()
    await until('it to be dead', async () => await state.app.openaiWebhook.deadLetters.count() === 1)
    await until('it to be told', () => state.died.length > 0)
    await state.app.close()
    t.match(state.died, [{ attempts: 1, errors: [{ handler: 'work', message: 'too late' }] }], 'with what it had ended with')
    t.equal(state.died.length, 1)
    t.equal(state.ran.length, 1)
  })

  t.test('what pg-boss, or a person, has given up', async t => {
    const boss = await startedBoss(t, server)
    const state = await queueing(t, boss, { attempts: 1, worker: false })
    for (const id of ['wh_1', 'wh_2']) t.equal(await answer(state.app, batchFailed(id)), '200')
    await admin(t).query('UPDATE pgboss.job SET retry_limit = 1 WHERE name = $1', [state.queueName])
    for (const { id, data } of await boss.findJobs<{ delivery: string }>(state.queueName)) {
      for (let start = 1; start <= 2; start++) {
        await boss.fetch(state.queueName, { batchSize: 2 })
        await boss.fail(state.queueName, id, data.delivery.includes('wh_1') ? null : { value: { message: 'by hand' } })
      }
    }
    const dead = await state.app.openaiWebhook.deadLetters.list()
    t.match(dead.sort((a, b) => a.webhookId.localeCompare(b.webhookId)), [
      { webhookId: 'wh_1', attempts: 2, finished: [], errors: [{ handler: null, message: 'pg-boss failed the job', stack: '' }], diedAt: Number },
      { webhookId: 'wh_2', attempts: 2, finished: [], errors: [{ handler: null, message: 'by hand', stack: '' }] }
    ])

    const runner = pgboss({ boss, queueName: state.queueName, worker: { concurrency: 1 } })
    t.equal(await runner.requeue!(dead[0]!), true, 'by one that was not started')
    const processed: Job[] = []
    await runner.start!({
      process (job) { processed.push(job) },
      report () {},
      recorded: () => ({ done: false, finished: ['import'], remembered: { import: 1, bill: 2 } })
    })
    await t.rejects(async () => await runner.requeue!(dead[1]!), { code: 'FST_OPENAI_WEBHOOK_NEEDS_FORCE' }, 'an inbox may have forgotten it')
    t.equal(await runner.requeue!(dead[1]!, { force: true }), true)
    await until('both to run', () => processed.length === 2)
    await runner.close!()
    const { errors, attempts, diedAt, finished, ...job } = dead[1]!
    t.same(processed.find(({ webhookId }) => webhookId === 'wh_2'), { ...job, finished: ['import'], remembered: { import: 1, bill: 2 } }, 'with what the store knew')
  })

  const again: Record<string, [(boss: PgBoss, queueName: string) => Promise<unknown>, dead: number]> = {
    'a person retries in pg-boss': [async (boss, queueName) => {
      const [job] = await boss.findJobs(queueName)
      await boss.retry(queueName, job!.id)
    }, 1],
    'was redriven by pg-boss': [async (boss, queueName) => { t.equal(await boss.redrive(`${queueName}-dead`), 1) }, 0]
  }
  for (const [how, [act, dead]] of Object.entries(again)) {
    t.test(`a delivery that ${how} runs again too`, async t => {
      const boss = await startedBoss(t, server)
      const state = await queueing(t, boss, { attempts: 1, worker: { concurrency: 1, pollingIntervalSeconds: 0.5 } })
      state.work = async () => { throw new Error('no such batch') }
      t.equal(await answer(state.app, batchFailed('wh_1')), '200')
      await until('it to be dead', () => state.died.length === 1)
      state.work = async () => {}
      await act(boss, state.queueName)
      await until('it to run', () => state.ran.length === 2)
      await until('it to be done', async () => (await states(boss, state.queueName))['completed'] === 1)
      t.equal(state.died.length, 1)
      t.equal(await state.app.openaiWebhook.deadLetters.count(), dead)
    })
  }
})

t.test('depth', { skip }, async t => {
  const boss = await startedBoss(t, server, { persistQueueStats: true, supervise: false })
  const { app, queueName } = await queueing(t, boss, { worker: false })
  const runner = pgboss({ boss, queueName })
  t.equal(await runner.depth!(), 0, 'nothing was counted yet')
  t.equal(await answer(app, batchFailed()), '200')
  await boss.supervise(queueName)
  t.equal(await runner.depth!(), 1)
})

t.test('a delivery of each tenant, with the same webhook-id', { skip }, async t => {
  await keepsTenantsApart(t, { runner: pgboss({ boss: await startedBoss(t, server), queueName: newQueue(), attempts: 1 }) })
})
