/** How long each of many waits may last, and whether there is any time left. */
export class Deadline {
  closed = false
  readonly #waiting = new Map<NodeJS.Timeout, () => void>()

  /** @param ms how long each waits */
  constructor (readonly ms: number) {}

  /** Calls `expired` after `ms`, unless it is stopped before; at once where there is no time left. */
  start (expired: () => void): NodeJS.Timeout {
    // Unref'd: whoever waits holds a socket open, and the timer alone must not keep the process alive.
    const timer = setTimeout(() => this.#end(timer, expired), this.closed ? 0 : this.ms).unref()
    this.#waiting.set(timer, expired)
    return timer
  }

  stop (timer: NodeJS.Timeout | undefined): void {
    if (timer !== undefined && this.#waiting.delete(timer)) clearTimeout(timer)
  }

  /** There is no time left: all waits expire now. */
  close (): void {
    this.closed = true
    for (const [timer, expired] of this.#waiting) this.#end(timer, expired)
  }

  #end (timer: NodeJS.Timeout, expired: () => void): void {
    this.stop(timer)
    expired()
  }
}
