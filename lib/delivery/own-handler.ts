import type { FastifyInstance, FastifyReply, FastifyRequest, RouteHandlerMethod } from 'fastify'
import { HandlerFailed } from '../errors.ts'
import { logError } from '../log.ts'
import { isPromise } from '../steps.ts'
import type { MaybePromise } from '../stores/store.ts'
import { acknowledge } from '../pipeline/acknowledge.ts'
import { isClosed, isOut, statusOf, traceAfterReset, watchDestroy } from './raw-response.ts'

/** On a request: told by `onSend` whether the route's own handler answered 2xx. */
const RECORD = Symbol('openai-webhook.record')

/** @param isWhole whether the answer is all there: a stream that fails, or a Response with a status of its own, may still be a failure */
type RecordAnswer = (succeeded: boolean, isWhole: boolean) => MaybePromise<void>

type Recordable = FastifyRequest & { [RECORD]?: RecordAnswer | undefined }

/** onSend: the store hears of the answer before the sender does. */
export function recordAnswer (request: FastifyRequest, reply: FastifyReply, payload: unknown, done: (error?: Error) => void): void {
  const recorded = (request as Recordable)[RECORD]?.(isSuccess(reply.statusCode), isText(payload))
  if (!isPromise<void>(recorded)) return done()
  // What it throws, such as a header that cannot be sent, ends the process where it is nobody's to catch: before 5.11
  // Fastify catches nothing after a hook that was asynchronous.
  const send = (): void => {
    try {
      done()
    } catch (error) {
      done(error as Error)
    }
  }
  recorded.then(send, done)
}

const isSuccess = (statusCode: number): boolean => statusCode >= 200 && statusCode < 300

const isText = (payload: unknown): boolean => typeof payload === 'string' || Buffer.isBuffer(payload) || payload === undefined || payload === null

/** Whether a reply would be answered 2xx. */
function isSuccessful (payload: unknown, statusCode: number): boolean {
  if (payload instanceof Error) return false
  // Fastify goes by the tag: a Response of undici's is of another class.
  const isResponse = Object.prototype.toString.call(payload) === '[object Response]'
  return isSuccess(isResponse ? (payload as Response).status : statusCode)
}

const codeOf = (error: unknown): unknown => (error as { code?: unknown } | null | undefined)?.code

/** An error with a status is an answer; any other is a failure, whose text is not the sender's to read. */
function isMeant (error: unknown): boolean {
  try {
    // Fastify would send any other object as a body, with the status 200.
    return error instanceof Error && typeof (error as { statusCode?: unknown }).statusCode === 'number'
  } catch {
    return false // a getter that throws
  }
}

/**
 * Runs a route's own handler, which replies; where it returns nothing and has not replied, the delivery is acknowledged.
 *
 * @param late whether the deadline has passed already, and the sender been answered
 * @param record told once whether it succeeded: how it answered, or after the deadline how it ended
 * @returns to be called at the deadline; tells whether somebody else may answer, which is not so once it has replied
 */
