import { once } from 'node:events'
import { join } from 'node:path'
import { Queue, Worker } from 'bullmq'
import { Redis } from 'ioredis'
import t from 'tap'
import { bullmq } from '../../lib/runners/bullmq.ts'
import type { BullMQOptions } from '../../lib/runners/bullmq.ts'
import type { FastifyInstance } from 'fastify'
import type { DeadDelivery, Job, OpenAIWebhookOptions, RunnerHost } from '../../lib/index.ts'
import { build, thin } from '../support/deliveries.ts'
import { DEADLINE, IMPATIENT, Member, TcpProxy, UNAVAILABLE, answer, batchFailed, deliverUntil200, effectsIn, redisClient, replicaOf, until } from '../support/faults.ts'
import { capturedLog, deferred, listen, redelivered } from '../support/observe.ts'
import { RedisServer, redisMissing } from '../support/redis.ts'
import { long } from '../support/size.ts'
import { keepsTenantsApart } from '../support/tenants.ts'

type Teardown = { teardown: (fn: () => unknown) => void }

/** ms; does not run out while a test lasts. */
const LONG = 600_000
const ENDPOINT = '/webhooks/openai'

const persistent = (dir: string): string[] => ['--appendonly', 'yes', '--appendfsync', 'always', '--dir', dir]

const skip = redisMissing

/** A receiver that queues, in Redis at `port`. */
async function queueing (t: Teardown, port: number, options: Partial<BullMQOptions> = {}, plugin: OpenAIWebhookOptions = {}) {
  const app = await build(t, {
    runner: bullmq({ connection: { port, host: '127.0.0.1', retryStrategy: () => 50 }, backoff: 1, ...options }),
    deadline: 2_000, // also where two cores are busy with other tests
    closeTimeout: 2_000,
    ...plugin
  })
  const told: string[] = []
  const ran: string[] = []
  const state = { app, told, ran, work: async (): Promise<void> => {} }
  app.openaiWebhook.onError((error, { webhookId }) => { told.push(`${webhookId ?? ''} ${error.message}`) })
  app.openaiWebhook.on('batch.failed', async (_event, { webhookId }) => {
    ran.push(webhookId)
    await state.work()
  })
  await listen(app)
  return state
}

function queueAt (t: Teardown, port: number): Queue {
  const queue = new Queue('openai-webhook', { connection: { port, host: '127.0.0.1', retryStrategy: () => 50 } })
  queue.on('error', () => {})
  t.teardown(async () => await queue.close())
  return queue
}

