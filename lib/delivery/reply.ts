import type { FastifyInstance, FastifyReply, RouteHandlerMethod } from 'fastify'
import { DeadlineExceeded, Unavailable } from '../errors.ts'
import type { Failures } from '../failures.ts'
import { logError } from '../log.ts'
import { acknowledge, refuse } from '../pipeline/acknowledge.ts'
import type { Refused } from '../registry.ts'
import type { VerifiedRequest } from '../request.ts'
import type { Deadline, Expirable } from '../deadline.ts'
import { runOwnHandler } from './own-handler.ts'
import type { Receiver } from './receive.ts'
import type { Sender, Verdict, Work } from './work.ts'

export interface ReplyOptions {
  readonly endpoint: string
  readonly receiver: Receiver
  readonly deadline: Deadline
  readonly failures: Failures
  /** The route's own handler, which replies. */
  readonly own: RouteHandlerMethod | undefined
}

/**
 * How a request stands: `open` until it is answered; `late` where the deadline has answered it, `replied` where the route's
 * own handler has, and the delivery goes on; `over` with the delivery's verdict.
 */
type Standing = 'open' | 'late' | 'replied' | 'over'

/** One request and its one answer: the delivery's verdict, the own handler's reply, or the deadline's 503. */
export class Reply implements Sender, Expirable {
  readonly ownHandler: Sender['ownHandler']
  expiresAt = 0
  earlier: Expirable | undefined = undefined
  later: Expirable | undefined = undefined
  #standing: Standing = 'open'
  /** What it waits for. */
  #work: Work | undefined = undefined
  /** Tells the own handler that it is too late. @returns whether somebody else may answer */
  #giveUp: (() => boolean) | undefined = undefined

  constructor (
    readonly request: VerifiedRequest,
    readonly reply: FastifyReply,
    readonly options: ReplyOptions,
    scope: FastifyInstance
  ) {
    const { own } = options
    this.ownHandler = own && (record => {
      this.#giveUp = runOwnHandler(own, scope, request, reply, this.#standing === 'late', (succeeded, error) => {
        if (this.#standing === 'open') {
          this.#standing = 'replied'
          this.#closeConnection()
        }
        return record(succeeded, error)
      })
    })
  }

  /** Has the delivery received, and answers by its verdict or by the deadline. */
  run (): void {
    const { receiver, deadline, endpoint } = this.options
    this.#work = receiver.receive(endpoint, this)
    // An own handler may have replied; what it has replied is yet to be recorded.
    if (this.#standing === 'open' || this.#standing === 'replied') deadline.start(this)
  }

  tell (verdict: Verdict): void {
    const isOpen = this.#standing === 'open'
    this.#standing = 'over'
    this.options.deadline.stop(this)
    if (verdict.outcome === 'refused') {
      if (isOpen) this.#refuse(verdict.error)
      else this.options.failures.late(verdict.error, this.#delivery, this.request)
    } else if (isOpen) {
      this.#send(() => { acknowledge(this.reply, verdict.outcome) })
    }
  }

  expired (): void {
    if (this.#giveUp?.() === false) return
    this.#standing = 'late'
    this.#work?.leave(this)
    this.#refuse(this.#work?.state.at === 'claiming' ? new Unavailable() : new DeadlineExceeded())
  }

  get #delivery (): Refused {
    const { webhookId, event } = this.request.openaiWebhook
    return { endpoint: this.options.endpoint, webhookId, event }
  }

  #refuse (error: Error): void {
    this.options.failures.refused(error, this.#delivery, this.request)
    this.#send(() => { refuse(this.reply, error) })
  }

  #send (send: () => void): void {
    this.#closeConnection()
    try {
      send()
    } catch (error) {
      // Fastify throws where somebody else is answering already, such as its `handlerTimeout`.
      logError(this.request.log, error, {}, 'the sender of a webhook delivery has another answer')
    }
  }

  /** What is kept alive keeps a closing server open until its own timeout, 72 s by default. */
  #closeConnection (): void {
    if (this.options.receiver.works.closing && !this.reply.raw.headersSent) this.reply.header('connection', 'close')
  }
}
