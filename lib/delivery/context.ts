import type { FastifyBaseLogger } from 'fastify'
import { REMEMBER } from '../inbox/inbox.ts'
import { logFields } from '../log.ts'
import type { EventContext } from '../handlers.ts'
import type { VerifiedRequest } from '../request.ts'
import type { Work } from './work.ts'

/** The second argument of a handler. */
export class Context implements EventContext {
  readonly webhookId: string
  readonly timestamp: number
  readonly endpoint: string
  declare readonly tenant?: string
  declare readonly request?: VerifiedRequest
  readonly #work: Work
  readonly #parentLog: FastifyBaseLogger
  #log: FastifyBaseLogger | undefined

  constructor (work: Work, log: FastifyBaseLogger, readonly signal: AbortSignal) {
    const { job, sender } = work
    this.webhookId = job.webhookId
    this.timestamp = job.timestamp
    this.endpoint = job.endpoint
    if (job.tenant !== undefined) this.tenant = job.tenant
    this.#work = work
    this.#parentLog = sender?.request.log ?? log
    if (sender !== undefined) this.request = sender.request
  }

  /** Called by an inbox that a handler uses. */
  [REMEMBER] (handler: string, retention: number): void {
    this.#work.remember(handler, retention)
  }

  /** Created at first use, because a child logger costs more than the dispatch. */
  get log (): FastifyBaseLogger {
    this.#log ??= this.#parentLog.child(logFields(this.#work.job, this.#work.attempt))
    return this.#log
  }
}
