import { assertNames } from '../checks.ts'
import { tableOf } from './table.ts'
import type { Table } from './table.ts'

export const STORE_TABLE = 'openai_webhook_deliveries'
export const INBOX_TABLE = 'openai_webhook_inbox'

/** The key of an advisory lock is any number. Selects a number, since not every library can read the void that the function returns. Without the lock, processes that create tables at the same instant would fail on PostgreSQL's catalogue. */
export const ALONE = 'SELECT 1 FROM pg_advisory_xact_lock(1868658536)'

export interface MigrationOptions {
  /** Names, or `schema.name`; `false`: not this one. */
  tables?: {
    /** @default 'openai_webhook_deliveries' */
    store?: string | false
    /** @default 'openai_webhook_inbox' */
    inbox?: string | false
  }
}

/** `ends` is the end of the lease while there is a token, `forget` when the row may go; `finished` has a name, as JSON, a line. */
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

export function inboxSchema ({ sql, name }: Table): string[] {
  return [`CREATE TABLE IF NOT EXISTS ${sql} (
  endpoint text NOT NULL,
  tenant text NOT NULL,
  webhook_id text NOT NULL,
  handler text NOT NULL,
  at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (webhook_id, handler, endpoint, tenant)
)`, `CREATE INDEX IF NOT EXISTS "${name}_at" ON ${sql} (at)`]
}

export function scriptOf (statements: readonly string[]): string {
  return statements.map(statement => `${statement};\n`).join('')
}

/**
 * What `postgresStore` and `postgresInbox` create by themselves, for those who say `migrate: false` and run it by tools of
 * their own. It may be run again, and by several processes at once if each runs it in one transaction, or as one query.
 *
 * @returns SQL: several statements
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS
 */
export function migration (options: MigrationOptions = {}): string {
  assertNames('migration', options, ['tables'])
  const { tables = {} } = options
  assertNames('migration', tables, ['store', 'inbox'])
  const { store = STORE_TABLE, inbox = INBOX_TABLE } = tables
  const statements = [...(store === false ? [] : storeSchema(tableOf('migration', store))), ...(inbox === false ? [] : inboxSchema(tableOf('migration', inbox)))]
  return statements.length === 0 ? '' : scriptOf([ALONE, ...statements])
}
