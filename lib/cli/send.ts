import { setMaxListeners } from 'node:events'
import * as http from 'node:http'
import type { IncomingHttpHeaders, IncomingMessage } from 'node:http'
import * as https from 'node:https'
import { CommandError, count, text, usageError } from './command.ts'
import type { Arguments, Terminal } from './command.ts'
import { readSecret } from './secret.ts'
import { LONGEST_TIMER } from '../checks.ts'
import { meaningOf } from '../resources/post.ts'
import type { Posted } from '../resources/post.ts'
import { keyBytes } from '../verifiers/keyring.ts'

/** The options of a command that delivers. */
export const sendOptions = {
  url: { type: 'string' },
  timeout: { type: 'string' },
  json: { type: 'boolean' }
} as const

export type HeaderLines = ReadonlyArray<readonly [name: string, value: string]>

export interface Answer extends Posted {
  readonly ms: number
  readonly headers: IncomingHttpHeaders
  /** `undefined` when it is longer than ANSWER_LIMIT. */
  readonly body: Buffer | undefined
}

/** The most bytes of an answer that are read, far more than a receiver sends. */
export const ANSWER_LIMIT = 1_048_576

/** Headers of one connection and not of the delivery. node:http adds its own. */
const hopByHop = new Set(['host', 'connection', 'keep-alive', 'proxy-connection', 'te', 'trailer', 'transfer-encoding', 'upgrade', 'content-length', 'expect'])

export function endToEnd<Line extends readonly [name: string, value: unknown]> (lines: readonly Line[]): Line[] {
  return lines.filter(([name]) => !hopByHop.has(name.toLowerCase()))
}

/**
 * Posts deliveries to one URL and keeps the names and the order of their headers. A redirect is not followed, as OpenAI does not follow one
 * either.
 */
export class Sender {
  readonly #url: URL
  readonly #timeout: number
  readonly #signal: AbortSignal
  readonly #request
  readonly #agent

  constructor (url: URL, timeout: number, signal: AbortSignal) {
    const { Agent, request } = url.protocol === 'https:' ? https : http
    this.#url = url
    this.#timeout = timeout
    this.#signal = signal
    this.#request = request
    this.#agent = new Agent({ keepAlive: true })
    setMaxListeners(0, signal) // one listener for each delivery in flight
  }

