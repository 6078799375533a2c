import { assertUnwrapOptions } from '../options.ts'
import type { EndpointOptions } from '../options.ts'
import { toBuffer, toHeaders } from '../pipeline/capture.ts'
import { headerFault } from '../pipeline/verify.ts'
import type { Routes } from './routes.ts'

/** Verifies and validates a delivery that came through no route. @returns the event; rejects with the coded errors of both steps */
export async function unwrap ({ verifications, authentication }: Routes, rawBody: string | Uint8Array, headers: unknown, overrides: EndpointOptions = {}): Promise<{ type: string }> {
  assertUnwrapOptions(overrides)
  const verification = verifications.of(overrides, false)
  const body = toBuffer(rawBody)
  const plain = toHeaders(headers)
  const fault = headerFault(verification, plain)
  if (fault !== undefined) throw fault
  const authentic = await authentication.verify(verification, plain, body)
  if (authentic instanceof Error) throw authentic
  if (authentic.event instanceof Error) throw authentic.event
  return authentic.event
}
