import type { IncomingHttpHeaders } from 'node:http'
import { isRefusal } from '../coded.ts'
import { InvalidId, InvalidSignature, InvalidTimestamp, TimestampOutOfTolerance } from '../errors.ts'
import type { Keyring } from '../verifiers/keyring.ts'
import { isPromise } from '../steps.ts'
import type { MaybePromise } from '../stores/store.ts'
import { judgeOf } from '../verifiers/verifier.ts'
import type { Judge, SignedDelivery, Verified, Verifier } from '../verifiers/verifier.ts'

export interface Verification {
  readonly verifier: Verifier
  readonly judge: Judge['judge']
  /** Absent where a verifier of the user's does not check the headers first. */
  readonly judgeHeaders: Judge['judgeHeaders'] | undefined
  readonly keyring: Keyring
  /** Seconds, past and future. */
  readonly tolerance: number
}

export function verificationBy (verifier: Verifier, keyring: Keyring, tolerance: number): Verification {
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
 * What the headers alone condemn; asked before the body is read, so that anonymous and stale floods cost no hashing.
 *
 * @returns the coded error to refuse with
 */
export function headerFault ({ judgeHeaders, tolerance }: Verification, headers: IncomingHttpHeaders): Error | undefined {
  if (judgeHeaders === undefined) return undefined
  const timestamp = judgeHeaders(headers)
  return timestamp instanceof Error ? timestamp : staleness(timestamp, tolerance)
}

/** @returns who signed it and when, or FST_OPENAI_WEBHOOK_INVALID_SIGNATURE or another coded error of the verifier's */
export function verify (verification: Verification, delivery: SignedDelivery): MaybePromise<Verified | Error> {
  const verified = verifyNow(verification, delivery)
  if (!(verified instanceof InvalidSignature)) return verified
  // The secret may have been rotated: ask for it again, if there is somebody to ask.
  const refreshed = verification.keyring.refresh()
  return refreshed === undefined ? verified : refreshed.then(changed => changed ? verifyNow(verification, delivery) : verified)
}

function verifyNow ({ judge, keyring, tolerance }: Verification, delivery: SignedDelivery): Verified | Error {
  const verified = judge(delivery, keyring.keys)
  return verified instanceof Error ? verified : staleness(verified.timestamp, tolerance) ?? verified
}

/** What a verifier of the user's returns or throws, as an answer. An error is as good returned as thrown. */
function answerOf<T> (ask: () => T | Error, checked: (answer: T) => T | Error): T | Error {
  try {
    const answer = ask()
    if (!isPromise(answer)) return answer instanceof Error ? toRefusal(answer) : checked(answer)
    // It has verified nothing yet; left alone, its rejection would end the process.
    answer.then(undefined, () => {})
    return new InvalidSignature()
  } catch (error) {
    return toRefusal(error)
  }
}

/** What a verifier of the user's throws must be an answer. */
function toRefusal (error: unknown): Error {
  return isRefusal(error) ? error : new InvalidSignature({ cause: error })
}

function toSeconds (timestamp: unknown): number | Error {
  return typeof timestamp === 'number' && !Number.isNaN(timestamp) ? timestamp : new InvalidTimestamp('the timestamp')
}

/** A verifier of the user's that forgets to throw must not let anything through. */
function toVerified (verified: Verified): Verified | Error {
  if (typeof verified !== 'object' || verified === null) return new InvalidSignature()
  const { webhookId, timestamp, keyIndex } = verified as Partial<Verified>
  if (typeof webhookId !== 'string' || webhookId === '') return new InvalidId()
  if (timestamp === undefined || !Number.isFinite(timestamp)) return new InvalidTimestamp('the timestamp')
  return { webhookId, timestamp, ...(keyIndex !== undefined && { keyIndex }) }
}

function staleness (timestamp: number, tolerance: number): Error | undefined {
  // Fails closed where one of them is no number.
  return Math.abs(Date.now() / 1000 - timestamp) <= tolerance ? undefined : new TimestampOutOfTolerance('the timestamp', tolerance)
}
