/**
 * The number of inserts from one pruning to the next, and the maximum number of expired rows that one deletes. These are more than were inserted,
 * and few enough for one request to wait for.
 */
export const PRUNE_INTERVAL = 50
export const PRUNE_LIMIT = 100

/** Deletes expired rows in the background and in step with inserts, so that a table holds only live rows, whatever the rate of inserts. */
export class Pruning {
  // Starts at 0, so that a process that inserts only a few rows prunes too.
  #left = 0
  #running: Promise<void> | undefined
  #closed = false

  /** @param prune deletes up to PRUNE_LIMIT expired rows, and returns how many */
  constructor (readonly prune: () => Promise<number>) {}

  /** To be called after each insert. @param onFailure called when a pruning fails. The next pruning tries again */
  inserted (onFailure: (error: unknown) => void): void {
    if (this.#left-- > 0 || this.#running !== undefined || this.#closed) return
    this.#left = PRUNE_INTERVAL - 1
    this.#running = this.#run(onFailure)
  }

  async #run (onFailure: (error: unknown) => void): Promise<void> {
    try {
      // Waits for the end of a synchronous transaction that the insert may be part of.
      do await new Promise(resolve => setImmediate(resolve))
      while (!this.#closed && await this.prune() === PRUNE_LIMIT)
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
