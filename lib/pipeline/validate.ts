import { isUtf8 } from 'node:buffer'
import { InvalidBody, InvalidEvent } from '../errors.ts'
import type { Validators } from './validators.ts'

/**
 * Makes an event of the signed bytes. An unknown type passes unchecked, since OpenAI adds types.
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
    // The user's own, so it is for the log alone.
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
    // The parser's own message may quote the body.
    return new InvalidBody(CLEAN_JSON)
  }
  if (typeof body !== 'object' || body === null || typeof (body as { type?: unknown }).type !== 'string') {
    return new InvalidBody('an object with a string `type`')
  }
  const fault = faultIn(body, MAX_DEPTH)
  return fault === undefined ? body as { type: string } : new InvalidBody(fault)
}

// A byte order mark is not JSON (RFC 8259, section 8.1). A `constructor` with a `prototype` in it is refused by the same text.
const CLEAN_JSON = 'JSON, and no byte order mark or __proto__ key in it'

/**
 * Levels of objects and lists. OpenAI's events have three. Writers of JSON give up at different depths: JSON.stringify at a few
 * thousand, databases at 1,000, loggers and other languages at 100.
 */
const MAX_DEPTH = 100

/**
 * Finds what no handler should meet, such as keys that poison prototypes where they are copied (as Fastify's own parser does), and
 * what a queue could not hand on as it is. Refused whatever the runner, so that all answer alike.
 *
 * @returns what was expected; `undefined` where there is no fault
 */
function faultIn (value: unknown, levels: number): string | undefined {
  // 1e999 in JSON text is Infinity once parsed, and null when written again.
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
  // Takes half the time of Object.values.
  for (const key in value) {
    const held: unknown = (value as Record<string, unknown>)[key]
    if (key === '__proto__' || (key === 'constructor' && isPrototyped(held))) return CLEAN_JSON
    const fault = faultIn(held, levels - 1)
    if (fault !== undefined) return fault
  }
  return undefined
}

const isPrototyped = (value: unknown): boolean => typeof value === 'object' && value !== null && Object.hasOwn(value, 'prototype')
