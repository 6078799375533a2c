import type { FastifyInstance, FastifyReply, FastifyRequest, RouteHandlerMethod } from 'fastify'
import type { Deadline, Expirable } from './deadline.ts'
import { logError, logFields } from './log.ts'
import { acknowledge, refuse } from './pipeline/acknowledge.ts'
import { respond } from './pipeline/respond.ts'
import type { Receiver } from './receive.ts'
import type { Refused } from './registry.ts'
import type { Outcome, Record, Sender } from './run.ts'
import type { VerifiedRequest } from './types.ts'

export interface ExchangeOptions {
  readonly endpoint: string
  readonly receiver: Receiver
  readonly deadline: Deadline
  /** Logs and tells that the delivery is not answered 200. */
  readonly refuse: (error: unknown, delivery: Refused, request: FastifyRequest) => void
  /** Tells of a failure that came after the answer. */
  readonly report: (error: unknown, delivery: Refused, request: FastifyRequest) => void
  /** The route's own handler, which replies. */
  readonly own: RouteHandlerMethod | undefined
}

/** One request and its one answer: by the delivery's end, by the route's own handler, or at the deadline. */
export class Exchange implements Sender, Expirable {
  readonly respond: Sender['respond']
  leave: Sender['leave'] = undefined
  expiresAt = 0
  earlier: Expirable | undefined = undefined
  later: Expirable | undefined = undefined
  #answered = false
  #over = false
  #late = false
  /** Tells the route's own handler that it is too late, and whether somebody else may answer. */
  #giveUp: (() => boolean) | undefined = undefined

  constructor (
    readonly request: VerifiedRequest,
    readonly reply: FastifyReply,
    readonly options: ExchangeOptions,
    scope: FastifyInstance
  ) {
    const { own } = options
    this.respond = own && (record => { this.#respond(own, scope, record) })
  }

  run (): void {
    const { receiver, deadline, endpoint } = this.options
    receiver.receive(endpoint, this.request.openaiWebhook, this)
    if (!this.#over) deadline.start(this)
  }

  succeeded (outcome: Outcome): void {
    this.#end()
    if (this.#answered) return
    this.#answered = true
    this.#closeConnection()
    this.#reply(() => { acknowledge(this.reply, outcome) })
  }

  failed (error: unknown): void {
    this.#end()
    this.#refuse(error)
  }

  expired (): void {
    if (this.#giveUp?.() === false) return
    this.#late = true
    this.leave?.()
    const { receiver, endpoint } = this.options
    this.#refuse(receiver.lateness(endpoint, this.request.openaiWebhook))
  }

  #end (): void {
    this.#over = true
    this.options.deadline.stop(this)
  }

  #refuse (error: unknown): void {
    const { endpoint, refuse: tell, report } = this.options
    const { webhookId, event } = this.request.openaiWebhook
    const delivery = { endpoint, webhookId, event }
    if (this.#answered) {
      const { cause = error, message } = error as Error
      logError(this.request.log, cause, logFields(delivery), message)
      return report(error, delivery, this.request)
    }
    tell(error, delivery, this.request)
    this.#answered = true
    this.#closeConnection()
    this.#reply(() => { refuse(this.reply, error) })
  }

  /** Fastify throws where somebody else is answering already, such as its `handlerTimeout`. */
  #reply (send: () => void): void {
    try {
      send()
    } catch (error) {
      logError(this.request.log, error, {}, 'the sender of a webhook delivery has another answer')
    }
  }

  /** What is kept alive keeps a closing server open until its own timeout, 72 s by default. */
  #closeConnection (): void {
    if (this.options.receiver.closing && !this.reply.raw.headersSent) this.reply.header('connection', 'close')
  }

  #respond (own: RouteHandlerMethod, scope: FastifyInstance, record: Record): void {
    this.#giveUp = respond(own, scope, this.request, this.reply, this.#late, (succeeded, error) => {
      this.#answered = true
      this.#closeConnection()
      return record(succeeded, error)
    })
  }
}
