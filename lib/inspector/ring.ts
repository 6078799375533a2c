import type { Entry } from './entry.ts'
import { Pages } from './pages.ts'

/** The last deliveries, bounded by their number and their size in bytes. */
export class Ring {
  readonly #entries: Array<Entry | undefined>
  readonly #maxBytes: number
  readonly #dropped: (entry: Entry) => void
  /** Not shared between rings, because a delivery that one ring keeps for long would hold a page of the other. */
  readonly #pages = new Pages()
  #first = 0
  #size = 0
  #bytes = 0

  /** @param dropped called with each entry that is removed to make room */
  constructor (readonly max: number, maxBytes: number, dropped: (entry: Entry) => void) {
    this.#entries = new Array<Entry | undefined>(max).fill(undefined)
    this.#maxBytes = maxBytes
    this.#dropped = dropped
  }

  get bytes (): number { return this.#bytes }

  add (entry: Entry): void {
    if (this.#size === this.max) this.#dropFirst()
    this.#entries[(this.#first + this.#size) % this.max] = entry
    this.#size++
    this.#bytes += entry.size
    entry.kept = true
    entry.copyBody(this.#pages)
    this.#shrink()
  }

  /** Counts further bytes of a delivery. A delivery may still be running although the ring has dropped it. */
  grow (entry: Entry, bytes: number): void {
    if (!entry.kept) return
    entry.size += bytes
    this.#bytes += bytes
    this.#shrink()
  }

  * [Symbol.iterator] (): Generator<Entry> {
    for (let i = 0; i < this.#size; i++) yield this.#entries[(this.#first + i) % this.max]!
  }

  #shrink (): void {
    while (this.#bytes > this.#maxBytes) this.#dropFirst()
  }

  #dropFirst (): void {
    const entry = this.#entries[this.#first]!
    this.#entries[this.#first] = undefined
    this.#first = (this.#first + 1) % this.max
    this.#size--
    this.#bytes -= entry.size
    entry.kept = false
    entry.dropBody()
    this.#dropped(entry)
  }
}
