import { LRUCache } from 'lru-cache'
import { InvalidOptions } from '../errors.ts'
import { UNFINISHED_RETENTION } from './store.ts'
import type { Claim, IdempotencyStore } from './store.ts'

interface Running {
  token: string
  /** ms on the monotonic clock */
  leaseEnds: number
  finished: string[]
}

const NONE: readonly string[] = []

/** ms; how coarsely the age of a remembered delivery is taken, against a retention of days. */
const RESOLUTION = 1_000

/**
 * Remembers deliveries in this process only: at most `max` that have been processed or given up, the least recently
 * seen forgotten first, and besides them those being processed. Never fails; forgets everything when the process ends.
 *
 * @param options.max deliveries; default 100,000, about 15 MB
 */
export function memoryStore ({ max = 100_000 }: { max?: number } = {}): IdempotencyStore {
  if (!Number.isSafeInteger(max) || max < 1) throw new InvalidOptions(`expected memoryStore's max to be a whole number of deliveries, 1 or more, got ${String(max)}`)
  const running = new Map<string, Running>()
  // Done, or the handlers that had finished when it was released.
  const settled = new LRUCache<string, true | string[]>({ max, ttl: UNFINISHED_RETENTION, ttlResolution: RESOLUTION })
  let claims = 0

  function held (key: string, token: string): Running | undefined {
    const claim = running.get(key)
    return claim?.token === token ? claim : undefined
  }

  return {
    begin (key, lease): Claim {
      const now = performance.now()
      const current = running.get(key)
      if (current !== undefined && current.leaseEnds > now) return { state: 'running' }
      const remembered = current?.finished ?? settled.get(key)
      if (remembered === true) return { state: 'done' }
      const token = String(++claims)
      running.set(key, { token, leaseEnds: now + lease, finished: remembered ?? [] })
      return { state: 'claimed', token, finished: remembered === undefined ? NONE : [...remembered] }
    },
    checkpoint (key, token, handler) {
      held(key, token)?.finished.push(handler)
    },
    complete (key, token, retention) {
      if (held(key, token) === undefined) return
      running.delete(key)
      settled.set(key, true, { ttl: retention })
    },
    extend (key, token, lease) {
      const claim = held(key, token)
      if (claim === undefined) return false
      claim.leaseEnds = performance.now() + lease
      return true
    },
    release (key, token) {
      const claim = held(key, token)
      if (claim === undefined) return
      running.delete(key)
      settled.set(key, claim.finished.slice()) // without the room that an array takes to grow
    }
  }
}
