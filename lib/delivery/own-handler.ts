import type { FastifyInstance, FastifyReply, FastifyRequest, RouteHandlerMethod } from 'fastify'
import { codeOf } from '../coded.ts'
import { HandlerFailed } from '../errors.ts'
import { logError, write } from '../log.ts'
import { acknowledge } from '../pipeline/acknowledge.ts'
import { isAnswerHeld, isInErrorHandler, isRefusedByFastify, isResponse, isSuccess, markHandling, markRefused } from '../pipeline/refusal.ts'
import { isPromise, later } from '../maybe-promise.ts'
import type { MaybePromise } from '../maybe-promise.ts'
import { isClosed, isOut, sentStatusOf, traceReset, watchDestroy } from './raw-response.ts'
import type { AnswerState, Answer } from './answer.ts'
import type { RecordEnd } from './work.ts'

/** Key on a request whose value is the run of its route's own handler. Absent until the own handler is started. */
const STARTED = Symbol('openai-webhook.own-handler')

type Started = FastifyRequest & { [STARTED]?: OwnHandler }

/** The onSend hook of a route with an own handler. It records the own handler's answer before the sender gets the answer. */
export function recordAnswer (request: FastifyRequest, reply: FastifyReply, payload: unknown, done: (error?: Error) => void): void {
  const recorded = (request as Started)[STARTED]?.answers(isResponse(payload) ? payload.status : reply.statusCode, isText(payload))
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
  (request as Started)[STARTED]?.note(error)
}

/**
 * One run of a route's own handler, which sends the answer. If the handler returns nothing and has not replied, the delivery is acknowledged.
 * The result is recorded once: how the handler answered or, after the deadline, how it ended.
 */
export class OwnHandler {
  /** The reply's status code before the handler was called. */
  readonly #givenStatus: number
  /** `reply.send` as it was before this class replaced it. */
  readonly #sendPlainly: FastifyReply['send']
  /**
   * `begins`: the handler is being called, so only the handler can be sending. `runs`: the handler has returned a promise, which has not
   * settled.
   */
  #call: 'begins' | 'runs' | 'returned' | 'threw' = 'begins'
  /** The error that the handler threw, sent or returned. Fastify logs that of a stream that fails half way. */
  #error: unknown
  /** The status code of the answer, if it is not that of the deadline or of Fastify's `handlerTimeout`. */
  statusCode: number | undefined
  /** The error of the deadline or of `handlerTimeout`. Only error handlers get it, so only an error handler can send it again. */
  #refusal: unknown
  /** Whether `#pass` is running. The error handlers that Fastify calls send everything that is sent meanwhile. */
  #isPassing = false
  /** Whether the handler has hijacked the reply. */
  #isHijacked = false
  /** Fulfil the promises that wait for `reply` although the response is over, such as that of an async handler that has returned `reply`. */
  readonly #waiting: Array<() => void> = []

  /** @param handOver called when the handler has ended and answers with the raw response, past Fastify */
  constructor (
    readonly answer: Answer,
    readonly request: FastifyRequest,
    readonly reply: FastifyReply,
    readonly record: RecordEnd,
    readonly handOver: () => void
  ) {
    this.#givenStatus = reply.statusCode
    this.#sendPlainly = reply.send
  }

