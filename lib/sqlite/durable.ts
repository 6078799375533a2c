import { LRUCache } from 'lru-cache'
import { inContext } from '../async-context.ts'
import { Overloaded } from '../errors.ts'
import { causeOf, deadDelivery, describeFailure, resumed } from '../runners/handler-failures.ts'
import { RETENTION } from '../stores/store.ts'
import { changed } from './database.ts'
import type { Changes, SqliteDatabase } from './database.ts'
import { DeadJobs, openJobs, parseFailure } from './jobs.ts'
import type { Failure } from './jobs.ts'
import { pruning } from './pruning.ts'
import { assertCount, assertNames } from '../checks.ts'
import { assertOpen, keyOf, tellDead } from '../runners/runner.ts'
import type { DeadDelivery, DeliveryRef, Job, RequeueOptions, Runner, RunnerHost } from '../runners/runner.ts'

export interface DurableOptions {
  /**
   * Deliveries whose handlers run at once.
   *
   * @default 10
   */
  concurrency?: number
  /**
   * How often the handlers of a delivery are started before it is kept as dead. A start counts when it ends in a crash.
   * A crash also costs up to 200 waiting deliveries one attempt each, unless `attempts` is 1.
   *
   * @default 16
   */
  attempts?: number
  /**
   * ms before the second attempt. The wait doubles with each attempt, up to an hour; a random part of up to half is taken off.
   *
   * @default 1_000
   */
  backoff?: number
  /**
   * ms for which an attempt holds without being renewed: so long after a crash its deliveries are attempted again.
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
   * Gives a dead delivery its attempts anew. Handlers that had succeeded do not run again. @returns whether there was one
   *
   * @throws FST_OPENAI_WEBHOOK_NEEDS_FORCE
   */
  requeue (delivery: DeliveryRef, options?: RequeueOptions): boolean
}

