import fc from 'fast-check'
import t from 'tap'
import type { Test } from 'tap'
import { background, memoryStore } from '../../lib/index.ts'
import type { IdempotencyStore, Job, OpenAIWebhookOptions, Runner, RunnerHost } from '../../lib/index.ts'
import { officialEntries } from '../../lib/events/index.ts'
import { Claims } from '../../lib/pipeline/deduplicate.ts'
import type { Held } from '../../lib/pipeline/deduplicate.ts'
import { resourceKeyOf } from '../../lib/pipeline/resource-key.ts'
import { durable, sqliteStore } from '../../lib/sqlite/index.ts'
import { isPromise } from '../../lib/maybe-promise.ts'
import { build, outcome, post, sign, stoppedClock, thin } from '../support/deliveries.ts'
import { until } from '../support/faults.ts'
import { deferred, redelivered } from '../support/observe.ts'
import { openSqlite } from '../support/sqlite.mjs'

// `idempotency: { reconcile: true }`: two deliveries, each with a webhook-id of its own, tell of one resource.

const PROCESSED = '200 {"received":true}'
const DUPLICATE = '200 {"received":true,"duplicate":true}'
const IN_PROGRESS = '409 IN_PROGRESS'

const told = (id = 'batch_1', type = 'batch.completed'): ReturnType<typeof sign> => sign(thin(type, { id }))

async function receiver (t: Test, { reconcile = true, store = memoryStore(), ...options }: OpenAIWebhookOptions & { reconcile?: boolean, store?: IdempotencyStore } = {}) {
  const keys = new Set<string>()
  const spied: IdempotencyStore = { ...store, begin: (key, lease) => { keys.add(key); return store.begin(key, lease) } }
  const app = await build(t, { idempotency: { store: spied, reconcile }, ...options })
  return { app, keys, store }
}

t.test('the handlers run once for a resource, whichever delivery tells of it first', async t => {
  const { app, keys } = await receiver(t)
  let runs = 0
  app.openaiWebhook.on('batch.completed', () => { runs++ })
  const [first, second] = [told(), told()]
  t.equal(await outcome(app, first), PROCESSED)
  t.equal(await outcome(app, second), DUPLICATE)
  t.equal(await outcome(app, redelivered(first)), DUPLICATE)
  t.equal(await outcome(app, redelivered(second)), DUPLICATE)
  t.equal(runs, 1)
  t.same([...keys].filter(key => key.startsWith('resource')), ['resource batch.completed batch_1'])
  t.equal(await outcome(app, told('batch_2')), PROCESSED)
  t.equal(await outcome(app, told('batch_1', 'batch.expired')), PROCESSED, 'another event')
  t.equal(runs, 2)
})

t.test('without the option each delivery is its own, and the store is asked for nothing more', async t => {
  const { app, keys } = await receiver(t, { reconcile: false })
  let runs = 0
  app.openaiWebhook.on('batch.completed', () => { runs++ })
  for (const delivery of [told(), told()]) t.equal(await outcome(app, delivery), PROCESSED)
  t.equal(runs, 2)
  t.equal(keys.size, 2)
})

t.test('while the handlers run for one, the other is in progress, and then a duplicate', async t => {
  const { app } = await receiver(t)
  const [running, started] = [deferred(), deferred()]
  let runs = 0
  app.openaiWebhook.on('batch.completed', async () => {
    runs++
    started.resolve()
    await running.promise
  })
  const first = outcome(app, told())
  await started.promise
  const second = told()
  t.equal(await outcome(app, second), IN_PROGRESS)
  running.resolve()
  t.equal(await first, PROCESSED)
  t.equal(await outcome(app, redelivered(second)), DUPLICATE)
  t.equal(runs, 1)
})

t.test('what has succeeded for one does not run for the other', async t => {
  const { app } = await receiver(t)
  const runs = { first: 0, second: 0, third: 0 }
  app.openaiWebhook
    .on('batch.completed', () => { runs.first++ })
    .on('batch.completed', () => { if (++runs.second < 3) throw new Error('not yet') })
    .on('batch.completed', () => { runs.third++ })
  const [first, second] = [told(), told()]
  t.equal(await outcome(app, first), '500 HANDLER_FAILED')
  t.equal(await outcome(app, second), '500 HANDLER_FAILED')
  t.equal(await outcome(app, redelivered(first)), PROCESSED)
  t.equal(await outcome(app, redelivered(second)), DUPLICATE)
  t.same(runs, { first: 1, second: 3, third: 1 })
})

t.test('a store that fails for the resource leaves nothing claimed', async t => {
  const store = memoryStore()
  let fails = true
  const failing: IdempotencyStore = {
    ...store,
    begin: (key, lease) => {
      if (fails && key.startsWith('resource')) throw new Error('down')
      return store.begin(key, lease)
    }
  }
  const { app } = await receiver(t, { store: failing })
  let runs = 0
  app.openaiWebhook.on('batch.completed', () => { runs++ })
  const delivery = told()
  t.equal(await outcome(app, delivery), '503 UNAVAILABLE')
  fails = false
  t.equal(await outcome(app, redelivered(delivery)), PROCESSED)
  t.equal(runs, 1)
})

