import t from 'tap'
import type { Test } from 'tap'
import { memoryStore } from '../../lib/index.ts'
import type { Claim, IdempotencyStore, Job, OpenAIWebhookOptions, Runner, RunnerHost } from '../../lib/index.ts'
import { runnerContract } from '../../lib/testing/index.ts'
import { build, outcome, post, sign, stoppedClock, thin } from '../support/deliveries.ts'
import { until } from '../support/faults.ts'
import { capturedLog, closeTimeout, deferred, drained, redelivered } from '../support/observe.ts'

// What a runner finds when it asks its host for a job, once or more often.

const JOB: Job = { webhookId: 'wh_1', timestamp: 1750861210, endpoint: '/webhooks/openai', event: thin('batch.failed') }

const turn = async (): Promise<void> => await new Promise(resolve => setImmediate(resolve))

async function hosted (t: Parameters<typeof build>[0], store: IdempotencyStore = memoryStore(), told: unknown[] = []) {
  let host!: RunnerHost
  const runner: Runner = { start (startedBy) { host = startedBy }, run () {} }
  const app = await build(t, { runner, closeTimeout, idempotency: { store } })
  app.openaiWebhook.onError(error => { told.push(error) })
  let runs = 0
  const running = deferred()
  app.openaiWebhook.on('batch.failed', async () => {
    runs++
    await running.promise
  })
  await app.ready()
  return { host, app, runs: () => runs, finish: running.resolve }
}

t.test('a job whose claim another process keeps is given back after some seconds, to be run again', async t => {
  const { host, runs } = await hosted(t, { ...memoryStore(), begin: () => ({ state: 'running' }) })
  const clock = stoppedClock(t)
  const settled = new AbortController()
  const refused = t.rejects(Promise.resolve(host.process(JOB)).finally(() => { settled.abort() }), { code: 'FST_OPENAI_WEBHOOK_IN_PROGRESS' })
  while (!settled.signal.aborted) {
    await turn()
    clock.advance(1_000)
  }
  await refused
  t.equal(runs(), 0)
})

t.test('a job whose claim another process keeps is given back at once when closeTimeout is over', async t => {
  const asked = deferred()
  const answered = deferred()
  const { host, app, runs } = await hosted(t, {
    ...memoryStore(),
    async begin () {
      asked.resolve()
      await answered.promise
      return { state: 'running' }
    }
  })
  const refused = t.rejects(Promise.resolve(host.process(JOB)), { code: 'FST_OPENAI_WEBHOOK_OVERLOADED' })
  await asked.promise
  const clock = stoppedClock(t)
  const closed = new AbortController()
  app.close().then(() => { closed.abort() })
  while (!closed.signal.aborted) {
    await turn()
    clock.advance(closeTimeout)
  }
  // From here on the clock stands still, so that no wait would end.
  answered.resolve()
  await refused
  t.equal(runs(), 0)
})

t.test('a job of an endpoint that this process does not have', async t => {
  const foreign = (endpoint: string): Job => ({ ...JOB, endpoint, webhookId: `wh_${endpoint}` })

  async function warned (options: OpenAIWebhookOptions, ...endpoints: string[]): Promise<unknown[]> {
    let host!: RunnerHost
    const log = capturedLog()
    const app = await build(t, { ...options, runner: { start (startedBy) { host = startedBy }, run () {} } }, { logger: log.logger })
    const ran: string[] = []
    app.openaiWebhook.on('batch.failed', (_event, { endpoint }) => { ran.push(endpoint) })
    await app.ready()
    for (const endpoint of endpoints) await host.process(foreign(endpoint))
    t.same(ran, [...new Set(endpoints)], 'runs the handlers of the app')
    return log.lines.filter(({ level }) => level === 40).map(({ msg, endpoint }) => [msg, endpoint])
  }

  const message = 'the queue has deliveries of an endpoint that this process does not have, and the handlers of the app run for them'
  t.same(await warned({}, '/webhooks/openai', '/orders', '/orders', '/chat'), [[message, '/orders'], [message, '/chat']], 'once for each')
  t.same(await warned({ path: false }, '/orders'), [], 'a worker has none')
  const many = Array.from({ length: 150 }, (_, n) => `/orders/${n}`)
  t.equal((await warned({}, ...many)).length, 100, 'bounded')
})

