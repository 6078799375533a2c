import assert from 'node:assert/strict'
import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'
import { assertRules, isFunction, show, wholeNumber } from '../checks.ts'
import { InvalidOptions } from '../errors.ts'
import type { EventContext } from '../handlers.ts'
import type { Inbox, InboxQuery } from '../inbox/inbox.ts'
import { handlersFailed } from '../runners/handler-failures.ts'
import { keyOf } from '../runners/runner.ts'
import type { DeadDelivery, Job, Runner, RunnerHost } from '../runners/runner.ts'
import { then } from '../maybe-promise.ts'
import type { MaybePromise } from '../maybe-promise.ts'
import type { Claim, IdempotencyStore } from '../stores/store.ts'
import { within } from '../within.ts'

/** One case of a contract, for any test framework. `run` rejects when the contract is broken. */
export interface ContractCase {
  readonly name: string
  readonly run: () => Promise<void>
}

/** ms. Far longer than a case takes, so that nothing expires during it. */
const LONG = 600_000
/** ms. Short enough for a case to wait until it has passed. */
const SHORT = 40
/** ms for which a case watches that nothing changes. */
const PAUSE = 300
/** ms. Long enough for a slow machine to get through a pause, and over before the pause is if a store takes it for a smaller unit. */
const TERM = 5_000
/** ms to wait for a condition before the case fails. */
const PATIENCE = 10_000

/**
 * The contract of an `IdempotencyStore`: cases that every store has to pass.
 *
 * @param create returns a store, and is called once for each case. It may always return the same store, because each case uses keys of its
 * own
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS
 */
