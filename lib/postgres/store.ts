import { createHash, randomUUID } from 'node:crypto'
import { BOOLEAN, assertNames, assertOption } from '../checks.ts'
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

/** Deliveries of one statement. */
const GROUP = 100

/** ms that a statement waits for a lock: less than TIMEOUT, because the server goes on with a statement that was given up here. */
const LOCK_TIMEOUT = 3_500
/** Shorter in a group, so that one locked row leaves time for the others. */
const LOCK_TIMEOUT_OF_GROUP = 1_500

interface Asked {
  readonly key: string
  readonly token: string
  /** Of the lease, or of the retention. */
  readonly ms: number
}

/** A row of an answer. One of `complete` has only its key. */
interface Row {
  readonly key: string
  readonly state: Claim['state']
  readonly finished: string
}

/** The parameters of a statement of many rows. The statement sets its own lock_timeout, for itself alone, because there may be no session. */
const ASKED = `asked AS (
      SELECT asked.*, set_config('lock_timeout', $4, true) FROM unnest($1::text[], $2::text[], $3::float8[]) AS asked (key, token, ms)
    )`

/** Bytes; an index entry has room for about 2,700. */
const MAX_KEY = 1_000

/**
 * Remembers deliveries in PostgreSQL (13 or later), for any number of processes, with one round trip each for `begin` and
 * `complete`, which deliveries that come at once share. Leases run by the server's clock. The pool is the user's, who closes
 * it; it may lead through PgBouncer in transaction mode. Creates its table with the first delivery, unless `migrate` is false.
 *
 * While no connection can be had, the server is down or read-only, or has not answered within 4 s, each call fails, and the
 * sender is told 503.
 *
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS
 */
export function postgresStore (db: PgPool | PgLite, options: PostgresStoreOptions = {}): IdempotencyStore {
  assertNames('postgresStore', options, ['table', 'migrate'])
  const { table: tableName = STORE_TABLE, migrate = true } = options
  assertOption('postgresStore', 'migrate', migrate, BOOLEAN)
  const table = tableOf('postgresStore', tableName)
  const database = databaseOf('postgresStore', db, TIMEOUT)
  const creation = migrate ? new Creation(database, table, storeSchema(table)) : undefined

  // Claims new rows, released ones and run-out leases. The last SELECT sees an older state than a concurrent INSERT has
  // written, so a row that it does not find, or finds expired, is somebody else's claim. Rows are locked in the order of their
  // keys, so that processes with the same deliveries do not wait for each other in a circle. A row with the call's own token
  // was claimed by the same call, whose answer was lost.
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

  /** Makes one statement of a turn's claims of different deliveries. Several claims of one delivery take several statements. */
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
  }, error => error instanceof NoAnswer)
  const beginOne = forMany(begin)
  const completeOne = forMany(complete)

  return {
    async begin (key, lease): Promise<Claim> {
      await creation?.ready()
      const token = randomUUID()
      const { state, finished } = await beginOne({ key: short(key), token, ms: lease }) as Row
      if (state !== 'claimed') return { state }
      // The next begin() tells what is wrong with the database.
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

/** Shortens a key to what an index takes. */
function short (key: string): string {
  if (Buffer.byteLength(key) <= MAX_KEY) return key
  return `sha256 ${createHash('sha256').update(key).digest('hex')}`
}