  run (handler: RouteHandlerMethod, scope: FastifyInstance): void {
    const reply = this.reply
    ;(this.request as Started)[STARTED] = this
    this.#replaceMethods()
    traceReset(reply.raw, this.request.raw)
    if (this.answer.state.at === 'late') this.#divertStatus()
    // While other handlers ran, a hook of the app or Fastify's `handlerTimeout` has answered.
    else if (this.#isSent) this.#becomeLate(200, true)
    let result
    let pending
    try {
      result = handler.call(scope, this.request, reply)
      pending = isPromise(result) // reads `result.then`, which may be a getter that throws
    } catch (error) {
      return this.#threw(error)
    }
    if (pending && result !== (reply as unknown)) {
      this.#call = 'runs'
      later(result as Promise<unknown>, payload => this.#returned(payload), error => this.#threw(error))
      return
    }
    if (result === undefined && handler.length > 1 && this.answer.state.at === 'open' && !this.#isSent) warnOnce(handler, this.request)
    this.#returned(result)
  }

  #replaceMethods (): void {
    const { reply } = this
    // An async onSend hook delays `reply.sent`, and this class has to know at once whether the handler has replied.
    const send = (payload: unknown): FastifyReply => {
      try {
        return this.#send(payload)
      } finally {
        this.#endWaits()
      }
    }
    reply.send = send
    // A refusal, or a sender that goes away, ends the response before the handler has replied.
    const { then } = reply
    const wait: FastifyReply['then'] = (fulfilled, rejected) => {
      const isOfErrorHandler = isInErrorHandler(this.request)
      then.call(reply, () => {
        if (this.#isAwaited && !isOfErrorHandler) this.#waiting.push(fulfilled)
        else fulfilled()
      }, rejected)
    }
    reply.then = wait
    // What waits for the reply would wait for ever, because a handler that has hijacked the reply sends nothing with it.
    const { hijack } = reply
    const takeOver: FastifyReply['hijack'] = () => {
      hijack.call(reply)
      // Once the refusal was sent, no error handler hijacks. A listener of 'close' has the async context of the one that has sent it.
      if (!isInErrorHandler(this.request) || reply.raw.headersSent) this.#isHijacked = true
      this.#endWaits()
      return reply
    }
    reply.hijack = takeOver
  }

  /** Fulfils, once it shows how the handler ends, what waits for that. Later, because it may throw. */
  #endWaits (): void {
    if (!this.#isAwaited) for (const fulfilled of this.#waiting.splice(0)) queueMicrotask(fulfilled)
  }

  /** Called when the deadline is over. @returns whether the plugin may answer with `refusal`: false if there is an answer already */
  giveUp (refusal: Error): boolean {
    const { state } = this.answer
    if (state.at === 'recorded') state.release?.()
    else if (state.at === 'replying') this.answer.move({ ...state, isOverdue: true })
    else if (state.at === 'open' && !this.#isSent) {
      this.#becomeLate()
      this.#refusal = refusal
      return true
    }
    return false
  }

  /** Notes an error that is about to be answered, unless it is that of the deadline or of Fastify's `handlerTimeout`. */
  note (error: unknown): void {
    if (this.answer.state.at !== 'late' && codeOf(error) !== 'FST_ERR_HANDLER_TIMEOUT') this.#error ??= error
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
      case 'open':
      case 'replying':
      case 'cut off':
        this.statusCode = statusCode
        if (succeeded && !isWhole) return watchDestroy(this.reply.raw, () => this.#broke())
        // The answer may be that of a hook of the app while the handler still runs. It is recorded once the handler has ended, because a retry
        // must not run the handler while it still runs.
        if (!succeeded && this.#call === 'runs') return this.answer.move({ at: 'cut off', succeeds: never })
        return this.#settleBeforeAnswer(succeeded, state.at === 'replying' && state.isOverdue)
    }
  }

  /** Records the result. The answer waits for the record, but not beyond the deadline. */
  #settleBeforeAnswer (succeeded: boolean, isOverdue: boolean): MaybePromise<void> {
    const recording = this.#settle(succeeded)
    if (!isPromise<void>(recording) || isOverdue) return
    return new Promise((resolve, reject) => {
      this.answer.move({ at: 'recorded', release: resolve })
      recording.then(resolve, reject)
    })
  }

  #settle (succeeded: boolean, error = this.#error): MaybePromise<void> {
    this.answer.move({ at: 'recorded' })
    this.#endWaits()
    return this.record(succeeded, error)
  }

  /** Replaces `reply.send`. */
  #send (payload: unknown): FastifyReply {
    const answer = this.answer
    const reply = this.reply
    const { at } = answer.state
    if (codeOf(payload) === 'FST_ERR_HANDLER_TIMEOUT' && (at === 'open' || at === 'late')) return this.#timeOut(payload)
    if (at === 'late') return this.#sendLate(answer.state, payload)
    const isGood = isSuccessful(payload, reply.statusCode)
    if (at === 'open') answer.move({ at: 'replying', succeeds: () => isGood && isSuccess(reply.raw.statusCode), isOverdue: false })
    try {
      this.#sendPlainly.call(reply, payload)
    } catch (error) {
      if ((at === 'open' || at === 'cut off') && isAnswerHeld(error)) return this.#settleUnheard(payload)
      // A serializer of the app has thrown, so nothing is being sent.
      if (at === 'open') answer.move({ at: 'open' })
      throw error
    }
    // If `recordAnswer` does not record the answer, because it is a stream or another onSend hook has failed, the response's close does.
    if (at === 'open') this.#awaitClose()
    return reply
  }

  /** Treats Fastify's `handlerTimeout` as a deadline: the handler keeps running. */
  #timeOut (error: unknown): FastifyReply {
    if (this.answer.state.at === 'open') this.#becomeLate()
    this.#refusal ??= error
    try {
      this.#pass(error)
    } catch {
      // An async onError hook is running for another answer. The error is swallowed, because Fastify's timer has called `send`, and catches
      // nothing.
    }
    return this.reply
  }

