import type { EventEmitter } from 'node:events'
import { codeOf } from '../coded.ts'
import { InvalidOptions } from '../errors.ts'
import { within } from '../within.ts'
import { ALONE, scriptOf } from './migration.ts'
import type { Table } from './table.ts'

/** The part of a `pg` client that is used. */
export interface PgClient {
  query (text: string, values?: any[]): Promise<{ rows: any[] }>
  release (error?: Error | boolean): void
  /** "I" outside a transaction. Older versions of `pg` lack it. */
  getTransactionStatus? (): string | null
  on (event: 'error', listener: (error: Error) => void): unknown
  removeListener (event: 'error', listener: (error: Error) => void): unknown
}

/** The part of a `pg` `Pool` that is used. It has both overloads of `connect`, so that TypeScript infers the client's own type. */
export interface PgPool<Client extends PgClient = PgClient> {
  readonly totalCount: number
  connect (): Promise<Client>
  connect (callback: (error: any, client: any, release: any) => void): void
  query (text: string, values?: any[]): Promise<{ rows: any[] }>
  on (event: 'error', listener: (error: Error) => void): unknown
  on (event: 'acquire', listener: (client: any) => void): unknown
}

/** The part of a `PGlite` of `@electric-sql/pglite` that is used. */
export interface PgLite<Tx extends PgLiteTransaction = PgLiteTransaction> {
  query (text: string, values?: any[]): Promise<{ rows: any[] }>
  exec (sql: string): Promise<unknown>
  transaction<Result> (work: (tx: Tx) => Promise<Result>): Promise<Result>
}

export interface PgLiteTransaction {
  query (text: string, values?: any[]): Promise<{ rows: any[] }>
  exec (sql: string): Promise<unknown>
}

/** ms to wait for another connection to create a missing table. */
const PATIENCE = 1_000

/** How often a statement is sent that conflicts with others. */
const MAX_ATTEMPTS = 20

const UNDEFINED_TABLE = '42P01'

type Value = string | number | readonly string[] | readonly number[]

export type Query = (text: string, values: readonly Value[]) => Promise<any[]>

/** Thrown when a step takes longer than its timeout. */
export class NoAnswer extends Error {}

/** A database, for every supported library. No session state outlives a transaction, as PgBouncer in transaction mode requires. */
export interface Database {
  /** A statement that commits by itself. */
  query: Query
  /** Several statements without parameters, in one transaction. */
  script: (sql: string) => Promise<void>
  /**
   * @param settings statements that set up the transaction
   * @param work returns the id of its transaction if it has written something. If it fails, the transaction is rolled back
   * @param rolledBack makes the error for a transaction that was rolled back although `work` had not thrown
   */
  transaction: (settings: string, work: (tx: object, query: Query) => Promise<string | undefined>, rolledBack: () => Error) => Promise<void>
}

/**
 * @param timeout ms that one step may take
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS
 */
export function databaseOf (caller: string, db: PgPool | PgLite, timeout: number): Database {
  if (isPool(db)) return new Pooled(db, timeout)
  if (isLite(db)) return new Lite(db)
  throw new InvalidOptions(`${caller}: expected a Pool of pg, or a PGlite`)
}

export function isPool (db: unknown): db is PgPool {
  const { totalCount, connect } = (db ?? {}) as Partial<PgPool>
  return typeof totalCount === 'number' && typeof connect === 'function'
}

function isLite (db: unknown): db is PgLite {
  const { query, exec, transaction } = (db ?? {}) as Partial<PgLite>
  return [query, exec, transaction].every(method => typeof method === 'function')
}

/** Whether the session is read-only. If that was the default of its database or role when the session began, the session stays read-only. */
function isReadOnly (error: unknown): boolean {
  return codeOf(error) === '25006'
}

/**
 * 40001: the default isolation level of the database or role is stricter than READ COMMITTED, and another transaction wrote the same rows. 40P01:
 * a deadlock. The statement has written nothing, so it can be sent again.
 */
function isConflict (error: unknown): boolean {
  const code = codeOf(error)
  return code === '40001' || code === '40P01'
}

