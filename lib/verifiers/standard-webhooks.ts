import { createHmac, timingSafeEqual } from 'node:crypto'
import type { KeyObject } from 'node:crypto'
import type { IncomingHttpHeaders } from 'node:http'
import { InvalidId, InvalidSignature } from '../errors.ts'
import { parseTimestamp, requireHeader } from './verifier.ts'
import type { SignedDelivery, Verified, Verifier } from './verifier.ts'

/**
 * The scheme OpenAI signs with, https://github.com/standard-webhooks/standard-webhooks (spec, "Signature scheme"):
 * HMAC-SHA256 over `webhook-id.webhook-timestamp.body`, base64, each signature with a `v1,` prefix, several
 * separated by spaces. The body is hashed as the bytes that arrived.
 *
 * Coded errors: MISSING_HEADER, INVALID_ID, INVALID_TIMESTAMP, INVALID_SIGNATURE (all 401).
 */
export function standardWebhooks (): Verifier {
  return Object.assign(verify, { checkHeaders })
}

// Visible ASCII without "," and ".". A "." would let the signed text `id.timestamp.body` be split at another place, so
// that an old delivery passes as a fresh one; a "," is how node:http joins a doubled header.
const WEBHOOK_ID = /^[\x21-\x2b\x2d\x2f-\x7e]{1,256}$/

function parseId (headers: IncomingHttpHeaders): string {
  const id = requireHeader(headers, 'webhook-id')
  if (typeof id !== 'string' || !WEBHOOK_ID.test(id)) throw new InvalidId()
  return id
}

function checkHeaders (headers: IncomingHttpHeaders): number {
  const timestamp = requireHeader(headers, 'webhook-timestamp')
  requireHeader(headers, 'webhook-signature')
  parseId(headers)
  return parseTimestamp(timestamp, 'webhook-timestamp')
}

function verify ({ rawBody, headers }: SignedDelivery, keys: readonly KeyObject[]): Verified {
  const webhookId = parseId(headers)
  const timestampText = requireHeader(headers, 'webhook-timestamp') as string
  const timestamp = parseTimestamp(timestampText, 'webhook-timestamp')
  const signatures = requireHeader(headers, 'webhook-signature')
  // A list never holds ", ": that is two headers, joined by node:http.
  if (typeof signatures !== 'string' || signatures.includes(', ')) throw new InvalidSignature()

  const signedHead = `${webhookId}.${timestampText}.`
  for (let keyIndex = 0; keyIndex < keys.length; keyIndex++) {
    const expected = createHmac('sha256', keys[keyIndex]!).update(signedHead).update(rawBody).digest('base64')
    if (listHolds(signatures, expected)) return { webhookId, timestamp, keyIndex }
  }
  throw new InvalidSignature()
}

const PREFIX = 'v1,'
const BASE64_LENGTH = 44
const ENTRY_LENGTH = PREFIX.length + BASE64_LENGTH

const expectedBytes = Buffer.alloc(2 * BASE64_LENGTH)
const candidateBytes = Buffer.alloc(2 * BASE64_LENGTH)

/**
 * Compares base64 texts, not decoded bytes: only the canonical form passes, and no buffer is made per candidate.
 * One HMAC a key, whatever the list: its length is bounded by node:http's header limit.
 */
function listHolds (list: string, expected: string): boolean {
  expectedBytes.write(expected, 'utf16le')
  let start = 0
  while (start < list.length) {
    let end = list.indexOf(' ', start)
    if (end === -1) end = list.length
    if (end - start === ENTRY_LENGTH && list.startsWith(PREFIX, start)) {
      candidateBytes.write(list.slice(start + PREFIX.length, end), 'utf16le')
      if (timingSafeEqual(expectedBytes, candidateBytes)) return true
    }
    start = end + 1
  }
  return false
}
