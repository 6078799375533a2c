import type { Failures } from '../failures.ts'
import type { Claims } from '../pipeline/deduplicate.ts'
import type { Runner } from '../runners/runner.ts'
import { tryOr } from '../maybe-promise.ts'
import { within } from '../within.ts'
import type { Works } from './work.ts'

/** The most turns of the event loop for which closing goes on after `closeTimeout`. */
const TURNS = 10

/**
 * Refuses new deliveries, closes the runner, and waits until this process has no delivery left or `closeTimeout` is over.
 *
 * @param abort aborted when `closeTimeout` is over
 * @param closeTimeout ms
 */
export async function drain (works: Works, claims: Claims, runner: Runner | undefined, failures: Failures, abort: AbortController, closeTimeout: number): Promise<void> {
  works.closing = true
  async function drained (): Promise<void> {
    const runnerClosed = tryOr(() => runner?.close?.(abort.signal), error => failures.trouble(error))
    await Promise.all([runnerClosed, works.drained()])
    // A user's runner may have asked to keep claims that it then did not use.
    await Promise.all([...works.keptClaims.keys()].map(async key => await claims.release(works.takeKeptClaim(key)!)))
  }

  await within(drained(), closeTimeout, async () => {
    abort.abort(new Error('the app is closing and closeTimeout is over'))
    // What ends on the signal records its end, and SQLite commits once a turn: checkpoints, then the claim, then the attempt. The user may close
    // the database right after the app.
    for (let n = 0; n < TURNS; n++) await new Promise(resolve => setImmediate(resolve))
  })
}
