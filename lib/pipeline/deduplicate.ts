import { inContext } from '../async-context.ts'
import { Unavailable } from '../errors.ts'
import type { Job } from '../runners/runner.ts'
import { after, then, tryOr } from '../maybe-promise.ts'
import type { MaybePromise } from '../maybe-promise.ts'
import type { Claim, IdempotencyStore } from '../stores/store.ts'
import { resourceKeyOf } from './resource-key.ts'

/** A claim that this process holds, until it is completed, released or lost. */
export interface Held {
  readonly state: 'claimed'
  readonly key: string
  /** The delivery that it was claimed for. */
  readonly job: Job
  readonly token: string
  /** Handlers that have succeeded in earlier attempts. */
  readonly finished: readonly string[]
  /** The claim on what the event is about, where that has one of its own: the two are settled together. */
  readonly resource: Held | undefined
  /** Its index among the claims that are held; -1 once it is not. */
  place: number
}

/** The answer to `begin`. */
export type Begun = Held | Exclude<Claim, { state: 'claimed' }>

export interface ClaimsOptions {
  store: IdempotencyStore
  /** ms */
  lease: number
  /** ms */
  retention: number
  /** Whether what an event is about is claimed beside the delivery. */
  reconcile?: boolean
  /** Called with what the store failed with, and when a claim is lost. */
  onTrouble: (error: unknown, job: Job) => void
}

/**
 * The store, and the claims that this process holds, which it renews while their handlers run.
 *
 * Only `begin` can fail a delivery. The rest happens when handlers have run, and a sender must not be told that a processed
 * delivery failed: it is trouble, and at worst a later duplicate finds the delivery unfinished.
 */
export class Claims {
  readonly #options: ClaimsOptions
  readonly #held = new HeldClaims()
  #timer: NodeJS.Timeout | undefined
  // Bound here: the claims are of many requests, and the timer must not keep the async context of one, nor run in it.
  readonly #startTimer = inContext(() => setInterval(() => this.#renewAll(), this.#options.lease / 3).unref())

  constructor (options: ClaimsOptions) {
    this.#options = options
  }

  /**
   * Claims a delivery, and beside it what its event is about, so that the handlers run once though two deliveries tell of it:
   * `done` and `running` are the answer of whichever is. `finished` has the handlers that succeeded for either.
   *
   * @throws FST_OPENAI_WEBHOOK_UNAVAILABLE
   */
  begin (key: string, job: Job): MaybePromise<Begun> {
    const resource = this.#options.reconcile === true ? resourceKeyOf(job) : undefined
    return resource === undefined ? this.#begin(key, job) : this.#beginBoth(key, resource, job)
  }

