import type { Database } from './database.ts'

/** Inserts between two looks for expired rows, and how many of those go at once: more than came, and few for one request. */
const INTERVAL = 50
const LIMIT = 100

/**
 * Deletes expired rows in step with inserts, so that a table holds what is alive whatever the rate of arrival.
 *
 * @param expired a condition with one parameter
 * @returns to be called in the transaction of each insert, with that parameter
 */
export function pruning (database: Database, table: string, expired: string): (before: number) => void {
  const prune = database.prepare(`DELETE FROM ${table} WHERE key IN (SELECT key FROM ${table} WHERE ${expired} LIMIT ${LIMIT})`)
  // A process that ends before it has inserted many prunes as well.
  let left = 0

  return before => {
    if (left-- > 0) return
    left = INTERVAL - 1
    // There may be more.
    if (Number(prune.run(before).changes) === LIMIT) left = 0
  }
}
