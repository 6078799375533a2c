import { AsyncResource } from 'node:async_hooks'
import { LinkedList } from './linked-list.ts'
import type { Linked } from './linked-list.ts'

/** Something that waits, and is told when it has waited for too long. */
export interface Expirable extends Linked<Expirable> {
  /** ms on the monotonic clock; set by the deadline, 0 while it does not wait */
  expiresAt: number
  expired: () => void
}

/**
 * Many waits of one length on one timer: they expire in the order in which they came, so that only the first is ever
 * timed. A request pays for two links in a list instead of a timer of its own.
 */
export class Deadline {
  readonly #waiting = new LinkedList<Expirable>()
  closed = false
  #timer: NodeJS.Timeout | undefined
  // What expires is of many requests: the async context of whichever armed the timer is not theirs.
  readonly #expireOutside = AsyncResource.bind(() => this.#expire())

  /** @param ms how long each waits */
  constructor (readonly ms: number) {}

  /** Calls `expired` after `ms`, unless it is stopped before; at once where it is closed. */
  start (waiting: Expirable): void {
    if (this.closed) return waiting.expired()
    waiting.expiresAt = performance.now() + this.ms
    this.#waiting.append(waiting)
    this.#timer ??= this.#arm(this.ms)
  }

  /** Does nothing where it does not wait. */
  stop (waiting: Expirable): void {
    if (waiting.expiresAt === 0) return
    waiting.expiresAt = 0
    this.#waiting.remove(waiting)
  }

  /** There is no time left: all waits expire now, and those to come as they begin. */
  close (): void {
    this.closed = true
    for (let waiting = this.#waiting.first; waiting !== undefined; waiting = this.#waiting.first) this.#end(waiting)
  }

  #end (waiting: Expirable): void {
    this.stop(waiting)
    waiting.expired()
  }

  #arm (ms: number): NodeJS.Timeout {
    // Unref'd: whoever waits here holds a socket open; the timer alone must not keep a process alive.
    return setTimeout(this.#expireOutside, Math.ceil(ms)).unref()
  }

  #expire (): void {
    this.#timer = undefined
    const now = performance.now()
    for (let waiting = this.#waiting.first; waiting !== undefined; waiting = this.#waiting.first) {
      if (waiting.expiresAt > now) {
        this.#timer = this.#arm(waiting.expiresAt - now)
        return
      }
      this.#end(waiting)
    }
  }
}
