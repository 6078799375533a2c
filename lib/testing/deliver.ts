import { randomBytes } from 'node:crypto'
import type { FastifyInstance, LightMyRequestResponse } from 'fastify'
import { sampleEvent } from './sample.ts'
import { newWebhookId, sign } from './sign.ts'
import type { SignedHeaders, SignOptions } from './sign.ts'

export interface DeliverOptions extends SignOptions {
  /** @default '/webhooks/openai' */
  url?: string
  /** Added to the signed ones, or in their place. */
  headers?: Record<string, string>
}

interface Sent {
  body: string
  options: DeliverOptions
}

/** The delivery of each response, for `redeliver`. */
const sent = new WeakMap<LightMyRequestResponse, Sent>()

type Injectable = Pick<FastifyInstance, 'inject'>

/**
 * Delivers an event to the app, signed, without a network.
 *
 * @param event an object, or the exact text of the body
 * @returns light-my-request's response
 */
export async function deliver (app: Injectable, event: object | string, options: DeliverOptions = {}): Promise<LightMyRequestResponse> {
  const body = typeof event === 'string' ? event : JSON.stringify(event)
  const webhookId = options.webhookId ?? newWebhookId()
  const response = await post(app, body, sign(body, { ...options, webhookId }), options)
  sent.set(response, { body, options: { ...options, webhookId } })
  return response
}

/**
 * Delivers again what was delivered, as OpenAI retries: the same webhook-id and body, timestamp and signature renewed.
 *
 * @param previous what `deliver` or `redeliver` resolved to
 * @throws TypeError for any other response
 */
export async function redeliver (app: Injectable, previous: LightMyRequestResponse): Promise<LightMyRequestResponse> {
  const delivery = sent.get(previous)
  if (delivery === undefined) throw new TypeError('redeliver: expected a response that deliver() or redeliver() resolved to')
  const { timestamp, ...options } = delivery.options
  return await deliver(app, delivery.body, options)
}

const MINUTES = 60
const OTHER_SECRET = `whsec_${randomBytes(32).toString('base64')}`

/** How a delivery can be bad, with what the plugin answers. */
const faults = {
  /** 401 INVALID_SIGNATURE: signed with another secret */
  'bad signature': signed => ({ ...signed, headers: { ...signed.headers, 'webhook-signature': sign(signed.body, { webhookId: signed.headers['webhook-id'], secret: OTHER_SECRET })['webhook-signature'] } }),
  /** 401 TIMESTAMP_OUT_OF_TOLERANCE: signed ten minutes ago */
  stale: (signed, options) => resign(signed, options, -10 * MINUTES),
  /** 401 TIMESTAMP_OUT_OF_TOLERANCE: signed ten minutes from now */
  future: (signed, options) => resign(signed, options, 10 * MINUTES),
  /** 401 INVALID_SIGNATURE: one byte more than was signed */
  'changed body': signed => ({ ...signed, body: `${signed.body} ` }),
  /** 401 MISSING_HEADER: no webhook-signature */
  'missing header': ({ headers: { 'webhook-signature': _removed, ...headers }, body }) => ({ headers: headers as SignedHeaders, body }),
  /** 401 INVALID_ID: a webhook-id that could be split at another place */
  'bad id': signed => ({ ...signed, headers: { ...signed.headers, 'webhook-id': 'wh_1.2' } }),
  /** 200, to `onUnhandled`: a type that nobody knows */
  'unknown type': (signed, options) => rewrite(signed, options, event => ({ ...event, type: 'unknown.type' })),
  /** 400 INVALID_EVENT: `data` is missing */
  'wrong shape': (signed, options) => rewrite(signed, options, ({ data, ...event }) => event),
  /** 400 INVALID_BODY: signed, and cut short */
  'not json': (signed, options) => resign({ ...signed, body: signed.body.slice(0, -1) }, options, 0)
} satisfies Record<string, (signed: Signed, options: DeliverOptions) => Signed>

interface Signed {
  headers: SignedHeaders
  body: string
}

export type Fault = keyof typeof faults

/** Every fault that `forge` knows. */
export const faultNames = Object.keys(faults) as Fault[]

/**
 * Delivers an event that is bad in one way, and right in every other.
 *
 * @param event default a sample of `batch.failed`
 * @returns light-my-request's response
 * @throws TypeError for an unknown fault
 */
export async function forge (app: Injectable, fault: Fault, { event = sampleEvent('batch.failed'), ...options }: DeliverOptions & { event?: object } = {}): Promise<LightMyRequestResponse> {
  if (!Object.hasOwn(faults, fault)) throw new TypeError(`forge: expected one of "${faultNames.join('", "')}", got "${String(fault)}"`)
  const body = JSON.stringify(event)
  const forged = faults[fault]({ headers: sign(body, options), body }, options)
  return await post(app, forged.body, forged.headers, options)
}

function resign ({ body }: Signed, options: DeliverOptions, seconds: number): Signed {
  const timestamp = (options.timestamp ?? Math.floor(Date.now() / 1000)) + seconds
  return { headers: sign(body, { ...options, timestamp }), body }
}

function rewrite (signed: Signed, options: DeliverOptions, change: (event: Record<string, unknown>) => object): Signed {
  return resign({ ...signed, body: JSON.stringify(change(JSON.parse(signed.body) as Record<string, unknown>)) }, options, 0)
}

async function post (app: Injectable, payload: string, signed: SignedHeaders, { url = '/webhooks/openai', headers }: DeliverOptions): Promise<LightMyRequestResponse> {
  return await app.inject({ method: 'POST', url, headers: { ...signed, ...headers }, payload })
}
