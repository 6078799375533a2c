import type { KeyObject } from 'node:crypto'
import type { IncomingHttpHeaders } from 'node:http'
import { isSendable } from '../coded.ts'
import { InvalidId, InvalidSignature, InvalidTimestamp, TimestampOutOfTolerance } from '../errors.ts'
import type { Keys } from '../verifiers/keyring.ts'
import { isStray } from '../maybe-promise.ts'
import type { MaybePromise } from '../maybe-promise.ts'
import { schemeOf } from '../verifiers/verifier.ts'
import type { SignedDelivery, SignedHeaders, Verified, Verifier } from '../verifiers/verifier.ts'

export interface Verification {
  readonly verifier: Verifier
  /** `undefined` if a user's verifier has no `checkHeaders`. */
  readonly readHeaders: ((headers: IncomingHttpHeaders) => SignedHeaders | Error) | undefined
  /** @param signed what `readHeaders` returned */
  readonly judge: (delivery: SignedDelivery, signed: SignedHeaders | undefined, keys: readonly KeyObject[]) => Verified | Error
  readonly keyring: Keys
  /** Seconds by which the timestamp may differ from this server's clock, past and future. */
  readonly tolerance: number
}

export function verificationBy (verifier: Verifier, keyring: Keys, tolerance: number): Verification {
  const { readHeaders, judge } = schemeOf(verifier) ?? usersScheme(verifier)
  return { verifier, readHeaders, judge, keyring, tolerance }
}

function usersScheme (verifier: Verifier): Pick<Verification, 'readHeaders' | 'judge'> {
  const { checkHeaders } = verifier
  return {
    readHeaders: checkHeaders && (headers => answerOf(() => checkHeaders(headers), toSigned)),
    judge: (delivery, _signed, keys) => answerOf(() => verifier(delivery, keys), toVerified)
  }
}

/**
 * Reads the headers alone, before the body is read, so that a flood of requests without headers or with old ones costs no hashing.
 *
 * @returns what `verify` needs of them; or the coded error that refuses the request
 */
export function signedHeadersOf ({ readHeaders, tolerance }: Verification, headers: IncomingHttpHeaders): SignedHeaders | undefined | Error {
  const signed = readHeaders?.(headers)
  return signed === undefined || signed instanceof Error ? signed : staleness(signed.timestamp, tolerance) ?? signed
}

/**
 * @param signed what `signedHeadersOf` returned
 * @returns the webhook-id and when the delivery was signed; or FST_OPENAI_WEBHOOK_INVALID_SIGNATURE,
 * FST_OPENAI_WEBHOOK_TIMESTAMP_OUT_OF_TOLERANCE or another coded error of the verifier
 */
export function verify (verification: Verification, delivery: SignedDelivery, signed: SignedHeaders | undefined | Error): MaybePromise<Verified | Error> {
  if (signed instanceof Error) return signed
  const verified = verifyNow(verification, delivery, signed)
  if (!(verified instanceof InvalidSignature)) return verified
  // The secret may have been rotated, so a secret function is called again.
  const refreshed = verification.keyring.refresh()
  return refreshed === undefined ? verified : refreshed.then(changed => changed ? verifyNow(verification, delivery, signed) : verified)
}

function verifyNow ({ judge, keyring, tolerance }: Verification, delivery: SignedDelivery, signed: SignedHeaders | undefined): Verified | Error {
  const verified = judge(delivery, signed, keyring.keys)
  return verified instanceof Error ? verified : staleness(verified.timestamp, tolerance) ?? verified
}

/** Calls a user's verifier, which may either throw or return its error. */
function answerOf<Asked, Answer> (ask: () => Asked | Error, checked: (asked: Asked) => Answer | Error): Answer | Error {
  try {
    const answer = ask()
    // A promise has verified nothing yet.
    if (isStray(answer)) return faulty('a promise: a verifier answers at once')
    return answer instanceof Error ? toRefusal(answer) : checked(answer)
  } catch (error) {
    return toRefusal(error)
  }
}

/** A user's verifier may throw anything. Unless it is a coded error with a 4xx status, the sender gets INVALID_SIGNATURE. */
function toRefusal (error: unknown): Error {
  return isSendable(error) ? error : new InvalidSignature({ cause: error })
}

/** The sender gets the same answer as a forger. The log gets the cause, as it does when a verifier throws by mistake. */
function faulty (got: string): Error {
  return new InvalidSignature({ cause: new TypeError(`expected the verifier to return { webhookId, timestamp }, got ${got}`) })
}

function toSigned (timestamp: unknown): SignedHeaders | Error {
  return typeof timestamp === 'number' && !Number.isNaN(timestamp) ? { timestamp } : new InvalidTimestamp('the timestamp')
}

/** Checks the result, because a user's verifier that forgets to throw must not let a delivery through. */
function toVerified (verified: Verified): Verified | Error {
  if (typeof verified !== 'object' || verified === null) return faulty(verified === null ? 'null' : typeof verified)
  const { webhookId, timestamp, keyIndex } = verified as Partial<Verified>
  if (typeof webhookId !== 'string' || webhookId === '') return new InvalidId()
  if (timestamp === undefined || !Number.isFinite(timestamp)) return new InvalidTimestamp('the timestamp')
  return { webhookId, timestamp, ...(keyIndex !== undefined && { keyIndex }) }
}

function staleness (timestamp: number, tolerance: number): Error | undefined {
  const ahead = timestamp - Date.now() / 1000
  // Tests `<=` instead of `>`, so that NaN is refused.
  if (Math.abs(ahead) <= tolerance) return undefined
  return new TimestampOutOfTolerance('the timestamp', tolerance, `${Math.round(Math.abs(ahead))} s ${ahead < 0 ? 'behind' : 'ahead'}`)
}
