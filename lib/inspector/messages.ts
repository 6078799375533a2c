// The messages between the server and the page, as JSON.

export type DeliveryState = 'received' | 'refused' | 'running' | 'processed' | 'failed' | 'queued' | 'duplicate' | 'late' | 'dead'

/** One row of the list of deliveries. */
export interface Row {
  /** Increases with each delivery in this process. */
  readonly id: number
  /** When the delivery arrived, in ms since the epoch. */
  readonly at: number
  /** For a refused delivery, `type` and `webhookId` are what the sender claims. */
  readonly type: string | null
  readonly webhookId: string | null
  readonly endpoint: string
  readonly tenant: string | null
  /** The id of the object that the event is about, such as a batch. */
  readonly resource: string | null
  readonly state: DeliveryState
  /** The status of the answer. `null` before the answer, and for a delivery out of a queue. */
  readonly status: number | null
  readonly code: string | null
  readonly attempts: number
  /** ms from the arrival to the answer. When this process did not receive the request, ms of the last attempt. */
  readonly ms: number | null
  /** Whether this page sent the delivery. */
  readonly own: boolean
  /** The id of the delivery that this one repeats, when this page sent it. */
  readonly again: number | null
}

export interface Stats {
  /**
   * `total` counts the deliveries, and `failed` those that failed or were refused, in slots of `seconds` each. The last slot is the present
   * one.
   */
  readonly seconds: number
  readonly total: readonly number[]
  readonly failed: readonly number[]
  /** The deliveries in the runner's queue. `null` when the runner has no queue or does not answer. */
  readonly depth: number | null
  readonly dead: number | null
}

export interface EndpointInfo {
  readonly url: string
  /** Whether the inspector can sign deliveries for this endpoint. */
  readonly signs: boolean
  /** Whether the endpoint serves several tenants. */
  readonly tenants: boolean
}

/** The first message of a stream. It is sent again to a page that has fallen behind. */
export interface Hello {
  readonly rows: readonly Row[]
  readonly stats: Stats
  readonly max: { readonly deliveries: number, readonly refused: number }
  readonly readOnly: boolean
  readonly endpoints: readonly EndpointInfo[]
  readonly types: readonly string[]
  readonly deadLetters: boolean
}

export interface ErrorInfo {
  readonly handler: string | null
  readonly message: string
  readonly stack: string
}

export interface HandlerInfo {
  readonly name: string
  /** `skipped`: the handler succeeded in an earlier attempt. */
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
  /** ms since the arrival; `null` when the step was not reached. */
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
  /** What to change, when the diagnosis does not say it. */
  readonly fix: string | null
  /** The code that the sender was told instead of `code`, so that strangers cannot find out which tenants exist. */
  readonly told: string | null
}

export interface BodyInfo {
  readonly base64: string
  readonly size: number
  /** Whether these are the bytes that arrived. Otherwise they were serialised from the job of a queue. */
  readonly arrived: boolean
}

/** `null` when a button can be offered, else the reason why it cannot. */
export type Obstacle = string | null

/** Everything that the page shows of one delivery. */
export interface Detail {
  readonly row: Row
  readonly url: string
  readonly timestamp: number | null
  readonly steps: readonly StepInfo[] | null
  readonly headers: ReadonlyArray<readonly [name: string, value: string]> | null
  /** `null` when the delivery was refused before its body was read, or the body is too large to be kept. */
  readonly body: BodyInfo | null
  readonly refusal: RefusalInfo | null
  readonly diagnosis: DiagnosisInfo | null
  readonly duplicate: string | null
  readonly attempts: readonly AttemptInfo[]
  readonly death: { readonly at: number, readonly attempts: number, readonly errors: readonly ErrorInfo[] } | null
  /** The other deliveries with this webhook-id at this endpoint, of the same tenant. */
  readonly others: readonly Row[]
  readonly deliver: { readonly again: Obstacle, readonly edited: Obstacle }
  /** How *Copy as curl* signs: with the secret in the environment of the person who runs it, or not at all. */
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

/** The answer to a delivery that the page sent. */
export interface Delivered {
  readonly status: number
  readonly body: string
}

export interface Repeated extends Delivered {
  /** The id of the new delivery; `null` when it did not reach the plugin. */
  readonly id: number | null
}

export interface Fault {
  readonly code: string
  readonly message: string
}
