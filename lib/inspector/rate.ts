/** The number of slots, and the length of each in ms. */
const SLOTS = 60
const SLOT = 5_000

/** Counts the deliveries, and the failed ones among them, over the last five minutes. */
export class Rate {
  readonly #total = new Array<number>(SLOTS).fill(0)
  readonly #failed = new Array<number>(SLOTS).fill(0)
  /** The slot of the last count: the number of slots since the process's clock began. */
  #last = 0

  /** @param now ms of `performance.now()` */
  came (now: number): void {
    this.#total[this.#slot(now)]!++
  }

  failed (now: number): void {
    this.#failed[this.#slot(now)]!++
  }

  /** Returns the counts, the oldest slot first. */
  read (now: number): { seconds: number, total: number[], failed: number[] } {
    const present = this.#slot(now)
    const inOrder = (counts: readonly number[]): number[] => [...counts.slice(present + 1), ...counts.slice(0, present + 1)]
    return { seconds: SLOT / 1_000, total: inOrder(this.#total), failed: inOrder(this.#failed) }
  }

  #slot (now: number): number {
    const slot = Math.floor(now / SLOT)
    for (let passed = Math.max(this.#last + 1, slot - SLOTS + 1); passed <= slot; passed++) {
      this.#total[passed % SLOTS] = 0
      this.#failed[passed % SLOTS] = 0
    }
    this.#last = Math.max(this.#last, slot)
    return this.#last % SLOTS
  }
}
