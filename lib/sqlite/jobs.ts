import { causeOf, resumed } from '../runners/handler-failures.ts'
import { assertRemembered, keyOf } from '../runners/runner.ts'
import type { DeadDelivery, DeliveryError, DeliveryRef, Job } from '../runners/runner.ts'
import { RETENTION } from '../stores/store.ts'
import { Database, changed } from './database.ts'
import type { SqliteDatabase } from './database.ts'
import { pruning } from './pruning.ts'

// `due` is when the next attempt may start or, while an attempt runs, the end of its lease. Times are in ms since the epoch. `error` is for
// people who look at the file, `failure` for the next attempt and for `DeadJobs`.
const SCHEMA = `
  CREATE TABLE IF NOT EXISTS openai_webhook_jobs (
    key TEXT PRIMARY KEY,
    job TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'done', 'dead')),
    attempts INTEGER NOT NULL DEFAULT 0,
    due INTEGER NOT NULL,
    error TEXT,
    ended INTEGER,
    failure TEXT
  );
  DROP INDEX IF EXISTS openai_webhook_jobs_due;
  DROP INDEX IF EXISTS openai_webhook_jobs_ended;
  CREATE INDEX IF NOT EXISTS openai_webhook_jobs_pending ON openai_webhook_jobs (due) WHERE state = 'pending';
  CREATE INDEX IF NOT EXISTS openai_webhook_jobs_over ON openai_webhook_jobs (state, ended) WHERE ended IS NOT NULL;
`

/** Opens the table of `durable()` on the user's handle. The table of a version before 0.2 gets the column that it lacks. */
export function openJobs (db: SqliteDatabase): Database {
  return new Database(db, SCHEMA, { table: 'openai_webhook_jobs', column: 'failure' })
}

/** The dead deliveries in a file of durable(). They can be read while a process has the file locked. */
export function deadJobsOf (db: SqliteDatabase): DeadJobs {
  try {
    return new DeadJobs(new Database(db))
  } catch {
    // The table is of a version before 0.2.
    return new DeadJobs(openJobs(db))
  }
}

/** A job that waits for an attempt, or whose attempt is running. */
export interface PendingRow {
  key: string
  job: string
  attempts: number
  due: number
  failure: string | null
}

/** The lease by which one process holds a job. */
export interface Hold {
  readonly key: string
  /** The end of the lease, in ms since the epoch. */
  readonly until: number
  /** The new end of the lease while a renewal is being written. Until the commit is answered, the row may have either end. */
  readonly renewing: number | undefined
}

// Compares `due`, which changes when another process takes the job, so that only the process that holds the job changes its row.
const HELD = "key = ? AND state = 'pending' AND due IN (?, ?)"
const held = ({ key, until, renewing = until }: Hold): [string, number, number] => [key, until, renewing]

const MAX_ERROR_LENGTH = 2_000

/**
 * Reads and writes the pending rows of `openai_webhook_jobs`. A method that changes a row has to be called in a transaction, and returns whether
 * it has changed the row. It does not if another process has the job.
 */
export function pendingJobs (database: Database) {
  const prune = pruning(database, 'openai_webhook_jobs', "state = 'done' AND ended <= ?")
  const insert = database.prepare('INSERT INTO openai_webhook_jobs (key, job, due, attempts) VALUES (?, ?, ?, ?) ON CONFLICT (key) DO NOTHING')
  const due = database.prepare("SELECT key, job, attempts, due, failure FROM openai_webhook_jobs WHERE state = 'pending' AND due <= ? ORDER BY due LIMIT ?")
  const next = database.prepare("SELECT min(due) AS due FROM openai_webhook_jobs WHERE state = 'pending' AND due > ?")
  const count = database.prepare("SELECT count(*) AS count FROM openai_webhook_jobs WHERE state = 'pending'")
  const take = database.prepare("UPDATE openai_webhook_jobs SET attempts = attempts + ?, due = ? WHERE key = ? AND state = 'pending' AND due = ?")
  const giveBack = database.prepare(`UPDATE openai_webhook_jobs SET attempts = attempts - 1, due = ? WHERE ${HELD}`)
  const renew = database.prepare(`UPDATE openai_webhook_jobs SET due = ? WHERE ${HELD}`)
  const postpone = database.prepare(`UPDATE openai_webhook_jobs SET due = ?, error = ?, failure = ? WHERE ${HELD}`)
  const end = database.prepare(`UPDATE openai_webhook_jobs SET state = ?, error = ?, failure = ?, ended = ? WHERE ${HELD}`)

  return {
    due: (now: number, limit: number) => due.all(now, limit) as PendingRow[],
    /** When the first job after `now` is due, in ms since the epoch; `null` if there is none. */
    nextDue: (now: number) => (next.all(now) as [{ due: number | null }])[0].due,
    count: () => (count.all() as [{ count: number }])[0].count,
    /** @returns whether the job was new */
    insert (key: string, job: string, due: number, attempts: number): boolean {
      prune(Date.now() - RETENTION)
      return changed(insert.run(key, job, due, attempts))
    },
    /** @param attempts 1 to count the attempt, which happens before it runs, so that a delivery that kills the process is dead in the end */
    take: ({ key, due }: PendingRow, attempts: 0 | 1, until: number) => changed(take.run(attempts, until, key, due)),
    /** Gives back a job whose attempt was counted but not started. */
    giveBack: (hold: Hold) => changed(giveBack.run(Date.now(), ...held(hold))),
    renew: (hold: Hold, until: number) => changed(renew.run(until, ...held(hold))),
    postpone: (hold: Hold, due: number, error: unknown, failure: Failure) => changed(postpone.run(due, lineOf(error), JSON.stringify(failure), ...held(hold))),
    done: (hold: Hold) => changed(end.run('done', null, null, Date.now(), ...held(hold))),
    dead: (hold: Hold, diedAt: number, error: unknown, failure: Failure) => changed(end.run('dead', lineOf(error), JSON.stringify(failure), diedAt, ...held(hold)))
  }
}

