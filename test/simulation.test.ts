import { randomInt } from 'node:crypto'
import { join } from 'node:path'
import { Redis } from 'ioredis'
import Database from 'libsql'
import t from 'tap'
import { background, inline, memoryStore } from '../lib/index.ts'
import { bullmq } from '../lib/runners/bullmq.ts'
import { durable, sqliteStore } from '../lib/sqlite/index.ts'
import { redisStore } from '../lib/stores/redis.ts'
import { RedisServer, redisMissing } from './support/redis.ts'
import { sized } from './support/size.ts'
import { RealTime, Simulation } from './support/simulation.ts'
import type { SimulationOptions } from './support/simulation.ts'
import { SteppedTime } from './support/time.ts'

const seed = Number(process.env['SEED'] ?? randomInt(1_000_000))
t.comment(`SEED=${seed}`)
t.setTimeout(sized(300_000, 3_000_000))

const DELIVERIES = sized(200, 100_000)
/** With anything but the default store and runner, which are the fastest. */
const OTHERS = sized(200, 30_000)
/** Of the calls of a store: enough that a small run has some. */
const STORE_FAILURES = sized(0.01, 0.002)
/** A real queue goes by a clock that cannot be stepped. */
const QUEUED = sized(200, 10_000)

type Test = typeof t

async function simulate (t: Pick<Test, 'comment' | 'same' | 'ok' | 'equal'>, options: Omit<SimulationOptions, 'seed'>): Promise<void> {
  const began = process.hrtime.bigint()
  const result = await new Simulation({ seed, storeFailures: STORE_FAILURES, ...options }).run()
  const seconds = Number(process.hrtime.bigint() - began) / 1e9
  t.comment(`SEED=${seed}, ${seconds.toFixed(0)} s: ${JSON.stringify(result)}`)
  t.same(result.faults, [])
  // That the run was one worth looking at.
  t.ok(result.acknowledged > 0.95 * options.deliveries, `${result.acknowledged} of ${options.deliveries} were acknowledged`)
  t.equal(result.acknowledged + result.givenUp, options.deliveries)
  t.ok(result.attempts > 1.02 * options.deliveries, `${result.attempts} were sent`)
  t.ok(result.handlerFailures > 0.1 * options.deliveries, `${result.handlerFailures} runs of a handler failed`)
  t.ok(result.storeFailures > 0, `${result.storeFailures} calls of the store failed`)
  t.ok(result.repeats <= result.storeFailures, `${result.repeats} runs were repeated for want of a record`)
}

/** One fsync a commit is for a machine that fails, which none does here. */
function open (t: Pick<Test, 'teardown' | 'testdir'>): { db: InstanceType<typeof Database>, relax: () => void } {
  const db = new Database(join(t.testdir(), 'webhooks.db'))
  t.teardown(() => db.close())
  return { db, relax: () => { db.exec('PRAGMA synchronous = OFF') } }
}

async function connected (t: Pick<Test, 'teardown'>): Promise<{ redis: Redis, port: number }> {
  const { port } = await RedisServer.start(t)
  const redis = new Redis(port)
  t.teardown(() => redis.disconnect())
  await redis.ping()
  return { redis, port }
}

t.test('72 hours of OpenAI\'s deliveries, retries and duplicates, with random failures of all sides', async t => {
  await t.test('memory store, inline()', async t => {
    const time = new SteppedTime(t)
    await simulate(t, { deliveries: DELIVERIES, time, store: memoryStore(), runner: inline(), promise: 'succeeded' })
  })

  await t.test('sqlite store, inline()', async t => {
    const { db, relax } = open(t)
    const time = new SteppedTime(t)
    const store = sqliteStore(db)
    relax()
    await simulate(t, { deliveries: OTHERS, time, store, runner: inline(), promise: 'succeeded' })
  })

  await t.test('redis store, inline()', { skip: redisMissing }, async t => {
    const { redis } = await connected(t)
    const time = new SteppedTime(t)
    await simulate(t, { deliveries: OTHERS, time, store: redisStore(redis), runner: inline(), promise: 'succeeded', lease: 1_000 })
  })

  await t.test('memory store, background()', async t => {
    const time = new SteppedTime(t)
    const runner = background({ concurrency: 5, maxQueue: 40 })
    await simulate(t, { deliveries: OTHERS, time, store: memoryStore(), runner, promise: 'will run' })
  })

  await t.test('sqlite store, durable()', async t => {
    const { db, relax } = open(t)
    const time = new SteppedTime(t)
    const store = sqliteStore(db)
    const runner = durable(db, { attempts: 1_000, concurrency: 20 })
    relax()
    await simulate(t, { deliveries: OTHERS, time, store, runner, promise: 'will succeed' })
    t.same(runner.dead(), [])
  })

  await t.test('redis store, bullmq()', { skip: redisMissing }, async t => {
    const { redis, port } = await connected(t)
    const runner = bullmq({ connection: { host: '127.0.0.1', port }, attempts: 1_000, backoff: { type: 'fixed', delay: 5 }, worker: { concurrency: 50 } })
    await simulate(t, { deliveries: QUEUED, time: new RealTime(), store: redisStore(redis), runner, promise: 'will succeed', lease: 1_000 })
  })
})
