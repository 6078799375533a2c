import { inContext } from '../async-context.ts'
import { Unavailable } from '../errors.ts'
import type { Job } from '../runners/runner.ts'
import { after, both, then, tryOr } from '../maybe-promise.ts'
import type { MaybePromise } from '../maybe-promise.ts'
import type { Claim, IdempotencyStore } from '../stores/store.ts'
import { resourceKeyOf } from './resource-key.ts'

/** A claim that this process holds, until it is completed, released or lost. */
export interface Held {
  readonly state: 'claimed'
  readonly key: string
  /** The delivery that the claim is for. */
  readonly job: Job
  readonly token: string
  /** Names of the handlers that have succeeded in earlier attempts. */
  readonly finished: readonly string[]
  /** The claim on the event's resource, if that is claimed separately. The two claims are settled together. */
  readonly resource: Held | undefined
}

export type Begun = Held | Exclude<Claim, { state: 'claimed' }>

/** Maximum number of ms until a renewal that has failed is tried again. */
const MAX_RETRY = 1_000

export interface ClaimsOptions {
  store: IdempotencyStore
  /** ms */
  lease: number
  /** ms */
  retention: number
  /** Whether the resource that an event is about is claimed as well as the delivery. */
  reconcile?: boolean
  /** Called with the store's error when the store has failed, and when a claim is lost. */
  onTrouble: (error: unknown, job: Job) => void
}

/**
 * The idempotency store, and the claims that this process holds. The claims are renewed while their handlers run.
 *
 * Only `begin` can fail a delivery. The other methods are called after handlers have run, and a sender must not be told that a processed
 * delivery has failed. Their errors are reported as trouble, and at worst a later duplicate finds the delivery unfinished.
 */
export class Claims {
  readonly #held = new Set<Held>()
  #timer: NodeJS.Timeout | undefined
  // Bound here, because the timer serves the claims of many requests. It must neither run in the async context of one nor keep it in memory.
  readonly #startTimer = inContext(() => setInterval(() => this.#renewAll(), this.options.lease / 3).unref())

  /** Claims whose renewal has failed, to be renewed again soon: once their lease is over, any process may take them. */
  readonly #overdue = new Set<Held>()
  #retry: NodeJS.Timeout | undefined
  readonly #startRetry = inContext(() => setTimeout(() => this.#renewOverdue(), Math.min(MAX_RETRY, this.options.lease / 10)).unref())

  constructor (readonly options: ClaimsOptions) {}

