import { createHash, createHmac, timingSafeEqual } from 'node:crypto'
import type { Hmac, KeyObject } from 'node:crypto'
import type { IncomingHttpHeaders } from 'node:http'
import { assertNone, isId } from '../checks.ts'
import { InvalidSignature, InvalidTimestamp, MissingHeader } from '../errors.ts'
import { isMissing, secondsOf, verifierOf } from './verifier.ts'
import type { Named, SignedDelivery, SignedHeaders, Verified, Verifier } from './verifier.ts'

const SIGNATURE = 'x-openai-signature'
const TIMESTAMP = 'x-openai-timestamp'

/**
 * The scheme of a community guide that many handlers were copied from. OpenAI itself signs with `standardWebhooks()`.
 *
 * `X-OpenAI-Signature` is the hex HMAC-SHA256 of `timestamp.body`. The key is the UTF-8 bytes of the secret as it is written, including `whsec_`.
 * `X-OpenAI-Timestamp` is in Unix seconds. The guide has no delivery id, so the webhook-id is the event's own `id` or, if it has none, the
 * SHA-256 of the signed text, which differs for a retry with a new timestamp.
 *
 * Coded errors: MISSING_HEADER, INVALID_TIMESTAMP, INVALID_SIGNATURE (all 401).
 */
export function xOpenAISignature (): Verifier
export function xOpenAISignature (...given: unknown[]): Verifier {
  assertNone('xOpenAISignature', given, 'secret and tolerance are options of the plugin')
  return verifier
}

const verifier = verifierOf({ readHeaders, judge, sign, namedByEvent: true }, { keyBytes })

function keyBytes (secret: string): Buffer {
  return Buffer.from(secret)
}

interface Read extends SignedHeaders {
  /** What is signed in front of the body. */
  readonly signedHead: string
  readonly signature: string | string[]
}

function readHeaders ({ [SIGNATURE]: signature, [TIMESTAMP]: seconds }: IncomingHttpHeaders): Read | Error {
  if (isMissing(signature)) return new MissingHeader(SIGNATURE)
  if (isMissing(seconds)) return new MissingHeader(TIMESTAMP)
  const timestamp = secondsOf(seconds)
  return timestamp === undefined ? new InvalidTimestamp(TIMESTAMP) : { timestamp, signedHead: `${seconds as string}.`, signature }
}

const HEX_SHA256 = /^[0-9a-f]{64}$/i

function judge ({ rawBody }: SignedDelivery, { timestamp, signedHead, signature }: Read, keys: readonly KeyObject[]): Verified | Error {
  if (typeof signature !== 'string' || !HEX_SHA256.test(signature)) return new InvalidSignature()
  const candidate = Buffer.from(signature, 'hex')
  const keyIndex = keys.findIndex(key => timingSafeEqual(mac(signedHead, rawBody, key).digest(), candidate))
  return keyIndex === -1 ? new InvalidSignature() : { webhookId: eventId(rawBody) ?? digest(signedHead, rawBody), timestamp, keyIndex }
}

const mac = (signedHead: string, rawBody: Buffer, key: KeyObject): Hmac => createHmac('sha256', key).update(signedHead).update(rawBody)

function sign (rawBody: Buffer, { timestamp }: Named, key: KeyObject): Record<string, string> {
  return {
    [TIMESTAMP]: String(timestamp),
    [SIGNATURE]: mac(`${timestamp}.`, rawBody, key).digest('hex')
  }
}

function eventId (rawBody: Buffer): string | undefined {
  try {
    const { id } = JSON.parse(rawBody.toString()) as { id?: unknown }
    return isId(id) ? id : undefined
  } catch {
    return undefined // not JSON, or `null`, which the validate step refuses
  }
}

function digest (signedHead: string, rawBody: Buffer): string {
  return createHash('sha256').update(signedHead).update(rawBody).digest('hex')
}
