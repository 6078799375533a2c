import { assertCount, assertNames } from '../checks.ts'
import { RETENTION } from './store.ts'
import type { Claim, IdempotencyStore } from './store.ts'

interface HeldClaim {
  readonly token: string
  /** ms on the monotonic clock */
  leaseEnds: number
}

/** What is known about a delivery. */
interface Entry {
  readonly key: string
  /** Absent once the delivery has been processed or released. */
  claim: HeldClaim | undefined
  /** Names of the handlers that have succeeded; `undefined` once the delivery has been processed. */
  finished: readonly string[] | undefined
  /** When the entry is forgotten, in ticks of the monotonic clock. A whole number of up to 31 bits, which V8 stores without an allocation. */
  forgottenAt: number
  /** The neighbours in the list of entries without a claim, which are in the order in which they were last seen. */
  earlier: Entry | undefined
  later: Entry | undefined
}

const NONE: readonly string[] = []

/** ms in a tick. 31 bits of ticks are 6.8 years. */
const TICK = 100

/**
 * Remembers deliveries in this process only: at most `max` that have been processed or released, and in addition those that are being processed.
 * Forgets the least recently seen delivery first, and all of them when the process ends. The methods of the store never fail.
 *
 * @param options.max number of deliveries; default 100,000, about 23 MB
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS
 */
export function memoryStore (options: { max?: number } = {}): IdempotencyStore {
  assertNames('memoryStore', options, ['max'])
  const { max = 100_000 } = options
  assertCount('memoryStore', 'max', max, 1)
  const entries = new Map<string, Entry>()
  // A linked list keeps the order in which entries were last seen. The order of the Map is not used, because deleting and setting a key each time
  // leaves a chain of holes in V8's table, and a duplicate would soon take 40 µs or more.
  let first: Entry | undefined
  let last: Entry | undefined
  let listed = 0
  let claims = 0

  function append (entry: Entry): void {
    entry.earlier = last
    if (last === undefined) first = entry
    else last.later = entry
    last = entry
    listed++
  }

  function unlink (entry: Entry): void {
    const { earlier, later } = entry
    if (earlier === undefined) first = later
    else earlier.later = later
    if (later === undefined) last = earlier
    else later.earlier = earlier
    entry.earlier = entry.later = undefined
    listed--
  }

  function forget (entry: Entry): void {
    unlink(entry)
    entries.delete(entry.key)
  }

  function held (key: string, token: string): Entry | undefined {
    const entry = entries.get(key)
    return entry?.claim?.token === token ? entry : undefined
  }

  /** @param ms for which the entry is remembered */
  function settle (entry: Entry, finished: readonly string[] | undefined, ms: number): void {
    entry.claim = undefined
    entry.finished = finished
    entry.forgottenAt = Math.ceil((performance.now() + ms) / TICK)
    append(entry)
    if (listed > max) forget(first!)
  }

  /** Returns what is remembered of a delivery. An entry without a claim becomes the most recently seen one. */
  function recall (key: string, now: number): Entry | undefined {
    const entry = entries.get(key)
    if (entry === undefined || entry.claim !== undefined) return entry
    if (entry.forgottenAt <= now / TICK) {
      forget(entry)
      return undefined
    }
    unlink(entry)
    append(entry)
    return entry
  }

  return {
    begin (key, lease): Claim {
      const now = performance.now()
      const known = recall(key, now)
      if (known?.claim !== undefined && known.claim.leaseEnds > now) return { state: 'running' }
      if (known !== undefined && known.finished === undefined) return { state: 'done' }
      const token = String(++claims)
      const claim = { token, leaseEnds: now + lease }
      if (known === undefined) {
        entries.set(key, { key, claim, finished: NONE, forgottenAt: 0, earlier: undefined, later: undefined })
        return { state: 'claimed', token, finished: NONE }
      }
      if (known.claim === undefined) unlink(known)
      known.claim = claim
      return { state: 'claimed', token, finished: [...known.finished!] }
    },
    checkpoint (key, token, handler) {
      const entry = held(key, token)
      // Not by a spread, which leaves room for 16 more.
      if (entry !== undefined) entry.finished = entry.finished!.concat(handler)
    },
    complete (key, token, retention) {
      const entry = held(key, token)
      if (entry === undefined) return false
      settle(entry, undefined, retention)
      return true
    },
    extend (key, token, lease) {
      const entry = held(key, token)
      if (entry === undefined) return false
      entry.claim!.leaseEnds = performance.now() + lease
      return true
    },
    release (key, token) {
      const entry = held(key, token)
      if (entry !== undefined) settle(entry, entry.finished, RETENTION)
    }
  }
}
