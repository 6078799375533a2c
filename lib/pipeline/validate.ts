import { isUtf8 } from 'node:buffer'
import type { FastifyInstance, FastifyRequest } from 'fastify'
import { InvalidBody, InvalidEvent } from '../errors.ts'
import type { Validators } from './validators.ts'

/** Parses JSON text or throws; refuses `__proto__` and `constructor.prototype` keys. */
export type ParseJson = (text: string) => unknown

/** Fastify's own JSON parser, which refuses prototype poisoning, without its callback. */
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

/**
 * Makes an event of the signed bytes. An unknown type passes unchecked, since OpenAI adds types.
 *
 * @returns the event, or FST_OPENAI_WEBHOOK_INVALID_BODY or FST_OPENAI_WEBHOOK_INVALID_EVENT
 */
export function validate (rawBody: Buffer, parse: ParseJson, validators: Validators): { type: string } | Error {
  const event = toEvent(rawBody, parse)
  if (event instanceof Error) return event
  let faults
  try {
    faults = validators.for(event.type)?.(event)
  } catch (thrown) {
    // The user's own, so it is for the log alone.
    return new InvalidEvent('its schema failed', { cause: thrown instanceof Error ? thrown : new Error('a schema threw what is no Error') })
  }
  return faults === undefined ? event : new InvalidEvent(faults)
}

function toEvent (rawBody: Buffer, parse: ParseJson): { type: string } | Error {
  if (!isUtf8(rawBody)) return new InvalidBody('UTF-8')
  let body
  try {
    // A byte order mark is not JSON (RFC 8259, section 8.1), but some parsers skip it.
    if (rawBody[0] === 0xef) throw new SyntaxError('byte order mark')
    body = parse(rawBody.toString())
  } catch {
    // The parser's own message may quote the body.
    return new InvalidBody('JSON, and no byte order mark or __proto__ key in it')
  }
  if (typeof body !== 'object' || body === null || typeof (body as { type?: unknown }).type !== 'string') {
    return new InvalidBody('an object with a string `type`')
  }
  const fault = cannotBeQueued(body, MAX_DEPTH)
  return fault === undefined ? body as { type: string } : new InvalidBody(fault)
}

/**
 * Levels of objects and lists. OpenAI's events have three. Writers of JSON give up at different depths: JSON.stringify at a few
 * thousand, databases at 1,000, loggers and other languages at 100.
 */
const MAX_DEPTH = 100

/**
 * Finds what a queue could not hand on as it is. Refused whatever the runner, so that all answer alike.
 *
 * @returns what was expected; `undefined` where there is no fault
 */
function cannotBeQueued (value: unknown, levels: number): string | undefined {
  // 1e999 in JSON text is Infinity once parsed, and null when written again.
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
  // Takes half the time of Object.values.
  for (const key in value) {
    const fault = cannotBeQueued((value as Record<string, unknown>)[key], levels - 1)
    if (fault !== undefined) return fault
  }
  return undefined
}
