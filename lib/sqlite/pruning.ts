import { PRUNE_INTERVAL, PRUNE_LIMIT } from '../pruning.ts'
import type { Database } from './database.ts'

/**
 * Deletes expired rows in step with inserts, so that a table holds live rows only, whatever the rate of arrival.
 *
 * @param expired a condition with one parameter
 * @returns to be called in the transaction of each insert, with that parameter
 */
export function pruning (database: Database, table: string, expired: string): (before: number) => void {
  const prune = database.prepare(`DELETE FROM ${table} WHERE key IN (SELECT key FROM ${table} WHERE ${expired} LIMIT ${PRUNE_LIMIT})`)
  // Looks with the first insert, so that a process that inserts few rows prunes as well.
  let left = 0

  return before => {
    if (left-- > 0) return
    left = PRUNE_INTERVAL - 1
    // There may be more.
    if (Number(prune.run(before).changes) === PRUNE_LIMIT) left = 0
  }
}
