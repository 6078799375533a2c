import { assertRules, wholeNumber } from '../checks.ts'
import { RETENTION } from './store.ts'
import type { Claim, IdempotencyStore } from './store.ts'

/** A delivery that is running or was given up. */
interface Entry {
  /** That of the claim; `undefined` while there is none. */
  token: string | undefined
  /** ms on the monotonic clock */
  leaseEnds: number
  /** Names of the handlers that have succeeded. */
  finished: readonly string[]
  /** When an entry without a claim is forgotten, in ticks. */
  forgottenAt: number
  /** How many claims had ended when the entry got its place in the Map. */
  placedAt: number
}

/** Of a processed delivery only the tick in which it is forgotten is kept, so that remembering it adds no object to the heap. */
type Known = Entry | number

/** A Map of V8 holds 2²⁴ entries, of which up to a half are holes that deleted entries have left. The rest is for deliveries that are running. */
const MOST = 8_000_000

const NONE: readonly string[] = Object.freeze([])

/** ms in a tick of the monotonic clock. 31 bits of ticks are 6.8 years, and V8 stores a number of 31 bits without an object. */
const TICK = 100

/**
 * Remembers deliveries in this process only: at most `max` that have been processed or given up, and in addition those that are being processed.
 * Forgets those first that ended first, and all of them when the process ends. The methods of the store never fail.
 *
 * @param options.max number of deliveries, up to 8,000,000; default 100,000, about 16 MB
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS
 */
export function memoryStore (options: { max?: number | undefined } = {}): IdempotencyStore {
  assertRules('memoryStore', options, { max: wholeNumber('deliveries', 1, MOST) })
  const { max = 100_000 } = options
  /** In the order in which they are forgotten. */
  const known = new Map<string, Known>()
  // One iterator for all searches, because a new one would pass the holes of all entries that were ever forgotten.
  let oldest: MapIterator<[string, Known]> | undefined
  let settled = 0
  let claims = 0
  let ends = 0
  // When its claim ends, an entry goes to the end of the Map only if as many others have ended since it got its place. Each move leaves a hole that
  // V8 passes whenever it looks for the entry, and a delivery that is attempted without end would soon take 40 µs.
  const slack = Math.max(1, Math.floor(max / 16))

  function held (key: string, token: string): Entry | undefined {
    const entry = known.get(key)
    return typeof entry === 'object' && entry.token === token ? entry : undefined
  }

  /** @param ms for which the delivery is remembered */
  function settle (key: string, entry: Entry, isProcessed: boolean, ms: number): void {
    // While the entry still counts as running, because it may have been the first to come, and is now the last to be forgotten.
    if (settled === max) forgetFirst()
    settled++
    ends++
    entry.token = undefined
    entry.forgottenAt = Math.ceil((performance.now() + ms) / TICK)
    const moves = ends - entry.placedAt > slack
    if (moves) {
      entry.placedAt = ends
      known.delete(key)
    }
    if (moves || isProcessed) known.set(key, isProcessed ? entry.forgottenAt : entry)
  }

  function forgetFirst (): void {
    oldest ??= known.entries()
    for (;;) {
      // There is a next entry, because the iterator has passed none that is settled.
      const [key, entry] = oldest.next().value!
      if (typeof entry === 'number' || entry.token === undefined) {
        known.delete(key)
        settled--
        return
      }
      entry.placedAt = -Infinity // The iterator does not come back, so the entry has to move.
    }
  }

  function claim (key: string, lease: number, finished: readonly string[], placedAt: number): Claim {
    const token = String(++claims)
    known.set(key, { token, leaseEnds: performance.now() + lease, finished, forgottenAt: 0, placedAt })
    return { state: 'claimed', token, finished: [...finished] }
  }

  return {
    begin (key, lease) {
      const entry = known.get(key)
      if (entry === undefined) return claim(key, lease, NONE, ends)
      const now = performance.now()
      if (typeof entry === 'number') {
        if (entry > now / TICK) return { state: 'done' }
        settled--
        return claim(key, lease, NONE, -Infinity)
      }
      if (entry.token === undefined) {
        settled--
        return claim(key, lease, entry.forgottenAt > now / TICK ? entry.finished : NONE, entry.placedAt)
      }
      return entry.leaseEnds > now ? { state: 'running' } : claim(key, lease, entry.finished, entry.placedAt)
    },
    checkpoint (key, token, handler) {
      const entry = held(key, token)
      // Not by a spread, which leaves room for 16 more.
      if (entry !== undefined) entry.finished = entry.finished.concat(handler)
    },
    complete (key, token, retention) {
      const entry = held(key, token)
      if (entry === undefined) return false
      settle(key, entry, true, retention)
      return true
    },
    extend (key, token, lease) {
      const entry = held(key, token)
      if (entry === undefined) return false
      entry.leaseEnds = performance.now() + lease
      return true
    },
    release (key, token) {
      const entry = held(key, token)
      if (entry !== undefined) settle(key, entry, false, RETENTION)
    }
  }
}
