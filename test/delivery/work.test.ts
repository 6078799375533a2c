import assert from 'node:assert/strict'
import fc from 'fast-check'
import type { FastifyBaseLogger } from 'fastify'
import t from 'tap'
import { Handling } from '../../lib/delivery/handling.ts'
import { Host } from '../../lib/delivery/host.ts'
import { Receiver } from '../../lib/delivery/receive.ts'
import { Answer } from '../../lib/delivery/answer.ts'
import type { AnswerState } from '../../lib/delivery/answer.ts'
import { Work, Works } from '../../lib/delivery/work.ts'
import type { Sender, State, Verdict } from '../../lib/delivery/work.ts'
import type { Failures } from '../../lib/failures.ts'
import { Claims } from '../../lib/pipeline/deduplicate.ts'
import { Observation } from '../../lib/observation.ts'
import { Registry } from '../../lib/registry.ts'
import type { Job, Runner } from '../../lib/runners/runner.ts'
import { memoryStore } from '../../lib/stores/memory.ts'
import type { IdempotencyStore } from '../../lib/stores/store.ts'
import { sized } from '../support/size.ts'

const ENDPOINT = '/webhooks/openai'
const TYPE = 'batch.failed'
const silent = { isLevelEnabled: () => false } as unknown as FastifyBaseLogger
const claim = { state: 'claimed', key: 'k', job: { webhookId: 'wh_1', timestamp: 1, endpoint: ENDPOINT, event: { type: TYPE } }, token: 't', finished: [], resource: undefined } as const

const STATES: Record<State['at'], State> = {
  claiming: { at: 'claiming' },
  claimed: { at: 'claimed', claim },
  handling: { at: 'handling' },
  over: { at: 'over', succeeded: true }
}

t.test('a delivery changes its state in these ways and no other', async t => {
  const legal = { claiming: ['claimed', 'over'], claimed: ['handling', 'over'], handling: ['over'], over: [] } as const
  const ways = { claiming: [], claimed: ['claimed'], handling: ['claimed', 'handling'], over: ['over'] } as const
  for (const from of Object.keys(STATES) as Array<State['at']>) {
    for (const to of Object.keys(STATES) as Array<State['at']>) {
      const work = new Work('key', {} as Job, undefined)
      for (const step of ways[from]) work.move(STATES[step])
      if ((legal[from] as readonly string[]).includes(to)) {
        work.move(STATES[to])
        t.equal(work.state.at, to)
      } else {
        t.throws(() => { work.move(STATES[to]) }, { message: `a delivery that is ${from} cannot be ${to}` })
        t.equal(work.state.at, from)
      }
    }
  }
})

t.test('an answer changes its state in these ways and no other', async t => {
  const states: Record<AnswerState['at'], AnswerState> = {
    open: { at: 'open' },
    replying: { at: 'replying', succeeds: () => true, isOverdue: false },
    'cut off': { at: 'cut off', succeeds: true },
    late: { at: 'late', statusCode: 200 },
    recorded: { at: 'recorded', isLate: false },
    closed: { at: 'closed' }
  }
  const legal: Record<AnswerState['at'], ReadonlyArray<AnswerState['at']>> = {
    open: ['replying', 'cut off', 'late', 'recorded', 'closed'],
    replying: ['replying', 'open', 'cut off', 'recorded'],
    'cut off': ['cut off', 'recorded'],
    late: ['late', 'recorded', 'closed'],
    recorded: ['recorded'],
    closed: []
  }
  const ways: Record<AnswerState['at'], ReadonlyArray<AnswerState['at']>> = {
    open: [], replying: ['replying'], 'cut off': ['replying', 'cut off'], late: ['late'], recorded: ['recorded'], closed: ['closed']
  }
  for (const from of Object.keys(states) as Array<AnswerState['at']>) {
    for (const to of Object.keys(states) as Array<AnswerState['at']>) {
      const answer = new Answer()
      for (const step of ways[from]) answer.move(states[step])
      if (legal[from].includes(to)) {
        answer.move(states[to])
        t.equal(answer.state, states[to])
      } else {
        t.throws(() => { answer.move(states[to]) }, { message: `an answer that is ${from} cannot be ${to}` })
        t.equal(answer.state.at, from)
      }
    }
  }
})

