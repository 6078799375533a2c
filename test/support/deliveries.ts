import { randomUUID } from 'node:crypto'
import Fastify from 'fastify'
import type { FastifyInstance, FastifyServerOptions } from 'fastify'
import { Webhook } from 'standardwebhooks'
import openaiWebhook from '../../lib/index.ts'
import type { OpenAIWebhookOptions } from '../../lib/index.ts'
import { SteppedTime, unixTime } from './time.ts'

/** The secret of the published delivery below. */
export const SECRET = 'whsec_RdvaYFYUXuIFuEbvZHwMfYFhUf7aMYjYcmM24+Aj40c='

/** A delivery that OpenAI signed, published in openai-node's tests. */
export const VECTOR = {
  secret: SECRET,
  timestamp: 1750861210,
  headers: {
    'content-type': 'application/json',
    'webhook-id': 'wh_685c059ae39c8190af8c71ed1022a24d',
    'webhook-timestamp': '1750861210',
    'webhook-signature': 'v1,gUAg4R2hWouRZqRQG4uJypNS8YK885G838+EHb4nKBY='
  },
  body: '{"id": "evt_685c059ae3a481909bdc86819b066fb6", "object": "event", "created_at": 1750861210, "type": "response.completed", "data": {"id": "resp_123"}}'
}

export interface Signed {
  headers: Record<string, string>
  body: Buffer
}

interface SignOptions {
  secret?: string
  webhookId?: string
  /** Unix seconds, by default the present time. */
  timestamp?: number
}

/** Signs with an independent implementation: the `standardwebhooks` package, which signs only text. */
export function sign (event: unknown, { secret = SECRET, webhookId = `wh_${randomUUID()}`, timestamp = unixTime() }: SignOptions = {}): Signed {
  const body = typeof event === 'string' ? event : JSON.stringify(event)
  return {
    headers: {
      'content-type': 'application/json',
      'webhook-id': webhookId,
      'webhook-timestamp': String(timestamp),
      'webhook-signature': new Webhook(secret).sign(webhookId, new Date(timestamp * 1000), body)
    },
    body: Buffer.from(body)
  }
}

/** A thin event of the given type. */
export function thin (type: string, data: object = { id: 'res_1' }): { id: string, object: 'event', created_at: number, type: string, data: object } {
  return { id: 'evt_1', object: 'event', created_at: 1750861210, type, data }
}

/** Builds an app with the plugin and the secret above, and closes it when the test ends. */
export async function build (t: { teardown: (fn: () => unknown) => void }, options: OpenAIWebhookOptions = {}, server: FastifyServerOptions = {}): Promise<FastifyInstance> {
  const app = Fastify(server) as FastifyInstance
  t.teardown(() => app.close())
  await app.register(openaiWebhook, { secret: SECRET, ...options })
  return app
}

/** Injects a signed delivery. */
export async function post (app: FastifyInstance, { headers, body }: Signed, url = '/webhooks/openai') {
  return await app.inject({ method: 'POST', url, headers, payload: body })
}

/** The status of the answer, followed by its code if it is a refusal, else by its body. */
export async function outcome (app: FastifyInstance, delivery = sign(thin('batch.failed')), url?: string): Promise<string> {
  const { statusCode, body } = await post(app, delivery, url)
  const code = /"code":"(?:FST_OPENAI_WEBHOOK_)?(\w+)"/.exec(body)?.[1]
  return `${statusCode} ${code ?? body}`
}

/** A clock that moves only when the test moves it, until the test ends. Boot the app first, because booting needs timers. */
export function stoppedClock (t: { teardown: (fn: () => unknown) => void }, ms?: number): SteppedTime {
  return new SteppedTime(t, ms)
}
