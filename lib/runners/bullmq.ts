import { DelayedError, ErrorCode, Queue, UnrecoverableError, Worker } from 'bullmq'
import type { BackoffOptions, ConnectionOptions, JobsOptions, KeepJobs, WorkerOptions } from 'bullmq'
import type { Job as BullMQJob } from 'bullmq'
import { InvalidOptions, Overloaded, Unavailable } from '../errors.ts'
import { grouped } from '../grouped.ts'
import { causeOf, deadDelivery, describeFailure, resumed } from './handler-failures.ts'
import { RETENTION } from '../stores/store.ts'
import { assertCount, assertNames, assertOption, isObject, workerOptions } from '../checks.ts'
import type { Rule } from '../checks.ts'
import { assertOpen, assertRemembered, keyOf, tellDead } from './runner.ts'
import { storableError } from './storable.ts'
import type { DeadDelivery, DeliveryError, DeliveryRef, Job, Runner, RunnerHost } from './runner.ts'

export interface BullMQOptions {
  /**
   * BullMQ's own: an ioredis instance, which stays the user's to close, or options for connections of its own; with a
   * `backend` for PostgreSQL, the options of a pool.
   */
  connection: ConnectionOptions | PostgresConnection
  /**
   * `createPostgresBackend` of BullMQ 6.7 or later: the queue is in PostgreSQL.
   *
   * @default Redis
   */
  backend?: Backend
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

/** BullMQ's own `BackendFactory`, a type that BullMQ 5 has not. */
type Backend = (name: string, options: any, more?: any) => object

/** What `createPostgresBackend` takes: options of a pool of `pg`, the `schema`, and whether its tables are created. */
export interface PostgresConnection {
  connectionString?: string
  host?: string
  port?: number
  user?: string
  password?: any
  database?: string
  max?: number
  ssl?: any
  schema?: string
  migrate?: boolean
}

/** What BullMQ keeps of a delivery. */
type QueuedDelivery = Job & {
  /** What its last failed attempt ended with. `attempt`: BullMQ's `attemptsStarted` then; `starts`: how often the handlers were started. */
  readonly failure?: { readonly attempt: number, readonly starts?: number, readonly errors: readonly DeliveryError[] }
  /** How often it had stalled when it died. BullMQ goes on counting when it is requeued, but its attempts are counted anew. */
  readonly stalls?: number
}

/** As it is, or as JSON where PostgreSQL keeps it, whose jsonb refuses U+0000. */
type QueuedData = QueuedDelivery | { readonly json: string }

type QueuedJob = BullMQJob<QueuedData>

/** Deliveries that are queued at once. */
const GROUP = 100

interface NewJob {
  readonly name: string
  readonly data: QueuedData
  readonly opts: JobsOptions & { readonly jobId: string }
}

/** Failed jobs that are looked at in one go. */
const PAGE = 100

/** ms until a job is looked at again whose handlers may have succeeded, where the store cannot say. */
const LATER = 5_000

/** BullMQ's own limit: jobs are given up here, once the store has been asked. */
const MAX_STALLED = 2 ** 31 - 1

// BullMQ finds most of these wrong when a job has failed or ended, which is after it was acknowledged.
const QUEUE_NAME: Rule = { expected: 'a text without ":"', accepts: value => typeof value === 'string' && value !== '' && !value.includes(':') }
const BACKOFF: Rule = {
  expected: 'a number of ms, 0 or more, or { type: "fixed" or "exponential", delay: ms }',
  accepts: value => isDelay(value) || (isObject(value) && (value['type'] === 'fixed' || value['type'] === 'exponential') && (value['delay'] === undefined || isDelay(value['delay'])))
}
const KEPT: Rule = { expected: 'an object { age, count }', accepts: isObject }

const isDelay = (value: unknown): boolean => Number.isFinite(value) && (value as number) >= 0

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
export function bullmq (options: BullMQOptions): Runner {
  assertNames('bullmq', options, ['connection', 'backend', 'queueName', 'worker', 'attempts', 'backoff', 'removeOnComplete', 'removeOnFail'])
  const {
    connection,
    backend,
    queueName = 'openai-webhook',
    worker = true,
    attempts = 16,
    backoff = 1_000,
    removeOnComplete = { age: RETENTION / 1_000 },
    removeOnFail
  } = options
  const settingsOfWorker = { ...WORKER_DEFAULTS, ...workerOptions('bullmq', worker, ['concurrency', 'lockDuration', 'stalledInterval']) }
  if (typeof connection !== 'object' || connection === null) {
    throw new InvalidOptions('bullmq: expected connection to be an ioredis instance or connection options')
  }
  if (backend !== undefined && typeof backend !== 'function') throw new InvalidOptions('bullmq: expected backend to be a function, such as createPostgresBackend of BullMQ')
  const pack = (delivery: QueuedDelivery): QueuedData => backend === undefined ? delivery : { json: JSON.stringify(delivery) }
  // Typed as BullMQ 5 has them, which knows no backends.
  const redis = connection as ConnectionOptions
  const others = [backend] as unknown as []
  assertCount('bullmq', 'attempts', attempts, 1)
  assertOption('bullmq', 'queueName', queueName, QUEUE_NAME)
  assertOption('bullmq', 'backoff', backoff, BACKOFF)
  assertOption('bullmq', 'removeOnComplete', removeOnComplete, KEPT)
  assertOption('bullmq', 'removeOnFail', removeOnFail, KEPT)
  for (const [name, value] of Object.entries(settingsOfWorker)) if (value !== undefined) assertCount('bullmq', `worker.${name}`, value, 1)
  let queue: Queue<QueuedData> | undefined
  let processor: Worker<QueuedData> | undefined
  let host: RunnerHost
  let isStarted = false
  let closing = false
  /** `closeTimeout` is over. */
  let isGivenUp = false
  /** What attempts of this process ended with, by what BullMQ was told. */
  const thrown = new WeakMap<Error, Error>()

  const settings: JobsOptions = {
    attempts,
    backoff: typeof backoff === 'number' ? { type: 'exponential', delay: backoff, jitter: 0.5 } : backoff,
    removeOnComplete,
    ...(removeOnFail !== undefined && { removeOnFail })
  }

  /** @returns whether it was not there before */
  const enqueue = grouped<NewJob, boolean>(GROUP, async jobs => {
    const queue = opened()
    // BullMQ takes one a second time without a word.
    const known = await Promise.all(jobs.map(async ({ opts }) => await queue.getJob(opts.jobId)))
    await queue.addBulk(jobs.filter((_job, index) => known[index] === undefined))
    return known.map(job => job === undefined)
  })

  function opened (): Queue<QueuedData> {
    if (queue === undefined) throw new Unavailable({ cause: new Error('bullmq: expected the app to be ready') })
    return queue
  }

  /** @returns what BullMQ is told in place of an error */
  function inPlaceOf (shown: Error, kept: Error = storableError(shown)): Error {
    thrown.set(kept, shown)
    return kept
  }

  async function handle (job: QueuedJob, token: string | undefined): Promise<void> {
    const { attemptsStarted: attempt, attemptsMade, stalledCounter, opts: { attempts = 1 } } = job
    const { failure, stalls = 0, ...queued } = queuedOf(job)
    // A worker died with it, or what it ended with could not be written.
    const isInterrupted = stalledCounter > stalls || attempt - 1 > (failure?.attempt ?? 0)
    const delivery = isInterrupted ? host.interrupted?.(queued) ?? queued : queued
    if (stalledCounter - stalls >= attempts) return await giveUp(job, delivery, attemptsMade + stalledCounter - stalls, token)
    try {
      await host.process(delivery, attempt)
    } catch (error) {
      const isLast = attemptsMade + 1 >= attempts
      await writeFailure(job, delivery, attempt, error, isLast).catch(trouble => { host.report(trouble, delivery) })
      // A failed job shows one message and one stack: those of the handlers' errors, not of the answer a sender would get.
      const shown = toError(causeOf(error))
      // The last one is told once BullMQ has it on record.
      if (!isLast) host.report(shown, delivery, { attempt, attempts })
      throw inPlaceOf(shown)
    }
  }

  /** Writes to the job what an attempt has ended with. */
  async function writeFailure (job: QueuedJob, delivery: Job, starts: number, error: unknown, isLast: boolean): Promise<void> {
    const { attemptsStarted: attempt, stalledCounter } = job
    const { errors, finished, remembered } = describeFailure(delivery, error)
    const stalls = isLast ? stalledCounter : queuedOf(job).stalls
    await job.updateData(pack({
      ...resumed(delivery, { finished, remembered }),
      failure: { attempt, starts, errors },
      ...(stalls !== undefined && { stalls })
    }))
  }

  /** Its worker died with it, as often as it may be attempted. The store may know which handlers had succeeded. */
  async function giveUp (job: QueuedJob, delivery: Job, starts: number, token: string | undefined): Promise<void> {
    const error = new Error('the process ended while the handlers ran')
    try {
      const known = await host.recorded?.(delivery)
      if (known?.done === true) return
      const { done, ...left } = known ?? {}
      await writeFailure(job, { ...delivery, ...left }, starts, error, true)
    } catch (trouble) {
      host.report(trouble, delivery)
      await job.moveToDelayed(Date.now() + LATER, token)
      throw new DelayedError()
    }
    throw inPlaceOf(error, new UnrecoverableError(error.message))
  }

  /** Makes a dead job one that may be attempted anew. Where it does not say how its last attempt ended, the store may know what had succeeded. */
  async function revive (job: QueuedJob): Promise<void> {
    const { stalledCounter, attemptsStarted } = job
    const queued = queuedOf(job)
    const { done = true, ...left } = queued.failure?.attempt === attemptsStarted ? {} : await host.recorded?.(deliveryOf(job)) ?? {}
    if (!done || (queued.stalls ?? 0) !== stalledCounter) await job.updateData(pack({ ...queued, ...(!done && left), stalls: stalledCounter }))
  }

  return {
    async start (startedBy) {
      assertOpen('bullmq', closing)
      host = startedBy
      isStarted = true
      // An 'error' without a listener would end the process; trouble is told, and BullMQ connects again by itself.
      queue = new Queue<QueuedData>(queueName, { connection: redis }, ...others)
      queue.on('error', error => host.report(error))
      // Without its tables a worker would ask for jobs without a pause, and nothing else would run.
      if (backend !== undefined) await queue.waitUntilReady()
      if (worker === false) return
      processor = new Worker<QueuedData>(queueName, handle, {
        connection: redis,
        ...settingsOfWorker,
        maxStalledCount: MAX_STALLED
      }, ...others)
      processor.on('error', error => { if (!isGivenUp) host.report(error) })
      processor.on('failed', (job, error) => {
        if (job === undefined) return host.report(error)
        if (typeof job.finishedOn !== 'number') return // to be attempted again
        tellDead(host, deadOf(job), thrown.get(error) ?? error)
      })
    },
    async run (job) {
      if (closing || queue === undefined) throw new Overloaded()
      return await enqueue({ name: JOB_NAME, data: pack(job), opts: { ...settings, jobId: idOf(job) } }) ? undefined : 'duplicate'
    },
    async dead (limit = 100, type) {
      const found: DeadDelivery[] = []
      for (let start = 0; found.length < limit; start += PAGE) {
        const jobs = await opened().getJobs('failed', start, start + PAGE - 1, true) as Array<QueuedJob | undefined>
        // One that was removed meanwhile is not there.
        for (const job of jobs) if (job !== undefined && (type === undefined || queuedOf(job).event.type === type)) found.push(deadOf(job))
        if (jobs.length < PAGE) break
      }
      return found.slice(0, limit)
    },
    async deadCount () {
      return await opened().getFailedCount()
    },
    async requeue (delivery, { force = false } = {}) {
      const job = await opened().getJob(idOf(delivery))
      if (job === undefined) return false
      if (await job.isFailed()) {
        await revive(job)
        if (!force) assertRemembered(deliveryOf(job))
      }
      try {
        await job.retry('failed', { resetAttemptsMade: true, resetAttemptsStarted: true })
        return true
      } catch (error) {
        // Somebody else has requeued it, and it may have died again since.
        if ((error as { code?: unknown }).code === ErrorCode.JobNotInState || !await job.isFailed()) return false
        throw error
      }
    },
    async close (signal) {
      if (!isStarted) return // another app may start it
      closing = true
      const gaveUp = new Promise<void>(resolve => {
        signal?.addEventListener('abort', () => {
          isGivenUp = true
          // BullMQ waits for a Redis that cannot be reached, and its attempts to connect would keep the process alive.
          processor?.disconnect().catch(() => {})
          queue?.disconnect().catch(() => {})
          resolve()
        }, { once: true })
      })
      // Not close(), which would wait for the jobs that run, and renew their locks, for as long as they run.
      await Promise.race([Promise.allSettled([processor?.pause()]), gaveUp])
      await processor?.close(isGivenUp)
      await queue?.close()
    },
    async depth () {
      return await queue?.getJobCountByTypes('waiting', 'prioritized', 'delayed') ?? 0
    }
  }
}

/** BullMQ takes no ":" in it. */
function idOf (delivery: DeliveryRef): string {
  return encodeURIComponent(keyOf(delivery))
}

function queuedOf ({ data }: QueuedJob): QueuedDelivery {
  return 'json' in data ? JSON.parse(data.json) as QueuedDelivery : data
}

function deliveryOf (job: QueuedJob): Job {
  const { failure, stalls, ...delivery } = queuedOf(job)
  return delivery
}

function toError (error: unknown): Error {
  return error instanceof Error ? error : new Error(String(error))
}

/** A job that BullMQ has failed for good. */
function deadOf (job: QueuedJob): DeadDelivery {
  const { attemptsStarted, failedReason, stacktrace, finishedOn } = job
  const { failure } = queuedOf(job)
  const error = Object.assign(new Error(failedReason), { stack: [stacktrace].flat().at(-1) })
  const dead = deadDelivery(deliveryOf(job), attemptsStarted, error, finishedOn)
  return failure?.attempt === attemptsStarted ? { ...dead, attempts: failure.starts ?? attemptsStarted, errors: failure.errors } : dead
}