/** Deliveries whose first attempt is recorded ahead, before there is room to run it. Otherwise each would cost two more commits. */
const AHEAD = 200
/** ms */
const MAX_BACKOFF = 3_600_000
/** ms between two looks at the file: after trouble, or for deliveries that another process has queued. */
const POLL_INTERVAL = 1_000
const MAX_ERROR_LENGTH = 2_000
/** Attempts */
const MAX_UNRECORDED = 1_000
/** The end of the lease of a job that another process has taken over. */
const LOST = 0

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
export function durable (db: SqliteDatabase, options: DurableOptions = {}): DurableRunner {
  assertNames('durable', options, ['concurrency', 'attempts', 'backoff', 'lease'])
  const { concurrency = 10, attempts = 16, backoff = 1_000, lease = 30_000 } = options
  assertCount('durable', 'concurrency', concurrency, 1)
  assertCount('durable', 'attempts', attempts, 1)
  assertCount('durable', 'backoff', backoff, 0)
  assertCount('durable', 'lease', lease, 1)
  const database = openJobs(db)
  const deadJobs = new DeadJobs(database)
  const prune = pruning(database, 'openai_webhook_jobs', "state = 'done' AND ended <= ?")
  const insert = database.prepare('INSERT INTO openai_webhook_jobs (key, job, due, attempts) VALUES (?, ?, ?, ?) ON CONFLICT (key) DO NOTHING')
  const due = database.prepare("SELECT key, job, attempts, due, failure FROM openai_webhook_jobs WHERE state = 'pending' AND due <= ? ORDER BY due LIMIT ?")
  const next = database.prepare("SELECT min(due) AS due FROM openai_webhook_jobs WHERE state = 'pending' AND due > ?")
  // Compares `due`, so that one of several processes takes a job. That process holds it until then. During a renewal the old end and the new one both count.
  const held = "key = ? AND state = 'pending' AND due IN (?, ?)"
  // Counts the attempt before it runs, so that a delivery that kills the process is dead in the end.
  const take = database.prepare("UPDATE openai_webhook_jobs SET attempts = attempts + ?, due = ? WHERE key = ? AND state = 'pending' AND due = ?")
  const untake = database.prepare(`UPDATE openai_webhook_jobs SET attempts = attempts - 1, due = ? WHERE ${held}`)
  const renew = database.prepare(`UPDATE openai_webhook_jobs SET due = ? WHERE ${held}`)
  const end = database.prepare(`UPDATE openai_webhook_jobs SET state = ?, error = ?, failure = ?, ended = ? WHERE ${held}`)
  const postpone = database.prepare(`UPDATE openai_webhook_jobs SET due = ?, error = ?, failure = ? WHERE ${held}`)
  const pending = database.prepare("SELECT count(*) AS count FROM openai_webhook_jobs WHERE state = 'pending'")

  const active = new Map<string, Active>()
  /** What failed attempts ended with that could not be recorded, by the job's key. */
  const unrecorded = new LRUCache<string, { count: number, error: unknown }>({ max: MAX_UNRECORDED })
  /** Those of them that wait for room, in order of arrival. */
  const ahead = new Set<Ahead>()
  let starting = false
  /** Deliveries whose handlers run. */
  let running = 0
  let host: RunnerHost | undefined
  let closing = false
  let timer: NodeJS.Timeout | undefined
  let renewal: NodeJS.Timeout | undefined
  let scheduled = false
  /** Set while the file cannot be written. No job is started then, since its success could not be recorded and it would run again. */
  let isWritable = true
  /** Set when more jobs are due than there was room for. */
  let behind = false
  // Bound here, because the jobs in the file belong to many requests and must not run in the async context of one.
  const pumpOutside = inContext(pump)
  const startOutside = inContext(startAhead)
  const holdOutside = inContext(hold)

  async function write<T> (work: () => T): Promise<T> {
    let result
    try {
      result = await database.write(work)
    } catch (error) {
      isWritable = false
      throw error
    }
    if (!isWritable) {
      isWritable = true
      startSoon(queueMicrotask)
    }
    return result
  }

  /** Starts due jobs while there is room, and sets the timer for the next look. */
  function pump (): void {
    scheduled = false
    if (closing || host === undefined) return
    clearTimeout(timer)
    let wait = POLL_INTERVAL
    if (!isWritable && ahead.size > 0) renewAll()
    try {
      const now = Date.now()
      const room = Math.max(concurrency - running - ahead.size, 0)
      const rows = due.all(now, room + 1) as Row[]
      behind = rows.length > room
      // A due job may still run here: the event loop was blocked for longer than the lease, and nothing renewed it meanwhile.
      startAll(host, rows.slice(0, room).filter(({ key }) => !active.has(key)))
      const [soonest] = next.all(now) as [{ due: number | null }]
      if (!behind && soonest.due !== null) wait = Math.min(wait, soonest.due - now)
    } catch (error) {
      host.report(error)
    }
    timer = setTimeout(pump, wait).unref()
  }

  function schedule (): void {
    if (scheduled) return
    scheduled = true
    // Waits a turn, so that acknowledgements leave before a handler can block the event loop.
    setImmediate(pumpOutside)
  }

  async function startAll (host: RunnerHost, rows: readonly Row[]): Promise<void> {
    if (rows.length === 0) return
    const entries = rows.map(({ key }) => holdOutside(key))
    // The process died during the last attempt, or its lease ran out.
    const isOver = ({ attempts: before }: Row): boolean => before >= attempts
    let taken: boolean[]
    try {
      taken = await write(() => rows.map((row, index) => changed(take.run(isOver(row) ? 0 : 1, leased(entries[index]!), row.key, row.due))))
    } catch (error) {
      for (const entry of entries) letGo(entry)
      return host.report(error)
    }
    for (const [index, row] of rows.entries()) {
      const entry = entries[index]!
      if (!taken[index]) letGo(entry)
      else if (isOver(row)) follow(host, entry, async () => await giveUp(host, jobOf(row), row.attempts, entry))
      else follow(host, entry, async () => await attempt(host, nextOf(host, row, unrecorded.get(row.key)), row.attempts + 1, entry))
    }
  }

  /** A place among those that run at once. */
  function hold (key: string): Active {
    let over!: () => void
    const done = new Promise<void>(resolve => { over = resolve })
    const entry: Active = { key, until: 0, renewing: undefined, done, over }
    active.set(key, entry)
    renewal ??= setInterval(renewAll, lease / 3).unref()
    return entry
  }

  /** Begins the lease when it is written, since the write may have waited for a lock. */
  function leased (entry: Active): number {
    entry.until = Date.now() + lease
    return entry.until
  }

  function letGo (entry: Active): void {
    active.delete(entry.key)
    entry.over()
  }

  async function follow (host: RunnerHost, entry: Active, work: () => Promise<void>): Promise<void> {
    try {
      await work()
    } catch (error) {
      // The row cannot be read. It is looked at again once its lease has run out.
      host.report(error)
    }
    letGo(entry)
    if (behind) schedule()
  }

  function startAhead (): void {
    starting = false
    if (!isWritable) return
    const late: Ahead[] = []
    for (const next of ahead) {
      const { host, job, entry } = next
      // The process was suspended, or the file was locked, for longer than the lease, so another process may have run the job.
      if (entry.until <= Date.now()) late.push(next)
      else if (running < concurrency) {
        ahead.delete(next)
        follow(host, entry, async () => await attempt(host, job, 1, entry))
      }
    }
    if (late.length > 0) giveBack(late)
  }

  /** Gives jobs back, so that another process, or this one after a restart, need not wait for the end of a lease. */
  async function giveBack (waiting: readonly Ahead[]): Promise<void> {
    for (const each of waiting) ahead.delete(each)
    const [given] = await Promise.allSettled([
      write(() => { for (const { entry } of waiting) untake.run(Date.now(), ...holder(entry)) }),
      ...waiting.map(async ({ letGoOfClaim }) => await letGoOfClaim?.())
    ])
    if (given.status === 'rejected') waiting[0]!.host.report(given.reason)
    for (const { entry } of waiting) letGo(entry)
    schedule()
  }

  async function attempt (host: RunnerHost, job: Job, count: number, entry: Active): Promise<void> {
    let recorded: Promise<void> | undefined
    const succeeded = async (): Promise<void> => {
      if (recorded === undefined) {
        ended()
        recorded = done(host, job, entry)
      }
      await recorded
    }
    running++
    try {
      await host.process(job, count, succeeded)
    } catch (error) {
      ended()
      return await failed(host, job, count, entry, error)
    }
    await succeeded()
  }

  /** Room has become free. The next job starts in this turn, so that both share a commit. */
  function ended (): void {
    running--
    startSoon(queueMicrotask)
  }

  function startSoon (soon: (start: () => void) => void): void {
    if (starting || ahead.size === 0) return
    starting = true
    soon(startOutside)
  }

  async function done (host: RunnerHost, job: Job, entry: Active): Promise<void> {
    await record(host, job, () => end.run('done', null, null, Date.now(), ...holder(entry)))
  }

  async function failed (host: RunnerHost, job: Job, count: number, entry: Active, error: unknown): Promise<void> {
    if (count >= attempts) {
      if (!await die(host, job, count, entry, error)) host.report(error, job)
      return
    }
    const failure = { attempt: count, ...describeFailure(job, error) }
    const recorded = await record(host, job, () => postpone.run(Date.now() + delay(count), describe(error), JSON.stringify(failure), ...holder(entry)))
    if (!recorded) unrecorded.set(entry.key, { count, error })
    host.report(error, job, recorded ? { attempt: count, attempts } : undefined)
    // This job may be due before any other.
    schedule()
  }

  /** No attempt is left. Only the store may know which handlers succeeded in the last one. */
  async function giveUp (host: RunnerHost, job: Job, count: number, entry: Active): Promise<void> {
    const last = unrecorded.get(entry.key)
    if (last?.count === count) {
      await die(host, job, count, entry, last.error, false)
      return
    }
    let known
    try {
      known = await host.recorded?.(job)
    } catch (trouble) {
      // It is looked at again once its lease has run out.
      return host.report(trouble, job)
    }
    const { done: isDone = false, ...left } = known ?? {}
    // When the row is gone, another process has done the same.
    if (isDone) await done(host, job, entry)
    else await die(host, { ...job, ...left }, count, entry, new Error('the process ended while the handlers ran'), false)
  }

  /** @returns whether it is dead by now, and told */
  async function die (host: RunnerHost, job: Job, count: number, entry: Active, error: unknown, ran = true): Promise<boolean> {
    const delivery = deadDelivery(job, count, error)
    const { errors, finished, remembered, diedAt } = delivery
    const failure: Failure = { attempt: count, errors, finished, remembered }
    const recorded = await record(host, job, () => end.run('dead', describe(error), JSON.stringify(failure), diedAt, ...holder(entry)), ran)
    if (recorded) {
      unrecorded.delete(entry.key)
      tellDead(host, delivery, error)
    } else unrecorded.set(entry.key, { count, error })
    return recorded
  }

  /** @returns whether it is recorded; if not, the job is attempted again once its lease has run out */
  async function record (host: RunnerHost, job: Job, statement: () => Changes, ran = true): Promise<boolean> {
    try {
      if (await write(() => changed(statement()))) return true
      if (ran) host.report(new Error(`the job was taken over while it ran: its lease of ${lease} ms ran out before it could be renewed`), job)
    } catch (trouble) {
      host.report(trouble, job)
    }
    return false
  }

  async function renewAll (): Promise<void> {
    if (active.size === 0) {
      clearInterval(renewal)
      renewal = undefined
      return
    }
    const entries = [...active.values()]
    try {
      const renewed = await write(() => entries.map(entry => {
        const until = Date.now() + lease
        // Sets `until` after the commit, because another process that took the job over in this millisecond has the same end.
        if (!changed(renew.run(until, ...holder(entry)))) return LOST
        entry.renewing = until
        return until
      }))
      for (const [index, entry] of entries.entries()) entry.until = renewed[index]!
    } catch (error) {
      return host?.report(error)
    }
    startSoon(queueMicrotask)
  }

  function delay (count: number): number {
    const full = Math.min(backoff * 2 ** (count - 1), MAX_BACKOFF)
    return Math.round(full * (1 - Math.random() / 2))
  }

  return {
    start (startedBy) {
      assertOpen('durable', closing)
      host = startedBy
      schedule()
    },
    async run (job) {
      if (closing) throw new Overloaded()
      const key = keyOf(job)
      const text = JSON.stringify(job)
      const insertAs = async (attempt: number, entry?: Active): Promise<boolean> => await write(() => {
        prune(Date.now() - RETENTION)
        return changed(insert.run(key, text, entry === undefined ? Date.now() : leased(entry), attempt))
      })
      // Jobs in the file come first. A last attempt is not counted before it starts.
      const most = attempts === 1 ? concurrency : concurrency + AHEAD
      if (host === undefined || behind || active.size >= most || active.has(key)) {
        behind = true
        const inserted = await insertAs(0)
        schedule()
        return inserted ? undefined : 'duplicate'
      }
      const startedBy = host
      const entry = holdOutside(key)
      let inserted = false
      try {
        inserted = await insertAs(1, entry)
      } finally {
        if (!inserted) letGo(entry)
      }
      if (!inserted) return 'duplicate'
      const waiting: Ahead = { host: startedBy, entry, job, letGoOfClaim: startedBy.keep?.(job) }
      if (closing) {
        await giveBack([waiting])
        return undefined
      }
      ahead.add(waiting)
      // Waits a turn, so that acknowledgements leave before a handler can block the event loop.
      startSoon(setImmediate)
      return undefined
    },
    async close () {
      if (host === undefined) return // another app may start it
      closing = true
      clearTimeout(timer)
      if (ahead.size > 0) giveBack([...ahead])
      await Promise.all([...active.values()].map(({ done }) => done))
    },
    depth () {
      const [{ count }] = pending.all() as [{ count: number }]
      return Math.max(0, count - active.size + ahead.size)
    },
    dead (limit = 100, type) {
      // Some libraries end the process over a value of another kind.
      assertCount('durable: dead()', 'limit', limit, 1)
      return deadJobs.list(limit, { type })
    },
    deadCount: () => deadJobs.count(),
    requeue (delivery, options = {}) {
      assertNames('durable: requeue()', options, ['force'])
      const { force = false } = options
      const revived = deadJobs.revive(delivery, force)
      if (revived) schedule()
      return revived
    }
  }
}

