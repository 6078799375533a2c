import { statSync } from 'node:fs'
import { InvalidOptions } from '../errors.ts'
import { Group } from './group.ts'

/**
 * What node:sqlite, better-sqlite3 and libsql share. Its parameters are `any`: each library takes other values, and until
 * TypeScript 6 what takes fewer than another is refused.
 */
export interface SqliteStatement {
  run (...parameters: any[]): { changes: number | bigint }
  get (...parameters: any[]): unknown
  all (...parameters: any[]): unknown[]
}

type Value = string | number | null

/** A statement of ours: its rows are objects, their integers numbers. */
export interface Statement {
  run (...parameters: Value[]): { changes: number | bigint }
  all (...parameters: Value[]): unknown[]
}

/** How a statement reads rows: node:sqlite's two, and what better-sqlite3 and libsql have. */
interface RowModes {
  setReadBigInts? (enabled: boolean): unknown
  setReturnArrays? (enabled: boolean): unknown
  safeIntegers? (enabled: boolean): unknown
}

/** A synchronous SQLite handle: node:sqlite's `DatabaseSync`, better-sqlite3's or libsql's `Database`. */
export interface SqliteDatabase {
  exec (sql: string): unknown
  prepare (sql: string): SqliteStatement
}

/** ms; how long a write waits for another process's, where the handle has no wait of its own. It blocks the event loop. */
const BUSY_TIMEOUT = 1_000

/** ms between two tries to take a lock that SQLite does not wait for. */
const LOCK_RETRY = 10

/** How many times as long as one write has waited in vain the next ones do not wait: a locked file takes a tenth of the time at most. */
const PATIENCE = 10

/** Until when (performance.now()) writes do not wait. By handle: a store and a runner that share one are told by one wait. */
const impatientUntil = new WeakMap<SqliteDatabase, number>()

/** By handle: what a store and a runner write on one shares its commits. */
const groups = new WeakMap<SqliteDatabase, Group>()

/** The drivers share SQLite's words for SQLITE_BUSY, not the code. */
const isLocked = (error: unknown): boolean => /database is locked/.test((error as Error).message)

/** Blocks the thread, as SQLite's own wait does. */
const sleep = (ms: number): unknown => Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, ms)

/** The user's handle, made ready: write-ahead log with one fsync a commit, so that what was committed survives. */
export class Database {
  readonly #db: SqliteDatabase
  readonly #file: string
  readonly #inode: number | undefined

  /** @param added a column that a table of an older version lacks */
  constructor (db: SqliteDatabase, schema: string, added?: { table: string, column: string }) {
    if (typeof db?.exec !== 'function' || typeof db.prepare !== 'function') {
      throw new InvalidOptions('expected an open SQLite handle (node:sqlite, better-sqlite3 or libsql), which has exec() and prepare()')
    }
    this.#db = db
    // First: another process may be recovering the log that a crash left behind.
    const [busy] = this.prepare('PRAGMA busy_timeout').all() as [{ timeout: number }]
    // What wraps a handle may hide how it reads, and every comparison with a number would be false.
    if (typeof busy.timeout !== 'number') {
      const got = Array.isArray(busy) ? 'arrays' : `objects with ${typeof busy.timeout}`
      throw new InvalidOptions(`expected a SQLite handle whose rows are objects with numbers, got ${got}: open it without returnArrays, readBigInts, safeIntegers or what else changes how rows are read`)
    }
    if (busy.timeout === 0) db.exec(`PRAGMA busy_timeout = ${BUSY_TIMEOUT}`)
    this.#useWriteAheadLog(busy.timeout || BUSY_TIMEOUT)
    db.exec('PRAGMA synchronous = FULL')
    // Takes the write lock first: a reader that turns into a writer is refused without a wait.
    this.transaction(() => {
      db.exec(schema)
      if (added !== undefined) this.#addColumn(added)
    })
    const [main] = this.prepare('PRAGMA database_list').all() as [{ file: string | null }]
    this.#file = main.file as string
    // In memory it has none, told as '' or null.
    this.#inode = main.file ? statSync(main.file).ino : undefined
  }

