import { parseArgs } from 'node:util'
import type { ParseArgsConfig } from 'node:util'
import { nearest } from '../nearest.ts'

/** The input and output of a command. Tests pass their own. */
export interface Terminal {
  out: (text: string) => void
  err: (text: string) => void
  /** Whether `out` is a terminal. Colour and progress bars are printed only to a terminal. */
  readonly isTTY: boolean
  readonly env: Readonly<Record<string, string | undefined>>
  /** Aborts on SIGINT (Ctrl-C) and on SIGTERM. */
  readonly signal: AbortSignal
}

type Options = NonNullable<ParseArgsConfig['options']>

export interface Command {
  /** One line, shown in the list of commands. */
  readonly summary: string
  readonly help: string
  readonly options: Options
  /** @returns the exit code */
  readonly run: (args: Arguments, terminal: Terminal) => Promise<number>
}

export interface Arguments {
  readonly positionals: string[]
  readonly values: Readonly<Record<string, string | boolean | Array<string | boolean> | undefined>>
}

export const EXIT = { ok: 0, failed: 1, usage: 2 } as const

/** An error that is printed as one line on stderr, without a stack. The process then exits with `exitCode`. */
export class CommandError extends Error {
  constructor (message: string, readonly exitCode: number = EXIT.failed) {
    super(message)
  }
}

/** An error in the command line: exit code 2. */
export function usageError (message: string): CommandError {
  return new CommandError(`${message} (see --help)`, EXIT.usage)
}

/** @throws CommandError with exit code 2 */
export function parse (argv: readonly string[], options: Options): Arguments {
  try {
    const { positionals, values } = parseArgs({ args: [...argv], options, allowPositionals: true, strict: true })
    return { positionals, values: values as Arguments['values'] }
  } catch (error) {
    const [message] = (error as Error).message.replace(/\. To specify a positional.*$/s, '').split('\n')
    const unknown = /^Unknown option '--(.+)'$/.exec(message!)?.[1]
    throw usageError(message! + (unknown === undefined ? '' : nearest(unknown, Object.keys(options), '--')))
  }
}

/** The value of a string option, or `undefined` when the option was not given. */
export function text ({ values }: Arguments, name: string): string | undefined {
  const value = values[name]
  return typeof value === 'string' ? value : undefined
}

/** The value of an option that takes a whole number of at least `min`. @throws CommandError with exit code 2 */
export function count<Fallback extends number | undefined> (args: Arguments, name: string, fallback: Fallback, min = 1): number | Fallback {
  const given = text(args, name)
  if (given === undefined) return fallback
  const value = /^\d+$/.test(given) ? Number(given) : NaN
  if (!Number.isSafeInteger(value) || value < min) throw usageError(`--${name}: expected a whole number, ${min} or more, got "${given}"`)
  return value
}
