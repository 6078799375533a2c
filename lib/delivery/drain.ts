import type { Failures } from '../failures.ts'
import type { Claims } from '../pipeline/deduplicate.ts'
import type { Runner } from '../runners/runner.ts'
import { tryOr } from '../maybe-promise.ts'
import { within } from '../within.ts'
import type { Works } from './work.ts'

export interface DrainOptions {
  readonly works: Works
  readonly claims: Claims
  readonly runner: Runner | undefined
  readonly failures: Failures
  /** Aborted when `closeTimeout` is over. */
  readonly abort: AbortController
  /** ms */
  readonly closeTimeout: number
}

/** Refuses new deliveries, closes the runner, and waits until this process has no delivery left or `closeTimeout` is over. */
export async function drain ({ works, claims, runner, failures, abort, closeTimeout }: DrainOptions): Promise<void> {
  works.closing = true
  let timer: NodeJS.Timeout | undefined
  const over = new Promise<void>(resolve => {
    timer = setTimeout(() => {
      abort.abort(new Error('the app is closing and closeTimeout is over'))
      // Waits a turn, so that handlers that listen to the signal can end.
      setImmediate(resolve)
    }, closeTimeout)
  })
  async function drained (): Promise<void> {
    const runnerClosed = tryOr(() => runner?.close?.(abort.signal), error => failures.trouble(error))
    await Promise.all([runnerClosed, works.drained()])
    // A user's runner may have asked to keep claims that it then did not use.
    await Promise.all([...works.kept.keys()].map(async key => await claims.release(works.takeKept(key)!)))
  }

  await Promise.race([drained(), over])
  clearTimeout(timer)
}

/**
 * Waits for `closed`, but only for 80 % of `pluginTimeout` (ms; 0: no limit), because Fastify fails a preClose hook that takes longer than
 * `pluginTimeout`. The onClose hook waits for the rest.
 */
export async function withinPluginTimeout (closed: Promise<void>, pluginTimeout: number): Promise<void> {
  if (pluginTimeout === 0) return await closed
  await within(closed, pluginTimeout * 0.8, () => {})
}
