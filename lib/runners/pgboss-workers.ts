import type { JobResult, JobWithMetadata, PgBoss } from 'pg-boss'
import { within } from '../within.ts'

export interface WorkersOptions<Data> {
  readonly boss: PgBoss
  readonly queueName: string
  /** Maximum number of jobs that run at the same time. */
  readonly concurrency: number
  /** Maximum number of jobs that are fetched together. */
  readonly batchSize: number
  /** Seconds */
  readonly pollingIntervalSeconds: number
  /** Runs a job. Never rejects. */
  readonly handle: (job: JobWithMetadata<Data>) => Promise<JobResult>
  /** Records the result of a job before its batch has ended. Never rejects: if it fails, pg-boss records the result with the batch. */
  readonly record: (job: JobWithMetadata<Data>, result: JobResult) => Promise<void>
  /** Called when pg-boss is about to record the results of a batch. */
  readonly onRecord: (jobs: ReadonlyArray<JobWithMetadata<Data>>) => void
  readonly onError: (error: Error) => void
}

/** A worker of pg-boss. */
interface Worker {
  id: string
  /** Resolves with the id. */
  readonly started: Promise<string>
  /** Maximum number of jobs in a batch. */
  readonly size: number
}

/** ms that a batch may take until its jobs are recorded one by one. */
const QUICK = 10
/** ms after which free places are used although a result is not recorded yet. */
const PATIENCE = 1_000

/**
 * Runs the jobs of a queue in batches: one statement fetches as many as there are free places, and one records them. pg-boss records a batch once
 * its last job has ended, so a slow job would hold up the others. Therefore, if a batch is not over at once, its worker fetches no more, its jobs
 * are recorded as they end, and another worker fetches for the free places.
 */
export function pgbossWorkers<Data extends object> (options: WorkersOptions<Data>) {
  const { boss, queueName, concurrency, batchSize, pollingIntervalSeconds, handle, record, onRecord, onError } = options
  /** The worker that fetches. There is none while every place is taken. */
  let fetching: Worker | undefined
  /** The ends of workers that fetch no more. They end once their last batch is recorded. */
  const ending = new Set<Promise<void>>()
  /** Number of jobs that run. */
  let running = 0
  let closing = false

  /** @throws pg-boss's own error if it has been stopped */
  async function fetch (): Promise<void> {
    const size = Math.min(concurrency - running, batchSize)
    if (closing || fetching !== undefined || size < 1) return
    const settings = { includeMetadata: true, batchSize: size, perJobResults: true, pollingIntervalSeconds, notifyPollingIntervalSeconds: pollingIntervalSeconds } as const
    const started = boss.work<Data, JobResult[], typeof settings>(queueName, settings, async jobs => await runBatch(worker, jobs))
    const worker: Worker = { id: '', started, size }
    fetching = worker
    try {
      worker.id = await started
    } catch (error) {
      // The user has stopped pg-boss.
      fetching = undefined
      closing = true
      throw error
    }
  }

  /** Makes the worker that fetches do so again at once. Without LISTEN it would find a new job at its next poll. */
  function wake (): void {
    if (fetching !== undefined) boss.notifyWorker(fetching.id)
  }

  /** Makes the worker that fetches end after its batch, and another one fetch. */
  function replace (worker: Worker): void {
    if (fetching !== worker) return // close() has replaced it
    fetching = undefined
    // pg-boss would stop all workers of the queue if the id were empty.
    const end = worker.started.then(async id => await boss.offWork(queueName, { id, wait: true })).finally(() => ending.delete(end))
    ending.add(end)
    fetch().catch(onError)
  }

  async function runBatch (worker: Worker, jobs: ReadonlyArray<JobWithMetadata<Data>>): Promise<JobResult[]> {
    running += jobs.length
    let isSlow = false
    const ended: Array<() => Promise<void>> = []
    const results = Promise.all(jobs.map(async job => {
      const result = await handle(job)
      if (isSlow) {
        // The place is free once the result is recorded: a job that has died takes it to have its death recorded.
        await record(job, result)
        running--
        fetch().catch(onError)
      } else {
        running--
        ended.push(async () => await record(job, result))
      }
      return result
    }))
    await within(results, QUICK, () => { isSlow = true })
    if (isSlow) {
      await within(Promise.all(ended.map(async recordEnded => await recordEnded())), PATIENCE, () => {})
      replace(worker)
    } else if ((await results).some(({ status }) => status === 'failed')) wake() // it may be attempted again once it is recorded
    else if (jobs.length === worker.size) replace(worker) // there may be more, and another worker can fetch them while this one records
    const all = await results
    onRecord(jobs)
    return all
  }

  return {
    start: fetch,
    wake,
    /** Ends once the running jobs have ended and are recorded. */
    async close (): Promise<void> {
      closing = true
      if (fetching !== undefined) replace(fetching)
      await Promise.all(ending)
    }
  }
}
