/** Inserts between two looks for expired rows, and how many of those go at once: more than came. */
const INTERVAL = 50
export const PRUNE_LIMIT = 100

/** Deletes expired rows in the background, in step with inserts, so that a table holds what is alive whatever the rate. */
export class Pruning {
  readonly #prune: () => Promise<number>
  // A process that ends before it has inserted many prunes as well.
  #left = 0
  #running: Promise<void> | undefined
  #closed = false

  /** @param prune deletes up to PRUNE_LIMIT expired rows, and says how many it did */
  constructor (prune: () => Promise<number>) {
    this.#prune = prune
  }

  /** After each insert. @param onFailure told when it fails; the next look tries again */
  inserted (onFailure: (error: unknown) => void): void {
    if (this.#left-- > 0 || this.#running !== undefined || this.#closed) return
    this.#left = INTERVAL - 1
    this.#running = this.#run(onFailure)
  }

  async #run (onFailure: (error: unknown) => void): Promise<void> {
    try {
      // Where the insert is part of a synchronous transaction, that is over then.
      do await new Promise(resolve => setImmediate(resolve))
      while (!this.#closed && await this.#prune() === PRUNE_LIMIT)
    } catch (error) {
      onFailure(error)
    }
    this.#running = undefined
  }

  async close (): Promise<void> {
    this.#closed = true
    await this.#running
  }
}
