import type { AsyncLocalStorage } from 'node:async_hooks'
import { channel, tracingChannel } from 'node:diagnostics_channel'
import type { FastifyRequest } from 'fastify'
import { isPromise, later } from './maybe-promise.ts'
import type { MaybePromise } from './maybe-promise.ts'
import type { DeadDelivery } from './runners/runner.ts'
import type { VerifiedRequest } from './request.ts'

/** Published for every verified delivery. */
export interface DeliveryInfo {
  /** The receiving route's URL. */
  readonly endpoint: string
  /** Only where the route serves many tenants. */
  readonly tenant?: string | undefined
  readonly webhookId: string
  /** When the delivery was signed, in Unix seconds. */
  readonly timestamp: number
  readonly event: { readonly type: string, readonly id?: unknown, readonly created_at?: unknown }
}

/** A delivery whose signature and shape are right. */
export interface VerifiedMessage extends DeliveryInfo {
  /** Which of the endpoint's secrets matched, in the order of the `secret` option; never its text. */
  readonly secretIndex: number | undefined
  /** Bytes. */
  readonly bodySize: number
  readonly request: VerifiedRequest
}

/** A delivery that was not answered 200: a stranger's, or one that OpenAI has to send again. */
export interface RefusedMessage {
  /** The code of the answer: one of ours, or Fastify's own. */
  readonly code: string
  readonly statusCode: number
  readonly error: unknown
  readonly endpoint: string
  /** Whatever the sender has named, where the route serves many tenants. */
  readonly tenant?: string | undefined
  /** Known once the signature was right. */
  readonly webhookId?: string | undefined
  /** Known once it was of the right shape too: not with INVALID_BODY and INVALID_EVENT. */
  readonly event?: DeliveryInfo['event'] | undefined
  readonly request: FastifyRequest
}

/** A delivery whose webhook-id has been seen. */
export interface DuplicateMessage extends DeliveryInfo {
  /**
   * `processed` before; `joined` one that is running in this process; `elsewhere`: running in another process; `queued`: the
   * runner has it already, whatever its state there.
   */
  readonly state: 'processed' | 'joined' | 'elsewhere' | 'queued'
  readonly request: VerifiedRequest
}

/** The messages of all tracing channels have these. */
export interface TracedMessage {
  /**
   * A subscriber of `start` may set this to run the work within something of its own, such as the context of a tracer. Where it
   * is set already, the new one has to call the old one within. It has to call `work` once, at once.
   *
   * Not `start.bindStore`: it takes nothing but an AsyncLocalStorage, and since Node 26 enters it without calling its `run`.
   */
  around?: <T>(work: () => T) => T
  /** Set from the `error` message on: what the work threw. */
  error?: unknown
}

/** A runner with a queue is given a delivery. */
export interface EnqueueMessage extends DeliveryInfo, TracedMessage {
  readonly request: VerifiedRequest
  /**
   * A subscriber of `start` may put strings here, such as W3C's `traceparent`. They travel with the job to the
   * `DeliveryMessage` of the process that runs it.
   */
  readonly carrier: Record<string, string>
  /** Set once the runner has answered: whether it had the delivery already. `undefined` where it cannot tell. */
  duplicate?: boolean
  /** Set from the `error` message on: why the runner did not take it. */
  error?: unknown
}

/** The handlers of one delivery run, in a request or out of a queue, until their end is recorded. */
export interface DeliveryMessage extends DeliveryInfo, TracedMessage {
  /** How often its handlers have been started, this time included. `undefined` where the runner does not know. */
  readonly attempt: number | undefined
  /** The number of handlers that run. Those that have succeeded before do not. */
  readonly handlers: number
  /** Whether it comes out of a queue, so that it has been acknowledged. */
  readonly queued: boolean
  readonly carrier: Readonly<Record<string, string>> | undefined
  /** Only where the handlers run in the request. */
  readonly request: VerifiedRequest | undefined
  /** Set from the `error` message on: FST_OPENAI_WEBHOOK_HANDLER_FAILED, its `cause` the handlers' errors. */
  error?: unknown
}

/** One handler of one delivery runs. */
export interface HandlerMessage extends TracedMessage {
  /** Its name, or else its place in the order of registration. */
  readonly handler: string
  readonly delivery: DeliveryInfo & Pick<DeliveryMessage, 'attempt' | 'queued' | 'carrier'>
  /** Set from the `error` message on: what the handler threw. */
  error?: unknown
}

/** A store, a runner or a `secret` function has failed, and no sender hears of it. */
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

/** A part of a tracing channel. The work runs in the stores that are bound to it. */
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
 * A tracing channel whose messages are typed. Not Node's own type, whose parameters change places between versions of
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
 * Everything that happens to deliveries in this process, over all registrations of the plugin. Without a subscriber no message
 * is built.
 *
 * `enqueue`, `delivery` and `handler` are tracing channels: `start` and `end` around the synchronous part, then
 * `asyncStart` and `asyncEnd`, once, even where nothing was asynchronous; `error` before them.
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
      result = message.around === undefined ? work() : within(message.around, work)
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

/** Runs `work` once, whatever the subscriber does: else a delivery would be acknowledged whose handlers never ran. */
function within<T> (around: NonNullable<TracedMessage['around']>, work: () => T): T {
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
  } catch {} // what `work` threw is thrown again below
  return once()
}
