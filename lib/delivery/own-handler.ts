import type { FastifyInstance, FastifyReply, FastifyRequest, RouteHandlerMethod } from 'fastify'
import { codeOf } from '../coded.ts'
import { HandlerFailed } from '../errors.ts'
import { logError, write } from '../log.ts'
import { acknowledge } from '../pipeline/acknowledge.ts'
import { isAnswerHeld, isInErrorHandler, isRefusedByFastify, isResponse, isSuccess, markHandling, markRefused } from '../pipeline/answer.ts'
import { isPromise, later } from '../maybe-promise.ts'
import type { MaybePromise } from '../maybe-promise.ts'
import { isClosed, isOut, sentStatusOf, traceReset, watchDestroy } from './raw-response.ts'
import type { ReplyState, Standing } from './standing.ts'
import type { RecordEnd } from './work.ts'

/** On a request: its route's own handler, once that has been started. */
const STARTED = Symbol('openai-webhook.own-handler')

type Started = FastifyRequest & { [STARTED]?: OwnHandler }

/** onSend: the store hears of an own handler's answer before the sender does. */
export function recordAnswer (request: FastifyRequest, reply: FastifyReply, payload: unknown, done: (error?: Error) => void): void {
  const recorded = (request as Started)[STARTED]?.answers(isSuccessful(payload, reply.statusCode), isText(payload))
  if (!isPromise<void>(recorded)) return done()
  // `done` may throw, over a header that cannot be sent. Before 5.11 Fastify catches nothing after an asynchronous hook, so
  // that would end the process.
  const send = (): void => {
    try {
      done()
    } catch (error) {
      done(error as Error)
    }
  }
  recorded.then(send, done)
}

/**
 * One run of a route's own handler, which replies. Where it returns nothing and has not replied, the delivery is
 * acknowledged. It is recorded once: how it answered, or after the deadline how it ended.
 */
export class OwnHandler {
  readonly #standing: Standing
  readonly #request: FastifyRequest
  readonly #reply: FastifyReply
  readonly #record: RecordEnd
  readonly #handOver: () => void
  /** The status that the reply had before. */
  readonly #givenStatus: number
  /** Fastify's own `reply.send`. */
  readonly #sendPlainly: FastifyReply['send']
  /** `begins`: it is being called, and whatever is sent is its own. `runs`: it has returned a promise. */
  #call: 'begins' | 'runs' | 'returned' | 'threw' = 'begins'
  /** What it threw in place of an answer. */
  #thrown: unknown
  /** The plugin or Fastify sends the error that the deadline is over. */
  #isRefusing = false
  /** That error. Nobody but error handlers has it. */
  #refusal: unknown
  /** What is sent now goes through error handlers, which send again. */
  #isPassing = false
  /** Somebody else had answered before it was called. */
  #isAnswered = false

  /** @param handOver called once it has ended and answers past Fastify */
  constructor (standing: Standing, request: FastifyRequest, reply: FastifyReply, record: RecordEnd, handOver: () => void) {
    this.#standing = standing
    this.#request = request
    this.#reply = reply
    this.#record = record
    this.#handOver = handOver
    this.#givenStatus = reply.statusCode
    this.#sendPlainly = reply.send
  }

