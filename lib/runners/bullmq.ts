import { DelayedError, ErrorCode, Queue, UnrecoverableError, Worker } from 'bullmq'
import type { BackoffOptions, ConnectionOptions, JobsOptions, KeepJobs, WorkerOptions } from 'bullmq'
import type { Job as BullMQJob } from 'bullmq'
import { codeOf } from '../coded.ts'
import { InvalidOptions, Overloaded, Unavailable } from '../errors.ts'
import { grouped } from '../grouped.ts'
import { causeOf, deadDelivery, describeFailure, errorOf, resumed } from './handler-failures.ts'
import { RETENTION } from '../stores/store.ts'
import { ANYTHING, WORKER, assertRules, isFunction, isObject, wholeNumber } from '../checks.ts'
import type { Rule } from '../checks.ts'
import { assertOpen, assertRemembered, keyOf, onAbort, tellDead } from './runner.ts'
import { storableError } from './storable.ts'
import type { DeadDelivery, DeliveryError, DeliveryRef, Job, Runner, RunnerHost } from './runner.ts'

export interface BullMQOptions {
  /**
   * BullMQ's own option: an ioredis instance, which the user closes, or options with which BullMQ opens its own connections. With a `backend`
   * for PostgreSQL: the options of a pool.
   */
  connection: ConnectionOptions | PostgresConnection
  /**
   * `createPostgresBackend` of BullMQ 6.7 or later, which keeps the queue in PostgreSQL.
   *
   * @default Redis
   */
  backend?: Backend | undefined
  /** @default 'openai-webhook' */
  queueName?: string | undefined
  /**
   * Whether this process runs handlers, or BullMQ's worker options: `concurrency`, `lockDuration` (ms) and `stalledInterval` (ms). The last two
   * decide how long after a crash the interrupted deliveries are attempted again.
   *
   * @default true, with a concurrency of 10 and BullMQ's 30_000 ms
   */
  worker?: boolean | Pick<WorkerOptions, 'concurrency' | 'lockDuration' | 'stalledInterval'> | undefined
  /**
   * How often the handlers of a delivery are started before the job is kept as failed, which is BullMQ's dead letter.
   *
   * @default 16
   */
  attempts?: number | undefined
  /**
   * ms before the second attempt, or BullMQ's own backoff options. With a number, the wait doubles with each attempt, and a random part of up to
   * half is taken off.
   *
   * @default 1_000
   */
  backoff?: number | BackoffOptions | undefined
  /**
   * BullMQ's retention of completed jobs. While a job is kept, a delivery that is sent again is not queued again.
   *
   * @default { age: 270_000 } (seconds: 75 h)
   */
  removeOnComplete?: KeepJobs | undefined
  /** BullMQ's retention of failed jobs, for a person to look at. @default kept */
  removeOnFail?: KeepJobs | undefined
}

/** BullMQ's `BackendFactory`. Declared here, because BullMQ 5 does not have this type. */
type Backend = (name: string, options: any, more?: any) => object

/** What `createPostgresBackend` takes: options of a pool of `pg`, the `schema`, and whether BullMQ creates its tables (`migrate`). */
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

/** A delivery as BullMQ keeps it. */
type QueuedDelivery = Job & {
  /**
   * How the last failed attempt ended. `attempt`: BullMQ's `attemptsStarted` at that time. `starts`: how often the handlers had been started.
   */
  readonly failure?: { readonly attempt: number, readonly starts?: number, readonly errors: readonly DeliveryError[] }
  /** How often the job had stalled when it died. After a requeue BullMQ goes on counting stalls, but counts attempts anew. */
  readonly stalls?: number
}

/** The delivery itself or, with a `backend`, its JSON text, because jsonb of PostgreSQL refuses U+0000. */
type QueuedData = QueuedDelivery | { readonly json: string }

type QueuedJob = BullMQJob<QueuedData>

/** Maximum number of deliveries that are queued together. */
const GROUP = 100

interface NewJob {
  readonly name: string
  readonly data: QueuedData
  readonly opts: JobsOptions & { readonly jobId: string }
}

/** Number of failed jobs that are read at once. */
const PAGE = 100

/** ms until the store is asked again about a job whose handlers may have succeeded, if the store could not be asked. */
const LATER = 5_000

/** Higher than any count, so that BullMQ does not fail a job that has stalled too often. `giveUp` does so, after it has asked the store. */
const MAX_STALLED = 2 ** 31 - 1

