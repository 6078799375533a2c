/**
 * The state of the one answer to a request.
 *
 *     open ─ verdict ──────────────────────────► closed
 *     open ─ deadline ─► late ─ verdict ───────► closed
 *                        late ─ own handler ends ► recorded
 *     open ─ own handler sends ─► replying ────► recorded
 *                                 replying ─ sender goes away ─► cut off ─ own handler ends ─► recorded
 *     open, replying ─ a failure is sent while the own handler runs ─► cut off
 */
export type AnswerState =
  /** There is no answer yet. */
  | { readonly at: 'open' }
  /** The route's own handler is answering, and the answer has not been sent completely. */
  | {
    readonly at: 'replying'
    /** Whether the answer counts as a success if the sender does not wait for it. */
    readonly succeeds: () => boolean
    /** Whether the deadline is over. */
    readonly isOverdue: boolean
  }
  /**
   * The sender went away before the answer was sent, or is told of a failure. The own handler keeps running. When it has returned, `succeeds`
   * decides; if it throws, it has failed. `isAnswered`: the failure is the handler's answer, which is on its way.
   */
  | { readonly at: 'cut off', readonly succeeds: boolean, readonly isAnswered?: true }
  /**
   * The answer does not come from the own handler, but from the deadline, Fastify's `handlerTimeout` or a hook of the app. An own handler keeps
   * running, and how it ends is recorded.
   */
  | {
    readonly at: 'late'
    /** The status that the own handler would answer with, because `reply` has the status of the refusal. */
    readonly statusCode: number
    /** A failure that the own handler has sent since then. It is recorded once the own handler has ended. */
    readonly failed?: { readonly error: unknown }
  }
  /**
   * The own handler's result is recorded, or is being recorded. `isLate`: whether the answer was late. `release` sends an answer that still waits
   * for the store.
   */
  | { readonly at: 'recorded', readonly isLate: boolean, readonly release?: () => void }
  /** The delivery's verdict is known. It is the answer, or it came after the deadline had answered. */
  | { readonly at: 'closed' }

const NEXT: Readonly<Record<AnswerState['at'], ReadonlyArray<AnswerState['at']>>> = {
  open: ['replying', 'cut off', 'late', 'recorded', 'closed'],
  // Back to open if a serializer of the app has thrown, because nothing is being sent.
  replying: ['replying', 'open', 'cut off', 'recorded'],
  'cut off': ['cut off', 'recorded'],
  late: ['late', 'recorded', 'closed'],
  recorded: ['recorded'],
  closed: []
}

export class Answer {
  #state: AnswerState = { at: 'open' }

  get state (): AnswerState { return this.#state }

  /** The only place where the answer changes its state. */
  move (state: AnswerState): void {
    if (!NEXT[this.#state.at].includes(state.at)) throw new Error(`an answer that is ${this.#state.at} cannot be ${state.at}`)
    this.#state = state
  }
}
