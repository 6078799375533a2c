import { PRUNE_INTERVAL, PRUNE_LIMIT } from '../pruning.ts'
import type { Database } from './database.ts'

/**
 * Deletes expired rows in step with inserts, so that a table holds only live rows, whatever the rate of inserts.
 *
 * @param expired an SQL condition with one parameter
 * @returns a function to be called in the transaction of each insert, with the value of the parameter
 */
export function pruning (database: Database, table: string, expired: string): (before: number) => void {
  const prune = database.prepare(`DELETE FROM ${table} WHERE key IN (SELECT key FROM ${table} WHERE ${expired} LIMIT ${PRUNE_LIMIT})`)
  // Starts at 0, so that a process that inserts only a few rows prunes too.
  let left = 0

  return before => {
    if (left-- > 0) return
    left = PRUNE_INTERVAL - 1
    // There may be more expired rows, so the next insert prunes again.
    if (Number(prune.run(before).changes) === PRUNE_LIMIT) left = 0
  }
}
