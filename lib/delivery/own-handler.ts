import type { Readable } from 'node:stream'
import fastify from 'fastify'
import type { FastifyInstance, FastifyReply, FastifyRequest, RouteHandlerMethod } from 'fastify'
import { isErrorThat } from '../coded.ts'
import { HandlerFailed } from '../errors.ts'
import { logError, write } from '../log.ts'
import { acknowledge } from '../pipeline/acknowledge.ts'
import { isAnswerHeld, isHandlerTimeout, isRefused, isResponse, isSuccess, markRefused } from '../pipeline/refusal.ts'
import { isPromise, later, tryOr } from '../maybe-promise.ts'
import type { MaybePromise } from '../maybe-promise.ts'
import { isClosed, isOut, sentStatusOf, watchResponse } from './raw-response.ts'
import type { Answer } from './answer.ts'
import { standIn } from './stand-in.ts'
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
 *
 * Three replies tell apart who replies: the handler gets one of its own, a refusal is sent with another one, which error handlers get, and both
 * stand for the one that hooks have had before. What comes with that one after the deadline is the handler's too, because it has kept it.
 */
export class OwnHandler {
  /** The reply's status code before the handler was called. */
  readonly #givenStatus: number
  /** The reply's methods before they are watched. */
  readonly #methods: Pick<FastifyReply, 'send' | 'code' | 'status' | 'then'>
  readonly #ownReply: FastifyReply
  #replyForRefusal: FastifyReply | undefined
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
    const { send, code, status, then } = reply
    this.#methods = { send, code, status, then }
    this.#givenStatus = reply.statusCode
    this.#ownReply = this.#makeReply()
  }

  /** The reply to send a refusal with, so that nothing that hooks and error handlers do with it is taken for the handler's answer. */
  get replyForRefusal (): FastifyReply {
    this.#replyForRefusal ??= standIn(this.reply, { methods: this.#methods })
    return this.#replyForRefusal
  }

  run (handler: RouteHandlerMethod, scope: FastifyInstance): void {
    const { answer, request, reply } = this
    ;(request as WithOwnRun)[OWN_RUN] = this
    // While other handlers ran, a hook of the app or Fastify's `handlerTimeout` has answered, or is answering with an error.
    if (answer.state.at === 'open' && (this.#isSent || isRefused(request))) answer.move({ at: 'late', statusCode: 200 })
    this.#watchReply()
    watchResponse(reply.raw, request.raw, reply.raw.writableEnded, isAgain => this.#ended(isAgain), isAgain => this.#broke(isAgain))
    let result
    let pending
    try {
      result = handler.call(scope, request, this.#ownReply)
      pending = isPromise(result) // reads `result.then`, which may be a getter that throws
    } catch (error) {
      return this.#threw(error)
    }
    if (pending && !this.#isReply(result)) {
      this.#call = 'runs'
      later(result as Promise<unknown>, payload => this.#returned(payload), error => this.#threw(error))
      return
    }
    if (result === undefined && handler.length > 1 && answer.state.at === 'open' && !this.#isSent) warnOnce(handler, request)
    this.#returned(result)
  }

  /** Makes the reply that the handler gets. Whatever does not show how the handler ends is done with the reply that it stands for. */
  #makeReply (): FastifyReply {
    const { answer, reply } = this
    const send = (payload: unknown): FastifyReply => {
      try {
        return this.#send(payload)
      } finally {
        this.#endWaits()
      }
    }
    const code = (statusCode: number): FastifyReply => {
      const { state } = answer
      // The refusal keeps its status.
      if (state.at === 'late') answer.move({ ...state, statusCode: Number(statusCode) })
      else if (state.at !== 'recorded') reply.code(statusCode)
      return this.#ownReply
    }
    const hijack = (): FastifyReply => {
      reply.hijack()
      this.#isHijacked = true
      if (answer.state.at === 'late' && this.#call === 'returned') this.#settle(true)
      else if (this.#call === 'returned' && isClosed(reply.raw)) this.#wroteItself()
      // What waits for the reply would wait for ever, because a handler that has hijacked the reply sends nothing with it.
      else this.#endWaits()
      return this.#ownReply
    }
    const then = (fulfilled: () => void, rejected: (error: Error) => void): Promise<unknown> => this.#wait(fulfilled, rejected)
    return standIn(reply, {
      methods: { send, code, status: code, hijack, then },
      sent: () => this.#isLate || answer.state.at === 'recorded' ? !this.#isAwaited : undefined,
      statusCode: () => answer.state.at === 'late' ? answer.state.statusCode : undefined
    })
  }

  /**
   * Waits as `then` of the reply does. A refusal, or a sender that goes away, ends the response before the handler has replied, so what waits for
   * the handler's reply goes on only when that shows how the handler ends.
   *
   * @returns a promise, for functions that wrap handlers and return what `then` returned, as @fastify/otel does
   */
  #wait (fulfilled: () => unknown, rejected?: (error: Error) => unknown): Promise<unknown> {
    return new Promise((resolve, reject) => {
      const follow = (settle: () => unknown): void => {
        try {
          resolve(settle())
        } catch (error) {
          reject(error)
        }
      }
      const failed = rejected && ((error: Error): void => follow(() => rejected(error)))
      plainThen.call(this.reply, () => {
        const go = (): void => follow(fulfilled)
        if (this.#isAwaited) this.#waiting.push(go)
        else go()
      }, failed as (error: Error) => void)
    })
  }

  /**
   * Watches the reply that hooks have, because the handler may have kept it, or use a function that a hook has made of it. Before there is an
   * answer, whoever replies counts as the handler. Once a refusal is out, nobody else has anything left to send. While it is on its way, a hook
   * may answer too, and then Fastify decides.
   */
  #watchReply (): void {
    const { answer, reply } = this
    const { send, code, then } = this.#methods
    // The answer of others is sent with this reply too if it had begun before, or if a hook has replaced `send` by a function of this reply.
    const isShared = this.#isLate || Object.hasOwn(reply, 'send')
    const isRefusalOut = (): boolean => this.#isLate && reply.raw.headersSent
    let statusCode: number | undefined
    const watchedCode = (given: number): FastifyReply => {
      if (!isRefusalOut()) return code.call(reply, given)
      statusCode = given
      return reply
    }
    const watchedSend = (payload: unknown): FastifyReply => {
      if (isHandlerTimeout(payload)) return this.#sendTimeout(payload)
      if (answer.state.at === 'open') {
        this.#send(payload)
      } else if (!isRefusalOut()) {
        return send.call(reply, payload)
      } else if (isShared) {
        this.#expectNoReply() // it may be an error handler's second answer
      } else {
        if (statusCode !== undefined) this.#ownReply.code(statusCode)
        this.#ownReply.send(payload)
      }
      return reply
    }
    const watchedThen: FastifyReply['then'] = (fulfilled, rejected) => {
      if (answer.state.at === 'open') this.#wait(fulfilled, rejected)
      else then.call(reply, fulfilled, rejected)
    }
    reply.send = watchedSend
    reply.code = reply.status = watchedCode
    reply.then = watchedThen
  }

  /** Called when Fastify's `handlerTimeout` is over. It counts as a deadline: the handler keeps running. */
  #sendTimeout (error: unknown): FastifyReply {
    if (this.answer.state.at === 'open') this.answer.move({ at: 'late', statusCode: this.#ownStatus })
    return this.#methods.send.call(this.#isLate ? this.replyForRefusal : this.reply, error)
  }

  /** Called when the raw response was ended. @param isAgain whether it had been ended before, as by a refusal */
  #ended (isAgain: boolean): void {
    const { at } = this.answer.state
    if (at === 'late' && isAgain) {
      this.#expectNoReply() // NestJS ends it again if a handler fails
    } else if (at === 'open' && isClosed(this.reply.raw)) {
      if (this.#call === 'returned') this.#wroteItself()
      else this.#endWaits()
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
    if (state.at === 'late' && isAgain) this.#expectNoReply()
    else if (state.at === 'open' && (!this.#isSent || isClosed(raw))) this.#expectNoReply()
    else if (state.at === 'replying' && !raw.writableEnded && !isClosed(raw)) this.answer.move({ ...state, succeeds: never })
  }

  /** Called when no reply is to be expected, and whether the handler has succeeded is not known. It may run again. */
  #expectNoReply (): void {
    this.#expectsNoReply = true
    if (this.#call === 'returned') this.#settle(false)
    else this.#endWaits()
  }

  #isReply (value: unknown): boolean {
    return value === this.#ownReply || value === this.reply
  }

  /** Fulfils, once it shows how the handler ends, what waits for that. Later, because it may throw. */
  #endWaits (): void {
    if (!this.#isAwaited) for (const fulfilled of this.#waiting.splice(0)) queueMicrotask(fulfilled)
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
        if (!succeeded && !this.#isStreaming) this.answer.move({ at: 'cut off', succeeds: false })
        return
      case 'open':
      case 'replying':
        this.statusCode = statusCode
        if (succeeded && !isWhole) return
        // The answer may be that of a hook of the app while the handler still runs. It is recorded once the handler has ended, because a retry
        // must not run the handler while it still runs.
        if (!succeeded && !this.#hasEnded) {
          this.answer.move({ at: 'cut off', succeeds: false })
          return this.#endWaits()
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
    this.answer.move({ at: 'recorded', isLate: this.#isLate })
    this.#endWaits()
    return this.record(succeeded, error)
  }

  /** Sends with the reply, or records what no sender gets, because it shows how the handler ended. */
  #send (payload: unknown): FastifyReply {
    const { answer, reply } = this
    const { at } = answer.state
    if (this.#isLate) return this.#settleUnheard(payload)
    if (at === 'recorded') return this.#sendAgain(payload)
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
    return this.#ownReply
  }

  /** Ignores a second answer, as Fastify does. The first one is recorded, and may still wait for the store, so Fastify would send both. */
  #sendAgain (payload: unknown): FastifyReply {
    const { url, method, log } = this.request
    discard(payload)
    log.warn({ err: new fastify.errorCodes.FST_ERR_REP_ALREADY_SENT(url, method) })
    return this.#ownReply
  }

  #settleUnheard (payload: unknown): FastifyReply {
    const { state } = this.answer
    discard(payload)
    this.#settleOnce(isSuccessful(payload, state.at === 'late' ? state.statusCode : this.#ownStatus), payload instanceof Error ? payload : undefined)
    return this.#ownReply
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
        else if (payload === undefined || this.#isHijacked) this.#settle(this.#isHijacked || !this.#expectsNoReply)
        else if (!this.#isReply(payload)) this.#settleUnheard(payload)
        return
      case 'cut off':
        this.#settle(state.succeeds)
        return
      case 'open':
        if (this.#isSent) this.#wroteItself()
        else if (this.#expectsNoReply) this.#settle(false)
        else if (!this.#isReply(payload)) this.#answerWith(payload)
        else this.reply.raw.once('close', () => { if (this.#isSent) this.#wroteItself() })
    }
  }

  #answerWith (payload: unknown): void {
    try {
      if (payload === undefined) acknowledge(this.#ownReply, 'processed')
      else this.#send(payload)
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
      const shown = isMeant(error) ? error : new HandlerFailed({ cause: new AggregateError([error], 'the route\'s handler failed') })
      markRefused(shown, this.request, this.reply)
      this.#send(shown)
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
  get #isLate (): boolean {
    const { state } = this.answer
    return state.at === 'late' || (state.at === 'recorded' && state.isLate)
  }

  /** Whether nothing shows yet how the handler ends, so that what it sends with `reply` will. */
  get #isAwaited (): boolean {
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

/** `then` of Fastify's replies, which does not wait for the own handler as that of a watched reply does. */
export const plainThen: FastifyReply['then'] = function (this: FastifyReply, ...listeners) { Object.getPrototypeOf(this).then.apply(this, listeners) }

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

/** Whether a payload is a stream of Node or the web, or a Response. */
function isStream (payload: unknown): boolean {
  const { pipe, getReader } = (payload ?? {}) as Partial<Readable & ReadableStream>
  return isResponse(payload) || typeof pipe === 'function' || typeof getReader === 'function'
}

/** Closes a stream that nobody reads. Only what is a stream: `destroy` of a database library deletes a row. */
function discard (payload: unknown): void {
  const stream = (isResponse(payload) ? payload.body : payload) as Partial<Readable & ReadableStream> | null | undefined
  if (typeof stream?.pipe === 'function' && typeof stream.destroy === 'function') {
    stream.on?.('error', () => {})
    stream.destroy()
  } else if (typeof stream?.getReader === 'function') {
    tryOr<unknown>(() => stream.cancel?.(), () => {})
  }
}

/**
 * Whether a thrown error is meant as the answer, because it has a `statusCode`. Any other error is a failure, and the sender must not read its
 * text.
 */
const isMeant = (error: unknown): boolean => isErrorThat(error, ({ statusCode }) => typeof statusCode === 'number')
