import type { IncomingHttpHeaders } from 'node:http'
import { isFunction, isObject } from '../checks.ts'
import { InvalidOptions, InvalidSecret, InvalidSignature } from '../errors.ts'
import { assertUnwrapOptions } from '../options.ts'
import type { EndpointOptions } from '../options.ts'
import { toBytes } from '../pipeline/capture.ts'
import { validate } from '../pipeline/validate.ts'
import { signedHeadersOf, verify } from '../pipeline/verify.ts'
import type { Routes } from './routes.ts'

/** Verifies and validates a delivery that did not come through a route. @returns the event; rejects with the coded errors of both steps */
export async function unwrap ({ verifications, authentication }: Routes, rawBody: string | Uint8Array, headers: unknown, overrides: EndpointOptions = {}): Promise<{ type: string }> {
  assertUnwrapOptions(overrides)
  const verification = verifications.of(overrides, false)
  const body = toBytes(rawBody)
  if (body === undefined) throw new InvalidOptions('unwrap(): expected the raw body as a string, a Buffer or a Uint8Array: a parsed body cannot be verified')
  const plain = toHeaders(headers)
  const verified = await verify(verification, { rawBody: body, headers: plain }, signedHeadersOf(verification, plain))
  // Without a key nothing was compared, so the delivery may be genuine.
  if (verified instanceof InvalidSignature && verification.keyring.keys.length === 0) throw new InvalidSecret('unwrap(): the `secret` function has failed, so there is nothing to verify with: the log and onError say why')
  if (verified instanceof Error) throw verified
  const event = validate(body, authentication.validators)
  if (event instanceof Error) throw event
  return event
}

/** With the names in lower case. @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS */
function toHeaders (headers: unknown): IncomingHttpHeaders {
  if (!isObject(headers)) throw new InvalidOptions('unwrap(): expected the headers as an object or a Headers instance')
  const entries: Iterable<[string, unknown]> = isFunction(headers['entries']) ? (headers as unknown as Headers).entries() : Object.entries(headers)
  return Object.fromEntries([...entries].map(([name, value]) => [String(name).toLowerCase(), value])) as IncomingHttpHeaders
}
