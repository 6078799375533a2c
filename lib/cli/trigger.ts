import { setTimeout as sleep } from 'node:timers/promises'
import { CommandError, EXIT, count, usageError } from './command.ts'
import type { Arguments, Command, Terminal } from './command.ts'
import { secretHelp, secretOptions } from './secret.ts'
import { readSigningSecret, sendOptions, sender } from './send.ts'
import type { Answer, Sender } from './send.ts'
import { milliseconds, paint, paintStatus, progress, told } from './table.ts'
import { matches, nearestType } from '../nearest.ts'
import { newSample, sampleTypes } from '../testing/sample.ts'
import type { SampleType } from '../testing/sample.ts'
import { newWebhookId, sign } from '../testing/sign.ts'

/** Above this number of deliveries a terminal shows a bar instead of a line for each. */
const MANY = 20
/** The most deliveries in flight at once. When the receiver is slower than the rate, the next delivery waits. */
const MAX_RUNNING = 256

/** Where the example in README and `listen --port 3000` receive. */
const DEFAULT_URL = 'http://127.0.0.1:3000/webhooks/openai'

const help = `Usage: openai-webhook trigger <type…|all> [options]

Sends signed sample events, as OpenAI would. A type is one such as batch.completed, a family such as batch.*
(quote it: 'batch.*'), or all.

  --url URL            the receiver (${DEFAULT_URL})
  --data PATH=VALUE    sets a field of the event: data.id=batch_1; JSON where it is JSON, else text; may be repeated
  --count N            deliveries of each type (1)
  --rate R             deliveries started per second; without it each waits for the answer to the one before
  --duplicate          sends each a second time with its webhook-id, as OpenAI retries; that must be answered
                       200 {"received":true,"duplicate":true}
  --queued             with --duplicate: 200 {"received":true} is right too. For a receiver whose runner cannot tell that
                       it has queued a delivery already; those of this package can
  --timeout MS         how long to wait for an answer (10000)
  --json               a JSON object a line: one for each delivery, then {"summary":…}
${secretHelp}

Exit code 0 when every delivery was answered 200, else 1.

Examples:
  openai-webhook trigger all
  openai-webhook trigger batch.completed --data data.id=batch_1
  openai-webhook trigger 'response.*' --count 500 --rate 100 --url https://example.com/webhooks/openai
`

export const trigger: Command = {
  summary: 'sends signed sample events to a receiver',
  help,
  options: {
    ...sendOptions,
    ...secretOptions,
    data: { type: 'string', multiple: true },
    count: { type: 'string' },
    rate: { type: 'string' },
    duplicate: { type: 'boolean' },
    queued: { type: 'boolean' }
  },
  async run (args, terminal) {
    const types = selectTypes(args.positionals)
    const fields = (args.values['data'] as string[] | undefined ?? []).map(parseField)
    const each = count(args, 'count', 1)
    const rate = count(args, 'rate', undefined)
    const duplicate = args.values['duplicate'] === true
    if (args.values['queued'] === true && !duplicate) throw usageError('--queued says what is right for the second delivery of --duplicate')
    // Checks the paths of `--data` before anything is sent.
    for (const type of types) makeEvent(type, fields)
    const to = sender(args, terminal, DEFAULT_URL)
    const secret = await readSigningSecret(args, terminal)

    const report = new Report(terminal, args, types, types.length * each * (duplicate ? 2 : 1))
    const deliverAndReport = async (type: SampleType): Promise<void> => {
      const body = JSON.stringify(makeEvent(type, fields))
      const webhookId = newWebhookId()
      report.add(type, webhookId, await deliver(to, body, { secret, webhookId }))
      if (duplicate) report.add(type, webhookId, await deliver(to, body, { secret, webhookId }), true)
    }
    const rounds = function * (): Generator<() => Promise<void>> {
      for (let i = 0; i < each; i++) for (const type of types) yield () => deliverAndReport(type)
    }
    try {
      await (rate === undefined ? inTurn(rounds()) : atRate(rounds(), rate, terminal.signal))
    } finally {
      to.close()
      report.end()
    }
    return report.failed ? EXIT.failed : EXIT.ok
  }
}

