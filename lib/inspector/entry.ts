import type { IncomingHttpHeaders } from 'node:http'
import type { DuplicateMessage } from '../channels.ts'
import type { DeadDelivery, DeliveryError } from '../runners/runner.ts'
import type { DeliveryState, Row } from './messages.ts'

/** Attempts of one delivery that are kept, the last ones. */
const MAX_ATTEMPTS = 10
/** Handlers of one attempt that are kept. */
export const MAX_HANDLERS = 100
/** Characters of what a sender may choose freely. */
const MAX_TEXT = 256
/** Bytes of a body beyond which it is not kept. */
const MAX_BODY = 1_048_576
/** Bytes of a delivery beside its headers, its body and its errors. */
const OWN_SIZE = 2_048

export interface HandlerRun {
  readonly name: string
  outcome: 'running' | 'succeeded' | 'failed'
  ms: number | undefined
}

export interface Attempt {
  readonly number: number
  /** ms since the epoch */
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
  /** The delivery that it repeats. */
  readonly again: number | undefined
  /** Its own, once it has arrived. */
  id: number | undefined
}

/** One delivery, as the inspector keeps it: a request, or a job out of a queue whose request is not known here. */
export class Entry {
  state: DeliveryState = 'received'
  /** What it was signed and named with. Known once it is verified. */
  webhookId: string | undefined = undefined
  timestamp: number | undefined = undefined
  type: string | undefined = undefined
  resource: string | undefined = undefined
  tenant: string | undefined = undefined
  /** The bytes that arrived; of a job, its event written anew. */
  rawBody: Buffer | undefined = undefined
  refusal: Refusal | undefined = undefined
  duplicate: DuplicateMessage['state'] | undefined = undefined
  attempts: Attempt[] = []
  /** How often its handlers were started. */
  started = 0
  death: DeadDelivery | undefined = undefined
  /** The status of the answer. */
  status: number | undefined = undefined
  /** Where the page has sent it. */
  sent: Sent | undefined = undefined
  /** Whether a ring has it. */
  kept = false
  /** Bytes that it takes, about. */
  size = OWN_SIZE
  // ms of the process's clock. NaN where it has not come to it.
  capturedAt = NaN
  verifiedAt = NaN
  validatedAt = NaN
  deduplicatedAt = NaN
  dispatchedAt = NaN
  answeredAt = NaN
  /** How long its last attempt took, where this process has not received it: nobody is answered here. */
  ms: number | undefined = undefined
  #claimed: { type: string | undefined } | undefined = undefined

  /**
   * @param at ms since the epoch
   * @param startedAt ms of the process's clock
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
    // It may be a part of a larger piece of memory, which it keeps whole.
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

  /** What the sender of a refused delivery says that it is. */
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

/** Bytes of the errors that are kept of an attempt. */
export function sizeOfErrors (errors: readonly DeliveryError[]): number {
  return errors.reduce((size, { message, stack }) => size + 2 * (message.length + stack.length), 0)
}

/** The id of what an event is about. A user's own event may have anything there. */
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
