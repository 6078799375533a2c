import type { FastifyRequest } from 'fastify'
import type { WebhookEvent } from './events/map.ts'

/** A verified and valid delivery, which is the value of `request.openaiWebhook`. `inbox.first()` accepts it as its context. */
export interface Delivery {
  /** The verified event. It has the shape of its type, unless the type is unknown. */
  readonly event: WebhookEvent
  /** The body, as the bytes that arrived. */
  readonly rawBody: Buffer
  /** The idempotency key: the same for every retry of the delivery. */
  readonly webhookId: string
  /** When the delivery was signed, in Unix seconds. */
  readonly timestamp: number
  /** The receiving route's URL. */
  readonly endpoint: string
  /** The tenant whose secret the delivery was signed with. Set only if the route serves many tenants. */
  readonly tenant?: string
}

export type WebhookHeaders = Headers | Readonly<Record<string, string | readonly string[] | undefined>> | FastifyRequest['headers']

/** A request that has passed verification. */
export type VerifiedRequest = FastifyRequest & { openaiWebhook: Delivery }

/** The type of `request.openaiWebhook`: a delivery if the route's config has `openaiWebhook`, or else a delivery or `null`. */
export type RequestDelivery<ContextConfig> = ContextConfig extends { openaiWebhook: object } ? Delivery : Delivery | null