async function deliver (to: Sender, body: string, options: { secret: string, webhookId: string }): Promise<Answer> {
  return await to.send(Object.entries(sign(body, options)), Buffer.from(body))
}

async function inTurn (work: Iterable<() => Promise<void>>): Promise<void> {
  for (const run of work) await run()
}

/** Starts deliveries on schedule and does not wait for the answers, so a slow receiver does not lower the rate below MAX_RUNNING in flight. */
async function atRate (work: Iterable<() => Promise<void>>, rate: number, interrupted: AbortSignal): Promise<void> {
  const failed = new AbortController()
  const stop = AbortSignal.any([interrupted, failed.signal])
  const running = new Set<Promise<void>>()
  const started = performance.now()
  let next = 0
  for (const run of work) {
    const wait = started + 1000 * next++ / rate - performance.now()
    if (wait > 0) await sleep(wait, undefined, { signal: stop }).catch(() => {})
    if (running.size >= MAX_RUNNING) await Promise.race(running)
    if (stop.aborted) break
    const one = run().catch(error => { failed.abort(error) }).finally(() => running.delete(one))
    running.add(one)
  }
  await Promise.all(running)
  if (interrupted.aborted) throw new CommandError('interrupted')
  if (failed.signal.aborted) throw failed.signal.reason
}

/** @throws CommandError for an unknown type */
function selectTypes (wanted: readonly string[]): SampleType[] {
  if (wanted.length === 0) throw usageError('missing an event type, such as batch.completed, \'batch.*\' or all')
  return [...new Set(wanted.flatMap(matching))]
}

function matching (wanted: string): SampleType[] {
  const found = sampleTypes.filter(type => wanted === 'all' || matches(wanted, type))
  if (found.length === 0) throw usageError(`unknown event type "${wanted}"${nearestType(wanted, sampleTypes, ['all'])}`)
  return found
}

interface Field {
  path: string[]
  value: unknown
}

/** @throws CommandError with exit code 2 */
function parseField (given: string): Field {
  const [, path, value] = /^([^=]+)=(.*)$/s.exec(given) ?? []
  const keys = path?.split('.') ?? []
  if (value === undefined || keys.includes('')) throw usageError(`--data: expected PATH=VALUE such as data.id=batch_1, got "${given}"`)
  try {
    return { path: keys, value: JSON.parse(value) }
  } catch {
    return { path: keys, value }
  }
}

/** @throws CommandError when a path leads through a value that is not an object */
function makeEvent (type: SampleType, fields: readonly Field[]): object {
  const event = newSample(type)
  for (const { path, value } of fields) {
    let at: object = event
    for (const [i, key] of path.slice(0, -1).entries()) {
      const inner: unknown = Object.hasOwn(at, key) ? at[key as never] : setField(at, key, path[i + 1] === '0' ? [] : {})
      if (typeof inner !== 'object' || inner === null) {
        throw usageError(`--data: ${path.slice(0, i + 1).join('.')} of ${type} is not an object, so it has no ${path[i + 1]}`)
      }
      at = inner
    }
    setField(at, path.at(-1)!, value)
  }
  return event
}

/** Defines the property, because assigning to `__proto__` would set the prototype. @throws CommandError when an array has no such index */
function setField (target: object, key: string, value: unknown): unknown {
  if (Array.isArray(target) && !(/^(?:0|[1-9]\d*)$/.test(key) && Number(key) <= target.length)) throw usageError(`--data: expected an index of an array, 0 to ${target.length}, got "${key}"`)
  Object.defineProperty(target, key, { value, writable: true, enumerable: true, configurable: true })
  return value
}

