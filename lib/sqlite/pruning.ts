import type { Database } from './database.ts'

/** Inserts between two looks for expired rows, and the number deleted at once: more than were inserted, and few enough for one request. */
const INTERVAL = 50
const LIMIT = 100

/**
 * Deletes expired rows in step with inserts, so that a table holds live rows only, whatever the rate of arrival.
 *
 * @param expired a condition with one parameter
 * @returns to be called in the transaction of each insert, with that parameter
 */
export function pruning (database: Database, table: string, expired: string): (before: number) => void {
  const prune = database.prepare(`DELETE FROM ${table} WHERE key IN (SELECT key FROM ${table} WHERE ${expired} LIMIT ${LIMIT})`)
  // Looks with the first insert, so that a process that inserts few rows prunes as well.
  let left = 0

  return before => {
    if (left-- > 0) return
    left = INTERVAL - 1
    // There may be more.
    if (Number(prune.run(before).changes) === LIMIT) left = 0
  }
}
