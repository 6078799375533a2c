import { isUtf8 } from 'node:buffer'
import type { TSchema } from '@sinclair/typebox'
import type { TypeCheck, TypeCompiler } from '@sinclair/typebox/compiler'
import { InvalidBody, InvalidEvent, InvalidOptions } from '../errors.ts'

export type Validators = ReadonlyMap<string, TypeCheck<TSchema>>

/** Parses JSON text or throws; refuses `__proto__` and `constructor.prototype` keys. */
export type ParseJson = (text: string) => unknown

/** The compiler of one copy of TypeBox: it knows the formats and kinds that were registered with that copy. */
export type Compiler = Pick<typeof TypeCompiler, 'Compile'>

/** @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS */
export function compileValidators (schemas: Readonly<Record<string, TSchema>>, compiler: Compiler): Validators {
  return new Map(Object.entries(schemas).map(([type, schema]) => {
    try {
      return [type, compiler.Compile(schema)]
    } catch (cause) {
      // A kind or a reference that this copy of TypeBox has not been told of.
      throw new InvalidOptions(`expected events["${type}"] to be a schema that TypeBox can compile, got: ${(cause as Error).message}`, { cause })
    }
  }))
}

/**
 * The event that the signed bytes hold. An unknown type passes unchecked: OpenAI adds types.
 *
 * @throws FST_OPENAI_WEBHOOK_INVALID_BODY, FST_OPENAI_WEBHOOK_INVALID_EVENT
 */
export function validate (rawBody: Buffer, parse: ParseJson, validators: Validators): { type: string } {
  const event = toEvent(rawBody, parse)
  const validator = validators.get(event.type)
  if (validator !== undefined && !validator.Check(event)) throw new InvalidEvent(faults(validator, event))
  return event
}

function toEvent (rawBody: Buffer, parse: ParseJson): { type: string } {
  if (!isUtf8(rawBody)) throw new InvalidBody('UTF-8')
  let body
  try {
    // A byte order mark is not JSON (RFC 8259, section 8.1); some parsers would skip it.
    if (rawBody[0] === 0xef) throw new SyntaxError('byte order mark')
    body = parse(rawBody.toString())
  } catch {
    // The parser's own message may quote the body.
    throw new InvalidBody('JSON without a byte order mark or a __proto__ key')
  }
  if (typeof body !== 'object' || body === null || typeof (body as { type?: unknown }).type !== 'string') {
    throw new InvalidBody('an object with a string `type`')
  }
  return body as { type: string }
}

const MAX_FAULTS = 5
const MAX_LENGTH = 400

/** Paths and what was expected there; TypeBox's messages hold nothing of the value. */
function faults (validator: TypeCheck<TSchema>, event: unknown): string {
  const found = new Map<string, string>()
  for (const { path, message } of validator.Errors(event)) {
    if (!found.has(path)) found.set(path, `${path} (${message})`)
    if (found.size === MAX_FAULTS) break
  }
  return [...found.values()].join(', ').slice(0, MAX_LENGTH)
}
