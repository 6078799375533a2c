import type { FastifyReply, FastifyRequest } from 'fastify'
import { codeOf, statusOf } from '../coded.ts'

/** Key on a request to a receiving route whose value is the progress of the answer. Absent until the delivery is verified, refused or answered. */
const PROGRESS = Symbol('openai-webhook.progress')

/** `handling`: the plugin answers. `answered`: a hook of the app has answered other than 2xx. */
type Progress = 'handling' | 'acknowledged' | 'answered' | Refusal

interface Refusal {
  statusCode: number
}

type Answerable = FastifyRequest & { [PROGRESS]?: Progress }

export type RouteErrorHandler = (error: unknown, request: FastifyRequest, reply: FastifyReply) => unknown

/** Records that the delivery has been verified, and that the plugin answers from now on. */
export function markHandling (request: FastifyRequest): void {
  (request as Answerable)[PROGRESS] = 'handling'
}

/** Whether the delivery has been verified and given to the plugin's handler, refused, or answered by a hook. Until then Fastify, another plugin or a hook of the app may refuse it. */
export function hasProgress (request: FastifyRequest): boolean {
  return (request as Answerable)[PROGRESS] !== undefined
}

export function markAcknowledged (request: FastifyRequest): void {
  (request as Answerable)[PROGRESS] = 'acknowledged'
}

/**
 * Records that the delivery is refused, whoever sends the answer, so that nothing the app does with the error can turn it into a success. Does
 * nothing after an acknowledgement: an onSend hook that fails then does not undo what the handlers have done.
 */
export function markRefused (error: unknown, request: FastifyRequest, reply: FastifyReply): void {
  markFailed(statusOf(error), request, reply)
}

/** Does the same for a delivery that is answered other than 2xx without an error. */
export function markFailed (statusCode: number, request: Answerable, { raw }: FastifyReply): void {
  const progress = request[PROGRESS]
  if (progress === 'acknowledged') return
  if (typeof progress === 'object') {
    progress.statusCode = statusCode
    return
  }
  const refusal: Refusal = { statusCode }
  request[PROGRESS] = refusal
  // `keepRefusal` alone is not enough: if an onSend hook throws undefined, Fastify skips the onSend hooks after it.
  const writeHead = raw.writeHead as (statusCode: number, ...rest: unknown[]) => typeof raw
  const refusing = (statusCode: number, ...rest: unknown[]): typeof raw =>
    writeHead.call(raw, statusCode < 400 && request[PROGRESS] === refusal ? refusal.statusCode : statusCode, ...rest)
  raw.writeHead = refusing
}

/**
 * Makes a route's error handler. It records that the delivery is refused, and leaves the answer to the error handler that would answer without
 * the plugin.
 *
 * @param own the route's own error handler
 */
export function refuseErrors (own: RouteErrorHandler | undefined): RouteErrorHandler {
  return (error, request, reply) => {
    markRefused(error, request, reply)
    return own === undefined ? passOn(error, reply) : own(error, request, reply)
  }
}

/** Whether the delivery is being refused, or was. */
export function isRefused (request: FastifyRequest): boolean {
  return typeof (request as Answerable)[PROGRESS] === 'object'
}

/** Requests that Fastify's `handlerTimeout` answers while handlers run, once that is reported. */
const timedOut = new WeakSet<FastifyRequest>()

export function markTimedOut (request: FastifyRequest): void { timedOut.add(request) }

export const hasTimedOut = (request: FastifyRequest): boolean => timedOut.has(request)

/** Has Fastify call the next error handler. */
function passOn (error: unknown, reply: FastifyReply): Promise<never> | undefined {
  // Fastify would send a value that is not an Error as the body of a 200. It treats every rejection as an error.
  if (!(error instanceof Error)) return Promise.reject(error)
  reply.send(error)
}

/**
 * Makes an onSend hook, which runs after the app's hooks and keeps an error handler from turning a refusal into a success.
 *
 * @param answeredByHook called when a hook of the app has answered, and thrown no error
 */
export function keepRefusal (answeredByHook: (request: FastifyRequest, statusCode: number) => void) {
  return (request: FastifyRequest, reply: FastifyReply, payload: unknown, done: (error?: null, payload?: unknown) => void): void => {
    const progress = (request as Answerable)[PROGRESS]
    const response = isResponse(payload) ? payload : undefined
    const statusCode = response?.status ?? reply.statusCode
    if (typeof progress !== 'object') {
      if (progress === undefined) {
        // After a 2xx, which is no refusal, a refusal may still have to be reported.
        if (!isSuccess(statusCode)) (request as Answerable)[PROGRESS] = 'answered'
        answeredByHook(request, statusCode)
      }
    } else if (statusCode < 400) {
      if (response !== undefined) return done(null, new Response(response.body, { status: progress.statusCode, headers: response.headers }))
      // Not with reply.code(), which the route's own handler may also call if it is still running.
      reply.raw.statusCode = progress.statusCode
    }
    done()
  }
}

/** Whether the error is the one that Fastify sends when a route's `handlerTimeout` is over. */
export const isHandlerTimeout = (error: unknown): boolean => codeOf(error) === 'FST_ERR_HANDLER_TIMEOUT'

/** Whether an answer was not sent because an async onError hook is running for another answer. Fastify refuses all others until it ends. */
export const isAnswerHeld = (error: unknown): boolean => codeOf(error) === 'FST_ERR_SEND_INSIDE_ONERR'

export const isSuccess = (statusCode: number): boolean => statusCode >= 200 && statusCode < 300

/** Checks the tag as Fastify does, because a Response of the package undici is of another class. */
export function isResponse (payload: unknown): payload is Response {
  return typeof payload === 'object' && Object.prototype.toString.call(payload) === '[object Response]'
}