  /** The delivery first: whoever has it waits for nobody. */
  #beginBoth (key: string, resourceKey: string, job: Job): MaybePromise<Begun> {
    return then(this.#begin(key, job), claim => claim.state !== 'claimed'
      ? claim
      : after<Begun, Begun>(
        () => this.#begin(resourceKey, job),
        resource => this.#bothBegun(claim, resource),
        error => then(this.release(claim), () => { throw error })
      ))
  }

  #bothBegun (claim: Held, resource: Begun): MaybePromise<Begun> {
    if (resource.state === 'claimed') {
      const held: Held = { ...claim, place: -1, finished: union(claim.finished, resource.finished), resource }
      this.#held.delete(claim)
      return this.#held.add(held)
    }
    // Another delivery has told of it, or is about to.
    return then(resource.state === 'done' ? this.complete(claim) : this.release(claim), () => resource)
  }

  #begin (key: string, job: Job): MaybePromise<Begun> {
    const { store, lease } = this.#options
    return tryOr<Begun>(() => then(store.begin(key, lease), claim => this.#checked(key, job, claim)), unavailable)
  }

  /** Whether it is not known to have been lost. */
  holds (claim: Held): boolean { return this.#held.has(claim) && (claim.resource === undefined || this.#held.has(claim.resource)) }

  checkpoint (claim: Held, handler: string): MaybePromise<void> {
    if (claim.resource === undefined) return this.#checkpoint(claim, handler)
    return both(this.#checkpoint(claim.resource, handler), this.#checkpoint(claim, handler))
  }

  /**
   * The resource first: where a crash comes between, the delivery that comes again finds that it has been processed. Both in one
   * turn, so that a store which groups what arrives makes one commit of them.
   */
  complete (claim: Held): MaybePromise<void> {
    if (claim.resource === undefined) return this.#complete(claim)
    return both(this.#complete(claim.resource), this.#complete(claim))
  }

  release (claim: Held): MaybePromise<void> {
    if (claim.resource === undefined) return this.#release(claim)
    return both(this.#release(claim.resource), this.#release(claim))
  }

  #checkpoint ({ key, job, token }: Held, handler: string): MaybePromise<void> {
    const { store, onTrouble } = this.#options
    return tryOr(() => store.checkpoint(key, token, handler), error => onTrouble(error, job))
  }

  #complete (claim: Held): MaybePromise<void> {
    const { store, retention, onTrouble } = this.#options
    // A lost claim has been reported when its renewal failed.
    const isHeld = this.#held.delete(claim)
    return tryOr<void>(() => then(store.complete(claim.key, claim.token, retention), held => {
      if (held === false && isHeld) onTrouble(this.#lost(claim, 'before its success was on record: what took it over may run it again'), claim.job)
    }), error => onTrouble(error, claim.job))
  }

  #release (claim: Held): MaybePromise<void> {
    const { store, onTrouble } = this.#options
    this.#held.delete(claim)
    return tryOr(() => store.release(claim.key, claim.token), error => onTrouble(error, claim.job))
  }

  /** A user's store may answer anything, and a delivery with a claim that cannot be settled would hang. */
  #checked (key: string, job: Job, claim: Claim): Begun {
    if (claim.state === 'done' || claim.state === 'running') return claim
    if (claim.state !== 'claimed' || !Array.isArray(claim.finished)) {
      throw new TypeError('expected the store\'s begin() to answer { state: "claimed", token, finished }, { state: "running" } or { state: "done" }')
    }
    // One timer for all claims, which stops when there are none. A quick delivery is over before it fires.
    this.#timer ??= this.#startTimer()
    return this.#held.add({ state: 'claimed', key, job, token: claim.token, finished: claim.finished, resource: undefined, place: -1 })
  }

  #renewAll (): void {
    if (this.#held.all.length === 0) {
      clearInterval(this.#timer)
      this.#timer = undefined
    }
    // Told once: a store that cannot be reached fails all of them, which may be hundreds.
    let isTold = false
    const onFailure = (error: unknown, { job }: Held): void => {
      if (!isTold) this.#options.onTrouble(error, job)
      isTold = true
    }
    for (const claim of [...this.#held.all]) tryOr<void>(async () => await this.#renew(claim), error => onFailure(error, claim))
  }

  async #renew (claim: Held): Promise<void> {
    const { store, lease, onTrouble } = this.#options
    const extended = await store.extend(claim.key, claim.token, lease)
    if (!extended && this.#held.delete(claim)) onTrouble(this.#lost(claim, 'before it could be renewed'), claim.job)
  }

  #lost ({ key }: Held, before: string): Error {
    return new Error(`the claim on ${key} was lost: its lease of ${this.#options.lease} ms ran out ${before}`)
  }
}

/** Claims in no order. A Set would have V8 make a hash for each claim, which takes 3 % of a delivery. */
class HeldClaims {
  readonly all: Held[] = []

  has ({ place }: Held): boolean { return place !== -1 }

  add (claim: Held): Held {
    claim.place = this.all.push(claim) - 1
    return claim
  }

  /** @returns whether it was held */
  delete (claim: Held): boolean {
    if (!this.has(claim)) return false
    const last = this.all.pop()!
    if (last !== claim) {
      last.place = claim.place
      this.all[last.place] = last
    }
    claim.place = -1
    return true
  }
}

function unavailable (cause: unknown): never {
  throw new Unavailable({ cause })
}

function both (first: MaybePromise<void>, second: MaybePromise<void>): MaybePromise<void> {
  return then(first, () => second)
}

/** All names, each once. */
export function union (names: readonly string[], others: readonly string[] = []): readonly string[] {
  return others.length === 0 ? names : [...new Set([...names, ...others])]
}
