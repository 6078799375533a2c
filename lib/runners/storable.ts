/** What PostgreSQL takes: neither U+0000 nor half a character. */
export function storable (text: string): string {
  return text.replaceAll(/[\0\ud800-\udfff]/gu, '\ufffd')
}

/** An error whose text PostgreSQL takes: the same one, where it does. */
export function storableError (error: Error): Error {
  const { message, stack = '' } = error
  if (storable(message + stack) === message + stack) return error
  return Object.assign(new Error(storable(message)), { stack: storable(stack) })
}
