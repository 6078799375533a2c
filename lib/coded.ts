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

/**
 * Whether a thrown value is an Error that has these fields. Fastify would send any other object as a body, with the status 200.
 *
 * @param has reads the fields, any of which may be a getter that throws
 */
export function isErrorThat (error: unknown, has: (error: Error & { code?: unknown, statusCode?: unknown }) => boolean): error is Error {
  try {
    return error instanceof Error && has(error)
  } catch {
    return false
  }
}

/** Whether an error is one of our coded errors, which are sent as they are. */
export const isCoded = (error: unknown): error is Error =>
  isErrorThat(error, ({ code }) => typeof code === 'string' && code.startsWith('FST_OPENAI_WEBHOOK_'))

/** Whether an error is one of ours after which a retry may succeed soon. */
export function isTemporary (error: unknown): boolean {
  return isCoded(error) && [409, 503].includes(statusOf(error))
}

/** The code of a delivery that a hook of the app has answered without an error. Not one of ours, because no step of the plugin has refused it. */
export const BY_A_HOOK = 'ANSWERED_BY_A_HOOK'

/** Whether an error that a user's verifier has thrown may be sent as it is. */
export const isSendable = (error: unknown): error is Error => isErrorThat(error, error =>
  // Fastify would await an error that has a `then`.
  !isPromise(error) && typeof error.code === 'string' && typeof error.statusCode === 'number' && error.statusCode >= 400 && error.statusCode < 500)
