import type { KeyObject } from 'node:crypto'
import type { IncomingHttpHeaders } from 'node:http'

export interface SignedDelivery {
  /** The body, as the bytes that arrived. */
  readonly rawBody: Buffer
  /** The headers, with lower-case names as node:http gives them. */
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
 * @throws a coded error (`code` and a 4xx `statusCode`), which is the answer to the sender. Anything else that is thrown is answered
 * 401 `FST_OPENAI_WEBHOOK_INVALID_SIGNATURE`, and becomes the `cause` of that error.
 */
export interface Verifier {
  (delivery: SignedDelivery, keys: readonly KeyObject[]): Verified
  /**
   * Checks the headers alone, before the body is read. Throws coded errors as the verifier does.
   *
   * @returns the timestamp in Unix seconds
   */
  readonly checkHeaders?: (headers: IncomingHttpHeaders) => number
  /**
   * Converts the text of a secret into the bytes of the HMAC key.
   *
   * @default base64 after `whsec_`, or else the UTF-8 bytes, as in OpenAI's SDKs
   */
  readonly keyBytes?: (secret: string) => Uint8Array
}

/** What a scheme has read from the headers. */
export interface SignedHeaders {
  /** When the delivery was signed, in Unix seconds. */
  readonly timestamp: number
}

/**
 * How one of our verifiers works. The headers are read once, before the body, and what was read is judged with it. Both functions return coded
 * errors. Throwing them would make a forged delivery cost a third more, and a stale one a quarter more.
 */
export interface Scheme<Read extends SignedHeaders> {
  readonly readHeaders: (headers: IncomingHttpHeaders) => Read | Error
  readonly judge: (delivery: SignedDelivery, signed: Read, keys: readonly KeyObject[]) => Verified | Error
}

/** What is signed in addition to the body. */
export interface Named {
  readonly webhookId: string
  /** Unix seconds. */
  readonly timestamp: number
}

/** Signs deliveries for a verifier. The inspector uses it. */
export interface Signer {
  /** Returns the headers of a delivery, with lower-case names. */
  readonly sign: (rawBody: Buffer, named: Named, key: KeyObject) => Record<string, string>
  /** Whether the webhook-id is the event's own `id`, so that only another event makes a new delivery. */
  readonly namedByEvent: boolean
}

// Not properties of the verifier, because a verifier that wraps another one may copy its properties.
const schemes = new WeakMap<Verifier, Scheme<any> & Signer>()

/** Makes a verifier that throws the errors that the scheme returns. */
export function verifierOf<Read extends SignedHeaders> (scheme: Scheme<Read> & Signer, properties: Pick<Verifier, 'keyBytes'> = {}): Verifier {
  const { readHeaders, judge } = scheme
  const verifier = Object.assign(
    (delivery: SignedDelivery, keys: readonly KeyObject[]) => orThrow(judge(delivery, orThrow(readHeaders(delivery.headers)), keys)),
    { checkHeaders: (headers: IncomingHttpHeaders) => orThrow(readHeaders(headers)).timestamp, ...properties }
  )
  schemes.set(verifier, scheme)
  return verifier
}

/** What one of our verifiers was made from; `undefined` for a user's verifier. */
export function schemeOf (verifier: Verifier): (Scheme<any> & Signer) | undefined {
  return schemes.get(verifier)
}

function orThrow<T> (answer: T | Error): T {
  if (answer instanceof Error) throw answer
  return answer
}

/** A repeated header arrives as an array or joined by a comma. It does not count as missing, and the caller refuses it. */
export function isMissing (value: string | string[] | undefined): value is undefined | '' {
  return value === undefined || value === ''
}

const WHOLE_SECONDS = /^[0-9]+$/

/** Reads Unix seconds. Accepts only digits, because a laxer rule would let the signed text be split at another place (`1750861210.{"id"…`). */
export function secondsOf (value: string | string[]): number | undefined {
  return typeof value === 'string' && WHOLE_SECONDS.test(value) ? Number(value) : undefined
}
