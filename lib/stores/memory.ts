import { InvalidOptions } from '../errors.ts'
import { UNFINISHED_RETENTION } from './store.ts'
import type { Claim, IdempotencyStore } from './store.ts'

interface Running {
  token: string
  /** ms on the monotonic clock */
  leaseEnds: number
  finished: string[]
}

/** The second of the monotonic clock at which a processed delivery is forgotten: a number takes no room beside its key. */
type Done = number

/** Given up, with the handlers that had finished. */
interface Released {
  readonly finished: readonly string[]
  readonly forgottenAt: number
}

const NONE: readonly string[] = []

/**
 * Remembers deliveries in this process only: at most `max` that have been processed or given up, the least recently
 * seen forgotten first, and besides them those being processed. Never fails; forgets everything when the process ends.
 *
 * @param options.max deliveries; default 100,000, about 16 MB
 */
export function memoryStore ({ max = 100_000 }: { max?: number } = {}): IdempotencyStore {
  if (!Number.isSafeInteger(max) || max < 1) throw new InvalidOptions(`expected memoryStore's max to be a whole number of deliveries, 1 or more, got ${String(max)}`)
  const running = new Map<string, Running>()
  /** The least recently seen comes first. No key is in both. */
  const settled = new Map<string, Done | Released>()
  let oldest: Iterator<string> | undefined
  let claims = 0

  function held (key: string, token: string): Running | undefined {
    const claim = running.get(key)
    return claim?.token === token ? claim : undefined
  }

  function settle (key: string, as: Done | Released): void {
    running.delete(key)
    settled.set(key, as)
    if (settled.size <= max) return
    // One iterator for good: a new one would step over all that has been deleted before it, some µs of a delivery's 30. It
    // cannot come to the end, since what it has given is deleted at once and what is new comes last.
    oldest ??= settled.keys()
    settled.delete(oldest.next().value)
  }

  /** What is remembered of a delivery that is not running. */
  function recall (key: string, now: number): Done | Released | undefined {
    const as = settled.get(key)
    if (as === undefined) return undefined
    settled.delete(key)
    return (typeof as === 'number' ? as : as.forgottenAt) > now / 1_000 ? as : undefined
  }

  return {
    begin (key, lease): Claim {
      const now = performance.now()
      const current = running.get(key)
      if (current !== undefined && current.leaseEnds > now) return { state: 'running' }
      const before = current ?? recall(key, now)
      if (typeof before === 'number') {
        settled.set(key, before) // it has been seen
        return { state: 'done' }
      }
      const token = String(++claims)
      const finished = before === undefined ? [] : [...before.finished]
      running.set(key, { token, leaseEnds: now + lease, finished })
      return { state: 'claimed', token, finished: before === undefined ? NONE : [...finished] }
    },
    checkpoint (key, token, handler) {
      held(key, token)?.finished.push(handler)
    },
    complete (key, token, retention) {
      if (held(key, token) !== undefined) settle(key, secondAfter(retention))
    },
    extend (key, token, lease) {
      const claim = held(key, token)
      if (claim === undefined) return false
      claim.leaseEnds = performance.now() + lease
      return true
    },
    release (key, token) {
      const claim = held(key, token)
      // The array, without the room that it takes to grow.
      if (claim !== undefined) settle(key, { finished: claim.finished.slice(), forgottenAt: secondAfter(UNFINISHED_RETENTION) })
    }
  }
}

/** @param ms from now */
function secondAfter (ms: number): number {
  return Math.ceil((performance.now() + ms) / 1_000)
}