  /**
   * Handles what is sent after the deadline. The first payload is the sender's answer, as a refusal. A payload of the own handler is recorded.
   */
  #sendLate (state: Late, payload: unknown): FastifyReply {
    if (this.#isOfErrorHandlers(payload)) return this.#sendRefusal(state, payload)
    return this.#isOwn(state) ? this.#settleUnheard(payload) : this.#sendUnsure(state, payload)
  }

  /** Whether an error handler is sending this payload, or the payload is the error that error handlers are to get. */
  #isOfErrorHandlers (payload: unknown): boolean {
    return this.#call !== 'begins' && (this.#isPassing || (payload !== undefined && payload === this.#refusal) || isInErrorHandler(this.request))
  }

  #sendRefusal (state: Late, payload: unknown): FastifyReply {
    // An error handler is sending now, so the earlier payload came from the own handler.
    if (state.unsure !== undefined && !this.#isPassing) this.#settleOnce(state.unsure.succeeded)
    else if (!(payload instanceof Error)) this.answer.move({ ...state, isRefused: true })
    return this.#pass(payload)
  }

  /**
   * Whether a payload that no known error handler sends certainly comes from the own handler: either the own handler is being called, or the
   * error handlers have nothing left to send, because an answer has been sent already.
   */
  #isOwn ({ isRefused, unsure }: Late): boolean {
    return this.#call === 'begins' || isRefused === true || isRefusedByFastify(this.request) || this.reply.sent || unsure?.isError === false
  }

  /**
   * Sends a payload of the own handler, or of an error handler that has lost the async context. Only what follows shows which of the two has
   * sent it.
   */
  #sendUnsure (state: Late, payload: unknown): FastifyReply {
    const succeeded = state.unsure?.succeeded !== false && isSuccessful(payload, state.statusCode)
    this.answer.move({ ...state, unsure: { succeeded, isError: payload instanceof Error } })
    try {
      return this.#pass(payload)
    } catch (error) {
      if (!isAnswerHeld(error)) throw error
      this.answer.move(state)
      return this.#settleUnheard(payload)
    }
  }

  #pass (payload: unknown): FastifyReply {
    const outer = this.#isPassing
    this.#isPassing = true
    try {
      return this.#sendPlainly.call(this.reply, payload)
    } finally {
      this.#isPassing = outer
    }
  }

  /** Records a reply that no sender gets, because the reply shows how the handler ended. */
  #settleUnheard (payload: unknown): FastifyReply {
    const { state } = this.answer
    const late = state.at === 'late' ? state : undefined
    this.#settleOnce(late?.unsure?.succeeded !== false && isSuccessful(payload, late?.statusCode ?? this.#ownStatus), payload instanceof Error ? payload : undefined)
    return this.reply
  }

  /**
   * Records the first result and ignores later ones. A failure that the handler or a hook of the app sends while the handler runs is recorded
   * once the handler has ended, because a retry must not run the handler while it still runs.
   */
  #settleOnce (succeeded: boolean, error?: unknown): void {
    const { state } = this.answer
    if (state.at === 'cut off' || (state.at === 'late' && state.failed !== undefined)) return
    if (succeeded || this.#call !== 'runs') this.#settle(succeeded, error)
    else this.answer.move(state.at === 'late' ? { ...state, failed: { error } } : { at: 'cut off', succeeds: never })
  }

  #returned (payload: unknown): void {
    const { state } = this.answer
    this.#call = 'returned'
    switch (state.at) {
      case 'late':
        if (state.failed !== undefined) this.#settle(false, state.failed.error)
        else if (payload === undefined) this.#settle(state.unsure?.succeeded !== false)
        else if (payload !== this.reply) this.#settleUnheard(payload)
        // The handler returns a reply that was sent before the handler was called. Nothing else will show how the handler ended, so it counts as
        // failed.
        else if (state.wasSent) this.#settle(false)
        return
      case 'cut off':
        this.#settle(state.succeeds())
        return
      case 'open':
        if (this.#isSent) this.#wroteItself()
        else if (payload !== this.reply) this.#answerWith(payload)
        else this.reply.raw.once('close', () => { if (this.#isSent) this.#wroteItself() })
    }
  }

  #answerWith (payload: unknown): void {
    try {
      if (payload === undefined) acknowledge(this.reply, 'processed')
      else this.reply.send(payload)
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
      markHandling(this.request, false)
      const shown = isMeant(error) ? error : new HandlerFailed({ cause: new AggregateError([error], 'the route\'s handler failed') })
      markRefused(shown, this.request, this.reply)
      this.reply.send(shown)
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

  /** Whether nothing shows yet how the handler ends, so that what it sends with `reply` will. */
  get #isAwaited (): boolean {
    const { state } = this.answer
    if (this.#isHijacked) return false
    if (state.at === 'late') return state.failed === undefined && state.unsure === undefined && !state.wasSent
    return state.at === 'open' && !this.#isSent
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
      const succeeds = left ? () => isSuccess(sentStatusOf(raw)) : state.succeeds
      const hasEnded = this.#call === 'returned' || this.#call === 'threw'
      if (!hasEnded && !(left && succeeds())) this.answer.move({ at: 'cut off', succeeds })
      else this.#settle((left || this.#call === 'returned') && succeeds())
    }
    if (isClosed(raw)) closed()
    else raw.once('close', closed)
  }

  /** Called when the source of the answer's stream has failed. */
  #broke (): void {
    const { state } = this.answer
    if (state.at === 'replying') this.answer.move({ ...state, succeeds: never })
  }

  /** Called when the answer does not come from the own handler. @param statusCode that the handler has set so far */
  #becomeLate (statusCode = this.reply.statusCode, wasSent = false): void {
    this.answer.move({ at: 'late', statusCode, wasSent })
    this.#divertStatus()
  }

  /**
   * Keeps the handler from changing the status of a refusal that was sent. The status that the handler sets is noted instead, because it shows
   * how the handler ended.
   */
  #divertStatus (): void {
    const reply = this.reply
    const { code } = reply
    const divert = (statusCode: number): FastifyReply => {
      const { state } = this.answer
      if (state.at !== 'late' || this.#isPassing || isInErrorHandler(this.request)) return reply.sent ? reply : code.call(reply, statusCode)
      this.answer.move({ ...state, statusCode })
      return reply.sent || state.isRefused === true || isRefusedByFastify(this.request) ? reply : code.call(reply, statusCode)
    }
    reply.code = reply.status = divert
  }
}

