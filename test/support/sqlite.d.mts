/** What the tests use of a handle. */
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

/** @param name default libsql */
export function openSqlite (file: string, name?: HandleName): Handle

/** Whether it is still open or not. */
export function closeSqlite (db: Handle): void
