import { createHmac, timingSafeEqual } from 'node:crypto'
import type { KeyObject } from 'node:crypto'
import type { IncomingHttpHeaders } from 'node:http'
import { assertNone } from '../checks.ts'
import { InvalidId, InvalidSignature, InvalidTimestamp, MissingHeader } from '../errors.ts'
import { isMissing, secondsOf, verifierOf } from './verifier.ts'
import type { Named, SignedDelivery, SignedHeaders, Verified, Verifier } from './verifier.ts'

/**
 * The scheme that OpenAI signs with, https://github.com/standard-webhooks/standard-webhooks (spec, "Signature scheme"):
 * HMAC-SHA256 over `webhook-id.webhook-timestamp.body` in base64. Each signature has the prefix `v1,`, and several are separated by spaces.
 * The body is hashed as the bytes that arrived.
 *
 * Coded errors: MISSING_HEADER, INVALID_ID, INVALID_TIMESTAMP, INVALID_SIGNATURE (all 401).
 */
export function standardWebhooks (): Verifier
export function standardWebhooks (...given: unknown[]): Verifier {
  assertNone('standardWebhooks', given, 'secret and tolerance are options of the plugin')
  return verifier
}

const verifier = verifierOf({ readHeaders, judge, sign, namedByEvent: false })

// Visible ASCII without "." and ",". With a "." in the id, the signed text `id.timestamp.body` could be split at another place, so that an old
// delivery would pass as a fresh one. A "," may come from node:http, which joins repeated headers with it.
export const WEBHOOK_ID = /^[\x21-\x2b\x2d\x2f-\x7e]{1,256}$/

interface Read extends SignedHeaders {
  readonly webhookId: string
  /** What is signed in front of the body. */
  readonly signedHead: string
  readonly signatures: string | string[]
}

function readHeaders ({ 'webhook-id': webhookId, 'webhook-timestamp': seconds, 'webhook-signature': signatures }: IncomingHttpHeaders): Read | Error {
  if (isMissing(seconds)) return new MissingHeader('webhook-timestamp')
  if (isMissing(signatures)) return new MissingHeader('webhook-signature')
  if (isMissing(webhookId)) return new MissingHeader('webhook-id')
  if (typeof webhookId !== 'string' || !WEBHOOK_ID.test(webhookId)) return new InvalidId()
  const timestamp = secondsOf(seconds)
  return timestamp === undefined ? new InvalidTimestamp('webhook-timestamp') : { timestamp, webhookId, signedHead: `${webhookId}.${seconds as string}.`, signatures }
}

function judge ({ rawBody }: SignedDelivery, { timestamp, webhookId, signedHead, signatures }: Read, keys: readonly KeyObject[]): Verified | Error {
  // node:http joins repeated headers with ", ", which never occurs in a list of signatures.
  if (typeof signatures !== 'string' || signatures.includes(', ')) return new InvalidSignature()
  const keyIndex = keys.findIndex(key => listHolds(signatures, Buffer.from(mac(signedHead, rawBody, key))))
  return keyIndex === -1 ? new InvalidSignature() : { webhookId, timestamp, keyIndex }
}

const mac = (signedHead: string, rawBody: Buffer, key: KeyObject): string =>
  createHmac('sha256', key).update(signedHead).update(rawBody).digest('base64')

const PREFIX = 'v1,'

function sign (rawBody: Buffer, { webhookId, timestamp }: Named, key: KeyObject): Record<string, string> {
  return {
    'webhook-id': webhookId,
    'webhook-timestamp': String(timestamp),
    'webhook-signature': `${PREFIX}${mac(`${webhookId}.${timestamp}.`, rawBody, key)}`
  }
}

/**
 * Compares base64 text instead of decoded bytes, so that only the canonical form passes. A long list needs no further HMAC, and node:http
 * limits its length.
 */
function listHolds (list: string, expected: Buffer): boolean {
  for (const entry of list.split(' ')) {
    if (entry.length !== PREFIX.length + expected.length || !entry.startsWith(PREFIX)) continue
    const candidate = Buffer.from(entry.slice(PREFIX.length))
    // Text that is not ASCII has more bytes than characters, and timingSafeEqual() throws if the lengths differ.
    if (candidate.length === expected.length && timingSafeEqual(candidate, expected)) return true
  }
  return false
}
