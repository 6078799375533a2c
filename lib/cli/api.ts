import type { OpenAI } from 'openai'
import { CommandError, EXIT, text, usageError } from './command.ts'
import type { Arguments, Terminal } from './command.ts'
import { printable } from './table.ts'

// Shared by the commands that call OpenAI's API through the official `openai` package.

export type SDK = typeof import('openai')

/** A client of the official package, and a function that explains its errors. */
export interface Api {
  readonly client: OpenAI
  /** Explains an error in one line. The API key is removed, since OpenAI's error message may quote it. */
  readonly explain: (error: unknown) => string
}

/** @param load imports the openai package, which may not be installed @throws CommandError */
export async function openApi (args: Arguments, terminal: Terminal, load: () => Promise<SDK>): Promise<Api> {
  const apiKey = readApiKey(terminal)
  const baseURL = readBaseURL(args, terminal)
  const sdk = await importSDK(load)
  // Off, because OPENAI_LOG could make the SDK log what it sends and receives, secrets included.
  const client = new sdk.OpenAI({ apiKey, baseURL, logLevel: 'off', timeout: 30_000 })
  const conceal = (shown: string): string => oneLine(shown.replaceAll(apiKey, '[API key]'))
  return { client, explain: error => conceal(explain(error, sdk, client.baseURL, conceal)) }
}

/** @throws CommandError */
function readApiKey ({ env }: Terminal): string {
  const apiKey = env['OPENAI_API_KEY']?.trim() ?? ''
  if (apiKey === '') throw new CommandError('no API key: set OPENAI_API_KEY to a key of the project', EXIT.usage)
  if (apiKey.startsWith('whsec_')) throw new CommandError('OPENAI_API_KEY holds a signing secret (whsec_…), expected an API key (sk-…)', EXIT.usage)
  // The key is checked here because the error of fetch() would quote it.
  if (!/^[\x21-\x7e]+$/.test(apiKey)) throw new CommandError('OPENAI_API_KEY holds white space or a character that no API key has', EXIT.usage)
  return apiKey
}

/**
 * Reads `--base-url`, else OPENAI_BASE_URL.
 *
 * @returns `null` when neither is set: the SDK then uses its default
 * @throws CommandError
 */
function readBaseURL (args: Arguments, { env }: Terminal): string | null {
  const given = text(args, 'base-url') ?? env['OPENAI_BASE_URL']?.trim() ?? ''
  if (given === '') return null
  const url = URL.canParse(given) ? new URL(given) : undefined
  if (url === undefined || !/^https?:$/.test(url.protocol)) throw usageError(`expected an http(s) URL as the base URL, got "${oneLine(given)}"`)
  // The URL is checked here because the error of fetch() would quote the password.
  if (url.username !== '' || url.password !== '') throw usageError('expected a base URL without a user name and password')
  return given
}

/** @throws CommandError when the package is missing or cannot be loaded */
async function importSDK (load: () => Promise<SDK>): Promise<SDK> {
  try {
    return await load()
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException
    if (code === 'ERR_MODULE_NOT_FOUND') throw new CommandError('this command needs the openai package: npm i openai@latest')
    throw new CommandError(`the openai package cannot be loaded: ${oneLine(String(error))}`)
  }
}

const ADVICE: Readonly<Record<number, string>> = {
  401: ' (the API key was refused: see OPENAI_API_KEY)',
  404: ' (is the id right, and the API key that of a project that has it and may use this API?)'
}

function explain (error: unknown, { APIConnectionError, APIError, APIUserAbortError }: SDK, baseURL: string, conceal: (shown: string) => string): string {
  if (error instanceof APIUserAbortError) return 'interrupted'
  if (error instanceof APIConnectionError) return `cannot reach ${baseURL}: ${rootCause(error)}`
  if (!(error instanceof APIError) || error.status === undefined) return `unexpected answer from ${baseURL}: ${(error as Error).message}`
  const { status, code, type } = error as { status: number, code?: string | null, type?: string | null }
  const name = code ?? type ?? ''
  // The message may be the HTML page of a proxy, so only its start is shown.
  const said = conceal(error.message.replace(/^\d+ /, '')).slice(0, 300)
  return `${baseURL} answered ${status}${name === '' ? '' : ` ${name}`}: ${said}${ADVICE[status] ?? ''}`
}

/** fetch() and the SDK each wrap the error that matters: ECONNREFUSED, ENOTFOUND, a certificate error, a timeout. */
function rootCause (error: Error): string {
  let root: NodeJS.ErrnoException = error
  while (root.cause instanceof Error) root = root.cause
  return root.code ?? root.message
}

/** Makes untrusted text safe to print on one line. */
export function oneLine (shown: string): string {
  return printable(shown.replaceAll(/\s+/g, ' ').trim(), Infinity)
}
