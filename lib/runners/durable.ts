import { AsyncResource } from 'node:async_hooks'
import { Overloaded } from '../errors.ts'
import { Database } from '../sqlite/database.ts'
import type { SqliteDatabase } from '../sqlite/database.ts'
import { pruning } from '../sqlite/pruning.ts'
import { assertCount } from './background.ts'
import type { Job, Runner, RunnerHost } from './runner.ts'

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

/** A delivery whose attempts are used up. */
export interface DeadDelivery extends Job {
  readonly attempts: number
  /** What its last attempt ended with. */
  readonly error: string
  /** ms since the epoch */
  readonly diedAt: number
}

export interface DurableRunner extends Runner {
  /** The dead deliveries, oldest first. @param limit default 100 */
  dead (limit?: number): DeadDelivery[]
  /** Gives a dead delivery its attempts anew. @returns whether there was one */
  requeue (delivery: Pick<Job, 'endpoint' | 'webhookId'>): boolean
}

/** ms */
const MAX_BACKOFF = 3_600_000
/** ms for which a processed delivery is remembered, so that one that comes again is not queued again. */
const RETENTION = 75 * 3_600_000
/** ms after which the file is looked at again: for trouble to be over, or for what another process has queued. */
const POLL_INTERVAL = 1_000
const MAX_ERROR_LENGTH = 2_000

// `due` is when the next attempt may start; while one runs, the end of its lease. Times are ms since the epoch.
const SCHEMA = `
  CREATE TABLE IF NOT EXISTS openai_webhook_jobs (
    key TEXT PRIMARY KEY,
    job TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'done', 'dead')),
    attempts INTEGER NOT NULL DEFAULT 0,
    due INTEGER NOT NULL,
    error TEXT,
    ended INTEGER
  ) WITHOUT ROWID;
  CREATE INDEX IF NOT EXISTS openai_webhook_jobs_due ON openai_webhook_jobs (state, due);
  CREATE INDEX IF NOT EXISTS openai_webhook_jobs_ended ON openai_webhook_jobs (state, ended);
`

interface Row {
  key: string
  job: string
  attempts: number
  due: number
  error: string | null
  ended: number
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
  const database = new Database(db, SCHEMA)
  const prune = pruning(database, 'openai_webhook_jobs', "state = 'done' AND ended <= ?")
  const insert = database.prepareWrite('INSERT INTO openai_webhook_jobs (key, job, due) VALUES (?, ?, ?) ON CONFLICT (key) DO NOTHING', () => prune(Date.now() - RETENTION))
  const due = database.prepare("SELECT key, job, attempts, due FROM openai_webhook_jobs WHERE state = 'pending' AND due <= ? ORDER BY due LIMIT ?")
  const next = database.prepare("SELECT min(due) AS due FROM openai_webhook_jobs WHERE state = 'pending'")
  // Counted before it runs, so that a delivery that kills the process comes to an end; `due` is who saw it first.
  const take = database.prepareWrite("UPDATE openai_webhook_jobs SET attempts = attempts + 1, due = ? WHERE key = ? AND state = 'pending' AND due = ?")
  const renew = database.prepareWrite("UPDATE openai_webhook_jobs SET due = ? WHERE key = ? AND state = 'pending' AND due = ?")
  const end = database.prepareWrite("UPDATE openai_webhook_jobs SET state = ?, error = ?, ended = ? WHERE key = ? AND state = 'pending' AND due = ?")
  const postpone = database.prepareWrite("UPDATE openai_webhook_jobs SET due = ?, error = ? WHERE key = ? AND state = 'pending' AND due = ?")
  const pending = database.prepare("SELECT count(*) AS count FROM openai_webhook_jobs WHERE state = 'pending'")
  const listDead = database.prepare("SELECT key, job, attempts, error, ended FROM openai_webhook_jobs WHERE state = 'dead' ORDER BY ended LIMIT ?")
  const revive = database.prepareWrite("UPDATE openai_webhook_jobs SET state = 'pending', attempts = 0, due = ?, error = NULL, ended = NULL WHERE key = ? AND state = 'dead'")

  interface Active { until: number, done: Promise<void> }
  const active = new Map<string, Active>()
  let host: RunnerHost | undefined
  let closing = false
  let timer: NodeJS.Timeout | undefined
  let renewal: NodeJS.Timeout | undefined
  let scheduled = false
  // What is in the file is of many requests: none of theirs is the async context that handlers run in.
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
    // Acknowledgements leave before a handler can hold up the event loop.
    setImmediate(pumpOutside)
  }

  function start ({ key, job, attempts: before, due: seen }: Row, host: RunnerHost): void {
    // An event loop that was blocked for longer than the lease: it is still running here.
    if (active.has(key)) return
    if (before >= attempts) {
      // The last attempt ended with the process, or with a lease that ran out.
      const ended = end('dead', 'the process ended while the handlers ran', Date.now(), key, seen)
      if (ended === 1) host.report(new Error(`a delivery is dead: the process ended in attempt ${before} of ${attempts}`), JSON.parse(job) as Job)
      return
    }
    const until = Date.now() + lease
    if (take(until, key, seen) === 0) return
    const entry: Active = { until, done: Promise.resolve() }
    active.set(key, entry)
    renewal ??= setInterval(renewAll, lease / 3).unref()
    entry.done = attempt(host, key, JSON.parse(job) as Job, before + 1, entry)
  }

  async function attempt (host: RunnerHost, key: string, job: Job, count: number, entry: Active): Promise<void> {
    let error: unknown
    let failed = false
    try {
      await host.process(job, count)
    } catch (thrown) {
      error = thrown
      failed = true
    }
    try {
      const now = Date.now()
      const recorded = !failed
        ? end('done', null, now, key, entry.until)
        : count >= attempts
          ? end('dead', describe(error), now, key, entry.until)
          : postpone(now + delay(count), describe(error), key, entry.until)
      if (recorded === 0) host.report(new Error(`the job was taken over while it ran: its lease of ${lease} ms ran out before it could be renewed`), job)
    } catch (trouble) {
      // Not recorded: the lease runs out and it is attempted again.
      host.report(trouble, job)
    }
    if (failed) host.report(error, job)
    active.delete(key)
    if (active.size === 0) {
      clearInterval(renewal)
      renewal = undefined
    }
    schedule()
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
      insert(keyOf(job), JSON.stringify(job), Date.now())
      schedule()
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
    dead (limit = 100) {
      return (listDead.all(limit) as Array<Row & { error: string }>).map(({ job, attempts, error, ended }) => {
        return { ...JSON.parse(job) as Job, attempts, error, diedAt: ended }
      })
    },
    requeue (delivery) {
      const revived = revive(Date.now(), keyOf(delivery)) === 1
      if (revived) schedule()
      return revived
    }
  }
}

function keyOf ({ endpoint, webhookId }: Pick<Job, 'endpoint' | 'webhookId'>): string {
  return `${endpoint} ${webhookId}`
}

/** What a person who looks at a dead delivery reads: the handlers' errors, where they are what failed. */
function describe (error: unknown): string {
  const { cause, message = error } = (error ?? {}) as { cause?: unknown, message?: unknown }
  return String(cause instanceof Error ? cause.message : message).slice(0, MAX_ERROR_LENGTH)
}
