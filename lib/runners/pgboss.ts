import { createHash } from 'node:crypto'
import { setMaxListeners } from 'node:events'
import { setTimeout as sleep } from 'node:timers/promises'
import { LRUCache } from 'lru-cache'
import type { JobInsert, JobResult, JobWithMetadata, PgBoss } from 'pg-boss'
import { InvalidOptions, Overloaded } from '../errors.ts'
import { RETENTION } from '../stores/store.ts'
import { ANYTHING, WORKER, assertRules, wholeNumber } from '../checks.ts'
import type { Rule } from '../checks.ts'
import { grouped } from '../grouped.ts'
import { deadDelivery, describeFailure, errorOf, resumed } from './handler-failures.ts'
import { pgbossWorkers } from './pgboss-workers.ts'
import { assertOpen, assertRemembered, keyOf, tellDead } from './runner.ts'
import { storable } from './storable.ts'
import type { DeadDelivery, DeliveryRef, Job, Runner, RunnerHost } from './runner.ts'

export interface PgBossOptions {
  /** A started `PgBoss` of pg-boss 12.35 or later. The user stops it, after `app.close()`. */
  boss: PgBoss
  /**
   * The queue's name. The dead letter queue has the same name with `-dead` appended. Queues that are missing are created.
   *
   * @default 'openai-webhook'
   */
  queueName?: string | undefined
  /**
   * Whether this process runs handlers, or an object: `concurrency` is the maximum number of deliveries that run at the same time, `batchSize`
   * the maximum number that is fetched together (at most `concurrency`), and `pollingIntervalSeconds` how often pg-boss is asked for jobs that no
   * notification has announced (seconds, 0.5 or more).
   *
   * Deliveries that are fetched together are recorded together. If they take longer than 10 ms, each is recorded as soon as it has ended, and
   * others are fetched for the places that are free.
   *
   * @default true, with a concurrency of 10, as many in a batch, and every 2 s
   */
  worker?: boolean | { concurrency?: number, batchSize?: number, pollingIntervalSeconds?: number } | undefined
  /**
   * How often the handlers of a delivery are started before it goes to the dead letter queue. A start counts even if it ends in a crash, and
   * even if it finds the claim of the dead process still held in the store.
   *
   * @default 16
   */
  attempts?: number | undefined
  /**
   * ms before the second attempt, rounded up to whole seconds, because pg-boss counts in seconds. The wait doubles with each attempt, up to an
   * hour, and a random part of up to the same length is added. 0: at once.
   *
   * @default 1_000
   */
  backoff?: number | undefined
  /**
   * Seconds that a worker may be silent before another worker attempts its deliveries, 10 or more. Use no less than `idempotency.lease`, because
   * the next attempt may otherwise find the dead worker's claim still held. pg-boss looks for silent workers every `superviseIntervalSeconds`,
   * and no sooner than `monitorIntervalSeconds` after the last look.
   *
   * @default 30
   */
  heartbeatSeconds?: number | undefined
  /**
   * Seconds that an attempt may take, up to 86_400.
   *
   * @default 3_600
   */
  expireInSeconds?: number | undefined
}

/** A delivery as pg-boss keeps it. */
interface QueuedDelivery {
  /** Identifies the delivery, and stays the same when it is requeued. */
  readonly key: string
  readonly type: string
  /** The job as JSON text, because jsonb refuses U+0000. */
  readonly delivery: string
}

type QueuedJob = JobWithMetadata<QueuedDelivery>

/** The result of a failed attempt. Kept as JSON text, because jsonb refuses U+0000. */
type Failure = Pick<DeadDelivery, 'attempts' | 'errors' | 'finished' | 'remembered'> & Partial<Pick<DeadDelivery, 'diedAt'>>

/** A delivery that pg-boss is about to record as dead. */
interface Death {
  readonly job: QueuedJob
  readonly dead: DeadDelivery
  readonly error: unknown
}

