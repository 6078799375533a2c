import { createSecretKey } from 'node:crypto'
import type { KeyObject } from 'node:crypto'
import { isUint8Array } from 'node:util/types'
import { InvalidSecret } from '../errors.ts'
import { within } from '../within.ts'

/** One signing secret, several during a rotation, or a function that fetches them. */
export type Secret = string | readonly string[] | (() => string | readonly string[] | Promise<string | readonly string[]>)

/** Minimum ms between two calls of a secret function after unmatched signatures. Keeps a flood of forgeries from reaching a secret manager. */
export const REFRESH_INTERVAL = 60_000

export interface SecretOptions {
  /** Called when a secret does not have the `whsec_` form. */
  warn: (message: string) => void
  /** Called when a secret function fails after boot. The keys known so far stay in use. */
  onTrouble: (error: unknown, of?: { readonly endpoint: string, readonly tenant: string }) => void
  /** ms that a call of a secret function may take while a delivery waits for it. */
  patience: number
}

export type KeyBytes = ((secret: string) => Uint8Array) | undefined

/** The keys that a delivery may be signed with. */
export interface Keys {
  readonly keys: readonly KeyObject[]
  /**
   * To be called when no signature matches, because there may be newer keys.
   *
   * @returns whether the secret was fetched again; `undefined` if no secret function was called
   */
  refresh (): Promise<boolean> | undefined
}

/** Key in a WeakMap that stands for the default way to convert a secret into key bytes. */
const WHSEC = {}

/** A source of secrets. There is one for each secret function, even if several endpoints use the function. */
export class SecretSource {
  readonly #secret: Secret
  readonly #keyrings = new WeakMap<object, Keyring>()
  /** The last answer of the secret function, or the secrets that were given without a function. */
  answer: { readonly secrets: string | readonly string[] } | undefined
  /** On the monotonic clock, so that a system clock that is set back does not stop refreshes until it has caught up. */
  #askedAt = -Infinity
  #asking: Promise<void> | undefined

  constructor (secret: Secret, readonly options: SecretOptions) {
    this.#secret = secret
    if (typeof secret !== 'function') this.answer = { secrets: secret }
  }

