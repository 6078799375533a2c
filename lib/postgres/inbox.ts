import type { FastifyInstance } from 'fastify'
import { InvalidOptions, NoTransaction, RolledBack } from '../errors.ts'
import { assertHandlerName, giveName } from '../handler-name.ts'
import { INBOX_RETENTION, assertFirst, noteRetention, prune, recordOf } from '../inbox/inbox.ts'
import type { Inbox, InboxContext, InboxQuery, InboxWork } from '../inbox/inbox.ts'
import { lend } from '../inbox/lend.ts'
import type { EventContext } from '../handlers.ts'
import { PRUNE_INTERVAL, PRUNE_LIMIT, Pruning } from '../pruning.ts'
import { ANYTHING, BOOLEAN, assertRules, wholeNumber } from '../checks.ts'
import { Creation, databaseOf, isPool } from './database.ts'
import type { Database, PgClient, PgLite, PgLiteTransaction, PgPool } from './database.ts'
import { Gate } from './gate.ts'
import { INBOX_TABLE, inboxSchema } from './migration.ts'
import { tableOf } from './table.ts'
import type { Table } from './table.ts'

export interface PostgresInboxOptions {
  /**
   * The name of the table, or `schema.name`. Services that share a database need a table each.
   *
   * @default 'openai_webhook_inbox'
   */
  table?: string | undefined
  /**
   * ms for which a record is kept.
   *
   * @default 2_592_000_000 (30 days)
   */
  retention?: number | undefined
  /**
   * `false` if the table already exists, or is created by other tools with the SQL that `migration()` returns.
   *
   * @default true
   */
  migrate?: boolean | undefined
  /**
   * Maximum number of concurrent transactions of `once()`. The pool's other clients are left to the store and the app.
   *
   * @default 8
   */
  concurrency?: number | undefined
  /**
   * ms that a statement of `once()` waits for a lock, such as the lock of another process that handles the same delivery.
   *
   * @default 5_000
   */
  lockTimeout?: number | undefined
  /**
   * ms after which PostgreSQL ends a transaction of `once()` in which nothing happens.
   *
   * @default 60_000
   */
  idleTimeout?: number | undefined
}

/** An inbox that has only `first()`, because `once()` needs connections. */
export type PostgresFirst = Pick<PostgresInbox<never>, 'first'>

export interface PostgresInbox<Tx> extends Inbox<Tx> {
  first (query: InboxQuery<PromiseLike<unknown>>, name: string, context: InboxContext): Promise<boolean>
  close (): Promise<void>
}

/** ms that a step may take in addition to `lockTimeout`. */
const PATIENCE = 5_000

/**
 * Makes effects in PostgreSQL (13 or later) happen once: a handler's writes and the record that it has run are committed together. Creates its
 * table with the first delivery, unless `migrate` is false. The pool belongs to the user, who closes it, and may connect through PgBouncer in
 * transaction mode. Without a pool the inbox has only `first()`, and creates nothing.
 *
 * `tx` of `once()` is the client of the pool, or the transaction of PGlite. Handlers made by `once()` fail with
 * FST_OPENAI_WEBHOOK_TRANSACTION_OVER and FST_OPENAI_WEBHOOK_ROLLED_BACK, and `first()` with FST_OPENAI_WEBHOOK_NO_TRANSACTION.
 *
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS, also if the pool has fewer clients than `concurrency`
 */
