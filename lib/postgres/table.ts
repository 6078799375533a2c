import { show } from '../checks.ts'
import { InvalidOptions } from '../errors.ts'

/** At most 56 characters, because PostgreSQL cuts names at 63 bytes, and the name of an index is that of its table with up to 7 more. */
const NAME = /^[A-Za-z_][\w$]{0,55}$/

export interface Table {
  /** The quoted name, so that no name is read as anything else. */
  readonly sql: string
  /** The name without its schema, for the names of indexes. */
  readonly name: string
}

/**
 * @param table `name` or `schema.name`
 * @param option the name of the option
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS
 */
export function tableOf (caller: string, table: unknown, option = 'table'): Table {
  const parts = typeof table === 'string' ? table.split('.') : []
  if (parts.length === 0 || parts.length > 2 || !parts.every(part => NAME.test(part))) {
    throw new InvalidOptions(`${caller}: expected ${option} to be a name, or schema.name, of letters, digits, _ and $, at most 56 characters each, got ${show(table)}`)
  }
  return { sql: parts.map(part => `"${part}"`).join('.'), name: parts.at(-1)! }
}
