import { inContext } from '../async-context.ts'
import type { Held } from '../pipeline/deduplicate.ts'
import type { Job } from '../runners/runner.ts'
import type { MaybePromise } from '../maybe-promise.ts'
import type { VerifiedRequest } from '../request.ts'

/** The state of a delivery in this process. */
export type State =
  /** The store has been asked for the claim and has not answered. */
  | { readonly at: 'claiming' }
  /** This process has the claim: no other process may run the handlers. */
  | { readonly at: 'claimed', readonly claim: Held }
  /** The handlers are running. When they have ended, the claim is completed or released. */
  | { readonly at: 'handling' }
  /**
   * Nothing is left to do in the request: the handlers have ended, the delivery is a duplicate or was refused, or the runner has queued the job.
   *
   * `succeeded`: whether all handlers have succeeded. If not, the next attempt starts them again with its own claim.
   */
  | { readonly at: 'over', readonly succeeded: boolean }

const NEXT: Readonly<Record<State['at'], ReadonlyArray<State['at']>>> = {
  claiming: ['claimed', 'over'],
  claimed: ['handling', 'over'],
  handling: ['over'],
  over: []
}

/** What the sender is told. */
export type Verdict =
  | { readonly outcome: 'processed' | 'duplicate' }
  /** `error` is one of the coded errors. */
  | { readonly outcome: 'refused', readonly error: Error }

/** The request that a delivery came with. It is told the verdict at most once. */
export interface Sender {
  readonly request: VerifiedRequest
  tell (verdict: Verdict): void
  /**
   * Runs the route's own handler, which replies. Calls `record` once, with whether the handler answered 2xx, or with false and the error that it
   * threw. The answer waits for what `record` returns, but not beyond the deadline. `undefined` if the route has no own handler.
   */
  readonly ownHandler: ((record: RecordEnd) => void) | undefined
}

export type RecordEnd = (succeeded: boolean, error?: unknown) => MaybePromise<void>

/** One delivery in this process, from its claim to its end. */
export class Work {
  #state: State = { at: 'claiming' }
  verdict: Verdict | undefined = undefined
  /** Resolves once the success of all handlers is recorded, and rejects once a failure is recorded. */
  end: MaybePromise<void> = undefined
  /** How often a runner has started the handlers, including this time; `undefined` if the runner does not count. */
  attempt: number | undefined = undefined
  /** Records the success of the handlers with the runner. */
  onSuccess: (() => MaybePromise<void>) | undefined = undefined
  /** Whether the runner has asked to keep the claim. */
  keepsClaim = false
  /** Other senders of the same delivery, which wait for the verdict. */
  #joined: Map<Sender, (verdict: Verdict) => void> | undefined

  /**
   * @param job replaced when more is known, such as which handlers had succeeded before
   * @param sender `undefined` if the job comes from a queue, because its sender has been answered
   */
  constructor (readonly key: string, public job: Job, readonly sender: Sender | undefined) {}

  get isFromQueue (): boolean { return this.sender === undefined }

  get state (): State { return this.#state }

  /** The only place where a delivery changes its state. */
  move (state: State): void {
    if (!NEXT[this.#state.at].includes(state.at)) throw new Error(`a delivery that is ${this.#state.at} cannot be ${state.at}`)
    this.#state = state
  }

  /** Whether nothing is left to do for this delivery: no handlers and no answer. */
  get canBeForgotten (): boolean {
    return this.verdict !== undefined && this.#state.at === 'over'
  }

  /** Whether no more senders may wait for the verdict. */
  get isCrowded (): boolean {
    return this.#joined !== undefined && this.#joined.size >= MAX_JOINED
  }

  /** Adds a sender, which is told this delivery's verdict in the async context of its own request. */
  join (sender: Sender): void {
    this.#joined ??= new Map()
    this.#joined.set(sender, inContext((verdict: Verdict) => sender.tell(verdict)))
  }

  /**
   * Called when the deadline has answered the sender. The request of a sender that has joined is let go, because the handlers may run for hours.
   * The first sender's request stays, because the handlers run in it.
   */
  forgetSender (sender: Sender): void {
    this.#joined?.delete(sender)
  }

  /** Notes that an inbox remembers a handler. If an earlier attempt has noted an earlier end, that end stays. @param retention ms */
  remember (handler: string, retention: number): void {
    const { timestamp, remembered } = this.job
    const until = timestamp * 1_000 + retention
    this.job = { ...this.job, remembered: { ...remembered, [handler]: Math.min(until, remembered?.[handler] ?? until) } }
  }

  tell (verdict: Verdict): void {
    this.sender?.tell(verdict)
    const joined = this.#joined
    if (joined === undefined) return
    this.#joined = undefined
    for (const told of joined.values()) told(verdict)
  }
}

/**
 * Maximum number of senders that wait for one verdict. OpenAI waits for an answer before it retries, so more than a few requests at once are not
 * its retries.
 */
const MAX_JOINED = 100

/** The deliveries that this process has, by key. */
export class Works {
  /** Deliveries that came in a request: a sender waits, or the handlers run. */
  readonly received = new Map<string, Work>()
  /** Deliveries that came from a queue. */
  readonly queued = new Map<string, Work>()
  /** Claims on queued deliveries whose handlers this process is about to start. */
  readonly keptClaims = new Map<string, Held>()
  closing = false
  #onIdle: (() => void) | undefined

  find (key: string): Work | undefined {
    return this.received.get(key) ?? this.queued.get(key)
  }

  /** Whether this process runs the handlers of a queued delivery, or is about to. No sender waits for them. */
  isQueued (key: string): boolean { return this.queued.has(key) || this.keptClaims.has(key) }

  /** Removes and returns the claim that was kept for a delivery. */
  takeKeptClaim (key: string): Held | undefined {
    const claim = this.keptClaims.get(key)
    this.keptClaims.delete(key)
    return claim
  }

  forget ({ key, isFromQueue }: Work): void {
    (isFromQueue ? this.queued : this.received).delete(key)
    if (this.#onIdle !== undefined && this.#isIdle) this.#onIdle()
  }

  /** Resolves when this process has no delivery left. */
  async drained (): Promise<void> {
    if (!this.#isIdle) await new Promise<void>(resolve => { this.#onIdle = resolve })
  }

  get #isIdle (): boolean { return this.received.size + this.queued.size === 0 }
}
