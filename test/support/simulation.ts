import { createHmac } from 'node:crypto'
import Fastify from 'fastify'
import type { FastifyInstance } from 'fastify'
import openaiWebhook from '../../lib/index.ts'
import type { IdempotencyStore, Runner } from '../../lib/index.ts'
import { SECRET } from './deliveries.ts'
import { Agenda } from './time.ts'

export interface Time {
  /** The time of the sender, in ms since the epoch. */
  readonly now: number
  /** The time for the timestamp of a delivery that is signed now, in ms since the epoch. */
  readonly stamp: number
  advanceTo (to: number): void
}

/** For stores and runners with timers of their own: the sender's clock jumps hours ahead, and the receiver's clock is real. */
export class RealTime implements Time {
  now = Date.now()
  get stamp (): number { return Date.now() }
  advanceTo (to: number): void { this.now = Math.max(this.now, to) }
}

const SECOND = 1_000
const HOUR = 3_600_000
/** OpenAI gives up after this time. */
const LAST_RETRY = 72 * HOUR
/** ms between two first deliveries, on average. The rate is the same for any number of deliveries. */
const INTERVAL = 12 * HOUR / 100_000
const FIRST_BACKOFF = 5 * SECOND
const LONGEST_BACKOFF = 8 * HOUR
/** Deliveries within this time may be in flight together. */
const TOGETHER = 20 * SECOND
/** Seconds. The plugin's tolerance is 300. */
const MAX_SKEW = 270

/** The event types, each with the names of its handlers. */
const TYPES = [
  { type: 'batch.failed', handlers: ['any', 'family', 'exact'] },
  { type: 'response.completed', handlers: ['any', 'response'] },
  { type: 'eval.run.failed', handlers: ['any', 'unhandled'] }
] as const
const NAMES = ['any', 'family', 'exact', 'response', 'unhandled'] as const
type Name = typeof NAMES[number]
const bitOf = Object.fromEntries(NAMES.map((name, n) => [name, 1 << n])) as Record<Name, number>

/** The random decisions. Each has its own random numbers, so that they do not depend on the order of events. */
const enum Chance { Type, Arrival, FailFirst, Fail, Manner, Sleep, Store, StoreWhen, Lost, Duplicate, DuplicateAt, Jitter, Skew, Group }

export interface SimulationOptions {
  seed: number
  deliveries: number
  time: Time
  store: IdempotencyStore
  runner: Runner
  /** What an answer of 200 promises: that the handlers have succeeded, that they will succeed, or that they will have run. */
  promise: 'succeeded' | 'will succeed' | 'will run'
  /** The lease of the idempotency option in ms. When the store's clock is real, a lost claim must end before the run does. */
  lease?: number
  /** The share of the store's calls that fail. Half of them fail after their work is done. */
  storeFailures?: number
}

export interface SimulationResult {
  /** All deliveries that were sent: first ones, retries and duplicates. */
  attempts: number
  answers: Record<string, number>
  /** Deliveries answered 200, whether or not OpenAI received the answer. */
  acknowledged: number
  /** Deliveries that were never answered 200 within 72 hours. */
  givenUp: number
  runs: number
  handlerFailures: number
  storeFailures: number
  /** Runs of a handler that had succeeded before, because the store had been unable to record its success. */
  repeats: number
  /** Deliveries whose failure no sender is told of and which were reported to the host. */
  reported: number
  hours: number
  /** Violated promises. The list must be empty. */
  faults: string[]
}

class Delivery {
  readonly webhookId: string
  readonly body: Buffer
  firstAt = 0
  attempts = 0
  answered200 = false
  givenUp = false
  /** One bit for each handler. */
  succeeded = 0
  recorded = 0
  running = 0
  reported = false
  storeCalls = 0
  holder: string | undefined
  readonly starts: number[] = []

  constructor (readonly index: number, readonly type: string, readonly handlers: readonly Name[]) {
    this.webhookId = `wh_${index}`
    this.body = Buffer.from(`{"id":"evt_${index}","object":"event","created_at":1750861210,"type":"${type}","data":{"id":"res_${index}"}}`)
  }

  get all (): number {
    return this.handlers.reduce((bits, name) => bits | bitOf[name], 0)
  }
}

const turn = async (): Promise<void> => await new Promise(resolve => setImmediate(resolve))

