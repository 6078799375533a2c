import fastify from 'fastify'
import type { FastifyInstance, FastifyReply, FastifyRequest, RouteHandlerMethod } from 'fastify'
import { isErrorThat } from '../coded.ts'
import { OWN_HANDLER } from '../handlers.ts'
import { logError, write } from '../log.ts'
import { acknowledge } from '../pipeline/acknowledge.ts'
import { isAnswerHeld, isHandlerTimeout, isRefused, isResponse, isSuccess, markFailed, markRefused } from '../pipeline/refusal.ts'
import { isPromise, later } from '../maybe-promise.ts'
import type { MaybePromise } from '../maybe-promise.ts'
import { handlersFailed } from '../runners/handler-failures.ts'
import type { Answer } from './answer.ts'
import { OwnReplies } from './own-replies.ts'
import type { RepliedRun } from './own-replies.ts'
import { discard, isStream, isSuccessful, isText } from './payload.ts'
import { isClosed, isOut, sentStatusOf, watchResponse } from './raw-response.ts'
import type { RecordEnd } from './work.ts'

/** Key on a request whose value is the run of its route's own handler. Absent until the own handler is started. */
const OWN_RUN = Symbol('openai-webhook.own-handler')

type WithOwnRun = FastifyRequest & { [OWN_RUN]?: OwnHandler }

/** The onSend hook of a route with an own handler. It records the own handler's answer before the sender gets the answer. */
export function recordAnswer (request: FastifyRequest, reply: FastifyReply, payload: unknown, done: (error?: Error) => void): void {
  const recorded = (request as WithOwnRun)[OWN_RUN]?.answers(isResponse(payload) ? payload.status : reply.statusCode, isText(payload))
  if (!isPromise<void>(recorded)) return done()
  // `done` throws if a header cannot be sent. Before 5.11 Fastify catches nothing after an asynchronous hook, so the process would end.
  const send = (): void => {
    try {
      done()
    } catch (error) {
      done(error as Error)
    }
  }
  recorded.then(send, done)
}

/** For onError hooks: notes why the answer of the route's own handler, if it has been started, is an error. */
export function noteError (request: FastifyRequest, error: unknown): void {
  (request as WithOwnRun)[OWN_RUN]?.note(error)
}

/**
 * One run of a route's own handler, which sends the answer. If the handler returns nothing and has not replied, the delivery is acknowledged.
 * The result is recorded once: how the handler answered or, after the deadline, how it ended.
 */
export class OwnHandler implements RepliedRun {
  /** The reply's status code before the handler was called. */
  readonly #givenStatus: number
  readonly #replies: OwnReplies
  /** `begins`: the handler is being called. `runs`: it has returned a promise, which has not settled. */
  #call: 'begins' | 'runs' | 'returned' | 'threw' = 'begins'
  /** The error that the handler threw, sent or returned. Fastify logs that of a stream that fails half way. */
  #error: unknown
  /** The status code of the answer, if it is not that of the deadline or of Fastify's `handlerTimeout`. */
  statusCode: number | undefined
  #isHijacked = false
  /** Whether the handler has answered with a stream. */
  #isStreaming = false
  /** Whether no reply is to be expected any more. */
  #expectsNoReply = false

  /** @param handOver called when the handler has ended and answers with the raw response, past Fastify */
  constructor (
    readonly answer: Answer,
    readonly request: FastifyRequest,
    readonly reply: FastifyReply,
    readonly record: RecordEnd,
    readonly handOver: () => void
  ) {
    this.#givenStatus = reply.statusCode
    this.#replies = new OwnReplies(this, reply)
  }

