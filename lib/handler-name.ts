import { InvalidOptions } from './errors.ts'

/** Key of a handler's property for its name, which is the same wherever it is registered. All copies of the package in a process share it. */
const NAME = Symbol.for('fastify-openai-webhook.handlerName')

/** @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS */
export function assertHandlerName (caller: string, name: unknown): asserts name is string {
  // PostgreSQL stores no U+0000.
  if (typeof name === 'string' && name !== '' && name.length <= 128 && !name.includes('\0')) return
  throw new InvalidOptions(`${caller}(): expected \`name\` to be a string of 1 to 128 characters, none of them U+0000`)
}

export function giveName<Fn extends object> (handler: Fn, name: string): Fn {
  return Object.defineProperty(handler, NAME, { value: name })
}

export function givenName (handler: object): string | undefined {
  return (handler as { [NAME]?: string })[NAME]
}