  run (handler: RouteHandlerMethod, scope: FastifyInstance): void {
    const reply = this.#reply
    ;(this.#request as Started)[STARTED] = this
    // An async onSend hook delays `reply.sent`; whether the handler has replied must be known at once.
    const send = (payload: unknown): FastifyReply => this.#send(payload)
    reply.send = send
    traceReset(reply.raw, this.#request.raw)
    if (this.#standing.state.at === 'late') this.#divertStatus()
    // A hook of the app has answered, or Fastify's `handlerTimeout`, while other handlers ran.
    else if (this.#isSent) {
      this.#isAnswered = true
      this.#becomeLate(200)
    }
    let result
    let pending
    try {
      result = handler.call(scope, this.#request, reply)
      pending = isPromise(result) // reads its `then`, which may be a getter
    } catch (error) {
      return this.#threw(error)
    }
    if (pending && result !== (reply as unknown)) {
      this.#call = 'runs'
      later(result as Promise<unknown>, payload => this.#returned(payload), error => this.#threw(error))
      return
    }
    if (result === undefined && handler.length > 1 && this.#standing.state.at === 'open' && !this.#isSent) warnOnce(handler, this.#request)
    this.#returned(result)
  }

  /** The deadline is over. @returns whether somebody else may answer, which is not so once the handler has replied */
  giveUp (): boolean {
    const { state } = this.#standing
    if (state.at === 'recorded') state.release?.()
    else if (state.at === 'replying') this.#standing.move({ ...state, isOverdue: true })
    else if (state.at === 'open' && !this.#isSent) {
      this.#becomeLate()
      return true
    }
    return false
  }

  /** Has the refusal sent, by others than the handler. */
  refuse (send: () => void): void {
    this.#isRefusing = true
    try {
      send()
    } finally {
      this.#isRefusing = false
    }
  }

  /**
   * An answer is about to leave: the handler's, or somebody else's.
   *
   * @param isWhole whether nothing can go wrong any more. A stream may fail, and a Response has a status of its own
   */
  answers (succeeded: boolean, isWhole: boolean): MaybePromise<void> {
    const { state } = this.#standing
    switch (state.at) {
      case 'open':
      case 'replying':
      case 'cut off':
        if (succeeded && !isWhole) return watchDestroy(this.#reply.raw, () => this.#broke())
        // It may be a hook of the app that answers so. A retry must not have the handler run beside itself.
        if (!succeeded && this.#call === 'runs') return this.#standing.move({ at: 'cut off', judge: failure })
        return this.#settleBeforeAnswer(succeeded, state.at === 'replying' && state.isOverdue)
    }
  }

  /** The answer waits until it is on record, but not beyond the deadline. */
  #settleBeforeAnswer (succeeded: boolean, isOverdue: boolean): MaybePromise<void> {
    const recording = this.#settle(succeeded)
    if (!isPromise<void>(recording) || isOverdue) return
    return new Promise((resolve, reject) => {
      this.#standing.move({ at: 'recorded', release: resolve })
      recording.then(resolve, reject)
    })
  }

  #settle (succeeded: boolean, error = this.#thrown): MaybePromise<void> {
    this.#standing.move({ at: 'recorded' })
    return this.#record(succeeded, error)
  }

  /** In place of `reply.send`. */
  #send (payload: unknown): FastifyReply {
    const standing = this.#standing
    const reply = this.#reply
    const { at } = standing.state
    if (codeOf(payload) === 'FST_ERR_HANDLER_TIMEOUT' && (at === 'open' || at === 'late')) return this.#timeOut(payload)
    if (at === 'late') return this.#sendLate(standing.state, payload)
    const succeeds = isSuccessful(payload, reply.statusCode)
    if (at === 'open') standing.move({ at: 'replying', judge: () => succeeds && isSuccess(reply.raw.statusCode), isOverdue: false })
    try {
      this.#sendPlainly.call(reply, payload)
    } catch (error) {
      if ((at === 'open' || at === 'cut off') && isAnswerHeld(error)) return this.#settleUnheard(payload)
      // A serializer of the app has thrown: nothing is on its way.
      if (at === 'open') standing.move({ at: 'open' })
      throw error
    }
    // An onSend hook that fails keeps the answer from being recorded as it is sent.
    if (at === 'open') this.#awaitClose()
    return reply
  }

  /** Fastify's `handlerTimeout` is a deadline too: the handler runs on. */
  #timeOut (error: unknown): FastifyReply {
    if (this.#standing.state.at === 'open') this.#becomeLate()
    try {
      this.refuse(() => { this.#sendPlainly.call(this.#reply, error) })
    } catch {
      // An async onError hook holds somebody else's answer. Fastify's timer has nobody who would catch this.
    }
    return this.#reply
  }

  /** The sender gets a refusal, by whoever sends first. An own handler that sends is recorded. */
  #sendLate (state: Late, payload: unknown): FastifyReply {
    if (this.#isRefusing) this.#refusal ??= payload
    if (this.#isOfErrorHandlers(payload)) return this.#sendRefusal(state, payload)
    return this.#isOwn(state) ? this.#settleUnheard(payload) : this.#sendUnsure(state, payload)
  }

  /** Whether an error handler sends this, or is to be given it. */
  #isOfErrorHandlers (payload: unknown): boolean {
    return this.#call !== 'begins' && (this.#isPassing || payload === this.#refusal || isInErrorHandler(this.#request))
  }

  #sendRefusal (state: Late, payload: unknown): FastifyReply {
    // What was sent before was the own handler's.
    if (state.unsure !== undefined && !this.#isPassing) this.#settleOnce(state.unsure.succeeded)
    else if (!(payload instanceof Error)) this.#standing.move({ ...state, isRefused: true })
    return this.#pass(payload)
  }

  /** Whether what no error handler is known to send is the own handler's for sure: it is being called, or error handlers have done their part. */
  #isOwn ({ isRefused, unsure }: Late): boolean {
    return this.#call === 'begins' || isRefused === true || isRefusedByFastify(this.#request) || this.#reply.sent || unsure?.isError === false
  }

  /** By the own handler, or by an error handler that has lost the async context: what comes next tells. */
  #sendUnsure (state: Late, payload: unknown): FastifyReply {
    const succeeded = state.unsure?.succeeded !== false && isSuccessful(payload, state.statusCode)
    this.#standing.move({ ...state, unsure: { succeeded, isError: payload instanceof Error } })
    try {
      return this.#pass(payload)
    } catch (error) {
      if (!isAnswerHeld(error)) throw error
      this.#standing.move(state)
      return this.#settleUnheard(payload)
    }
  }

  #pass (payload: unknown): FastifyReply {
    const outer = this.#isPassing
    this.#isPassing = true
    try {
      return this.#sendPlainly.call(this.#reply, payload)
    } finally {
      this.#isPassing = outer
    }
  }

  /** Nobody waits for this reply: it tells how the handler ended. */
  #settleUnheard (payload: unknown): FastifyReply {
    const { state } = this.#standing
    const late = state.at === 'late' ? state : undefined
    this.#settleOnce(late?.unsure?.succeeded !== false && isSuccessful(payload, late?.statusCode ?? this.#ownStatus), payload instanceof Error ? payload : undefined)
    return this.#reply
  }

  /**
   * What is sent first counts. A failure that is sent while the handler runs, by itself or by a hook of the app, does so once it has
   * ended: a retry must not run it beside itself.
   */
  #settleOnce (succeeded: boolean, error?: unknown): void {
    const { state } = this.#standing
    if (state.at === 'cut off' || (state.at === 'late' && state.failed !== undefined)) return
    if (succeeded || this.#call !== 'runs') this.#settle(succeeded, error)
    else this.#standing.move(state.at === 'late' ? { ...state, failed: { error } } : { at: 'cut off', judge: failure })
  }

  #returned (payload: unknown): void {
    const { state } = this.#standing
    this.#call = 'returned'
    switch (state.at) {
      case 'late':
        if (state.failed !== undefined) this.#settle(false, state.failed.error)
        else if (payload === undefined) this.#settle(state.unsure?.succeeded !== false)
        else if (payload !== this.#reply) this.#settleUnheard(payload)
        // It returns a reply that somebody else had sent before: nothing more will tell how it ended.
        else if (this.#isAnswered) this.#settle(false)
        return
      case 'cut off':
        this.#settle(state.judge())
        return
      case 'open':
        if (this.#isSent) this.#wroteItself()
        else if (payload !== this.#reply) this.#answerWith(payload)
    }
  }

  #answerWith (payload: unknown): void {
    try {
      if (payload === undefined) acknowledge(this.#reply, 'processed')
      else this.#reply.send(payload)
    } catch (error) {
      this.#threw(error) // by a serializer of the app
    }
  }

  #threw (error: unknown): void {
    const { at } = this.#standing.state
    this.#call = 'threw'
    if (at === 'late') {
      this.#settle(false, error)
    } else if (at === 'open' && !this.#reply.sent) {
      this.#thrown = error
      markHandling(this.#request, false)
      const shown = isMeant(error) ? error : new HandlerFailed({ cause: new AggregateError([error], 'the route\'s handler failed') })
      markRefused(shown, this.#request, this.#reply)
      this.#reply.send(shown)
    } else {
      logError(this.#request.log, error, {}, 'a webhook route\'s handler failed after the answer')
      if (at === 'cut off') this.#settle(false)
      else this.#wroteItself()
    }
  }

  /** The status that it has set, while somebody else's error has one of its own. */
  get #ownStatus (): number {
    return this.#reply.statusCode === this.#givenStatus ? 200 : this.#reply.statusCode
  }

  /** Whether it has hijacked the reply or written to the socket. */
  get #isSent (): boolean {
    return this.#reply.sent || this.#reply.raw.headersSent
  }

  #wroteItself (): void {
    const { raw } = this.#reply
    if (this.#standing.state.at !== 'open') return
    this.#standing.move({ at: 'replying', judge: () => raw.writableEnded && isSuccess(sentStatusOf(raw)), isOverdue: false })
    this.#awaitClose()
    this.#handOver()
  }

  /**
   * An answer counts once it is out, by its status. One that the sender did not wait for is judged by what the handler did:
   * whether it came to its end, and what it had made of the answer.
   */
  #awaitClose (): void {
    const { raw } = this.#reply
    const closed = (): void => {
      const { state } = this.#standing
      if (state.at !== 'replying') return
      const left = isOut(raw)
      const judge = left ? () => isSuccess(sentStatusOf(raw)) : state.judge
      const hasEnded = this.#call === 'returned' || this.#call === 'threw'
      if (!hasEnded && !(left && judge())) this.#standing.move({ at: 'cut off', judge })
      else this.#settle((left || this.#call === 'returned') && judge())
    }
    if (isClosed(raw)) closed()
    else raw.once('close', closed)
  }

  /** The source of its answer has failed. */
  #broke (): void {
    const { state } = this.#standing
    if (state.at === 'replying') this.#standing.move({ ...state, judge: failure })
  }

  /** Somebody else answers. @param statusCode that the handler has set so far */
  #becomeLate (statusCode = this.#reply.statusCode): void {
    this.#standing.move({ at: 'late', statusCode })
    this.#divertStatus()
  }

  /** The status of a sent refusal stays; the handler's own tells how it ended. */
  #divertStatus (): void {
    const reply = this.#reply
    const { code } = reply
    const divert = (statusCode: number): FastifyReply => {
      const { state } = this.#standing
      if (state.at !== 'late' || this.#isRefusing || this.#isPassing || isInErrorHandler(this.#request)) return reply.sent ? reply : code.call(reply, statusCode)
      this.#standing.move({ ...state, statusCode })
      return reply.sent || state.isRefused === true || isRefusedByFastify(this.#request) ? reply : code.call(reply, statusCode)
    }
    reply.code = reply.status = divert
  }
}

const warned = new WeakSet<RouteHandlerMethod>()

/** Elsewhere such a handler may answer whenever it likes. Here to return nothing is an answer. */
function warnOnce (handler: RouteHandlerMethod, { log, routeOptions: { url } }: FastifyRequest): void {
  if (warned.has(handler)) return
  warned.add(handler)
  write(log, 'warn', { url }, 'the handler of a webhook route is not async, takes reply and has returned nothing without a reply, so the delivery is acknowledged now: return reply where it replies later')
}

const failure = (): boolean => false

const isText = (payload: unknown): boolean => typeof payload === 'string' || Buffer.isBuffer(payload) || payload === undefined || payload === null

/** Whether a reply would be answered 2xx. */
function isSuccessful (payload: unknown, statusCode: number): boolean {
  if (payload instanceof Error) return false
  return isSuccess(isResponse(payload) ? payload.status : statusCode)
}

type Late = Extract<ReplyState, { at: 'late' }>

/** An error with a status is an answer; any other is a failure, whose text is not the sender's to read. */
function isMeant (error: unknown): boolean {
  try {
    // Fastify would send any other object as a body, with the status 200.
    return error instanceof Error && typeof (error as { statusCode?: unknown }).statusCode === 'number'
  } catch {
    return false // a getter that throws
  }
}