  /**
   * Sends one delivery. A receiver that does not answer in time or closes the connection gives an answer without a status.
   *
   * @throws CommandError when the receiver cannot be reached
   */
  async send (headers: HeaderLines, body: Buffer): Promise<Answer> {
    const started = performance.now()
    let timedOut = false
    let answered = false
    const request = this.#open(headers, body.length)
    // An error after the start of the answer is also thrown where the answer is read; without a listener it would end the process.
    request.on('error', () => {})
    const timer = setTimeout(() => {
      timedOut = true
      request.destroy()
    }, this.#timeout)
    request.once('close', () => clearTimeout(timer))
    try {
      const response = await responseTo(request, body)
      answered = true
      const { statusCode: status, headers } = response
      const answer = status === SWITCHING ? Buffer.alloc(0) : await readAnswer(response)
      return { status, ...meaningOf(answer?.toString() ?? ''), ms: performance.now() - started, headers, body: answer }
    } catch (error) {
      const code = timedOut ? 'TIMEOUT' : String((error as NodeJS.ErrnoException).code)
      // The receiver had closed a connection that was kept alive.
      if (code === 'ECONNRESET' && request.reusedSocket && !answered) return await this.send(headers, body)
      if (!/^(?:TIMEOUT|ECONNRESET|EPIPE|HPE_\w+)$/.test(code)) throw this.#unreachable(error as Error, code)
      return { status: undefined, code, duplicate: false, ms: performance.now() - started, headers: {}, body: Buffer.alloc(0) }
    }
  }

  /** Closes the idle connections and those in use. */
  close (): void {
    this.#agent.destroy()
  }

  #open (headers: HeaderLines, length: number): http.ClientRequest {
    const lines = [['Host', this.#url.host], ...endToEnd(headers), ['Content-Length', String(length)]]
    try {
      return this.#request(this.#url, { method: 'POST', agent: this.#agent, signal: this.#signal, headers: lines.flat() })
    } catch (error) {
      // A header has a name or value that HTTP does not allow.
      throw this.#unreachable(error as Error, '')
    }
  }

  #unreachable ({ message }: Error, code: string): CommandError {
    if (code === 'ABORT_ERR') return new CommandError('interrupted')
    return new CommandError(`cannot deliver to ${this.#url.href}: ${explanations[code] ?? message.split('\n')[0]!}`)
  }
}

const explanations: Readonly<Record<string, string>> = {
  ECONNREFUSED: 'the connection was refused; is the receiver running?',
  ENOTFOUND: 'there is no such host',
  EAI_AGAIN: 'its name cannot be resolved now',
  EPROTO: 'it does not speak https',
  ERR_SSL_WRONG_VERSION_NUMBER: 'it does not speak https'
}

/** A receiver that answers with this status has given up HTTP. Node emits neither 'response' nor 'error' then. */
const SWITCHING = 101

async function responseTo (request: http.ClientRequest, body: Buffer): Promise<IncomingMessage> {
  return await new Promise((resolve, reject) => {
    request.once('response', resolve).once('error', reject)
    request.once('upgrade', (response, socket) => {
      socket.destroy()
      resolve(response)
    })
    request.end(body)
  })
}

/** Returns `undefined` for a body that is longer than ANSWER_LIMIT. */
async function readAnswer (response: IncomingMessage): Promise<Buffer | undefined> {
  const chunks: Buffer[] = []
  let length = 0
  for await (const chunk of response as AsyncIterable<Buffer>) {
    chunks.push(chunk)
    length += chunk.length
    if (length > ANSWER_LIMIT) return undefined // leaving the loop closes the connection
  }
  return Buffer.concat(chunks)
}

/** The URL that an option holds, or `undefined` when the option was not given. @throws CommandError with exit code 2 */
export function url (args: Arguments, name: string): URL | undefined {
  const given = text(args, name)
  if (given === undefined) return undefined
  const parsed = URL.canParse(given) ? new URL(given) : undefined
  if (parsed === undefined || !/^https?:$/.test(parsed.protocol)) {
    throw usageError(`--${name}: expected an address such as http://127.0.0.1:3000/webhooks/openai, got "${given}"`)
  }
  if (parsed.username + parsed.password !== '') throw usageError(`--${name}: expected an address without user name and password`)
  return parsed
}

/** @throws CommandError with exit code 2 */
export function sender (args: Arguments, { signal }: Terminal, fallback?: string): Sender {
  const target = url(args, 'url') ?? (fallback === undefined ? undefined : new URL(fallback))
  if (target === undefined) throw usageError('missing --url, the address to deliver to')
  return new Sender(target, timeout(args), signal)
}

/** The value of `--timeout` in ms. @throws CommandError with exit code 2 */
export function timeout (args: Arguments): number {
  const ms = count(args, 'timeout', 10_000)
  if (ms > LONGEST_TIMER) throw usageError(`--timeout: expected at most ${LONGEST_TIMER} ms, got ${ms}`)
  return ms
}

/** Reads the secret to sign with. @throws CommandError */
export async function readSigningSecret (args: Arguments, terminal: Terminal): Promise<string> {
  const secret = await readSecret(args, terminal)
  checkSecret(secret, terminal)
  return secret
}

/** Refuses a secret that the plugin would refuse. @throws CommandError */
export function checkSecret (secret: string, { err }: Terminal): void {
  try {
    keyBytes(secret, message => { err(`openai-webhook: ${message}\n`) })
  } catch (error) {
    throw new CommandError((error as Error).message)
  }
}