  #addColumn ({ table, column }: { table: string, column: string }): void {
    const columns = this.prepare(`SELECT name FROM pragma_table_info('${table}')`).all() as Array<{ name: string }>
    if (!columns.some(({ name }) => name === column)) this.#db.exec(`ALTER TABLE ${table} ADD COLUMN ${column} TEXT`)
  }

  /**
   * SQLite does not wait by itself for the lock that this takes, so processes that make a new file ready at the same
   * instant refuse each other.
   *
   * @param timeout ms
   */
  #useWriteAheadLog (timeout: number): void {
    const giveUp = performance.now() + timeout
    for (;;) {
      try {
        this.#db.exec('PRAGMA journal_mode = WAL')
        return
      } catch (error) {
        if (!isLocked(error) || performance.now() >= giveUp) throw error
        sleep(LOCK_RETRY)
      }
    }
  }

  /** A query. */
  prepare (sql: string): Statement {
    const statement: SqliteStatement & RowModes = this.#db.prepare(sql)
    // A statement begins with what the user has set on the handle.
    statement.setReadBigInts?.(false)
    statement.setReturnArrays?.(false)
    statement.safeIntegers?.(false)
    return statement
  }

  /**
   * A statement that writes: each run of it is a commit.
   *
   * @returns how many rows the statement changed
   */
  prepareWrite (sql: string): (...parameters: Value[]) => number {
    const statement = this.prepare(sql)
    return (...parameters) => this.transaction(() => Number(statement.run(...parameters).changes))
  }

  /**
   * Commits what `work` writes, or none of it.
   *
   * The lock is taken by exec(): a prepared statement of libsql's that finds the file locked stays open, and whatever
   * another statement writes next then succeeds without ever being committed. It also fails inside a transaction that
   * the user has open on the handle, which could yet be rolled back.
   */
  transaction<T> (work: () => T): T {
    this.#begin()
    try {
      const result = work()
      this.#db.exec('COMMIT')
      return result
    } catch (error) {
      try {
        this.#db.exec('ROLLBACK')
      } catch {
        // Such as a full disk: SQLite has rolled back by itself.
      }
      throw error
    }
  }

  /**
   * Commits what `work` writes together with whatever else this turn of the event loop writes on the handle.
   *
   * @param work synchronous; may run twice
   * @param unwritten what can be answered where the file cannot be written, if anything
   * @returns what it returned, once that is committed
   */
  write<T> (work: () => T, unwritten?: () => T | undefined): Promise<T> {
    let group = groups.get(this.#db)
    if (group === undefined) groups.set(this.#db, group = new Group(this))
    return group.write(work, unwritten)
  }

  /** Whether the handle is in a transaction, of whoever began it. */
  isInTransaction (): boolean {
    try {
      this.#db.exec('BEGIN')
    } catch (error) {
      // The drivers have no property for it in common.
      if (/within a transaction/.test((error as Error).message)) return true
      throw error
    }
    this.#db.exec('ROLLBACK')
    return false
  }

  /** SQLite's wait for a lock blocks the event loop: after one that was in vain nobody waits for a while, until a lock is had. */
  #begin (): void {
    const startedAt = performance.now()
    if (startedAt < (impatientUntil.get(this.#db) ?? 0)) return this.#beginAtOnce()
    try {
      this.#db.exec('BEGIN IMMEDIATE')
    } catch (error) {
      const now = performance.now()
      if (isLocked(error)) impatientUntil.set(this.#db, now + PATIENCE * (now - startedAt))
      throw error
    }
  }

  #beginAtOnce (): void {
    const [{ timeout }] = this.prepare('PRAGMA busy_timeout').all() as [{ timeout: number }]
    this.#db.exec('PRAGMA busy_timeout = 0')
    try {
      this.#db.exec('BEGIN IMMEDIATE')
      impatientUntil.delete(this.#db)
    } finally {
      this.#db.exec(`PRAGMA busy_timeout = ${timeout}`)
    }
  }

  /**
   * SQLite goes on writing to a file that was deleted, replaced or emptied, and what it commits is gone with the process.
   *
   * @throws when the file is not the one that was opened
   */
  assertFile (): void {
    if (this.#inode === undefined) return
    const { ino, size } = statSync(this.#file)
    if (ino !== this.#inode || size === 0) throw new Error(`the SQLite file ${this.#file} was ${size === 0 ? 'emptied' : 'replaced'} while it was open`)
  }
}
