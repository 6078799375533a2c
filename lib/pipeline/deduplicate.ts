import { AsyncResource } from 'node:async_hooks'
import { Unavailable } from '../errors.ts'
import { attempt, isPromise } from '../maybe-promise.ts'
import type { Claim, IdempotencyStore, MaybePromise } from '../stores/store.ts'

/** A delivery whose claim this process may hold. */
interface Holder {
  readonly key: string
  readonly claim: { readonly token: string } | undefined
  /** Whether the claim has been given up or completed, or was lost: it is not to be renewed. */
  settled: boolean
}

export interface ClaimsOptions {
  store: IdempotencyStore
  /** ms */
  lease: number
  /** ms */
  retention: number
  /** Told what the store could not record. */
  onTrouble: (error: unknown) => void
}

/**
 * The store, with the claims this process holds: renewed while their handlers run.
 *
 * Only `begin` can fail. What comes after it happens once handlers have run, and a sender is never told that a
 * processed delivery was not: trouble is reported, and at worst a later duplicate finds the delivery unfinished.
 */
export class Claims {
  readonly #store: IdempotencyStore
  readonly #lease: number
  readonly #retention: number
  readonly #onTrouble: (error: unknown) => void
  #holders: ReadonlyArray<ReadonlyMap<string, Holder>> = []
  #timer: NodeJS.Timeout | undefined
  // The claims are of many requests: the async context of whichever set the timer is not theirs.
  readonly #renewOutside = AsyncResource.bind(() => this.#renewAll())

  constructor ({ store, lease, retention, onTrouble }: ClaimsOptions) {
    this.#store = store
    this.#lease = lease
    this.#retention = retention
    this.#onTrouble = onTrouble
  }

  /** Whose claims are renewed. */
  renewing (holders: ReadonlyArray<ReadonlyMap<string, Holder>>): void {
    this.#holders = holders
  }

  /** @throws FST_OPENAI_WEBHOOK_UNAVAILABLE */
  begin (key: string): MaybePromise<Claim> {
    // One timer for all claims, which stops when it finds none: a delivery that is quick never meets it.
    this.#timer ??= setInterval(this.#renewOutside, this.#lease / 3).unref()
    try {
      const claim = this.#store.begin(key, this.#lease)
      return isPromise<Claim>(claim) ? Promise.resolve(claim).then(checked).then(undefined, unavailable) : checked(claim)
    } catch (error) {
      return unavailable(error)
    }
  }

  checkpoint ({ key, claim }: Holder, handler: string): MaybePromise<void> {
    return attempt(() => this.#store.checkpoint(key, claim!.token, handler), this.#onTrouble)
  }

  complete (holder: Holder): MaybePromise<void> {
    const wasLost = holder.settled // which has been told
    holder.settled = true
    try {
      const completed = this.#store.complete(holder.key, holder.claim!.token, this.#retention)
      if (isPromise<boolean | void>(completed)) return Promise.resolve(completed).then(held => this.#completed(holder, held, wasLost), this.#onTrouble)
      this.#completed(holder, completed, wasLost)
    } catch (error) {
      this.#onTrouble(error)
    }
  }

  #completed ({ key }: Holder, held: boolean | void, wasLost: boolean): void {
    if (held === false && !wasLost) this.#onTrouble(this.#lost(key, 'before its success was on record: what took it over may run it again'))
  }

  release (holder: Holder): MaybePromise<void> {
    holder.settled = true
    return attempt(() => this.#store.release(holder.key, holder.claim!.token), this.#onTrouble)
  }

  #renewAll (): void {
    const holders = this.#holders.flatMap(map => [...map.values()])
    if (holders.length === 0) {
      clearInterval(this.#timer)
      this.#timer = undefined
    }
    for (const holder of holders) {
      if (holder.claim !== undefined && !holder.settled) attempt(async () => await this.#renew(holder, holder.claim!.token), this.#onTrouble)
    }
  }

  async #renew (holder: Holder, token: string): Promise<void> {
    if (await this.#store.extend(holder.key, token, this.#lease) || holder.settled) return
    holder.settled = true
    this.#onTrouble(this.#lost(holder.key, 'before it could be renewed'))
  }

  #lost (key: string, before: string): Error {
    return new Error(`the claim on ${key} was lost: its lease of ${this.#lease} ms ran out ${before}`)
  }
}

function unavailable (cause: unknown): never {
  throw new Unavailable({ cause })
}

/** A store of the user's may answer something else, and a delivery that nobody can settle would hang. */
function checked (claim: Claim): Claim {
  const { state } = claim
  if (state === 'done' || state === 'running' || (state === 'claimed' && Array.isArray(claim.finished))) return claim
  throw new TypeError('expected the store\'s begin() to answer { state: "claimed", token, finished }, { state: "running" } or { state: "done" }')
}