export function storeContract (create: () => MaybePromise<IdempotencyStore>): ContractCase[] {
  assertCreate('storeContract', create)
  let cases = 0

  const contract = (name: string, check: (store: IdempotencyStore, key: string) => Promise<void>): ContractCase => ({
    name,
    run: async () => await check(await create(), `/webhooks/openai wh_${process.pid}_${Date.now()}_${++cases}`)
  })

  async function claim (store: IdempotencyStore, key: string, lease = LONG): Promise<Extract<Claim, { state: 'claimed' }>> {
    const claim = await store.begin(key, lease)
    assert.ok(claim.state === 'claimed', `expected the claim on ${key}, got ${claim.state}`)
    assert.equal(typeof claim.token, 'string')
    return claim
  }

  async function claimOnceFree (store: IdempotencyStore, key: string): Promise<Extract<Claim, { state: 'claimed' }>> {
    let claim: Claim | undefined
    await until('the key to be free', async () => {
      claim = await store.begin(key, LONG)
      return claim.state === 'claimed'
    })
    return claim as Extract<Claim, { state: 'claimed' }>
  }

  return [
    contract('a new key is claimed, with nothing finished', async (store, key) => {
      assert.deepEqual((await claim(store, key)).finished, [])
    }),
    contract('a claimed key is running for everybody else', async (store, key) => {
      await claim(store, key)
      assert.deepEqual(await store.begin(key, LONG), { state: 'running' })
    }),
    contract('of many that begin at once, one is given the claim', async (store, key) => {
      const claims = await Promise.all(Array.from({ length: 50 }, async () => await store.begin(key, LONG)))
      assert.equal(claims.filter(({ state }) => state === 'claimed').length, 1)
      assert.equal(claims.filter(({ state }) => state === 'running').length, 49)
    }),
    contract('a completed key is done', async (store, key) => {
      const { token } = await claim(store, key)
      assert.notEqual(await store.complete(key, token, LONG), false, 'the claim was held')
      assert.deepEqual(await store.begin(key, LONG), { state: 'done' })
    }),
    contract('a completed key is claimed anew once its retention is over', async (store, key) => {
      const { token } = await claim(store, key)
      await store.checkpoint(key, token, 'a')
      await store.complete(key, token, SHORT)
      assert.deepEqual((await claimOnceFree(store, key)).finished, [])
    }),
    contract('a released key is claimed at once, with what finished', async (store, key) => {
      const first = await claim(store, key)
      await store.checkpoint(key, first.token, 'a')
      await store.checkpoint(key, first.token, 'b')
      await store.release(key, first.token)
      const second = await claim(store, key)
      assert.deepEqual([...second.finished].sort(), ['a', 'b'])
      assert.notEqual(second.token, first.token)
      await store.checkpoint(key, second.token, 'c')
      await store.release(key, second.token)
      assert.deepEqual([...(await claim(store, key)).finished].sort(), ['a', 'b', 'c'])
    }),
    contract('a lease that ran out is taken over, with what finished', async (store, key) => {
      const first = await claim(store, key, SHORT)
      await store.checkpoint(key, first.token, 'a')
      const second = await claimOnceFree(store, key)
      assert.deepEqual(second.finished, ['a'])
      assert.notEqual(second.token, first.token)
    }),
    contract('a holder that lost its claim can change nothing', async (store, key) => {
      const late = await claim(store, key, SHORT)
      const holder = await claimOnceFree(store, key)
      assert.equal(await store.extend(key, late.token, LONG), false)
      await store.checkpoint(key, late.token, 'late')
      await store.release(key, late.token)
      assert.deepEqual(await store.begin(key, LONG), { state: 'running' })
      assert.notEqual(await store.complete(key, late.token, LONG), true, 'the claim was not held')
      assert.deepEqual(await store.begin(key, LONG), { state: 'running' })
      await store.release(key, holder.token)
      assert.deepEqual((await claim(store, key)).finished, [])
    }),
    contract('an extended claim holds for its new lease', async (store, key) => {
      const { token } = await claim(store, key, SHORT)
      assert.equal(await store.extend(key, token, LONG), true)
      await sleep(2 * SHORT)
      assert.deepEqual(await store.begin(key, LONG), { state: 'running' })
    }),
    contract('a lease, an extended lease and a retention last as long as they were asked to', async (store, key) => {
      const [leased, extended, completed] = [`${key}/leased`, `${key}/extended`, `${key}/completed`]
      await claim(store, leased, TERM)
      assert.equal(await store.extend(extended, (await claim(store, extended)).token, TERM), true)
      await store.complete(completed, (await claim(store, completed)).token, TERM)
      await sleep(PAUSE)
      for (const [each, state] of [[leased, 'running'], [extended, 'running'], [completed, 'done']] as const) {
        assert.equal((await store.begin(each, LONG)).state, state, `expected ${each} to be ${state} for ${TERM} ms, and it was not after ${PAUSE} ms`)
      }
    }),
    contract('what finished is kept while nobody has the claim', async (store, key) => {
      const [released, expired] = [`${key}/released`, `${key}/expired`]
      for (const [each, lease] of [[released, LONG], [expired, SHORT]] as const) {
        const { token } = await claim(store, each, lease)
        await store.checkpoint(each, token, 'a')
        if (each === released) await store.release(each, token)
      }
      await sleep(PAUSE)
      for (const each of [released, expired]) assert.deepEqual((await claimOnceFree(store, each)).finished, ['a'])
    }),
    contract('a settled claim cannot be extended', async (store, key) => {
      const first = await claim(store, key)
      await store.release(key, first.token)
      assert.equal(await store.extend(key, first.token, LONG), false)
      const second = await claim(store, key)
      await store.complete(key, second.token, LONG)
      assert.equal(await store.extend(key, second.token, LONG), false)
      assert.deepEqual(await store.begin(key, LONG), { state: 'done' })
    }),
    contract('keys do not disturb each other', async (store, key) => {
      const other = `${key}/other`
      const first = await claim(store, key)
      const second = await claim(store, other)
      await store.checkpoint(key, first.token, 'a')
      await store.complete(key, first.token, LONG)
      await store.release(other, second.token)
      assert.deepEqual((await claim(store, other)).finished, [])
    }),
    contract('keys and handler names of any form are kept as they are', async (store, key) => {
      const odd = `${key} '"\\{}:%é*?[]${'x'.repeat(2_000)}`
      const names = ['#0', 'bill\'s "ledger"', 'f:é\\u0000', 'token', 'done']
      const { token } = await claim(store, odd)
      for (const name of names) await store.checkpoint(odd, token, name)
      await store.release(odd, token)
      assert.deepEqual([...(await claim(store, odd)).finished].sort(), [...names].sort())
    })
  ]
}

/**
 * The contract of a `Runner`: cases that every runner has to pass, whenever it acknowledges a delivery.
 *
 * @param create returns a runner that has not been started and has nothing queued. It is called once for each case, which closes the runner
 * @param options.attempts how often the runner starts a failing job before it keeps the job as dead. Choose a small number and short waits
 * between attempts. When it is given, cases about dead deliveries are added
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS
 */
