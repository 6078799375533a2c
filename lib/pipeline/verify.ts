import type { IncomingHttpHeaders } from 'node:http'
import { isRefusal } from '../coded.ts'
import { InvalidId, InvalidSignature, InvalidTimestamp, TimestampOutOfTolerance } from '../errors.ts'
import type { Keys } from '../verifiers/keyring.ts'
import { isPromise } from '../maybe-promise.ts'
import type { MaybePromise } from '../maybe-promise.ts'
import { judgeOf } from '../verifiers/verifier.ts'
import type { Judge, SignedDelivery, Verified, Verifier } from '../verifiers/verifier.ts'

export interface Verification {
  readonly verifier: Verifier
  readonly judge: Judge['judge']
  /** Absent where a user's verifier has no `checkHeaders`. */
  readonly judgeHeaders: Judge['judgeHeaders'] | undefined
  readonly keyring: Keys
  /** Seconds, past and future. */
  readonly tolerance: number
}

export function verificationBy (verifier: Verifier, keyring: Keys, tolerance: number): Verification {
  const { judge, judgeHeaders } = judgeOf(verifier) ?? usersJudge(verifier)
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
 * Judges by the headers alone, before the body is read, so that anonymous and stale floods cost no hashing.
 *
 * @returns the coded error to refuse with
 */
export function headerFault ({ judgeHeaders, tolerance }: Verification, headers: IncomingHttpHeaders): Error | undefined {
  if (judgeHeaders === undefined) return undefined
  const timestamp = judgeHeaders(headers)
  return timestamp instanceof Error ? timestamp : staleness(timestamp, tolerance)
}

/** @returns the webhook-id and when it was signed, or FST_OPENAI_WEBHOOK_INVALID_SIGNATURE or another coded error of the verifier */
export function verify (verification: Verification, delivery: SignedDelivery): MaybePromise<Verified | Error> {
  const verified = verifyNow(verification, delivery)
  if (!(verified instanceof InvalidSignature)) return verified
  // The secret may have been rotated: a secret function is asked again.
  const refreshed = verification.keyring.refresh()
  return refreshed === undefined ? verified : refreshed.then(changed => changed ? verifyNow(verification, delivery) : verified)
}

function verifyNow ({ judge, keyring, tolerance }: Verification, delivery: SignedDelivery): Verified | Error {
  const verified = judge(delivery, keyring.keys)
  return verified instanceof Error ? verified : staleness(verified.timestamp, tolerance) ?? verified
}

/** Calls a user's verifier. It may return its error as well as throw it. */
function answerOf<T> (ask: () => T | Error, checked: (answer: T) => T | Error): T | Error {
  try {
    const answer = ask()
    if (!isPromise(answer)) return answer instanceof Error ? toRefusal(answer) : checked(answer)
    // A promise has verified nothing yet. Unheard, its rejection would end the process.
    answer.then(undefined, () => {})
    return faulty('a promise: a verifier answers at once')
  } catch (error) {
    return toRefusal(error)
  }
}

/** A user's verifier may throw anything: what is no 4xx of its own is an invalid signature. */
function toRefusal (error: unknown): Error {
  return isRefusal(error) ? error : new InvalidSignature({ cause: error })
}

/** The sender is told what a forger is told; the log gets the cause, as of what a verifier throws by mistake. */
function faulty (got: string): Error {
  return new InvalidSignature({ cause: new TypeError(`expected the verifier to return { webhookId, timestamp }, got ${got}`) })
}

function toSeconds (timestamp: unknown): number | Error {
  return typeof timestamp === 'number' && !Number.isNaN(timestamp) ? timestamp : new InvalidTimestamp('the timestamp')
}

/** A user's verifier that forgets to throw must not let anything through. */
function toVerified (verified: Verified): Verified | Error {
  if (typeof verified !== 'object' || verified === null) return faulty(verified === null ? 'null' : typeof verified)
  const { webhookId, timestamp, keyIndex } = verified as Partial<Verified>
  if (typeof webhookId !== 'string' || webhookId === '') return new InvalidId()
  if (timestamp === undefined || !Number.isFinite(timestamp)) return new InvalidTimestamp('the timestamp')
  return { webhookId, timestamp, ...(keyIndex !== undefined && { keyIndex }) }
}

function staleness (timestamp: number, tolerance: number): Error | undefined {
  const ahead = timestamp - Date.now() / 1000
  // `<=`, and not `>` the other way round: NaN fails closed.
  if (Math.abs(ahead) <= tolerance) return undefined
  return new TimestampOutOfTolerance('the timestamp', tolerance, `${Math.round(Math.abs(ahead))} s ${ahead < 0 ? 'behind' : 'ahead'}`)
}
