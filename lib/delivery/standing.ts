/**
 * Where the one answer to a request stands.
 *
 *     open ─ verdict ──────────────────────────► closed
 *     open ─ deadline ─► late ─ verdict ───────► closed
 *                        late ─ own handler ends ► recorded
 *     open ─ own handler sends ─► replying ────► recorded
 *                                 replying ─ sender goes ─► cut off ─ own handler ends ─► recorded
 *     open, replying ─ a failure is sent while the own handler runs ─► cut off
 */
export type ReplyState =
  /** Nobody has answered. */
  | { readonly at: 'open' }
  /** The route's own handler answers, and the answer is not out yet. */
  | {
    readonly at: 'replying'
    /** Whether it is a success where the sender does not wait for it. */
    readonly judge: () => boolean
    /** Whether the deadline is over. */
    readonly isOverdue: boolean
  }
  /** The sender went away before the answer was out, or is told of a failure. The own handler runs on: its end decides. */
  | { readonly at: 'cut off', readonly judge: () => boolean }
  /** The deadline has answered, or Fastify's `handlerTimeout`. An own handler runs on, and how it ends is recorded. */
  | {
    readonly at: 'late'
    /** What the own handler would answer with: `reply` has the status of the refusal. */
    readonly statusCode: number
    /** An error handler has sent the refusal. */
    readonly isRefused?: boolean
    /**
     * Sent before that, by the own handler, or by an error handler that has lost the async context: whether it was a success, and
     * whether it was an error, which another error handler goes on with.
     */
    readonly unsure?: { readonly succeeded: boolean, readonly isError: boolean }
    /** A failure was sent since, by the own handler or by a hook of the app. It counts once the own handler has ended. */
    readonly failed?: { readonly error: unknown }
  }
  /** How the own handler ended is recorded. `release` lets go of an answer that still waits for the store. */
  | { readonly at: 'recorded', readonly release?: () => void }
  /** The delivery's verdict is known: it is the answer, or comes after the deadline's. */
  | { readonly at: 'closed' }

const NEXT: Readonly<Record<ReplyState['at'], ReadonlyArray<ReplyState['at']>>> = {
  open: ['replying', 'cut off', 'late', 'recorded', 'closed'],
  // Back to open where a serializer of the app has thrown: nothing is on its way.
  replying: ['replying', 'open', 'cut off', 'recorded'],
  'cut off': ['cut off', 'recorded'],
  late: ['late', 'recorded', 'closed'],
  recorded: ['recorded'],
  closed: []
}

/** The state of one reply. */
export class Standing {
  #state: ReplyState = { at: 'open' }

  get state (): ReplyState { return this.#state }

  /** A reply changes its state here and nowhere else. */
  move (state: ReplyState): void {
    if (!NEXT[this.#state.at].includes(state.at)) throw new Error(`a reply that is ${this.#state.at} cannot be ${state.at}`)
    this.#state = state
  }
}
