import type { KeyObject } from 'node:crypto'
import type { IncomingHttpHeaders } from 'node:http'

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
   * Judges by the headers alone, before the body is read. Throws coded errors as the verifier does.
   *
   * @returns the timestamp in Unix seconds
   */
  readonly checkHeaders?: (headers: IncomingHttpHeaders) => number
  /**
   * The HMAC key bytes of a secret's text.
   *
   * @default `whsec_` + base64, else the UTF-8 bytes, as OpenAI's SDKs do
   */
  readonly keyBytes?: (secret: string) => Uint8Array
}

/** A verifier that returns its coded errors. To throw them would cost a third more for a forged delivery, a quarter for a stale one. */
export interface Judge {
  readonly judge: (delivery: SignedDelivery, keys: readonly KeyObject[]) => Verified | Error
  readonly judgeHeaders: (headers: IncomingHttpHeaders) => number | Error
}

/** What a delivery is signed over, beside its body. */
export interface Named {
  readonly webhookId: string
  /** Unix seconds. */
  readonly timestamp: number
}

/** Makes deliveries that a verifier takes, for the inspector. */
export interface Signer {
  /** The headers of a delivery, lower-case names. */
  readonly sign: (rawBody: Buffer, named: Named, key: KeyObject) => Record<string, string>
  /** Whether the webhook-id is the event's own `id`, so that only another event is a new delivery. */
  readonly namedByEvent: boolean
}

// Not a property of the verifier: whoever wraps one may copy its properties.
const judges = new WeakMap<Verifier, Judge>()
const signers = new WeakMap<Verifier, Signer>()

/** Makes a verifier that throws what the judge returns. */
export function verifierOf (judge: Judge, signer: Signer, properties: Pick<Verifier, 'keyBytes'> = {}): Verifier {
  const verifier = Object.assign(
    (delivery: SignedDelivery, keys: readonly KeyObject[]) => orThrow(judge.judge(delivery, keys)),
    { checkHeaders: (headers: IncomingHttpHeaders) => orThrow(judge.judgeHeaders(headers)), ...properties }
  )
  judges.set(verifier, judge)
  signers.set(verifier, signer)
  return verifier
}

/** The judge that a verifier of ours was made of. */
export function judgeOf (verifier: Verifier): Judge | undefined {
  return judges.get(verifier)
}

/** What signs for a verifier of ours; a user's cannot. */
export function signerOf (verifier: Verifier): Signer | undefined {
  return signers.get(verifier)
}

function orThrow<T> (answer: T | Error): T {
  if (answer instanceof Error) throw answer
  return answer
}

/** Doubled headers come as an array or joined by a comma, and are not missing: the caller refuses them. */
export function isMissing (value: string | string[] | undefined): value is undefined | '' {
  return value === undefined || value === ''
}

const WHOLE_SECONDS = /^[0-9]+$/

/** Unix seconds. Digits only: a laxer rule lets the signed text be split at another place (`1750861210.{"id"…`). */
export function secondsOf (value: string | string[]): number | undefined {
  return typeof value === 'string' && WHOLE_SECONDS.test(value) ? Number(value) : undefined
}
