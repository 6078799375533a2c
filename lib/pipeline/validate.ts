import { isUtf8 } from 'node:buffer'
import type { FastifyInstance, FastifyRequest } from 'fastify'
import type { TSchema } from '@sinclair/typebox'
import type { TypeCheck } from '@sinclair/typebox/compiler'
import { InvalidBody, InvalidEvent, InvalidOptions } from '../errors.ts'
import { TypeCompiler } from '../typebox.ts'

/** Parses JSON text or throws; refuses `__proto__` and `constructor.prototype` keys. */
export type ParseJson = (text: string) => unknown

/** Fastify's own JSON parser, without its callback: it refuses prototype poisoning. */
export function jsonParser (instance: FastifyInstance): ParseJson {
  const parse = instance.getDefaultJsonParser('error', 'error')
  let failure: Error | null
  let parsed: unknown
  const done = (error: Error | null, body?: unknown): void => {
    failure = error
    parsed = body
  }
  return text => {
    parse(undefined as unknown as FastifyRequest, text, done)
    if (failure !== null) throw failure
    return parsed
  }
}

/** The compiler of one copy of TypeBox: it knows the formats and kinds that were registered with that copy. */
export type Compiler = Pick<typeof TypeCompiler, 'Compile'>

/**
 * What checks the events of each type. Schemas of the user's are compiled at boot, since they may be faulty; ours when the
 * first event of the type comes: all of them would take 7 ms of an app's start.
 */
export class Validators {
  readonly #compiled = new Map<string, TypeCheck<TSchema>>()
  readonly #ours: Readonly<Record<string, TSchema>>

  /** @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS */
  constructor (ours: Readonly<Record<string, TSchema>>, users: Readonly<Record<string, TSchema>>, usersCompiler: Compiler) {
    this.#ours = ours
    for (const [type, schema] of Object.entries(users)) {
      try {
        this.#compiled.set(type, usersCompiler.Compile(schema))
      } catch (cause) {
        // A kind or a reference that this copy of TypeBox has not been told of.
        throw new InvalidOptions(`expected events["${type}"] to be a schema that TypeBox can compile, got: ${(cause as Error).message}`, { cause })
      }
    }
  }

  /** @returns undefined for an unknown type */
  for (type: string): TypeCheck<TSchema> | undefined {
    const compiled = this.#compiled.get(type)
    if (compiled !== undefined || !Object.hasOwn(this.#ours, type)) return compiled
    const made = TypeCompiler.Compile(this.#ours[type]!)
    this.#compiled.set(type, made)
    return made
  }
}

/**
 * @returns the event that the signed bytes hold, or FST_OPENAI_WEBHOOK_INVALID_BODY or FST_OPENAI_WEBHOOK_INVALID_EVENT; an
 * unknown type passes unchecked: OpenAI adds types
 */
export function validate (rawBody: Buffer, parse: ParseJson, validators: Validators): { type: string } | Error {
  const event = toEvent(rawBody, parse)
  if (event instanceof Error) return event
  const validator = validators.for(event.type)
  return validator === undefined || validator.Check(event) ? event : new InvalidEvent(faults(validator, event))
}

function toEvent (rawBody: Buffer, parse: ParseJson): { type: string } | Error {
  if (!isUtf8(rawBody)) return new InvalidBody('UTF-8')
  let body
  try {
    // A byte order mark is not JSON (RFC 8259, section 8.1); some parsers would skip it.
    if (rawBody[0] === 0xef) throw new SyntaxError('byte order mark')
    body = parse(rawBody.toString())
  } catch {
    // The parser's own message may quote the body.
    return new InvalidBody('JSON without a byte order mark or a __proto__ key')
  }
  if (typeof body !== 'object' || body === null || typeof (body as { type?: unknown }).type !== 'string') {
    return new InvalidBody('an object with a string `type`')
  }
  const fault = cannotBeQueued(body, MAX_DEPTH)
  return fault === undefined ? body as { type: string } : new InvalidBody(fault)
}

/**
 * Levels of objects and lists. OpenAI's events are three deep. Whatever writes JSON gives up at some depth, each at another:
 * JSON.stringify at a few thousand, databases at 1,000, loggers and other languages at 100.
 */
const MAX_DEPTH = 100

/**
 * Whether a queue would hand on something else, or nothing: every runner answers alike, and has the same event handled.
 *
 * @returns what was expected
 */
function cannotBeQueued (value: unknown, levels: number): string | undefined {
  // JSON text may hold 1e999, which is Infinity once it is parsed, and null when that is written.
  if (typeof value === 'number') return Number.isFinite(value) ? undefined : 'numbers below 1.8e308'
  if (typeof value !== 'object' || value === null) return undefined
  if (levels === 0) return `at most ${MAX_DEPTH} levels of objects and lists`
  if (Array.isArray(value)) {
    for (const item of value) {
      const fault = cannotBeQueued(item, levels - 1)
      if (fault !== undefined) return fault
    }
    return undefined
  }
  // Half the time of Object.values.
  for (const key in value) {
    const fault = cannotBeQueued((value as Record<string, unknown>)[key], levels - 1)
    if (fault !== undefined) return fault
  }
  return undefined
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
