import { LRUCache } from 'lru-cache'
import { inContext } from '../async-context.ts'
import { BOOLEAN, LONGEST_TIMER, assertOption, assertRules, wholeNumber } from '../checks.ts'
import { Overloaded } from '../errors.ts'
import { deadDelivery, describeFailure, errorOf, resumed } from '../runners/handler-failures.ts'
import { assertOpen, keyOf, tellDead } from '../runners/runner.ts'
import type { DeadDelivery, DeliveryError, DeliveryRef, Job, RequeueOptions, Runner, RunnerHost } from '../runners/runner.ts'
import type { SqliteDatabase } from './database.ts'
import { DeadJobs, jobOf, openJobs, parseFailure, pendingJobs } from './jobs.ts'
import type { Hold, PendingRow } from './jobs.ts'

export interface DurableOptions {
  /**
   * Maximum number of deliveries whose handlers run at the same time.
   *
   * @default 10
   */
  concurrency?: number | undefined
  /**
   * How often the handlers of a delivery are started before it is kept as dead. A start counts even if it ends in a crash. A crash also costs up
   * to 200 waiting deliveries one attempt each, unless `attempts` is 1.
   *
   * @default 16
   */
  attempts?: number | undefined
  /**
   * ms before the second attempt. The wait doubles with each attempt, up to an hour; a random part of up to half is taken off.
   *
   * @default 1_000
   */
  backoff?: number | undefined
  /**
   * ms for which the lease of an attempt lasts if it is not renewed. This is how long after a crash the interrupted deliveries are attempted
   * again.
   *
   * @default 30_000
   */
  lease?: number | undefined
}

export interface DurableRunner extends Runner {
  /** The dead deliveries, oldest first. @param limit default 100 @param type of one event type alone */
  dead (limit?: number, type?: string): DeadDelivery[]
  /** The number of dead deliveries. */
  deadCount (): number
  /**
   * Gives a dead delivery its attempts anew. Handlers that had succeeded do not run again. @returns whether there was such a delivery
   *
   * @throws FST_OPENAI_WEBHOOK_NEEDS_FORCE
   */
  requeue (delivery: DeliveryRef, options?: RequeueOptions): boolean
}

/**
 * Maximum number of deliveries whose first attempt is recorded ahead, before there is room to run it. Otherwise each would cost two more
 * commits.
 */
const AHEAD = 200
const RULES = { concurrency: wholeNumber('deliveries', 1), attempts: wholeNumber('attempts', 1), backoff: wholeNumber('ms', 0), lease: wholeNumber('ms', 1, LONGEST_TIMER) }
/** ms */
const MAX_BACKOFF = 3_600_000
/** Longest time between two looks at the file, in ms. Looks are needed after trouble, and for deliveries that another process has queued. */
const POLL_INTERVAL = 1_000
/** Maximum number of failed attempts that are remembered because they could not be recorded. */
const MAX_UNRECORDED = 1_000
/** The end of the lease of a job that another process has taken over. */
const LOST = 0

/** An attempt that this process makes, or is about to make. */
interface Attempt extends Hold {
  /** How often the job's handlers were started, this time included. */
  readonly count: number
  until: number
  renewing: number | undefined
  readonly ended: Promise<void>
  readonly end: () => void
}

/** An attempt whose handlers start as soon as there is room. */
interface Ahead {
  readonly attempt: Attempt
  readonly job: Job
  readonly giveClaimBack: (() => unknown) | undefined
}

/**
 * Commits a delivery to the user's SQLite file before it is acknowledged, and runs its handlers afterwards. If they fail, they are attempted
 * again with exponential backoff; after a restart, unfinished deliveries are attempted again. The handlers run at least once, even if the
 * process crashes at any moment. No server is needed. Several processes of one machine may share the file.
 *
 * Creates the table `openai_webhook_jobs`, sets the handle to WAL with one fsync for each commit, and never closes the handle. While the file is
 * locked, full, read-only or deleted, the sender is answered 503.
 *
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS, and SQLite's own error if the table cannot be created
 */
