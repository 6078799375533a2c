import type { KeyObject } from 'node:crypto'
import type { IncomingHttpHeaders } from 'node:http'
import { InvalidTimestamp, MissingHeader } from '../errors.ts'

export interface SignedDelivery {
  /** The bytes that arrived. */
  readonly rawBody: Buffer
  /** Lower-case names, as node:http gives them. */
  readonly headers: IncomingHttpHeaders
}

export interface Verified {
  /** The idempotency key: the same for every retry of a delivery. */
  readonly webhookId: string
  /** When the delivery was signed, in Unix seconds. The plugin checks it against `tolerance`. */
  readonly timestamp: number
  /** Index of the secret that matched, in the order of the `secret` option. */
  readonly keyIndex?: number
}

/**
 * Decides whether a delivery was signed with one of the keys.
 *
 * @throws a coded error (`code` and a 4xx `statusCode`), which is what the sender is answered; anything else that
 * is thrown is answered 401 `FST_OPENAI_WEBHOOK_INVALID_SIGNATURE` and kept as its `cause`.
 */
export interface Verifier {
  (delivery: SignedDelivery, keys: readonly KeyObject[]): Verified
  /**
   * What the headers alone condemn, checked before the body is read.
   * Returns the timestamp in Unix seconds, and throws coded errors as the verifier does.
   */
  readonly checkHeaders?: (headers: IncomingHttpHeaders) => number
  /**
   * The HMAC key bytes of a secret's text.
   *
   * @default `whsec_` + base64, else the UTF-8 bytes, as OpenAI's SDKs do
   */
  readonly keyBytes?: (secret: string) => Uint8Array
}

/** The header's one value. Doubled headers come as an array or joined by a comma; both are for the caller to refuse. */
export function requireHeader (headers: IncomingHttpHeaders, name: string): string | string[] {
  const value = headers[name]
  if (value === undefined || value === '') throw new MissingHeader(name)
  return value
}

const WHOLE_SECONDS = /^[0-9]+$/

/** The text that was last found valid: deliveries of one second share it. */
let validText: string | undefined
let validSeconds = 0

/** Unix seconds. Digits only: a laxer rule lets the signed text be split at another place (`1750861210.{"id"…`). */
export function parseTimestamp (value: string | string[], name: string): number {
  if (value === validText) return validSeconds
  if (typeof value !== 'string' || !WHOLE_SECONDS.test(value)) throw new InvalidTimestamp(name)
  validText = value
  validSeconds = Number(value)
  return validSeconds
}
