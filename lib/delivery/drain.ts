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
  /** Is aborted when `closeTimeout` is over. */
  readonly abort: AbortController
  /** ms */
  readonly closeTimeout: number
}

/** Refuses new deliveries, and waits until none is in hand or `closeTimeout` is over. */
export async function drain ({ works, claims, runner, failures, abort, closeTimeout }: DrainOptions): Promise<void> {
  works.closing = true
  let timer: NodeJS.Timeout | undefined
  const over = new Promise<void>(resolve => {
    timer = setTimeout(() => {
      abort.abort(new Error('the app is closing and closeTimeout is over'))
      // Handlers that listen to the signal may end in this turn.
      setImmediate(resolve)
    }, closeTimeout)
  })
  async function drained (): Promise<void> {
    const runnerClosed = tryOr(() => runner?.close?.(abort.signal), error => failures.trouble(error))
    await Promise.all([runnerClosed, works.drained()])
    // A runner of the user's may leave some.
    await Promise.all([...works.kept.keys()].map(async key => await claims.release(works.takeKept(key)!)))
  }

  await Promise.race([drained(), over])
  clearTimeout(timer)
}

/** Fastify fails a preClose hook that outlasts its `pluginTimeout`. Whatever runs longer is awaited in onClose. */
export async function withinPluginTimeout (closed: Promise<void>, pluginTimeout: number): Promise<void> {
  if (pluginTimeout === 0) return await closed
  await within(closed, pluginTimeout * 0.8, () => {})
}
