import { AsyncLocalStorage } from 'node:async_hooks'
import type { FastifyReply, FastifyRequest } from 'fastify'
import { inContext } from '../async-context.ts'
import { codeOf, statusOf } from '../coded.ts'
import { isPromise } from '../maybe-promise.ts'

/** On a request of a receiving route: how far its answer has come. Absent until the delivery is verified: only hooks of the app have run. */
const PROGRESS = Symbol('openai-webhook.progress')

/** `handling`: the plugin answers. `replying`: so may the route's own handler. */
type Progress = 'handling' | 'replying' | 'acknowledged' | Refusal

interface Refusal {
  statusCode: number
  /** Whether Fastify's own error handler has it, which answers at once. */
  isByFastify: boolean
  /** Whether the route's own handler may be sending too. */
  readonly isReplying: boolean
}

type Answerable = FastifyRequest & { [PROGRESS]?: Progress }

export type RouteErrorHandler = (error: unknown, request: FastifyRequest, reply: FastifyReply) => unknown

/**
 * Whatever is sent in here, an error handler sends. Entered only where the route's own handler may send too, since it makes every
 * promise cost more. Holds the request weakly: timers keep the context that they were set in, such as node:http's for its Date header.
 */
const errorHandlers = new AsyncLocalStorage<WeakRef<FastifyRequest>>()

/**
 * Notes that the delivery has been verified: from here on the plugin answers.
 *
 * @param ownHandler whether the route's own handler may answer too
 */
export function markHandling (request: FastifyRequest, ownHandler: boolean): void {
  (request as Answerable)[PROGRESS] = ownHandler ? 'replying' : 'handling'
}

export function markAcknowledged (request: FastifyRequest): void {
  (request as Answerable)[PROGRESS] = 'acknowledged'
}

/**
 * Notes that the delivery is refused, whoever gives the answer: nothing that the app does with the error makes a success of it. An onSend hook
 * that fails on an acknowledgement does not undo what the handlers have done.
 *
 * @param isByFastify whether Fastify's own error handler has the error
 */
export function markRefused (error: unknown, request: Answerable, { raw }: FastifyReply, isByFastify = false): void {
  const progress = request[PROGRESS]
  if (progress === 'acknowledged') return
  const statusCode = statusOf(error)
  if (typeof progress === 'object') {
    progress.statusCode = statusCode
    progress.isByFastify = isByFastify
    return
  }
  const refusal: Refusal = { statusCode, isByFastify, isReplying: progress === 'replying' }
  request[PROGRESS] = refusal
  // An onSend hook that throws undefined has Fastify skip those that come after it.
  const writeHead = raw.writeHead as (statusCode: number, ...rest: unknown[]) => typeof raw
  const refusing = (statusCode: number, ...rest: unknown[]): typeof raw =>
    writeHead.call(raw, statusCode < 400 && request[PROGRESS] === refusal ? refusal.statusCode : statusCode, ...rest)
  raw.writeHead = refusing
}

/**
 * A route's error handler that notes that the delivery is refused, and has the answer given by whoever would give it on a plain
 * route.
 *
 * @param own the route's own
 */
export function refuseErrors (own: RouteErrorHandler | undefined): RouteErrorHandler {
  return (error, request, reply) => {
    markRefused(error, request, reply, own === undefined && hasNoErrorHandler(request))
    const progress = (request as Answerable)[PROGRESS]
    const answer = (): unknown => own === undefined ? passOn(error, reply) : own(error, request, reply)
    return typeof progress === 'object' && progress.isReplying ? inErrorHandlers(answer, request, reply) : answer()
  }
}

/** Calls an error handler as Fastify does, within `errorHandlers`, so that what it sends can be told from what the own handler sends. */
function inErrorHandlers (answer: () => unknown, request: FastifyRequest, reply: FastifyReply): unknown {
  return errorHandlers.run(new WeakRef(request), () => {
    try {
      const result = answer()
      if (isPromise<unknown>(result)) return { then: inContext(result.then.bind(result)) }
      if (result !== undefined) reply.send(result)
    } catch (thrown) {
      reply.send(thrown)
    }
  })
}

/** Whether Fastify's own error handler has the refusal, so that it is on its way, whatever hooks do with it. */
export function isRefusedByFastify (request: FastifyRequest): boolean {
  const progress = (request as Answerable)[PROGRESS]
  return typeof progress === 'object' && progress.isByFastify
}

/** Fastify does not export its own error handler. Where it has another name, the refusal counts as an app's. */
function hasNoErrorHandler ({ server }: FastifyRequest): boolean {
  return server.errorHandler.name === 'defaultErrorHandler'
}

/** Whether whoever sends now is an error handler. One that has lost the async context cannot be told. */
export function isInErrorHandler (request: FastifyRequest): boolean {
  return errorHandlers.getStore()?.deref() === request
}

/** Has Fastify call the next error handler. */
function passOn (error: unknown, reply: FastifyReply): PromiseLike<never> | undefined {
  // Sending what is no Error would answer 200 with it. A rejection counts as an error whatever it is.
  if (!(error instanceof Error)) return rejected(error)
  reply.send(error)
}

/** A thenable that rejects at once. A promise would reject a turn later. */
function rejected (reason: unknown): PromiseLike<never> {
  return { then (_resolve, reject) { return reject!(reason) as never } }
}

/**
 * onSend, after the app's hooks: an error handler cannot make a success of a refusal.
 *
 * @param unprocessed called where a hook of the app answers 2xx by itself
 */
export function keepRefusal (unprocessed: (request: FastifyRequest, statusCode: number) => void) {
  return (request: FastifyRequest, reply: FastifyReply, payload: unknown, done: (error?: null, payload?: unknown) => void): void => {
    const progress = (request as Answerable)[PROGRESS]
    const response = isResponse(payload) ? payload : undefined
    const statusCode = response?.status ?? reply.statusCode
    if (typeof progress !== 'object') {
      if (progress === undefined && isSuccess(statusCode)) unprocessed(request, statusCode)
    } else if (statusCode < 400) {
      if (response !== undefined) return done(null, new Response(response.body, { status: progress.statusCode, headers: response.headers }))
      // Not by reply.code(), which an own handler that runs on may be calling too.
      reply.raw.statusCode = progress.statusCode
    }
    done()
  }
}

/** Whether an answer could not be sent because an async onError hook holds another one: Fastify refuses all others meanwhile. */
export const isAnswerHeld = (error: unknown): boolean => codeOf(error) === 'FST_ERR_SEND_INSIDE_ONERR'

export const isSuccess = (statusCode: number): boolean => statusCode >= 200 && statusCode < 300

/** Fastify goes by the tag: a Response of undici's is of another class. */
export function isResponse (payload: unknown): payload is Response {
  return typeof payload === 'object' && Object.prototype.toString.call(payload) === '[object Response]'
}
