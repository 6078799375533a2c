import type { Failures } from '../failures.ts'
import type { Claims } from '../pipeline/deduplicate.ts'
import type { Runner } from '../runners/runner.ts'
import { tryOr } from '../maybe-promise.ts'
import { within } from '../within.ts'
import type { Works } from './work.ts'

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
    await Promise.all([...works.kept.keys()].map(async key => await claims.release(works.takeKept(key)!)))
  }

  await within(drained(), closeTimeout, async () => {
    abort.abort(new Error('the app is closing and closeTimeout is over'))
    // One turn for the handlers that listen to the signal, and another one for the commit of what they leave.
    await nextTurn()
    await nextTurn()
  })
}

async function nextTurn (): Promise<void> {
  await new Promise(resolve => setImmediate(resolve))
}
