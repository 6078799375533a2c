import { createHash, randomUUID } from 'node:crypto'
import { ANYTHING, BOOLEAN, assertRules } from '../checks.ts'
import { grouped } from '../grouped.ts'
import { PRUNE_LIMIT, Pruning } from '../pruning.ts'
import { RETENTION } from '../stores/store.ts'
import type { Claim, IdempotencyStore } from '../stores/store.ts'
import { Creation, databaseOf, NoAnswer } from './database.ts'
import type { PgLite, PgPool } from './database.ts'
import { STORE_TABLE, storeSchema } from './migration.ts'
import { tableOf } from './table.ts'

export interface PostgresStoreOptions {
  /**
   * The name of the table, or `schema.name`.
   *
   * @default 'openai_webhook_deliveries'
   */
  table?: string | undefined
  /**
   * `false` if the table already exists, or is created by other tools with the SQL that `migration()` returns.
   *
   * @default true
   */
  migrate?: boolean | undefined
}

/** ms that each step may take. Less than the default deadline of 4,500 ms, so that the sender is answered 503 before the deadline. */
const TIMEOUT = 4_000

/** Maximum number of deliveries in one statement. */
const GROUP = 100

/** ms that a statement waits for a lock. Less than TIMEOUT, because the server continues with a statement that was given up here. */
const LOCK_TIMEOUT = 3_500
/** Shorter in a group, so that one locked row leaves time for the others. */
const LOCK_TIMEOUT_OF_GROUP = 1_500

interface Asked {
  readonly key: string
  readonly token: string
  /** The length of the lease or of the retention. */
  readonly ms: number
}

/** A row of an answer. A row from `complete` has only the key. */
interface Row {
  readonly key: string
  readonly state: Claim['state']
  readonly finished: string
}

/** The parameters of a statement for many rows. The statement sets lock_timeout for itself only, because there may be no session. */
const ASKED = `asked AS (
      SELECT asked.*, set_config('lock_timeout', $4, true) FROM unnest($1::text[], $2::text[], $3::float8[]) AS asked (key, token, ms)
    )`

/** Maximum length of a key in bytes. An index entry has room for about 2,700. */
const MAX_KEY = 1_000

/**
 * Remembers deliveries in PostgreSQL (13 or later), for any number of processes. `begin` and `complete` take one round trip each, which
 * deliveries that arrive at the same time share. Leases are timed by the server's clock. The pool belongs to the user, who closes it, and may
 * connect through PgBouncer in transaction mode. Creates its table with the first delivery, unless `migrate` is false.
 *
 * If no connection is available, or the server is down, read-only or does not answer within 4 s, each call fails. If that call is `begin`, the
 * sender is answered 503.
 *
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS
 */
