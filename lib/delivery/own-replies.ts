import type { FastifyReply } from 'fastify'
import { isHandlerTimeout } from '../pipeline/refusal.ts'
import type { Answer } from './answer.ts'
import { standIn } from './stand-in.ts'

/** The run of an own handler, as its replies see it. */
export interface RepliedRun {
  readonly answer: Answer
  /** Whether the answer does not come from the handler. */
  readonly isLate: boolean
  /** Whether nothing shows yet how the handler ends, so that what it sends with `reply` will. */
  readonly isAwaited: boolean
  /** Whether the handler's answer is recorded or on its way, so that what the handler sends now is a second one. */
  readonly hasAnswered: boolean
  /** Called with what the handler sends. */
  send (payload: unknown): FastifyReply
  /** Called with the error of Fastify's `handlerTimeout`. */
  sendTimeout (error: unknown): void
  /** Called when the handler has hijacked the reply. */
  hijacked (): void
  /** Called when somebody has replied, and it is not known whether that was the handler. */
  expectNoReply (): void
}

/**
 * The replies of one run of a route's own handler. Three tell apart who replies: the handler gets one of its own, a refusal is sent with another
 * one, which error handlers get, and both stand for the one that hooks have had before. What comes with that one after the deadline is the
 * handler's too, because it has kept it.
 */
export class OwnReplies {
  /** The reply that the handler gets. Whatever does not show how the handler ends is done with the reply that it stands for. */
  readonly own: FastifyReply
  #forRefusal: FastifyReply | undefined
  /** The reply's methods before they are watched. */
  readonly #methods: Pick<FastifyReply, 'send' | 'code' | 'status' | 'then'>
  /** Fulfil the promises that wait for `reply` although the response is over, such as that of an async handler that has returned `reply`. */
  readonly #waiting: Array<() => void> = []

  /** @param reply the one that hooks have */
  constructor (readonly run: RepliedRun, readonly reply: FastifyReply) {
    const { send, code, status, then } = reply
    this.#methods = { send, code, status, then }
    this.own = this.#makeOwn()
  }

  /** The reply to send a refusal with, so that nothing that hooks and error handlers do with it is taken for the handler's answer. */
  get forRefusal (): FastifyReply {
    this.#forRefusal ??= standIn(this.reply, { methods: this.#methods })
    return this.#forRefusal
  }

  isOne (value: unknown): boolean {
    return value === this.own || value === this.reply
  }

  /** Sends with the reply that hooks have, unwatched. */
  sendUnwatched (payload: unknown): void {
    this.#methods.send.call(this.reply, payload)
  }

  /** Fulfils, once it shows how the handler ends, what waits for that. Later, because it may throw. */
  endWaits (): void {
    if (!this.run.isAwaited) for (const fulfilled of this.#waiting.splice(0)) queueMicrotask(fulfilled)
  }

  #makeOwn (): FastifyReply {
    const { run, reply } = this
    const { answer } = run
    const send = (payload: unknown): FastifyReply => {
      try {
        return run.send(payload)
      } finally {
        this.endWaits()
      }
    }
    const code = (statusCode: number): FastifyReply => {
      const { state } = answer
      // The refusal keeps its status.
      if (state.at === 'late') answer.move({ ...state, statusCode: Number(statusCode) })
      else if (!run.hasAnswered) reply.code(statusCode)
      return this.own
    }
    const hijack = (): FastifyReply => {
      reply.hijack()
      run.hijacked()
      return this.own
    }
    const then = (fulfilled: () => void, rejected: (error: Error) => void): Promise<unknown> => this.#wait(fulfilled, rejected)
    return standIn(reply, {
      methods: { send, code, status: code, hijack, then },
      sent: () => run.isLate || run.hasAnswered ? !run.isAwaited : undefined,
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
        if (this.run.isAwaited) this.#waiting.push(go)
        else go()
      }, failed as (error: Error) => void)
    })
  }

  /**
   * Watches the reply that hooks have, because the handler may have kept it, or use a function that a hook has made of it. Before there is an
   * answer, whoever replies counts as the handler. Once a refusal is out, nobody else has anything left to send. While it is on its way, a hook
   * may answer too, and then Fastify decides.
   */
  watch (): void {
    const { run, reply } = this
    const { answer } = run
    const { send, code, then } = this.#methods
    // The answer of others is sent with this reply too if it had begun before, or if a hook has replaced `send` by a function of this reply.
    const isShared = run.isLate || Object.hasOwn(reply, 'send')
    const isRefusalOut = (): boolean => run.isLate && reply.raw.headersSent
    let statusCode: number | undefined
    const watchedCode = (given: number): FastifyReply => {
      if (!isRefusalOut()) return code.call(reply, given)
      statusCode = given
      return reply
    }
    const watchedSend = (payload: unknown): FastifyReply => {
      if (isHandlerTimeout(payload)) {
        run.sendTimeout(payload)
      } else if (answer.state.at === 'open') {
        run.send(payload)
      } else if (!isRefusalOut()) {
        return send.call(reply, payload)
      } else if (isShared) {
        run.expectNoReply() // it may be an error handler's second answer
      } else {
        if (statusCode !== undefined) this.own.code(statusCode)
        this.own.send(payload)
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
}

/** `then` of Fastify's replies, which does not wait for the own handler as that of a watched reply does. */
export const plainThen: FastifyReply['then'] = function (this: FastifyReply, ...listeners) { Object.getPrototypeOf(this).then.apply(this, listeners) }
