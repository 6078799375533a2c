import type { AsyncLocalStorage } from 'node:async_hooks'
import { channel, tracingChannel } from 'node:diagnostics_channel'
import type { FastifyRequest } from 'fastify'
import { isPromise, later } from './maybe-promise.ts'
import type { MaybePromise } from './maybe-promise.ts'
import type { DeadDelivery } from './runners/runner.ts'
import type { VerifiedRequest } from './request.ts'

/** Identifies a verified delivery in the messages of the channels. */
export interface DeliveryInfo {
  /** The receiving route's URL. */
  readonly endpoint: string
  /** Set only if the route serves many tenants. */
  readonly tenant?: string | undefined
  readonly webhookId: string
  /** When the delivery was signed, in Unix seconds. */
  readonly timestamp: number
  readonly event: { readonly type: string, readonly id?: unknown, readonly created_at?: unknown }
}

/** The fields of every message about a verified delivery. Copied one by one, because a job or a request has more. */
export function deliveryInfoOf ({ endpoint, tenant, webhookId, timestamp, event }: DeliveryInfo): DeliveryInfo {
  return { endpoint, tenant, webhookId, timestamp, event }
}

/** A delivery whose signature and shape are valid. */
export interface VerifiedMessage extends DeliveryInfo {
  /** Index of the endpoint's secret that matched, in the order of the `secret` option. The secret itself is never published. */
  readonly secretIndex: number | undefined
  /** Size of the body in bytes. */
  readonly bodySize: number
  readonly request: VerifiedRequest
}

/** A delivery that was not answered 200: it is not from OpenAI, or OpenAI has to send it again. */
export interface RefusedMessage {
  /** The code of the error: one of ours, Fastify's, or that of a hook or a verifier of the app. `UNKNOWN` if the error has none. */
  readonly code: string
  readonly statusCode: number
  readonly error: unknown
  readonly endpoint: string
  /** Set only if the route serves many tenants. The name is what the sender gave, and may be that of no tenant. */
  readonly tenant?: string | undefined
  /** Set if the signature matched. */
  readonly webhookId?: string | undefined
  /** Set if the shape was valid too, so it is absent with INVALID_BODY and INVALID_EVENT. */
  readonly event?: DeliveryInfo['event'] | undefined
  readonly request: FastifyRequest
}

/** A delivery whose webhook-id has been seen before. */
export interface DuplicateMessage extends DeliveryInfo {
  /**
   * `processed`: processed before. `joined`: being processed in this process. `elsewhere`: being processed in another process. `queued`: the
   * runner has the delivery already, in whatever state.
   */
  readonly state: 'processed' | 'joined' | 'elsewhere' | 'queued'
  readonly request: VerifiedRequest
}

/** What the messages of all tracing channels have in common. */
export interface TracedMessage {
  /**
   * A subscriber of `start` may set this function, to run the work within something of its own, such as the context of a tracer. The function has
   * to call `work` once and synchronously. If the message already has a function, the new one has to call the old one.
   *
   * `start.bindStore` is not enough: it accepts only an AsyncLocalStorage, and since Node 26 enters the store without calling its `run`.
   */
  around?: <T>(work: () => T) => T
  /** What the work threw. Set from the `error` message on. */
  error?: unknown
}

/** A delivery is given to a runner with a queue. */
export interface EnqueueMessage extends DeliveryInfo, TracedMessage {
  readonly request: VerifiedRequest
  /**
   * A subscriber of `start` may add strings, such as W3C's `traceparent`. The queue carries them with the job to the `DeliveryMessage` of the
   * process that runs the job.
   */
  readonly carrier: Record<string, string>
  /** Whether the runner already had the delivery; false if the runner cannot tell. Set once the runner has accepted the delivery. */
  duplicate?: boolean
}

/** The handlers of one delivery run, in a request or for a job of a queue, until their end is recorded. */
export interface DeliveryMessage extends DeliveryInfo, TracedMessage {
  /** How often the handlers have been started, including this time. `undefined` if the runner does not know. */
  readonly attempt: number | undefined
  /** The number of handlers that run. Handlers that have succeeded before do not run again. */
  readonly handlers: number
  /** Whether the delivery comes from a queue, so that it has already been acknowledged. */
  readonly queued: boolean
  readonly carrier: Readonly<Record<string, string>> | undefined
  /** Set only if the handlers run in the request. */
  readonly request: VerifiedRequest | undefined
  /** FST_OPENAI_WEBHOOK_HANDLER_FAILED, with the handlers' errors as its `cause`. Set from the `error` message on. */
  error?: unknown
}

