import { createSecretKey } from 'node:crypto'
import type { KeyObject } from 'node:crypto'
import { InvalidSecret } from './errors.ts'

/** One signing secret, several (a rotation), or a function that fetches them. */
export type Secret = string | readonly string[] | (() => string | readonly string[] | Promise<string | readonly string[]>)

/** A secret function is asked again at most this often, so that a flood of forgeries does not reach a secret manager. */
const REFRESH_INTERVAL = 60_000

export interface KeyringOptions {
  keyBytes?: ((secret: string) => Uint8Array) | undefined
  /** Told once, at boot, when a secret is not of the `whsec_` form. */
  warn: (message: string) => void
  /** Told when a secret function fails after boot; the keys known so far stay in use. */
  onTrouble: (error: unknown) => void
  /** ms a refresh may hold up a delivery. */
  patience: number
}

/** The verification keys of one endpoint: parsed at boot, asked for again when no key matches. */
export class Keyring {
  keys: readonly KeyObject[] = []
  #source: Secret
  #options: KeyringOptions
  #loadedAt = 0
  #refreshing: Promise<boolean> | undefined

  constructor (source: Secret, options: KeyringOptions) {
    this.#source = source
    this.#options = options
    if (typeof source !== 'function') this.#adopt(source)
  }

  /** Calls a secret function for the first time. @throws FST_OPENAI_WEBHOOK_INVALID_SECRET */
  async load (): Promise<void> {
    if (typeof this.#source !== 'function') return
    let secrets
    try {
      secrets = await this.#source()
    } catch (cause) {
      throw new InvalidSecret('the `secret` function failed at boot: expected it to return the signing secret', { cause })
    }
    this.#adopt(secrets)
    this.#loadedAt = Date.now()
  }

  /**
   * Asks the secret function again, at most once a minute, joined by whoever comes meanwhile.
   * Resolves to whether the keys were replaced; `undefined` when there is nothing to ask.
   */
  refresh (): Promise<boolean> | undefined {
    if (typeof this.#source !== 'function') return undefined
    if (this.#refreshing !== undefined) return this.#refreshing
    // A clock set back must not silence refreshes until it has caught up.
    if (Math.abs(Date.now() - this.#loadedAt) < REFRESH_INTERVAL) return undefined
    this.#loadedAt = Date.now()
    this.#refreshing = this.#ask(this.#source).finally(() => { this.#refreshing = undefined })
    return this.#refreshing
  }

  async #ask (source: Extract<Secret, Function>): Promise<boolean> {
    let timer: NodeJS.Timeout | undefined
    const tooLate = new Promise<never>((_resolve, reject) => {
      timer = setTimeout(() => reject(new InvalidSecret(`the \`secret\` function took more than ${this.#options.patience} ms`)), this.#options.patience)
    })
    let changed = true
    try {
      this.#adopt(await Promise.race([source(), tooLate]))
    } catch (error) {
      changed = false
      this.#options.onTrouble(error)
    }
    clearTimeout(timer)
    return changed
  }

  #adopt (secrets: string | readonly string[]): void {
    const list = typeof secrets === 'string' ? [secrets] : secrets
    if (!Array.isArray(list) || list.length === 0) {
      throw new InvalidSecret(`expected a signing secret or a non-empty array of them, got ${describe(secrets)}`)
    }
    this.keys = list.map(secret => createSecretKey(this.#bytes(secret)))
  }

  #bytes (secret: unknown): Uint8Array {
    assertSecret(secret)
    return this.#options.keyBytes?.(secret) ?? secretBytes(secret, this.#options.warn)
  }
}

function describe (value: unknown): string {
  if (Array.isArray(value)) return value.length === 0 ? 'an empty array' : 'an array'
  return value === null || value === undefined ? String(value) : `a value of type ${typeof value}`
}

const PREFIX = 'whsec_'
const BASE64 = /^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}(?:==)?|[A-Za-z0-9+/]{3}=?)?$/

function assertSecret (secret: unknown): asserts secret is string {
  if (typeof secret !== 'string') {
    throw new InvalidSecret(`expected a signing secret (a string), got ${describe(secret)}`)
  }
  if (secret === '') {
    throw new InvalidSecret('expected a signing secret, got an empty string: set OPENAI_WEBHOOK_SECRET or the `secret` option to the whsec_… value shown when the endpoint was created')
  }
  if (secret.startsWith('sk-')) {
    throw new InvalidSecret('expected the endpoint\'s signing secret (whsec_…), got an API key (sk-…): copy the secret shown when the webhook endpoint was created')
  }
  if (/^[\s"'`]|[\s"'`]$/.test(secret)) {
    throw new InvalidSecret('the signing secret begins or ends with white space or a quote: remove it where the secret is set')
  }
}

/** @throws FST_OPENAI_WEBHOOK_INVALID_SECRET */
export function keyBytes (secret: unknown, warn: (message: string) => void): Uint8Array {
  assertSecret(secret)
  return secretBytes(secret, warn)
}

/** OpenAI's SDKs take what follows `whsec_` as base64 and any other text as its UTF-8 bytes. */
function secretBytes (secret: string, warn: (message: string) => void): Uint8Array {
  if (!secret.startsWith(PREFIX)) {
    warn('a signing secret does not begin with "whsec_": its UTF-8 bytes are used as the key, as OpenAI\'s SDKs do')
    return Buffer.from(secret)
  }
  const text = secret.slice(PREFIX.length)
  const bytes = Buffer.from(text, 'base64')
  // A cut that leaves bits over is base64 to a lenient decoder, and matches nothing.
  if (text === '' || !BASE64.test(text) || bytes.toString('base64').replace(/=+$/, '') !== text.replace(/=+$/, '')) {
    throw new InvalidSecret('expected base64 after "whsec_" in the signing secret, got other characters, a cut or nothing: copy it again whole')
  }
  return bytes
}