const key = Buffer.from(SECRET.slice('whsec_'.length), 'base64')

/** OpenAI's side: sends each delivery until it is answered 200, for up to 72 hours, and some of them once more after that. */
export class Simulation {
  readonly #options: Required<SimulationOptions>
  readonly #deliveries: Delivery[]
  readonly #agenda = new Agenda<{ delivery: Delivery, retries: boolean }>()
  readonly #faults: string[] = []
  readonly #answers: Record<string, number> = {}
  #attempts = 0
  #runs = 0
  #handlerFailures = 0
  #storeFailures = 0
  #repeats = 0
  #unanswered = 0
  /** The number of calls that end without a timer: of the store, of the queue, and of handlers that do not sleep. */
  #busy = 0

  constructor (options: SimulationOptions) {
    this.#options = { lease: 30_000, storeFailures: 0.002, ...options }
    this.#deliveries = Array.from({ length: options.deliveries }, (_, index) => {
      const { type, handlers } = TYPES[Math.floor(this.#chance(Chance.Type, index) * TYPES.length)]!
      return new Delivery(index, type, handlers)
    })
  }

  async run (): Promise<SimulationResult> {
    const { time, lease, runner, promise } = this.#options
    const began = time.now
    const app = Fastify({ pluginTimeout: 0 }) as FastifyInstance
    await app.register(openaiWebhook, {
      secret: SECRET,
      idempotency: { store: this.#failing(this.#options.store), lease },
      runner: this.#watched(runner),
      closeTimeout: 2 ** 31 - 1,
      // The time jumps while a body is being read, although reading takes no time.
      bodyTimeout: 2 ** 31 - 1
    })
    app.openaiWebhook
      .onAny(this.#handler('any'), { name: 'any' })
      .on('batch.*', this.#handler('family'), { name: 'family' })
      .on('batch.failed', this.#handler('exact'), { name: 'exact' })
      .on('response.*', this.#handler('response'), { name: 'response' })
      .onUnhandled(this.#handler('unhandled'), { name: 'unhandled' })
    await app.ready()

    for (const delivery of this.#deliveries) {
      delivery.firstAt = began + this.#chance(Chance.Arrival, delivery.index) * this.#deliveries.length * INTERVAL
      this.#agenda.add(delivery.firstAt, { delivery, retries: true })
    }
    for (let group = 0; this.#agenda.size > 0 || this.#unanswered > 0; group++) {
      const end = this.#agenda.next + TOGETHER
      for (let left = 1 + this.#chance(Chance.Group, group) * 64; left > 0 && this.#agenda.next <= end && this.#agenda.size > 0; left--) {
        time.advanceTo(this.#agenda.next)
        const { delivery, retries } = this.#agenda.take()
        this.#send(app, delivery, retries)
      }
      await this.#settled()
      // Sleeping handlers end only when the time advances.
      if (this.#agenda.size === 0 || this.#unanswered > 100) time.advanceTo(time.now + 500)
    }
    if (promise === 'will succeed') await this.#until(() => this.#deliveries.every(delivery => !delivery.answered200 || delivery.succeeded === delivery.all))
    let closed = false
    const closing = app.close().then(() => { closed = true })
    await this.#until(() => closed)
    await closing
    return this.#result((time.now - began) / HOUR)
  }

  /** Advances the time until the condition holds. It returns in any case, so that the result can report what did not happen. */
  async #until (holds: () => boolean): Promise<void> {
    const { time } = this.#options
    const steps = time instanceof RealTime ? 200_000 : 20_000
    for (let step = 0; step < steps && !holds(); step++) {
      time.advanceTo(time.now + SECOND)
      // A runner starts in the next turn, and the timers of its handlers do not exist before.
      await turn()
      await this.#settled()
      // Another process needs real time to answer.
      if (time instanceof RealTime) await new Promise(resolve => setTimeout(resolve, 1))
    }
  }

  /** Resolves once everything that does not wait for a timer has been answered. */
  async #settled (): Promise<void> {
    for (let idle = 0; idle < 6 && (this.#unanswered > 0 || this.#busy > 0);) {
      await turn()
      idle = this.#busy > 0 ? 0 : idle + 1
    }
  }

  #send (app: FastifyInstance, delivery: Delivery, retries: boolean): void {
    const { webhookId, body, index } = delivery
    const attempt = delivery.attempts++
    this.#attempts++
    this.#unanswered++
    const timestamp = String(Math.floor(this.#options.time.stamp / SECOND + (2 * this.#chance(Chance.Skew, index, attempt) - 1) * MAX_SKEW))
    const signature = createHmac('sha256', key).update(`${webhookId}.${timestamp}.`).update(body).digest('base64')
    app.inject({
      method: 'POST',
      url: '/webhooks/openai',
      headers: { 'content-type': 'application/json', 'webhook-id': webhookId, 'webhook-timestamp': timestamp, 'webhook-signature': `v1,${signature}` },
      payload: body
    }).then(({ statusCode, body }) => {
      this.#unanswered--
      this.#answered(delivery, attempt, statusCode, body, retries)
    })
  }

  #answered (delivery: Delivery, attempt: number, status: number, body: string, retries: boolean): void {
    const { time, promise } = this.#options
    const { index } = delivery
    const answer = status === 200 ? body : String((JSON.parse(body) as { code?: string }).code).replace('FST_OPENAI_WEBHOOK_', `${status} `)
    this.#answers[answer] = (this.#answers[answer] ?? 0) + 1
    if (status === 200) {
      delivery.answered200 = true
      if (promise === 'succeeded' && delivery.succeeded !== delivery.all) this.#fault(delivery, 'was answered 200 before every handler had succeeded')
      if (retries && this.#chance(Chance.Lost, index, attempt) >= 0.01) {
        if (this.#chance(Chance.Duplicate, index) < 0.05) {
          this.#agenda.add(time.now + this.#chance(Chance.DuplicateAt, index) ** 4 * 24 * HOUR, { delivery, retries: false })
        }
        return
      }
    } else if (status !== 409 && status !== 500 && status !== 503) {
      this.#fault(delivery, `was answered ${status}`)
    }
    if (!retries) return
    const backoff = Math.min(FIRST_BACKOFF * 2 ** attempt, LONGEST_BACKOFF) * (0.5 + this.#chance(Chance.Jitter, index, attempt))
    if (time.now + backoff <= delivery.firstAt + LAST_RETRY) this.#agenda.add(time.now + backoff, { delivery, retries })
    else delivery.givenUp = true
  }

  /** A handler that fails in its first attempts at some deliveries, and at random. It succeeds at once, a turn later, or after seconds. */
  #handler (name: Name) {
    const bit = bitOf[name]
    const number = NAMES.indexOf(name)
    return (_event: unknown, { webhookId }: { webhookId: string }): void | Promise<void> => {
      const delivery = this.#of(webhookId)
      const { index } = delivery
      const start = delivery.starts[number] = (delivery.starts[number] ?? 0) + 1
      this.#runs++
      if ((delivery.recorded & bit) !== 0) this.#fault(delivery, `ran ${name} again after its success was recorded`)
      if ((delivery.running & bit) !== 0) this.#fault(delivery, `ran ${name} beside itself`)
      if ((delivery.succeeded & bit) !== 0) this.#repeats++

      const first = this.#chance(Chance.FailFirst, index, number)
      const failing = first < 0.1 ? 1 + first * 40 : first > 0.999 ? 14 : 0
      const fails = start <= failing || this.#chance(Chance.Fail, index, number, start) < 0.05
      const end = (): void => {
        if (fails) {
          this.#handlerFailures++
          throw new Error('a random failure')
        }
        delivery.succeeded |= bit
      }
      const manner = this.#chance(Chance.Manner, index, number, start)
      if (manner < 0.5) return end()
      return this.#later(delivery, bit, end, manner < 0.98 ? undefined : this.#chance(Chance.Sleep, index, number, start) * 10 * SECOND)
    }
  }

  async #later (delivery: Delivery, bit: number, end: () => void, ms: number | undefined): Promise<void> {
    delivery.running |= bit
    try {
      if (ms === undefined) {
        this.#busy++
        await turn()
        this.#busy--
      } else {
        const { time } = this.#options
        await new Promise<void>(resolve => { setTimeout(resolve, time instanceof RealTime ? ms / 1_000 : ms) })
      }
      end()
    } finally {
      delivery.running &= ~bit
    }
  }

  /** Wraps a store so that its calls fail at random, before or after their work, and notes what it has recorded. */
  #failing (store: IdempotencyStore): IdempotencyStore {
    const call = <T>(key: string, work: () => T | Promise<T>, done: (delivery: Delivery, result: T) => void): T | Promise<T> => {
      const delivery = this.#of(key.slice(key.lastIndexOf(' ') + 1))
      const n = delivery.storeCalls++
      const fails = this.#chance(Chance.Store, delivery.index, n) < this.#options.storeFailures
      const after = this.#chance(Chance.StoreWhen, delivery.index, n) < 0.5
      const fail = (): never => {
        this.#storeFailures++
        throw new Error('a random failure of the store')
      }
      if (fails && !after) return fail()
      const finish = (result: T): T => {
        done(delivery, result)
        return fails ? fail() : result
      }
      const result = work()
      if (!(result instanceof Promise)) return finish(result)
      this.#busy++
      return result.finally(() => { this.#busy-- }).then(finish)
    }
    // The answers come in the order of the calls, so the last call that was given the claim holds it.
    const record = (bits: (delivery: Delivery) => number, token: string) => (delivery: Delivery): void => {
      if (delivery.holder !== token) return
      const recorded = bits(delivery)
      if ((delivery.succeeded & recorded) !== recorded) this.#fault(delivery, 'was recorded before every handler had succeeded')
      delivery.recorded |= recorded
    }
    return {
      begin: (key, lease) => call(key, () => store.begin(key, lease), (delivery, claim) => {
        if (claim.state === 'claimed') delivery.holder = claim.token
      }),
      checkpoint: (key, token, handler) => call(key, () => store.checkpoint(key, token, handler), record(() => bitOf[handler as Name], token)),
      complete: (key, token, retention) => call(key, () => store.complete(key, token, retention), record(delivery => delivery.all, token)),
      extend: (key, token, lease) => call(key, () => store.extend(key, token, lease), () => {}),
      release: (key, token) => call(key, () => store.release(key, token), () => {})
    }
  }

  /** Wraps a runner so that the simulation waits for its queue, and notes the failures that no sender is told of. */
  #watched (runner: Runner): Runner {
    const { promise } = this.#options
    return {
      start: host => runner.start?.({
        process: job => host.process(job),
        report: (error, job) => {
          if (job !== undefined) this.#of(job.webhookId).reported = true
          host.report(error, job)
        }
      }),
      run: job => {
        const accepted = runner.run(job)
        if (promise === 'succeeded' || !(accepted instanceof Promise)) return accepted
        this.#busy++
        return accepted.finally(() => { this.#busy-- })
      },
      close: () => runner.close?.()
    }
  }

  #result (hours: number): SimulationResult {
    const { promise } = this.#options
    for (const delivery of this.#deliveries) {
      if (delivery.running !== 0) this.#fault(delivery, 'is still running')
      if (!delivery.answered200 || delivery.succeeded === delivery.all) continue
      if (promise !== 'will run' || !delivery.reported) this.#fault(delivery, 'was answered 200 and lost')
    }
    const count = (holds: (delivery: Delivery) => boolean): number => this.#deliveries.filter(holds).length
    return {
      attempts: this.#attempts,
      answers: this.#answers,
      acknowledged: count(({ answered200 }) => answered200),
      givenUp: count(({ givenUp, answered200 }) => givenUp && !answered200),
      runs: this.#runs,
      handlerFailures: this.#handlerFailures,
      storeFailures: this.#storeFailures,
      repeats: this.#repeats,
      reported: count(({ reported }) => reported),
      hours: Math.round(hours),
      faults: this.#faults
    }
  }

  #of (webhookId: string): Delivery {
    return this.#deliveries[Number(webhookId.slice('wh_'.length))]!
  }

  #fault (delivery: Delivery, what: string): void {
    if (this.#faults.length < 10) this.#faults.push(`${delivery.webhookId} (${delivery.type}) ${what}`)
  }

  /** A number from 0 to 1, which depends only on the seed and the arguments. */
  #chance (kind: Chance, a: number, b = 0, c = 0): number {
    let h = this.#options.seed | 0
    for (const part of [kind, a, b, c]) {
      h = Math.imul(h ^ part, 0x9e3779b1)
      h = Math.imul(h ^ (h >>> 15), 0x85ebca6b)
      h ^= h >>> 13
    }
    h = Math.imul(h ^ (h >>> 16), 0xc2b2ae35)
    return ((h ^ (h >>> 16)) >>> 0) / 4_294_967_296
  }
}
