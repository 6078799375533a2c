import { ANYTHING, assertRules } from '../checks.ts'
import { tableOf } from './table.ts'
import type { Table } from './table.ts'

export const STORE_TABLE = 'openai_webhook_deliveries'
export const INBOX_TABLE = 'openai_webhook_inbox'

/**
 * Takes an advisory lock, because processes that create tables at the same moment would fail on PostgreSQL's catalogue. The key of the lock is an
 * arbitrary number. The statement selects a number, because not every library can read the void that the function returns.
 */
export const ALONE = 'SELECT 1 FROM pg_advisory_xact_lock(1868658536)'

export interface MigrationOptions {
  /** The name of each table, or `schema.name`; `false` to omit the table. */
  tables?: {
    /** @default 'openai_webhook_deliveries' */
    store?: string | false
    /** @default 'openai_webhook_inbox' */
    inbox?: string | false
  }
}

/**
 * `ends` is the end of the lease while there is a token. `forget` is when the row may be deleted. `finished` has one handler name per line, as
 * JSON.
 */
export function storeSchema ({ sql, name }: Table): string[] {
  return [`CREATE TABLE IF NOT EXISTS ${sql} (
  key text PRIMARY KEY,
  token text,
  done boolean NOT NULL DEFAULT false,
  finished text NOT NULL DEFAULT '',
  ends timestamptz NOT NULL,
  forget timestamptz NOT NULL
)`, `CREATE INDEX IF NOT EXISTS "${name}_forget" ON ${sql} (forget)`]
}

/** `forget` is when the row may be deleted. */
export function inboxSchema ({ sql, name }: Table): string[] {
  return [`CREATE TABLE IF NOT EXISTS ${sql} (
  endpoint text NOT NULL,
  tenant text NOT NULL,
  webhook_id text NOT NULL,
  handler text NOT NULL,
  forget timestamptz NOT NULL,
  PRIMARY KEY (webhook_id, handler, endpoint, tenant)
)`, `CREATE INDEX IF NOT EXISTS "${name}_forget" ON ${sql} (forget)`]
}

export function scriptOf (statements: readonly string[]): string {
  return statements.map(statement => `${statement};\n`).join('')
}

/**
 * The SQL that `postgresStore` and `postgresInbox` run themselves, for users who set `migrate: false` and run it with their own tools. It may be
 * run again, and by several processes at the same time if each runs it in one transaction or as one query.
 *
 * @returns several SQL statements
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS
 */
export function migration (options: MigrationOptions = {}): string {
  assertRules('migration', options, { tables: ANYTHING })
  const { tables = {} } = options
  assertRules('migration: tables', tables, { store: ANYTHING, inbox: ANYTHING })
  const { store = STORE_TABLE, inbox = INBOX_TABLE } = tables
  const statements = [...(store === false ? [] : storeSchema(tableOf('migration', store, 'tables.store'))), ...(inbox === false ? [] : inboxSchema(tableOf('migration', inbox, 'tables.inbox')))]
  return statements.length === 0 ? '' : scriptOf([ALONE, ...statements])
}