const warned = new WeakSet<RouteHandlerMethod>()

/** On other routes such a handler may reply at any later time. On a webhook route, returning nothing acknowledges the delivery. */
function warnOnce (handler: RouteHandlerMethod, { log, routeOptions: { url } }: FastifyRequest): void {
  if (warned.has(handler)) return
  warned.add(handler)
  write(log, 'warn', { url }, 'the handler of a webhook route is not async, takes reply and has returned nothing without a reply, so the delivery is acknowledged now: return reply where it replies later')
}

const never = (): boolean => false

const isText = (payload: unknown): boolean => typeof payload === 'string' || Buffer.isBuffer(payload) || payload === undefined || payload === null

/** Whether a payload that is sent with this status code is answered 2xx. */
function isSuccessful (payload: unknown, statusCode: number): boolean {
  if (payload instanceof Error) return false
  return isSuccess(isResponse(payload) ? payload.status : statusCode)
}

type Late = Extract<AnswerState, { at: 'late' }>

/**
 * Whether a thrown error is meant as the answer, because it has a `statusCode`. Any other error is a failure, and the sender must not read its
 * text.
 */
function isMeant (error: unknown): boolean {
  try {
    // Only an Error, because Fastify would send any other object as the body of a 200.
    return error instanceof Error && typeof (error as { statusCode?: unknown }).statusCode === 'number'
  } catch {
    return false // a getter that throws
  }
}