/** A job whose attempt is this process's. */
interface Active {
  readonly key: string
  /** ms since the epoch: the end of its lease, once that has begun. */
  until: number
  /** The end that is being written; whether it holds is known once the commit has been answered. */
  renewing: number | undefined
  readonly done: Promise<void>
  readonly over: () => void
}

/** A job whose handlers start as soon as there is room. */
interface Ahead {
  readonly host: RunnerHost
  readonly entry: Active
  readonly job: Job
  readonly letGoOfClaim: (() => unknown) | undefined
}

/** Which row, and whose: what `held` compares with. */
const holder = ({ key, until, renewing = until }: Active): [string, number, number] => [key, until, renewing]

/** The job for another attempt. @param last what this process knows of an attempt that it could not record */
function nextOf (host: RunnerHost, row: Row, last: { count: number, error: unknown } | undefined): Job {
  const job = jobOf(row)
  if (last?.count === row.attempts) return resumed(job, describeFailure(job, last.error))
  const isInterrupted = row.attempts > (parseFailure(row.failure).attempt ?? 0)
  return isInterrupted ? host.interrupted?.(job) ?? job : job
}

function jobOf ({ job, failure }: Row): Job {
  return resumed(JSON.parse(job) as Job, parseFailure(failure))
}

/** A failure in one line, for people who read the file. */
function describe (error: unknown): string {
  const { message = error } = (causeOf(error) ?? {}) as { message?: unknown }
  return String(message).slice(0, MAX_ERROR_LENGTH)
}
