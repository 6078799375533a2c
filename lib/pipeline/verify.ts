import type { IncomingHttpHeaders } from 'node:http'
import { isRefusal } from '../coded.ts'
import { InvalidId, InvalidSignature, InvalidTimestamp, TimestampOutOfTolerance } from '../errors.ts'
import type { Keys } from '../verifiers/keyring.ts'
import { isPromise } from '../maybe-promise.ts'
import type { MaybePromise } from '../maybe-promise.ts'
import { schemeOf } from '../verifiers/verifier.ts'
import type { Judge, SignedDelivery, Verified, Verifier } from '../verifiers/verifier.ts'

export interface Verification {
  readonly verifier: Verifier
  readonly judge: Judge['judge']
  /** `undefined` if a user's verifier has no `checkHeaders`. */
  readonly judgeHeaders: Judge['judgeHeaders'] | undefined
  readonly keyring: Keys
  /** Seconds by which the timestamp may differ from this server's clock, past and future. */
  readonly tolerance: number
}

export function verificationBy (verifier: Verifier, keyring: Keys, tolerance: number): Verification {
  const { judge, judgeHeaders } = schemeOf(verifier) ?? usersJudge(verifier)
  return { verifier, judge, judgeHeaders, keyring, tolerance }
}

function usersJudge (verifier: Verifier): Pick<Verification, 'judge' | 'judgeHeaders'> {
  const { checkHeaders } = verifier
  return {
    judge: (delivery, keys) => answerOf(() => verifier(delivery, keys), toVerified),
    judgeHeaders: checkHeaders && (headers => answerOf(() => checkHeaders(headers), toSeconds))
  }
}

/**
 * Checks the headers alone, before the body is read, so that a flood of requests without headers or with old ones costs no hashing.
 *
 * @returns the coded error that refuses the request; `undefined` if there is no fault
 */
export function headerFault ({ judgeHeaders, tolerance }: Verification, headers: IncomingHttpHeaders): Error | undefined {
  if (judgeHeaders === undefined) return undefined
  const timestamp = judgeHeaders(headers)
  return timestamp instanceof Error ? timestamp : staleness(timestamp, tolerance)
}

/**
 * @returns the webhook-id and when the delivery was signed; or FST_OPENAI_WEBHOOK_INVALID_SIGNATURE,
 * FST_OPENAI_WEBHOOK_TIMESTAMP_OUT_OF_TOLERANCE or another coded error of the verifier
 */
export function verify (verification: Verification, delivery: SignedDelivery): MaybePromise<Verified | Error> {
  const verified = verifyNow(verification, delivery)
  if (!(verified instanceof InvalidSignature)) return verified
  // The secret may have been rotated, so a secret function is called again.
  const refreshed = verification.keyring.refresh()
  return refreshed === undefined ? verified : refreshed.then(changed => changed ? verifyNow(verification, delivery) : verified)
}

function verifyNow ({ judge, keyring, tolerance }: Verification, delivery: SignedDelivery): Verified | Error {
  const verified = judge(delivery, keyring.keys)
  return verified instanceof Error ? verified : staleness(verified.timestamp, tolerance) ?? verified
}

/** Calls a user's verifier, which may either throw or return its error. */
function answerOf<T> (ask: () => T | Error, checked: (answer: T) => T | Error): T | Error {
  try {
    const answer = ask()
    if (!isPromise(answer)) return answer instanceof Error ? toRefusal(answer) : checked(answer)
    // A promise has verified nothing yet. Its rejection is ignored, because an unhandled rejection would end the process.
    answer.then(undefined, () => {})
    return faulty('a promise: a verifier answers at once')
  } catch (error) {
    return toRefusal(error)
  }
}

/** A user's verifier may throw anything. Unless it is a coded error with a 4xx status, the sender gets INVALID_SIGNATURE. */
function toRefusal (error: unknown): Error {
  return isRefusal(error) ? error : new InvalidSignature({ cause: error })
}

/** The sender gets the same answer as a forger. The log gets the cause, as it does when a verifier throws by mistake. */
function faulty (got: string): Error {
  return new InvalidSignature({ cause: new TypeError(`expected the verifier to return { webhookId, timestamp }, got ${got}`) })
}

function toSeconds (timestamp: unknown): number | Error {
  return typeof timestamp === 'number' && !Number.isNaN(timestamp) ? timestamp : new InvalidTimestamp('the timestamp')
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
