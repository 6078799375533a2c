import { assertRemembered, keyOf } from '../runners/runner.ts'
import type { DeadDelivery, DeliveryError, DeliveryRef, Job } from '../runners/runner.ts'
import { Database } from './database.ts'
import type { SqliteDatabase } from './database.ts'

// `due` is when the next attempt may start; while one runs, the end of its lease. Times are ms since the
// epoch. `error` is for people who look at the file, `failure` for `DeadJobs`.
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

/** Opens the table of `durable()` on the user's handle. A file of a version before 0.2 gets the column that it lacks. */
export function openJobs (db: SqliteDatabase): Database {
  return new Database(db, SCHEMA, { table: 'openai_webhook_jobs', column: 'failure' })
}

/** The dead deliveries of a file that durable() has made. They can be read while a process has the file locked. */
export function deadJobsOf (db: SqliteDatabase): DeadJobs {
  try {
    return new DeadJobs(new Database(db))
  } catch {
    // Of a version before 0.2.
    return new DeadJobs(openJobs(db))
  }
}

/** Selects dead deliveries: each field that is given has to match. */
export interface DeadFilter {
  readonly webhookId?: string | undefined
  readonly endpoint?: string | undefined
  readonly tenant?: string | undefined
  readonly type?: string | undefined
}

/** What the row of a job has of its last failed attempt, as JSON in `failure`. */
export interface Failure {
  readonly attempt: number
  readonly errors: readonly DeliveryError[]
  readonly finished: readonly string[]
  readonly remembered?: Job['remembered']
}

const PATHS: Readonly<Record<keyof DeadFilter, string>> = {
  webhookId: '$.webhookId', endpoint: '$.endpoint', tenant: '$.tenant', type: '$.event.type'
}

interface Row {
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
    // Finished handlers stay recorded. The errors go, since they belong to the last life.
    this.#revive = database.prepareWrite(`
      UPDATE openai_webhook_jobs
      SET state = 'pending', attempts = 0, due = ?, error = NULL, ended = NULL, failure = json_set(failure, '$.attempt', 0, '$.errors', json_array())
      WHERE key = ? AND state = 'dead'`)
  }

  /** Oldest first. */
  list (limit: number, filter: DeadFilter = {}): DeadDelivery[] {
    const { where, values } = condition(filter)
    const rows = this.#database.prepare(`SELECT job, attempts, error, failure, ended FROM openai_webhook_jobs WHERE ${where} ORDER BY ended, key LIMIT ?`).all(...values, limit)
    return (rows as Row[]).map(read)
  }

  count (filter: DeadFilter = {}): number {
    const { where, values } = condition(filter)
    const [{ count }] = this.#database.prepare(`SELECT count(*) AS count FROM openai_webhook_jobs WHERE ${where}`).all(...values) as [{ count: number }]
    return count
  }

  /** @returns whether there was one. @throws FST_OPENAI_WEBHOOK_NEEDS_FORCE */
  revive (delivery: DeliveryRef, force: boolean): boolean {
    const [row] = this.#find.all(keyOf(delivery)) as Row[]
    if (row !== undefined && !force) assertRemembered(read(row))
    return this.#revive(Date.now(), keyOf(delivery)) === 1
  }
}

function condition (filter: DeadFilter): { where: string, values: string[] } {
  const given = Object.entries(PATHS).filter(([name]) => filter[name as keyof DeadFilter] !== undefined)
  return {
    where: ["state = 'dead' AND ended IS NOT NULL", ...given.map(([, path]) => `json_extract(job, '${path}') = ?`)].join(' AND '),
    values: given.map(([name]) => filter[name as keyof DeadFilter]!)
  }
}

function read ({ job, attempts, error, failure, ended }: Row): DeadDelivery {
  const { attempt, errors = [], finished = [], remembered } = parseFailure(failure)
  return {
    ...JSON.parse(job) as Job,
    attempts,
    // Before 0.2 the error was one text. A process of that version may have written the row last.
    errors: attempt === attempts ? errors : [{ handler: null, message: error ?? '', stack: '' }],
    finished,
    ...(remembered !== undefined && { remembered }),
    diedAt: ended
  }
}

export function parseFailure (failure: string | null): Partial<Failure> {
  return failure === null ? {} : JSON.parse(failure) as Failure
}