t.test('a runner that asks again for a job before it is acknowledged is told how the first attempt has ended', async t => {
  for (const fails of [false, true]) {
    const registry = new Registry(new Set([TYPE]))
    let runs = 0
    registry.app.on(TYPE, () => { if (++runs === 1 && fails) throw new Error('the handler fails') }, {} as never)
    const works = new Works()
    const claims = new Claims({ store: memoryStore(), lease: 60_000, retention: 60_000, onTrouble () {} })
    const handling = new Handling(works, claims, registry, silent, new Observation(), new AbortController().signal)
    const host = new Host(works, claims, handling, {} as Failures)
    const ends: string[] = []
    const attempt = async (job: Job): Promise<void> => {
      ends.push(await Promise.resolve().then(() => host.process(job)).then(() => 'succeeded', () => 'failed'))
    }
    const verdicts: Verdict[] = []
    const sender = {
      request: { log: silent, openaiWebhook: { webhookId: 'wh_1', timestamp: 1, endpoint: ENDPOINT, event: { type: TYPE } } },
      tell (verdict: Verdict) { verdicts.push(verdict) }
    } as unknown as Sender
    new Receiver(works, claims, handling, {
      async run (job) {
        await attempt(job)
        await attempt(job)
      }
    }, new Observation()).receive(sender)
    await works.drained()
    t.same(ends, [fails ? 'failed' : 'succeeded', 'succeeded'])
    t.equal(runs, fails ? 2 : 1)
    t.same(verdicts, [{ outcome: 'processed' }])
  }
})

/** More than a plan can spoil. */
const ATTEMPTS = 20

/** What a run is made of: how each side behaves, in the order in which it is asked. */
interface Plan {
  /** Deliveries of the one webhook-id. */
  senders: number
  /** Whether the store fails as it is asked, and after it has done its work. */
  begins: Array<'answers' | 'fails' | 'at once'>
  handlers: Array<'succeeds' | 'fails' | 'at once' | 'throws'>
  runner: 'inline' | 'queue' | 'refuses'
  /** Whether the runner takes the job at once, and runs it before or after it has said so. */
  early: boolean
  /** Whether the app is closing by the time the last one comes. */
  closing: boolean
}

const plans: fc.Arbitrary<Plan> = fc.record({
  senders: fc.integer({ min: 1, max: 5 }),
  begins: fc.array(fc.constantFrom('answers', 'fails', 'at once'), { minLength: 1, maxLength: 8 }),
  handlers: fc.array(fc.constantFrom('succeeds', 'fails', 'at once', 'throws'), { minLength: 1, maxLength: 8 }),
  runner: fc.constantFrom('inline', 'queue', 'refuses'),
  early: fc.boolean(),
  closing: fc.boolean()
})

/** What may be said of one webhook-id, whatever comes before what. */
class Model {
  running = 0
  succeeded = 0
  runs = 0
  readonly faults: string[] = []

  started (): void {
    this.runs++
    if (++this.running > 1) this.faults.push('a handler runs beside itself')
    if (this.succeeded > 0) this.faults.push('a handler runs again that has succeeded')
  }

  ended (succeeded: boolean): void {
    this.running--
    if (succeeded) this.succeeded++
  }

  told (verdict: Verdict, runner: Plan['runner']): void {
    if (verdict.outcome !== 'refused' && runner === 'inline' && this.succeeded === 0) this.faults.push(`told ${verdict.outcome} before the handler had succeeded`)
    if (verdict.outcome !== 'refused' && runner === 'refuses') this.faults.push('acknowledged what the runner had refused')
  }
}

