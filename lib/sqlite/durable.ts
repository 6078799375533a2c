import { AsyncResource } from 'node:async_hooks'
import { Overloaded } from '../errors.ts'
import { causeOf, deadDelivery, describeFailure } from '../runners/handler-failures.ts'
import { RETENTION } from '../stores/store.ts'
import type { SqliteDatabase } from './database.ts'
import { DeadJobs, openJobs, parseFailure } from './jobs.ts'
import type { Failure } from './jobs.ts'
import { pruning } from './pruning.ts'
import { assertCount } from '../runners/background.ts'
import { keyOf, tellDead } from '../runners/runner.ts'
import type { DeadDelivery, DeliveryRef, Job, RequeueOptions, Runner, RunnerHost } from '../runners/runner.ts'

export interface DurableOptions {
  /**
   * Deliveries whose handlers run at once.
   *
   * @default 10
   */
  concurrency?: number
  /**
   * How often the handlers of a delivery are started before it is kept as dead. A start that ended in a crash counts.
   *
   * @default 16
   */
  attempts?: number
  /**
   * ms before the second attempt. It doubles with each, up to an hour, and a random part of up to half is taken off.
   *
   * @default 1_000
   */
  backoff?: number
  /**
   * ms for which an attempt holds without being renewed: how long after a crash what was running is attempted again.
   *
   * @default 30_000
   */
  lease?: number
}

export interface DurableRunner extends Runner {
  /** The dead deliveries, oldest first. @param limit default 100 @param type of one event type alone */
  dead (limit?: number, type?: string): DeadDelivery[]
  /** How many there are. */
  deadCount (): number
  /**
   * Gives a dead delivery its attempts anew; what had succeeded of it does not run again. @returns whether there was one
   *
   * @throws FST_OPENAI_WEBHOOK_NEEDS_FORCE
   */
  requeue (delivery: DeliveryRef, options?: RequeueOptions): boolean
}

/** ms */
const MAX_BACKOFF = 3_600_000
/** ms after which the file is looked at again: for trouble to be over, or for what another process has queued. */
const POLL_INTERVAL = 1_000
const MAX_ERROR_LENGTH = 2_000

interface Row {
  key: string
  job: string
  attempts: number
  due: number
  failure: string | null
}

/**
 * Commits a delivery to the user's SQLite file before it is acknowledged, and runs its handlers afterwards: again with
 * exponential backoff when they fail, and after a restart. At least once over a crash at any instant, with no server
 * beside it. Several processes on the machine may share the file.
 *
 * Creates the table `openai_webhook_jobs`, sets the handle to WAL with one fsync a commit, and never closes it. A file
 * that is locked, full, read-only or deleted answers the sender 503.
 *
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS, and SQLite's own error when the table cannot be made
 */
