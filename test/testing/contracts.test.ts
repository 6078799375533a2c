import { join } from 'node:path'
import { Redis } from 'ioredis'
import { PgBoss } from 'pg-boss'
import t from 'tap'
import { bullmq } from '../../lib/runners/bullmq.ts'
import { pgboss } from '../../lib/runners/pgboss.ts'
import { background, inline, memoryStore } from '../../lib/index.ts'
import type { IdempotencyStore, Runner, RunnerHost } from '../../lib/index.ts'
import { redisStore } from '../../lib/stores/redis.ts'
import { durable, sqliteStore } from '../../lib/sqlite/index.ts'
import { inboxContract, runnerContract, storeContract } from '../../lib/testing/index.ts'
import type { ContractCase } from '../../lib/testing/index.ts'
import { stoppedClock } from '../support/deliveries.ts'
import { PostgresServer, postgresMissing } from '../support/postgres.ts'
import { RedisServer, redisMissing } from '../support/redis.ts'
import { HANDLES, READING, closeSqlite, missing, openSqlite } from '../support/sqlite.mjs'
import type { Handle, HandleName } from '../support/sqlite.mjs'

type Test = typeof t

async function keeps (t: Pick<Test, 'test'>, cases: ContractCase[]): Promise<void> {
  for (const { name, run } of cases) await t.test(name, run)
}

function open (t: Pick<Test, 'teardown'>, file: string, name?: HandleName): Handle {
  const db = openSqlite(file, name)
  t.teardown(() => closeSqlite(db))
  return db
}

t.test('stores', async t => {
  await t.test('memoryStore', async t => await keeps(t, storeContract(() => memoryStore())))

  for (const handle of HANDLES) {
    await t.test(`sqliteStore, in a file, ${handle}`, { skip: missing[handle] }, async t => {
      const store = sqliteStore(open(t, join(t.testdir(), 'webhooks.db'), handle))
      await keeps(t, storeContract(() => store))
    })

    await t.test(`sqliteStore, two handles on one file, ${handle}`, { skip: missing[handle] }, async t => {
      const file = join(t.testdir(), 'webhooks.db')
      await keeps(t, storeContract(() => alternating(sqliteStore(open(t, file, handle)), sqliteStore(open(t, file, handle)))))
    })
  }

  for (const { name, skip, open } of READING) {
    await t.test(`sqliteStore, ${name}`, { skip }, async t => {
      const db = open(join(t.testdir(), 'webhooks.db'))
      t.teardown(() => db.close())
      await keeps(t, storeContract(() => sqliteStore(db)))
    })
  }

  await t.test('redisStore', { skip: redisMissing }, async t => {
    const { port } = await RedisServer.start(t)
    const redis = new Redis(port)
    t.teardown(async () => await redis.quit())
    await keeps(t, storeContract(() => redisStore(redis, { prefix: 'contract:' })))
  })
})

/** Each call goes to the other store in turn, as if two processes took turns. */
function alternating (a: IdempotencyStore, b: IdempotencyStore): IdempotencyStore {
  let turn = 0
  const next = (): IdempotencyStore => turn++ % 2 === 0 ? a : b
  return {
    begin: (...args) => next().begin(...args),
    checkpoint: (...args) => next().checkpoint(...args),
    complete: (...args) => next().complete(...args),
    extend: (...args) => next().extend(...args),
    release: (...args) => next().release(...args)
  }
}