t.test('a job that is asked for twice runs once', async t => {
  t.test('by a queue, before the store has answered', async t => {
    const store = memoryStore()
    const asked = deferred()
    const { host, runs, finish } = await hosted(t, {
      ...store,
      async begin (key, lease) {
        await asked.promise
        return await store.begin(key, lease)
      }
    })
    finish()
    const both = Promise.all([host.process(JOB), host.process(JOB)])
    asked.resolve()
    await both
    t.equal(runs(), 1)
  })

  t.test('by a runner, while the sender waits', async t => {
    let host!: RunnerHost
    const runner: Runner = {
      start (startedBy) { host = startedBy },
      async run (job) { await Promise.all([host.process(job), host.process(job)]) }
    }
    const app = await build(t, { runner })
    let runs = 0
    app.openaiWebhook.on('batch.failed', async () => {
      runs++
      await turn()
    })
    t.equal((await post(app, sign(thin('batch.failed')))).statusCode, 200)
    t.equal(runs, 1)
  })
})

t.test('without idempotency a long handler needs no store, and what failed is not remembered', async t => {
  const app = await build(t, { idempotency: false, deadline: 2 ** 31 - 1 })
  const told: unknown[] = []
  app.openaiWebhook.onError(error => { told.push(error) })
  const running = deferred()
  const started = deferred()
  let runs = 0
  app.openaiWebhook.on('batch.failed', async () => {
    started.resolve()
    await running.promise
    if (++runs === 1) throw new Error('the first time')
  })
  let others = 0
  app.openaiWebhook.on('batch.failed', () => { others++ })
  await app.ready()
  const clock = stoppedClock(t)
  const delivery = sign(thin('batch.failed'))
  const first = post(app, delivery)
  await started.promise
  clock.advance(60_000)
  await turn()
  running.resolve()
  t.equal((await first).statusCode, 500)
  t.equal(told.length, 1, 'no lost claim was told')
  t.equal((await post(app, redelivered(delivery))).statusCode, 200)
  t.same([runs, others], [2, 2])
})

t.test('what a handler sends after its error, while an onError hook still looks at it, is not its answer', async t => {
  const app = await build(t)
  const looking = deferred()
  app.addHook('onError', async () => { await looking.promise })
  let code: unknown
  let runs = 0
  app.post('/own', { config: { openaiWebhook: {} } }, (_request, reply) => {
    if (++runs > 1) return 'again'
    reply.send(Object.assign(new Error('no room'), { statusCode: 507 }))
    try {
      reply.send('all is well')
    } catch (error) {
      code = (error as { code?: unknown }).code
    }
    looking.resolve()
    return reply
  })
  const delivery = sign(thin('batch.failed'))
  t.equal((await post(app, delivery, '/own')).statusCode, 507)
  t.equal(code, 'FST_ERR_SEND_INSIDE_ONERR')
  t.equal((await post(app, redelivered(delivery), '/own')).body, 'again')
})

t.test('the record of a runner that fails, although it must not, is told', async t => {
  for (const [name, record] of [['throws', () => { throw new Error('no record') }], ['rejects', async () => { throw new Error('no record') }]] as const) {
    t.test(`${name}, for a job out of its queue`, async t => {
      const told: unknown[] = []
      const { host, app, runs, finish } = await hosted(t, memoryStore(), told)
      finish()
      await host.process(JOB, 1, record)
      await host.process(JOB, 2)
      t.equal(runs(), 1)
      t.match(told, [{ message: 'no record' }])
      await drained(t, app)
    })

    t.test(`${name}, for one that its sender waits for`, async t => {
      let host!: RunnerHost
      const runner: Runner = {
        start (startedBy) { host = startedBy },
        run: async job => { await host.process(job, 1, record) }
      }
      const app = await build(t, { runner, closeTimeout })
      const told: unknown[] = []
      app.openaiWebhook.onError(error => { told.push(error) }).on('batch.failed', async () => { await turn() })
      const delivery = sign(thin('batch.failed'))
      const answers = await Promise.all([delivery, redelivered(delivery)].map(async each => await outcome(app, each)))
      t.same(answers, ['200 {"received":true}', '200 {"received":true}'])
      t.match(told, [{ message: 'no record' }])
      await drained(t, app)
    })
  }
})

