/** Something that waits, and is told when it has waited for too long. */
export interface Expirable {
  /** ms on the monotonic clock; set by the deadline */
  expiresAt: number
  expired: () => void
}

/**
 * Many waits of one length on one timer: they expire in the order in which they came, so that only the first is ever
 * timed. A request pays for a place in a Set instead of a timer of its own.
 */
export class Deadline {
  readonly #waiting = new Set<Expirable>()
  #timer: NodeJS.Timeout | undefined

  /** @param ms how long each waits */
  constructor (readonly ms: number) {}

  /** Calls `expired` after `ms`, unless it is stopped before. */
  start (waiting: Expirable): void {
    waiting.expiresAt = performance.now() + this.ms
    this.#waiting.add(waiting)
    this.#timer ??= this.#arm(this.ms)
  }

  stop (waiting: Expirable): void {
    this.#waiting.delete(waiting)
  }

  #arm (ms: number): NodeJS.Timeout {
    // Unref'd: whoever waits here holds a socket open; the timer alone must not keep a process alive.
    return setTimeout(() => this.#expire(), Math.ceil(ms)).unref()
  }

  #expire (): void {
    this.#timer = undefined
    const now = performance.now()
    for (const waiting of this.#waiting) {
      if (waiting.expiresAt > now) {
        this.#timer = this.#arm(waiting.expiresAt - now)
        return
      }
      this.#waiting.delete(waiting)
      waiting.expired()
    }
  }
}
