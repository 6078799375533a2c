import { randomUUID } from 'node:crypto'
import { assertNone } from '../checks.ts'
import { Database, changed } from './database.ts'
import type { SqliteDatabase } from './database.ts'
import { pruning } from './pruning.ts'
import { RETENTION } from '../stores/store.ts'
import type { Claim, IdempotencyStore } from '../stores/store.ts'

// Rows are stored in the order of arrival, so that the second write for a delivery touches the same page as the first one and as its neighbours.
// `ends` is the end of the lease while there is a token. `forget` is when the row may be deleted. Times are in ms since the epoch.
const SCHEMA = `
  CREATE TABLE IF NOT EXISTS openai_webhook_deliveries (
    key TEXT PRIMARY KEY,
    token TEXT,
    done INTEGER NOT NULL DEFAULT 0,
    finished TEXT NOT NULL DEFAULT '[]',
    ends INTEGER NOT NULL,
    forget INTEGER NOT NULL
  );
  CREATE INDEX IF NOT EXISTS openai_webhook_deliveries_forget ON openai_webhook_deliveries (forget);
`

interface Row {
  done: number
  finished: string
}

/**
 * Remembers deliveries in the user's SQLite file, so that they are remembered after a restart. Several processes on one machine may share the
 * file. Creates the table `openai_webhook_deliveries`, sets the handle to WAL with one fsync per commit, and never closes it. While the file is
 * locked, full or read-only, new deliveries are answered 503. If the file was deleted or replaced, that lasts until the process is restarted.
 *
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS for anything but a handle, and SQLite's own error if the table cannot be created
 */
export function sqliteStore (db: SqliteDatabase): IdempotencyStore
export function sqliteStore (db: SqliteDatabase, ...given: unknown[]): IdempotencyStore {
  assertNone('sqliteStore', given, 'it takes the handle alone; lease and retention are options of the plugin\'s idempotency')
  const database = new Database(db, SCHEMA)
  // Without RETURNING, because reading the row costs about as much as inserting it.
  const insert = database.prepare('INSERT INTO openai_webhook_deliveries (key, token, ends, forget) VALUES (?, ?, ?, ?) ON CONFLICT (key) DO NOTHING')
  // Claims a released row, a row whose lease has expired, or a row that may be forgotten.
  const claim = database.prepare(`
    UPDATE openai_webhook_deliveries SET token = ?, done = 0, ends = ?, forget = ?
    WHERE key = ? AND ((done = 1 AND forget <= ?) OR (done = 0 AND (token IS NULL OR ends <= ?)))
    RETURNING finished`)
  // Reads a row that prevents a claim, so that a duplicate gets its answer even while the file cannot be written.
  const settled = database.prepare(`
    SELECT done FROM openai_webhook_deliveries
    WHERE key = ? AND ((done = 1 AND forget > ?) OR (done = 0 AND token IS NOT NULL AND ends > ?))`)
  const read = database.prepare('SELECT done FROM openai_webhook_deliveries WHERE key = ?')
  const checkpoint = database.prepare(`
    UPDATE openai_webhook_deliveries SET finished = json_insert(finished, '$[#]', ?) WHERE key = ? AND token = ?`)
  const complete = database.prepare(`
    UPDATE openai_webhook_deliveries SET token = NULL, done = 1, finished = '[]', forget = ? WHERE key = ? AND token = ?`)
  const extend = database.prepare('UPDATE openai_webhook_deliveries SET ends = ? WHERE key = ? AND token = ?')
  const release = database.prepare('UPDATE openai_webhook_deliveries SET token = NULL WHERE key = ? AND token = ?')
  const prune = pruning(database, 'openai_webhook_deliveries', 'forget <= ?')

  return {
    begin (key, lease) {
      const token = randomUUID()
      return database.write((): Claim => {
        const now = Date.now()
        prune(now)
        if (changed(insert.run(key, token, now + lease, now + RETENTION))) return { state: 'claimed', token, finished: [] }
        // all() instead of get(), here and below: libsql leaves the statement of get() open, and with it a snapshot, because of which SQLite
        // would refuse the next write.
        const [claimed] = claim.all(token, now + lease, now + RETENTION, key, now, now) as [Pick<Row, 'finished'>] | []
        if (claimed !== undefined) return { state: 'claimed', token, finished: JSON.parse(claimed.finished) as string[] }
        const [row] = read.all(key) as [Pick<Row, 'done'>]
        return stateOf(row)
      }, () => {
        const now = Date.now()
        const [known] = settled.all(key, now, now) as [Pick<Row, 'done'>] | []
        return known && stateOf(known)
      })
    },
    checkpoint: (key, token, handler) => database.write(() => { checkpoint.run(handler, key, token) }),
    complete: (key, token, retention) => database.write(() => changed(complete.run(Date.now() + retention, key, token))),
    extend: (key, token, lease) => database.write(() => changed(extend.run(Date.now() + lease, key, token))),
    release: (key, token) => database.write(() => { release.run(key, token) })
  }
}

const stateOf = ({ done }: Pick<Row, 'done'>): Claim => ({ state: done === 1 ? 'done' : 'running' })