t.test('a crash before the delivery is on record does not run it again: the resource is first', async t => {
  const store = memoryStore()
  const { app } = await receiver(t, { store: { ...store, complete: (key, token, retention) => key.startsWith('resource') ? store.complete(key, token, retention) : undefined } })
  let runs = 0
  app.openaiWebhook.on('batch.completed', () => { runs++ })
  await app.ready()
  const clock = stoppedClock(t)
  const delivery = told()
  t.equal(await outcome(app, delivery), PROCESSED)
  clock.advance(31_000) // beyond the lease
  t.equal(await outcome(app, redelivered(delivery)), DUPLICATE)
  t.equal(runs, 1)
})

t.test('a route\'s own handler replies once for a resource', async t => {
  const { app } = await receiver(t)
  let runs = 0
  app.post('/own', { config: { openaiWebhook: {} } }, () => {
    runs++
    if (runs === 1) throw new Error('not yet')
    return { stored: true }
  })
  const first = told()
  t.equal((await post(app, first, '/own')).statusCode, 500)
  t.equal(await outcome(app, told(), '/own'), '200 {"stored":true}')
  t.equal(await outcome(app, redelivered(first), '/own'), DUPLICATE)
  t.equal(runs, 2)
})

t.test('endpoints have handlers of their own, and so have what is processed', async t => {
  const { app, keys } = await receiver(t)
  const runs: string[] = []
  app.openaiWebhook.on('batch.completed', (_event, { endpoint }) => { runs.push(endpoint) })
  app.openaiWebhook.route({ url: '/second' })
  for (const url of ['/webhooks/openai', '/second']) {
    t.equal(await outcome(app, told(), url), PROCESSED)
    t.equal(await outcome(app, told(), url), DUPLICATE)
  }
  t.same(runs, ['/webhooks/openai', '/second'])
  t.same([...keys].filter(key => key.startsWith('resource')), ['resource batch.completed batch_1', 'resource batch.completed batch_1 /second'])
})

t.test('the key of a resource: of events that it has once', async t => {
  const job = (event: object, more: object = {}): Job => ({ webhookId: 'wh_1', timestamp: 1, endpoint: '/webhooks/openai', event: event as Job['event'], ...more })
  const types = Object.keys(officialEntries).filter(type => resourceKeyOf(job(thin(type, { id: 'x' }))) !== undefined)
  t.same(types, [
    'agent.session.failed',
    'batch.cancelled', 'batch.completed', 'batch.expired', 'batch.failed',
    'eval.run.canceled', 'eval.run.failed', 'eval.run.succeeded',
    'fine_tuning.job.cancelled', 'fine_tuning.job.failed', 'fine_tuning.job.succeeded',
    'response.cancelled', 'response.completed', 'response.failed', 'response.incomplete',
    'video.completed', 'video.failed'
  ], 'a session may be idle again and again')
  t.equal(resourceKeyOf(job(thin('batch.failed', { id: 'x' }), { tenant: 'acme' })), 'resource batch.failed x /webhooks/openai acme')
  for (const data of [undefined, null, {}, { id: 7 }, { id: '' }, { id: 'two words' }, { id: 'x'.repeat(257) }]) {
    t.equal(resourceKeyOf(job({ type: 'batch.failed', data })), undefined)
  }
  t.equal(resourceKeyOf(job(thin('batch.unheard_of'))), undefined)
  t.equal(resourceKeyOf(job(thin('toString'))), undefined)

  const { app } = await receiver(t)
  let runs = 0
  app.openaiWebhook.on('agent.session.idle', () => { runs++ })
  for (let n = 0; n < 2; n++) t.equal(await outcome(app, sign(thin('agent.session.idle', { id: 'sess_1', environment_type: 'none' }))), PROCESSED)
  t.equal(runs, 2)
})

t.test('where the store answers at once no promise is made', async t => {
  const options = { store: memoryStore(), lease: 1_000, retention: 1_000, onTrouble () {} }
  const claims = new Claims({ ...options, reconcile: true })
  const job: Job = { webhookId: 'wh_1', timestamp: 1, endpoint: '/webhooks/openai', event: thin('batch.failed') }
  const claim = claims.begin('key', job) as Held
  t.match(claim, { state: 'claimed', key: 'key', resource: { state: 'claimed', key: 'resource batch.failed res_1' } })
  t.notOk(isPromise(claims.checkpoint(claim, 'a')))
  t.notOk(isPromise(claims.complete(claim)))
  t.same(claims.begin('other', job), { state: 'done' })
})

