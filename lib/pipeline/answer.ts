import { AsyncLocalStorage, AsyncResource } from 'node:async_hooks'
import type { FastifyReply, FastifyRequest } from 'fastify'
import { statusOf } from '../coded.ts'
import { isPromise } from '../steps.ts'

/** On a request of a receiving route: how far its answer has come. Absent: nothing but hooks of the app has run. */
const STANDING = Symbol('openai-webhook.standing')

/** `replying`: the route has a handler of its own, which may answer. */
type Standing = 'handling' | 'replying' | 'acknowledged' | Refusal

interface Refusal {
  readonly statusCode: number
  /** Whether the route's own handler may still answer in its place: it can be faster than hooks that hold a refusal. */
  readonly isContested: boolean
}

type Standable = FastifyRequest & { [STANDING]?: Standing }

export type RouteErrorHandler = (error: unknown, request: FastifyRequest, reply: FastifyReply) => unknown

/**
 * Whatever is sent in here, an error handler sends. Entered only where a handler may answer too, since it makes every promise
 * cost more. Holds the request weakly: timers keep the context that they were set in, such as node:http's for its Date header.
 */
const errorHandlers = new AsyncLocalStorage<WeakRef<FastifyRequest>>()

/** The delivery has been verified: what is answered from here on, the plugin or the route's own handler answers. */
export function handling (request: FastifyRequest, ownHandler: boolean): void {
  (request as Standable)[STANDING] = ownHandler ? 'replying' : 'handling'
}

export function acknowledged (request: FastifyRequest): void {
  (request as Standable)[STANDING] = 'acknowledged'
}

/**
 * A route's error handler that remembers that the delivery is refused, and leaves the answer to whoever would have given
 * it on a plain route.
 *
 * @param own the route's own
 */
export function refuseErrors (own: RouteErrorHandler | undefined): RouteErrorHandler {
  return (error, request, reply) => {
    const standing = (request as Standable)[STANDING]
    // An onSend hook that fails on an acknowledgement does not undo what the handlers have done.
    if (standing !== 'acknowledged') refuseWith({ statusCode: statusOf(error), isContested: standing === 'replying' }, request, reply)
    const answer = (): unknown => own === undefined ? passOn(error, reply) : own(error, request, reply)
    return standing === 'replying' ? contested(answer, request, reply) : answer()
  }
}

/** As Fastify asks an error handler, but so that what is sent can be told from what the route's own handler sends. */
function contested (answer: () => unknown, request: FastifyRequest, reply: FastifyReply): unknown {
  return errorHandlers.run(new WeakRef(request), () => {
    try {
      const result = answer()
      if (isPromise<unknown>(result)) return { then: AsyncResource.bind(result.then.bind(result)) }
      if (result !== undefined) reply.send(result)
    } catch (thrown) {
      reply.send(thrown)
    }
  })
}

function refuseWith (refusal: Refusal, request: Standable, { raw }: FastifyReply): void {
  request[STANDING] = refusal
  // An onSend hook that throws undefined has Fastify skip those that come after it.
  const writeHead = raw.writeHead as (statusCode: number, ...rest: unknown[]) => typeof raw
  raw.writeHead = (statusCode: number, ...rest: unknown[]) =>
    writeHead.call(raw, statusCode < 400 && request[STANDING] === refusal ? refusal.statusCode : statusCode, ...rest)
}

/** To the error handler that comes next. */
function passOn (error: unknown, reply: FastifyReply): PromiseLike<never> | undefined {
  // To send what is no Error would answer 200 with it; a rejection is an error whatever it is.
  if (!(error instanceof Error)) return rejected(error)
  reply.send(error)
}

/** Rejects at once, where a promise would have Fastify wait. */
function rejected (reason: unknown): PromiseLike<never> {
  return { then (_resolve, reject) { return reject!(reason) as never } }
}

/**
 * onSend, after the app's: what an error handler makes of a refusal is not a success.
 *
 * @param unprocessed told of a hook of the app that answers 2xx by itself
 */
export function keepRefusal (unprocessed: (request: FastifyRequest, statusCode: number) => void) {
  return (request: FastifyRequest, reply: FastifyReply, payload: unknown, done: (error?: null, payload?: unknown) => void): void => {
    const standing = (request as Standable)[STANDING]
    const response = isResponse(payload) ? payload : undefined
    const statusCode = response?.status ?? reply.statusCode
    if (typeof standing !== 'object') {
      if (standing === undefined && isSuccess(statusCode)) unprocessed(request, statusCode)
    } else if (standing.isContested && errorHandlers.getStore()?.deref() !== request) {
      handling(request, true)
    } else if (statusCode < 400) {
      if (response !== undefined) return done(null, new Response(response.body, { status: standing.statusCode, headers: response.headers }))
      reply.code(standing.statusCode)
    }
    done()
  }
}

const isSuccess = (statusCode: number): boolean => statusCode >= 200 && statusCode < 300

/** Fastify goes by the tag: a Response of undici's is of another class. */
function isResponse (payload: unknown): payload is Response {
  return Object.prototype.toString.call(payload) === '[object Response]'
}