t.test('runners', async t => {
  await t.test('inline', async t => await keeps(t, runnerContract(inline)))
  await t.test('background', async t => await keeps(t, runnerContract(() => background())))
  await t.test('background, one at a time', async t => await keeps(t, runnerContract(() => background({ concurrency: 1 }))))

  const handles = HANDLES.map(name => ({ name, skip: missing[name], open: (file: string) => openSqlite(file, name) }))
  for (const { name, skip, open } of [...handles, ...READING]) {
    await t.test(`durable, ${name}`, { skip }, async t => {
      let files = 0
      const dir = t.testdir()
      const fresh = (): Runner => {
        const db = open(join(dir, `${++files}.db`))
        t.teardown(() => db.close())
        return durable(db, { backoff: 5, attempts: 2 })
      }
      await keeps(t, runnerContract(fresh, { attempts: 2 }))
    })
  }

  await t.test('bullmq', { skip: redisMissing }, async t => {
    const { port } = await RedisServer.start(t)
    let queues = 0
    const fresh = (): Runner => bullmq({ connection: { host: '127.0.0.1', port }, queueName: `contract-${++queues}`, backoff: 5, attempts: 2, removeOnFail: { count: 100 } })
    await keeps(t, runnerContract(fresh, { attempts: 2 }))
  })

  await t.test('pgboss', { skip: postgresMissing }, async t => {
    const boss = await new PgBoss((await PostgresServer.start(t)).url).on('error', () => {}).start()
    t.teardown(async () => await boss.stop({ graceful: false }))
    let queues = 0
    await keeps(t, runnerContract(() => pgboss({ boss, queueName: `contract-${++queues}`, backoff: 0, attempts: 2 }), { attempts: 2 }))
  })
})

t.test('what cannot serve is told when it is given', async t => {
  const code = 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS'
  const handle = open(t, ':memory:')
  t.throws(() => redisStore({} as never), { code, message: 'redisStore: expected an ioredis client, which has eval() and evalsha()' })
  t.throws(() => redisStore(undefined as never), { code })
  t.throws(() => redisStore({ eval () {}, evalsha () {} } as never, { prefix: 1 as never }), { code, message: 'redisStore: expected prefix to be a string, got 1' })
  t.throws(() => sqliteStore({ exec () {} } as never), { code, message: /^expected an open SQLite handle/ })
  t.throws(() => durable(undefined as never), { code, message: /^expected an open SQLite handle/ })
  for (const [row, got] of [[[0], 'arrays'], [{ timeout: 0n }, 'objects with bigint']] as const) {
    const wrapped = { exec () {}, prepare: () => ({ run: () => ({ changes: 0 }), get: () => row, all: () => [row] }) }
    for (const create of [sqliteStore, durable]) {
      t.throws(() => create(wrapped), { code, message: `expected a SQLite handle whose rows are objects with numbers, got ${got}: open it without returnArrays, readBigInts, safeIntegers or what else changes how rows are read` })
    }
  }
  t.throws(() => durable(handle, { attempts: 0 }), { code, message: 'durable: expected attempts to be a whole number of attempts, 1 or more, got 0' })
  t.throws(() => durable(handle, { backoff: -1 }), { code })
  t.throws(() => durable(handle, { lease: 0.5 }), { code })
  t.throws(() => durable(handle, { concurrency: '1' as never }), { code, message: 'durable: expected concurrency to be a whole number of deliveries, 1 or more, got "1"' })
  t.throws(() => bullmq({ connection: null as never }), { code, message: 'bullmq: expected connection to be an ioredis instance or connection options' })
  t.throws(() => bullmq({ connection: 'redis://127.0.0.1' as never }), { code })
  t.throws(() => bullmq({ connection: {}, attempts: 0 }), { code, message: 'bullmq: expected attempts to be a whole number of attempts, 1 or more, got 0' })
  t.throws(() => bullmq({ connection: {}, worker: { concurrency: 0 } }), { code })
  t.throws(() => bullmq({ connection: {}, backend: {} as never }), { code, message: 'bullmq: expected backend to be a function, such as createPostgresBackend of BullMQ' })
  const boss = { work () {}, previewRedrive () {} } as unknown as PgBoss
  for (const each of [undefined, {}, { work () {} }, { previewRedrive () {} }]) {
    t.throws(() => pgboss({ boss: each as never }), { code, message: 'pgboss: expected boss to be a PgBoss, of pg-boss 12.35 or later' })
  }
  for (const [option, expected, least] of [['attempts', 'attempts, 1 to 1000', 1], ['backoff', 'ms, 0 or more', 0], ['heartbeatSeconds', 'seconds, 10 or more', 10], ['expireInSeconds', 'seconds, 1 to 86400', 1]] as const) {
    t.throws(() => pgboss({ boss, [option]: least - 1 }), { code, message: `pgboss: expected ${option} to be a whole number of ${expected}, got ${least - 1}` })
    t.ok(pgboss({ boss, [option]: least }))
  }
  t.throws(() => pgboss({ boss, worker: { batchSize: 0 } }), { code, message: 'pgboss: expected worker.batchSize to be a whole number of deliveries, 1 or more, got 0' })
  t.throws(() => pgboss({ boss, worker: { batchSize: 11 } }), { code, message: 'pgboss: expected worker.batchSize to be at most worker.concurrency, 10, got 11' })
  t.throws(() => pgboss({ boss, expireInSeconds: 86_401 }), { code, message: 'pgboss: expected expireInSeconds to be a whole number of seconds, 1 to 86400, got 86401' })
  t.throws(() => pgboss({ boss, worker: { concurrency: 0 } }), { code, message: /worker\.concurrency/ })
  for (const pollingIntervalSeconds of [0.4, Number.NaN, 'x' as never]) t.throws(() => pgboss({ boss, worker: { pollingIntervalSeconds } }), { code, message: /worker\.pollingIntervalSeconds/ })
})

