// What the server and the page say to each other, as JSON.

export type DeliveryState = 'received' | 'refused' | 'running' | 'processed' | 'failed' | 'queued' | 'duplicate' | 'late' | 'dead'

/** One delivery in the list. */
export interface Row {
  /** Grows with each delivery, in this process. */
  readonly id: number
  /** When it came, in ms since the epoch. */
  readonly at: number
  /** Of a refused delivery only what its sender says. */
  readonly type: string | null
  readonly webhookId: string | null
  readonly endpoint: string
  readonly tenant: string | null
  /** Of the object that the event is about, such as a batch. */
  readonly resource: string | null
  readonly state: DeliveryState
  /** What its sender was answered; `null` until then, and where it came out of a queue. */
  readonly status: number | null
  readonly code: string | null
  readonly attempts: number
  /** From the arrival until the answer; where this process has not received it, those of its last attempt. */
  readonly ms: number | null
  /** Sent from this page. */
  readonly own: boolean
  /** The delivery that this one repeats, where it was sent from this page. */
  readonly again: number | null
}

export interface Stats {
  /** Deliveries, and those that failed or were refused, in slots of `seconds`, the last one the present. */
  readonly seconds: number
  readonly total: readonly number[]
  readonly failed: readonly number[]
  /** `null` where the runner has no queue or does not answer. */
  readonly depth: number | null
  readonly dead: number | null
}

export interface EndpointInfo {
  readonly url: string
  /** Whether a delivery can be signed for it here. */
  readonly signs: boolean
  /** Whether it serves many. */
  readonly tenants: boolean
}

/** The first message of a stream. */
export interface Hello {
  readonly rows: readonly Row[]
  readonly stats: Stats
  readonly max: { readonly deliveries: number, readonly refused: number }
  readonly readOnly: boolean
  readonly endpoints: readonly EndpointInfo[]
  readonly types: readonly string[]
  /** Whether the runner keeps dead deliveries. */
  readonly deadLetters: boolean
}

export interface ErrorInfo {
  readonly handler: string | null
  readonly message: string
  readonly stack: string
}

export interface HandlerInfo {
  readonly name: string
  /** `skipped`: it had succeeded in an earlier attempt. */
  readonly outcome: 'running' | 'succeeded' | 'failed' | 'skipped'
  readonly ms: number | null
}

export interface AttemptInfo {
  readonly number: number
  readonly at: number
  readonly queued: boolean
  readonly ms: number | null
  readonly outcome: 'running' | 'processed' | 'failed'
  readonly handlers: readonly HandlerInfo[]
  readonly errors: readonly ErrorInfo[]
}

export type StepName = 'capture' | 'verify' | 'validate' | 'deduplicate' | 'dispatch' | 'acknowledge'

export interface StepInfo {
  readonly name: StepName
  /** ms from the arrival; `null` where it was not reached. */
  readonly from: number | null
  readonly to: number | null
  readonly failed: boolean
}

export interface DiagnosisInfo {
  readonly cause: string | null
  readonly message: string
  readonly fix: string | null
  readonly ruledOut: readonly string[]
}

export interface RefusalInfo {
  readonly code: string
  readonly statusCode: number
  readonly message: string
  readonly error: ErrorInfo | null
  /** What to change, where the diagnosis does not say it. */
  readonly fix: string | null
  /** What the sender was told in place of the code, lest strangers find out which tenants there are. */
  readonly told: string | null
}

export interface BodyInfo {
  readonly base64: string
  readonly size: number
  /** Whether these are the bytes that arrived, and not written anew from what a queue held. */
  readonly arrived: boolean
}

/** Whether a button is offered: `null`, or why it is not. */
export type Obstacle = string | null

/** One delivery. */
export interface Detail {
  readonly row: Row
  readonly url: string
  readonly timestamp: number | null
  readonly steps: readonly StepInfo[] | null
  readonly headers: ReadonlyArray<readonly [name: string, value: string]> | null
  /** `null` where it was refused before it was read, or is too large to be kept. */
  readonly body: BodyInfo | null
  readonly refusal: RefusalInfo | null
  readonly diagnosis: DiagnosisInfo | null
  readonly duplicate: string | null
  readonly attempts: readonly AttemptInfo[]
  readonly death: { readonly at: number, readonly attempts: number, readonly errors: readonly ErrorInfo[] } | null
  /** The other deliveries with this webhook-id at this endpoint. */
  readonly others: readonly Row[]
  readonly deliver: { readonly again: Obstacle, readonly edited: Obstacle }
  /** How *Copy as curl* signs: by the secret in the reader's environment, or not at all. */
  readonly scheme: 'standard' | null
}

export interface DeadInfo {
  readonly endpoint: string
  readonly webhookId: string
  readonly tenant: string | null
  readonly type: string
  readonly attempts: number
  readonly diedAt: number
  readonly errors: readonly ErrorInfo[]
  readonly event: string
  readonly finished: readonly string[]
}

/** The answer to an action. */
export interface Delivered {
  readonly status: number
  readonly body: string
}

export interface Repeated extends Delivered {
  /** The new delivery's; `null` where it has not come as far as the plugin. */
  readonly id: number | null
}

export interface Fault {
  readonly code: string
  readonly message: string
}
