import { types } from 'node:util'
import type { FastifyInstance } from 'fastify'
import { AsyncWork, InvalidOptions, NoTransaction } from '../errors.ts'
import { assertHandlerName, giveName } from '../handler-name.ts'
import { INBOX_RETENTION, assertFirst, noteRetention, prune, recordOf } from '../inbox/inbox.ts'
import type { Inbox, InboxContext, InboxQuery, InboxWork } from '../inbox/inbox.ts'
import { lend } from '../inbox/lend.ts'
import { isStray } from '../maybe-promise.ts'
import type { EventContext } from '../handlers.ts'
import { PRUNE_LIMIT, Pruning } from '../pruning.ts'
import { assertRules, wholeNumber } from '../checks.ts'
import { Database } from './database.ts'
import type { SqliteDatabase } from './database.ts'

// `forget` is when the row may be deleted, in ms since the epoch.
const SCHEMA = `
  CREATE TABLE IF NOT EXISTS openai_webhook_inbox (
    endpoint TEXT NOT NULL,
    tenant TEXT NOT NULL,
    webhook_id TEXT NOT NULL,
    handler TEXT NOT NULL,
    forget INTEGER NOT NULL,
    PRIMARY KEY (webhook_id, handler, endpoint, tenant)
  );
  CREATE INDEX IF NOT EXISTS openai_webhook_inbox_forget ON openai_webhook_inbox (forget);
`

/** Uses SQLite's clock, in whole seconds, because the statement has no parameter for the time. @param retention ms */
const insertOf = (retention: number): string => `
  INSERT INTO openai_webhook_inbox (endpoint, tenant, webhook_id, handler, forget)
  VALUES (?, ?, ?, ?, CAST(strftime('%s', 'now') AS INTEGER) * 1000 + ${retention})
  ON CONFLICT DO NOTHING RETURNING 1`

export interface SqliteInboxOptions {
  /**
   * ms for which a record is kept.
   *
   * @default 2_592_000_000 (30 days)
   */
  retention?: number | undefined
}

export interface SqliteInbox<Tx> extends Inbox<Tx> {
  first (query: InboxQuery<{ rows: unknown[] } | unknown[]>, name: string, context: InboxContext): boolean
  close (): Promise<void>
}

/**
 * Makes effects in the user's SQLite file happen once: a handler's writes and the record that it has run are committed together, in a synchronous
 * transaction on the handle. Creates the table `openai_webhook_inbox`, sets the handle to WAL with one fsync per commit, and never closes it.
 *
 * `tx` of `once()` is the handle. Handlers made by `once()` fail with FST_OPENAI_WEBHOOK_TRANSACTION_OVER and FST_OPENAI_WEBHOOK_ASYNC_WORK, and
 * `first()` fails with FST_OPENAI_WEBHOOK_NO_TRANSACTION. The `query` of `first()` has to run on the same handle.
 *
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS, and SQLite's own error if the table cannot be created
 */
export function sqliteInbox<Db extends SqliteDatabase> (db: Db, options: SqliteInboxOptions = {}): SqliteInbox<Db> {
  assertRules('sqliteInbox', options, { retention: wholeNumber('ms', 1) })
  const { retention = INBOX_RETENTION } = options
  const database = new Database(db, SCHEMA)
  noteRetention(retention)
  const insertText = insertOf(retention)
  const insert = database.prepare(insertText)
  const expired = database.prepare(`
    DELETE FROM openai_webhook_inbox WHERE rowid IN (SELECT rowid FROM openai_webhook_inbox WHERE forget < ? LIMIT ${PRUNE_LIMIT})`)
  const pruning = new Pruning(async () => await database.write(() => Number(expired.run(Date.now()).changes)))

  return {
    once<Event> (name: string, work: InboxWork<Db, Event>) {
      assertHandlerName('once', name)
      if (typeof work !== 'function' || types.isAsyncFunction(work)) {
        throw new InvalidOptions(`once(): expected a synchronous function after the name, got ${typeof work === 'function' ? 'an async one' : typeof work}`)
      }

      return giveName(function (this: FastifyInstance, event: Event, context: EventContext): void {
        database.transaction(() => {
          if (insert.all(...recordOf(name, context, retention)).length === 0) return
          const { tx, end } = lend(db, name, () => database.isInTransaction())
          try {
            // Asynchronous work continues without its `tx` and fails. The error below says what is wrong.
            if (!isStray(work.call(this, tx, event, context))) return
          } finally {
            end()
          }
          throw new AsyncWork(name)
        })
        prune(pruning, context)
      }, name)
    },
    first (query, name, context) {
      assertFirst(query, name)
      database.assertFile()
      if (!database.isInTransaction()) throw new NoTransaction(name)
      const answer = query(insertText, recordOf(name, context, retention))
      const rows = Array.isArray(answer) ? answer : answer?.rows
      if (!Array.isArray(rows)) throw new InvalidOptions('first(): expected query(text, values) to return rows, or an object that has them as `rows`, at once')
      prune(pruning, context)
      return rows.length === 1
    },
    async close () {
      await pruning.close()
    }
  }
}
