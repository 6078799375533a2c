import type { MaybePromise } from '../maybe-promise.ts'

export type Claim =
  /** The caller may run the handlers that are not in `finished`. */
  | { state: 'claimed', token: string, finished: readonly string[] }
  /** Another caller has the claim, and its lease has not expired. */
  | { state: 'running' }
  /** The delivery was completed within the retention. */
  | { state: 'done' }

/** ms for which a processed delivery is remembered, and the finished handlers of an unfinished delivery. OpenAI retries for up to 72 h. */
export const RETENTION = 75 * 3_600_000

/**
 * Remembers which deliveries are being processed and which have been.
 *
 * - `begin` is atomic: of any number of callers, in any number of processes, only one gets `claimed`.
 * - A claim lasts for `lease` ms unless it is extended. After that the next `begin` takes it over with a new token.
 * - `checkpoint`, `complete`, `extend` and `release` with a token that no longer holds the claim change nothing and do not throw.
 * - `finished` handlers are kept after `release` and after the lease has expired. An unfinished key is kept for at least 72 h.
 * - If the store fails, its methods reject or throw. After a failed `begin` the sender is answered 503, and OpenAI sends the delivery again.
 *   Failures of the other methods are reported as trouble.
 *
 * Methods may answer synchronously. `key` is at most ~2,700 characters of printable text.
 */
export interface IdempotencyStore {
  /** @param lease ms */
  begin (key: string, lease: number): MaybePromise<Claim>
  /** Records that this handler has succeeded. A later `begin` reports it in `finished`. */
  checkpoint (key: string, token: string, handler: string): MaybePromise<void>
  /**
   * Records that every handler has succeeded.
   *
   * @param retention ms for which `begin` answers `done`
   * @returns false if the store can tell that the claim was lost. The plugin reports that
   */
  complete (key: string, token: string, retention: number): MaybePromise<boolean | void>
  /** Renews the claim. @param lease ms @returns false if the claim was lost */
  extend (key: string, token: string, lease: number): MaybePromise<boolean>
  /** Gives up the claim, but keeps the finished handlers. */
  release (key: string, token: string): MaybePromise<void>
}
