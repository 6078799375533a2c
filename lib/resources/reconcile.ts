import { createHash } from 'node:crypto'
import { ANYTHING, BOOLEAN, FUNCTION, LONGEST_TIMER, SIGNAL, assertRules, show, wholeNumber } from '../checks.ts'
import type { Rule } from '../checks.ts'
import { InvalidOptions, InvalidSecret } from '../errors.ts'
import { matches, nearest } from '../nearest.ts'
import { sign } from '../testing/sign.ts'
import { keyBytes } from '../verifiers/keyring.ts'
import { EVALS, endedSince, FAMILY_NAMES, typesOf } from './ended.ts'
import type { Ended } from './ended.ts'
import type { ResourceClient } from './kinds.ts'
import { post } from './post.ts'
import { assertClient } from './retrieve.ts'

export interface ReconcileOptions {
  /** The URL of the receiver, such as http://127.0.0.1:3000/webhooks/openai. */
  url: string | URL
  /**
   * The receiver's signing secret.
   *
   * @default process.env.OPENAI_WEBHOOK_SECRET
   */
  secret?: string | undefined
  /**
   * The start of the period whose ended resources are listed: a Date, ms since the epoch, a date as text, or how long ago, such as `3d`,
   * `12h`, `90m`. Go no further back than the receiver's `idempotency.retention`: the receiver would process again what its store has
   * forgotten.
   */
  since: Date | number | string
  /**
   * Event types or families among those that can be listed: `batch.*`, `fine_tuning.job.*`, `video.*`, `agent.session.failed`, and
   * `eval.run.*` with `evals`.
   *
   * @default all of them
   */
  types?: readonly string[] | undefined
  /** The ids of the evals whose runs are listed. The API has no list of the runs of all evals. */
  evals?: readonly string[] | undefined
  /**
   * Whether the events are only listed, and none is delivered.
   *
   * @default false
   */
  dryRun?: boolean | undefined
  /**
   * ms to wait for an answer of the receiver.
   *
   * @default 10_000
   */
  timeout?: number | undefined
  signal?: AbortSignal | undefined
  /** Called after each step. An error that it throws ends the run. */
  onProgress?: ((progress: ReconcileProgress) => void) | undefined
}

export type ReconcileProgress =
  /** `found` counts the events of all families so far. */
  | { readonly step: 'list', readonly family: string, readonly found: number }
  | { readonly step: 'deliver', readonly done: number, readonly total: number, readonly event: ReconciledEvent }

export interface ReconciledEvent {
  readonly type: string
  /** The id of the resource. */
  readonly id: string
  readonly webhookId: string
  /** When the resource ended, in Unix seconds. */
  readonly endedAt: number
  /**
   * `listed` in a dry run; `delivered` when the receiver answered 200, so that the event is processed or queued; `duplicate` when the
   * receiver had processed it before; `failed` for any other answer, or none.
   */
  readonly outcome: 'listed' | 'delivered' | 'duplicate' | 'failed'
  /** The status of the receiver's answer; absent when no answer came. */
  readonly status?: number
  /** The `code` of the receiver's answer, such as FST_OPENAI_WEBHOOK_DEADLINE, or why no answer came. */
  readonly code?: string
}

export interface ReconcileReport {
  /** The oldest first. */
  readonly events: readonly ReconciledEvent[]
  readonly delivered: number
  readonly duplicates: number
  readonly failed: number
  /**
   * The families that the project cannot list, with the status of the API's answer. Only without `types`: a family that was asked for is an
   * error.
   */
  readonly skipped: ReadonlyArray<{ readonly family: string, readonly status: number }>
}

const RULES = {
  secret: { expected: 'a signing secret', accepts: value => typeof value === 'string' },
  types: { expected: 'an array of event types', accepts: Array.isArray },
  evals: { expected: 'an array of ids of evals', accepts: Array.isArray },
  dryRun: BOOLEAN,
  timeout: wholeNumber('ms', 1, LONGEST_TIMER),
  signal: SIGNAL,
  onProgress: FUNCTION
} satisfies Partial<Record<keyof ReconcileOptions, Rule>>
const TIMEOUT = 10_000
const AT_ONCE = 4
const UNITS: Readonly<Record<string, number>> = { s: 1_000, m: 60_000, h: 3_600_000, d: 86_400_000 }
/** No access, or the API no longer exists: such a family is skipped. A wrong API key is answered 401, which is an error. */
const UNLISTED: readonly unknown[] = [403, 404, 410]

