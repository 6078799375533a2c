import { randomBytes } from 'node:crypto'
import type { FastifyInstance, LightMyRequestResponse } from 'fastify'
import { assertNames } from '../checks.ts'
import { sampleEvent } from './sample.ts'
import { newWebhookId, signedHeaders } from './sign.ts'
import type { SignedHeaders, SignOptions } from './sign.ts'

export interface DeliverOptions extends SignOptions {
  /** @default '/webhooks/openai' */
  url?: string | undefined
  /** Added to the signed headers. A header of the same name replaces the signed one. */
  headers?: Record<string, string> | undefined
}

const OPTIONS = ['secret', 'webhookId', 'timestamp', 'url', 'headers'] as const

interface Sent {
  body: string
  options: DeliverOptions
}

/** The delivery that each response answered, for `redeliver`. */
const sent = new WeakMap<LightMyRequestResponse, Sent>()

type Injectable = Pick<FastifyInstance, 'inject'>

/**
 * Signs an event and delivers it to the app by `app.inject()`, without a network.
 *
 * @param event an object, or the exact text of the body
 * @returns light-my-request's response
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS for an unknown option
 */
export async function deliver (app: Injectable, event: object | string, options: DeliverOptions = {}): Promise<LightMyRequestResponse> {
  assertNames('deliver', options, OPTIONS)
  const body = typeof event === 'string' ? event : JSON.stringify(event)
  const webhookId = options.webhookId ?? newWebhookId()
  const response = await post(app, body, signedHeaders(body, { ...options, webhookId }), options)
  sent.set(response, { body, options: { ...options, webhookId } })
  return response
}

/**
 * Delivers a delivery again, as OpenAI retries: with the same webhook-id and body, and with a new timestamp and signature.
 *
 * @param previous what `deliver` or `redeliver` resolved to
 * @returns light-my-request's response
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

/** The faults that a delivery can have, each with the plugin's answer. */
const faults = {
  /** 401 INVALID_SIGNATURE: signed with another secret */
  'bad signature': signed => ({ ...signed, headers: { ...signed.headers, 'webhook-signature': signedHeaders(signed.body, { webhookId: signed.headers['webhook-id'], secret: OTHER_SECRET })['webhook-signature'] } }),
  /** 401 TIMESTAMP_OUT_OF_TOLERANCE: signed ten minutes ago */
  stale: (signed, options) => resign(signed, options, -10 * MINUTES),
  /** 401 TIMESTAMP_OUT_OF_TOLERANCE: signed ten minutes from now */
  future: (signed, options) => resign(signed, options, 10 * MINUTES),
  /** 401 INVALID_SIGNATURE: one byte more than was signed */
  'changed body': signed => ({ ...signed, body: `${signed.body} ` }),
  /** 401 MISSING_HEADER: no webhook-signature */
  'missing header': ({ headers: { 'webhook-signature': _removed, ...headers }, body }) => ({ headers: headers as SignedHeaders, body }),
  /** 401 INVALID_ID: a webhook-id with a ".", which separates the parts of the signed text */
  'bad id': signed => ({ ...signed, headers: { ...signed.headers, 'webhook-id': 'wh_1.2' } }),
  /** 200, and `onUnhandled` is called: an event type that the plugin does not know */
  'unknown type': (signed, options) => rewrite(signed, options, event => ({ ...event, type: 'unknown.type' })),
  /** 400 INVALID_EVENT: `data` is missing */
  'wrong shape': (signed, options) => rewrite(signed, options, ({ data, ...event }) => event),
  /** 400 INVALID_BODY: JSON that was cut short before it was signed */
  'not json': (signed, options) => resign({ ...signed, body: signed.body.slice(0, -1) }, options, 0)
} satisfies Record<string, (signed: Signed, options: DeliverOptions) => Signed>

interface Signed {
  headers: SignedHeaders
  body: string
}

export type Fault = keyof typeof faults

/** The names of all faults that `forge` can make. */
export const faultNames = Object.keys(faults) as Fault[]

/**
 * Delivers an event that has one fault and is correct in every other respect.
 *
 * @param event the event that gets the fault, by default a sample of `batch.failed`
 * @returns light-my-request's response
 * @throws TypeError for an unknown fault, FST_OPENAI_WEBHOOK_INVALID_OPTIONS for an unknown option
 */
export async function forge (app: Injectable, fault: Fault, options: DeliverOptions & { event?: object } = {}): Promise<LightMyRequestResponse> {
  assertNames('forge', options, [...OPTIONS, 'event'])
  if (!Object.hasOwn(faults, fault)) throw new TypeError(`forge: expected one of "${faultNames.join('", "')}", got "${String(fault)}"`)
  const { event = sampleEvent('batch.failed'), ...sending } = options
  const body = JSON.stringify(event)
  const forged = faults[fault]({ headers: signedHeaders(body, sending), body }, sending)
  return await post(app, forged.body, forged.headers, sending)
}

function resign ({ body }: Signed, options: DeliverOptions, seconds: number): Signed {
  const timestamp = (options.timestamp ?? Math.floor(Date.now() / 1000)) + seconds
  return { headers: signedHeaders(body, { ...options, timestamp }), body }
}

function rewrite (signed: Signed, options: DeliverOptions, change: (event: Record<string, unknown>) => object): Signed {
  return resign({ ...signed, body: JSON.stringify(change(JSON.parse(signed.body) as Record<string, unknown>)) }, options, 0)
}

async function post (app: Injectable, payload: string, signed: SignedHeaders, { url = '/webhooks/openai', headers }: DeliverOptions): Promise<LightMyRequestResponse> {
  return await app.inject({ method: 'POST', url, headers: { ...signed, ...headers }, payload })
}
