/** The part of a handle that the tests use. */
export interface Handle {
  exec (sql: string): unknown
  prepare (sql: string): {
    run (...parameters: unknown[]): { changes: number | bigint }
    get (...parameters: unknown[]): unknown
    all (...parameters: unknown[]): unknown[]
    iterate (...parameters: unknown[]): IterableIterator<object>
  }
  close (): unknown
}

export type HandleName = 'libsql' | 'node:sqlite'

export const missing: Readonly<Record<HandleName, string | false>>
export const HANDLES: readonly HandleName[]
export const READING: ReadonlyArray<{ name: string, skip: string | false, open: (file: string) => Handle }>

/** @param name by default libsql */
export function openSqlite (file: string, name?: HandleName): Handle

/** Closes a handle that may be closed already. */
export function closeSqlite (db: Handle): void