t.test('bullmq takes nothing before it was started', async t => {
  const runner = bullmq({ connection: {} })
  const job = { webhookId: 'wh_1', timestamp: 1, endpoint: '/webhooks/openai', event: { type: 'batch.failed' } }
  await t.rejects(Promise.resolve(runner.run(job)), { code: 'FST_OPENAI_WEBHOOK_OVERLOADED' })
  await t.resolves(Promise.resolve(runner.close?.()))
})

t.test('a runner that keeps no dead deliveries breaks the contract that says it does', async t => {
  const cases = runnerContract(() => background(), { attempts: 1 })
  await t.rejects(cases.at(-1)!.run(), { message: 'expected dead(), deadCount() and requeue()' })
})

/** @returns the names of the cases that reject */
async function broken (cases: ContractCase[]): Promise<string[]> {
  return (await Promise.all(cases.map(async ({ name, run }) => await run().then(() => [], () => [name])))).flat()
}

t.test('a store that breaks its promises breaks the contract', async t => {
  const changed = (change: (store: IdempotencyStore) => Partial<IdempotencyStore>): ContractCase[] => storeContract(() => {
    const store = memoryStore()
    return { ...store, ...change(store) }
  })
  const terms = 'a lease, an extended lease and a retention last as long as they were asked to'
  const inSeconds = (ms: number): number => Math.ceil(ms / 1_000)
  t.ok((await broken(changed(({ begin }) => ({ begin: (key, lease) => begin(key, inSeconds(lease)) })))).includes(terms), 'a lease in seconds')
  t.ok((await broken(changed(({ extend }) => ({ extend: (key, token, lease) => extend(key, token, inSeconds(lease)) })))).includes(terms), 'an extended lease in seconds')
  t.ok((await broken(changed(({ complete }) => ({ complete: (key, token, retention) => complete(key, token, inSeconds(retention)) })))).includes(terms), 'a retention in seconds')

  const forgetful = changed(({ begin, checkpoint }) => {
    const finishedAt = new Map<string, number>()
    return {
      async begin (key, lease) {
        const claim = await begin(key, lease)
        return claim.state === 'claimed' && Date.now() - (finishedAt.get(key) ?? 0) > 50 ? { ...claim, finished: [] } : claim
      },
      checkpoint (key, ...rest) {
        finishedAt.set(key, Date.now())
        return checkpoint(key, ...rest)
      }
    }
  })
  t.ok((await broken(forgetful)).includes('what finished is kept while nobody has the claim'))
})

