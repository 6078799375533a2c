import fastify from 'fastify'
import { BY_A_HOOK, codeOfClass } from '../coded.ts'
import {
  BodyTimeout, DeadlineExceeded, HandlerFailed, InProgress, InvalidBody, InvalidEvent, InvalidId, InvalidSignature, InvalidTimestamp, MissingHeader, Overloaded,
  TimestampOutOfTolerance, Unavailable, UnknownTenant, UnprotectedRoute
} from '../errors.ts'
import { guideEntries, officialEntries } from '../events/index.ts'

/** Replaces label values that come from outside, because each value of a label is a time series that is never deleted. */
export const OTHER = 'other'

/** The event types that get a label value of their own. */
export function knownTypes (own: readonly string[]): ReadonlySet<string> {
  return new Set([...Object.keys(officialEntries), ...Object.keys(guideEntries), ...own])
}

export const OVERLOADED = codeOfClass(Overloaded)
export const UNAVAILABLE = codeOfClass(Unavailable)

/** The codes of the plugin's own answers other than 200. */
export const refusalCodes: readonly string[] = [
  UnprotectedRoute, BodyTimeout, MissingHeader, InvalidId, InvalidTimestamp, TimestampOutOfTolerance, InvalidSignature, UnknownTenant, InvalidBody, InvalidEvent, InProgress,
  HandlerFailed, DeadlineExceeded
].map(codeOfClass).concat(OVERLOADED, UNAVAILABLE)

const knownCodes = new Set([...refusalCodes, BY_A_HOOK, ...Object.keys(fastify.errorCodes).filter(code => code.startsWith('FST_ERR_CTP_'))])

/** A verifier, error handler or rate limit of the user may refuse with any code. */
export function codeLabel (code: string): string {
  return knownCodes.has(code) ? code : OTHER
}

/** More secrets than a rotation needs. The bound is necessary because a user's verifier may return any index. */
const MAX_SECRETS = 20

export function secretLabel (index: number | undefined): string {
  if (index === undefined) return 'unknown'
  return Number.isInteger(index) && index >= 0 && index < MAX_SECRETS ? String(index) : OTHER
}