/** The job of a row, with the finished handlers and inbox records of its earlier attempts. */
export function jobOf ({ job, failure }: PendingRow): Job {
  return resumed(JSON.parse(job) as Job, parseFailure(failure))
}

/** A failure in one line, for people who read the file. */
function lineOf (error: unknown): string {
  const { message = error } = (causeOf(error) ?? {}) as { message?: unknown }
  return String(message).slice(0, MAX_ERROR_LENGTH)
}

/** Selects dead deliveries. Each field that is given has to match. */
export interface DeadFilter {
  readonly webhookId?: string | undefined
  readonly endpoint?: string | undefined
  readonly tenant?: string | undefined
  readonly type?: string | undefined
}

/** The last failed attempt of a job, as JSON in the column `failure`. */
export interface Failure {
  readonly attempt: number
  readonly errors: readonly DeliveryError[]
  readonly finished: readonly string[]
  readonly remembered?: Job['remembered']
}

const PATHS: Readonly<Record<keyof DeadFilter, string>> = {
  webhookId: '$.webhookId', endpoint: '$.endpoint', tenant: '$.tenant', type: '$.event.type'
}

interface DeadRow {
  job: string
  attempts: number
  error: string | null
  failure: string | null
  ended: number
}

/** The dead rows of `openai_webhook_jobs`. */
export class DeadJobs {
  readonly #database: Database
  readonly #find
  readonly #revive

  constructor (database: Database) {
    this.#database = database
    this.#find = database.prepare("SELECT job, attempts, error, failure, ended FROM openai_webhook_jobs WHERE key = ? AND state = 'dead'")
    // The finished handlers are kept. The errors are deleted, because they belong to the attempts before the requeue.
    this.#revive = database.prepare(`
      UPDATE openai_webhook_jobs
      SET state = 'pending', attempts = 0, due = ?, error = NULL, ended = NULL, failure = json_set(failure, '$.attempt', 0, '$.errors', json_array())
      WHERE key = ? AND state = 'dead'`)
  }

  /** Oldest first. */
  list (limit: number, filter: DeadFilter = {}): DeadDelivery[] {
    const { where, values } = condition(filter)
    const rows = this.#database.prepare(`SELECT job, attempts, error, failure, ended FROM openai_webhook_jobs WHERE ${where} ORDER BY ended, key LIMIT ?`).all(...values, limit)
    return (rows as DeadRow[]).map(read)
  }

  count (filter: DeadFilter = {}): number {
    const { where, values } = condition(filter)
    const [{ count }] = this.#database.prepare(`SELECT count(*) AS count FROM openai_webhook_jobs WHERE ${where}`).all(...values) as [{ count: number }]
    return count
  }

  /** How many have failed and are not dead yet. */
  waiting (): number {
    const [{ count }] = this.#database.prepare("SELECT count(*) AS count FROM openai_webhook_jobs WHERE state = 'pending' AND failure IS NOT NULL").all() as [{ count: number }]
    return count
  }

  /** Makes a dead job pending again. @returns whether there was such a job @throws FST_OPENAI_WEBHOOK_NEEDS_FORCE */
  revive (delivery: DeliveryRef, force: boolean): boolean {
    const key = keyOf(delivery)
    const [row] = this.#find.all(key) as DeadRow[]
    if (row !== undefined && !force) assertRemembered(read(row))
    return this.#database.transaction(() => changed(this.#revive.run(Date.now(), key)))
  }
}

function condition (filter: DeadFilter): { where: string, values: string[] } {
  const given = Object.entries(PATHS).filter(([name]) => filter[name as keyof DeadFilter] !== undefined)
  return {
    where: ["state = 'dead' AND ended IS NOT NULL", ...given.map(([, path]) => `json_extract(job, '${path}') = ?`)].join(' AND '),
    values: given.map(([name]) => filter[name as keyof DeadFilter]!)
  }
}

function read ({ job, attempts, error, failure, ended }: DeadRow): DeadDelivery {
  const { attempt, errors = [], finished = [], remembered } = parseFailure(failure)
  return {
    ...JSON.parse(job) as Job,
    attempts,
    // Before 0.2 the error was a single text, and a process of that version may have been the last to write the row.
    errors: attempt === attempts ? errors : [{ handler: null, message: error ?? '', stack: '' }],
    finished,
    ...(remembered !== undefined && { remembered }),
    diedAt: ended
  }
}

export function parseFailure (failure: string | null): Partial<Failure> {
  return failure === null ? {} : JSON.parse(failure) as Failure
}