export function postgresStore (db: PgPool | PgLite, options: PostgresStoreOptions = {}): IdempotencyStore {
  assertRules('postgresStore', options, { table: ANYTHING, migrate: BOOLEAN })
  const { table: tableName = STORE_TABLE, migrate = true } = options
  const table = tableOf('postgresStore', tableName)
  const database = databaseOf('postgresStore', db, TIMEOUT)
  const creation = migrate ? new Creation(database, table, storeSchema(table)) : undefined

  // Claims new rows, released rows and rows whose lease has expired. The last SELECT sees a state from before a concurrent INSERT, so a row that
  // it does not find, or finds expired, has been claimed by another call. Rows are locked in the order of their keys, so that processes with the
  // same deliveries do not deadlock. A row with the call's own token was claimed by the same call, whose answer was lost.
  const begin = `
    WITH ${ASKED},
    claim AS (
      INSERT INTO ${table.sql} AS d (key, token, ends, forget)
      SELECT key, token, now() + ms * interval '1 ms', now() + ${RETENTION} * interval '1 ms' FROM asked ORDER BY key
      ON CONFLICT (key) DO UPDATE SET token = excluded.token, done = false, ends = excluded.ends, forget = excluded.forget,
        finished = CASE WHEN d.done THEN '' ELSE d.finished END
        WHERE CASE WHEN d.done THEN d.forget <= now() ELSE d.token IS NULL OR d.ends <= now() OR d.token = excluded.token END
      RETURNING key, finished
    )
    SELECT key, claim.finished, CASE WHEN claim.finished IS NOT NULL THEN 'claimed'
      WHEN EXISTS (SELECT FROM ${table.sql} AS d WHERE d.key = asked.key AND done AND forget > now()) THEN 'done' ELSE 'running' END AS state
      FROM asked LEFT JOIN claim USING (key)`
  const checkpoint = `UPDATE ${table.sql} SET finished = finished || $3::text || chr(10) WHERE key = $1 AND token = $2`
  const complete = `
    WITH ${ASKED},
    mine AS (SELECT key, ms FROM ${table.sql} AS d JOIN asked USING (key, token) ORDER BY key FOR UPDATE OF d)
    UPDATE ${table.sql} AS d SET token = NULL, done = true, finished = '', forget = now() + ms * interval '1 ms' FROM mine WHERE d.key = mine.key RETURNING d.key`
  const extend = `UPDATE ${table.sql} SET ends = now() + $3::float8 * interval '1 ms' WHERE key = $1 AND token = $2 RETURNING key`
  const release = `UPDATE ${table.sql} SET token = NULL WHERE key = $1 AND token = $2`
  const pruning = new Pruning(async () => {
    const rows = await database.query(`
      DELETE FROM ${table.sql} WHERE key IN (SELECT key FROM ${table.sql} WHERE forget <= now() LIMIT $1::int FOR UPDATE SKIP LOCKED) RETURNING 1`, [PRUNE_LIMIT])
    return rows.length
  })

  /** Combines the calls of one turn of the event loop into one statement. Several calls for the same delivery take several statements. */
  const forMany = (sql: string) => grouped<Asked, Row | undefined>(GROUP, async asked => {
    const rows = new Map<Asked, Row>()
    const lockTimeout = asked.length > 1 ? LOCK_TIMEOUT_OF_GROUP : LOCK_TIMEOUT
    for (let left = asked; left.length > 0;) {
      const now = new Map(left.map(each => [each.key, each]).reverse() as Array<[string, Asked]>)
      const columns = [...now.values()]
      const found = await database.query(sql, [columns.map(({ key }) => key), columns.map(({ token }) => token), columns.map(({ ms }) => ms), String(lockTimeout)]) as Row[]
      for (const row of found) rows.set(now.get(row.key)!, row)
      left = left.filter(each => now.get(each.key) !== each)
    }
    return asked.map(each => rows.get(each))
  }, { isShared: error => error instanceof NoAnswer })
  const beginOne = forMany(begin)
  const completeOne = forMany(complete)

  return {
    async begin (key, lease): Promise<Claim> {
      await creation?.ready()
      const token = randomUUID()
      const { state, finished } = await beginOne({ key: short(key), token, ms: lease }).catch((error: unknown) => {
        creation?.failed(error)
        throw error
      }) as Row
      if (state !== 'claimed') return { state }
      // The failure is ignored, because the next begin() reports what is wrong with the database.
      pruning.inserted(() => {})
      return { state, token, finished: finished.split('\n').filter(Boolean).map(name => JSON.parse(name) as string) }
    },
    async checkpoint (key, token, handler) {
      await database.query(checkpoint, [short(key), token, JSON.stringify(handler)])
    },
    async complete (key, token, retention) {
      return await completeOne({ key: short(key), token, ms: retention }) !== undefined
    },
    async extend (key, token, lease) {
      return (await database.query(extend, [short(key), token, lease])).length === 1
    },
    async release (key, token) {
      await database.query(release, [short(key), token])
    }
  }
}

/** Replaces a key that is too long for an index by its hash. */
function short (key: string): string {
  if (Buffer.byteLength(key) <= MAX_KEY) return key
  return `sha256 ${createHash('sha256').update(key).digest('hex')}`
}
