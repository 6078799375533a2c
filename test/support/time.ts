/** Now, in s since the epoch, as a delivery is stamped. */
export const unixTime = (): number => Math.floor(Date.now() / 1_000)

/** A binary heap of what is to happen, by time and then in the order in which it was put in. */
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

/** `setTimeout`, as the plugin and the handlers call it. */
interface Timer { run: () => void, every: number | undefined, cleared: boolean, unref: () => Timer, ref: () => Timer }

/**
 * Time that only moves when it is told to, in Date.now, performance.now, timeouts and intervals; not in setImmediate, so that
 * streams and injected requests go on. Timers go off in their order and see the time they were set for, and a hundred
 * thousand of them are as quick as one.
 */
export class SteppedTime {
  /** ms since the epoch, and on the monotonic clock. */
  now: number
  readonly #timers = new Agenda<Timer>()
  /** The clock moves again by itself. */
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
      else clearTimeout(timer) // set before time stood still
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

  /** Sets the clock, back too. No timer goes off by that. */
  travel (to: number): void {
    this.now = to
  }
}
