import { Queue, Worker } from 'bullmq'
import type { BackoffOptions, ConnectionOptions, KeepJobs, WorkerOptions } from 'bullmq'
import { InvalidOptions, Overloaded } from '../errors.ts'
import { assertCount } from './background.ts'
import type { Job, Runner, RunnerHost } from './runner.ts'

export interface BullMQOptions {
  /** BullMQ's own: an ioredis instance, which stays the user's to close, or options for connections of its own. */
  connection: ConnectionOptions
  /** @default 'openai-webhook' */
  queueName?: string
  /**
   * Whether this process runs handlers; or BullMQ's worker options: `concurrency`, and `lockDuration` and
   * `stalledInterval` (ms), which decide how long after a crash what was running is attempted again.
   *
   * @default true, with a concurrency of 10 and BullMQ's 30_000 ms
   */
  worker?: boolean | Pick<WorkerOptions, 'concurrency' | 'lockDuration' | 'stalledInterval'>
  /**
   * How often the handlers of a delivery are started before the job is kept as failed, BullMQ's dead letter.
   *
   * @default 16
   */
  attempts?: number
  /**
   * ms before the second attempt, doubling with each and jittered by half, or BullMQ's own backoff options.
   *
   * @default 1_000
   */
  backoff?: number | BackoffOptions
  /**
   * BullMQ's retention of processed jobs. While one is kept, a delivery that comes again is not queued again.
   *
   * @default { age: 270_000 } (seconds: 75 h)
   */
  removeOnComplete?: KeepJobs
  /** BullMQ's retention of failed jobs, for a person to look at. @default kept */
  removeOnFail?: KeepJobs
}

const JOB_NAME = 'delivery'
const WORKER_DEFAULTS = { concurrency: 10 }

/**
 * Puts a delivery into a BullMQ queue before it is acknowledged; a worker in this process or in others (`path: false`,
 * the same handlers) runs it. Attempts, backoff, retention and failed jobs are BullMQ's own. The job's id is made of the
 * endpoint and the webhook-id, so that queueing a delivery twice queues it once.
 *
 * While Redis cannot be reached the sender is answered 503.
 *
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS
 */
export function bullmq ({
  connection,
  queueName = 'openai-webhook',
  worker = true,
  attempts = 16,
  backoff = 1_000,
  removeOnComplete = { age: 270_000 },
  removeOnFail
}: BullMQOptions): Runner {
  if (typeof connection !== 'object' || connection === null) {
    throw new InvalidOptions('bullmq: expected connection to be an ioredis instance or connection options')
  }
  const workerOptions = { ...WORKER_DEFAULTS, ...(typeof worker === 'object' ? worker : undefined) }
  assertCount('bullmq', 'attempts', attempts, 1)
  assertCount('bullmq', 'worker.concurrency', workerOptions.concurrency, 1)
  let queue: Queue<Job> | undefined
  let processor: Worker<Job> | undefined
  let closing = false

  return {
    start (host: RunnerHost) {
      // An 'error' without a listener would end the process; trouble is told, and BullMQ connects again by itself.
      queue = new Queue<Job>(queueName, { connection })
      queue.on('error', error => host.report(error))
      if (worker === false) return
      processor = new Worker<Job>(queueName, async ({ data, attemptsStarted }) => {
        try {
          await host.process(data, attemptsStarted)
        } catch (error) {
          // A failed job shows one message: that of the handlers' errors, not the answer a sender would get.
          throw (error as Error).cause ?? error
        }
      }, {
        connection,
        ...workerOptions,
        // A worker that was killed leaves a stalled job behind; BullMQ would fail it at the second time.
        maxStalledCount: attempts
      })
      processor.on('error', error => host.report(error))
      processor.on('failed', (job, error) => host.report(error, job?.data))
    },
    async run (job) {
      if (closing || queue === undefined) throw new Overloaded()
      await queue.add(JOB_NAME, job, {
        jobId: encodeURIComponent(`${job.endpoint} ${job.webhookId}`), // BullMQ takes no ":" in it
        attempts,
        backoff: typeof backoff === 'number' ? { type: 'exponential', delay: backoff, jitter: 0.5 } : backoff,
        removeOnComplete,
        ...(removeOnFail !== undefined && { removeOnFail })
      })
    },
    async close (signal) {
      closing = true
      // BullMQ waits for a Redis that cannot be reached, and its attempts to connect would keep the process alive.
      signal?.addEventListener('abort', () => {
        processor?.disconnect().catch(() => {})
        queue?.disconnect().catch(() => {})
      }, { once: true })
      await processor?.close()
      await queue?.close()
    },
    async depth () {
      return await queue?.getJobCountByTypes('waiting', 'prioritized', 'delayed') ?? 0
    }
  }
}
