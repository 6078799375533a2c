import type { FastifyRequest } from 'fastify'
import type { WebhookEvent } from './events/map.ts'

/** A verified and valid delivery: what a request carries once it has passed. `inbox.first()` takes it as its context. */
export interface Delivery {
  /** Verified, and of its type's shape. */
  readonly event: WebhookEvent
  /** The bytes that arrived. */
  readonly rawBody: Buffer
  /** The same for every retry of the delivery. */
  readonly webhookId: string
  /** When it was signed, in Unix seconds. */
  readonly timestamp: number
  /** The receiving route's URL. */
  readonly endpoint: string
  /** The tenant whose secret it was signed with; only where the route serves many. */
  readonly tenant?: string
}

export type WebhookHeaders = Headers | Readonly<Record<string, string | readonly string[] | undefined>> | FastifyRequest['headers']

/** A request that has passed verification. */
export type VerifiedRequest = FastifyRequest & { openaiWebhook: Delivery }

/** The type of `request.openaiWebhook`: a delivery where the route's config asks for one, else a delivery or `null`. */
export type RequestDelivery<ContextConfig> = ContextConfig extends { openaiWebhook: object } ? Delivery : Delivery | null