export function durable (db: SqliteDatabase, { concurrency = 10, attempts = 16, backoff = 1_000, lease = 30_000 }: DurableOptions = {}): DurableRunner {
  assertCount('durable', 'concurrency', concurrency, 1)
  assertCount('durable', 'attempts', attempts, 1)
  assertCount('durable', 'backoff', backoff, 0)
  assertCount('durable', 'lease', lease, 1)
  const database = openJobs(db)
  const deadJobs = new DeadJobs(database)
  const prune = pruning(database, 'openai_webhook_jobs', "state = 'done' AND ended <= ?")
  const insert = database.prepareWrite('INSERT INTO openai_webhook_jobs (key, job, due) VALUES (?, ?, ?) ON CONFLICT (key) DO NOTHING', () => prune(Date.now() - RETENTION))
  const due = database.prepare("SELECT key, job, attempts, due, failure FROM openai_webhook_jobs WHERE state = 'pending' AND due <= ? ORDER BY due LIMIT ?")
  const next = database.prepare("SELECT min(due) AS due FROM openai_webhook_jobs WHERE state = 'pending'")
  // Counted before it runs, so that a delivery that kills the process dies in the end. `due` is compared: of several processes one wins.
  const take = database.prepareWrite("UPDATE openai_webhook_jobs SET attempts = attempts + 1, due = ? WHERE key = ? AND state = 'pending' AND due = ?")
  const renew = database.prepareWrite("UPDATE openai_webhook_jobs SET due = ? WHERE key = ? AND state = 'pending' AND due = ?")
  const end = database.prepareWrite("UPDATE openai_webhook_jobs SET state = ?, error = ?, failure = ?, ended = ? WHERE key = ? AND state = 'pending' AND due = ?")
  const postpone = database.prepareWrite("UPDATE openai_webhook_jobs SET due = ?, error = ?, failure = ? WHERE key = ? AND state = 'pending' AND due = ?")
  const pending = database.prepare("SELECT count(*) AS count FROM openai_webhook_jobs WHERE state = 'pending'")

  interface Active { until: number, done: Promise<void> }
  const active = new Map<string, Active>()
  let host: RunnerHost | undefined
  let closing = false
  let timer: NodeJS.Timeout | undefined
  let renewal: NodeJS.Timeout | undefined
  let scheduled = false
  // Bound here: the jobs in the file are of many requests, and must not run in the async context of one.
  const pumpOutside = AsyncResource.bind(pump)

  /** Starts what is due and there is room for; looks again when something else will be. */
  function pump (): void {
    scheduled = false
    if (closing || host === undefined) return
    clearTimeout(timer)
    let wait = POLL_INTERVAL
    try {
      const now = Date.now()
      const rows = due.all(now, concurrency - active.size) as Row[]
      for (const row of rows) start(row, host)
      const [soonest] = next.all() as [{ due: number | null }]
      if (active.size < concurrency && soonest.due !== null) wait = Math.min(wait, Math.max(soonest.due - now, 1))
    } catch (error) {
      host.report(error)
    }
    timer = setTimeout(pump, wait).unref()
  }

  function schedule (): void {
    if (scheduled) return
    scheduled = true
    // Lets acknowledgements leave before a handler can hold up the event loop.
    setImmediate(pumpOutside)
  }

  function start ({ key, job: text, attempts: before, due: seen, failure }: Row, host: RunnerHost): void {
    // An event loop that was blocked for longer than the lease: it is still running here.
    if (active.has(key)) return
    // The last attempt ended with the process, or with a lease that ran out.
    const isOver = before >= attempts
    const until = Date.now() + lease
    if ((isOver ? renew : take)(until, key, seen) === 0) return
    const entry: Active = { until, done: Promise.resolve() }
    active.set(key, entry)
    renewal ??= setInterval(renewAll, lease / 3).unref()
    const { finished = [], remembered } = parseFailure(failure)
    const job = { ...JSON.parse(text) as Job, ...(finished.length > 0 && { finished }), ...(remembered !== undefined && { remembered }) }
    const work = isOver ? giveUp(host, key, job, before, entry) : attempt(host, key, job, before + 1, entry)
    entry.done = work.then(() => {
      active.delete(key)
      if (active.size === 0) {
        clearInterval(renewal)
        renewal = undefined
      }
      schedule()
    })
  }

  async function attempt (host: RunnerHost, key: string, job: Job, count: number, entry: Active): Promise<void> {
    try {
      await host.process(job, count)
    } catch (error) {
      return failed(host, key, job, count, entry, error)
    }
    done(host, key, job, entry)
  }

  function done (host: RunnerHost, key: string, job: Job, entry: Active): void {
    record(host, job, () => end('done', null, null, Date.now(), key, entry.until))
  }

  function failed (host: RunnerHost, key: string, job: Job, count: number, entry: Active, error: unknown): void {
    if (count >= attempts) {
      if (!die(host, key, job, count, entry, error)) host.report(error, job)
      return
    }
    const failure = { attempt: count, ...describeFailure(job, error) }
    const recorded = record(host, job, () => postpone(Date.now() + delay(count), describe(error), JSON.stringify(failure), key, entry.until))
    host.report(error, job, recorded ? { attempt: count, attempts } : undefined)
  }

  /** No attempt is left. What had succeeded in the last one is on record in the store, if anywhere. */
  async function giveUp (host: RunnerHost, key: string, job: Job, count: number, entry: Active): Promise<void> {
    let known
    try {
      known = await host.recorded?.(job)
    } catch (trouble) {
      // The lease runs out, and it is looked at again.
      return host.report(trouble, job)
    }
    const { done: isDone = false, ...left } = known ?? {}
    // Where it is not there any more, another process has done the same.
    if (isDone) done(host, key, job, entry)
    else die(host, key, { ...job, ...left }, count, entry, new Error('the process ended while the handlers ran'), false)
  }

  /** @returns whether it is dead by now, and told */
  function die (host: RunnerHost, key: string, job: Job, count: number, entry: Active, error: unknown, ran = true): boolean {
    const delivery = deadDelivery(job, count, error)
    const { errors, finished, remembered, diedAt } = delivery
    const failure: Failure = { attempt: count, errors, finished, remembered }
    const recorded = record(host, job, () => end('dead', describe(error), JSON.stringify(failure), diedAt, key, entry.until), ran)
    if (recorded) tellDead(host, delivery, error)
    return recorded
  }

  /** @returns whether it is on record; where it is not, the lease runs out and the job is attempted again */
  function record (host: RunnerHost, job: Job, write: () => number, ran = true): boolean {
    try {
      if (write() === 1) return true
      if (ran) host.report(new Error(`the job was taken over while it ran: its lease of ${lease} ms ran out before it could be renewed`), job)
    } catch (trouble) {
      host.report(trouble, job)
    }
    return false
  }

  function renewAll (): void {
    for (const [key, entry] of active) {
      const until = Date.now() + lease
      try {
        if (renew(until, key, entry.until) === 1) entry.until = until
      } catch (error) {
        host?.report(error)
      }
    }
  }

  function delay (count: number): number {
    const full = Math.min(backoff * 2 ** (count - 1), MAX_BACKOFF)
    return Math.round(full * (1 - Math.random() / 2))
  }

  return {
    start (startedBy) {
      host = startedBy
      schedule()
    },
    run (job) {
      if (closing) throw new Overloaded()
      database.assertFile()
      const inserted = insert(keyOf(job), JSON.stringify(job), Date.now())
      schedule()
      return inserted === 0 ? 'duplicate' : undefined
    },
    async close () {
      closing = true
      clearTimeout(timer)
      await Promise.all([...active.values()].map(({ done }) => done))
    },
    depth () {
      const [{ count }] = pending.all() as [{ count: number }]
      return Math.max(0, count - active.size)
    },
    dead: (limit = 100, type) => deadJobs.list(limit, { type }),
    deadCount: () => deadJobs.count(),
    requeue (delivery, { force = false } = {}) {
      const revived = deadJobs.revive(delivery, force)
      if (revived) schedule()
      return revived
    }
  }
}

/** A failure in a line, for people who look at the file. */
function describe (error: unknown): string {
  const { message = error } = (causeOf(error) ?? {}) as { message?: unknown }
  return String(message).slice(0, MAX_ERROR_LENGTH)
}