export function runOwnHandler (
  handler: RouteHandlerMethod,
  scope: FastifyInstance,
  request: FastifyRequest,
  reply: FastifyReply,
  late: boolean,
  record: (succeeded: boolean, error?: unknown) => MaybePromise<void>
): () => boolean {
  let recorded = false
  let thrown: unknown
  let replied = false
  let overdue = late
  /** The status that it replies with after the deadline, when `reply` has that of the refusal. */
  let lateStatus = 200
  let endWait: (() => void) | undefined
  const { raw } = reply
  /** Whether its call has come to an end. */
  let ended = false
  let threwAfterReply = false
  /** Whether the source of its answer has failed. */
  let broken = false
  /** How the answer stands that was cut off before the handler's end. */
  let cutOff: (() => boolean) | undefined

  function recordOnce (succeeded: boolean): MaybePromise<void> {
    if (recorded) return
    recorded = true
    return record(succeeded, thrown)
  }

  /** The answer waits until it is on record, but not beyond the deadline. */
  function recordAnswered (succeeded: boolean, isWhole: boolean): MaybePromise<void> {
    if (succeeded && !isWhole) return watchDestroy(raw, () => { broken = true })
    const recording = recordOnce(succeeded)
    if (!isPromise<void>(recording) || overdue) return
    return new Promise((resolve, reject) => {
      endWait = resolve
      recording.then(resolve, reject)
    })
  }

  /** After the deadline nobody waits for the reply: it tells how the handler ended. */
  function recordLate (payload: unknown): void {
    if (payload instanceof Error) thrown = payload
    recordOnce(isSuccessful(payload, lateStatus))
  }

  function returned (payload: unknown): void {
    ended = true
    if (late) {
      if (payload === undefined) recordOnce(true)
      else if (payload !== reply) recordLate(payload)
    } else if (replied) {
      // Recorded as it is sent, or has been cut off.
      if (cutOff !== undefined) recordOnce(cutOff())
    } else if (reply.sent || raw.headersSent) {
      recordWhenClosed(judgeRaw) // hijacked, or written to the socket
    } else if (payload !== reply) {
      try {
        if (payload === undefined) acknowledge(reply, 'processed')
        else reply.send(payload)
      } catch (error) {
        threw(error) // by a serializer of the user's
      }
    }
  }

  function threw (error: unknown): void {
    ended = true
    if (late) {
      thrown = error
      recordOnce(false)
    } else if (replied || reply.sent) {
      logError(request.log, error, {}, 'a webhook route\'s handler failed after the answer')
      threwAfterReply = true
      recordWhenClosed(judgeRaw)
    } else {
      thrown = error
      reply.send(isMeant(error) ? error : new HandlerFailed({ cause: new AggregateError([error], 'the route\'s handler failed') }))
    }
  }

  /**
   * An answer counts once it is out, as what it is. One that the sender did not wait for is judged by what the handler did:
   * whether it came to its end, and what it had made of the answer.
   */
  function recordWhenClosed (judge: () => boolean): void {
    const closed = (): void => {
      if (isOut(raw)) recordOnce(isSuccess(statusOf(raw)))
      else if (ended) recordOnce(!threwAfterReply && judge())
      else cutOff = judge
    }
    if (isClosed(raw)) closed()
    else raw.once('close', closed)
  }

  /** Of what it has written by itself. */
  function judgeRaw (): boolean {
    return raw.writableEnded && isSuccess(statusOf(raw))
  }

  /** Somebody else answers, or has answered. */
  function leave (): void {
    late = true
    // A 2xx can only be the handler's own: it was faster than hooks that hold the refusal.
    ;(request as Recordable)[RECORD] = (succeeded, isWhole) => succeeded && isWhole ? recordOnce(true) : undefined
    const { code } = reply
    reply.code = reply.status = function (status: number): FastifyReply {
      if (!reply.sent) return code.call(reply, status)
      lateStatus = status
      return reply
    }
  }

  // An async onSend hook delays `reply.sent`; whether the handler has replied must be known at once.
  const send = reply.send
  reply.send = function (payload?: unknown): FastifyReply {
    if (late && reply.sent) {
      recordLate(payload)
      return reply
    }
    const isFirst = !late && !replied
    if (isFirst && codeOf(payload) === 'FST_ERR_HANDLER_TIMEOUT') {
      // Fastify's `handlerTimeout` is a deadline too: the handler runs on.
      lateStatus = reply.statusCode
      leave()
    } else if (isFirst) {
      replied = true
    }
    const succeeds = isSuccessful(payload, reply.statusCode)
    try {
      send.call(reply, payload)
    } catch (error) {
      // While an async onError hook holds somebody else's answer, Fastify refuses all others.
      if ((late || isFirst) && codeOf(error) === 'FST_ERR_SEND_INSIDE_ONERR') {
        recordLate(payload)
        return reply
      }
      if (isFirst) replied = false // a serializer of the user's has thrown: nothing is on its way
      throw error
    }
    // An onSend hook that fails keeps the answer from being recorded as it is sent.
    if (isFirst && !late) recordWhenClosed(() => succeeds && !broken && isSuccess(raw.statusCode))
    return reply
  }
  traceAfterReset(raw)
  if (late) leave()
  else (request as Recordable)[RECORD] = recordAnswered

  let result
  let pending = false
  try {
    result = handler.call(scope, request, reply)
    pending = isPromise(result) // reads its `then`, which may be a getter
  } catch (error) {
    threw(error)
  }
  if (pending && result !== (reply as unknown)) Promise.resolve(result).then(returned, threw)
  else returned(result)

  return () => {
    overdue = true
    endWait?.()
    if (replied || late || reply.sent || raw.headersSent) return false
    lateStatus = reply.statusCode
    leave()
    return true
  }
}
