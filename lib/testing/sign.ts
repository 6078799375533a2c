import { createHmac, randomBytes, randomUUID } from 'node:crypto'
import { Webhook } from 'standardwebhooks'

/** Used wherever no secret is given. Random, so another one in every process. */
export const testSecret = `whsec_${randomBytes(32).toString('base64')}`

export interface SignOptions {
  /** @default testSecret */
  secret?: string
  /** @default a new one */
  webhookId?: string
  /**
   * Unix seconds.
   *
   * @default now
   */
  timestamp?: number
}

export interface SignedHeaders {
  'content-type': string
  'webhook-id': string
  'webhook-timestamp': string
  'webhook-signature': string
  [name: string]: string
}

/** As OpenAI makes them: `wh_` and 32 hexadecimal digits. */
export function newWebhookId (): string {
  return `wh_${randomUUID().replaceAll('-', '')}`
}

/**
 * The headers of a delivery of this body, signed as OpenAI does. Text is signed by `standardwebhooks`, an implementation
 * independent of the one that verifies; bytes that are no text, which it does not take, by node:crypto.
 *
 * @param body what will be sent, to the byte
 */
export function sign (body: string | Uint8Array, { secret = testSecret, webhookId = newWebhookId(), timestamp = Math.floor(Date.now() / 1000) }: SignOptions = {}): SignedHeaders {
  return {
    'content-type': 'application/json',
    'webhook-id': webhookId,
    'webhook-timestamp': String(timestamp),
    'webhook-signature': typeof body === 'string'
      ? new Webhook(toBase64(secret)).sign(webhookId, new Date(timestamp * 1000), body)
      : `v1,${createHmac('sha256', toBytes(secret)).update(`${webhookId}.${timestamp}.`).update(body).digest('base64')}`
  }
}

/** `standardwebhooks` takes every secret as base64, OpenAI's SDKs one without the prefix as its UTF-8 bytes. */
function toBase64 (secret: string): string {
  return toBytes(secret).toString('base64')
}

function toBytes (secret: string): Buffer {
  return secret.startsWith('whsec_') ? Buffer.from(secret.slice('whsec_'.length), 'base64') : Buffer.from(secret)
}
