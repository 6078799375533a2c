import type { JobResult, JobWithMetadata, PgBoss } from 'pg-boss'
import { grouped } from '../grouped.ts'
import { within } from '../within.ts'

export interface WorkersOptions<Data> {
  readonly boss: PgBoss
  readonly queueName: string
  /** Maximum number of jobs that run at the same time. */
  readonly concurrency: number
  /** Maximum number of jobs that are fetched together. Those beyond `concurrency` wait here. */
  readonly batchSize: number
  /** Seconds */
  readonly pollingIntervalSeconds: number
  /** Runs a job. Never rejects. */
  readonly handle: (job: JobWithMetadata<Data>) => Promise<JobResult>
  /** Called when pg-boss is about to record the results of a batch. */
  readonly onRecord: (jobs: ReadonlyArray<JobWithMetadata<Data>>) => void
  readonly onError: (error: Error) => void
}

export interface Workers {
  /** @throws pg-boss's own error if it has been stopped */
  start (): Promise<void>
  /** Makes pg-boss ask for jobs at once. Without LISTEN it would find a new job at its next poll. */
  wake (): void
  /** Ends once the running jobs have ended and are recorded. */
  close (): Promise<void>
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
/** Maximum number of jobs that one statement completes. */
const GROUP = 100

/**
 * Runs the jobs of a queue in batches: one statement fetches a batch, and one records it. pg-boss records a batch once its last job has ended, so
 * a slow job would hold up the others. Therefore, if a batch is not over at once, its worker fetches no more, its jobs are recorded as they end,
 * and another worker fetches for the places that are free.
 */
export function pgbossWorkers<Data extends object> (options: WorkersOptions<Data>): Workers {
  const { boss, queueName, concurrency, batchSize, pollingIntervalSeconds, handle, onRecord, onError } = options
  /** The worker that fetches. There is none while every place is taken. */
  let fetching: Worker | undefined
  /** Workers that fetch no more, until their last batch is recorded. */
  const ending = new Map<Worker, Promise<void>>()
  const complete = grouped<JobWithMetadata<Data>, unknown>(GROUP, async jobs => {
    await boss.complete(queueName, jobs)
    return jobs
  })
  /** Number of jobs that run. */
  let running = 0
  /** Starts the jobs that wait for a place. */
  const waiting: Array<() => void> = []
  /** Whether more jobs are fetched than may run. No other process can run those that wait here, so they must be many and take no time. */
  let isAhead = false
  let closing = false

  const sizeOfBatch = (): number => isAhead ? batchSize : Math.min(concurrency - running - waiting.length, batchSize)

  async function fetch (): Promise<void> {
    const size = sizeOfBatch()
    if (closing || fetching !== undefined || size <= 0) return
    const settings = { includeMetadata: true, batchSize: size, perJobResults: true, pollingIntervalSeconds, notifyPollingIntervalSeconds: pollingIntervalSeconds } as const
    const started = boss.work<Data, JobResult[], typeof settings>(queueName, settings, async jobs => await runBatch(worker, jobs))
    const worker: Worker = { id: '', started, size }
    fetching = worker
    try {
      worker.id = await started
    } catch (error) {
      fetching = undefined
      throw error
    }
  }

  /** Makes the worker that fetches do so again at once, and not at its next poll. */
  function wake (): void {
    if (fetching !== undefined) boss.notifyWorker(fetching.id)
  }

  /** Makes a worker end after its batch, and another one fetch. */
  function replace (worker: Worker): void {
    fetching = undefined
    // pg-boss would stop all workers of the queue if the id were empty.
    const ended = worker.started.then(async id => await boss.offWork(queueName, { id, wait: true }))
    ending.set(worker, ended.finally(() => ending.delete(worker)))
    fetch().catch(onError)
  }

  async function runBatch (worker: Worker, jobs: ReadonlyArray<JobWithMetadata<Data>>): Promise<JobResult[]> {
    let isSlow = false
    const ended: Array<() => Promise<void>> = []
    const results = Promise.all(jobs.map(async job => {
      const result = await inPlace(job)
      if (isSlow) {
        await record(job, result)
        fetch().catch(onError)
      } else ended.push(async () => await record(job, result))
      return result
    }))
    await within(results, QUICK, () => { isSlow = true })
    const isFull = jobs.length === worker.size
    isAhead = isFull && !isSlow
    if (isSlow) {
      if (fetching === worker) replace(worker) // or close() has done it
      for (const recorded of ended) recorded()
    } else if ((await results).some(({ status }) => status === 'failed')) wake() // it may be attempted again once it is recorded
    else if (fetching === worker && worker.size !== sizeOfBatch()) replace(worker)
    else if (isFull) wake()
    await results
    onRecord(jobs)
    return await results
  }

  /** Runs a job once there is a place for it. */
  async function inPlace (job: JobWithMetadata<Data>): Promise<JobResult> {
    if (running < concurrency) running++
    else await new Promise<void>(resolve => waiting.push(resolve))
    const result = await handle(job)
    const next = waiting.shift()
    if (next === undefined) running--
    else next()
    return result
  }

  /** Records the result of a job before its batch has ended. pg-boss records it with the batch if that fails, or if it is a death. */
  async function record (job: JobWithMetadata<Data>, { status, output }: JobResult): Promise<void> {
    try {
      if (status === 'completed') await complete(job)
      else if (status === 'failed') {
        await boss.fail(queueName, job, output)
        wake()
      }
    } catch {}
  }

  return {
    start: fetch,
    wake,
    async close () {
      closing = true
      if (fetching !== undefined) replace(fetching)
      await Promise.all(ending.values())
    }
  }
}