/**
 * Delivers events that did not arrive. It lists at OpenAI what has ended since a time, makes the event that OpenAI sent for each resource,
 * signs it and delivers it to the receiver. The receiver needs `idempotency: { reconcile: true }` to recognise what it has processed. A
 * second run changes nothing, because the `webhook-id` of an event is derived from its type and the id of its resource.
 *
 * Rejects with FST_OPENAI_WEBHOOK_INVALID_OPTIONS, FST_OPENAI_WEBHOOK_INVALID_SECRET, FST_OPENAI_WEBHOOK_UNEXPECTED_LIST, the signal's
 * reason and the SDK's errors. A delivery that the receiver refuses is in the report.
 *
 * @param client a client of the official `openai` package, with an API key of the project whose events the receiver gets
 */
export async function reconcile (client: ResourceClient, options: ReconcileOptions): Promise<ReconcileReport> {
  const plan = planOf(options)
  assertClient('reconcile()', client)
  const { signal, dryRun = false, onProgress } = options
  const { found, skipped } = await list(client, plan, options)
  const events: ReconciledEvent[] = found.map(ended => ({ ...identityOf(ended), outcome: 'listed' }))
  if (!dryRun) {
    const next = found.entries()
    let done = 0
    let isOver = false
    async function deliverNext (): Promise<void> {
      try {
        for (const [index, ended] of next) {
          signal?.throwIfAborted()
          const event = events[index] = { ...identityOf(ended), ...await deliver(ended, plan, signal) }
          onProgress?.({ step: 'deliver', done: ++done, total: found.length, event })
          if (isOver) return
        }
      } finally {
        // Once one delivery has thrown, the others start no further delivery.
        isOver = true
      }
    }
    await Promise.all(Array.from({ length: AT_ONCE }, deliverNext))
  }
  const count = (wanted: ReconciledEvent['outcome']): number => events.filter(({ outcome }) => outcome === wanted).length
  return { events, delivered: count('delivered'), duplicates: count('duplicate'), failed: count('failed'), skipped }
}

interface Plan {
  readonly url: URL
  readonly secret: string
  /** Unix seconds */
  readonly since: number
  readonly types: ReadonlySet<string>
  readonly families: ReadonlyArray<{ readonly family: string, readonly evalId?: string }>
  readonly timeout: number
}

async function list (client: ResourceClient, { since, types, families }: Plan, { types: asked, signal, onProgress }: ReconcileOptions): Promise<{ found: Ended[], skipped: ReconcileReport['skipped'] }> {
  // By webhook-id, because a resource may be on two pages: the pages shift while they are read.
  const found = new Map<string, Ended>()
  const skipped: Array<ReconcileReport['skipped'][number]> = []
  for (const { family, ...options } of families) {
    try {
      for await (const page of endedSince(client, family, since, { ...options, signal })) {
        for (const ended of page) if (types.has(ended.type)) found.set(identityOf(ended).webhookId, ended)
        onProgress?.({ step: 'list', family, found: found.size })
      }
    } catch (error) {
      const { status } = Object(error) as { status?: unknown }
      if (asked !== undefined || !UNLISTED.includes(status)) throw error
      skipped.push({ family, status: status as number })
    }
  }
  return { found: [...found.values()].sort((a, b) => a.endedAt - b.endedAt), skipped }
}

function identityOf ({ type, data: { id }, endedAt }: Ended): Omit<ReconciledEvent, 'outcome'> {
  return { type, id, webhookId: `wh_reconciled_${digest(type, id)}`, endedAt }
}

function digest (type: string, id: string): string {
  return createHash('sha256').update(`${type} ${id}`).digest('hex').slice(0, 32)
}

async function deliver (ended: Ended, { url, secret, timeout }: Plan, signal: AbortSignal | undefined): Promise<Pick<ReconciledEvent, 'outcome' | 'status' | 'code'>> {
  const { type, id, webhookId, endedAt } = identityOf(ended)
  const body = JSON.stringify({ id: `evt_reconciled_${digest(type, id)}`, object: 'event', created_at: Math.floor(endedAt), type, data: ended.data })
  const { status, code, duplicate } = await post(url, sign(body, { secret, webhookId }), body, timeout, signal)
  return {
    outcome: status !== 200 ? 'failed' : duplicate ? 'duplicate' : 'delivered',
    ...(status !== undefined && { status }),
    ...(code !== undefined && { code })
  }
}

