import { createHmac, randomBytes, randomUUID } from 'node:crypto'
import { Webhook } from 'standardwebhooks'
import { assertNames } from '../checks.ts'

/** The secret that is used when none is given. It is random, so every process has another one. */
export const testSecret = `whsec_${randomBytes(32).toString('base64')}`

export interface SignOptions {
  /** @default testSecret */
  secret?: string | undefined
  /** @default a new id */
  webhookId?: string | undefined
  /**
   * Unix seconds.
   *
   * @default now
   */
  timestamp?: number | undefined
}

export interface SignedHeaders {
  'content-type': string
  'webhook-id': string
  'webhook-timestamp': string
  'webhook-signature': string
  [name: string]: string
}

/** A new webhook-id in OpenAI's format: `wh_` and 32 hexadecimal digits. */
export function newWebhookId (): string {
  return `wh_${randomUUID().replaceAll('-', '')}`
}

/**
 * Returns the headers of a delivery, signed as OpenAI signs it. Text is signed by the `standardwebhooks` package, which is independent of
 * the verifier under test. Bytes are signed by node:crypto, because that package signs only text.
 *
 * @param body exactly what will be sent
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS for an unknown option
 */
export function sign (body: string | Uint8Array, options: SignOptions = {}): SignedHeaders {
  assertNames('sign', options, ['secret', 'webhookId', 'timestamp'])
  return signedHeaders(body, options)
}

/** Signs with options that have been checked. */
export function signedHeaders (body: string | Uint8Array, { secret = testSecret, webhookId = newWebhookId(), timestamp = Math.floor(Date.now() / 1000) }: SignOptions): SignedHeaders {
  return {
    'content-type': 'application/json',
    'webhook-id': webhookId,
    'webhook-timestamp': String(timestamp),
    // `standardwebhooks` reads every secret as base64. OpenAI's SDKs use a secret without the prefix as its UTF-8 bytes.
    'webhook-signature': typeof body === 'string'
      ? new Webhook(toBytes(secret).toString('base64')).sign(webhookId, new Date(timestamp * 1000), body)
      : `v1,${createHmac('sha256', toBytes(secret)).update(`${webhookId}.${timestamp}.`).update(body).digest('base64')}`
  }
}

function toBytes (secret: string): Buffer {
  return secret.startsWith('whsec_') ? Buffer.from(secret.slice('whsec_'.length), 'base64') : Buffer.from(secret)
}
