import { stat } from 'node:fs/promises'
import { CommandError, count, EXIT, text, usageError } from './command.ts'
import type { Arguments, Command } from './command.ts'
import { parseSaved, readSaved } from './saved.ts'
import type { Saved } from './saved.ts'
import { readBytes, readSecret, secretHelp, secretOptions } from './secret.ts'
import { paint } from './table.ts'
import { diagnose as diagnoseDelivery } from '../diagnose.ts'
import type { Diagnosis } from '../diagnose.ts'
import { LEAST_MS } from '../diagnose/headers.ts'

const help = `Usage: openai-webhook diagnose FILE [options]
       openai-webhook diagnose --headers FILE --body FILE [options]

Says why a delivery does not verify, and what to change. FILE is one that \`listen --save\` wrote: "Name: value" lines,
an empty line, the body's bytes. A cause is named only where it is proved. Neither secret nor payload is printed.

  --headers FILE       the headers alone, a "Name: value" line each
  --body FILE          the body's bytes alone, as they arrived
  --now SECONDS        when the delivery arrived, in Unix seconds. By default the time in the name of a file that
                       \`listen --save\` wrote, else the time the file was last written
  --tolerance SECONDS  how far the timestamp may be from then (300)
  --json               one JSON document: verified, finding { cause, message, fix }, ruledOut, likely, judgedAt
${secretHelp}
                       A file may hold several, one whsec_… a line, as during a rotation

Exit code 0 when the delivery verifies, 1 when it does not or cannot be read, 2 for wrong usage.

Examples:
  openai-webhook diagnose deliveries/20261121T093000.000Z-wh_685c059ae39c8190.http
  openai-webhook diagnose --headers headers.txt --body body.json --secret-file secret.txt --json
`

export const diagnose: Command = {
  summary: 'says why a delivery does not verify, and what to change',
  help,
  options: {
    ...secretOptions,
    headers: { type: 'string' },
    body: { type: 'string' },
    now: { type: 'string' },
    tolerance: { type: 'string' },
    json: { type: 'boolean' }
  },
  async run (args, terminal) {
    const source = sourceOf(args)
    const tolerance = count(args, 'tolerance', 300)
    const given = givenTime(args)
    const secret = several(await readSecret(args, terminal))
    const { headers, body } = await source.read()
    const time = given ?? await arrivalOf(source.file)
    const diagnosis = diagnoseDelivery({ headers, rawBody: body, secret, now: time.ms, tolerance })

    const judgedAt = new Date(time.ms).toISOString()
    if (args.values['json'] === true) terminal.out(`${JSON.stringify({ file: source.file, ...diagnosis, judgedAt }, null, 2)}\n`)
    else terminal.out(tell(diagnosis, `Judged at ${judgedAt}, ${time.from}.`, text => paint(terminal, diagnosis.verified ? 'green' : 'red', text)))
    return diagnosis.verified ? EXIT.ok : EXIT.failed
  }
}

interface Source {
  /** The file whose name or modification time says when the delivery arrived. */
  readonly file: string
  readonly read: () => Promise<Saved>
}

/** @throws CommandError with exit code 2 */
function sourceOf (args: Arguments): Source {
  const { positionals: [file, surplus] } = args
  const headersFile = text(args, 'headers')
  const bodyFile = text(args, 'body')
  if (surplus !== undefined) throw usageError(`expected one FILE, got "${surplus}" too`)
  if (file !== undefined) {
    if (headersFile !== undefined || bodyFile !== undefined) throw usageError('expected FILE, or --headers FILE and --body FILE, got both')
    return { file, read: () => readSaved(file) }
  }
  if (headersFile === undefined || bodyFile === undefined) throw usageError('missing FILE, or --headers FILE and --body FILE')
  return { file: headersFile, read: () => readApart(headersFile, bodyFile) }
}

/** @throws CommandError with exit code 2 */
function givenTime (args: Arguments): { ms: number, from: string } | undefined {
  const seconds = count(args, 'now', undefined, 0)
  if (seconds === undefined) return undefined
  if (seconds >= LEAST_MS) throw usageError(`--now: expected seconds since the Unix epoch, got ${seconds}, which would be milliseconds`)
  return { ms: seconds * 1000, from: 'as --now says' }
}

async function readApart (headersFile: string, bodyFile: string): Promise<Saved> {
  const [headers, body] = await Promise.all([readBytes(headersFile), readBytes(bodyFile)])
  try {
    // parseSaved() needs an empty line after the headers, which a file of headers alone may not have.
    return { headers: parseSaved(Buffer.concat([headers, Buffer.from('\n\n')])).headers, body }
  } catch (error) {
    throw new CommandError(`${headersFile}: ${(error as Error).message}`)
  }
}

/** During a rotation the text holds several secrets, one per line. It is split only when every line is a secret. */
function several (secret: string): string | string[] {
  const lines = secret.split(/\r?\n/)
  return lines.every(line => line.startsWith('whsec_')) ? lines : secret
}

const SAVED_NAME = /(?:^|[/\\])(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(\d\d\.\d{3}Z)-[^/\\]*$/

async function arrivalOf (file: string): Promise<{ ms: number, from: string }> {
  const [, year, month, day, hours, minutes, seconds] = SAVED_NAME.exec(file) ?? []
  const named = Date.parse(`${year}-${month}-${day}T${hours}:${minutes}:${seconds}`)
  if (!Number.isNaN(named)) return { ms: named, from: 'the time in the file\'s name; --now judges at another' }
  const { mtimeMs } = await stat(file)
  return { ms: mtimeMs, from: 'when the file was last written; --now judges at another' }
}

function tell ({ verified, keyIndex, finding, ruledOut, likely }: Diagnosis, judged: string, paint: (text: string) => string): string {
  if (verified) return `${paint('verified')}: secret ${keyIndex! + 1} signed it, and the timestamp is within the tolerance\n${judged}\n`
  if (finding !== undefined) {
    const { cause, message, fix, also = [] } = finding
    return `${paint('not verified')}: ${[cause, ...also].join(' + ')}\n\n  ${sentence(message)}\n\n  What to change: ${sentence(fix)}\n\n${judged}\n`
  }
  return `${paint('not verified')}: no known cause fits\n\n  ${sentence(likely!)}\n\n  Ruled out:\n${ruledOut.map(each => `  - ${each}\n`).join('')}\n${judged}\n`
}

function sentence (text: string): string {
  return `${text[0]!.toUpperCase()}${text.slice(1)}.`
}
