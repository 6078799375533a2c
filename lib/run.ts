import type { FastifyBaseLogger } from 'fastify'
import { logFields } from './log.ts'
import type { EventContext } from './pipeline/dispatch.ts'
import type { Job } from './runners/runner.ts'
import type { Claim, MaybePromise } from './stores/store.ts'
import type { VerifiedRequest } from './types.ts'

export type Outcome = 'processed' | 'duplicate'

/** The request that a delivery came with: told how it ended, exactly once. */
export interface Sender {
  readonly request: VerifiedRequest
  succeeded: (outcome: Outcome) => void
  failed: (error: unknown) => void
  /**
   * Set where a route has a handler of its own, which replies. It reports once whether it answered 2xx, or what it
   * threw, and waits for that to be recorded before the answer leaves.
   */
  readonly respond?: ((record: Record) => void) | undefined
  /** Set where it waits for the end of another request's delivery: to be called once it has been answered all the same. */
  leave?: (() => void) | undefined
}

export type Record = (succeeded: boolean, error?: unknown) => MaybePromise<void>

export interface Answer {
  readonly error: unknown
  readonly outcome: Outcome
}

const NONE: readonly string[] = []

/** One delivery in this process, from its claim to its end. */
export class Run {
  /** Whether the store has answered. */
  begun = false
  /** Held from `begin` until it is settled, or until a queue has the job. */
  claim: Extract<Claim, { state: 'claimed' }> | undefined = undefined
  /** Whether the claim has been given up or completed, or was lost: it is not to be renewed. */
  settled = false
  /** Handlers that had succeeded before they were started. */
  finished: readonly string[] = NONE
  /** Whether its handlers have been started with the claim: then they settle it. */
  started = false
  /** Whether they have ended, and that is on record. */
  ended = false
  /** Whether one of them has failed: whoever asks for them again has the others started anew. */
  failed = false
  /** Their end, for whoever asks for it again. */
  processed: MaybePromise<void> = undefined
  /** What the sender was told. */
  answer: Answer | undefined = undefined
  /** Others that deliver the same webhook-id meanwhile, and wait for its answer. */
  joined: Set<(answer: Answer) => void> | undefined = undefined
  /** How often a runner has started its handlers, this time included. */
  attempt: number | undefined = undefined

  /** @param sender absent where the job comes out of a queue: it has been acknowledged then */
  constructor (readonly key: string, public job: Job, readonly sender: Sender | undefined) {}
}

/** What a handler is given beside the event. */
export class Context implements EventContext {
  readonly webhookId: string
  readonly timestamp: number
  readonly endpoint: string
  readonly signal: AbortSignal
  declare readonly request?: VerifiedRequest
  readonly #run: Run
  readonly #parentLog: FastifyBaseLogger
  #log: FastifyBaseLogger | undefined

  constructor (run: Run, log: FastifyBaseLogger, signal: AbortSignal) {
    const { job, sender } = run
    this.webhookId = job.webhookId
    this.timestamp = job.timestamp
    this.endpoint = job.endpoint
    this.signal = signal
    this.#run = run
    this.#parentLog = sender?.request.log ?? log
    if (sender !== undefined) this.request = sender.request
  }

  /** Made when it is first asked for: a child logger costs more than the dispatch. */
  get log (): FastifyBaseLogger {
    this.#log ??= this.#parentLog.child(logFields(this.#run.job, this.#run.attempt))
    return this.#log
  }
}
