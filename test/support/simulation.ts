import { createHmac } from 'node:crypto'
import Fastify from 'fastify'
import type { FastifyInstance } from 'fastify'
import openaiWebhook from '../../lib/index.ts'
import type { IdempotencyStore, Runner } from '../../lib/index.ts'
import { SECRET } from './deliveries.ts'
import { Agenda } from './time.ts'

export interface Time {
  /** ms since the epoch, for whoever sends. */
  readonly now: number
  /** What a delivery that is signed now bears, ms since the epoch. */
  readonly stamp: number
  advanceTo (to: number): void
}

/** For what lives by timers that are not ours: the sender's hours pass, the receiver's clock goes on as it does. */
export class RealTime implements Time {
  now = Date.now()
  get stamp (): number { return Date.now() }
  advanceTo (to: number): void { this.now = Math.max(this.now, to) }
}

const SECOND = 1_000
const HOUR = 3_600_000
/** OpenAI gives up then. */
const LAST_RETRY = 72 * HOUR
/** ms between two first deliveries, on average: the same rate however many there are. */
const INTERVAL = 12 * HOUR / 100_000
const FIRST_BACKOFF = 5 * SECOND
const LONGEST_BACKOFF = 8 * HOUR
/** What comes within it may be under way at once. */
const TOGETHER = 20 * SECOND
/** Seconds; the plugin's tolerance is 300. */
const MAX_SKEW = 270

/** A type of event with the names of the handlers that it has. */
const TYPES = [
  { type: 'batch.failed', handlers: ['any', 'family', 'exact'] },
  { type: 'response.completed', handlers: ['any', 'response'] },
  { type: 'eval.run.failed', handlers: ['any', 'unhandled'] }
] as const
const NAMES = ['any', 'family', 'exact', 'response', 'unhandled'] as const
type Name = typeof NAMES[number]
const bitOf = Object.fromEntries(NAMES.map((name, n) => [name, 1 << n])) as Record<Name, number>

/** What is random, so that what depends on it does not depend on the order in which things happen. */
const enum Chance { Type, Arrival, FailFirst, Fail, Manner, Sleep, Store, StoreWhen, Lost, Duplicate, DuplicateAt, Jitter, Skew, Group }

export interface SimulationOptions {
  seed: number
  deliveries: number
  time: Time
  store: IdempotencyStore
  runner: Runner
  /** Whether 200 says that the handlers have succeeded, that they will, or that they will have run. */
  promise: 'succeeded' | 'will succeed' | 'will run'
  /** ms of the idempotency option; where the store's clock is real, a claim that was lost must not outlast the run. */
  lease?: number
  /** Of the store's calls, how many fail, half of them after they have done their work. */
  storeFailures?: number
}

export interface SimulationResult {
  /** Sent in all: first, retried and duplicate. */
  attempts: number
  answers: Record<string, number>
  /** Answered 200, whether OpenAI heard it or not. */
  acknowledged: number
  /** Never answered 200 within 72 hours. */
  givenUp: number
  runs: number
  handlerFailures: number
  storeFailures: number
  /** Runs of a handler that had succeeded before, and whose success the store had not been able to record. */
  repeats: number
  /** Deliveries whose failure no sender hears of, and which were told to the host. */
  reported: number
  hours: number
  /** What must not be; empty. */
  faults: string[]
}

class Delivery {
  readonly webhookId: string
  readonly body: Buffer
  firstAt = 0
  attempts = 0
  answered200 = false
  givenUp = false
  /** Bits of handlers. */
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

/** OpenAI's side: delivers until it is answered 200, over 72 hours, and now and then once more. */
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
  /** What goes on by itself: calls of the store and the queue, handlers that do not sleep. */
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
      // Time jumps while a body is still to be read, which takes none.
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
      // Only time ends what sleeps.
      if (this.#agenda.size === 0 || this.#unanswered > 100) time.advanceTo(time.now + 500)
    }
    if (promise === 'will succeed') await this.#until(() => this.#deliveries.every(delivery => !delivery.answered200 || delivery.succeeded === delivery.all))
    let closed = false
    const closing = app.close().then(() => { closed = true })
    await this.#until(() => closed)
    await closing
    return this.#result((time.now - began) / HOUR)
  }

  /** Lets time pass until it holds; ends in any case, so that the result can say what did not come. */
  async #until (holds: () => boolean): Promise<void> {
    const { time } = this.#options
    const steps = time instanceof RealTime ? 200_000 : 20_000
    for (let step = 0; step < steps && !holds(); step++) {
      time.advanceTo(time.now + SECOND)
      // A runner starts in the turn after; no timer of its handlers is there before.
      await turn()
      await this.#settled()
      // Another process answers in its own time.
      if (time instanceof RealTime) await new Promise(resolve => setTimeout(resolve, 1))
    }
  }

  /** Resolves when all has been answered that waits for nothing but time. */
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

  /** Fails for its first few attempts at some deliveries, and at random; succeeds at once, a little later, or after seconds. */
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

  /** A store that fails now and then, before or after its work, and is watched for what it has recorded. */
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
    // Whoever began last and was given the claim holds it: answers come in the order of the calls.
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

  /** Waits for a queue as for the store, and hears of what no sender does. */
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

  /** 0 to 1, of the seed and what is asked for. */
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
