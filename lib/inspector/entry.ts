import type { IncomingHttpHeaders } from 'node:http'
import type { DuplicateMessage } from '../channels.ts'
import type { DeadDelivery, DeliveryError } from '../runners/runner.ts'
import type { DeliveryState, Row } from './messages.ts'

/** The most attempts that are kept of one delivery. The oldest are dropped. */
const MAX_ATTEMPTS = 10
/** The most handlers that are kept of one attempt. */
export const MAX_HANDLERS = 100
/** The most characters that are kept of a text that the sender chooses. */
const MAX_TEXT = 256
/** The most bytes of a body. A larger body is not kept. */
const MAX_BODY = 1_048_576
/** Bytes that a delivery takes without its headers, its body and its errors. */
const OWN_SIZE = 2_048

export interface HandlerRun {
  readonly name: string
  outcome: 'running' | 'succeeded' | 'failed'
  ms: number | undefined
}

export interface Attempt {
  readonly number: number
  /** When the attempt started, in ms since the epoch. */
  readonly at: number
  readonly queued: boolean
  readonly handlers: readonly HandlerRun[]
  readonly finished: readonly string[]
  outcome: 'running' | 'processed' | 'failed'
  ms: number | undefined
  errors: readonly DeliveryError[]
}

export interface Refusal {
  readonly code: string
  readonly statusCode: number
  readonly message: string
  readonly error: DeliveryError | null
}

export interface Sent {
  /** The id of the delivery that this one repeats. */
  readonly again: number | undefined
  /** The id of this delivery, once it has arrived. */
  id: number | undefined
}

/** One delivery in the inspector: a request, or a job out of a queue whose request this process has not received. */
export class Entry {
  state: DeliveryState = 'received'
  /** The signed id and timestamp, and fields of the event. Set once the delivery has been verified and validated. */
  webhookId: string | undefined = undefined
  timestamp: number | undefined = undefined
  type: string | undefined = undefined
  resource: string | undefined = undefined
  tenant: string | undefined = undefined
  /** The bytes that arrived. For a job, its event serialised again. */
  rawBody: Buffer | undefined = undefined
  refusal: Refusal | undefined = undefined
  duplicate: DuplicateMessage['state'] | undefined = undefined
  attempts: Attempt[] = []
  /** How often the handlers were started. */
  started = 0
  death: DeadDelivery | undefined = undefined
  /** The status of the answer. */
  status: number | undefined = undefined
  /** Set when the inspector's page sent the delivery. */
  sent: Sent | undefined = undefined
  /** Whether a ring contains the entry. */
  kept = false
  /** The approximate size in bytes. */
  size = OWN_SIZE
  // The end of each step, in ms of `performance.now()`. NaN until the step has ended.
  capturedAt = NaN
  verifiedAt = NaN
  validatedAt = NaN
  deduplicatedAt = NaN
  dispatchedAt = NaN
  answeredAt = NaN
  /** The duration of the last attempt in ms, when this process did not receive the request and so measures no answer. */
  ms: number | undefined = undefined
  #claimed: { type: string | undefined } | undefined = undefined

  /**
   * @param at ms since the epoch
   * @param startedAt ms of `performance.now()`
   * @param headers absent for a job
   */
  constructor (
    readonly id: number,
    readonly at: number,
    readonly startedAt: number,
    readonly endpoint: string,
    readonly url: string,
    readonly headers: IncomingHttpHeaders | undefined
  ) {
    if (headers !== undefined) this.size += sizeOf(headers) + url.length
  }

  keepBody (rawBody: Buffer): void {
    // The body may be a slice of a larger buffer, which stays in memory as a whole.
    const size = rawBody.buffer.byteLength
    if (size > MAX_BODY) return
    this.rawBody = rawBody
    this.size += size
  }

  keepAttempt (attempt: Attempt): void {
    if (this.attempts.length === MAX_ATTEMPTS) this.attempts.shift()
    this.attempts.push(attempt)
    this.started = attempt.number
  }

  /** The event type in the body of an unverified delivery. */
  get claimedType (): string | undefined {
    this.#claimed ??= { type: /"type"\s*:\s*"([\w.-]{1,100})"/.exec(this.rawBody?.toString('latin1', 0, 1_024) ?? '')?.[1] }
    return this.#claimed.type
  }

  get claimedId (): string | undefined {
    const id = this.headers?.['webhook-id']
    return typeof id === 'string' && id !== '' ? clip(id) : undefined
  }
}

function sizeOf (headers: IncomingHttpHeaders): number {
  let size = 0
  for (const name in headers) size += name.length + headers[name]!.length + 32
  return size
}

const clip = (text: string): string => text.length > MAX_TEXT ? text.slice(0, MAX_TEXT) : text

/** The approximate size in bytes of the errors of an attempt. */
export function sizeOfErrors (errors: readonly DeliveryError[]): number {
  return errors.reduce((size, { message, stack }) => size + 2 * (message.length + stack.length), 0)
}

/** The id of the object that an event is about. An event of the user's own may hold any value there. */
export function resourceOf ({ data }: { readonly data?: unknown }): string | undefined {
  if (typeof data !== 'object' || data === null) return undefined
  const { id, call_id: callId, session_id: sessionId, safety_identifier: safetyId } = data as Record<string, unknown>
  const resource = id ?? callId ?? sessionId ?? safetyId
  return typeof resource === 'string' ? clip(resource) : undefined
}

export function rowOf (entry: Entry): Row {
  const { id, at, type, webhookId, endpoint, tenant, resource, state, status, refusal, started, answeredAt, startedAt, ms, sent } = entry
  const verified = webhookId !== undefined
  return {
    id,
    at,
    type: (verified ? type && clip(type) : entry.claimedType) ?? null,
    webhookId: (verified ? clip(webhookId) : entry.claimedId) ?? null,
    endpoint,
    tenant: tenant ?? null,
    resource: resource ?? null,
    state,
    status: status ?? null,
    code: refusal?.code ?? null,
    attempts: started,
    ms: ms ?? (Number.isNaN(answeredAt) ? null : round(answeredAt - startedAt)),
    own: sent !== undefined,
    again: sent?.again ?? null
  }
}

export function round (ms: number): number {
  return Math.round(ms * 1_000) / 1_000
}