export function durable (db: SqliteDatabase, options: DurableOptions = {}): DurableRunner {
  assertRules('durable', options, RULES)
  const { concurrency = 10, attempts = 16, backoff = 1_000, lease = 30_000 } = options
  const database = openJobs(db)
  const jobs = pendingJobs(database)
  const deadJobs = new DeadJobs(database)

  /** Given when the app is ready. */
  let host: RunnerHost
  let closing = false
  /** The attempts of this process, by the job's key. */
  const active = new Map<string, Attempt>()
  /** The active attempts that wait for room, in the order of arrival. */
  const ahead = new Set<Ahead>()
  /** The errors of failed attempts that could not be recorded, by the job's key. */
  const unrecorded = new LRUCache<string, { count: number, error: unknown }>({ max: MAX_UNRECORDED })
  /** Number of deliveries whose handlers run. */
  let running = 0
  let starting = false
  let scheduled = false
  let timer: NodeJS.Timeout | undefined
  let renewal: NodeJS.Timeout | undefined
  /** Set while the file cannot be written. No job is started then, since its success could not be recorded and it would run again. */
  let isWritable = true
  /** Set when more jobs are due than there was room for. */
  let moreDue = false
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
      const rows = jobs.due(now, room + 1)
      moreDue = rows.length > room
      // A due job may still run here: the event loop was blocked for longer than the lease, and nothing renewed it meanwhile.
      startAll(rows.slice(0, room).filter(({ key }) => !active.has(key)))
      const soonest = jobs.nextDue(now)
      if (!moreDue && soonest !== null) wait = Math.min(wait, soonest - now)
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

  async function startAll (rows: readonly PendingRow[]): Promise<void> {
    if (rows.length === 0) return
    const starts = rows.map(row => {
      // The process died during the last attempt, or its lease ran out.
      const isOver = row.attempts >= attempts
      return { row, isOver, attempt: holdOutside(row.key, isOver ? row.attempts : row.attempts + 1) }
    })
    let taken: boolean[]
    try {
      taken = await write(() => starts.map(({ row, isOver, attempt }) => jobs.take(row, isOver ? 0 : 1, leased(attempt))))
    } catch (error) {
      for (const { attempt } of starts) forget(attempt)
      return host.report(error)
    }
    for (const [index, { row, isOver, attempt }] of starts.entries()) {
      if (!taken[index]) forget(attempt)
      else if (isOver) follow(attempt, async () => await giveUp(row, attempt))
      else follow(attempt, async () => await handle(jobFor(row), attempt))
    }
  }

  /** The job for another attempt. */
  function jobFor (row: PendingRow): Job {
    const job = jobOf(row)
    const last = unrecorded.get(row.key)
    if (last?.count === row.attempts) return resumed(job, describeFailure(job, last.error))
    const isInterrupted = row.attempts > (parseFailure(row.failure).attempt ?? 0)
    return isInterrupted ? host.interrupted?.(job) ?? job : job
  }

  /** Adds an active attempt, whose lease is renewed from now on. */
  function hold (key: string, count: number): Attempt {
    let end!: () => void
    const ended = new Promise<void>(resolve => { end = resolve })
    const attempt: Attempt = { key, count, until: 0, renewing: undefined, ended, end }
    active.set(key, attempt)
    renewal ??= setInterval(renewAll, lease / 3).unref()
    return attempt
  }

  /** Starts the lease at the time of the write, because the write may have waited for a lock. */
  function leased (attempt: Attempt): number {
    attempt.until = Date.now() + lease
    return attempt.until
  }

  function forget (attempt: Attempt): void {
    active.delete(attempt.key)
    attempt.end()
  }

  async function follow (attempt: Attempt, work: () => Promise<void>): Promise<void> {
    try {
      await work()
    } catch (error) {
      // The row cannot be read. The job is attempted again once its lease has run out.
      host.report(error)
    }
    forget(attempt)
    if (moreDue) schedule()
  }

  function startAhead (): void {
    starting = false
    if (!isWritable) return
    const late: Ahead[] = []
    for (const next of ahead) {
      const { job, attempt } = next
      // The process was suspended, or the file was locked, for longer than the lease, so another process may have run the job.
      if (attempt.until <= Date.now()) late.push(next)
      else if (running < concurrency) {
        ahead.delete(next)
        follow(attempt, async () => await handle(job, attempt))
      }
    }
    if (late.length > 0) giveBack(late)
  }

  /** Gives jobs back, so that another process, or this one after a restart, need not wait for the end of a lease. */
  async function giveBack (waiting: readonly Ahead[]): Promise<void> {
    for (const each of waiting) ahead.delete(each)
    const [given] = await Promise.allSettled([
      write(() => { for (const { attempt } of waiting) jobs.giveBack(attempt) }),
      ...waiting.map(async ({ giveClaimBack }) => await giveClaimBack?.())
    ])
    if (given.status === 'rejected') host.report(given.reason)
    for (const { attempt } of waiting) forget(attempt)
    schedule()
  }

  async function handle (job: Job, attempt: Attempt): Promise<void> {
    let recorded: Promise<boolean> | undefined
    const succeeded = async (): Promise<void> => {
      if (recorded === undefined) {
        makeRoom()
        recorded = record(job, () => jobs.done(attempt))
      }
      await recorded
    }
    running++
    try {
      await host.process(job, attempt.count, succeeded)
    } catch (error) {
      makeRoom()
      // `closeTimeout` was over before the handlers could start.
      if (error instanceof Overloaded) await record(job, () => jobs.giveBack(attempt), false)
      else await failed(job, attempt, error)
      return
    }
    await succeeded()
  }

  /** The next job starts in this turn, so that both share a commit. */
  function makeRoom (): void {
    running--
    startSoon(queueMicrotask)
  }

  function startSoon (soon: (start: () => void) => void): void {
    if (starting || ahead.size === 0) return
    starting = true
    soon(startOutside)
  }

  async function failed (job: Job, attempt: Attempt, error: unknown): Promise<void> {
    const { key, count } = attempt
    if (count >= attempts) {
      if (!await die(job, attempt, error)) host.report(error, job)
      return
    }
    const failure = { attempt: count, ...describeFailure(job, error) }
    const recorded = await record(job, () => jobs.postpone(attempt, Date.now() + delay(count), error, failure))
    if (!recorded) unrecorded.set(key, { count, error })
    host.report(error, job, recorded ? { attempt: count, attempts } : undefined)
    // This job may be due before any other.
    schedule()
  }

  /** No attempt is left. Only the store may know which handlers succeeded in the last one. */
  async function giveUp (row: PendingRow, attempt: Attempt): Promise<void> {
    const job = jobOf(row)
    const last = unrecorded.get(attempt.key)
    if (last?.count === attempt.count) {
      await die(job, attempt, last.error, false)
      return
    }
    const { attempt: ended, errors: [first] = [], errors } = parseFailure(row.failure)
    if (ended === attempt.count && first !== undefined) {
      // The last attempt has ended, and `attempts` has been lowered since.
      await die(job, attempt, errorOf(first.message, first.stack), false, errors)
      return
    }
    let known
    try {
      known = await host.recorded?.(job)
    } catch (trouble) {
      // The store is asked again once the lease of the job has run out.
      return host.report(trouble, job)
    }
    const { done = false, ...left } = known ?? {}
    // When the row is gone, another process has done the same.
    if (done) await record(job, () => jobs.done(attempt))
    else await die({ ...job, ...left }, attempt, new Error('the process ended while the handlers ran'), false)
  }

  /**
   * @param ran whether the handlers ran in this attempt, so that a lost lease is reported
   * @param onRecord the errors of the last attempt, if they are on record
   * @returns whether the death is recorded and reported
   */
  async function die (job: Job, attempt: Attempt, error: unknown, ran = true, onRecord?: readonly DeliveryError[]): Promise<boolean> {
    const { key, count } = attempt
    const described = deadDelivery(job, count, error)
    const delivery = onRecord === undefined ? described : { ...described, errors: onRecord }
    const { errors, finished, remembered, diedAt } = delivery
    const recorded = await record(job, () => jobs.dead(attempt, diedAt, error, { attempt: count, errors, finished, remembered }), ran)
    if (recorded) {
      unrecorded.delete(key)
      tellDead(host, delivery, error)
    } else unrecorded.set(key, { count, error })
    return recorded
  }

  /**
   * @param ran whether the handlers ran in this attempt, so that a lost lease is reported
   * @returns whether the change is recorded. If not, the job is attempted again once its lease has run out
   */
  async function record (job: Job, change: () => boolean, ran = true): Promise<boolean> {
    try {
      if (await write(change)) return true
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
    const held = [...active.values()]
    try {
      const renewed = await write(() => held.map(attempt => {
        const until = Date.now() + lease
        // Sets `until` after the commit, because another process that took the job over in this millisecond has the same end.
        if (!jobs.renew(attempt, until)) return LOST
        attempt.renewing = until
        return until
      }))
      for (const [index, attempt] of held.entries()) attempt.until = renewed[index]!
    } catch (error) {
      return host.report(error)
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
      // Jobs in the file come first. With one attempt, none is recorded ahead, because a crash would then use up an attempt that had not
      // started.
      const most = attempts === 1 ? concurrency : concurrency + AHEAD
      if (host === undefined || moreDue || active.size >= most || active.has(key)) {
        moreDue = true
        const inserted = await write(() => jobs.insert(key, text, Date.now(), 0))
        schedule()
        return inserted ? undefined : 'duplicate'
      }
      const attempt = holdOutside(key, 1)
      let inserted = false
      try {
        inserted = await write(() => jobs.insert(key, text, leased(attempt), attempt.count))
      } finally {
        if (!inserted) forget(attempt)
      }
      if (!inserted) return 'duplicate'
      const waiting: Ahead = { attempt, job, giveClaimBack: host.keep?.(job) }
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
      if (host === undefined) return // another app may still start this runner
      closing = true
      clearTimeout(timer)
      if (ahead.size > 0) giveBack([...ahead])
      await Promise.all([...active.values()].map(({ ended }) => ended))
    },
    depth: () => Math.max(0, jobs.count() - active.size + ahead.size),
    dead (limit = 100, type) {
      // Checked, because some SQLite libraries end the process if a value is of another type.
      assertOption('durable: dead()', 'limit', limit, wholeNumber('deliveries', 1))
      return deadJobs.list(limit, { type })
    },
    deadCount: () => deadJobs.count(),
    requeue (delivery, options = {}) {
      assertRules('durable: requeue()', options, { force: BOOLEAN })
      const { force = false } = options
      const revived = deadJobs.revive(delivery, force)
      if (revived) schedule()
      return revived
    }
  }
}