// Checked here, because BullMQ notices most wrong values only when a job fails or ends, which is after the acknowledgement.
const QUEUE_NAME: Rule = { expected: 'a text without ":"', accepts: value => typeof value === 'string' && value !== '' && !value.includes(':') }
const isDelay = (value: unknown): boolean => Number.isFinite(value) && (value as number) >= 0
const BACKOFF: Rule = {
  expected: 'a number of ms, 0 or more, or { type: "fixed" or "exponential", delay: ms }',
  accepts: value => isDelay(value) || (isObject(value) && (value['type'] === 'fixed' || value['type'] === 'exponential') && (value['delay'] === undefined || isDelay(value['delay'])))
}
const BACKEND: Rule = { expected: 'a function, such as createPostgresBackend of BullMQ', accepts: isFunction }
const KEPT: Rule = { expected: 'an object { age, count, limit }', accepts: isObject }
const RULES = { connection: ANYTHING, backend: BACKEND, queueName: QUEUE_NAME, worker: WORKER, attempts: wholeNumber('attempts', 1), backoff: BACKOFF, removeOnComplete: KEPT, removeOnFail: KEPT }
const WORKER_RULES = { concurrency: wholeNumber('deliveries', 1), lockDuration: wholeNumber('ms', 1), stalledInterval: wholeNumber('ms', 1) }
const KEPT_RULES = { age: wholeNumber('seconds', 0), count: wholeNumber('jobs', 0), limit: wholeNumber('jobs', 1) }

/**
 * After a failover by address, a connection may still lead to the old primary, which only reads. ioredis then connects again. Redis 6 says it in
 * the middle of a script's error.
 */
const isReadOnly = ({ message }: Error): boolean => message.includes('READONLY')

const JOB_NAME = 'delivery'

/**
 * Puts a delivery into a BullMQ queue before it is acknowledged. A worker runs it in this process or in another one, with `path: false` and the
 * same handlers. Attempts, backoff, retention and failed jobs are BullMQ's own. The job's id is made of the endpoint, the tenant and the
 * webhook-id, so that a delivery that is queued twice is in the queue once.
 *
 * While Redis (or PostgreSQL, with a `backend`) cannot be reached, the sender is answered 503.
 *
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS
 */
