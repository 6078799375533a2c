import { inContext } from '../async-context.ts'
import type { Held } from '../pipeline/deduplicate.ts'
import type { Job } from '../runners/runner.ts'
import type { MaybePromise } from '../maybe-promise.ts'
import type { VerifiedRequest } from '../request.ts'

/** Where a delivery stands in this process. */
export type State =
  /** The store has been asked for the claim and has not answered. */
  | { readonly at: 'claiming' }
  /** This process has the claim: nobody else may run the handlers. */
  | { readonly at: 'claimed', readonly claim: Held }
  /** The handlers run. Their end completes or releases the claim. */
  | { readonly at: 'handling', readonly claim: Held }
  /**
   * Nothing is left to do in the request: the handlers have ended, there were none to run, or the runner has queued or refused the job.
   *
   * `succeeded`: they have ended well. Else whoever asks for them starts them anew, by a claim of its own.
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
  /** Coded. */
  | { readonly outcome: 'refused', readonly error: Error }

/** The request that a delivery came with. It is told the verdict once. */
export interface Sender {
  readonly request: VerifiedRequest
  tell (verdict: Verdict): void
  /**
   * Runs the route's own handler, which replies. It calls `record` once, with whether it answered 2xx or with what it threw,
   * and the answer waits for what `record` returns.
   */
  readonly ownHandler: ((record: RecordEnd) => void) | undefined
}

export type RecordEnd = (succeeded: boolean, error?: unknown) => MaybePromise<void>

/** One webhook-id in this process, from its claim to its end. */
export class Work {
  #state: State = { at: 'claiming' }
  verdict: Verdict | undefined = undefined
  /** Handlers that had succeeded before this attempt. */
  finished: readonly string[] = NONE
  /** Handlers that have used an inbox, as a job has them. */
  remembered: Job['remembered'] = undefined
  /** Resolves when the handlers have succeeded and rejects when one has failed, once that is recorded. */
  end: MaybePromise<void> = undefined
  /** How often a runner has started the handlers, this time included. */
  attempt: number | undefined = undefined
  /** The runner's record of their success. */
  onSuccess: (() => MaybePromise<void>) | undefined = undefined
  /** Whether the runner has asked to keep the claim. */
  isKept = false
  /** Other senders with the same webhook-id, which wait for the verdict. */
  #joined: Map<Sender, (verdict: Verdict) => void> | undefined

  /** @param sender absent where the job comes out of a queue: its sender has been answered */
  constructor (readonly key: string, public job: Job, readonly sender: Sender | undefined) {}

  get state (): State { return this.#state }

  /** A delivery changes its state here and nowhere else. */
  move (state: State): void {
    if (!NEXT[this.#state.at].includes(state.at)) throw new Error(`a delivery that is ${this.#state.at} cannot be ${state.at}`)
    this.#state = state
  }

  /** Whether this process has nothing left to do for it: no handlers and no answer. */
  get canBeForgotten (): boolean {
    return this.verdict !== undefined && this.#state.at === 'over'
  }

  /** Whether no more senders may wait for the verdict. */
  get isCrowded (): boolean {
    return this.#joined !== undefined && this.#joined.size >= MAX_JOINED
  }

  /** Has the sender told this delivery's verdict, in the async context of its own request. */
  join (sender: Sender): void {
    this.#joined ??= new Map()
    this.#joined.set(sender, inContext((verdict: Verdict) => sender.tell(verdict)))
  }

  /**
   * The sender has been answered by the deadline. The request of one that has joined is not kept while the handlers run, which may be
   * for hours; that of the first one is, since they run in it.
   */
  forgetSender (sender: Sender): void {
    this.#joined?.delete(sender)
  }

  /** An inbox remembers a handler for so many ms; in an earlier attempt it may have begun to. */
  remember (handler: string, retention: number): void {
    const until = this.job.timestamp * 1_000 + retention
    this.remembered = { ...this.remembered, [handler]: Math.min(until, this.remembered?.[handler] ?? until) }
  }

  tell (verdict: Verdict): void {
    this.sender?.tell(verdict)
    const joined = this.#joined
    if (joined === undefined) return
    this.#joined = undefined
    for (const told of joined.values()) told(verdict)
  }
}

/** OpenAI waits for an answer before it retries, so more than a few are no retries. */
const MAX_JOINED = 100

const NONE: readonly string[] = []

/** The deliveries that this process has in hand. */
export class Works {
  /** Those that came in a request: a sender waits, or the handlers run. */
  readonly received = new Map<string, Work>()
  /** Those that came out of a queue. */
  readonly queued = new Map<string, Work>()
  /** Claims on deliveries that a queue has, and whose handlers are started here in a moment. */
  readonly kept = new Map<string, Held>()
  /** The one that the runner is being offered. A runner that handles it at once comes back for it without a look-up. */
  offered: Work | undefined
  closing = false
  #onIdle: (() => void) | undefined

  find (key: string): Work | undefined {
    return this.received.get(key) ?? (this.queued.size > 0 ? this.queued.get(key) : undefined)
  }

  /** Whether its handlers run here, or are about to, with nobody waiting for them. */
  isQueued (key: string): boolean { return this.queued.has(key) || this.kept.has(key) }

  /** The claim that was kept for its handlers. */
  takeKept (key: string): Held | undefined {
    const claim = this.kept.get(key)
    this.kept.delete(key)
    return claim
  }

  forget (works: Map<string, Work>, { key }: Work): void {
    works.delete(key)
    if (this.#onIdle !== undefined && this.#isIdle) this.#onIdle()
  }

  /** Resolves when this process has no delivery in hand. */
  async drained (): Promise<void> {
    if (!this.#isIdle) await new Promise<void>(resolve => { this.#onIdle = resolve })
  }

  get #isIdle (): boolean { return this.received.size + this.queued.size === 0 }
}