/** The query for the outcome of a transaction. */
const statusQuery = (id: string): string => `SELECT pg_xact_status(${id}::xid8) AS status`

const isCommitted = (row: { status?: unknown } | undefined): boolean => row?.status === 'committed'

function ignore (): void {}

function giveBack (client: PgClient): void {
  client.removeListener('error', ignore)
  client.release()
}

const heard = new WeakSet<PgPool>()

class Pooled implements Database {
  constructor (readonly pool: PgPool, readonly timeout: number) {
    if (heard.has(pool)) return
    heard.add(pool)
    // Without a listener, a connection that breaks would end the process: an idle one, or one that the user's own transaction has, for first(). The
    // pool drops the connection, and the next query reports what is wrong.
    pool.on('error', ignore)
    pool.on('acquire', (client: EventEmitter) => { if (!client.listeners('error').includes(ignore)) client.on('error', ignore) })
  }

  async query (text: string, values: readonly Value[]): Promise<any[]> {
    return await this.#withClient(async client => await this.#runAgain(client, text, values, MAX_ATTEMPTS))
  }

  /** Sends a statement again while it conflicts with others. @param times it may be sent */
  async #runAgain (client: PgClient, text: string, values: readonly Value[], times: number): Promise<any[]> {
    try {
      return await this.#run(client, text, values)
    } catch (error) {
      if (times === 1 || !isConflict(error)) throw error
      return await this.#runAgain(client, text, values, times - 1)
    }
  }

  async script (sql: string): Promise<void> {
    await this.#withClient(async client => await this.#run(client, `BEGIN; ${sql} COMMIT`))
  }

  async transaction (settings: string, work: (tx: object, query: Query) => Promise<string | undefined>, rolledBack: () => Error): Promise<void> {
    const outcome = await this.#withClient<{ error: unknown } | undefined>(async client => {
      await this.#run(client, `BEGIN; ${settings}`)
      let id
      try {
        id = await this.#whileConnected(client, work(client, async (text, values) => await this.#run(client, text, values)))
      } catch (error) {
        await this.#send(client, 'ROLLBACK').catch(() => { throw error })
        if (isReadOnly(error)) throw error
        return { error }
      }
      // If the commit fails, nobody knows whether it took effect. The next attempt finds out.
      return await this.#commit(client, id) ? undefined : { error: rolledBack() }
    })
    if (outcome !== undefined) throw outcome.error
  }

  /** Rejects when the connection is lost. Work that waits for something else would not notice, and would keep its connection and its place for ever. */
  async #whileConnected<Result> (client: PgClient, working: Promise<Result>): Promise<Result> {
    let onError!: (error: Error) => void
    // In the next turn, so that work that has noticed fails with its own error.
    const lost = new Promise<never>((_resolve, reject) => { onError = error => { setImmediate(reject, error) } })
    client.on('error', onError)
    try {
      return await Promise.race([working, lost])
    } finally {
      client.removeListener('error', onError)
    }
  }

  /** @returns whether the writes are committed. The work may have ended the transaction itself, and COMMIT succeeds in that case too. */
  async #commit (client: PgClient, id: string | undefined): Promise<boolean> {
    if (id === undefined) {
      await this.#send(client, 'COMMIT')
      return true
    }
    // One message, so that PgBouncer runs both statements in one session.
    const [, { rows: [row] }] = await this.#send(client, `COMMIT; ${statusQuery(`'${id}'`)}`) as unknown as [unknown, { rows: any[] }]
    return isCommitted(row)
  }

  /** Does not return a connection to the pool that has failed, because after a failover it may lead to a server that cannot write. */
  async #withClient<Result> (use: (client: PgClient) => Promise<Result>): Promise<Result> {
    const client = await this.#connect()
    let result
    try {
      result = await use(client)
    } catch (error) {
      client.release(true)
      throw error
    }
    giveBack(client)
    return result
  }

  async #connect (): Promise<PgClient> {
    const connecting = new Promise<PgClient>((resolve, reject) => {
      this.pool.connect((error: Error | undefined, client: PgClient) => {
        if (error !== undefined) return reject(error)
        // The pool does not listen while the client is checked out, so a server that goes away would end the process. If the listener were added
        // after a promise, it would come too late.
        client.on('error', ignore)
        resolve(client)
      })
    })
    return await this.#within(connecting, 'no connection to PostgreSQL', () => {
      connecting.then(giveBack, ignore)
    })
  }

  async #run (client: PgClient, text: string, values?: readonly Value[]): Promise<any[]> {
    return (await this.#send(client, text, values)).rows
  }

  /** Sends a statement without a name, so that no prepared statement is left on the connection. */
  async #send (client: PgClient, text: string, values?: readonly Value[]): ReturnType<PgClient['query']> {
    return await this.#within(client.query(text, values as any[]), 'no answer of PostgreSQL', ignore)
  }

  /** Limits the time of a step. By default a pool and a client wait for ever, and not all versions of pg accept a timeout for a single query. */
  async #within<Result> (step: Promise<Result>, what: string, givenUp: () => void): Promise<Result> {
    return await within(step, this.timeout, () => {
      givenUp()
      throw new NoAnswer(`${what} within ${this.timeout} ms: the pool is exhausted, or the server does not answer`)
    })
  }
}

