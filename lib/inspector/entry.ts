import type { IncomingHttpHeaders } from 'node:http'
import type { DuplicateMessage } from '../channels.ts'
import type { DeadDelivery, DeliveryError } from '../runners/runner.ts'
import type { DeliveryState, Row } from './messages.ts'
import type { Pages } from './pages.ts'

/** The most attempts that are kept of one delivery. The oldest are dropped. */
const MAX_ATTEMPTS = 10
/** The most handlers that are kept of one attempt. */
export const MAX_HANDLERS = 100
/** The most characters that are kept of a text that the sender chooses. */
const MAX_TEXT = 256
/** The most bytes of a body. A larger body is not kept. */
const MAX_BODY = 1_048_576
/** The most bytes of a body that is copied into a page. */
const MAX_COPIED = 4_096
/** Bytes that a delivery takes without its headers, its body and its errors. */
const OWN_SIZE = 2_048

export interface HandlerRun {
  readonly name: string
  outcome: 'running' | 'succeeded' | 'failed'
  /** Whole µs. */
  duration: number | undefined
}

export interface Attempt {
  readonly number: number
  /** Whole µs after the arrival of the delivery. */
  readonly startedAt: number
  readonly queued: boolean
  readonly handlers: readonly HandlerRun[]
  readonly finished: readonly string[]
  outcome: 'running' | 'processed' | 'failed'
  /** Whole µs. */
  duration: number | undefined
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

const NO_ATTEMPTS: readonly Attempt[] = []

/** One delivery in the inspector: a request, or a job out of a queue whose request this process has not received. */
export class Entry {
  state: DeliveryState = 'received'
  /** The signed id and timestamp, and fields of the event. Set once the delivery has been verified and validated. */
  webhookId: string | undefined = undefined
  timestamp: number | undefined = undefined
  type: string | undefined = undefined
  resource: string | undefined = undefined
  tenant: string | undefined = undefined
  refusal: Refusal | undefined = undefined
  duplicate: DuplicateMessage['state'] | undefined = undefined
  attempts: readonly Attempt[] = NO_ATTEMPTS
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
  // The end of each step, in whole µs after `startedAt`. Whole numbers, because V8 makes an object of each fraction.
  capturedAt: number | undefined = undefined
  verifiedAt: number | undefined = undefined
  validatedAt: number | undefined = undefined
  deduplicatedAt: number | undefined = undefined
  dispatchedAt: number | undefined = undefined
  answeredAt: number | undefined = undefined
  /** The duration of the last attempt in whole µs, when this process did not receive the request and so measures no answer. */
  duration: number | undefined = undefined
  // The body is a part of `#bytes`. No Buffer of its own is kept, because each one costs V8 more than the copy into a page.
  #bytes: Buffer | undefined = undefined
  #from = 0
  #to = 0
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

  /** Whole µs since the arrival. */
  elapsed (): number {
    return Math.round((performance.now() - this.startedAt) * 1_000)
  }

  /** The bytes that arrived. For a job, its event serialised again. `undefined` if they are not kept. */
  get rawBody (): Buffer | undefined {
    return this.#bytes?.subarray(this.#from, this.#to)
  }

  keepBody (rawBody: Buffer): void {
    const { length } = rawBody
    // A body that is not copied may be a slice of a larger buffer, which stays in memory as a whole.
    const size = length > MAX_COPIED ? rawBody.buffer.byteLength : length
    if (size > MAX_BODY) return
    this.#bytes = rawBody
    this.#to = length
    this.size += size
  }

  /** Called when a ring takes the entry. */
  copyBody (pages: Pages): void {
    if (this.#bytes === undefined || this.#to > MAX_COPIED) return
    this.#from = pages.copy(this.#bytes)
    this.#to += this.#from
    this.#bytes = pages.page
  }

  /** Called when a ring drops the entry. Its handlers may run for long, and would keep the page in memory. */
  dropBody (): void {
    this.#bytes = undefined
  }

  keepAttempt (attempt: Attempt): void {
    // A literal, because push() would make room for 17 attempts.
    this.attempts = this.attempts.length === 0 ? [attempt] : [...this.attempts.slice(1 - MAX_ATTEMPTS), attempt]
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
  const { id, at, type, webhookId, endpoint, tenant, resource, state, status, refusal, started, answeredAt, duration = answeredAt, sent } = entry
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
    ms: msOf(duration),
    own: sent !== undefined,
    again: sent?.again ?? null
  }
}

/** @param duration µs */
export function msOf (duration: number): number
export function msOf (duration: number | undefined): number | null
export function msOf (duration: number | undefined): number | null {
  return duration === undefined ? null : duration / 1_000
}
