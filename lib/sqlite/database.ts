import { statSync } from 'node:fs'
import { show } from '../checks.ts'
import { InvalidOptions } from '../errors.ts'
import { Group } from './group.ts'

/**
 * A statement of node:sqlite, better-sqlite3 or libsql. Its parameters are `any`, because each library accepts other values, and TypeScript
 * before 6 refuses a type whose parameters are narrower than those of another.
 */
export interface SqliteStatement {
  run (...parameters: any[]): { changes: number | bigint }
  get (...parameters: any[]): unknown
  all (...parameters: any[]): unknown[]
}

type Value = string | number | null

interface Changes { changes: number | bigint }

/** A statement whose rows are objects, with integers as numbers. */
export interface Statement {
  run (...parameters: Value[]): Changes
  all (...parameters: Value[]): unknown[]
}

/** Whether a statement has changed one row. */
export const changed = ({ changes }: Changes): boolean => Number(changes) === 1

/** How a statement reads rows. The first two methods are those of node:sqlite, the last is that of better-sqlite3 and libsql. */
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

/** ms that a write waits for a write of another process if the user's handle has no busy_timeout. The wait blocks the event loop. */
const BUSY_TIMEOUT = 1_000

/** ms between two attempts at a lock for which SQLite itself does not wait. */
const LOCK_RETRY = 10

/** After a write has waited in vain, no write waits for ten times as long, so that a locked file blocks the event loop a tenth of the time. */
const REST_FACTOR = 10

/** The time (performance.now()) until which writes do not wait. Keyed by handle, so that a store and a runner on one handle wait only once. */
const impatientUntil = new WeakMap<SqliteDatabase, number>()

/** Keyed by handle, so that a store and a runner on one handle share commits. */
const groups = new WeakMap<SqliteDatabase, Group>()

/** Matches the message, because the drivers have no error code in common for SQLITE_BUSY. */
const isLocked = (error: unknown): boolean => /database is locked/.test((error as Error).message)

/** Blocks the thread, as SQLite's own wait does. */
const sleep = (ms: number): unknown => Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, ms)

/** Sets the user's handle to a write-ahead log and one fsync per commit, so that a commit survives a power failure. */
export class Database {
  readonly #db: SqliteDatabase
  readonly #file: string
  readonly #inode: number | undefined
  /** Of the log and its index. Unknown while none is open: before the first transaction, or outside WAL. */
  readonly #logInodes: Record<'-wal' | '-shm', number | undefined> = { '-wal': undefined, '-shm': undefined }

  /**
   * @param schema statements that create the tables. With `undefined` the file is used as it is, and can be read while another process has it
   * locked
   * @param added a column that the table of an older version lacks
   */
  constructor (db: SqliteDatabase, schema?: string, added?: { table: string, column: string }) {
    if (typeof db?.exec !== 'function' || typeof db.prepare !== 'function') {
      throw new InvalidOptions('expected an open SQLite handle (node:sqlite, better-sqlite3 or libsql), which has exec() and prepare(), got ' + show(db))
    }
    this.#db = db
    // The timeout comes first, because another process may be recovering the log that a crash has left.
    const [busy] = this.prepare('PRAGMA busy_timeout').all() as [{ timeout: number }]
    // Checks a value that was read, because a wrapper may hide that the handle reads BigInt, which is never === to a number.
    if (typeof busy.timeout !== 'number') {
      const got = Array.isArray(busy) ? 'arrays' : `objects with ${typeof busy.timeout}`
      throw new InvalidOptions(`expected a SQLite handle whose rows are objects with numbers, got ${got}: open it without returnArrays, readBigInts, safeIntegers or what else changes how rows are read`)
    }
    if (busy.timeout === 0) db.exec(`PRAGMA busy_timeout = ${BUSY_TIMEOUT}`)
    if (schema !== undefined) this.#useWriteAheadLog(busy.timeout || BUSY_TIMEOUT)
    db.exec('PRAGMA synchronous = FULL')
    // Takes the write lock first, because SQLite refuses at once, without waiting, when a reader becomes a writer.
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
    this.assertFile() // learns the log's inodes, because it may be deleted before the first write
  }

