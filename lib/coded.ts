import type { FastifyErrorConstructor } from '@fastify/error'
import { isPromise } from './maybe-promise.ts'

/** The status with which Fastify's own error handler answers an error. */
export function statusOf (error: unknown): number {
  const { statusCode, status } = Object(error) as { statusCode?: unknown, status?: unknown }
  return isErrorStatus(statusCode) ? statusCode : isErrorStatus(status) ? status : 500
}

const isErrorStatus = (status: unknown): status is number => typeof status === 'number' && status >= 400 && status <= 599

export const codeOf = (error: unknown): unknown => (error as { code?: unknown } | null | undefined)?.code

/** The code of all errors of one class. */
export const codeOfClass = (CodedError: FastifyErrorConstructor): string => new CodedError().code

/** Whether an error is one of our coded errors, which are sent as they are. */
export function isCoded (error: unknown): error is Error {
  try {
    const { code } = error as { code?: unknown }
    // Fastify would send any other object as a body, with the status 200.
    return error instanceof Error && typeof code === 'string' && code.startsWith('FST_OPENAI_WEBHOOK_')
  } catch {
    return false // null, or a getter that throws
  }
}

/** Whether an error is one of ours after which a retry may succeed soon. */
export function isTemporary (error: unknown): boolean {
  return isCoded(error) && [409, 503].includes(statusOf(error))
}

/** The code of a delivery that a hook of the app has answered without an error. Not one of ours, because no step of the plugin has refused it. */
export const BY_A_HOOK = 'ANSWERED_BY_A_HOOK'

/** Whether an error that a user's verifier has thrown may be sent as it is. */
export function isRefusal (error: unknown): error is Error {
  try {
    const { code, statusCode } = error as { code?: unknown, statusCode?: unknown }
    // Fastify would await an error that has a `then`.
    return error instanceof Error && !isPromise(error) && typeof code === 'string' && typeof statusCode === 'number' && statusCode >= 400 && statusCode < 500
  } catch {
    return false // null, or a getter that throws
  }
}
