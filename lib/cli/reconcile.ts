import { oneLine, openApi } from './api.ts'
import type { SDK } from './api.ts'
import { CommandError, EXIT, text, usageError } from './command.ts'
import type { Arguments, Command, Terminal } from './command.ts'
import { secretHelp, secretOptions } from './secret.ts'
import { readSigningSecret, sendOptions, timeout, url } from './send.ts'
import { paint, printable, progress } from './table.ts'
import { isCoded } from '../coded.ts'
import { durationOf, reconcile as reconcileAll, sinceOf } from '../resources/reconcile.ts'
import type { ReconciledEvent, ReconcileOptions, ReconcileProgress, ReconcileReport } from '../resources/reconcile.ts'
import { RETENTION } from '../stores/store.ts'

const HOUR = 3_600_000

const help = `Usage: openai-webhook reconcile --since TIME --url URL [options] [--yes]

Delivers events that did not arrive: lists at OpenAI what has ended since a time, makes the event that was sent for each,
signs it and delivers it to the receiver. The receiver needs idempotency: { reconcile: true }. It then answers as a
duplicate what it has processed, and what OpenAI itself still retries after this. Without --yes nothing is delivered.

  --since TIME         how long ago, such as 3d, 12h or 90m, or a date: 2026-11-27T08:00Z
  --url URL            the receiver, such as http://127.0.0.1:3000/webhooks/openai
  --types TYPES        event types and families, separated by commas or given several times; all of them by default:
                       batch.*, fine_tuning.job.*, video.*, agent.session.failed, and eval.run.* with --eval
  --eval ID            an eval whose runs are listed, too; may be repeated
  --yes                delivers
  --dry-run            only lists, which is the default
  --retention TIME     the receiver's idempotency.retention (${RETENTION / HOUR}h). It runs handlers again for what it has
                       forgotten, so --since may not be longer
  --timeout MS         how long to wait for an answer of the receiver (10000)
  --base-url URL       another address of the API; default OPENAI_BASE_URL, else OpenAI's
  --json               a JSON object a line: one for each event, then {"summary":…}
${secretHelp}

OPENAI_API_KEY holds an API key of the project whose events are received; the official openai package is needed
(npm i openai@latest). Run it again until nothing fails: a second run does nothing for what has been processed.

Exit code 0 when every delivery was answered 200, or nothing was to be delivered; else 1.

Examples:
  openai-webhook reconcile --since 3d --url http://127.0.0.1:3000/webhooks/openai
  openai-webhook reconcile --since 12h --types 'batch.*' --url https://example.com/webhooks/openai --yes
`

