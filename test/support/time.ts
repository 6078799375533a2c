/** The present time in Unix seconds, for the timestamp of a delivery. */
export const unixTime = (): number => Math.floor(Date.now() / 1_000)

/** A binary heap of future events, ordered by time and then by insertion. */
export class Agenda<T> {
  readonly #heap: Array<{ at: number, order: number, what: T }> = []
  #orders = 0

  get size (): number { return this.#heap.length }
  get next (): number { return this.#heap[0]?.at ?? Number.POSITIVE_INFINITY }

  add (at: number, what: T): void {
    const heap = this.#heap
    const entry = { at, order: this.#orders++, what }
    let index = heap.length
    while (index > 0) {
      const parent = (index - 1) >> 1
      if (!this.#before(entry, heap[parent]!)) break
      heap[index] = heap[parent]!
      index = parent
    }
    heap[index] = entry
  }

  take (): T {
    const heap = this.#heap
    const first = heap[0]!
    const last = heap.pop()!
    if (heap.length === 0) return first.what
    let index = 0
    for (;;) {
      let child = 2 * index + 1
      if (child >= heap.length) break
      if (child + 1 < heap.length && this.#before(heap[child + 1]!, heap[child]!)) child++
      if (!this.#before(heap[child]!, last)) break
      heap[index] = heap[child]!
      index = child
    }
    heap[index] = last
    return first.what
  }

  #before (a: { at: number, order: number }, b: { at: number, order: number }): boolean {
    return a.at < b.at || (a.at === b.at && a.order < b.order)
  }
}

/** The result of setTimeout(), as far as the plugin and the handlers use it. */
interface Timer { run: () => void, every: number | undefined, cleared: boolean, unref: () => Timer, ref: () => Timer }

/**
 * A clock that moves only when the test moves it. It replaces Date.now, performance.now, timeouts and intervals. It does not replace
 * setImmediate, so that streams and injected requests continue. Timers fire in order and see the time for which they were set. A hundred
 * thousand timers are as fast as one.
 */
export class SteppedTime {
  /** ms since the epoch, also on the monotonic clock. */
  now: number
  readonly #timers = new Agenda<Timer>()
  /** Restores the real clock. */
  readonly exit: () => void

  constructor (t: { teardown: (fn: () => unknown) => void }, now = Date.now()) {
    this.now = now
    const { setTimeout, setInterval, clearTimeout, clearInterval } = globalThis
    const { now: dateNow } = Date
    const add = (run: () => void, ms: number, every?: number): Timer => {
      const timer: Timer = { run, every, cleared: false, unref: () => timer, ref: () => timer }
      this.#timers.add(this.now + Math.max(ms, 1), timer)
      return timer
    }
    const clear = (timer: Timer | NodeJS.Timeout | undefined): void => {
      if (timer !== undefined && 'cleared' in timer) timer.cleared = true
      else clearTimeout(timer) // set before the clock was replaced
    }
    Object.assign(globalThis, {
      setTimeout: (run: (...args: unknown[]) => void, ms = 1, ...args: unknown[]) => add(() => run(...args), ms),
      setInterval: (run: (...args: unknown[]) => void, ms = 1, ...args: unknown[]) => add(() => run(...args), ms, Math.max(ms, 1)),
      clearTimeout: clear,
      clearInterval: clear
    })
    Date.now = () => Math.floor(this.now)
    performance.now = () => this.now
    this.exit = () => {
      Object.assign(globalThis, { setTimeout, setInterval, clearTimeout, clearInterval })
      Date.now = dateNow
      Reflect.deleteProperty(performance, 'now')
    }
    t.teardown(this.exit)
  }

  get stamp (): number { return this.now }

  advance (ms: number): void {
    this.advanceTo(this.now + ms)
  }

  advanceTo (to: number): void {
    while (this.#timers.next <= to) {
      this.now = Math.max(this.now, this.#timers.next)
      const timer = this.#timers.take()
      if (timer.cleared) continue
      if (timer.every !== undefined) this.#timers.add(this.now + timer.every, timer)
      timer.run()
    }
    this.now = Math.max(this.now, to)
  }

  /** Sets the clock, also backwards. No timer fires. */
  travel (to: number): void {
    this.now = to
  }
}