/** One handler of one delivery runs. */
export interface HandlerMessage extends TracedMessage {
  /** The name of the handler, or else its place in the order of registration. */
  readonly handler: string
  readonly delivery: DeliveryInfo & Pick<DeliveryMessage, 'attempt' | 'queued' | 'carrier'>
}

/** A store, a runner or a `secret` function has failed, and no sender is told. */
export interface TroubleMessage {
  readonly error: unknown
  readonly endpoint?: string | undefined
  readonly tenant?: string | undefined
  readonly webhookId?: string | undefined
  readonly event?: DeliveryInfo['event'] | undefined
}

/** A `diagnostics_channel` whose messages are typed. */
export interface MessageChannel<Message> {
  readonly name: string | symbol
  readonly hasSubscribers: boolean
  subscribe (listener: (message: Message, name: string | symbol) => void): void
  unsubscribe (listener: (message: Message, name: string | symbol) => void): boolean
  publish (message: Message): void
}

/** A part of a tracing channel, to which stores can be bound. The work runs in the stores that are bound to `start`. */
export interface TracePart<Message> extends MessageChannel<Message> {
  bindStore<Store> (store: AsyncLocalStorage<Store>, transform: (message: Message) => Store): void
  unbindStore (store: AsyncLocalStorage<any>): boolean
  runStores<T> (message: Message, work: () => T): T
}

export interface TraceSubscribers<Message> {
  start (message: Message): void
  end (message: Message): void
  asyncStart (message: Message): void
  asyncEnd (message: Message): void
  error (message: Message): void
}

/**
 * A tracing channel whose messages are typed. Node's own type is not used, because the order of its type parameters differs between versions of
 * @types/node.
 */
export interface TraceChannel<Message> extends Record<keyof TraceSubscribers<Message>, TracePart<Message>> {
  readonly hasSubscribers: boolean
  subscribe (subscribers: TraceSubscribers<Message>): void
  unsubscribe (subscribers: TraceSubscribers<Message>): unknown
}

const named = <Message>(name: string): MessageChannel<Message> => channel(`fastify-openai-webhook.${name}`) as unknown as MessageChannel<Message>
const traced = <Message>(name: string): TraceChannel<Message> => tracingChannel(`fastify-openai-webhook.${name}`) as unknown as TraceChannel<Message>

/**
 * Everything that happens to deliveries in this process, in all registrations of the plugin. No message is built for a channel without
 * subscribers.
 *
 * `enqueue`, `delivery` and `handler` are tracing channels. They publish `start` and `end` around the synchronous part, and then `asyncStart` and
 * `asyncEnd` once, even if nothing was asynchronous. `error` comes before `asyncStart`.
 */
export const channels = {
  verified: named<VerifiedMessage>('verified'),
  refused: named<RefusedMessage>('refused'),
  duplicate: named<DuplicateMessage>('duplicate'),
  unhandled: named<DeliveryInfo>('unhandled'),
  trouble: named<TroubleMessage>('trouble'),
  dead: named<DeadDelivery>('dead'),
  enqueue: traced<EnqueueMessage>('enqueue'),
  delivery: traced<DeliveryMessage>('delivery'),
  handler: traced<HandlerMessage>('handler')
} as const

/** Runs `work` between the messages of a tracing channel, in the stores that are bound to `start`. */
export function trace<Message extends TracedMessage, T> (
  { start, end, asyncStart, asyncEnd, error: failed }: TraceChannel<Message>,
  message: Message,
  work: () => MaybePromise<T>
): MaybePromise<T> {
  const ended = (): void => {
    asyncStart.publish(message)
    asyncEnd.publish(message)
  }
  const threw = (error: unknown): void => {
    message.error = error
    failed.publish(message)
  }
  return start.runStores(message, () => {
    let result
    let pending = false
    try {
      result = message.around === undefined ? work() : runOnceIn(message.around, work)
      pending = isPromise<T>(result)
    } catch (error) {
      threw(error)
      end.publish(message)
      ended()
      throw error
    }
    end.publish(message)
    if (!pending) {
      ended()
      return result
    }
    return later(result as Promise<T>, value => {
      ended()
      return value
    }, error => {
      threw(error)
      ended()
      throw error
    })
  })
}

/** Runs `work` exactly once, whatever the subscriber does. Otherwise a delivery could be acknowledged although its handlers never ran. */
function runOnceIn<T> (around: NonNullable<TracedMessage['around']>, work: () => T): T {
  let outcome: (() => T) | undefined
  const once = (): T => {
    if (outcome === undefined) {
      try {
        const value = work()
        outcome = () => value
      } catch (error) {
        outcome = () => { throw error }
      }
    }
    return outcome()
  }
  try {
    around(once)
  } catch {} // an error of `work` is thrown again below
  return once()
}
