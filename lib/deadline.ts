/** The time limit of many waits. Once it is closed, no time is left for any of them. */
export class Deadline {
  closed = false
  readonly #waiting = new Map<NodeJS.Timeout, () => void>()

  /** @param ms that each wait may last */
  constructor (readonly ms: number) {}

  /** Calls `expired` after `ms`, unless the wait is stopped before. If the deadline is closed, calls it in the next turn. */
  start (expired: () => void): NodeJS.Timeout {
    // unref(): the socket of the request keeps the process alive, and the timer alone must not.
    const timer = setTimeout(() => this.#end(timer, expired), this.closed ? 0 : this.ms).unref()
    this.#waiting.set(timer, expired)
    return timer
  }

  stop (timer: NodeJS.Timeout | undefined): void {
    if (timer !== undefined && this.#waiting.delete(timer)) clearTimeout(timer)
  }

  /** Leaves no more time, so that all waits expire now. */
  close (): void {
    this.closed = true
    for (const [timer, expired] of this.#waiting) this.#end(timer, expired)
  }

  #end (timer: NodeJS.Timeout, expired: () => void): void {
    this.stop(timer)
    expired()
  }
}
