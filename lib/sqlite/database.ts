import { statSync } from 'node:fs'
import { InvalidOptions } from '../errors.ts'
import { Group } from './group.ts'

/**
 * A statement of node:sqlite, better-sqlite3 or libsql. Its parameters are `any`, since each library takes other values, and
 * TypeScript before 6 refuses a type whose parameters are narrower than another's.
 */
export interface SqliteStatement {
  run (...parameters: any[]): { changes: number | bigint }
  get (...parameters: any[]): unknown
  all (...parameters: any[]): unknown[]
}

type Value = string | number | null

interface Changes { changes: number | bigint }

/** A statement of ours: its rows are objects, their integers numbers. */
export interface Statement {
  run (...parameters: Value[]): Changes
  all (...parameters: Value[]): unknown[]
}

/** Whether a statement has changed its one row. */
export const changed = ({ changes }: Changes): boolean => Number(changes) === 1

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

/** ms that a write waits for another process's write, where the user's handle has no busy_timeout. The wait blocks the event loop. */
const BUSY_TIMEOUT = 1_000

/** ms between two attempts at a lock for which SQLite itself does not wait. */
const LOCK_RETRY = 10

/** After a write has waited in vain, no write waits for ten times as long, so that a locked file blocks the event loop a tenth of the time. */
const PATIENCE = 10

/** The time (performance.now()) until which writes do not wait. Kept by handle, so that a store and a runner on one handle wait once. */
const impatientUntil = new WeakMap<SqliteDatabase, number>()

/** Kept by handle, so that a store and a runner on one handle share commits. */
const groups = new WeakMap<SqliteDatabase, Group>()

/** Matches the message, because the drivers have no error code in common for SQLITE_BUSY. */
const isLocked = (error: unknown): boolean => /database is locked/.test((error as Error).message)

/** Blocks the thread, as SQLite's own wait does. */
const sleep = (ms: number): unknown => Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, ms)

/** Prepares the user's handle: write-ahead log, and one fsync a commit, so that a commit survives a power failure. */
export class Database {
  readonly #db: SqliteDatabase
  readonly #file: string
  readonly #inode: number | undefined

  /**
   * @param schema `undefined`: the file is taken as it is, and can be read while another process has its lock
   * @param added a column that a table of an older version lacks
   */
  constructor (db: SqliteDatabase, schema?: string, added?: { table: string, column: string }) {
    if (typeof db?.exec !== 'function' || typeof db.prepare !== 'function') {
      throw new InvalidOptions('expected an open SQLite handle (node:sqlite, better-sqlite3 or libsql), which has exec() and prepare()')
    }
    this.#db = db
    // This comes first, because another process may be recovering the log that a crash has left.
    const [busy] = this.prepare('PRAGMA busy_timeout').all() as [{ timeout: number }]
    // Reads a number, because a wrapper may hide that the handle reads BigInt: every comparison with a number would be false.
    if (typeof busy.timeout !== 'number') {
      const got = Array.isArray(busy) ? 'arrays' : `objects with ${typeof busy.timeout}`
      throw new InvalidOptions(`expected a SQLite handle whose rows are objects with numbers, got ${got}: open it without returnArrays, readBigInts, safeIntegers or what else changes how rows are read`)
    }
    if (busy.timeout === 0) db.exec(`PRAGMA busy_timeout = ${BUSY_TIMEOUT}`)
    if (schema !== undefined) this.#useWriteAheadLog(busy.timeout || BUSY_TIMEOUT)
    db.exec('PRAGMA synchronous = FULL')
    // Takes the write lock first, because SQLite refuses a reader that becomes a writer without waiting.
    if (schema !== undefined) {
      this.transaction(() => {
        db.exec(schema)
        if (added !== undefined) this.#addColumn(added)
      })
    }
    const [main] = this.prepare('PRAGMA database_list').all() as [{ file: string | null }]
    this.#file = main.file as string
    // A database in memory has no file: drivers answer '' or null.
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
    // A new statement has the handle's settings, so ours are set on each.
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
        // SQLite has rolled back by itself, as it does when the disk is full.
      }
      throw error
    }
  }

  /**
   * Commits what `work` writes, in one commit with everything else that this turn of the event loop writes on the handle.
   *
   * @param work synchronous; may run twice
   * @param unwritten gives the answer when the file cannot be written, where there is one
   * @returns what it returned, once that is committed
   */
  write<T> (work: () => T, unwritten?: () => T | undefined): Promise<T> {
    let group = groups.get(this.#db)
    if (group === undefined) groups.set(this.#db, group = new Group(this))
    return group.write(work, unwritten)
  }

  /** Whether the handle is in a transaction, whoever began it. */
  isInTransaction (): boolean {
    try {
      this.#db.exec('BEGIN')
    } catch (error) {
      // Asks by a statement, because the drivers have no common property for it.
      if (/within a transaction/.test((error as Error).message)) return true
      throw error
    }
    this.#db.exec('ROLLBACK')
    return false
  }

  /** SQLite's wait for a lock blocks the event loop. So after a wait in vain nobody waits for a while, or until a lock is taken. */
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
   * Fails when the file was deleted, replaced or emptied. SQLite goes on writing to the old file, whose commits are lost when the process ends.
   *
   * @throws when the file is not the one that was opened
   */
  assertFile (): void {
    if (this.#inode === undefined) return
    const { ino, size } = statSync(this.#file)
    if (ino !== this.#inode || size === 0) throw new Error(`the SQLite file ${this.#file} was ${size === 0 ? 'emptied' : 'replaced'} while it was open`)
  }
}