/** Maximum number of deliveries that one statement inserts. */
const GROUP = 100
/** Maximum number of these statements at the same time: PostgreSQL commits them one after the other, because each notifies the workers. */
const INSERTS = 2
/** Seconds */
const MAX_BACKOFF = 3_600
const MAX_EXPIRY = 86_400
/** Seconds, ten years: an acknowledged delivery is not deleted before it has run, nor a dead one before a person has acted. */
const KEPT = 315_360_000
/** ms. More than the clocks of two machines differ. */
const DAY = 86_400_000
/** Characters */
const MAX_SUMMARY = 1_000
/** Maximum number of jobs that pg-boss is asked for. */
const MAX_LIST = 100_000
/** Additional starts after the last attempt. One of them ends the delivery as dead, once the store can say which handlers have succeeded. */
const LOOKS = 1_000
/** Maximum number of dead deliveries that are remembered until pg-boss has recorded them. */
const MAX_UNRECORDED = 1_000
/** ms for which a job is polled until pg-boss has recorded it as dead. */
const PATIENCE = 10_000
const POLLING: Rule = { expected: 'a finite number, 0.5 or more', accepts: value => Number.isFinite(value) && (value as number) >= 0.5 }
/** pg-boss's own rule. */
const QUEUE_NAME: Rule = { expected: 'letters, digits and _ - . /', accepts: value => typeof value === 'string' && /^[\w.\-/]+$/.test(value) }

const RULES = {
  boss: ANYTHING,
  queueName: QUEUE_NAME,
  worker: WORKER,
  attempts: wholeNumber('attempts', 1, LOOKS),
  backoff: wholeNumber('ms', 0),
  heartbeatSeconds: wholeNumber('seconds', 10),
  expireInSeconds: wholeNumber('seconds', 1, MAX_EXPIRY)
}
const WORKER_RULES = { concurrency: wholeNumber('deliveries', 1), batchSize: wholeNumber('deliveries', 1), pollingIntervalSeconds: POLLING }

/**
 * Puts a delivery into a queue of the user's pg-boss, in PostgreSQL, before it is acknowledged. Workers run it in this process or in others,
 * with `path: false` and the same handlers. Attempts, backoff, heartbeats and dead letters are pg-boss's own. The job's id is made of the
 * endpoint, the tenant and the webhook-id, so that a delivery that is queued twice is in the queue once.
 *
 * While PostgreSQL cannot be reached, the sender is answered 503.
 *
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS; pg-boss's own error at boot, if pg-boss has not been started
 */
