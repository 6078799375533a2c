import { InvalidOptions } from '../errors.ts'
import { RETENTION } from './store.ts'
import type { Claim, IdempotencyStore } from './store.ts'

interface Running {
  token: string
  /** ms on the monotonic clock */
  leaseEnds: number
  finished: string[]
}

/** A delivery that has been processed or released. */
interface Settled {
  readonly key: string
  /** The handlers that had succeeded when it was released; `undefined` once it has been processed. */
  finished: readonly string[] | undefined
  /** Seconds on the monotonic clock, when it is forgotten. A whole number, which V8 keeps without an allocation. */
  forgottenAt: number
  /** Its neighbours in the order in which deliveries were last seen. */
  earlier: Settled | undefined
  later: Settled | undefined
}

const NONE: readonly string[] = []

/**
 * Remembers deliveries in this process alone: at most `max` that have been processed or released, and those being processed
 * besides. Forgets the least recently seen first, and everything when the process ends. Never fails.
 *
 * @param options.max deliveries; default 100,000, about 16 MB
 */
export function memoryStore ({ max = 100_000 }: { max?: number } = {}): IdempotencyStore {
  if (!Number.isSafeInteger(max) || max < 1) throw new InvalidOptions(`expected memoryStore's max to be a whole number of deliveries, 1 or more, got ${String(max)}`)
  const running = new Map<string, Running>()
  const settled = new Map<string, Settled>()
  // The order of sight is a linked list and not that of the Map: to delete and set a key each time it is seen leaves a chain of
  // holes in V8's table, and a duplicate soon takes 40 µs or more.
  let first: Settled | undefined
  let last: Settled | undefined
  let claims = 0

  function held (key: string, token: string): Running | undefined {
    const claim = running.get(key)
    return claim?.token === token ? claim : undefined
  }

  /** @param ms for which it is remembered */
  function settle (key: string, finished: readonly string[] | undefined, ms: number): void {
    running.delete(key)
    const forgottenAt = Math.ceil((performance.now() + ms) / 1_000)
    const before = settled.get(key)
    if (before === undefined) {
      const entry = { key, finished, forgottenAt, earlier: undefined, later: undefined }
      settled.set(key, entry)
      append(entry)
      if (settled.size > max) forget(first!)
    } else {
      before.finished = finished
      before.forgottenAt = forgottenAt
      seen(before)
    }
  }

  function append (entry: Settled): void {
    entry.earlier = last
    if (last === undefined) first = entry
    else last.later = entry
    last = entry
  }

  function unlink (entry: Settled): void {
    const { earlier, later } = entry
    if (earlier === undefined) first = later
    else earlier.later = later
    if (later === undefined) last = earlier
    else later.earlier = earlier
    entry.earlier = entry.later = undefined
  }

  function seen (entry: Settled): void {
    unlink(entry)
    append(entry)
  }

  function forget (entry: Settled): void {
    unlink(entry)
    settled.delete(entry.key)
  }

  /** What is remembered of a delivery that nobody has claimed. */
  function recall (key: string, now: number): Settled | undefined {
    const entry = settled.get(key)
    if (entry === undefined || entry.forgottenAt > now / 1_000) return entry
    forget(entry)
    return undefined
  }

  return {
    begin (key, lease): Claim {
      const now = performance.now()
      const current = running.get(key)
      if (current !== undefined && current.leaseEnds > now) return { state: 'running' }
      const before = current === undefined ? recall(key, now) : undefined
      if (before !== undefined) {
        seen(before)
        if (before.finished === undefined) return { state: 'done' }
      }
      const token = String(++claims)
      const finished = current?.finished ?? before?.finished
      running.set(key, { token, leaseEnds: now + lease, finished: finished === undefined ? [] : [...finished] })
      return { state: 'claimed', token, finished: finished === undefined ? NONE : [...finished] }
    },
    checkpoint (key, token, handler) {
      held(key, token)?.finished.push(handler)
    },
    complete (key, token, retention) {
      if (held(key, token) === undefined) return false
      settle(key, undefined, retention)
      return true
    },
    extend (key, token, lease) {
      const claim = held(key, token)
      if (claim === undefined) return false
      claim.leaseEnds = performance.now() + lease
      return true
    },
    release (key, token) {
      const claim = held(key, token)
      // slice(): without the spare room of an array that has grown.
      if (claim !== undefined) settle(key, claim.finished.slice(), RETENTION)
    }
  }
}