  #addColumn ({ table, column }: { table: string, column: string }): void {
    const columns = this.prepare(`SELECT name FROM pragma_table_info('${table}')`).all() as Array<{ name: string }>
    if (!columns.some(({ name }) => name === column)) this.#db.exec(`ALTER TABLE ${table} ADD COLUMN ${column} TEXT`)
  }

  /**
   * Retries, because SQLite does not wait for the lock that this pragma takes, and processes that set up a new file at the same moment would
   * fail.
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

  prepare (sql: string): Statement {
    const statement: SqliteStatement & RowModes = this.#db.prepare(sql)
    // A new statement has the settings of the handle, so ours are set on each statement.
    statement.setReadBigInts?.(false)
    statement.setReturnArrays?.(false)
    statement.safeIntegers?.(false)
    return statement
  }

  /**
   * Commits everything that `work` writes, or nothing.
   *
   * The lock is taken by exec(), because a prepared statement of libsql that finds the file locked stays open, and whatever another statement
   * writes next then succeeds without ever being committed. BEGIN also fails inside a transaction that the user has open on the handle, which
   * could still be rolled back.
   *
   * @throws also when the file is not the one that was opened
   */
  transaction<T> (work: () => T): T {
    this.assertFile()
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
   * Commits what `work` writes, together with everything else that is written on the handle in this turn of the event loop.
   *
   * @param work a synchronous function, which may run twice
   * @param unwritten returns the answer if the file cannot be written, or `undefined` if there is none
   * @returns the result of `work`, once the commit has succeeded
   */
  write<T> (work: () => T, unwritten?: () => T | undefined): Promise<T> {
    let group = groups.get(this.#db)
    if (group === undefined) groups.set(this.#db, group = new Group(this))
    return group.write(work, unwritten)
  }

  /** Whether the handle is in a transaction, whoever has begun it. */
  isInTransaction (): boolean {
    const db = this.#db as { open?: unknown, inTransaction?: unknown, isTransaction?: unknown }
    // libsql ends the process if it is asked for `inTransaction` after close().
    const known = db.open === false ? undefined : db.inTransaction ?? db.isTransaction
    if (typeof known === 'boolean') return known
    try {
      this.#db.exec('BEGIN')
    } catch (error) {
      // node:sqlite has no property that tells before Node 22.16.
      if (/within a transaction/.test((error as Error).message)) return true
      throw error
    }
    this.#db.exec('ROLLBACK')
    return false
  }

  /** SQLite blocks the event loop while it waits for a lock. So after a wait in vain no write waits for a while, or until one gets the lock. */
  #begin (): void {
    const startedAt = performance.now()
    if (startedAt < (impatientUntil.get(this.#db) ?? 0)) return this.#beginAtOnce()
    try {
      this.#db.exec('BEGIN IMMEDIATE')
    } catch (error) {
      const now = performance.now()
      if (isLocked(error)) impatientUntil.set(this.#db, now + REST_FACTOR * (now - startedAt))
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

  /** Whether the user has left the handle in WAL. */
  #isInWal (): boolean {
    const [row] = this.prepare('PRAGMA journal_mode').all() as [{ journal_mode: string }]
    return row.journal_mode === 'wal'
  }

  /**
   * Fails if the file was deleted, replaced or emptied, because SQLite continues to write to the old file, whose commits are lost when the process
   * ends. Fails too if its write-ahead log or the index of that was deleted: with another index than this one, other processes overwrite what
   * this one writes to the log.
   *
   * @throws when the files are not those that were opened
   */
  assertFile (): void {
    if (this.#inode === undefined) return
    const { ino, size } = statSync(this.#file)
    if (ino !== this.#inode || size === 0) throw new Error(`the SQLite file ${this.#file} was ${size === 0 ? 'emptied' : 'replaced'} while it was open`)
    // SQLite keeps both while a handle is open.
    for (const suffix of ['-wal', '-shm'] as const) {
      const inode = statSync(this.#file + suffix, { throwIfNoEntry: false })?.ino
      const known = this.#logInodes[suffix]
      if (inode !== known && known !== undefined && this.#isInWal()) throw new Error(`the SQLite file ${this.#file}${suffix} was deleted or replaced while it was open`)
      this.#logInodes[suffix] = inode
    }
  }
}