export function pgboss (options: PgBossOptions): Runner {
  assertRules('pgboss', options, RULES)
  const {
    boss,
    queueName = 'openai-webhook',
    worker = true,
    attempts = 16,
    backoff = 1_000,
    heartbeatSeconds = 30,
    expireInSeconds = 3_600
  } = options
  const { concurrency = 10, batchSize = concurrency, pollingIntervalSeconds = 2 } = typeof worker === 'object' ? worker : {}
  if (typeof worker === 'object') assertRules('pgboss', worker, WORKER_RULES, { at: 'worker.' })
  if (typeof boss?.previewRedrive !== 'function' || typeof boss.work !== 'function') {
    throw new InvalidOptions('pgboss: expected boss to be a PgBoss, of pg-boss 12.35 or later')
  }
  if (batchSize > concurrency) throw new InvalidOptions(`pgboss: expected worker.batchSize to be at most worker.concurrency, ${concurrency}, got ${batchSize}`)
  const deadName = `${queueName}-dead`
  const settings = {
    // More than the attempts: if the last attempt has no result, because its process ended, a further start ends the delivery, and pg-boss must
    // not give the job up before the store has said which handlers had succeeded.
    retryLimit: attempts + LOOKS,
    retryDelay: Math.ceil(backoff / 1_000),
    ...(backoff > 0 && { retryBackoff: true, retryDelayMax: MAX_BACKOFF }),
    heartbeatSeconds,
    expireInSeconds,
    retentionSeconds: KEPT,
    // While pg-boss keeps the job, a delivery that is sent again is not queued again.
    deleteAfterSeconds: RETENTION / 1_000,
    deadLetter: deadName
  }
  const insert = grouped<JobInsert, boolean>(GROUP, async jobs => {
    const inserted = new Set(await boss.insert(queueName, jobs, { returnId: true }))
    return jobs.map(({ id }) => inserted.has(id!))
  }, { atOnce: INSERTS })
  const complete = grouped<QueuedJob, QueuedJob>(GROUP, async jobs => {
    await boss.complete(queueName, jobs)
    return jobs
  })
  /** Reports of dead deliveries that wait until pg-boss has recorded them. */
  const dying = new Set<Promise<void>>()
  /** Dead deliveries that are not recorded yet, by the job's id. If pg-boss cannot record one, the next start of the job makes it try again. */
  const unrecorded = new LRUCache<string, Death>({ max: MAX_UNRECORDED })
  const drained = new AbortController()
  setMaxListeners(0, drained.signal)
  const workers = pgbossWorkers<QueuedDelivery>({
    boss,
    queueName,
    concurrency,
    batchSize,
    pollingIntervalSeconds,
    // What is thrown here is not the end of an attempt. The job fails alone, and not with its batch.
    handle: async job => await handle(job).catch(error => ({ id: job.id, status: 'failed', output: error })),
    record,
    onRecord: tellOfDead,
    onError
  })
  /** Given when the app is ready. */
  let host: RunnerHost
  let closing = false

  function onError (error: Error & { queue?: string }): void {
    // An 'error' event without a listener would end the process. Errors of other queues are left to the user's listeners.
    if ((error.queue ?? queueName) !== queueName && boss.listenerCount('error') > 1) return
    // pg-boss emits an object with the fields of an error.
    host.report(error instanceof Error ? error : Object.assign(new Error(), error))
  }

  /** @param id of the new job of a requeued delivery @returns whether the job is new */
  async function enqueue (job: Job, id?: string): Promise<boolean> {
    const key = idOf(job)
    const data: QueuedDelivery = { key, type: storable(job.event.type), delivery: JSON.stringify(job) }
    const isNew = await insert({ ...settings, id: id ?? key, data })
    if (isNew) workers.wake()
    return isNew
  }

  /** Reports the deaths in a batch once pg-boss has recorded them. */
  function tellOfDead (jobs: readonly QueuedJob[]): void {
    for (const job of jobs) {
      const death = unrecorded.get(job.id)
      if (death?.job !== job) continue // it has not died in this start
      const telling = tellOnceRecorded(death).finally(() => dying.delete(telling))
      dying.add(telling)
    }
  }

  async function handle (job: QueuedJob): Promise<JobResult> {
    const { id, data, output, retryCount } = job
    const attempts = attemptsOf(job)
    const { attempts: ended = 0, ...left } = failureOf(output) ?? {}
    const queued = resumed(JSON.parse(data.delivery) as Job, left)
    // If the last attempt left no result of ours, its process died or the job expired.
    const delivery = retryCount > ended ? host.interrupted?.(queued) ?? queued : queued
    const attempt = retryCount + 1
    if (attempt > attempts) return await giveUp(job, delivery, attempts)
    try {
      await host.process(delivery, attempt)
    } catch (error) {
      if (attempt === attempts) return die({ job, dead: deadDelivery(delivery, attempts, error), error })
      host.report(error, delivery, { attempt, attempts })
      return { id, status: 'failed', output: outputOf({ attempts: attempt, ...describeFailure(delivery, error) }) }
    }
    return { id, status: 'completed' }
  }

  /**
   * Ends a job that has no attempt left. If its last attempt left no result, asks the store first, which may know which handlers had succeeded.
   */
  async function giveUp (job: QueuedJob, delivery: Job, attempts: number): Promise<JobResult> {
    const before = unrecorded.get(job.id)
    if (before !== undefined) return die({ ...before, job })
    const { attempts: ended = 0, errors: [first] = [], errors = [] } = failureOf(job.output) ?? {}
    if (ended >= attempts && first !== undefined) {
      const error = errorOf(first.message, first.stack)
      return die({ job, dead: { ...deadDelivery(delivery, attempts, error), errors }, error })
    }
    let known
    try {
      known = await host.recorded?.(delivery)
    } catch (trouble) {
      // pg-boss starts the job again after its backoff. Waits first, because the backoff may be 0.
      host.report(trouble, delivery)
      await sleep(1_000)
      return { id: job.id, status: 'failed', ...(job.output !== null && { output: job.output }) }
    }
    const { done = false, ...left } = known ?? {}
    if (done) return { id: job.id, status: 'completed' }
    const error = new Error('the process ended, or the job expired, while the handlers ran')
    return die({ job, dead: deadDelivery({ ...delivery, ...left }, attempts, error), error })
  }

  /** Records the result of a job before its batch has ended. If that fails, it is recorded with the batch, or a death after the job's backoff. */
  async function record (job: QueuedJob, { status, output }: JobResult): Promise<void> {
    try {
      if (status === 'completed') {
        await complete(job)
        return
      }
      // pg-boss can record a death only with its batch. So the job is started once more, and its death is recorded with that batch. `startAfter` is
      // not this process's now, which is the future if PostgreSQL's clock is behind, and not long ago, because pg-boss counts the retention from it
      // and deletes what is beyond.
      await boss.fail(queueName, job, output)
      if (status === 'deadletter') await boss.update(queueName, undefined, { id: job.id, startAfter: new Date(Date.now() - DAY), retentionSeconds: KEPT })
      workers.wake()
    } catch {}
  }

  function die (death: Death): JobResult {
    const { job, dead } = death
    unrecorded.set(job.id, death)
    const { attempts, errors, finished, remembered, diedAt } = dead
    return { id: job.id, status: 'deadletter', output: outputOf({ attempts, errors, finished, ...(remembered !== undefined && { remembered }), diedAt }) }
  }

  /** Reports a death once it is recorded. Polls, because pg-boss does not say when it has recorded a result. */
  async function tellOnceRecorded (death: Death): Promise<void> {
    const { job: { id, retryCount }, dead, error } = death
    for (let wait = 10; wait < PATIENCE; wait *= 2) {
      await sleep(wait, undefined, { ref: false, signal: drained.signal }).catch(() => {})
      const [job] = await boss.findJobs(queueName, { id }).catch(() => [])
      // A later start of the job reports its death itself.
      if (unrecorded.get(id) !== death) return
      if (job?.state === 'failed' && job.retryCount === retryCount) {
        unrecorded.delete(id)
        return tellDead(host, dead, error)
      }
    }
    const { attempts, errors, diedAt, ...delivery } = dead
    host.report(error, delivery, { attempt: attempts, attempts })
  }

  /** Makes a dead delivery of a dead job. If pg-boss has given the job up without a result of ours, asks the store what had succeeded. */
  async function asLeft (job: QueuedJob): Promise<DeadDelivery> {
    const dead = deadOf(job)
    if (failureOf(job.sourceOutput) !== undefined) return dead
    // There is no host if the delivery is requeued before the app is ready.
    const { done, ...left } = await (host as RunnerHost | undefined)?.recorded?.(dead) ?? {}
    return { ...dead, ...left }
  }

  return {
    async start (startedBy) {
      assertOpen('pgboss', closing)
      host = startedBy
      boss.on('error', onError)
      await boss.createQueue(deadName, { retentionSeconds: KEPT })
      await boss.createQueue(queueName, { ...settings, retryLimit: attempts, notify: true })
      // The user may have created it before. pg-boss drops the jobs that another policy has no room for, as if they were queued already.
      const policy = (await boss.getQueue(queueName))?.policy
      if (policy !== 'standard') throw new InvalidOptions(`pgboss: expected the queue "${queueName}" to have the policy standard, got ${policy}, with which pg-boss drops deliveries: delete the queue, or set another queueName`)
      if (worker === false) return
      await workers.start()
    },
    async run (job) {
      if (closing || host === undefined) throw new Overloaded()
      return await enqueue(job) ? undefined : 'duplicate'
    },
    async dead (limit = 100, type) {
      const jobs = await boss.findJobs<QueuedDelivery>(deadName, {
        queued: true,
        limit: Math.min(limit, MAX_LIST),
        ...(type !== undefined && { data: { type: storable(type) } })
      })
      // Sorts and cuts, because before 12.38 pg-boss returns all jobs, in any order.
      return jobs.sort((a, b) => timeOfDeath(a) - timeOfDeath(b)).slice(0, limit).map(deadOf)
    },
    async deadCount () {
      return (await boss.previewRedrive(deadName, { limit: MAX_LIST })).total
    },
    async requeue (delivery, { force = false } = {}) {
      let requeued = false
      for (const job of await boss.findJobs<QueuedDelivery>(deadName, { queued: true, data: { key: idOf(delivery) } })) {
        const { attempts, errors, diedAt, finished, ...again } = await asLeft(job)
        if (!force) assertRemembered({ ...again, finished })
        // The new job's id is made of the dead letter's id, so that several requeues make one job, as do a requeue that a crash has cut off and
        // the next requeue.
        const isNew = await enqueue(resumed(again, { finished }), uuidOf(`requeued ${job.id}`))
        await boss.deleteJob(deadName, job.id)
        if (isNew) requeued = true
      }
      return requeued
    },
    async close () {
      if (host === undefined) return // another app may still start this runner
      closing = true
      await workers.close()
      drained.abort()
      await Promise.all(dying)
      boss.off('error', onError)
    },
    async depth () {
      const [stats] = await boss.getQueueStats(queueName)
      return stats?.queuedCount ?? 0
    }
  }
}

