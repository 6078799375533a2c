import { errorOf } from './handler-failures.ts'

/** Replaces what PostgreSQL refuses in a text: U+0000 and lone surrogates. */
export function storable (text: string): string {
  return text.replaceAll(/[\0\ud800-\udfff]/gu, '\ufffd')
}

/** @returns an error whose message and stack PostgreSQL accepts: `error` itself if it accepts those already */
export function storableError (error: Error): Error {
  const { message, stack = '' } = error
  if (storable(message + stack) === message + stack) return error
  return errorOf(storable(message), storable(stack))
}
