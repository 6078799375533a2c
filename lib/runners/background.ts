import { inContext } from '../async-context.ts'
import { assertCount, assertNames } from '../checks.ts'
import { InProgress, Overloaded } from '../errors.ts'
import { deadDelivery } from './handler-failures.ts'
import { assertOpen, keyOf, tellDead } from './runner.ts'
import type { Job, Runner, RunnerHost } from './runner.ts'

export interface BackgroundOptions {
  /**
   * Deliveries whose handlers run at once.
   *
   * @default 10
   */
  concurrency?: number
  /**
   * Deliveries that wait; beyond it the sender is answered 503.
   *
   * @default 1_000
   */
  maxQueue?: number
}

/**
 * Acknowledges at once and runs the handlers afterwards, in this process.
 *
 * What was acknowledged and has not run yet lives in memory only: a crash loses it, and OpenAI, which was answered 200,
 * does not send it again. A delivery that fails is not run again either: it is told as dead, to the log, `onDead` and
 * `onError`, and kept nowhere. `app.close()` runs what is queued first, up to `closeTimeout`. Where that is not enough, use
 * `durable()`, `bullmq()` or `pgboss()`.
 *
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS
 */
export function background (options: BackgroundOptions = {}): Runner {
  assertNames('background', options, ['concurrency', 'maxQueue'])
  const { concurrency = 10, maxQueue = 1_000 } = options
  assertCount('background', 'concurrency', concurrency, 1)
  assertCount('background', 'maxQueue', maxQueue, 0)
  // By key, so that a delivery that comes again while it is here is not queued twice. In the order of arrival.
  const waiting = new Map<string, () => Promise<void>>()
  const running = new Map<string, Promise<void>>()
  let host: RunnerHost
  let isStarted = false
  let closing = false

  function startNext (): void {
    for (const [key, run] of waiting) {
      if (running.size >= concurrency) return
      waiting.delete(key)
      running.set(key, run())
    }
  }

  async function runOne (key: string, job: Job): Promise<void> {
    // Lets the acknowledgement leave before a handler can hold up the event loop.
    await new Promise(resolve => setImmediate(resolve))
    try {
      await processed(job)
    } catch (error) {
      // Nobody knows yet how it ends elsewhere.
      if (error instanceof InProgress) host.report(error, job)
      else tellDead(host, deadDelivery(job, 1, error), error)
    }
    running.delete(key)
    startNext()
  }

  /** Waits while another process has the delivery: its handlers may fail there, and this one has acknowledged it. */
  async function processed (job: Job): Promise<void> {
    for (;;) {
      try {
        return await host.process(job)
      } catch (error) {
        if (!(error instanceof InProgress) || closing) throw error
      }
    }
  }

  return {
    start (startedBy) {
      assertOpen('background', closing)
      host = startedBy
      isStarted = true
    },
    run (job) {
      const key = keyOf(job)
      if (waiting.has(key) || running.has(key)) return 'duplicate'
      if (closing || (running.size >= concurrency && waiting.size >= maxQueue)) throw new Overloaded()
      // Bound: it may be started by the end of another delivery, in the async context of that one's request.
      waiting.set(key, inContext(() => runOne(key, job)))
      startNext()
      return undefined
    },
    async close () {
      if (!isStarted) return // another app may start it
      closing = true
      while (running.size > 0) await Promise.all(running.values())
    },
    depth: () => waiting.size
  }
}