export function runnerContract (create: () => MaybePromise<Runner>, options: { attempts?: number } = {}): ContractCase[] {
  assertCreate('runnerContract', create)
  assertRules('runnerContract', options, { attempts: wholeNumber('attempts', 1) })
  const { attempts: most } = options
  let jobs = 0

  const job = (type = 'batch.failed'): Job => ({
    webhookId: `wh_${process.pid}_${Date.now()}_${++jobs}`,
    timestamp: 1_750_861_210,
    endpoint: '/webhooks/openai',
    event: { type, data: { id: 'batch_é' } } as Job['event']
  })

  /** A job with all that a job can have before its first attempt. */
  const fullJob = (): Job => ({ ...job(), tenant: 'acme', carrier: { traceparent: '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01' }, routeHandlers: true })

  const contract = (name: string, check: (runner: Runner, host: TestHost) => Promise<void>): ContractCase => ({
    name,
    run: async () => {
      const runner = await create()
      const host = new TestHost()
      await runner.start?.(host)
      try {
        await check(runner, host)
      } finally {
        await inTime('close() to settle', runner.close?.())
      }
    }
  })

  const dying = (name: string, check: (runner: KeepingRunner, host: TestHost) => Promise<void>): ContractCase => contract(name, async (runner, host) => {
    assert.ok(keepsTheDead(runner), 'expected dead(), deadCount() and requeue()')
    host.work = failing()
    await check(runner, host)
  })

  const cases = [
    contract('an accepted job is processed, as it was given', async (runner, host) => {
      const given = fullJob()
      await runner.run(given)
      await until('the job to be processed', () => host.processed.length > 0)
      assert.deepEqual(host.processed, [given])
    }),
    contract('every accepted job is processed once while nothing fails', async (runner, host) => {
      const given = Array.from({ length: 100 }, job)
      await Promise.all(given.map(async each => await runner.run(each)))
      await until('100 jobs to be processed', () => host.processed.length >= 100)
      assert.deepEqual(host.processed.map(({ webhookId }) => webhookId).sort(), given.map(({ webhookId }) => webhookId).sort())
    }),
    contract('a job that fails is told: to the sender or to the host', async (runner, host) => {
      host.work = async () => { throw new Error('the handler failed') }
      const rejected = await Promise.resolve(runner.run(job())).then(() => false, () => true)
      if (!rejected) await until('the failure to be told', () => host.reported.length + host.died.length > 0)
    }),
    contract('a job that is queued already is not queued again where the runner says so', async (runner, host) => {
      const given = job()
      const answers = [await runner.run(given), await runner.run(given)]
      assert.ok(answers.every(answer => answer === undefined || answer === 'duplicate'), `expected run() to resolve to nothing or 'duplicate', got ${String(answers)}`)
      assert.notEqual(answers[0], 'duplicate', 'the first was not queued before')
      await until('the job to be processed', () => host.processed.length > 0)
      if (answers[1] === 'duplicate') assert.deepEqual(host.processed, [given])
    }),
    contract('the same webhook-id at another endpoint, or of another tenant, is another job', async (runner, host) => {
      const first = job()
      const given = [first, { ...first, endpoint: '/other' }, { ...first, tenant: 'acme' }, { ...first, tenant: 'beta' }]
      const answers = await Promise.all(given.map(async each => await runner.run(each)))
      assert.ok(!answers.includes('duplicate'), "expected run() not to resolve to 'duplicate' for another endpoint or tenant")
      await until('each of the jobs to be processed', () => host.processed.length >= given.length)
      assert.deepEqual(host.processed.map(keyOf).sort(), given.map(keyOf).sort())
    }),
    contract('a job that fails does not keep others from being processed', async (runner, host) => {
      const [bad, good] = [job(), job()]
      host.work = async ({ webhookId }) => { if (webhookId === bad.webhookId) throw new Error('the handler failed') }
      await Promise.resolve(runner.run(bad)).catch(() => {})
      await runner.run(good)
      await until('the other job to be processed', () => host.processed.some(({ webhookId }) => webhookId === good.webhookId))
    }),
    contract('close() waits for what is being processed', async (runner, host) => {
      let finish!: () => void
      const finished = new Promise<void>(resolve => { finish = resolve })
      host.work = async () => await finished
      const accepted = Promise.resolve(runner.run(job()))
      await until('the job to be started', () => host.started > 0)
      const settled = inTime('run() and close() to settle once the job is processed', Promise.all([accepted, runner.close?.()]))
      const early = await Promise.race([settled.then(() => true, () => true), sleep(PAUSE, false)])
      finish()
      await settled
      assert.equal(early, false, 'expected close() to wait for a job that run() does not wait for')
      assert.deepEqual([host.started, host.processed.length], [1, 1])
    }),
    contract('after close() nothing is accepted that is not processed', async (runner, host) => {
      await runner.close?.()
      const given = job()
      const accepted = await Promise.resolve().then(async () => await runner.run(given)).then(() => true, () => false)
      assert.equal(host.processed.length, accepted ? 1 : 0)
    })
  ]
  if (most === undefined) return cases
  return cases.concat([
    dying('a job that is given up is told once, and kept with what had failed and what had finished', async (runner, host) => {
      const given = fullJob()
      await runner.run(given)
      await until('the job to be told as dead', () => host.died.length > 0)
      await until('the job to be kept', async () => await runner.deadCount() === 1)
      const [dead] = await runner.dead()
      assert.deepEqual(host.died.map(({ webhookId }) => webhookId), [given.webhookId])
      const { attempts, errors, finished, diedAt, ...rest } = dead!
      assert.deepEqual(rest, given)
      assert.deepEqual([attempts, host.started], [most, most])
      assert.deepEqual(errors.map(({ handler, message }) => ({ handler, message })), [{ handler: 'bill', message: 'no such customer' }])
      assert.match(errors[0]!.stack, /^Error: no such customer\n +at /)
      assert.deepEqual(finished, ['import'])
      assert.ok(Math.abs(Date.now() - diedAt) < LONG)
    }),
    dying('dead jobs are listed from the oldest on, up to a limit, of all types or of one', async (runner, host) => {
      const given = [job('batch.failed'), job('batch.completed'), job('batch.failed')]
      for (const [i, each] of given.entries()) {
        await runner.run(each)
        await until('the job to be kept', async () => await runner.deadCount() === i + 1)
        await sleep(2) // the jobs need distinct times of death, since they are listed in that order
      }
      const ids = given.map(({ webhookId }) => webhookId)
      const listed = async (limit?: number, type?: string): Promise<string[]> => (await runner.dead(limit, type)).map(({ webhookId }) => webhookId)
      assert.deepEqual(await listed(), ids)
      assert.deepEqual(await listed(2), ids.slice(0, 2))
      assert.deepEqual(await listed(100, 'batch.failed'), [ids[0], ids[2]])
      assert.deepEqual(await listed(1, 'batch.completed'), [ids[1]])
      assert.deepEqual(await listed(100, 'batch.expired'), [])
    }),
    dying('a dead job that is requeued is processed with what had finished, and is dead no longer', async (runner, host) => {
      const given = fullJob()
      await runner.run(given)
      await until('the job to be kept', async () => await runner.deadCount() === 1)
      host.work = async () => {}
      const { endpoint, tenant, webhookId } = given as Required<Job>
      assert.equal(await runner.requeue({ endpoint, tenant, webhookId }, { force: false }), true)
      await until('the job to be processed', () => host.processed.length > 0)
      assert.deepEqual(host.processed, [{ ...given, finished: ['import'] }])
      assert.equal(await runner.deadCount(), 0)
      assert.equal(await runner.requeue({ endpoint, tenant, webhookId }), false, 'it is not dead any more')
      assert.equal(await runner.requeue({ endpoint, webhookId: 'wh_unknown' }), false)
    }),
    dying('a dead job that an inbox may have forgotten is requeued by force alone', async (runner, host) => {
      const given = job()
      const { endpoint, webhookId } = given
      const remembered = { bill: Date.now() + LONG, import: 1 }
      host.work = failing(remembered)
      await runner.run(given)
      await until('the job to be kept', async () => await runner.deadCount() === 1)
      assert.deepEqual((await runner.dead())[0]!.remembered, remembered)
      host.work = failing({ ...remembered, bill: 1 })
      assert.equal(await runner.requeue({ endpoint, webhookId }), true, 'the inbox remembers what has not finished')
      await until('the job to be told as dead again', () => host.died.length === 2)
      await until('the job to be kept', async () => await runner.deadCount() === 1)
      await assert.rejects(async () => await runner.requeue({ endpoint, webhookId }, { force: false }), { code: 'FST_OPENAI_WEBHOOK_NEEDS_FORCE' })
      assert.equal(await runner.deadCount(), 1)
      host.work = async () => {}
      assert.equal(await runner.requeue({ endpoint, webhookId }, { force: true }), true)
      await until('the job to be processed', () => host.processed.length > 0)
      assert.equal(await runner.requeue({ endpoint, webhookId }), false, 'it is not dead any more')
    }),
    dying('a dead job that is delivered again stays dead', async (runner, host) => {
      const given = job()
      await runner.run(given)
      await until('the job to be kept', async () => await runner.deadCount() === 1)
      assert.equal(await runner.run(given), 'duplicate')
      assert.equal(await runner.deadCount(), 1)
    })
  ])
}

