import type { IncomingHttpHeaders } from 'node:http'
import { InvalidId, InvalidSignature, InvalidTimestamp, TimestampOutOfTolerance } from '../errors.ts'
import type { Keyring } from '../keyring.ts'
import { isPromise } from '../maybe-promise.ts'
import type { MaybePromise } from '../stores/store.ts'
import type { SignedDelivery, Verified, Verifier } from '../verifiers/verifier.ts'

export interface Verification {
  readonly verifier: Verifier
  readonly keyring: Keyring
  /** Seconds, past and future. */
  readonly tolerance: number
}

/** What the headers alone condemn; runs before the body is read, so that anonymous and stale floods cost no hashing. */
export function checkHeaders ({ verifier, tolerance }: Verification, headers: IncomingHttpHeaders): void {
  if (verifier.checkHeaders === undefined) return
  let timestamp
  try {
    timestamp = verifier.checkHeaders(headers)
  } catch (error) {
    throw toRefusal(error)
  }
  assertNoPromise(timestamp)
  if (typeof timestamp !== 'number' || Number.isNaN(timestamp)) throw new InvalidTimestamp('the timestamp')
  assertFresh(timestamp, tolerance)
}

/**
 * @returns who signed it and when
 * @throws FST_OPENAI_WEBHOOK_INVALID_SIGNATURE and the verifier's other coded errors
 */
export function verify (verification: Verification, delivery: SignedDelivery): MaybePromise<Verified> {
  try {
    return verifyNow(verification, delivery)
  } catch (error) {
    // The secret may have been rotated: ask for it again, if there is somebody to ask.
    const refreshed = error instanceof InvalidSignature ? verification.keyring.refresh() : undefined
    if (refreshed === undefined) throw error
    return refreshed.then(changed => {
      if (!changed) throw error
      return verifyNow(verification, delivery)
    })
  }
}

function verifyNow ({ verifier, keyring, tolerance }: Verification, delivery: SignedDelivery): Verified {
  let verified
  try {
    verified = verifier(delivery, keyring.keys)
  } catch (error) {
    throw toRefusal(error)
  }
  assertNoPromise(verified)
  assertVerified(verified)
  assertFresh(verified.timestamp, tolerance)
  return verified
}

/** What a verifier of the user's throws must be an answer. */
function toRefusal (error: unknown): unknown {
  return isCoded(error) ? error : new InvalidSignature({ cause: error })
}

/** An asynchronous verifier has verified nothing yet; left alone, its rejection would end the process. */
function assertNoPromise (answer: unknown): void {
  if (!isPromise(answer)) return
  answer.then(undefined, () => {})
  throw new InvalidSignature()
}

function assertFresh (timestamp: number, tolerance: number): void {
  if (Math.abs(Date.now() / 1000 - timestamp) > tolerance) throw new TimestampOutOfTolerance('the timestamp', tolerance)
}

/** A verifier of the user's that forgets to throw must not let anything through. */
function assertVerified (verified: unknown): asserts verified is Verified {
  if (typeof verified !== 'object' || verified === null) throw new InvalidSignature()
  const { webhookId, timestamp } = verified as Partial<Verified>
  if (typeof webhookId !== 'string' || webhookId === '') throw new InvalidId()
  if (!Number.isFinite(timestamp)) throw new InvalidTimestamp('the timestamp')
}

function isCoded (error: unknown): boolean {
  const { code, statusCode } = (error ?? {}) as { code?: unknown, statusCode?: unknown }
  return typeof code === 'string' && typeof statusCode === 'number' && statusCode >= 400 && statusCode < 500
}
