import { isUtf8 } from 'node:buffer'
import { isObject } from '../checks.ts'
import { InvalidBody, InvalidEvent } from '../errors.ts'
import type { Validators } from './validators.ts'

/**
 * Turns the signed bytes into an event. An event of an unknown type passes unchecked, because OpenAI adds types.
 *
 * @returns the event, or FST_OPENAI_WEBHOOK_INVALID_BODY or FST_OPENAI_WEBHOOK_INVALID_EVENT
 */
export function validate (rawBody: Buffer, validators: Validators): { type: string } | Error {
  const event = toEvent(rawBody)
  if (event instanceof Error) return event
  let faults
  try {
    faults = validators.for(event.type)?.(event)
  } catch (thrown) {
    // The user's schema threw the error, so it goes to the log only.
    return new InvalidEvent(event.type, 'its schema failed', { cause: thrown instanceof Error ? thrown : new Error('a schema threw what is no Error') })
  }
  return faults === undefined ? event : new InvalidEvent(event.type, faults)
}

function toEvent (rawBody: Buffer): { type: string } | Error {
  if (!isUtf8(rawBody)) return new InvalidBody('UTF-8')
  let body: unknown
  try {
    body = JSON.parse(rawBody.toString())
  } catch {
    // Without the parser's message, which may quote the body.
    return new InvalidBody(CLEAN_JSON)
  }
  if (!isObject(body) || typeof body['type'] !== 'string') return new InvalidBody('an object with a string `type`')
  const fault = faultIn(body, MAX_DEPTH)
  return fault === undefined ? body as { type: string } : new InvalidBody(fault)
}

// A sender must not add a byte order mark to JSON (RFC 8259, section 8.1). A `constructor` that contains a `prototype` is refused with the same
// text.
const CLEAN_JSON = 'JSON, and no byte order mark or __proto__ key in it'

/**
 * Maximum nesting of objects and lists. OpenAI's events have at most four levels. JSON writers fail at different depths: JSON.stringify at a few
 * thousand, databases at 1,000, loggers and other languages at 100.
 */
const MAX_DEPTH = 100

/**
 * Finds what no handler should get, such as keys that poison a prototype when they are copied (Fastify's own parser refuses them too), and
 * what a queue could not pass on unchanged. The check is the same for every runner, so that all of them give the same answer.
 *
 * @returns what was expected; `undefined` if there is no fault
 */
function faultIn (value: unknown, levels: number): string | undefined {
  // JSON.parse() turns 1e999 into Infinity, and JSON.stringify() turns that into null.
  if (typeof value === 'number') return Number.isFinite(value) ? undefined : 'numbers below 1.8e308'
  if (typeof value !== 'object' || value === null) return undefined
  if (levels === 0) return `at most ${MAX_DEPTH} levels of objects and lists`
  if (Array.isArray(value)) {
    for (const item of value) {
      const fault = faultIn(item, levels - 1)
      if (fault !== undefined) return fault
    }
    return undefined
  }
  // for...in takes half the time of Object.values().
  for (const key in value) {
    const held: unknown = (value as Record<string, unknown>)[key]
    if (key === '__proto__' || (key === 'constructor' && isPrototyped(held))) return CLEAN_JSON
    const fault = faultIn(held, levels - 1)
    if (fault !== undefined) return fault
  }
  return undefined
}

const isPrototyped = (value: unknown): boolean => typeof value === 'object' && value !== null && Object.hasOwn(value, 'prototype')