/** @param load imports the openai package, which may not be installed */
export function reconcileCommand (load: () => Promise<SDK>): Command {
  return {
    summary: 'delivers the events of what has ended at OpenAI while the receiver was down',
    help,
    options: {
      ...sendOptions,
      ...secretOptions,
      since: { type: 'string' },
      types: { type: 'string', multiple: true },
      eval: { type: 'string', multiple: true },
      yes: { type: 'boolean' },
      'dry-run': { type: 'boolean' },
      retention: { type: 'string' },
      'base-url': { type: 'string' }
    },
    async run (args, terminal) {
      const options = await plan(args, terminal)
      const { client, explain } = await openApi(args, terminal, load)
      const output = new Output(args, terminal, options.dryRun!)
      try {
        const report = await reconcileAll(client, { ...options, onProgress: each => output.show(each) })
        return output.end(report)
      } catch (error) {
        output.clear()
        if (terminal.signal.aborted) throw new CommandError('interrupted')
        if (isCoded(error)) throw new CommandError(error.message.replace(/^reconcile\(\): /, ''), (error as { code?: string }).code === 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS' ? EXIT.usage : EXIT.failed)
        throw new CommandError(explain(error))
      }
    }
  }
}

export const reconcile = reconcileCommand(async () => await import('openai'))

/** @throws CommandError */
async function plan (args: Arguments, terminal: Terminal): Promise<ReconcileOptions> {
  if (args.positionals.length > 0) throw usageError(`expected options alone, got "${oneLine(args.positionals.join(' '))}"`)
  const since = text(args, 'since')
  if (since === undefined) throw usageError('missing --since, such as 3d')
  const dryRun = args.values['yes'] !== true
  if (!dryRun && args.values['dry-run'] === true) throw usageError('expected --yes or --dry-run, got both')
  const target = url(args, 'url')
  if (target === undefined && !dryRun) throw usageError('missing --url, the address to deliver to')
  checkRetention(args, since)
  const types = args.values['types'] as string[] | undefined
  return {
    since,
    dryRun,
    url: target ?? '',
    ...(!dryRun && { secret: await readSigningSecret(args, terminal) }),
    ...(types !== undefined && { types: types.flatMap(list => list.split(',')).map(name => name.trim()) }),
    evals: args.values['eval'] as string[] | undefined ?? [],
    timeout: timeout(args),
    signal: terminal.signal
  }
}

/**
 * Refuses a `--since` before the receiver's retention: the receiver would process again what it has forgotten.
 *
 * @throws CommandError with exit code 2
 */
function checkRetention (args: Arguments, since: string): void {
  const given = text(args, 'retention')
  const retention = given === undefined ? RETENTION : durationOf(given)
  if (retention === undefined) throw usageError(`--retention: expected a time such as 75h or 30d, got "${oneLine(given!)}"`)
  let from
  try {
    from = sinceOf(since) * 1_000
  } catch {
    throw usageError(`--since: expected how long ago, such as 3d, 12h or 90m, or a date in the past, got "${oneLine(since)}"`)
  }
  if (Date.now() - from > retention) {
    throw usageError(`--since: expected at most the ${retention / HOUR} h that the receiver remembers what it has processed, since it would process again what it has forgotten; if its idempotency.retention is longer, say it by --retention`)
  }
}

/** Prints the progress (a bar on a terminal, else a line for each event), then a summary. */
class Output {
  readonly #terminal: Terminal
  readonly #json: boolean
  readonly #bar: boolean
  readonly #dryRun: boolean

  constructor ({ values }: Arguments, terminal: Terminal, dryRun: boolean) {
    this.#terminal = terminal
    this.#json = values['json'] === true
    this.#bar = terminal.isTTY && !this.#json
    this.#dryRun = dryRun
  }

  show (step: ReconcileProgress): void {
    const { out } = this.#terminal
    if (step.step === 'list') {
      if (this.#bar) out(`\r${step.family}: ${step.found} found so far\x1b[K`)
    } else if (this.#bar) {
      if (step.event.outcome === 'failed') this.#event(step.event)
      out(progress(step.done, step.total, printable(step.event.type)))
    } else {
      this.#event(step.event)
    }
  }

  /** Clears the bar, so that the next text starts on an empty line. */
  clear (): void {
    if (this.#bar) this.#terminal.out('\r\x1b[K')
  }

  /** @returns the exit code */
  end ({ events, delivered, duplicates, failed, skipped }: ReconcileReport): number {
    this.clear()
    if (this.#dryRun) for (const event of events) this.#event(event)
    for (const { family, status } of skipped) this.#terminal.err(`${family}: left out, the API answered ${status}\n`)
    const summary = { events: events.length, delivered, duplicates, failed, dryRun: this.#dryRun }
    if (this.#json) {
      this.#terminal.out(`${JSON.stringify({ summary })}\n`)
    } else {
      const count = `${events.length} ${events.length === 1 ? 'event' : 'events'}`
      this.#terminal.out(this.#dryRun
        ? `${count}, nothing delivered${events.length === 0 ? '' : ': --yes delivers them; what the receiver has processed it answers as a duplicate'}\n`
        : `${count}: ${delivered} delivered, ${duplicates} processed before, ${failed} failed\n`)
    }
    return failed === 0 ? EXIT.ok : EXIT.failed
  }

  #event (event: ReconciledEvent): void {
    if (this.#json) return this.#terminal.out(`${JSON.stringify(event)}\n`)
    const { type, id, endedAt, outcome, status, code } = event
    const why = outcome === 'failed' ? paint(this.#terminal, 'red', `failed ${[status, code].filter(each => each !== undefined).map(each => printable(String(each))).join(' ')}`) : outcome
    this.#terminal.out(`${this.#bar ? '\r\x1b[K' : ''}${new Date(endedAt * 1_000).toISOString()}  ${printable(type)}  ${printable(id, 256)}  ${why}\n`)
  }
}