/** PGlite has one session, which is in this process, so its steps need no timeout. */
class Lite implements Database {
  constructor (readonly db: PgLite) {}

  async query (text: string, values: readonly Value[]): Promise<any[]> {
    return (await this.db.query(text, [...values])).rows
  }

  async script (sql: string): Promise<void> {
    await this.db.transaction(async tx => { await tx.exec(sql) })
  }

  async transaction (settings: string, work: (tx: object, query: Query) => Promise<string | undefined>, rolledBack: () => Error): Promise<void> {
    // transaction() of PGlite throws if COMMIT rolls back.
    const id = await this.db.transaction(async tx => {
      await tx.exec(settings)
      return await work(tx, async (text, values) => (await tx.query(text, [...values])).rows)
    })
    if (id === undefined) return
    const [row] = await this.query(statusQuery('$1'), [id])
    if (!isCommitted(row)) throw rolledBack()
  }
}

/** Creates a table before its first use. If the creation fails or is rolled back, the next use tries again. */
export class Creation {
  #isThere = false
  #running: Promise<void> | undefined

  constructor (readonly database: Database, readonly table: Table, readonly statements: readonly string[]) {}

  /** To be awaited before each use. */
  ready (): Promise<void> | undefined {
    return this.#isThere ? undefined : (this.#running ??= this.#run().finally(() => { this.#running = undefined }))
  }

  /**
   * To be awaited before each use in a transaction of the caller. `ready()` alone could wait for ever for a connection, because each of them may
   * be in such a transaction. But a table that is created in this transaction may be rolled back, or be in another schema, so another connection
   * gets PATIENCE ms to create the table first.
   */
  async readyIn (query: Query): Promise<void> {
    if (this.#isThere) return
    const elsewhere = this.ready()!.catch(() => {})
    if (await this.#isIn(query)) return
    await within(elsewhere, PATIENCE, () => {})
    if (this.#isThere) return
    for (const statement of [ALONE, ...this.statements]) await query(statement, [])
  }

  /** To be called with the error of a use: if the table has gone, the next use creates it again. */
  failed (error: unknown): void {
    if (codeOf(error) === UNDEFINED_TABLE) this.#isThere = false
  }

  async #run (): Promise<void> {
    if (!await this.#isIn(async (text, values) => await this.database.query(text, values))) await this.database.script(scriptOf([ALONE, ...this.statements]))
    this.#isThere = true
  }

  /** Whether the table exists. Checked before creating it, so that an existing table requires no right to create tables. */
  async #isIn (query: Query): Promise<boolean> {
    const [row] = await query('SELECT to_regclass($1::text) IS NOT NULL AS there', [this.table.sql]) as Array<{ there?: unknown }>
    return row?.there === true
  }
}