/** What to do about a refusal, by its code. */
const ADVICE: Readonly<Record<string, string>> = {
  FST_OPENAI_WEBHOOK_INVALID_SIGNATURE: 'the receiver has another signing secret than this command: start both with the same OPENAI_WEBHOOK_SECRET, or give the receiver\'s by --secret-file FILE'
}
const NOT_FOUND = 'the app has no POST route at that path: the plugin\'s own is its `path` (/webhooks/openai) behind its `prefix`; --url says another'
const NOT_A_DUPLICATE = 'the receiver took the second for a new delivery: it has `idempotency: false`, or another process with a store of its own answered, ' +
  'or its runner cannot tell what it has queued already (then give --queued)'

/** Prints the answers (a line each, or a bar), then a summary. */
class Report {
  readonly #terminal: Terminal
  readonly #json: boolean
  readonly #bar: boolean
  readonly #width: number
  readonly #expected: number
  readonly #counts = new Map<string, number>()
  readonly #ms: number[] = []
  readonly #started = performance.now()
  readonly #queued: boolean
  readonly #advice = new Set<string>()
  #done = 0
  failed = false

  constructor (terminal: Terminal, { values }: Arguments, types: readonly string[], expected: number) {
    this.#terminal = terminal
    this.#json = values['json'] === true
    this.#queued = values['queued'] === true
    this.#bar = expected > MANY && terminal.isTTY && !this.#json
    this.#width = Math.max(...types.map(({ length }) => length))
    this.#expected = expected
  }

  /** @param again whether the same delivery was sent before */
  add (type: string, webhookId: string, answer: Answer, again = false): void {
    const { status, code, duplicate, ms } = answer
    const right = status === 200 && (duplicate || !again || this.#queued)
    const words = told(answer) + (status === 200 && !right ? ', expected duplicate' : '')
    const label = right ? '200' : `${status ?? ''} ${words}`.trim()
    this.#counts.set(label, (this.#counts.get(label) ?? 0) + 1)
    this.#done++
    this.failed ||= !right
    const advice = status === 200 ? NOT_A_DUPLICATE : status === 404 ? NOT_FOUND : ADVICE[String(code)]
    if (!right && advice !== undefined) this.#advice.add(advice)
    if (status !== undefined) this.#ms.push(ms)
    if (this.#json) {
      this.#line({ type, webhookId, status: status ?? null, code: code ?? null, duplicate, ms: round(ms) })
    } else if (this.#bar) {
      this.#terminal.out(progress(this.#done, this.#expected, this.#tally()))
    } else {
      this.#terminal.out(`${type.padEnd(this.#width)}  ${paintStatus(this.#terminal, status)}  ${words}  ${paint(this.#terminal, 'dim', milliseconds(ms))}\n`)
    }
  }

  end (): void {
    const sorted = this.#ms.sort((a, b) => a - b)
    const [p50, p99] = [0.5, 0.99].map(share => sorted[Math.ceil(share * sorted.length) - 1])
    const seconds = (performance.now() - this.#started) / 1000
    if (this.#json) {
      this.#line({ summary: { deliveries: this.#done, answers: Object.fromEntries(this.#counts), p50: round(p50), p99: round(p99), seconds: Number(seconds.toFixed(3)) } })
    } else if (this.#done > 0) {
      const quantiles = p50 === undefined || p99 === undefined ? '' : `, p50 ${milliseconds(p50)}, p99 ${milliseconds(p99)}`
      this.#terminal.out(`${this.#bar ? '\n' : ''}${this.#done} ${this.#done === 1 ? 'delivery' : 'deliveries'} in ${seconds.toFixed(2)} s: ${this.#tally()}${quantiles}\n`)
    }
    for (const advice of this.#advice) this.#terminal.err(`${advice}\n`)
  }

  #tally (): string {
    return [...this.#counts].map(([label, n]) => paint(this.#terminal, label === '200' ? 'green' : 'red', `${n} × ${label}`)).join(', ')
  }

  #line (object: object): void {
    this.#terminal.out(`${JSON.stringify(object)}\n`)
  }
}

function round (value: number | undefined): number | null {
  return value === undefined ? null : Math.round(value * 10) / 10
}
