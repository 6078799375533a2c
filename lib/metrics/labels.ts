import fastify from 'fastify'
import {
  BodyTimeout, DeadlineExceeded, HandlerFailed, InProgress, InvalidBody, InvalidEvent, InvalidId, InvalidSignature, InvalidTimestamp, MissingHeader, Overloaded,
  TimestampOutOfTolerance, Unavailable, UnknownTenant, UnprotectedRoute
} from '../errors.ts'
import { guideEntries, officialEntries } from '../events/index.ts'

/** Stands for any value from outside: each value of a label is a time series that nothing deletes. */
export const OTHER = 'other'

/** The event types that have a label of their own. */
export function knownTypes (own: readonly string[]): ReadonlySet<string> {
  return new Set([...Object.keys(officialEntries), ...Object.keys(guideEntries), ...own])
}

const codeOf = (CodedError: typeof HandlerFailed): string => new CodedError().code

export const OVERLOADED = codeOf(Overloaded)
export const UNAVAILABLE = codeOf(Unavailable)

/** Our answers other than 200. */
export const refusalCodes: readonly string[] = [
  UnprotectedRoute, BodyTimeout, MissingHeader, InvalidId, InvalidTimestamp, TimestampOutOfTolerance, InvalidSignature, UnknownTenant, InvalidBody, InvalidEvent, InProgress,
  HandlerFailed, DeadlineExceeded
].map(codeOf).concat(OVERLOADED, UNAVAILABLE)

const knownCodes = new Set([...refusalCodes, ...Object.keys(fastify.errorCodes).filter(code => code.startsWith('FST_ERR_CTP_'))])

/** A user's verifier, error handler or rate limit may refuse with any code. */
export function codeLabel (code: string): string {
  return knownCodes.has(code) ? code : OTHER
}

/** More than a rotation needs. A bound, since a user's verifier may give any number. */
const MAX_SECRETS = 20

export function secretLabel (index: number | undefined): string {
  if (index === undefined) return 'unknown'
  return Number.isInteger(index) && index >= 0 && index < MAX_SECRETS ? String(index) : OTHER
}
