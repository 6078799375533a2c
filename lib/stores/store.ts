import type { MaybePromise } from '../maybe-promise.ts'

export type Claim =
  /** The caller may run the handlers that are not in `finished`. */
  | { state: 'claimed', token: string, finished: readonly string[] }
  /** Somebody else has the claim, and its lease has not run out. */
  | { state: 'running' }
  /** Completed within the retention. */
  | { state: 'done' }

/** ms for which a processed delivery is remembered, and what succeeded of an unfinished one. OpenAI retries for up to 72 h. */
export const RETENTION = 75 * 3_600_000

/**
 * Remembers which deliveries are being processed and which have been.
 *
 * - `begin` is atomic: of any number of callers, in any number of processes, one is told `claimed`.
 * - A claim lives for `lease` ms unless extended; then the next `begin` takes it over with a token of its own.
 * - A token fences: `checkpoint`, `complete`, `extend` and `release` with a token that no longer holds the claim change
 *   nothing and do not throw.
 * - `finished` handlers outlive `release` and an expired lease; an unfinished key is kept for at least 72 h.
 * - A failure of the store rejects (or throws); the caller answers 503 and nothing is lost.
 *
 * Methods may answer synchronously. `key` is at most ~2,700 characters of printable text.
 */
export interface IdempotencyStore {
  /** @param lease ms */
  begin (key: string, lease: number): MaybePromise<Claim>
  /** This handler has succeeded; a later `begin` reports it in `finished`. */
  checkpoint (key: string, token: string, handler: string): MaybePromise<void>
  /**
   * Every handler has succeeded.
   *
   * @param retention ms for which `begin` answers `done`
   * @returns false, where it can tell, when the claim was lost. The plugin reports that
   */
  complete (key: string, token: string, retention: number): MaybePromise<boolean | void>
  /** Renews the claim. @param lease ms @returns false when the claim was lost */
  extend (key: string, token: string, lease: number): MaybePromise<boolean>
  /** Gives the claim up; keeps what finished. */
  release (key: string, token: string): MaybePromise<void>
}
