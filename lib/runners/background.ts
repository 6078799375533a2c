import { inContext } from '../async-context.ts'
import { assertRules, wholeNumber } from '../checks.ts'
import { InProgress, Overloaded } from '../errors.ts'
import { deadDelivery } from './handler-failures.ts'
import { assertOpen, keyOf, onAbort, tellDead } from './runner.ts'
import type { Job, Runner, RunnerHost } from './runner.ts'

export interface BackgroundOptions {
  /**
   * Maximum number of deliveries whose handlers run at the same time.
   *
   * @default 10
   */
  concurrency?: number | undefined
  /**
   * Maximum number of deliveries that wait. Beyond it, the sender is answered 503 (`FST_OPENAI_WEBHOOK_OVERLOADED`).
   *
   * @default 1_000
   */
  maxQueue?: number | undefined
}

interface Waiting {
  readonly job: Job
  readonly run: () => Promise<void>
}

/**
 * Acknowledges a delivery at once, and runs its handlers afterwards in this process.
 *
 * A delivery that was acknowledged and has not run yet is in memory only. A crash loses it, and OpenAI does not send it again, because it was
 * answered 200. A delivery that fails is not attempted again either: it is reported as dead to the log, `onDead` and `onError`, and nothing
 * keeps it. `app.close()` runs the queued deliveries first, up to `closeTimeout`, and then reports those that have not started as dead. If that is
 * not enough, use `durable()`, `bullmq()` or `pgboss()`.
 *
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS
 */
export function background (options: BackgroundOptions = {}): Runner {
  assertRules('background', options, { concurrency: wholeNumber('deliveries', 1), maxQueue: wholeNumber('deliveries', 0) })
  const { concurrency = 10, maxQueue = 1_000 } = options
  // By key, so that a delivery that is sent again while it waits or runs is not queued twice. `waiting` is in the order of arrival.
  const waiting = new Map<string, Waiting>()
  const running = new Map<string, Promise<void>>()
  /** Given when the app is ready. */
  let host: RunnerHost
  let closing = false
  /** Whether `closeTimeout` is over. The app then closes what handlers use, so no handler may start. */
  let isOver = false

  function startNext (): void {
    for (const [key, { run }] of waiting) {
      if (running.size >= concurrency) return
      waiting.delete(key)
      running.set(key, run())
    }
  }

  function wait (key: string, job: Job): void {
    // Bound here, because the end of another delivery may start this one, in the async context of that delivery's request.
    waiting.set(key, { job, run: inContext(() => runOne(key, job)) })
  }

  function reportLost (job: Job): void {
    const error = new Error('closeTimeout was over before the handlers could start: the delivery is lost, because background() has it in memory only')
    tellDead(host, deadDelivery(job, 0, error), error)
  }

  async function runOne (key: string, job: Job): Promise<void> {
    // Waits a turn, so that the acknowledgement leaves before a handler can block the event loop.
    await new Promise(resolve => setImmediate(resolve))
    try {
      if (isOver) reportLost(job)
      else await host.process(job)
    } catch (error) {
      if (error instanceof Overloaded) reportLost(job)
      // Another process, or another delivery of the resource, has the claim, and its handlers may succeed or fail. This process has acknowledged the
      // delivery, so it tries again after the others that wait.
      else if (error instanceof InProgress && !isOver) wait(key, job)
      else tellDead(host, deadDelivery(job, error instanceof InProgress ? 0 : 1, error), error)
    }
    running.delete(key)
    startNext()
  }

  return {
    start (startedBy) {
      assertOpen('background', closing)
      host = startedBy
    },
    run (job) {
      const key = keyOf(job)
      if (waiting.has(key) || running.has(key)) return 'duplicate'
      if (closing || (running.size >= concurrency && waiting.size >= maxQueue)) throw new Overloaded()
      wait(key, job)
      startNext()
      return undefined
    },
    async close (signal) {
      if (host === undefined) return // another app may still start this runner
      closing = true
      onAbort(signal, () => {
        isOver = true
        for (const { job } of waiting.values()) reportLost(job)
        waiting.clear()
      })
      while (running.size > 0) await Promise.all(running.values())
    },
    depth: () => waiting.size
  }
}
