import { AsyncResource } from 'node:async_hooks'
import type { Held } from '../pipeline/deduplicate.ts'
import type { Job } from '../runners/runner.ts'
import type { MaybePromise } from '../steps.ts'
import type { VerifiedRequest } from '../request.ts'

/** Where a delivery stands in this process. */
export type State =
  /** The store has been asked, and has not answered. */
  | { readonly at: 'claiming' }
  /** Nobody else may run its handlers. */
  | { readonly at: 'claimed', readonly claim: Held }
  /** Its handlers have been started with the claim: they settle it. */
  | { readonly at: 'handling', readonly claim: Held }
  /** A queue has it: the claim is left to whoever takes it from there. */
  | { readonly at: 'handed on' }
  /** Nothing is left to do here. `failed`: whoever asks for its handlers again has them started anew. */
  | { readonly at: 'over', readonly failed: boolean }

const NEXT: Readonly<Record<State['at'], ReadonlyArray<State['at']>>> = {
  claiming: ['claimed', 'over'],
  claimed: ['handling', 'handed on', 'over'],
  handling: ['over'],
  'handed on': [],
  over: []
}

/** What the sender is told. */
export type Verdict =
  | { readonly outcome: 'processed' | 'duplicate' }
  /** Coded. */
  | { readonly outcome: 'refused', readonly error: Error }

/** The request that a delivery came with: told its verdict once. */
export interface Sender {
  readonly request: VerifiedRequest
  tell (verdict: Verdict): void
  /**
   * A route's own handler, which replies. It reports once whether it answered 2xx, or what it threw, and waits for that to
   * be recorded before the answer leaves.
   */
  readonly ownHandler: ((record: RecordEnd) => void) | undefined
}

export type RecordEnd = (succeeded: boolean, error?: unknown) => MaybePromise<void>

/** One webhook-id in this process, from its claim to its end. */
export class Work {
  #state: State = { at: 'claiming' }
  verdict: Verdict | undefined = undefined
  /** Handlers that had succeeded before they were started. */
  finished: readonly string[] = NONE
  /** Handlers that have used an inbox, as a job has them. */
  remembered: Job['remembered'] = undefined
  /** Resolves once its handlers have succeeded, rejects once one has failed, and that is on record. */
  end: MaybePromise<void> = undefined
  /** How often a runner has started its handlers, this time included. */
  attempt: number | undefined = undefined
  /** Other requests with the same webhook-id that wait for the verdict. */
  #joined: Map<Sender, (verdict: Verdict) => void> | undefined

  /** @param sender absent where the job comes out of a queue: it has been acknowledged then */
  constructor (readonly key: string, public job: Job, readonly sender: Sender | undefined) {}

  get state (): State { return this.#state }

  /** The one place where a delivery changes its state. */
  move (state: State): void {
    if (!NEXT[this.#state.at].includes(state.at)) throw new Error(`a delivery that is ${this.#state.at} cannot be ${state.at}`)
    this.#state = state
  }

  /** Whether nothing is left to do for it in this process: neither its handlers nor an answer. */
  get isLeft (): boolean {
    return this.verdict !== undefined && (this.#state.at === 'over' || this.#state.at === 'handed on')
  }

  /** Whether as many wait for its verdict as may. */
  get isCrowded (): boolean {
    return this.#joined !== undefined && this.#joined.size >= MAX_JOINED
  }

  /** The sender is told this delivery's verdict, in the async context of its own request. */
  join (sender: Sender): void {
    this.#joined ??= new Map()
    this.#joined.set(sender, AsyncResource.bind((verdict: Verdict) => sender.tell(verdict)))
  }

  /** It has been answered otherwise. The handlers may run for hours: nothing of its request is kept for that. */
  leave (sender: Sender): void {
    this.#joined?.delete(sender)
  }

  /** An inbox is to remember a handler for so many ms; in an earlier attempt it may have begun to. */
  keeps (handler: string, retention: number): void {
    const until = this.job.timestamp * 1_000 + retention
    this.remembered = { ...this.remembered, [handler]: Math.min(until, this.remembered?.[handler] ?? until) }
  }

  /** Tells everybody who waits. */
  tell (verdict: Verdict): void {
    this.sender?.tell(verdict)
    const joined = this.#joined
    if (joined === undefined) return
    this.#joined = undefined
    for (const told of joined.values()) told(verdict)
  }
}

/** OpenAI sends one at a time. */
const MAX_JOINED = 100

const NONE: readonly string[] = []

/** The deliveries that this process has: received, and out of a queue. */
export class Works {
  readonly received = new Map<string, Work>()
  readonly queued = new Map<string, Work>()
  /** The one that a runner is being given. A runner that handles it at once comes back for it: no look-up. */
  offered: Work | undefined
  closing = false
  #onIdle: (() => void) | undefined

  find (key: string): Work | undefined {
    return this.received.get(key) ?? (this.queued.size > 0 ? this.queued.get(key) : undefined)
  }

  forget (works: Map<string, Work>, { key }: Work): void {
    works.delete(key)
    if (this.#onIdle !== undefined && this.#isIdle) this.#onIdle()
  }

  /** Resolves when nothing is running here. */
  async drained (): Promise<void> {
    if (!this.#isIdle) await new Promise<void>(resolve => { this.#onIdle = resolve })
  }

  get #isIdle (): boolean { return this.received.size + this.queued.size === 0 }
}