t.test('bullmq', { skip }, async t => {
  await t.test('what comes in one turn is queued at once; what cannot be queued fails no other', async t => {
    const server = await RedisServer.start(t)
    const runner = bullmq({ connection: { port: server.port, host: '127.0.0.1' }, worker: false })
    await runner.start!({ process: () => {}, report: error => { throw error } })
    const sizes: number[] = []
    const { addBulk } = Queue.prototype
    t.intercept(Queue.prototype, 'addBulk', {
      value: async function (this: Queue, jobs: Parameters<typeof addBulk>[0]) {
        sizes.push(jobs.length)
        return await addBulk.call(this, jobs)
      }
    })
    const job = (webhookId: string, event: object = {}): Job => ({ webhookId, timestamp: 1, endpoint: '/webhooks/openai', event: { type: 'batch.failed', ...event } })
    const queued = ['wh_1', 'wh_2', 'wh_3'].map(id => runner.run(job(id)))
    t.same(await Promise.all(queued), [undefined, undefined, undefined])
    t.same(sizes, [3])
    t.same(await Promise.all(['wh_3', 'wh_4'].map(async id => await runner.run(job(id)))), ['duplicate', undefined])

    const outcomes = await Promise.allSettled([runner.run(job('wh_5')), runner.run(job('wh_6', { no: 1n })), runner.run(job('wh_7'))])
    t.same(outcomes.map(({ status }) => status), ['fulfilled', 'rejected', 'fulfilled'])
    t.equal(await runner.depth!(), 6)
    await runner.close!()
  })

  await t.test('what is being queued when the app closes is queued and acknowledged', async t => {
    const server = await RedisServer.start(t)
    const { app } = await queueing(t, server.port, { worker: false })
    t.equal(await answer(app, batchFailed()), '200')
    const { addBulk } = Queue.prototype
    let closed: Promise<void> | undefined
    t.intercept(Queue.prototype, 'addBulk', {
      value: async function (this: Queue, jobs: Parameters<typeof addBulk>[0]) {
        const added = addBulk.call(this, jobs)
        closed = app.close()
        return await added
      }
    })
    t.equal(await answer(app, batchFailed()), '200')
    await closed
  })

  await t.test('a delivery of each tenant, with the same webhook-id', async t => {
    const { port } = await RedisServer.start(t)
    await keepsTenantsApart(t, { runner: bullmq({ connection: { port, host: '127.0.0.1' }, attempts: 1 }) })
  })

  const texts: Record<string, (answer: string) => string> = {
    '': answer => answer,
    ', as Redis 6 says it': answer => answer.replace('-READONLY', '-ERR Error running script (call to f_0): @user_script: 1: -READONLY')
  }
  for (const [how, rewrite] of Object.entries(texts)) {
    t.test(`an address that leads to another Redis, while the one before only reads${how}: 503, and then 200`, async t => {
      const [old, next] = [await RedisServer.start(t), await RedisServer.start(t)]
      const proxy = await TcpProxy.start(t, old.port)
      proxy.rewrite = answer => rewrite(answer.toString('latin1'))
      const { app, ran } = await queueing(t, proxy.port)
      t.equal(await answer(app, batchFailed('wh_before')), '200')
      await until('it to run', () => ran.length === 1)
      proxy.moveTo(next.port)
      await redisClient(t, old.port).replicaof('127.0.0.1', next.port)
      await deliverUntil200(app, batchFailed('wh_after'))
      await until('it to run', () => ran.length === 2)
      t.same(ran, ['wh_before', 'wh_after'])
    })
  }

  t.test('Redis is down: 503, queued and run once when it is back', async t => {
    const server = await RedisServer.start(t)
    const state = await queueing(t, server.port, {}, { deadline: 500 })
    await deliverUntil200(state.app, batchFailed('wh_before'))
    await until('the first delivery to run', () => state.ran.length === 1)
    await server.stop()
    const delivery = batchFailed('wh_during')
    t.equal(await answer(state.app, delivery), DEADLINE)
    t.equal(await answer(state.app, redelivered(delivery)), DEADLINE)
    t.same(state.ran, ['wh_before'])
    await server.start()
    await deliverUntil200(state.app, redelivered(delivery))
    await until('the delivery to run', () => state.ran.length === 2)
    t.match(await answer(state.app, redelivered(delivery)), /^200/)
    await deliverUntil200(state.app, batchFailed('wh_after'))
    const queue = queueAt(t, server.port)
    await until('the last delivery to be done', async () => await queue.getCompletedCount() === 2)
    t.same(state.ran, ['wh_before', 'wh_during', 'wh_after'])
    t.same(await queue.getJobCounts('completed', 'waiting', 'active', 'failed', 'delayed'), { completed: 2, waiting: 0, active: 0, failed: 0, delayed: 0 }, 'what came after the restart')
  })

  t.test('Redis with persistence restarts: what was acknowledged is run by a worker that picks up by itself', async t => {
    const server = await RedisServer.start(t, ...persistent(t.testdir()))
    const receiving = await queueing(t, server.port, { worker: false })
    const ids = Array.from({ length: 20 }, (_, i) => `wh_${i}`)
    for (const id of ids) t.equal(await answer(receiving.app, batchFailed(id)), '200')
    await server.stop()
    const working = await queueing(t, server.port, {}, { path: false })
    await server.start()
    await until('all to run', () => working.ran.length >= ids.length)
    t.same(working.ran.sort(), ids.sort())
    t.same(receiving.ran, [])
    for (const id of ids) t.equal(await answer(receiving.app, batchFailed(id)), '200 duplicate', 'known, and not queued again')
    t.equal(working.ran.length, ids.length)
  })

  t.test('Redis is paused for longer than the deadline: 503, then queued and run once', async t => {
    const server = await RedisServer.start(t)
    const admin = redisClient(t, server.port)
    const state = await queueing(t, server.port, {}, { deadline: 50 })
    await admin.client('PAUSE', LONG, 'WRITE')
    const delivery = batchFailed('wh_paused')
    t.equal(await answer(state.app, delivery), DEADLINE)
    t.equal(await answer(state.app, redelivered(delivery)), DEADLINE)
    t.same(state.ran, [])
    await admin.client('UNPAUSE')
    await deliverUntil200(state.app, redelivered(delivery))
    await until('the delivery to run', () => state.ran.length === 1)
    await deliverUntil200(state.app, redelivered(delivery))
    t.same(state.ran, ['wh_paused'])
  })

  t.test('Redis is out of memory: 503, then queued and run once', async t => {
    const server = await RedisServer.start(t)
    const admin = redisClient(t, server.port)
    const state = await queueing(t, server.port)
    await admin.config('SET', 'maxmemory-policy', 'noeviction')
    await admin.config('SET', 'maxmemory', '1')
    const delivery = batchFailed('wh_full')
    t.equal(await answer(state.app, delivery), UNAVAILABLE)
    t.same(state.ran, [])
    await admin.config('SET', 'maxmemory', '0')
    t.equal(await answer(state.app, redelivered(delivery)), '200')
    await until('the delivery to run', () => state.ran.length === 1)
    t.match(await answer(state.app, redelivered(delivery)), /^200/)
    t.same(state.ran, ['wh_full'])
  })

  t.test('Redis fails over to a replica: what was acknowledged is run there', async t => {
    const main = await RedisServer.start(t, '--repl-diskless-sync-delay', '0')
    const replica = await replicaOf(t, main)
    const proxy = await TcpProxy.start(t, main.port)
    const receiving = await queueing(t, proxy.port, { worker: false })
    const ids = Array.from({ length: 10 }, (_, i) => `wh_${i}`)
    for (const id of ids) t.equal(await answer(receiving.app, batchFailed(id)), '200')
    const admin = redisClient(t, main.port)
    await admin.set('written', 1)
    t.equal(await admin.wait(1, LONG), 1)
    await main.stop()
    proxy.down()
    await redisClient(t, replica.port).replicaof('NO', 'ONE')
    await proxy.up(replica.port)
    const working = await queueing(t, replica.port, {}, { path: false })
    await until('all to run', () => working.ran.length >= ids.length)
    t.same(working.ran.sort(), ids.sort())
    const after = await deliverUntil200(receiving.app, batchFailed('wh_after'))
    t.equal(after.at(-1), '200')
    await until('the last to run', () => working.ran.includes('wh_after'))
  })

  t.test('a handler that fails is tried again up to `attempts`, then the job is kept as failed with its message', async t => {
    const server = await RedisServer.start(t)
    const state = await queueing(t, server.port, { attempts: 3 })
    state.work = async () => { throw new Error('no such batch') }
    const delivery = batchFailed('wh_failing')
    t.equal(await answer(state.app, delivery), '200')
    const queue = queueAt(t, server.port)
    await until('the job to be given up', async () => await queue.getFailedCount() === 1)
    t.same(state.ran, ['wh_failing', 'wh_failing', 'wh_failing'])
    const [job] = await queue.getFailed()
    t.match(job, { attemptsMade: 3, failedReason: '1 of 1 handlers failed: no such batch', data: { webhookId: 'wh_failing', endpoint: ENDPOINT, event: { type: 'batch.failed' } } })
    t.equal(state.told.filter(message => message === 'wh_failing 1 of 1 handlers failed: no such batch').length, 3)
    t.match(await answer(state.app, redelivered(delivery)), /^200/, 'accepted: it is there for a person to look at')
    state.work = async () => {}
    await job!.retry()
    await until('the job to succeed when it is retried by hand', async () => await queue.getCompletedCount() === 1)
    t.equal(state.ran.length, 4)
  })

  t.test('a handler that has succeeded does not run again when another one fails', async t => {
    const server = await RedisServer.start(t)
    const app = await build(t, { runner: bullmq({ connection: { port: server.port, host: '127.0.0.1' }, attempts: 3, backoff: 1 }) })
    const ran: string[] = []
    app.openaiWebhook.on('batch.failed', () => { ran.push('first') })
    app.openaiWebhook.on('batch.failed', () => {
      ran.push('second')
      if (ran.length === 2) throw new Error('only once')
    })
    await listen(app)
    t.equal(await answer(app, batchFailed()), '200')
    await until('the second to run again', () => ran.length >= 3)
    t.same(ran, ['first', 'second', 'second'])
  })

  t.test('a delivery that is sent twice is queued once', async t => {
    const server = await RedisServer.start(t)
    const receiving = await queueing(t, server.port, { worker: false })
    const another = await queueing(t, server.port, { worker: false })
    const delivery = batchFailed('wh_twice')
    const answers = await Promise.all([answer(receiving.app, delivery), answer(another.app, redelivered(delivery)), answer(receiving.app, redelivered(delivery))])
    // Whoever asks the queue after another has put it there is told so.
    t.ok(answers.includes('200') && answers.every(text => text === '200' || text === '200 duplicate'), answers.join(', '))
    t.equal(await answer(another.app, redelivered(delivery)), '200 duplicate')
    t.equal(await queueAt(t, server.port).getWaitingCount(), 1)
  })

  t.test('app.close() waits for the job that runs; what waits is left to the next worker', async t => {
    const server = await RedisServer.start(t)
    const [started, closing, finish] = [deferred(), deferred(), deferred()]
    const runner = bullmq({ connection: { port: server.port, host: '127.0.0.1' }, worker: { concurrency: 1 } })
    const first = await queueing(t, server.port, {}, {
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
      started.resolve()
      await finish.promise
      ended = true
    }
    t.equal(await answer(first.app, batchFailed('wh_running')), '200')
    await started.promise
    t.equal(await answer(first.app, batchFailed('wh_waiting')), '200')
    const closed = first.app.close()
    await closing.promise
    finish.resolve()
    await closed
    t.equal(ended, true)
    t.same(first.ran, ['wh_running'])
    const next = await queueing(t, server.port)
    await until('the other to run', () => next.ran.length === 1)
    t.same(next.ran, ['wh_waiting'])
  })

  for (const [name, options, connection] of [['a worker', {}, {}], ['a receiver', { worker: false }, {}], ['a receiver that queues nothing offline', { worker: false }, { enableOfflineQueue: false }]] as const) {
    t.test(`app.close() ends by \`closeTimeout\` while Redis is down, and leaves nothing that tries to connect: ${name}`, async t => {
      const server = await RedisServer.start(t)
      const { app } = await queueing(t, server.port, { connection: { port: server.port, host: '127.0.0.1', retryStrategy: () => 50, ...connection }, ...options }, { closeTimeout: 200 })
      await deliverUntil200(app, batchFailed())
      await server.stop()
      t.match(await answer(app, batchFailed()), /^503 /)
      await app.close()

      // Its connections are gone too, and do not come back with Redis.
      const control = redisClient(t, server.port, IMPATIENT)
      await server.start()
      for (let i = 0; i < 3; i++) {
        await until('the control to be connected', () => control.status === 'ready')
        const closed = once(control, 'close')
        control.disconnect(true)
        await closed
      }
      await until('the control to be connected', () => control.status === 'ready')
      t.equal(String(await control.client('LIST')).trim().split('\n').length, 1)
    })
  }

  t.test('a worker in its own process runs the same handlers', async t => {
    const server = await RedisServer.start(t)
    const effects = join(t.testdir(), 'effects')
    const receiving = await queueing(t, server.port, { worker: false })
    const worker = await Member.start(t, { effects, runner: 'bullmq', redisPort: server.port, path: false, worker: true })
    const ids = Array.from({ length: 50 }, (_, i) => `wh_${i}`)
    t.same(await Promise.all(ids.map(async id => await answer(receiving.app, batchFailed(id)))), ids.map(() => '200'))
    await until('all to run', () => effectsIn(effects).length >= ids.length)
    t.same(effectsIn(effects).map(({ webhookId }) => webhookId).sort(), ids.sort())
    t.ok(effectsIn(effects).every(({ pid }) => pid === worker.pid))
    t.same(receiving.ran, [])
    await worker.close()
  })

  t.test('a worker that is killed while it runs a job: another one takes it over', async t => {
    const server = await RedisServer.start(t)
    const effects = join(t.testdir(), 'effects')
    const receiving = await queueing(t, server.port, { worker: false })
    const options = { effects, runner: 'bullmq', redisPort: server.port, path: false, worker: { lockDuration: 500, stalledInterval: 250 } } as const
    const killed = await Member.start(t, { ...options, hangs: true })
    t.equal(await answer(receiving.app, batchFailed('wh_taken_over')), '200')
    await until('the job to be started', () => effectsIn(effects).length === 1)
    await killed.kill()
    const other = await Member.start(t, options)
    const queue = queueAt(t, server.port)
    await until('the job to be done', async () => await queue.getCompletedCount() === 1)
    t.same(effectsIn(effects), [{ webhookId: 'wh_taken_over', pid: killed.pid }, { webhookId: 'wh_taken_over', pid: other.pid }])
  })

  long(t, 'a process whose handler still runs at `closeTimeout` ends, and another one takes its job over', {}, async t => {
    const server = await RedisServer.start(t)
    const effects = join(t.testdir(), 'effects')
    const receiving = await queueing(t, server.port, { worker: false })
    const options = { effects, runner: 'bullmq', redisPort: server.port, path: false, worker: { stalledInterval: 250 } } as const
    const late = await Member.start(t, { ...options, hangs: 1_000, closeTimeout: 100 })
    t.equal(await answer(receiving.app, batchFailed('wh_late')), '200')
    await until('the job to be started', () => effectsIn(effects).length === 1)
    await late.close() // once the handler has ended
    t.same(late.told, [])
    const hung = await Member.start(t, { ...options, hangs: true, closeTimeout: 100 })
    t.equal(await answer(receiving.app, batchFailed('wh_hung')), '200')
    await until('the job to be started', () => effectsIn(effects).some(({ webhookId, pid }) => webhookId === 'wh_hung' && pid === hung.pid))
    await hung.close()
    t.same(hung.told, [])
    const admin = redisClient(t, server.port)
    for (const key of await admin.keys('*:lock')) await admin.del(key) // as if they had run out
    const other = await Member.start(t, options)
    await until('the jobs to be taken over', () => ['wh_late', 'wh_hung'].every(id => effectsIn(effects).some(({ webhookId, pid }) => webhookId === id && pid === other.pid)))
    await other.close()
  })

  long(t, 'processes with a worker end while Redis is down, whatever their connections are at', {}, async t => {
    const server = await RedisServer.start(t)
    const effects = join(t.testdir(), 'effects')
    const options = { effects, runner: 'bullmq', redisPort: server.port, path: false, closeTimeout: 200 } as const
    const members = await Promise.all([1, 2, 3].map(async () => await Member.start(t, options)))
    const receiving = await queueing(t, server.port, { worker: false })
    await deliverUntil200(receiving.app, batchFailed('wh_1'))
    await until('the job to be run', () => effectsIn(effects).length === 1)
    await server.stop()
    await Promise.all(members.map(async member => await member.close()))
  })

  t.test('a connection of the user\'s own stays open, also where a handler runs on', async t => {
    const server = await RedisServer.start(t)
    const connection = new Redis(server.port, '127.0.0.1', { maxRetriesPerRequest: null })
    t.teardown(() => { connection.disconnect() })
    const state = await queueing(t, server.port, { connection }, { closeTimeout: 100 })
    const running = deferred()
    state.work = async () => { await running.promise }
    t.equal(await answer(state.app, batchFailed('wh_1')), '200')
    await until('the handler to run', () => state.ran.length === 1)
    await state.app.close()
    t.equal(await connection.ping(), 'PONG')
    running.resolve()
  })

  t.test('a connection of the user\'s own stays open where the queue cannot be closed', async t => {
    const server = await RedisServer.start(t)
    const connection = redisClient(t, server.port)
    const { app, told } = await queueing(t, server.port, { connection, worker: false })
    await deliverUntil200(app, batchFailed())
    const { close } = Queue.prototype
    t.intercept(Queue.prototype, 'close', {
      value: async function (this: Queue) {
        await close.call(this)
        throw new Error('cannot close')
      }
    })
    await app.close()
    t.match(told, [/cannot close/])
    t.equal(await connection.ping(), 'PONG')
  })

  t.test('several people requeue the same deliveries at once, which die again meanwhile', async t => {
    const server = await RedisServer.start(t)
    const apps = await Promise.all([1, 2, 3].map(async () => (await queueing(t, server.port, { attempts: 1, worker: { concurrency: 20 } }))))
    for (const state of apps) state.work = async () => { throw new Error('no such customer') }
    const { deadLetters } = apps[0]!.app.openaiWebhook
    const ids = Array.from({ length: 40 }, (_, n) => `wh_${n}`)
    await Promise.all(ids.map(async id => await answer(apps[0]!.app, batchFailed(id))))
    for (let round = 0; round < 5; round++) {
      await until('all to be dead', async () => await deadLetters.count() === ids.length)
      await Promise.all(apps.map(async ({ app }) => {
        for (const webhookId of ids) await app.openaiWebhook.deadLetters.requeue({ endpoint: ENDPOINT, webhookId })
      }))
    }
    await until('all to be dead', async () => await deadLetters.count() === ids.length)
  })

  t.test('a delivery that dies is told once as dead, with the user\'s own stack in the queue too; requeued, only the others run', async t => {
    const server = await RedisServer.start(t)
    const log = capturedLog()
    const app = await build(t, { runner: bullmq({ connection: { port: server.port, host: '127.0.0.1' }, attempts: 2, backoff: 1 }) }, { logger: log.logger })
    const { deadLetters } = app.openaiWebhook
    await t.rejects(deadLetters.count(), { code: 'FST_OPENAI_WEBHOOK_UNAVAILABLE', cause: { message: 'bullmq: expected the app to be ready' } })
    const ran: string[] = []
    let fails = true
    app.openaiWebhook.on('batch.failed', () => { ran.push('import') }, { name: 'import' })
    app.openaiWebhook.on('batch.failed', function bill () {
      ran.push('bill')
      if (fails) throw new Error('no such customer')
    }, { name: 'bill' })
    const died: DeadDelivery[] = []
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
    const [job] = await queueAt(t, server.port).getFailed()
    t.match(job, { failedReason: '1 of 2 handlers failed: no such customer', stacktrace: [err.stack, err.stack] })
    t.equal(await answer(app, batchFailed('wh_1')), '200 duplicate')

    const admin = redisClient(t, server.port)
    await admin.call('ACL', 'SETUSER', 'default', '-zrem')
    await t.rejects(deadLetters.requeue(dead!), { message: /can't run this command/ }, 'a queue that does not take it is told')
    await admin.call('ACL', 'SETUSER', 'default', '+zrem')

    fails = false
    const requeued = await Promise.all([deadLetters.requeue(dead!), deadLetters.requeue(dead!)])
    t.same(requeued.sort(), [false, true], 'one of two')
    await until('it to run', () => ran.length === 4)
    t.same(ran, ['import', 'bill', 'bill', 'bill'])
    await until('it to be done', async () => await queueAt(t, server.port).getCompletedCount() === 1)
    t.equal(await deadLetters.count(), 0)
    await app.close()
  })

  t.test('another worker runs only what has not succeeded, though it shares no store', async t => {
    const server = await RedisServer.start(t)
    const ran: string[] = []
    const fails = new Set(['first'])
    const worker = async (name: string): Promise<FastifyInstance> => {
      const app = await build(t, { runner: bullmq({ connection: { port: server.port, host: '127.0.0.1' }, attempts: 3, backoff: LONG }) })
      app.openaiWebhook.on('batch.failed', () => { ran.push(`${name} import`) }, { name: 'import' })
      app.openaiWebhook.on('batch.failed', () => {
        ran.push(`${name} bill`)
        if (fails.has(name)) throw new Error('no such customer')
      }, { name: 'bill' })
      return await listen(app)
    }
    const first = await worker('first')
    t.equal(await answer(first, batchFailed('wh_1')), '200')
    await until('it to fail', () => ran.length === 2)
    await first.close()
    await queueAt(t, server.port).promoteJobs()
    await worker('second')
    await until('it to run', () => ran.length > 2)
    t.same(ran, ['first import', 'first bill', 'second bill'])
  })

  t.test('a worker that another one has taken the job from writes no more to it', async t => {
    const server = await RedisServer.start(t)
    const redis = redisClient(t, server.port)
    const queue = queueAt(t, server.port)
    const state = await queueing(t, server.port)
    state.work = async () => {
      const [job] = await queue.getActive()
      // As the other worker does.
      await redis.set(`bull:${queue.name}:${job!.id!}:lock`, 'of another worker')
      throw new Error('no such customer')
    }
    t.equal(await answer(state.app, batchFailed('wh_1')), '200')
    await until('it to be told', () => state.told.some(line => line.startsWith('wh_1')))
    await until('BullMQ to refuse the result', () => state.told.some(line => /lock/i.test(line)))
    const [job] = await queue.getActive()
    t.notOk('failure' in (job!.data as object))
  })

  t.test('many dead deliveries are listed page by page', async t => {
    const server = await RedisServer.start(t)
    const state = await queueing(t, server.port, { attempts: 1 })
    state.work = async () => { throw new Error('no such batch') }
    const ids = Array.from({ length: 101 }, (_, i) => `wh_${i}`)
    await Promise.all(ids.map(async id => await answer(state.app, batchFailed(id))))
    const { deadLetters } = state.app.openaiWebhook
    await until('all to be dead', async () => await deadLetters.count() === ids.length)
    t.same((await deadLetters.list({ limit: 1_000 })).map(({ webhookId }) => webhookId).sort(), ids.sort())
    t.equal((await deadLetters.list()).length, 100)
    t.same(await deadLetters.list({ type: 'batch.completed' }), [])
  })

  /** A runner whose jobs stall until it gives them up, and a host that knows what `recorded` says. */
  async function stalling (t: Teardown, host: Partial<RunnerHost>, options: Partial<BullMQOptions> = {}, attempt: (start: number) => 'stalls' | 'succeeds' = () => 'stalls') {
    const server = await RedisServer.start(t)
    const admin = redisClient(t, server.port)
    const connection = { port: server.port, host: '127.0.0.1' }
    const runner = bullmq({ connection, attempts: 1, worker: { lockDuration: LONG, stalledInterval: 20 }, ...options })
    const told: Array<[how: string, error: unknown, delivery: unknown]> = []
    const over = deferred()
    let starts = 0
    await runner.start!({
      process: async () => {
        if (attempt(++starts) === 'succeeds') return
        // As if the process had died: nobody renews the lock. Which one of BullMQ's marks and finds it stalled does not matter.
        for (const key of await admin.keys('*:lock')) await admin.del(key)
        await over.promise
      },
      report: (error, job) => { told.push(['report', error, job]) },
      dead: (delivery, error) => { told.push(['dead', error, delivery]) },
      ...host
    })
    t.teardown(async () => {
      over.resolve()
      await runner.close!()
    })
    await runner.run({ webhookId: 'wh_1', timestamp: 1, endpoint: ENDPOINT, event: thin('batch.failed') })
    return { runner, told, starts: () => starts, queue: queueAt(t, server.port) }
  }
  const STALLED = { message: 'the process ended while the handlers ran' }

  t.test('a delivery whose workers have died as often as it may be attempted is dead, with what the store knows to have succeeded', async t => {
    const { runner, told, starts } = await stalling(t, { recorded: async () => ({ done: false, finished: ['import'] }) }, { attempts: 2 })
    await until('it to be told', () => told.length > 0)
    t.match(told, [['dead', STALLED, { webhookId: 'wh_1', attempts: 2, finished: ['import'], errors: [{ handler: null, ...STALLED }] }]])
    t.match(await runner.dead!(), [{ webhookId: 'wh_1', attempts: 2, finished: ['import'] }])
    t.equal(starts(), 2)

    t.equal(await runner.requeue!({ webhookId: 'wh_1', endpoint: ENDPOINT }), true)
    await until('it to be dead again', () => told.length > 1)
    t.equal(starts(), 4, 'requeued, it has its attempts anew')
    t.match(told[1], ['dead', STALLED, { attempts: 2 }])
  })

  t.test('requeued after that, an attempt that fails takes none of the others', async t => {
    const { runner, told, starts, queue } = await stalling(t, {}, { attempts: 2, backoff: 1 }, start => {
      if (start === 3) throw new Error('no such customer')
      return start === 4 ? 'succeeds' : 'stalls'
    })
    await until('it to be dead', () => told.length > 0)
    t.match(told, [['dead', STALLED, { webhookId: 'wh_1', attempts: 2, finished: [] }]], 'where a host cannot say, with nothing')
    t.equal(await runner.requeue!({ webhookId: 'wh_1', endpoint: ENDPOINT }), true)
    await until('it to be completed', async () => await queue.getCompletedCount() === 1)
    t.match(told.slice(1), [['report', { message: 'no such customer' }, { webhookId: 'wh_1' }]])
    t.equal(starts(), 4)
  })

  t.test('an attempt after one that its worker died in is told what an inbox may remember', async t => {
    const jobs: unknown[] = []
    const { runner, told } = await stalling(t, {
      interrupted: job => {
        jobs.push(job)
        return { ...job, remembered: { bill: 1 } }
      }
    }, { attempts: 3, backoff: 1 }, start => {
      if (start > 1) throw new Error('no such customer')
      return 'stalls'
    })
    await until('it to be dead', () => told.some(([how]) => how === 'dead'))
    t.match(jobs, [{ webhookId: 'wh_1', remembered: undefined }, { webhookId: 'wh_1' }])
    t.match(await runner.dead!(), [{ webhookId: 'wh_1', remembered: { bill: 1 } }])
    await t.rejects(async () => await runner.requeue!({ webhookId: 'wh_1', endpoint: ENDPOINT }), { code: 'FST_OPENAI_WEBHOOK_NEEDS_FORCE' })
  })

  t.test('and not dead where the store knows it to have been processed', async t => {
    const { runner, told, queue } = await stalling(t, { recorded: async () => ({ done: true, finished: [] }) })
    await until('it to be completed', async () => await queue.getCompletedCount() === 1)
    t.equal(await runner.deadCount!(), 0)
    t.same(told, [])
  })

  t.test('while the store cannot be reached it is not dead, and is looked at again', async t => {
    let isReached = false
    const { runner, told, queue, starts } = await stalling(t, {
      recorded: async () => {
        if (!isReached) throw new Error('connect ECONNREFUSED')
        return { done: false, finished: ['import'] }
      }
    })
    for (let times = 1; times <= 3; times++) {
      await until('it to be told', () => told.length === times)
      await until('it to wait', async () => await queue.getDelayedCount() === 1)
      t.equal(await runner.deadCount!(), 0)
      isReached = times === 3
      await queue.promoteJobs()
    }
    await until('it to be dead', () => told.length > 3)
    t.match(told.slice(0, 3), Array(3).fill(['report', { message: 'connect ECONNREFUSED' }, { webhookId: 'wh_1' }]))
    t.match(told.slice(3), [['dead', STALLED, { webhookId: 'wh_1', finished: ['import'] }]])
    t.equal(starts(), 1)
  })

  t.test('what the queue did not take of the last attempt is asked of the store by a requeue', async t => {
    const server = await RedisServer.start(t)
    const admin = redisClient(t, server.port)
    const told: unknown[] = []
    let known: Awaited<ReturnType<NonNullable<RunnerHost['recorded']>>> | Error = new Error('connect ECONNREFUSED')
    const runner = bullmq({ connection: { port: server.port, host: '127.0.0.1' }, attempts: 1 })
    await runner.start!({
      async process () {
        // BullMQ writes a job's data by a script of its own.
        await admin.call('ACL', 'SETUSER', 'default', '-hset')
        throw new Error('no such customer')
      },
      report: error => { told.push(error) },
      dead: delivery => { told.push(delivery) },
      recorded: async () => {
        if (known instanceof Error) throw known
        return known
      }
    })
    t.teardown(async () => await runner.close!())
    const delivery = { webhookId: 'wh_1', timestamp: 1, endpoint: ENDPOINT, event: thin('batch.failed') }
    await runner.run(delivery)
    await until('it to be told', () => told.length > 0)
    t.match(told[0], { message: /can't run this command/ })
    await admin.call('ACL', 'SETUSER', 'default', '+hset')
    await until('it to be dead', async () => await runner.deadCount!() === 1)
    await t.rejects(async () => await runner.requeue!(delivery), { message: 'connect ECONNREFUSED' })
    known = { done: false, finished: ['import'], remembered: { bill: 1 } }
    await t.rejects(async () => await runner.requeue!(delivery), { code: 'FST_OPENAI_WEBHOOK_NEEDS_FORCE' })
    t.match(await runner.dead!(), [{ finished: ['import'] }])
    known = { done: true, finished: [] }
    t.equal(await runner.requeue!(delivery, { force: true }), true)
  })

  t.test('a job that is removed while it runs is told', async t => {
    const server = await RedisServer.start(t)
    const admin = redisClient(t, server.port)
    const told: unknown[] = []
    const runner = bullmq({ connection: { port: server.port, host: '127.0.0.1' }, attempts: 2 })
    await runner.start!({
      async process () {
        for (const key of await admin.keys('bull:openai-webhook:*wh_1')) await admin.del(key)
        throw new Error('the handler failed')
      },
      report: error => { told.push(error) }
    })
    t.teardown(async () => await runner.close!())
    await runner.run({ webhookId: 'wh_1', timestamp: 1, endpoint: ENDPOINT, event: thin('batch.failed') })
    await until('it to be told', () => told.length >= 2)
    t.match(told.slice(0, 2), [{ message: /^Missing key for job/ }, { message: 'the handler failed' }])
  })

  t.test('what BullMQ has to say is told where it has no job for it, or no error', async t => {
    const server = await RedisServer.start(t)
    const { on } = Worker.prototype
    const workers: Worker[] = []
    Worker.prototype.on = function (this: Worker, ...args: Parameters<typeof on>) {
      workers.push(this)
      return on.apply(this, args)
    } as typeof on
    t.teardown(() => { Worker.prototype.on = on })
    const runner = bullmq({ connection: { port: server.port, host: '127.0.0.1' }, attempts: 1 })
    const told: unknown[] = []
    const text: unknown = 'a text'
    await runner.start!({ process: async () => { throw text }, report: error => { told.push(error) } })
    t.teardown(async () => await runner.close!())
    const lost = new Error('a job that was removed')
    workers[0]!.emit('failed', undefined, lost, 'active')
    t.same(told, [lost])
    await runner.run({ webhookId: 'wh_1', timestamp: 1, endpoint: ENDPOINT, event: thin('batch.failed') })
    await until('it to be told', () => told.length === 2)
    t.match(told[1], { message: 'a text' })
    const [job] = await queueAt(t, server.port).getFailed()
    workers[0]!.emit('failed', job as never, new Error('by BullMQ itself'), 'active')
    t.match(told[2], { message: 'by BullMQ itself' })
  })

  t.test('a job that an earlier version has left: dead after it had stalled, or with a failure that does not say how often it was started', async t => {
    const server = await RedisServer.start(t)
    const queue = queueAt(t, server.port)
    const admin = redisClient(t, server.port)
    const ran: string[] = []
    const runner = bullmq({ connection: { port: server.port, host: '127.0.0.1' }, attempts: 1 })
    let isBroken = true
    await runner.start!({
      async process ({ webhookId }) {
        ran.push(webhookId)
        if (isBroken) throw new Error('no such customer')
      },
      report () {}
    })
    t.teardown(async () => await runner.close!())
    await runner.run({ webhookId: 'wh_1', timestamp: 1, endpoint: ENDPOINT, event: thin('batch.failed') })
    await until('it to be dead', async () => await runner.deadCount!() === 1)
    const [job] = await queue.getFailed()
    const { failure: { starts, ...failure }, stalls, ...data } = job!.data
    await job!.updateData({ ...data, failure })
    await admin.hset(queue.toKey(job!.id!), 'stc', 2)
    t.match(await runner.dead!(), [{ attempts: 1, errors: [{ message: 'no such customer' }] }])
    isBroken = false
    t.equal(await runner.requeue!({ webhookId: 'wh_1', endpoint: ENDPOINT }), true)
    await until('it to be done', async () => await queue.getCompletedCount() === 1)
    t.same(ran, ['wh_1', 'wh_1'])
  })

  t.test('and where a host cannot say what had succeeded, a requeue runs all of it', async t => {
    const server = await RedisServer.start(t)
    const admin = redisClient(t, server.port)
    const runner = bullmq({ connection: { port: server.port, host: '127.0.0.1' }, attempts: 1 })
    const ran: Job[] = []
    await runner.start!({
      async process (job) {
        ran.push(job)
        if (ran.length > 1) return
        await admin.call('ACL', 'SETUSER', 'default', '-hset')
        throw new Error('no such customer')
      },
      report () {}
    })
    t.teardown(async () => await runner.close!())
    const delivery = { webhookId: 'wh_1', timestamp: 1, endpoint: ENDPOINT, event: thin('batch.failed') }
    await runner.run(delivery)
    await until('it to fail', async () => await runner.deadCount!() === 1)
    await admin.call('ACL', 'SETUSER', 'default', '+hset')
    t.equal(await runner.requeue!(delivery), true)
    await until('it to run', () => ran.length === 2)
    t.same(ran[1], delivery)
  })
})