t.test('a claim that is kept for a job', async t => {
  // The timer that renews claims keeps no process alive.
  const alive = setInterval(() => {}, 1_000)
  t.teardown(() => clearInterval(alive))

  /** A delivery that its runner has queued and keeps the claim on. */
  async function kept (t: Test, store: IdempotencyStore, lease = 600_000) {
    let host!: RunnerHost
    let queued!: Job
    let letGo!: () => unknown
    const runner: Runner = {
      start (startedBy) { host = startedBy },
      run (job) {
        queued = job
        letGo = host.keep!(job)
      },
      depth: () => 1
    }
    const app = await build(t, { runner, closeTimeout, idempotency: { store, lease } })
    let runs = 0
    const told: unknown[] = []
    const lost = deferred()
    app.openaiWebhook.on('batch.failed', () => { runs++ }).onError(error => {
      told.push(error)
      lost.resolve()
    })
    const delivery = sign(thin('batch.failed'))
    t.equal(await outcome(app, delivery), '200 {"received":true}')
    return { app, host, job: queued, key: `${queued.endpoint} ${queued.webhookId}`, delivery, letGo: () => letGo(), runs: () => runs, told, lost: lost.promise }
  }

  t.test('is the one that its handlers run with, and holds off others until then', async t => {
    const store = memoryStore()
    const { app, host, job, key, delivery, runs } = await kept(t, store)
    t.same(store.begin(key, 1), { state: 'running' })
    t.equal(await outcome(app, redelivered(delivery)), '200 {"received":true,"duplicate":true}')
    await host.process(job)
    t.equal(runs(), 1)
    t.same(store.begin(key, 1), { state: 'done' })
  })

  t.test('and was lost meanwhile is claimed anew: what another has processed does not run again', async t => {
    const store = memoryStore()
    const { host, job, key, runs, told, lost } = await kept(t, { ...store, extend: () => false }, 30)
    await lost
    t.match(told, [{ message: /^the claim on .* was lost/ }])
    let claim!: Claim
    await until('another to take it over', async () => (claim = await store.begin(key, 1_000)).state === 'claimed')
    store.complete(key, (claim as { token: string }).token, 1_000)
    await host.process(job)
    t.equal(runs(), 0)
  })

  t.test('is given back on demand', async t => {
    const store = memoryStore()
    const { key, letGo } = await kept(t, store)
    await letGo()
    t.match(store.begin(key, 1), { state: 'claimed' })
  })

  t.test('and never used is given back as the app closes', async t => {
    const store = memoryStore()
    const { app, key } = await kept(t, store)
    await drained(t, app)
    t.match(store.begin(key, 1), { state: 'claimed' })
  })
})

t.test('a runner that keeps a job for itself breaks the contract', async t => {
  const [processed] = runnerContract(() => ({ run () {} }))
  const clock = stoppedClock(t)
  const settled = new AbortController()
  const broken = t.rejects(processed!.run().finally(() => { settled.abort() }), { message: /^expected the job to be processed within 10000 ms$/ })
  while (!settled.signal.aborted) {
    await turn()
    clock.advance(6_000)
  }
  await broken
})

t.test('a runner that asks again for the handlers of a delivery that it is accepting', async t => {
  /** A queue that attempts a job before it has told that it has it. */
  async function retrying (t: Parameters<typeof build>[0], attempts: number, handler: (attempt: number) => unknown): Promise<[answer: string, runs: number]> {
    let host: RunnerHost
    let runs = 0
    const app = await build(t, {
      runner: {
        start (startedBy) { host = startedBy },
        async run (job: Job) {
          for (let attempt = 1; ; attempt++) {
            try {
              return await host.process(JSON.parse(JSON.stringify(job)) as Job)
            } catch (error) {
              if (attempt === attempts) throw error
            }
          }
        }
      }
    })
    app.openaiWebhook.on('batch.failed', () => handler(++runs) as void)
    return [await outcome(app), runs]
  }
  const fail = (): never => { throw new Error('disk full') }

  for (const [kind, wrap] of [['sync', (work: () => void) => work()], ['async', async (work: () => void) => work()]] as const) {
    t.test(`is not told of a success when a ${kind} handler fails`, async t => {
      t.same(await retrying(t, 3, () => wrap(fail)), ['500 HANDLER_FAILED', 3])
    })

    t.test(`has a ${kind} handler run again, until it succeeds`, async t => {
      t.same(await retrying(t, 3, attempt => wrap(() => { if (attempt < 3) fail() })), ['200 {"received":true}', 3])
    })
  }
})