  /** The keys that verifiers with this `keyBytes` make from the secrets. @throws FST_OPENAI_WEBHOOK_INVALID_SECRET */
  keyring (keyBytes: KeyBytes): Keyring {
    let keyring = this.#keyrings.get(keyBytes ?? WHSEC)
    if (keyring === undefined) {
      keyring = new Keyring(this, keyBytes)
      // An unusable secret throws here. The secret of a function throws in load().
      if (typeof this.#secret !== 'function') keyring.adopt()
      this.#keyrings.set(keyBytes ?? WHSEC, keyring)
    }
    return keyring
  }

  /** Calls a secret function for the first time, unless a refresh has called it or is calling it. @throws FST_OPENAI_WEBHOOK_INVALID_SECRET */
  async load (): Promise<void> {
    const secret = this.#secret
    if (typeof secret !== 'function' || this.answer !== undefined) return
    try {
      await (this.#asking ?? this.#ask(async () => await secret()))
    } catch (cause) {
      throw new InvalidSecret('the `secret` function failed at boot: expected it to return the signing secret', { cause })
    }
  }

  /**
   * Calls the secret function again, at most once a minute. Callers get the same answer while a call is running.
   *
   * @returns whether the function answered; `undefined` if there is no function, or the last call was less than a minute ago
   */
  refresh (): Promise<boolean> | undefined {
    const secret = this.#secret
    if (typeof secret !== 'function') return undefined
    if (this.#asking === undefined) {
      if (performance.now() - this.#askedAt < REFRESH_INTERVAL) return undefined
      this.#ask(async () => await secretInTime('secret', secret, this.options.patience)).catch(error => this.options.onTrouble(error))
    }
    return this.#asking!.then(() => true, () => false)
  }

  #ask (call: () => Promise<string | readonly string[]>): Promise<void> {
    this.#askedAt = performance.now()
    const asking = call().then(secrets => { this.answer = { secrets } }).finally(() => { this.#asking = undefined })
    this.#asking = asking
    return asking
  }
}

/**
 * Calls a secret function. Rejects with the error of the function, or with FST_OPENAI_WEBHOOK_INVALID_SECRET after `patience` ms.
 *
 * @param option name of the option that the function was given as
 */
export async function secretInTime<T> (option: string, secret: () => T | Promise<T>, patience: number): Promise<T> {
  return await within((async () => await secret())(), patience, () => { throw new InvalidSecret(`the \`${option}\` function took more than ${patience} ms`) })
}

/** The keys that a verifier uses. They are made at boot, and again when their source has a new answer. */
export class Keyring implements Keys {
  readonly #source: SecretSource
  #keys: readonly KeyObject[] = []
  #madeOf: SecretSource['answer']

  constructor (source: SecretSource, readonly keyBytes: KeyBytes) {
    this.#source = source
  }

  get keys (): readonly KeyObject[] {
    if (this.#madeOf !== this.#source.answer) {
      try {
        this.adopt()
      } catch (error) {
        this.#source.options.onTrouble(error)
      }
    }
    return this.#keys
  }

  /** Calls a secret function for the first time. @throws FST_OPENAI_WEBHOOK_INVALID_SECRET */
  async load (): Promise<void> {
    await this.#source.load()
    this.adopt()
  }

  refresh (): Promise<boolean> | undefined {
    return this.#source.refresh()
  }

  /** Makes keys from the source's last answer. If the answer is unusable, the keys do not change. @throws FST_OPENAI_WEBHOOK_INVALID_SECRET */
  adopt (): void {
    this.#madeOf = this.#source.answer
    this.#keys = keysOf(this.#madeOf?.secrets, this.keyBytes, this.#source.options.warn)
  }
}

/** Makes keys from the text of one secret or several. @throws FST_OPENAI_WEBHOOK_INVALID_SECRET */
export function keysOf (secrets: unknown, bytesOf: KeyBytes, warn: (message: string) => void): KeyObject[] {
  const list: unknown = typeof secrets === 'string' ? [secrets] : secrets
  if (!Array.isArray(list) || list.length === 0) {
    throw new InvalidSecret(`expected a signing secret or a non-empty array of them, got ${inWords(secrets)}`)
  }
  return list.map((secret: unknown) => createSecretKey(bytesOf === undefined ? keyBytes(secret, warn) : bytesBy(bytesOf, secret)))
}

/** What a verifier makes of a secret; a user's may make anything. @throws FST_OPENAI_WEBHOOK_INVALID_SECRET */
function bytesBy (bytesOf: NonNullable<KeyBytes>, secret: unknown): Uint8Array {
  assertSecret(secret)
  let bytes: unknown
  try {
    bytes = bytesOf(secret)
  } catch (cause) {
    throw new InvalidSecret('the verifier\'s keyBytes failed: expected it to return the bytes of the key', { cause })
  }
  if (!isUint8Array(bytes)) throw new InvalidSecret(`expected the verifier's keyBytes to return the bytes of the key, got ${inWords(bytes)}`)
  // Anybody can sign with an empty key. A lenient decoder makes one of a secret that it cannot read.
  if (bytes.length === 0) throw new InvalidSecret('expected the verifier\'s keyBytes to return the bytes of the key, got none')
  return bytes
}

function inWords (value: unknown): string {
  if (Array.isArray(value)) return value.length === 0 ? 'an empty array' : 'an array'
  return value === null || value === undefined ? String(value) : `a value of type ${typeof value}`
}

const PREFIX = 'whsec_'

function assertSecret (secret: unknown): asserts secret is string {
  if (typeof secret !== 'string') {
    throw new InvalidSecret(`expected a signing secret (a string), got ${inWords(secret)}`)
  }
  if (secret === '') {
    throw new InvalidSecret('expected a signing secret, got an empty string: set OPENAI_WEBHOOK_SECRET or the `secret` option to the whsec_… value that was shown when the endpoint was created (the `secret` option of a route, and what `tenant.secret` returns, may not be empty either)')
  }
  if (secret === PREFIX) throw new InvalidSecret('expected base64 after "whsec_" in the signing secret, got nothing: copy it again whole')
  if (secret.startsWith('sk-')) {
    throw new InvalidSecret('expected the endpoint\'s signing secret (whsec_…), got an API key (sk-…): copy the secret shown when the webhook endpoint was created')
  }
  if (/^whe_/i.test(secret)) {
    throw new InvalidSecret('expected the endpoint\'s signing secret (whsec_…), got an endpoint\'s id (whe_…): copy the secret that was shown when the webhook endpoint was created')
  }
  if (/^whsec_/i.test(secret) && !secret.startsWith(PREFIX)) {
    throw new InvalidSecret('expected the signing secret to begin with "whsec_" in lower case: copy it again as it was shown')
  }
  if (/^[\s"'`]|[\s"'`]$/.test(secret)) {
    throw new InvalidSecret('the signing secret begins or ends with white space or a quote: remove it where the secret is set')
  }
}

/**
 * The HMAC key bytes of a secret, by the default rule. As in OpenAI's SDKs, the text after `whsec_` is base64, and any other text stands for its
 * UTF-8 bytes.
 *
 * @throws FST_OPENAI_WEBHOOK_INVALID_SECRET
 */
export function keyBytes (secret: unknown, warn: (message: string) => void): Uint8Array {
  assertSecret(secret)
  if (!secret.startsWith(PREFIX)) {
    warn('a signing secret does not begin with "whsec_": its UTF-8 bytes are used as the key, as OpenAI\'s SDKs do; if it is OpenAI\'s, copy it again whole')
    return Buffer.from(secret)
  }
  const text = secret.slice(PREFIX.length)
  const bytes = Buffer.from(text, 'base64')
  const canonical = bytes.toString('base64')
  // A lenient decoder accepts truncated base64 with bits left over, and the resulting key would match no signature. The padding may be missing.
  if (text !== canonical && text !== canonical.replace(/=+$/, '')) {
    throw new InvalidSecret('expected base64 after "whsec_" in the signing secret, got other characters, a cut or nothing: copy it again whole')
  }
  return bytes
}
