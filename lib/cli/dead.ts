import { statSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { CommandError, EXIT, count, text, usageError } from './command.ts'
import type { Arguments, Command, Terminal } from './command.ts'
import { paint, printable } from './table.ts'
import { nearest } from '../nearest.ts'
import { assertRemembered } from '../runners/runner.ts'
import type { DeadDelivery } from '../runners/runner.ts'
import type { SqliteDatabase } from '../sqlite/database.ts'
import { deadJobsOf } from '../sqlite/jobs.ts'
import type { DeadFilter, DeadJobs } from '../sqlite/jobs.ts'

/** Opens an existing file with one SQLite library. Returns `undefined` when that library is not available. */
export type OpenSqlite = (file: string) => ClosableDatabase | undefined

type ClosableDatabase = SqliteDatabase & { close: () => unknown }

/** The number of deliveries that `list` prints by default. */
const LIMIT = 100
/** As SQLite has it. */
const NO_LIMIT = -1

const help = `Usage: openai-webhook dead list --sqlite FILE [options]
       openai-webhook dead show ID --sqlite FILE [options]
       openai-webhook dead requeue ID… --sqlite FILE [options]
       openai-webhook dead requeue --all --sqlite FILE [options]

The deliveries of durable() whose attempts are used up: what each of them ended with, and its attempts anew. The receiver
may be running: it looks at the file every second.

  list                 the dead deliveries, oldest first
  show                 one of them, by its webhook-id: errors with their stacks, what had succeeded, the event
  requeue              gives those that are named their attempts anew; handlers that had succeeded do not run again

Options:
  --sqlite FILE        the receiver's file; it is never created
  --endpoint URL       of this receiving route alone, such as /webhooks/openai
  --tenant NAME        of this tenant alone
  --type TYPE          of this event type alone, such as batch.completed
  --limit N            list: how many (${LIMIT}); requeue --all: how many, the oldest first (all)
  --all                list: all of them; requeue: all that the options above select
  --force              requeue: also what is older than what the inbox of a handler remembers, so that its effect could
                       happen twice
  --json               a JSON object a line

Exit code 0 when it was done, 1 when there is no such delivery or the file cannot be used.

The file is opened by node:sqlite where Node has it, else by the libsql or better-sqlite3 of the working directory.

Examples:
  openai-webhook dead list --sqlite webhooks.db --type batch.completed
  openai-webhook dead requeue wh_685c059ae39c8190af8c71ed1022a24d --sqlite webhooks.db
`

/** @param libraries tried in turn */
export function deadCommand (libraries: readonly OpenSqlite[]): Command {
  return {
    summary: 'lists, shows and requeues the deliveries of an SQLite file whose attempts are used up',
    help,
    options: {
      sqlite: { type: 'string' },
      endpoint: { type: 'string' },
      tenant: { type: 'string' },
      type: { type: 'string' },
      limit: { type: 'string' },
      all: { type: 'boolean' },
      force: { type: 'boolean' },
      json: { type: 'boolean' }
    },
    async run (args, terminal) {
      const act = plan(args, terminal)
      const file = text(args, 'sqlite')
      if (file === undefined || file === '') throw usageError('missing --sqlite, the file of durable()')
      const db = open(file, libraries)
      let code
      try {
        assertJobs(db, file)
        code = act(deadJobsOf(db))
      } catch (error) {
        throw error instanceof CommandError ? error : new CommandError(`${file}: ${printable((error as Error).message)}`)
      } finally {
        db.close()
      }
      return code
    }
  }
}

const nodeSqlite: OpenSqlite = file => {
  const sqlite = process.getBuiltinModule('node:sqlite') as { DatabaseSync: new (file: string) => ClosableDatabase } | undefined
  return sqlite === undefined ? undefined : new sqlite.DatabaseSync(file)
}

/** Loads the package from the working directory, because the user installs it in the app and not beside this command. */
const installed = (name: string): OpenSqlite => file => {
  let Handle: new (file: string) => ClosableDatabase
  try {
    Handle = createRequire(join(process.cwd(), 'openai-webhook.js'))(name) as typeof Handle
  } catch {
    return undefined
  }
  return new Handle(file)
}

export const dead = deadCommand([nodeSqlite, installed('libsql'), installed('better-sqlite3')])

type Act = (jobs: DeadJobs) => number

/** Distinguishes "there are no dead deliveries" from "the filter matches none", which may be a misspelt filter. */
function noneOf (jobs: DeadJobs): string {
  const count = jobs.count()
  return count === 0 ? `no dead deliveries${withWaiting(jobs)}\n` : `none of the ${count} dead deliveries matches\n`
}

function withWaiting (jobs: DeadJobs): string {
  const count = jobs.waiting()
  return count === 0 ? '' : `; ${count} with attempts left`
}

const actions: Readonly<Record<string, (args: Arguments, terminal: Terminal, ids: readonly string[]) => Act>> = {
  list (args, terminal, ids) {
    if (ids.length > 0) throw usageError(`list: expected nothing more, got "${printable(ids.join(' '))}"`)
    const filter = filterOf(args)
    const limit = args.values['all'] === true ? NO_LIMIT : count(args, 'limit', LIMIT)
    return jobs => {
      const listed = jobs.list(limit, filter)
      for (const delivery of listed) print(terminal, args, delivery, line(delivery, terminal))
      const left = jobs.count(filter) - listed.length
      if (left > 0) terminal.err(`${left} more: --limit N or --all lists them\n`)
      else if (listed.length === 0) terminal.err(noneOf(jobs))
      return EXIT.ok
    }
  },

  show (args, terminal, ids) {
    const [id, ...others] = ids
    if (id === undefined || others.length > 0) throw usageError('show: expected one webhook-id')
    return jobs => {
      const delivery = find(jobs, id, filterOf(args))
      print(terminal, args, delivery, inFull(delivery, terminal))
      return EXIT.ok
    }
  },

  requeue (args, terminal, ids) {
    const { all = false, force = false } = args.values as { all?: boolean, force?: boolean }
    if (all === (ids.length > 0)) throw usageError('requeue: expected webhook-ids, or --all')
    if (!all && args.values['limit'] !== undefined) throw usageError('requeue: --limit is of no use without --all')
    const limit = count(args, 'limit', NO_LIMIT)
    return jobs => {
      const filter = filterOf(args)
      // Every id is checked before the first delivery is requeued, so that a wrong id requeues nothing.
      const found = all ? jobs.list(force ? limit : NO_LIMIT, filter) : [...new Set(ids)].map(id => find(jobs, id, filter))
      const unsafe = force ? undefined : found.find(delivery => !isSafe(delivery))
      if (unsafe !== undefined && !all) throw new CommandError(`${printable(unsafe.webhookId, 256)}: ${UNSAFE}`)
      // With --all the others are requeued, because an old delivery must not hold up those that have failed tonight.
      const safe = unsafe === undefined ? found : found.filter(isSafe)
      let missed = found.length - safe.length
      if (unsafe !== undefined) terminal.err(`${missed} not requeued, such as ${printable(unsafe.webhookId, 256)}: ${UNSAFE}\n`)
      for (const delivery of limit === NO_LIMIT ? safe : safe.slice(0, limit)) {
        const done = jobs.revive(delivery, force)
        if (!done) missed++
        print(terminal, args, { webhookId: delivery.webhookId, endpoint: delivery.endpoint, requeued: done }, `${printable(delivery.webhookId, 256)}  ${done ? 'requeued' : 'was requeued meanwhile'}\n`)
      }
      if (found.length === 0) terminal.err(noneOf(jobs))
      return missed === 0 ? EXIT.ok : EXIT.failed
    }
  }
}

/** The options that an action does not use. */
const USELESS: Readonly<Record<string, readonly string[]>> = { list: ['force'], show: ['limit', 'all', 'force'] }

/** @throws CommandError with exit code 2 */
function plan (args: Arguments, terminal: Terminal): Act {
  const [name, ...ids] = args.positionals
  const names = Object.keys(actions)
  if (name === undefined) throw usageError(`dead: expected one of ${names.join(', ')}`)
  const action = Object.hasOwn(actions, name) ? actions[name] : undefined
  if (action === undefined) throw usageError(`dead: unknown action "${printable(name)}"${nearest(name, names)}`)
  for (const option of USELESS[name] ?? []) if (args.values[option] !== undefined) throw usageError(`${name}: --${option} is of no use here`)
  return action(args, terminal, ids)
}

/** @throws CommandError with exit code 2 */
function filterOf (args: Arguments): DeadFilter {
  const type = text(args, 'type')
  if (type?.endsWith('*') === true) throw usageError(`--type: expected one event type, such as batch.failed, got the pattern "${printable(type)}"`)
  return { endpoint: text(args, 'endpoint'), tenant: text(args, 'tenant'), type }
}

/** @throws CommandError */
function open (file: string, libraries: readonly OpenSqlite[]): ClosableDatabase {
  // The file is checked first because the library would create a missing one.
  if (statSync(file, { throwIfNoEntry: false })?.isFile() !== true) throw new CommandError(`${file}: there is no such file`)
  for (const library of libraries) {
    try {
      const db = library(file)
      if (db !== undefined) return db
    } catch (error) {
      throw new CommandError(`${file}: ${printable((error as Error).message)}`)
    }
  }
  throw new CommandError('this command needs Node 22.13 or later, or one of these packages here: npm i libsql, npm i better-sqlite3')
}

/** @throws CommandError when the file has no table of durable(), which the code that follows would otherwise create */
function assertJobs (db: SqliteDatabase, file: string): void {
  const tables = db.prepare("SELECT name FROM sqlite_master WHERE type = 'table' AND name = 'openai_webhook_jobs'").all()
  if (tables.length === 0) throw new CommandError(`${file}: it has no deliveries of durable()`)
}

/** @throws CommandError when no delivery matches, or more than one */
function find (jobs: DeadJobs, webhookId: string, filter: DeadFilter): DeadDelivery {
  const [found, ...others] = jobs.list(2, { ...filter, webhookId })
  if (found === undefined) throw new CommandError(`${printable(webhookId, 256)}: there is no such dead delivery${withWaiting(jobs)}`)
  if (others.length > 0) throw new CommandError(`${printable(webhookId, 256)}: there are several, at different endpoints or of different tenants: say which by --endpoint or --tenant`)
  return found
}

const UNSAFE = 'it is older than what the inbox remembers, so an effect could happen twice: see by `show` what has failed, check whether it has taken effect, and say --force if it is to run again'

/** Whether the inbox still remembers what has failed. */
function isSafe (delivery: DeadDelivery): boolean {
  try {
    assertRemembered(delivery)
    return true
  } catch {
    return false
  }
}

function print ({ out }: Terminal, { values }: Arguments, document: object, readable: string): void {
  out(values['json'] === true ? `${JSON.stringify(document)}\n` : readable)
}

function line (delivery: DeadDelivery, terminal: Terminal): string {
  const { webhookId, event, endpoint, tenant, attempts, diedAt, errors } = delivery
  const where = printable(tenant === undefined ? endpoint : `${endpoint} of ${tenant}`, 300)
  return `${paint(terminal, 'bold', printable(webhookId, 256))}  ${printable(event.type, 60)}  ${where}  ${time(diedAt)}  ${tries(attempts)}
  ${errors.map(({ handler, message }) => printable(handler === null ? message : `${handler}: ${message}`)).join('\n  ')}
`
}

function inFull (delivery: DeadDelivery, terminal: Terminal): string {
  const { errors, finished, event } = delivery
  const stacks = errors.map(({ handler, message, stack }) => {
    return `${handler === null ? 'no handler' : `handler ${printable(handler)}`}:\n${indented(stack === '' ? message : stack)}\n`
  })
  return `${line({ ...delivery, errors: [] }, terminal).trimEnd()}
  finished: ${finished.length === 0 ? 'none' : printable(finished.join(', '), 1_000)}

${stacks.join('\n')}
event:
${indented(JSON.stringify(event, undefined, 2))}
`
}

function indented (text: string): string {
  return text.split('\n').map(each => `  ${printable(each, 1_000)}`).join('\n')
}

function time (ms: number): string {
  return new Date(ms).toISOString()
}

function tries (attempts: number): string {
  return attempts === 1 ? '1 attempt' : `${attempts} attempts`
}
