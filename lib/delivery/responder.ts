import type { FastifyInstance, FastifyReply, RouteHandlerMethod } from 'fastify'
import { DeadlineExceeded, Unavailable } from '../errors.ts'
import type { Failures } from '../failures.ts'
import { logError } from '../log.ts'
import { acknowledge, closeConnection, holdTimeout, refuse } from '../pipeline/acknowledge.ts'
import { hasTimedOut, isAnswerHeld, isSuccess } from '../pipeline/refusal.ts'
import type { VerifiedRequest } from '../request.ts'
import { OwnHandler } from './own-handler.ts'
import { plainThen } from './own-replies.ts'
import type { Receiver } from './receive.ts'
import { isClosed, isInjected, sentStatusOf, traceReset } from './raw-response.ts'
import { Answer } from './answer.ts'
import type { Sender, Verdict, Work } from './work.ts'

export interface ResponderOptions {
  readonly receiver: Receiver
  readonly failures: Failures
  /** The route's own handler, which replies. */
  readonly own: RouteHandlerMethod | undefined
}

/** Gives one request its one answer: the delivery's verdict, the own handler's reply, or the deadline's 503. */
export class Responder implements Sender {
  readonly ownHandler: Sender['ownHandler']
  readonly #answer = new Answer()
  /** Set once the own handler has been started. */
  #own: OwnHandler | undefined
  /** The delivery whose verdict this request waits for. */
  #work: Work | undefined
  #timer: NodeJS.Timeout | undefined
  /**
   * Called when the own handler has ended and answers with the raw response, past Fastify. A function that wraps the route's handler may have to
   * continue before that answer can end.
   */
  #onHandedOver: (() => void) | undefined

  constructor (
    readonly request: VerifiedRequest,
    readonly reply: FastifyReply,
    readonly options: ResponderOptions,
    scope: FastifyInstance
  ) {
    const { own } = options
    // Before a refusal, because what the own handler does later depends on whether the response is over.
    if (own !== undefined) traceReset(reply.raw, request.raw)
    this.ownHandler = own && (record => {
      this.#own = new OwnHandler(this.#answer, request, reply, (succeeded, error) => {
        this.#closeConnection()
        return record(succeeded, error)
      }, () => this.#onHandedOver?.())
      this.#own.run(own, scope)
    })
  }

  /** Hands the delivery to the receiver, and answers with its verdict or at the deadline. @param deadline ms that are left */
  run (deadline: number): void {
    this.#work = this.options.receiver.receive(this)
    if (this.#answer.state.at === 'closed') return
    this.#timer = setTimeout(expire, deadline, this)
    // The sender's socket keeps the process alive, and the timer must not do so by itself. An injected request has no socket.
    if (!isInjected(this.reply.raw)) this.#timer.unref()
  }

  /**
   * Resolves once the answer has been sent, the sender is gone, or the own handler leaves the rest of the answer to a function that wraps the
   * route's handler.
   */
  answerSent (): Promise<void> {
    return new Promise((resolve, reject) => {
      const { reply } = this
      const { raw } = reply
      this.#onHandedOver = resolve
      // The own handler still runs and answers by itself.
      if (this.#own?.runs === true && (reply.sent || raw.headersSent) && !raw.writableEnded && !isClosed(raw)) raw.once('close', resolve)
      else if (raw.headersSent) resolve()
      else plainThen.call(reply, resolve, reject)
    })
  }

  tell (verdict: Verdict): void {
    clearTimeout(this.#timer)
    const at = this.#isTimedOut ? 'late' : this.#answer.state.at
    // In the state `recorded`, the own handler has answered.
    if (at !== 'recorded') this.#answer.move({ at: 'closed' })
    if (verdict.outcome === 'refused') {
      const answered = at === 'recorded' ? this.#statusOfOwn : undefined
      if (at === 'open') this.#refuse(verdict.error)
      else if (answered !== undefined && !isSuccess(answered)) this.options.failures.ownFailed(verdict.error, this.request.openaiWebhook, this.request, answered)
      else this.options.failures.late(verdict.error, this.request.openaiWebhook, this.request)
    } else if (at === 'open') {
      this.#send(reply => { acknowledge(reply, verdict.outcome) })
    }
  }

  /** Called when the deadline is over. */
  expired (): void {
    const refusal = this.#work?.state.at === 'claiming' ? new Unavailable() : new DeadlineExceeded()
    const isTimedOut = this.#isTimedOut
    if (this.#own === undefined) this.#answer.move({ at: 'late', statusCode: 200 })
    else if (!this.#own.giveUp()) return
    this.#work?.forgetSender(this)
    if (!isTimedOut) this.#refuse(refusal)
  }

  /** Whether the error of Fastify's `handlerTimeout` is the answer, which has been reported. */
  get #isTimedOut (): boolean { return this.#own === undefined && hasTimedOut(this.request) }

  /** The status of the own handler's answer; `undefined` if the sender gets none. Fastify's `handlerTimeout` may answer while it is recorded. */
  get #statusOfOwn (): number | undefined {
    const { raw } = this.reply
    const { statusCode } = this.#own!
    return statusCode !== undefined && raw.headersSent ? sentStatusOf(raw) : statusCode
  }

  #refuse (error: Error): void {
    this.options.failures.refused(error, this.request.openaiWebhook, this.request)
    if (this.request.routeOptions.handlerTimeout) holdTimeout(this.reply)
    this.#send(reply => { refuse(reply, error) })
  }

  #send (send: (reply: FastifyReply) => void): void {
    const reply = this.#own?.replyForRefusal ?? this.reply
    this.#closeConnection()
    try {
      send(reply)
    } catch (error) {
      this.#unsent(reply, error)
    }
  }

  #unsent (reply: FastifyReply, error: unknown): void {
    if (!isAnswerHeld(error)) {
      try {
        // A serializer of the app has thrown, so its error is the answer, as on any route.
        reply.send(error)
        return
      } catch {}
    }
    // Fastify throws if there is another answer already, such as that of its `handlerTimeout`.
    logError(this.request.log, error, {}, 'the sender of a webhook delivery has another answer')
  }

  /**
   * Closes the connection when the app is closing, because a connection that is kept alive keeps the server open until Fastify's
   * `keepAliveTimeout`, 72 s by default.
   */
  #closeConnection (): void {
    if (this.options.receiver.works.closing && !this.reply.raw.headersSent) closeConnection(this.reply)
  }
}

function expire (responder: Responder): void { responder.expired() }