export function postgresInbox<Client extends PgClient> (pool: PgPool<Client>, options?: PostgresInboxOptions): PostgresInbox<Client>
export function postgresInbox<Tx extends PgLiteTransaction> (db: PgLite<Tx>, options?: PostgresInboxOptions): PostgresInbox<Tx>
export function postgresInbox (db?: undefined, options?: Pick<PostgresInboxOptions, 'table' | 'retention'>): PostgresFirst
export function postgresInbox (db?: PgPool | PgLite, options: PostgresInboxOptions = {}): PostgresInbox<never> | PostgresFirst {
  const ms = wholeNumber('ms', 1)
  assertRules('postgresInbox', options, { table: ANYTHING, retention: ms, lockTimeout: ms, idleTimeout: ms, concurrency: wholeNumber('transactions', 1), migrate: BOOLEAN })
  const { table: tableName = INBOX_TABLE, retention = INBOX_RETENTION, lockTimeout = 5_000, idleTimeout = 60_000, concurrency = 8, migrate = true } = options
  const table = tableOf('postgresInbox', tableName)
  const records = new Records(table, retention)
  noteRetention(retention)
  if (db === undefined) {
    return {
      async first (query, name, context) {
        assertFirst(query, name)
        return await records.first(query, name, context, true)
      }
    }
  }

  const max = isPool(db) ? (db as { options?: { max?: unknown } }).options?.max : undefined
  if (typeof max === 'number' && max < concurrency) {
    throw new InvalidOptions(`postgresInbox: expected a pool of at least ${concurrency} clients, one for each of its \`concurrency\` transactions, got one of ${max}: raise the pool's max, or lower concurrency`)
  }
  const database = databaseOf('postgresInbox', db, lockTimeout + PATIENCE)
  const creation = migrate ? new Creation(database, table, inboxSchema(table)) : undefined
  const failed = (error: unknown): never => {
    creation?.failed(error)
    throw error
  }
  const gate = new Gate(concurrency)
  const pruning = new Pruning(async () => await records.prune(database))
  // Sets the isolation level, because with a stricter default one of two processes with the same delivery would fail instead of waiting.
  const settings = `SET TRANSACTION ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = ${lockTimeout}; SET LOCAL idle_in_transaction_session_timeout = ${idleTimeout}`

  return {
    once<Event> (name: string, work: InboxWork<never, Event>) {
      assertHandlerName('once', name)
      if (typeof work !== 'function') throw new InvalidOptions(`once(): expected a function after the name, got ${typeof work}`)

      return giveName(async function (this: FastifyInstance, event: Event, context: EventContext): Promise<void> {
        await gate.pass(async () => {
          await creation?.ready()
          await database.transaction(settings, async (client, query) => {
            const [record] = await query(records.insert, recordOf(name, context, retention)).catch(failed)
            if (record === undefined) return undefined
            const { tx, end } = lend(client, name, () => (client as Partial<PgClient>).getTransactionStatus?.() !== 'I', true)
            try {
              await work.call(this, tx as never, event, context)
            } finally {
              end()
            }
            return record.id
          }, () => new RolledBack(name))
        })
        prune(pruning, context)
      }, name)
    },
    async first (query, name, context) {
      assertFirst(query, name)
      await creation?.readyIn(async (text, values) => rowsOf(await query(text, values as string[])))
      const isFirst = await records.first(query, name, context).catch(failed)
      prune(pruning, context)
      return isFirst
    },
    async close () {
      await pruning.close()
    }
  }
}

/** Reads and writes the rows of the table. */
class Records {
  readonly insert: string
  readonly #insertInside: string
  readonly #expired: string
  readonly #retention: number
  #calls = 0

  constructor ({ sql }: Table, retention: number) {
    this.#retention = retention
    const columns = `${sql} (endpoint, tenant, webhook_id, handler, forget)`
    const forget = `now() + ${retention} * interval '1 ms'`
    this.insert = `INSERT INTO ${columns} VALUES ($1, $2, $3, $4, ${forget}) ON CONFLICT DO NOTHING RETURNING pg_current_xact_id()::text AS id`
    // Each parameter occurs once and in order, for libraries that only support `?`. If the statement runs outside the caller's transaction, it
    // writes nothing, because its record would be committed before the effect.
    this.#insertInside = `
      WITH here AS (SELECT pg_current_xact_id()::text = $1::text AS inside), record AS (
        INSERT INTO ${columns} SELECT $2::text, $3::text, $4::text, $5::text, ${forget} FROM here WHERE inside ON CONFLICT DO NOTHING RETURNING 1
      ) SELECT inside, EXISTS (SELECT FROM record) AS first FROM here`
    this.#expired = `
      DELETE FROM ${sql} WHERE ctid IN (
        SELECT ctid FROM ${sql} WHERE forget < now() LIMIT ${PRUNE_LIMIT} FOR UPDATE SKIP LOCKED
      ) RETURNING 1`
  }

  async prune (database: Database): Promise<number> {
    return (await database.query(this.#expired, [])).length
  }

  /** @param prunes whether old records are deleted in this transaction, which is needed if there is no other connection */
  async first (query: InboxQuery<PromiseLike<unknown>>, name: string, context: InboxContext, prunes = false): Promise<boolean> {
    const [before] = rowsOf(await query('SELECT pg_current_xact_id()::text AS id', []))
    const [row] = rowsOf(await query(this.#insertInside, [String(before?.['id']), ...recordOf(name, context, this.#retention)]))
    if (row?.['inside'] !== true) throw new NoTransaction(name)
    if (prunes && this.#calls++ % PRUNE_INTERVAL === 0) await query(this.#expired, [])
    return row['first'] === true
  }
}

function rowsOf (answer: unknown): Array<Record<string, unknown>> {
  const rows = Array.isArray(answer) ? answer : (answer as { rows?: unknown } | undefined)?.rows
  if (Array.isArray(rows)) return rows as Array<Record<string, unknown>>
  throw new InvalidOptions('first(): expected query(text, values) to resolve to rows, or to an object that has them as `rows`')
}