  /**
   * Claims a delivery and, with `reconcile`, the resource that its event is about, so that the handlers run once even if two deliveries report
   * the same event. The result is `done` or `running` if either of the two is. `finished` holds the handlers that succeeded for either.
   *
   * @throws FST_OPENAI_WEBHOOK_UNAVAILABLE
   */
  begin (key: string, job: Job): MaybePromise<Begun> {
    const resourceKey = this.options.reconcile === true ? resourceKeyOf(job) : undefined
    const begun = this.#begin(key, job)
    return resourceKey === undefined ? begun : then(begun, claim => claim.state === 'claimed' ? this.#beginResource(resourceKey, claim) : claim)
  }

  /** Claims the resource too. If it is not free, the claim on the delivery is settled at once, so that no delivery waits for another. */
  #beginResource (key: string, claim: Held): MaybePromise<Begun> {
    return after<Begun, Begun>(() => this.#begin(key, claim.job), resource => {
      if (resource.state === 'claimed') {
        const held: Held = { ...claim, finished: union(claim.finished, resource.finished), resource }
        this.#held.delete(claim)
        this.#held.add(held)
        return held
      }
      // Another delivery has reported the same event, and was processed or is being processed.
      return then(resource.state === 'done' ? this.complete(claim) : this.release(claim), () => resource)
    }, error => then(this.release(claim), () => { throw error }))
  }

  #begin (key: string, job: Job): MaybePromise<Begun> {
    const { store, lease } = this.options
    return tryOr<Begun>(() => then(store.begin(key, lease), claim => this.#checked(key, job, claim)), unavailable)
  }

  /** Whether the claim is held, as far as this process knows. */
  holds (claim: Held): boolean { return this.#held.has(claim) && (claim.resource === undefined || this.#held.has(claim.resource)) }

  checkpoint (claim: Held, handler: string): MaybePromise<void> {
    const { store, onTrouble } = this.options
    const { key, job, token, resource } = claim
    return both(resource && this.checkpoint(resource, handler), tryOr(() => store.checkpoint(key, token, handler), error => onTrouble(error, job)))
  }

  /**
   * Completes the resource first: if the process crashes in between, the repeated delivery finds that the resource has been processed. Both calls
   * are made in one turn, so that a store that groups its writes makes one commit of them.
   */
  complete (claim: Held): MaybePromise<void> {
    const { store, retention, onTrouble } = this.options
    const { key, job, token, resource } = claim
    const resourceCompleted = resource && this.complete(resource)
    // A claim that is no longer held was reported as lost when its renewal failed.
    const isHeld = this.#held.delete(claim)
    return both(resourceCompleted, tryOr<void>(() => then(store.complete(key, token, retention), held => {
      if (held === false && isHeld) onTrouble(this.#lost(claim, 'before its success was on record: what took it over may run it again'), job)
    }), error => onTrouble(error, job)))
  }

  release (claim: Held): MaybePromise<void> {
    const { store, onTrouble } = this.options
    const { key, job, token, resource } = claim
    const resourceReleased = resource && this.release(resource)
    this.#held.delete(claim)
    return both(resourceReleased, tryOr(() => store.release(key, token), error => onTrouble(error, job)))
  }

  /** Checks the answer, because a user's store may return anything, and a delivery whose claim cannot be settled would hang. */
  #checked (key: string, job: Job, claim: Claim): Begun {
    if (claim.state === 'done' || claim.state === 'running') return claim
    if (claim.state !== 'claimed' || typeof claim.token !== 'string' || !Array.isArray(claim.finished)) {
      throw new TypeError('expected the store\'s begin() to answer { state: "claimed", token, finished }, { state: "running" } or { state: "done" }')
    }
    // One timer renews all claims, and stops when there are none. A quick delivery is over before the timer fires.
    this.#timer ??= this.#startTimer()
    const held: Held = { state: 'claimed', key, job, token: claim.token, finished: claim.finished, resource: undefined }
    this.#held.add(held)
    return held
  }

  #renewAll (): void {
    if (this.#held.size === 0) {
      clearInterval(this.#timer)
      this.#timer = undefined
    }
    // Reported once per round, because a store that cannot be reached fails all renewals, which may be hundreds.
    let isReported = false
    const onFailure = (error: unknown, { job }: Held): void => {
      if (!isReported) this.options.onTrouble(error, job)
      isReported = true
    }
    for (const claim of [...this.#held]) {
      tryOr<void>(async () => await this.#renew(claim), error => {
        onFailure(error, claim)
        this.#renewSoon(claim)
      })
    }
  }

  #renewSoon (claim: Held): void {
    this.#overdue.add(claim)
    this.#retry ??= this.#startRetry()
  }

  #renewOverdue (): void {
    this.#retry = undefined
    const claims = [...this.#overdue].filter(claim => this.#held.has(claim))
    this.#overdue.clear()
    for (const claim of claims) tryOr<void>(async () => await this.#renew(claim), () => this.#renewSoon(claim))
  }

  async #renew (claim: Held): Promise<void> {
    const { store, lease, onTrouble } = this.options
    const extended = await store.extend(claim.key, claim.token, lease)
    if (!extended && this.#held.delete(claim)) onTrouble(this.#lost(claim, 'before it could be renewed'), claim.job)
  }

  #lost ({ key }: Held, before: string): Error {
    return new Error(`the claim on ${key} was lost: its lease of ${this.options.lease} ms ran out ${before}`)
  }
}

function unavailable (cause: unknown): never {
  throw new Unavailable({ cause })
}

/** The names of both lists, without duplicates. */
export function union (names: readonly string[] = [], others: readonly string[] = []): readonly string[] {
  return others.length === 0 ? names : [...new Set([...names, ...others])]
}