export function bullmq (options: BullMQOptions): Runner {
  assertRules('bullmq', options, RULES)
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
  const { concurrency = 10, lockDuration = 30_000, stalledInterval = 30_000 } = typeof worker === 'object' ? worker : {}
  if (typeof worker === 'object') assertRules('bullmq', worker, WORKER_RULES, { at: 'worker.' })
  if (typeof connection !== 'object' || connection === null) {
    throw new InvalidOptions('bullmq: expected connection to be an ioredis instance or connection options')
  }
  const pack = (delivery: QueuedDelivery): QueuedData => backend === undefined ? delivery : { json: JSON.stringify(delivery) }
  // Typed as in BullMQ 5, which has no backends.
  const redis = (backend !== undefined || 'disconnect' in connection ? connection : { reconnectOnError: isReadOnly, ...connection }) as ConnectionOptions
  const others = [backend] as unknown as []
  for (const [name, kept] of Object.entries({ removeOnComplete, removeOnFail })) {
    assertRules('bullmq', kept ?? {}, KEPT_RULES, { at: `${name}.` })
  }
  const isUsers = 'disconnect' in connection
  let queue: Queue<QueuedData> | undefined
  let processor: Worker<QueuedData> | undefined
  /** Given when the app is ready. */
  let host: RunnerHost
  let closing = false
  /** Whether `closeTimeout` is over. */
  let isGivenUp = false
  /** The jobs that this process runs. BullMQ's own wait for them fails when Redis goes down. */
  const running = new Set<Promise<void>>()
  /** The errors with which attempts of this process ended, by the error that BullMQ was given instead. */
  const thrown = new WeakMap<Error, Error>()

  const settings: JobsOptions = {
    attempts,
    backoff: typeof backoff === 'number' ? { type: 'exponential', delay: backoff, jitter: 0.5 } : backoff,
    removeOnComplete,
    ...(removeOnFail !== undefined && { removeOnFail })
  }

  /** @returns whether the job is new */
  const enqueue = grouped<NewJob, boolean>(GROUP, async jobs => {
    const queue = opened()
    // Looked up first, because BullMQ does not say that it already has a job.
    const known = await Promise.all(jobs.map(async ({ opts }) => await queue.getJob(opts.jobId)))
    await queue.addBulk(jobs.filter((_job, index) => known[index] === undefined))
    return known.map(job => job === undefined)
  })

  function opened (): Queue<QueuedData> {
    if (queue === undefined) throw new Unavailable({ cause: new Error('bullmq: expected the app to be ready') })
    return queue
  }

  /** @returns the error that BullMQ is given instead of `shown` */
  function inPlaceOf (shown: Error, kept: Error = storableError(shown)): Error {
    thrown.set(kept, shown)
    return kept
  }

  async function handle (job: QueuedJob, token: string | undefined): Promise<void> {
    const { attemptsStarted: attempt, attemptsMade, stalledCounter, opts: { attempts = 1 } } = job
    const { failure, stalls = 0, ...queued } = queuedOf(job)
    // A worker died during an attempt, or the end of an attempt could not be written.
    const isInterrupted = stalledCounter > stalls || attempt - 1 > (failure?.attempt ?? 0)
    const delivery = isInterrupted ? host.interrupted?.(queued) ?? queued : queued
    if (stalledCounter - stalls >= attempts) return await giveUp(job, delivery, attemptsMade + stalledCounter - stalls, token)
    try {
      await host.process(delivery, attempt)
    } catch (error) {
      const isLast = attemptsMade + 1 >= attempts
      await writeFailure(job, token, delivery, attempt, error, isLast).catch(trouble => { host.report(trouble, delivery) })
      // A failed job shows one message and one stack, which are those of the handlers' errors and not those of the coded error.
      const shown = toError(causeOf(error))
      // The 'failed' event reports the last failure, once BullMQ has recorded it.
      if (!isLast) host.report(shown, delivery, { attempt, attempts })
      throw inPlaceOf(shown)
    }
  }

  /** Writes to the job how an attempt has ended, unless another worker has taken the job over and may have written how its own has. */
  async function writeFailure (job: QueuedJob, token: string | undefined, delivery: Job, starts: number, error: unknown, isLast: boolean): Promise<void> {
    if (await job.extendLock(token!, lockDuration) === 0) return
    const { attemptsStarted: attempt, stalledCounter } = job
    const { errors, finished, remembered } = describeFailure(delivery, error)
    const stalls = isLast ? stalledCounter : queuedOf(job).stalls
    await job.updateData(pack({
      ...resumed(delivery, { finished, remembered }),
      failure: { attempt, starts, errors },
      ...(stalls !== undefined && { stalls })
    }))
  }

  /** Ends a job whose workers have died as often as it may be attempted. Asks the store first, which may know which handlers had succeeded. */
  async function giveUp (job: QueuedJob, delivery: Job, starts: number, token: string | undefined): Promise<void> {
    const error = new Error('the process ended while the handlers ran')
    try {
      const known = await host.recorded?.(delivery)
      if (known?.done === true) return
      const { done, ...left } = known ?? {}
      await writeFailure(job, token, { ...delivery, ...left }, starts, error, true)
    } catch (trouble) {
      host.report(trouble, delivery)
      await job.moveToDelayed(Date.now() + LATER, token)
      throw new DelayedError()
    }
    throw inPlaceOf(error, new UnrecoverableError(error.message))
  }

  /** Prepares a dead job for new attempts. If the job does not say how its last attempt ended, asks the store which handlers had succeeded. */
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
      // An 'error' event without a listener would end the process. It is reported as trouble, and BullMQ connects again by itself.
      queue = new Queue<QueuedData>(queueName, { connection: redis }, ...others)
      queue.on('error', error => host.report(error))
      // If its tables were missing, a worker would ask for jobs without a pause, and nothing else in this process would run.
      if (backend !== undefined) await queue.waitUntilReady()
      if (worker === false) return
      processor = new Worker<QueuedData>(queueName, async (job, token) => {
        const run = handle(job, token)
        running.add(run)
        await run.finally(() => running.delete(run))
      }, {
        connection: redis,
        concurrency,
        lockDuration,
        stalledInterval,
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
        // A job that was removed meanwhile is undefined.
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
        // Another caller has requeued the job, and it may have died again since.
        if (codeOf(error) === ErrorCode.JobNotInState || !await job.isFailed()) return false
        throw error
      }
    },
    async close (signal) {
      if (host === undefined) return // another app may still start this runner
      closing = true
      const gaveUp = new Promise<void>(resolve => {
        onAbort(signal, () => {
          isGivenUp = true
          // BullMQ waits for a Redis that cannot be reached, and its attempts to connect would keep the process alive. The user's own connection
          // stays as it is.
          if (!isUsers) for (const each of [processor, queue]) each?.disconnect().catch(() => {})
          resolve()
        })
      })
      // BullMQ has no public way to stop waiting: close() waits for the running jobs, and renews their locks, for as long as they run, and pause()
      // connects again after they have ended, to a Redis that nobody uses any more.
      await Promise.allSettled([processor?.pause(true)])
      const finished = Promise.allSettled([processor?.['whenCurrentJobsFinished'](false)]).then(async () => await Promise.allSettled(running))
      await Promise.race([finished, gaveUp])
      // By force, because the jobs have ended, and close() would wait again, for ever if Redis has gone down.
      await processor?.close(true)
      try {
        await queue?.close()
      } catch (error) {
        if (isUsers) throw error
        // Redis is down and could not be asked to end the connection, which would try to come back for ever.
        queue?.disconnect().catch(() => {})
      }
    },
    async depth () {
      return await queue?.getJobCountByTypes('waiting', 'prioritized', 'delayed') ?? 0
    }
  }
}

/** The id of a job. Encoded, because BullMQ refuses ":" in an id. */
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

/** Makes a dead delivery of a job that BullMQ has failed for good. */
function deadOf (job: QueuedJob): DeadDelivery {
  const { attemptsStarted, failedReason, stacktrace, finishedOn } = job
  const { failure, stalls, ...delivery } = queuedOf(job)
  const error = errorOf(failedReason, [stacktrace].flat().at(-1))
  const dead = deadDelivery(delivery, attemptsStarted, error, finishedOn)
  return failure?.attempt === attemptsStarted ? { ...dead, attempts: failure.starts ?? attemptsStarted, errors: failure.errors } : dead
}