function idOf (delivery: DeliveryRef): string {
  return uuidOf(keyOf(delivery))
}

/** A UUID of version 8 from the first bits of a SHA-256. */
function uuidOf (text: string): string {
  const bytes = createHash('sha256').update(text).digest().subarray(0, 16)
  bytes[6] = bytes[6]! & 0x0f | 0x80
  bytes[8] = bytes[8]! & 0x3f | 0x80
  return bytes.toString('hex').replace(/^(.{8})(.{4})(.{4})(.{4})/, '$1-$2-$3-$4-')
}

/** How often the handlers of a job are started. */
function attemptsOf ({ retryLimit }: QueuedJob): number {
  // A job that a person has redriven has the queue's limit, which does not include LOOKS. A job that was retried by hand has a higher limit than
  // before.
  return retryLimit > LOOKS ? retryLimit - LOOKS : retryLimit
}

/** The result of an attempt, with a line for people who look at the queue. */
function outputOf (failure: Failure): { message: string, failure: string } {
  const summary = failure.errors.map(({ handler, message }) => handler === null ? message : `${handler}: ${message}`).join('; ')
  return { message: storable(summary.slice(0, MAX_SUMMARY)), failure: JSON.stringify(failure) }
}

function failureOf (output: object | null): Failure | undefined {
  const { failure } = (output ?? {}) as { failure?: string }
  return failure === undefined ? undefined : JSON.parse(failure) as Failure
}

function timeOfDeath ({ createdOn }: QueuedJob): number {
  return new Date(createdOn).getTime()
}

/** Makes a dead delivery of a job of the dead letter queue. */
function deadOf (job: QueuedJob): DeadDelivery {
  const delivery = JSON.parse(job.data.delivery) as Job
  const failure = failureOf(job.sourceOutput)
  if (failure !== undefined) return { ...delivery, diedAt: timeOfDeath(job), ...failure }
  // pg-boss or a person has given the job up, so it has no result of ours.
  const { value } = (job.sourceOutput ?? {}) as { value?: { message?: string } }
  const error = errorOf(value?.message ?? 'pg-boss failed the job', '')
  return deadDelivery(delivery, Number(job.sourceRetryCount) + 1, error, timeOfDeath(job))
}