t.test('a runner that breaks its promises breaks the contract', async t => {
  const changed = (change: (runner: Runner) => Partial<Runner>): ContractCase[] => runnerContract(() => {
    const runner = background()
    return { ...runner, ...change(runner) }
  })
  const given = 'an accepted job is processed, as it was given'
  const distinct = 'the same webhook-id at another endpoint, or of another tenant, is another job'
  const closes = 'close() waits for what is being processed'

  t.same(await broken(changed(({ close }) => ({ close () { close?.() } }))), [closes], 'close() waits for nothing')
  t.same(await broken(changed(({ run }) => ({ run: ({ carrier, ...job }) => run(job) }))), [given], 'no carrier')
  t.same(await broken(changed(({ run }) => ({ run: ({ routeHandlers, ...job }) => run(job) }))), [given], 'no routeHandlers')
  t.same(await broken(changed(({ run }) => ({ run: ({ tenant, ...job }) => run(job) }))), [given, distinct], 'no tenant')
  t.same(await broken(changed(({ run }) => {
    const queued = new Set<string>()
    return {
      run (job) {
        if (queued.has(job.webhookId)) return 'duplicate'
        queued.add(job.webhookId)
        return run(job)
      }
    }
  })), [distinct], 'the webhook-id as the key')
  const twice = (host: RunnerHost): RunnerHost => ({
    async process (job) { await Promise.all([host.process(job), host.process(job)]) },
    report: (...args) => { host.report(...args) }
  })
  t.ok((await broken(changed(({ start }) => ({ start: host => start?.(twice(host)) })))).includes(closes), 'each job is processed twice')
})

t.test('a runner whose close() never settles breaks the contract', async t => {
  const cases = (closing: AbortController): ContractCase[] => runnerContract(() => ({
    ...background(),
    async close () {
      closing.abort()
      await new Promise(() => {})
    }
  }))
  const clock = stoppedClock(t)
  for (const [i, { name }] of cases(new AbortController()).entries()) {
    if (!['an accepted job is processed, as it was given', 'close() waits for what is being processed'].includes(name)) continue
    const [closing, over] = [new AbortController(), new AbortController()]
    const rejects = t.rejects(cases(closing)[i]!.run().finally(() => { over.abort() }), { message: 'expected close() to settle within 10000 ms' }, name)
    while (!over.signal.aborted) {
      await new Promise(resolve => setImmediate(resolve))
      if (closing.signal.aborted) clock.advance(6_000)
    }
    await rejects
  }
})

t.test('a runner that loses a part of what is dead breaks the contract', async t => {
  const changed = (change: (runner: Runner) => Partial<Runner>): ContractCase[] => runnerContract(() => {
    const runner = durable(open(t, ':memory:'), { backoff: 5, attempts: 2 })
    return { ...runner, ...change(runner) }
  }, { attempts: 2 })
  t.same(await broken(changed(({ dead }) => ({ dead: async (...args) => (await dead!(...args)).map(({ tenant, ...delivery }) => delivery) }))),
    ['a job that is given up is told once, and kept with what had failed and what had finished'])
  t.same(await broken(changed(({ requeue }) => ({ requeue: ({ tenant, ...delivery }, options) => requeue!(delivery, options) }))),
    ['a dead job that is requeued is processed with what had finished, and is dead no longer'])
})

t.test('a contract that would skip cases is refused', async t => {
  const code = 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS'
  for (const contract of [storeContract, runnerContract, inboxContract]) {
    t.throws(() => contract(undefined as never), { code, message: `${contract.name}: expected create to be a function, got undefined` })
  }
  t.throws(() => storeContract(memoryStore() as never), { code, message: 'storeContract: expected create to be a function, got a value of type object' })
  t.throws(() => runnerContract(inline, { attemps: 1 } as never), { code, message: 'runnerContract: unknown option "attemps", did you mean "attempts"?' })
  t.throws(() => runnerContract(inline, null as never), { code, message: 'runnerContract: expected options to be an object, got null' })
  t.throws(() => runnerContract(inline, { attempts: 0 }), { code, message: 'runnerContract: expected attempts to be a whole number of attempts, 1 or more, got 0' })
})
