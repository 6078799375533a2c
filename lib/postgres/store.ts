import { createHash, randomUUID } from 'node:crypto'
import { PRUNE_LIMIT, Pruning } from '../pruning.ts'
import { RETENTION } from '../stores/store.ts'
import type { Claim, IdempotencyStore } from '../stores/store.ts'
import { creating, databaseOf } from './database.ts'
import type { PgLite, PgPool } from './database.ts'
import { STORE_TABLE, storeSchema } from './migration.ts'
import { tableOf } from './table.ts'

export interface PostgresStoreOptions {
  /**
   * A name, or `schema.name`.
   *
   * @default 'openai_webhook_deliveries'
   */
  table?: string
  /**
   * `false`: the table is there, or is created by other tools, by what `migration()` prints.
   *
   * @default true
   */
  migrate?: boolean
}

/** ms for each step: the sender is told 503 before the default deadline of 4,500 ms. */
const TIMEOUT = 4_000

/** Bytes; an index entry has room for about 2,700. */
const MAX_KEY = 1_000

/**
 * Remembers deliveries in PostgreSQL (13 or later), for any number of processes, with one round trip each for `begin` and
 * `complete`. Leases run by the server's clock. The pool is the user's, who closes it; it may lead through PgBouncer in
 * transaction mode. Creates its table with the first delivery, unless `migrate` is false.
 *
 * While no connection can be had, the server is down or read-only, or has not answered within 4 s, each call fails, and the
 * sender is told 503.
 *
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS
 */
export function postgresStore (db: PgPool | PgLite, { table: tableName = STORE_TABLE, migrate = true }: PostgresStoreOptions = {}): IdempotencyStore {
  const table = tableOf('postgresStore', tableName)
  const database = databaseOf('postgresStore', db, TIMEOUT)
  const ready = migrate ? creating(database, table, storeSchema(table)) : () => undefined

  // A new row, a released one or a run-out lease. What the last SELECT sees is older than what a concurrent INSERT has
  // written: a row that it does not find, or finds expired, is somebody else's claim.
  const begin = `
    WITH claim AS (
      INSERT INTO ${table.sql} AS d (key, token, ends, forget)
      VALUES ($1::text, $2::text, now() + $3::float8 * interval '1 ms', now() + ${RETENTION} * interval '1 ms')
      ON CONFLICT (key) DO UPDATE SET token = excluded.token, done = false, ends = excluded.ends, forget = excluded.forget,
        finished = CASE WHEN d.done THEN '' ELSE d.finished END
        WHERE CASE WHEN d.done THEN d.forget <= now() ELSE d.token IS NULL OR d.ends <= now() END
      RETURNING finished
    )
    SELECT 'claimed' AS state, finished FROM claim
    UNION ALL
    SELECT CASE WHEN EXISTS (SELECT FROM ${table.sql} WHERE key = $1::text AND done AND forget > now()) THEN 'done' ELSE 'running' END, ''
      WHERE NOT EXISTS (SELECT FROM claim)`
  const checkpoint = `UPDATE ${table.sql} SET finished = finished || $3::text || chr(10) WHERE key = $1 AND token = $2`
  const complete = `UPDATE ${table.sql} SET token = NULL, done = true, finished = '', forget = now() + $3::float8 * interval '1 ms' WHERE key = $1 AND token = $2 RETURNING key`
  const extend = `UPDATE ${table.sql} SET ends = now() + $3::float8 * interval '1 ms' WHERE key = $1 AND token = $2 RETURNING key`
  const release = `UPDATE ${table.sql} SET token = NULL WHERE key = $1 AND token = $2`
  const pruning = new Pruning(async () => {
    const rows = await database.query(`
      DELETE FROM ${table.sql} WHERE key IN (SELECT key FROM ${table.sql} WHERE forget <= now() LIMIT $1::int FOR UPDATE SKIP LOCKED) RETURNING 1`, [PRUNE_LIMIT])
    return rows.length
  })

  return {
    async begin (key, lease): Promise<Claim> {
      await ready()
      const token = randomUUID()
      const [{ state, finished }] = await database.query(begin, [short(key), token, lease]) as [{ state: Claim['state'], finished: string }]
      if (state !== 'claimed') return { state }
      // What is wrong with the database is told by the next begin().
      pruning.inserted(() => {})
      return { state, token, finished: finished.split('\n').filter(Boolean).map(name => JSON.parse(name) as string) }
    },
    async checkpoint (key, token, handler) {
      await database.query(checkpoint, [short(key), token, JSON.stringify(handler)])
    },
    async complete (key, token, retention) {
      return (await database.query(complete, [short(key), token, retention])).length === 1
    },
    async extend (key, token, lease) {
      return (await database.query(extend, [short(key), token, lease])).length === 1
    },
    async release (key, token) {
      await database.query(release, [short(key), token])
    }
  }
}

/** A key that an index takes. */
function short (key: string): string {
  if (Buffer.byteLength(key) <= MAX_KEY) return key
  return `sha256 ${createHash('sha256').update(key).digest('hex')}`
}