t.test('queued: the resource is claimed when a delivery arrives, and again while its handlers run', async t => {
  for (const name of ['background', 'durable'] as const) {
    t.test(name, async t => {
      const db = openSqlite(':memory:')
      const runner = name === 'durable' ? durable(db) : background()
      const { app } = await receiver(t, { runner, ...(name === 'durable' && { store: sqliteStore(db) }) })
      const [running, started] = [deferred(), deferred()]
      let runs = 0
      app.openaiWebhook.on('batch.completed', async () => {
        runs++
        started.resolve()
        await running.promise
      })
      const first = told()
      t.equal(await outcome(app, first), PROCESSED)
      await started.promise
      const second = told()
      t.equal(await outcome(app, second), IN_PROGRESS)
      running.resolve()
      await until('the first to be on record', async () => await outcome(app, redelivered(second)) === DUPLICATE)
      t.equal(await outcome(app, told()), DUPLICATE)
      t.equal(runs, 1)
    })
  }
})

t.test('two that were queued before either was processed: the second is left', async t => {
  let host!: RunnerHost
  const jobs: Job[] = []
  const runner: Runner = { start (by) { host = by }, run (job) { jobs.push(structuredClone(job)) }, depth: () => jobs.length }
  const { app } = await receiver(t, { runner })
  let runs = 0
  app.openaiWebhook.on('batch.completed', () => { runs++ })
  t.equal(await outcome(app, told()), PROCESSED)
  t.equal(await outcome(app, told()), PROCESSED)
  await Promise.all(jobs.map(async job => await host.process(job)))
  t.equal(runs, 1)
  for (const job of jobs) await host.process(job)
  t.equal(runs, 1)
  t.match(await host.recorded!(jobs[1]!), { done: true })
})

t.test('a kept claim that has lost its half is claimed anew', async t => {
  const store = memoryStore()
  let lost = false
  let host!: RunnerHost
  const runner: Runner = { start (by) { host = by }, run (job) { host.keep!(job) }, depth: () => 0 }
  const { app } = await receiver(t, { runner, store: { ...store, extend: (key, token, lease) => (lost && key.startsWith('resource') ? false : store.extend(key, token, lease)) } })
  const errors: string[] = []
  let runs = 0
  app.openaiWebhook
    .on('batch.completed', () => { runs++ })
    .onError(error => { errors.push(error.message) })
  await app.ready()
  const clock = stoppedClock(t)
  lost = true
  t.equal(await outcome(app, sign(thin('batch.completed', { id: 'batch_1' }), { webhookId: 'wh_1' })), PROCESSED)
  clock.advance(20_000) // within the lease, and beyond two renewals
  await until('the loss to be told', () => errors.length > 0)
  t.match(errors, [/the claim on resource batch.completed batch_1 was lost/])
  lost = false
  clock.advance(11_000) // the lost half's lease
  await host.process({ webhookId: 'wh_1', timestamp: 1, endpoint: '/webhooks/openai', event: thin('batch.completed', { id: 'batch_1' }) })
  t.equal(runs, 1)
  t.equal(await outcome(app, told()), DUPLICATE)
})

t.test('no claim that is held runs out, whatever comes while the store is asked', async t => {
  const LEASE = 900
  const clock = stoppedClock(t)
  type Step = ['begin'] | ['answer', number] | ['end', number] | ['wait', number]
  const step = fc.oneof(
    fc.constant<Step>(['begin']),
    fc.nat().map((nth): Step => ['answer', nth]),
    fc.nat().map((nth): Step => ['end', nth]),
    { weight: 6, arbitrary: fc.integer({ min: LEASE / 6, max: LEASE / 3 }).map((ms): Step => ['wait', ms]) }
  )
  const take = <Item>(items: Item[], nth: number): Item | undefined => items.splice(nth % items.length, 1)[0]

  await fc.assert(fc.asyncProperty(fc.array(step, { maxLength: 30, size: 'max' }), async steps => {
    const leases = new Map<string, number>()
    const asked: Array<() => void> = []
    const held: Held[] = []
    let keys = 0
    const claims = new Claims({
      store: {
        ...memoryStore(),
        begin: async key => await new Promise(resolve => {
          asked.push(() => {
            leases.set(key, Date.now() + LEASE)
            resolve({ state: 'claimed', token: key, finished: [] })
          })
        }),
        extend: key => leases.has(key) && leases.set(key, Date.now() + LEASE) !== undefined,
        complete: key => { leases.delete(key) }
      },
      lease: LEASE,
      retention: 1_000,
      onTrouble (error) { throw error }
    })
    for (const [act, nth] of steps) {
      if (act === 'begin') (claims.begin(`key-${++keys}`, {} as Job) as Promise<Held>).then(claim => { held.push(claim) }, t.error)
      else if (act === 'answer') take(asked, nth)?.()
      else if (act === 'wait') clock.advance(nth)
      else {
        const claim = take(held, nth)
        if (claim !== undefined) claims.complete(claim)
      }
      for (let turn = 0; turn < 10; turn++) await null
      for (const [key, ends] of leases) if (ends <= Date.now()) throw new Error(`the lease of ${key} has run out`)
    }
    for (const answer of asked) answer()
    for (let turn = 0; turn < 10; turn++) await null
    for (const claim of held) claims.complete(claim)
    clock.advance(LEASE)
  }), { numRuns: 300 })
})