type KeepingRunner = Runner & Required<Pick<Runner, 'dead' | 'deadCount' | 'requeue'>>

function keepsTheDead (runner: Runner): runner is KeepingRunner {
  return [runner.dead, runner.deadCount, runner.requeue].every(method => typeof method === 'function')
}

/** One handler has succeeded and another one fails, reported as the plugin reports it. */
function failing (remembered?: Job['remembered']): TestHost['work'] {
  return async () => { throw handlersFailed([{ handler: 'bill', error: new Error('no such customer') }], 2, ['import'], remembered) }
}

/** An inbox, and the table of the test that its transactions write to. */
export interface InboxUnderTest<Tx> {
  readonly inbox: Inbox<Tx>
  /** Adds a row in the transaction that `once()` gives. Synchronous when the inbox is synchronous. */
  write (tx: Tx, row: string): MaybePromise<void>
  /** The committed rows. */
  rows (): MaybePromise<string[]>
  /** Runs `work` in a transaction of the test's own, which is rolled back when `work` fails. `add` adds a row in that transaction. */
  transaction (work: (query: InboxQuery, add: (row: string) => MaybePromise<void>) => MaybePromise<void>): MaybePromise<void>
  /** A query on a connection without a transaction, which `first()` has to refuse. */
  readonly outside: InboxQuery
}