async function follow (plan: Plan, scheduler: fc.Scheduler): Promise<void> {
  const model = new Model()
  const kept = memoryStore()
  let begun = 0
  const store: IdempotencyStore = {
    ...kept,
    begin (key, lease) {
      const how = plan.begins[begun++ % plan.begins.length]
      if (how === 'at once') return kept.begin(key, lease)
      return scheduler.schedule(Promise.resolve(), 'begin').then(() => {
        if (how === 'fails') throw new Error('the store fails')
        return kept.begin(key, lease)
      })
    },
    complete: (key, token, retention) => scheduler.schedule(Promise.resolve(), 'complete').then(() => kept.complete(key, token, retention)),
    release: (key, token) => scheduler.schedule(Promise.resolve(), 'release').then(() => kept.release(key, token))
  }

  let asked = 0
  const registry = new Registry(new Set([TYPE]))
  registry.app.on(TYPE, () => {
    const how = plan.handlers[asked++ % plan.handlers.length]
    model.started()
    if (how === 'at once' || how === 'throws') {
      model.ended(how === 'at once')
      if (how === 'throws') throw new Error('the handler fails')
      return
    }
    return scheduler.schedule(Promise.resolve(), 'handler').then(() => {
      model.ended(how === 'succeeds')
      if (how === 'fails') throw new Error('the handler fails')
    })
  }, {} as never)

  const works = new Works()
  const claims = new Claims({ store, lease: 60_000, retention: 60_000, onTrouble () {} })
  const handling = new Handling(works, claims, registry, silent, new Observation(), new AbortController().signal)
  const host = new Host(works, claims, handling, {} as Failures)
  const queued: Array<Promise<unknown>> = []
  const attempt = async (job: Job): Promise<void> => {
    for (let attempts = 0, isDone = false; attempts < ATTEMPTS && !isDone; attempts++) {
      await scheduler.schedule(Promise.resolve(), 'queue')
      isDone = await Promise.resolve(host.process(job)).then(() => true, () => false)
      if (isDone && model.succeeded === 0) model.faults.push('a job is done whose handler has not succeeded')
    }
  }
  const runners: Record<Plan['runner'], Runner['run']> = {
    inline: job => host.process(job),
    queue (job) {
      if (plan.early) {
        queued.push(attempt(job))
        return scheduler.schedule(Promise.resolve(), 'enqueue').then(() => {})
      }
      return scheduler.schedule(Promise.resolve(), 'enqueue').then(() => { queued.push(attempt(job)) })
    },
    refuses: () => scheduler.schedule(Promise.resolve(), 'enqueue').then(() => { throw new Error('the queue fails') })
  }
  const receiver = new Receiver(works, claims, handling, { run: runners[plan.runner] }, new Observation())

  const verdicts = new Map<number, Verdict[]>()
  const deliver = async (nth: number): Promise<void> => {
    await scheduler.schedule(Promise.resolve(), `delivery ${nth}`)
    if (plan.closing && nth === plan.senders - 1) works.closing = true
    const told: Verdict[] = []
    verdicts.set(nth, told)
    const sender = {
      request: { log: silent, openaiWebhook: { webhookId: 'wh_1', timestamp: 1, endpoint: ENDPOINT, event: { type: TYPE } } },
      ownHandler: undefined,
      tell (verdict: Verdict) {
        told.push(verdict)
        model.told(verdict, plan.runner)
      }
    } as unknown as Sender
    receiver.receive(sender)
  }
  const deliveries = Array.from({ length: plan.senders }, (_, nth) => deliver(nth))
  const all = (async () => {
    await Promise.all(deliveries)
    await works.drained()
    await Promise.all(queued)
  })()
  await scheduler.waitFor(all)

  assert.deepEqual(model.faults, [])
  assert.deepEqual([...verdicts.values()].map(told => told.length), Array.from({ length: plan.senders }, () => 1), 'each sender is told once')
  assert.equal(works.received.size + works.queued.size, 0, 'nothing is kept')
  assert.equal(model.running, 0)
  if (plan.runner === 'refuses') assert.equal(model.runs, 0)
  const isAcknowledged = [...verdicts.values()].some(([verdict]) => verdict!.outcome !== 'refused')
  if (isAcknowledged && plan.runner === 'queue') assert.ok(model.runs > 0, 'what was acknowledged has been attempted')
}

t.test('whatever comes before what, one webhook-id runs once, and each of its senders is told once', async t => {
  // Who waits for a claim that is about to be let go waits by the clock.
  const { setTimeout } = globalThis
  t.teardown(() => { Object.assign(globalThis, { setTimeout }) })
  Object.assign(globalThis, { setTimeout: (run: () => void) => setImmediate(run) })
  await t.resolves(fc.assert(fc.asyncProperty(plans, fc.scheduler(), follow), { numRuns: sized(500, 8_000) }))
})