/** @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS, FST_OPENAI_WEBHOOK_INVALID_SECRET */
function planOf (options: ReconcileOptions): Plan {
  // If a misspelt `dryrun` were ignored, the events would be delivered.
  assertRules('reconcile()', options, { url: ANYTHING, since: ANYTHING, ...RULES })
  const { url, secret = process.env['OPENAI_WEBHOOK_SECRET'], since, types, evals = [], dryRun = false, timeout = TIMEOUT } = options
  const wanted = new Set(types === undefined ? FAMILY_NAMES.flatMap(typesOf) : types.flatMap(listable))
  const families = FAMILY_NAMES.filter(family => family !== EVALS && typesOf(family).some(type => wanted.has(type)))
  const wantsEvals = typesOf(EVALS).some(type => wanted.has(type))
  if (types !== undefined && evals.length === 0 && wantsEvals) throw invalid('evals', 'the ids of the evals whose runs are meant: the API has no list over all of them')
  const plan = {
    url: dryRun ? DRY : urlOf(url),
    secret: secret!,
    since: sinceOf(since),
    types: wanted,
    families: [...families.map(family => ({ family })), ...(wantsEvals ? evals.map(evalId => ({ family: EVALS, evalId: idOf(evalId) })) : [])],
    timeout
  }
  if (dryRun) return plan
  if (secret === undefined) throw new InvalidSecret('reconcile(): expected the receiver\'s signing secret in the environment variable OPENAI_WEBHOOK_SECRET or as `secret`, got neither')
  keyBytes(secret, () => {})
  return plan
}

/** The ms that a text such as 3d, 12h, 90m or 45s stands for. */
export function durationOf (text: unknown): number | undefined {
  const [, amount, unit] = typeof text === 'string' ? /^(\d+)([smhd])$/.exec(text) ?? [] : []
  return unit === undefined ? undefined : Number(amount) * UNITS[unit]!
}

/** The URL of a dry run, which needs none. Nothing is delivered to it. */
const DRY = new URL('http://127.0.0.1')

function invalid (name: string, expected: string): Error {
  return new InvalidOptions(`reconcile(): expected ${name} to be ${expected}`)
}

/** The event types that a type or a family stands for. */
function listable (name: unknown): string[] {
  if (typeof name !== 'string') throw invalid('types', `texts such as "batch.completed", got ${show(name)}`)
  const known = FAMILY_NAMES.flatMap(typesOf)
  const matching = known.filter(type => matches(name, type))
  if (matching.length === 0) throw invalid('types', `of what the API can list, ${known.join(', ')} or families of these; it has no list for "${name.slice(0, 64)}"${nearest(name, [...known, ...FAMILY_NAMES])}`)
  return matching
}

function idOf (evalId: unknown): string {
  if (typeof evalId !== 'string' || !/^[\w-]{1,256}$/.test(evalId)) throw invalid('evals', 'ids of evals, such as eval_123')
  return evalId
}

function urlOf (given: string | URL): URL {
  const url = URL.canParse(String(given)) ? new URL(given) : undefined
  if (url === undefined || !/^https?:$/.test(url.protocol) || url.username + url.password !== '') {
    throw invalid('url', 'an http(s) address without user name and password, such as http://127.0.0.1:3000/webhooks/openai')
  }
  return url
}

/** Returns Unix seconds. @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS */
export function sinceOf (since: unknown): number {
  const ago = durationOf(since)
  // A text that is only a number is not a date, but Date would parse it as a day of some year.
  const isDate = since instanceof Date || (typeof since === 'string' && !/^\s*[+-]?[\d.]+\s*$/.test(since))
  const ms = ago !== undefined ? Date.now() - ago : isDate ? new Date(since).getTime() : since
  if (typeof ms !== 'number' || !Number.isFinite(ms) || ms > Date.now()) throw invalid('since', 'a time in the past: a Date, ms since the epoch, a date as text, or how long ago, such as 3d, 12h or 90m')
  return ms / 1_000
}