/**
 * The contract of an `Inbox`: cases that every inbox has to pass. They use no store and no runner.
 *
 * @param create returns an inbox, and is called once for each case. It may always return the same inbox, because each case uses deliveries
 * and rows of its own
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS
 */
export function inboxContract<Tx> (create: () => MaybePromise<InboxUnderTest<Tx>>): ContractCase[] {
  assertCreate('inboxContract', create)
  let cases = 0
  const app = {} as FastifyInstance

  const contract = (name: string, check: (under: InboxUnderTest<Tx>, context: EventContext, id: string) => Promise<void>): ContractCase => ({
    name,
    run: async () => {
      const id = `wh_${process.pid}_${Date.now()}_${++cases}`
      const context = { webhookId: id, timestamp: 1, endpoint: '/webhooks/openai', signal: new AbortController().signal } as EventContext
      await check(await create(), context, id)
    }
  })

  async function times ({ rows }: InboxUnderTest<Tx>, row: string): Promise<number> {
    return (await rows()).filter(each => each === row).length
  }

  const failure = new Error('the effect failed')
  const fail = (): never => { throw failure }

  return [
    contract('the effect is made once, however often the handler is run', async (under, context, id) => {
      const seen: unknown[] = []
      const handler = under.inbox.once<string>('settle', function (tx, event, given) {
        seen.push(this, event, given)
        return under.write(tx, id)
      })
      await handler.call(app, 'the event', context)
      await handler.call(app, 'the event', context)
      assert.deepEqual(seen, [app, 'the event', context])
      assert.equal(await times(under, id), 1)
    }),
    contract('of many that run it at once, one makes the effect', async (under, context, id) => {
      const handler = under.inbox.once('settle', tx => under.write(tx, id))
      await Promise.all(Array.from({ length: 20 }, async () => { await handler.call(app, {}, context) }))
      assert.equal(await times(under, id), 1)
    }),
    contract('an effect that fails is undone, and made by the next attempt', async (under, context, id) => {
      let fails = true
      const handler = under.inbox.once('settle', tx => then(under.write(tx, id), () => { if (fails) throw failure }))
      await assert.rejects(async () => await handler.call(app, {}, context), failure)
      assert.equal(await times(under, id), 0)
      fails = false
      await handler.call(app, {}, context)
      assert.equal(await times(under, id), 1)
    }),
    contract('another delivery, endpoint, tenant or handler is another effect', async (under, context, id) => {
      const contexts = [context, { ...context, webhookId: `${id}_2` }, { ...context, endpoint: '/other' }, { ...context, tenant: 'é "acme"' }, { ...context, tenant: 'beta' }]
      for (const name of ['settle', 'bill\'s "ledger"']) {
        const handler = under.inbox.once(name, tx => under.write(tx, id))
        for (const each of [...contexts, ...contexts]) await handler.call(app, {}, each)
      }
      assert.equal(await times(under, id), 10)
    }),
    contract('tx cannot be used once the work is over', async (under, context, id) => {
      let kept!: Tx
      await under.inbox.once('settle', tx => { kept = tx }).call(app, {}, context)
      await assert.rejects(async () => await under.write(kept, id), { code: 'FST_OPENAI_WEBHOOK_TRANSACTION_OVER' })
      assert.equal(await times(under, id), 0)
    }),
    contract('first() is true once, in a transaction that commits', async (under, context, id) => {
      const answers: boolean[] = []
      const attempt = async (end: () => void): Promise<void> => await under.transaction((query, add) => then(under.inbox.first(query, 'settle', context), isFirst => {
        answers.push(isFirst)
        return then(isFirst ? add(id) : undefined, end)
      }))
      await assert.rejects(attempt(fail), failure)
      await attempt(() => {})
      await attempt(() => {})
      assert.deepEqual(answers, [true, true, false])
      assert.equal(await times(under, id), 1)
    }),
    contract('first() and once() know of each other', async (under, context, id) => {
      await under.inbox.once('settle', tx => under.write(tx, id)).call(app, {}, context)
      await under.transaction(query => then(under.inbox.first(query, 'settle', context), isFirst => { assert.equal(isFirst, false) }))
    }),
    contract('first() is refused outside a transaction, and records nothing', async (under, context, id) => {
      await assert.rejects(async () => await under.inbox.first(under.outside, 'settle', context), { code: 'FST_OPENAI_WEBHOOK_NO_TRANSACTION' })
      await under.inbox.once('settle', tx => under.write(tx, id)).call(app, {}, context)
      assert.equal(await times(under, id), 1)
    }),
    contract('what names no handler or no delivery is refused', async (under, context) => {
      const code = 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS'
      for (const name of ['', 'x'.repeat(129), 1]) {
        assert.throws(() => under.inbox.once(name as string, () => {}), { code })
        await assert.rejects(async () => await under.transaction(query => then(under.inbox.first(query, name as string, context), () => {})), { code })
      }
      assert.throws(() => under.inbox.once('settle', undefined as never), { code })
      const { endpoint, ...unnamed } = context
      await assert.rejects(async () => await under.transaction(query => then(under.inbox.first(query, 'settle', unnamed as never), () => {})), { code })
    })
  ]
}

class TestHost implements RunnerHost {
  readonly processed: Job[] = []
  readonly reported: unknown[] = []
  readonly died: DeadDelivery[] = []
  started = 0
  work: (job: Job) => Promise<void> = async () => {}

  async process (job: Job): Promise<void> {
    this.started++
    await this.work(job)
    this.processed.push(job)
  }

  report (error: unknown): void {
    this.reported.push(error)
  }

  dead (delivery: DeadDelivery): void {
    this.died.push(delivery)
  }
}

function assertCreate (caller: string, create: unknown): void {
  if (!isFunction(create)) throw new InvalidOptions(`${caller}: expected create to be a function, got ${show(create)}`)
}

async function inTime<T> (what: string, settled: MaybePromise<T>): Promise<T> {
  return await within(Promise.resolve(settled), PATIENCE, () => assert.fail(`expected ${what} within ${PATIENCE} ms`))
}

async function until (what: string, holds: () => MaybePromise<boolean>): Promise<void> {
  const end = performance.now() + PATIENCE
  while (!await holds()) {
    if (performance.now() > end) assert.fail(`expected ${what} within ${PATIENCE} ms`)
    await sleep(5)
  }
}