  get replyForRefusal (): FastifyReply { return this.#replies.forRefusal }

  run (handler: RouteHandlerMethod, scope: FastifyInstance): void {
    const { answer, request, reply } = this
    ;(request as WithOwnRun)[OWN_RUN] = this
    // While other handlers ran, a hook of the app or Fastify's `handlerTimeout` has answered, or is answering with an error.
    if (answer.state.at === 'open' && (this.#isSent || isRefused(request))) answer.move({ at: 'late', statusCode: 200 })
    this.#replies.watch()
    watchResponse(reply.raw, request.raw, reply.raw.writableEnded, isAgain => this.#ended(isAgain), isAgain => this.#broke(isAgain))
    let result
    let pending
    try {
      result = handler.call(scope, request, this.#replies.own)
      pending = isPromise(result) // reads `result.then`, which may be a getter that throws
    } catch (error) {
      return this.#threw(error)
    }
    if (pending && !this.#replies.isOne(result)) {
      this.#call = 'runs'
      later(result as Promise<unknown>, payload => this.#returned(payload), error => this.#threw(error))
      return
    }
    if (result === undefined && handler.length > 1 && answer.state.at === 'open' && !this.#isSent) warnOnce(handler, request)
    this.#returned(result)
  }

  /** It counts as a deadline: the handler keeps running. */
  sendTimeout (error: unknown): void {
    const { state } = this.answer
    if (state.at === 'open') this.answer.move({ at: 'late', statusCode: this.#ownStatus })
    // The handler has answered, and hooks of the app hold the answer.
    else if (state.at === 'replying') this.#settleOnce(state.succeeds())
    try {
      if (this.isLate) this.replyForRefusal.send(error)
      else this.#replies.sendUnwatched(error)
    } catch (thrown) {
      // Thrown while an async onError hook of the app holds the handler's own error. Fastify's timer catches nothing, so the process would end.
      logError(this.request.log, thrown, {}, 'the sender of a webhook delivery has another answer')
    }
  }

  hijacked (): void {
    this.#isHijacked = true
    if (this.answer.state.at === 'late' && this.#call === 'returned') this.#settle(true)
    else if (this.#call === 'returned' && isClosed(this.reply.raw)) this.#wroteItself()
    // What waits for the reply would wait for ever, because a handler that has hijacked the reply sends nothing with it.
    else this.#replies.endWaits()
  }

  /** Called when the raw response was ended. @param isAgain whether it had been ended before, as by a refusal */
  #ended (isAgain: boolean): void {
    const { at } = this.answer.state
    if (at === 'late' && isAgain) {
      this.expectNoReply() // NestJS ends it again if a handler fails
    } else if (at === 'open' && isClosed(this.reply.raw)) {
      if (this.#call === 'returned') this.#wroteItself()
      else this.#replies.endWaits()
    }
  }

  /**
   * Called when this process destroys the response before it is over, as Fastify does when the source of a stream fails, or when what it pipes to
   * the response does not end it because it is over.
   *
   * @param isAgain whether it had been ended before, as by a refusal
   */
  #broke (isAgain: boolean): void {
    const { answer: { state }, reply: { raw } } = this
    if (state.at === 'late' && isAgain) this.expectNoReply()
    else if (state.at === 'open' && (!this.#isSent || isClosed(raw))) this.expectNoReply()
    else if (state.at === 'replying' && !raw.writableEnded && !isClosed(raw)) this.answer.move({ ...state, succeeds: () => false })
  }

  /** Called when no reply is to be expected, and whether the handler has succeeded is not known. It may run again. */
  expectNoReply (): void {
    this.#expectsNoReply = true
    if (this.#call === 'returned') this.#settle(false)
    else this.#replies.endWaits()
  }

  /** Called when the deadline is over. @returns whether the plugin may answer: false if there is an answer already */
  giveUp (): boolean {
    const { state } = this.answer
    if (state.at === 'recorded') state.release?.()
    else if (state.at === 'replying') this.answer.move({ ...state, isOverdue: true })
    else if (state.at === 'open' && !this.#isSent) {
      this.answer.move({ at: 'late', statusCode: this.#ownStatus })
      return true
    }
    return false
  }

  /** Notes an error that is about to be answered, unless it is that of the deadline or of Fastify's `handlerTimeout`. */
  note (error: unknown): void {
    if (this.answer.state.at !== 'late' && !isHandlerTimeout(error)) this.#error ??= error
  }

  /**
   * Called before an answer is sent, whether by the own handler or by others.
   *
   * @param isWhole whether the answer can no longer fail: a stream may fail
   * @returns a promise if the answer has to wait for the record
   */
  answers (statusCode: number, isWhole: boolean): MaybePromise<void> {
    const { state } = this.answer
    const succeeded = isSuccess(statusCode)
    switch (state.at) {
      case 'cut off':
        // Fastify closes a stream whose reader has gone, and answers that as an error, to nobody.
        if (!succeeded && !this.#isStreaming) this.answer.move({ ...state, succeeds: false })
        return
      case 'open':
      case 'replying':
        this.statusCode = statusCode
        if (succeeded && !isWhole) return
        // A second answer may overtake this one while hooks of the app or the store hold it.
        if (!succeeded) markFailed(statusCode, this.request, this.reply)
        // The answer may be that of a hook of the app while the handler still runs. It is recorded once the handler has ended, because a retry
        // must not run the handler while it still runs.
        if (!succeeded && !this.#hasEnded) {
          this.answer.move({ at: 'cut off', succeeds: false, isAnswered: true })
          return this.#replies.endWaits()
        }
        return this.#settleBeforeAnswer(succeeded, state.at === 'replying' && state.isOverdue)
    }
  }

  /** Records the result. The answer waits for the record, but not beyond the deadline. */
  #settleBeforeAnswer (succeeded: boolean, isOverdue: boolean): MaybePromise<void> {
    const recording = this.#settle(succeeded)
    if (!isPromise<void>(recording) || isOverdue) return
    return new Promise((resolve, reject) => {
      this.answer.move({ at: 'recorded', isLate: false, release: resolve })
      // For a handler that ends the raw response meanwhile.
      this.reply.raw.statusCode = this.statusCode!
      recording.then(resolve, reject)
    })
  }

  #settle (succeeded: boolean, error = this.#error): MaybePromise<void> {
    this.answer.move({ at: 'recorded', isLate: this.isLate })
    this.#replies.endWaits()
    return this.record(succeeded, error)
  }

  /** Sends with the reply, or records what no sender gets, because it shows how the handler ended. */
  send (payload: unknown): FastifyReply {
    const { answer, reply } = this
    const { at } = answer.state
    if (this.isLate) return this.#settleUnheard(payload)
    if (this.hasAnswered) return this.#sendAgain(payload)
    const isGood = isSuccessful(payload, reply.statusCode)
    this.#isStreaming = isStream(payload)
    if (at === 'open') answer.move({ at: 'replying', succeeds: () => isGood && isSuccess(reply.raw.statusCode), isOverdue: false })
    try {
      reply.send(payload)
    } catch (error) {
      if ((at === 'open' || at === 'cut off') && isAnswerHeld(error)) return this.#settleUnheard(payload)
      // A serializer of the app has thrown, so nothing is being sent.
      if (answer.state.at === 'replying') answer.move({ at: 'open' })
      throw error
    }
    // If `recordAnswer` does not record the answer, because it is a stream or another onSend hook has failed, the response's close does.
    if (at === 'open') this.#awaitClose()
    return this.#replies.own
  }

  /** Ignores a second answer, as Fastify does once the first is out. Until then Fastify would send it in place of the first, or before it. */
  #sendAgain (payload: unknown): FastifyReply {
    const { url, method, log } = this.request
    discard(payload)
    log.warn({ err: new fastify.errorCodes.FST_ERR_REP_ALREADY_SENT(url, method) })
    return this.#replies.own
  }

  #settleUnheard (payload: unknown): FastifyReply {
    const { state } = this.answer
    discard(payload)
    this.#settleOnce(isSuccessful(payload, state.at === 'late' ? state.statusCode : this.#ownStatus), payload instanceof Error ? payload : undefined)
    return this.#replies.own
  }

  /**
   * Records the first result and ignores later ones. A failure that the handler sends while it runs is recorded once it has ended, because a
   * retry must not run the handler while it still runs.
   */
  #settleOnce (succeeded: boolean, error?: unknown): void {
    const { state } = this.answer
    if (state.at === 'recorded' || state.at === 'cut off' || (state.at === 'late' && state.failed !== undefined)) return
    if (succeeded || this.#hasEnded) this.#settle(succeeded, error)
    else this.answer.move(state.at === 'late' ? { ...state, failed: { error } } : { at: 'cut off', succeeds: false })
  }

  #returned (payload: unknown): void {
    const { state } = this.answer
    this.#call = 'returned'
    switch (state.at) {
      case 'late':
        if (state.failed !== undefined) this.#settle(false, state.failed.error)
        else if (payload === undefined || this.#isHijacked) this.#settle(this.#isHijacked || (!this.#expectsNoReply && isSuccess(state.statusCode)))
        else if (!this.#replies.isOne(payload)) this.#settleUnheard(payload)
        return
      case 'cut off':
        this.#settle(state.succeeds)
        return
      case 'open':
        if (this.#isSent) this.#wroteItself()
        else if (this.#expectsNoReply) this.#settle(false)
        else if (!this.#replies.isOne(payload)) this.#answerWith(payload)
        else this.reply.raw.once('close', () => { if (this.#isSent) this.#wroteItself() })
    }
  }

  #answerWith (payload: unknown): void {
    try {
      if (payload === undefined && isSuccess(this.#ownStatus)) acknowledge(this.#replies.own, 'processed')
      else this.send(payload)
    } catch (error) {
      this.#threw(error) // thrown by a serializer of the app
    }
  }

  #threw (error: unknown): void {
    const { at } = this.answer.state
    this.#call = 'threw'
    if (at === 'late') {
      this.#settle(false, error)
    } else if (at === 'open' && !this.reply.sent) {
      this.#error = error
      const shown = isMeant(error) ? error : handlersFailed([{ handler: OWN_HANDLER, error }], 1, [])
      markRefused(shown, this.request, this.reply)
      this.send(shown)
    } else {
      logError(this.request.log, error, {}, 'a webhook route\'s handler failed after the answer')
      if (at === 'cut off') this.#settle(false)
      else this.#wroteItself()
    }
  }

  /**
   * The status code that the handler has set; 200 if it has set none, because a status from before the handler may be that of another answer's
   * error.
   */
  get #ownStatus (): number {
    return this.reply.statusCode === this.#givenStatus ? 200 : this.reply.statusCode
  }

  /** Whether the reply was sent or hijacked, or its headers were written to the raw response. */
  get #isSent (): boolean {
    return this.reply.sent || this.reply.raw.headersSent
  }

  get #hasEnded (): boolean { return this.#call === 'returned' || this.#call === 'threw' }

  /** Whether the handler is async and has not ended. */
  get runs (): boolean { return this.#call === 'runs' }

  /** Whether the answer does not come from the handler. */
  get isLate (): boolean {
    const { state } = this.answer
    return state.at === 'late' || (state.at === 'recorded' && state.isLate)
  }

  get hasAnswered (): boolean {
    const { state } = this.answer
    return state.at === 'recorded' || (state.at === 'cut off' && state.isAnswered === true)
  }

  /** Whether nothing shows yet how the handler ends, so that what it sends with `reply` will. */
  get isAwaited (): boolean {
    const { state } = this.answer
    if (this.#isHijacked || this.#expectsNoReply) return false
    return state.at === 'late' ? state.failed === undefined : state.at === 'open' && !this.#isSent
  }

  #wroteItself (): void {
    const { raw } = this.reply
    if (this.answer.state.at !== 'open') return
    this.answer.move({ at: 'replying', succeeds: () => raw.writableEnded && isSuccess(sentStatusOf(raw)), isOverdue: false })
    this.#awaitClose()
    this.handOver()
  }

  /**
   * Records the answer when the response closes. If the answer was sent completely, its status decides. If the sender did not wait for the
   * answer, the handler decides: whether it has returned, and whether its answer would have been a success.
   */
  #awaitClose (): void {
    const { raw } = this.reply
    const closed = (): void => {
      const { state } = this.answer
      if (state.at !== 'replying') return
      const left = isOut(raw)
      if (left) this.statusCode = sentStatusOf(raw)
      // Now, because Fastify sets another status when the stream of an answer is cut off.
      const succeeds = left ? isSuccess(sentStatusOf(raw)) : state.succeeds()
      if (!this.#hasEnded && !(left && succeeds)) this.answer.move({ at: 'cut off', succeeds })
      else this.#settle((left || this.#call === 'returned') && succeeds)
    }
    if (isClosed(raw)) closed()
    else raw.once('close', closed)
  }
}

const warned = new WeakSet<RouteHandlerMethod>()

/** On other routes such a handler may reply at any later time. On a webhook route, returning nothing acknowledges the delivery. */
function warnOnce (handler: RouteHandlerMethod, { log, routeOptions: { url } }: FastifyRequest): void {
  if (warned.has(handler)) return
  warned.add(handler)
  write(log, 'warn', { url }, 'the handler of a webhook route is not async, takes reply and has returned nothing without a reply, so the delivery is acknowledged now: return reply where it replies later')
}

/**
 * Whether a thrown error is meant as the answer, because it has a `statusCode`. Any other error is a failure, and the sender must not read its
 * text.
 */
const isMeant = (error: unknown): boolean => isErrorThat(error, ({ statusCode }) => typeof statusCode === 'number')
