import type { Readable } from 'node:stream'
import { tryOr } from '../maybe-promise.ts'
import { isResponse, isSuccess } from '../pipeline/refusal.ts'

// What a handler answers with.

/** Whether an answer with this payload can no longer fail. */
export const isText = (payload: unknown): boolean => typeof payload === 'string' || Buffer.isBuffer(payload) || payload === undefined || payload === null

/** Whether a payload that is sent with this status code is answered 2xx. */
export function isSuccessful (payload: unknown, statusCode: number): boolean {
  if (payload instanceof Error) return false
  return isSuccess(isResponse(payload) ? payload.status : statusCode)
}

/** Whether a payload is a stream of Node or the web, or a Response. */
export function isStream (payload: unknown): boolean {
  const { pipe, getReader } = (payload ?? {}) as Partial<Readable & ReadableStream>
  return isResponse(payload) || typeof pipe === 'function' || typeof getReader === 'function'
}

/** Closes a stream that nobody reads. Only what is a stream: `destroy` of a database library deletes a row. */
export function discard (payload: unknown): void {
  const stream = (isResponse(payload) ? payload.body : payload) as Partial<Readable & ReadableStream> | null | undefined
  if (typeof stream?.pipe === 'function' && typeof stream.destroy === 'function') {
    stream.on?.('error', () => {})
    stream.destroy()
  } else if (typeof stream?.getReader === 'function') {
    tryOr<unknown>(() => stream.cancel?.(), () => {})
  }
}
