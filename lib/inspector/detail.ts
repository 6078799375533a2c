import type { IncomingHttpHeaders } from 'node:http'
import type { FastifyBaseLogger } from 'fastify'
import { isObject, show } from '../checks.ts'
import { codeOfClass } from '../coded.ts'
import { diagnoseQuickly } from '../diagnose.ts'
import { causes } from '../diagnose/causes.ts'
import { InvalidSignature, TimestampOutOfTolerance, UnknownTenant } from '../errors.ts'
import { logError } from '../log.ts'
import { isStray } from '../maybe-promise.ts'
import type { Verification } from '../pipeline/verify.ts'
import { fixOf } from '../refusal-log.ts'
import type { DeadDelivery, DeliveryError } from '../runners/runner.ts'
import { standardWebhooks } from '../verifiers/standard-webhooks.ts'
import { msOf, rowOf } from './entry.ts'
import type { Attempt, Entry, Refusal } from './entry.ts'
import type { AttemptInfo, DeadInfo, Detail, DiagnosisInfo, ErrorInfo, Row, StepInfo, StepName } from './messages.ts'
import type { InspectorOptions } from './options.ts'

export interface DetailParts {
  /** How the endpoint or the tenant verifies; `undefined` when this process has no such endpoint or tenant. */
  readonly verification: Verification | undefined
  readonly others: readonly Row[]
  readonly deliver: Detail['deliver']
  readonly redact: InspectorOptions['redact']
  readonly log: FastifyBaseLogger
}

/** Everything that is known about one delivery, as the page shows it. */
export function detailOf (entry: Entry, { verification, others, deliver, redact, log }: DetailParts): Detail {
  const { at, url, timestamp, headers, rawBody, refusal, duplicate, attempts, death } = entry
  return {
    row: rowOf(entry),
    url,
    timestamp: timestamp ?? null,
    steps: headers === undefined ? null : stepsOf(entry),
    headers: headers === undefined ? null : shown(headers, redact, log),
    body: rawBody === undefined ? null : { base64: rawBody.toString('base64'), size: rawBody.length, arrived: headers !== undefined },
    refusal: refusal === undefined ? null : refusalOf(entry, refusal),
    diagnosis: diagnosisOf(entry, verification),
    duplicate: duplicate ?? null,
    attempts: attempts.map(attempt => attemptOf(attempt, at)),
    death: death === undefined ? null : { at: death.diedAt, attempts: death.attempts, errors: death.errors.map(errorOf) },
    others,
    deliver,
    scheme: entry.webhookId !== undefined && verification?.verifier === standardWebhooks() ? 'standard' : null
  }
}

export function deadOf ({ endpoint, webhookId, tenant, event, attempts, diedAt, errors, finished }: DeadDelivery): DeadInfo {
  return {
    endpoint,
    webhookId,
    tenant: tenant ?? null,
    type: event.type,
    attempts,
    diedAt,
    errors: errors.map(errorOf),
    event: JSON.stringify(event),
    finished
  }
}

const errorOf = ({ handler, message, stack }: DeliveryError): ErrorInfo => ({ handler, message, stack })

/** @param arrivedAt ms since the epoch */
function attemptOf ({ number, startedAt, queued, duration, outcome, handlers, finished, errors }: Attempt, arrivedAt: number): AttemptInfo {
  return {
    number,
    at: Math.floor(arrivedAt + msOf(startedAt)),
    queued,
    ms: msOf(duration),
    outcome,
    handlers: [
      ...finished.map(name => ({ name, outcome: 'skipped', ms: null }) as const),
      ...handlers.map(({ name, outcome, duration }) => ({ name, outcome, ms: msOf(duration) }))
    ],
    errors: errors.map(errorOf)
  }
}

/** The steps of a delivery, each of which starts at the end of the one before. The first step without an end has failed or is running. */
function stepsOf (entry: Entry): StepInfo[] {
  const { capturedAt, verifiedAt, validatedAt, deduplicatedAt, dispatchedAt, answeredAt, webhookId } = entry
  const ends: ReadonlyArray<readonly [StepName, number | undefined]> = [
    ['capture', capturedAt], ['verify', verifiedAt], ['validate', validatedAt], ['deduplicate', deduplicatedAt], ['dispatch', dispatchedAt]
  ]
  const steps: StepInfo[] = []
  let from = 0
  for (const [name, to] of ends) {
    if (to === undefined) break
    steps.push(step(name, from, to))
    from = to
  }
  const next = ends[steps.length]
  const failed = webhookId === undefined || entry.state === 'refused'
  // When the headers are refused, the body is not read, so capture has no end. The step that failed is nevertheless verify.
  if (next !== undefined && failed) {
    const isVerify = next[0] === 'capture' && isOfHeaders(entry)
    const name = isVerify ? 'verify' : next[0]
    steps.push({ name, from: msOf(from), to: msOf(answeredAt), failed: true })
  } else if (answeredAt !== undefined) {
    // The deadline may cause the answer before the handlers end.
    const last = Math.min(from, answeredAt)
    steps.push(step('acknowledge', last, answeredAt))
  }
  return steps
}

const step = (name: StepName, from: number, to: number): StepInfo => ({ name, from: msOf(from), to: msOf(to), failed: false })

const HEADER_CODES: readonly string[] = ['MISSING_HEADER', 'INVALID_ID', 'INVALID_TIMESTAMP', 'TIMESTAMP_OUT_OF_TOLERANCE'].map(name => `FST_OPENAI_WEBHOOK_${name}`)

const isOfHeaders = ({ refusal }: Entry): boolean => refusal !== undefined && HEADER_CODES.includes(refusal.code)

const HIDDEN: readonly string[] = ['authorization', 'proxy-authorization', 'cookie', 'set-cookie']

function shown (headers: IncomingHttpHeaders, redact: InspectorOptions['redact'], log: FastifyBaseLogger): Array<[string, string]> {
  try {
    const visible: unknown = redact === undefined ? headers : redact({ ...headers })
    if (isStray(visible)) throw new TypeError('expected the headers to show, got a promise')
    if (!isObject(visible)) throw new TypeError(`expected the headers to show, got ${show(visible)}`)
    return Object.entries(visible)
      .filter(([, value]) => value !== undefined)
      .map(([name, value]) => [name, HIDDEN.includes(name.toLowerCase()) ? '(hidden)' : String(value)])
  } catch (error) {
    logError(log, error, {}, 'the redact function of the inspector failed, so no header is shown')
    return []
  }
}

const INVALID_SIGNATURE = codeOfClass(InvalidSignature)
const UNKNOWN_TENANT = new UnknownTenant('').code
const OUT_OF_TOLERANCE = codeOfClass(TimestampOutOfTolerance)

function refusalOf ({ tenant }: Entry, refusal: Refusal): Detail['refusal'] {
  const { code, error } = refusal
  return { ...refusal, error: error && errorOf(error), fix: fixOf(code, tenant !== undefined) ?? null, told: code === UNKNOWN_TENANT ? INVALID_SIGNATURE : null }
}

/** Why a delivery was refused, as `openai-webhook diagnose` would explain it at the time of its arrival. */
function diagnosisOf (entry: Entry, verification: Verification | undefined): DiagnosisInfo | null {
  const { refusal, headers, rawBody, at } = entry
  if (refusal === undefined || headers === undefined || verification === undefined || verification.verifier !== standardWebhooks()) return null
  if (refusal.code === OUT_OF_TOLERANCE) return stale(Number(headers['webhook-timestamp']) - at / 1_000)
  // A fault of the headers can be diagnosed without the body.
  if (!isOfHeaders(entry) && (refusal.code !== INVALID_SIGNATURE || rawBody === undefined)) return null
  const { keyring, tolerance } = verification
  const { finding, likely, ruledOut } = diagnoseQuickly({
    headers,
    rawBody: rawBody ?? Buffer.alloc(0),
    secret: keyring.keys.map(key => key.export()),
    now: at,
    tolerance
  })
  // The page itself says that this cause is not proved.
  return { cause: finding?.cause ?? null, message: finding?.message ?? likely!.replace('not proved, but likeliest: ', ''), fix: finding?.fix ?? null, ruledOut }
}

function stale (ahead: number): DiagnosisInfo {
  const cause = ahead > 0 ? 'timestamp-future' : 'timestamp-stale'
  const [message, fix] = causes[cause]
  return { cause, message: message.replace('%s', `${Math.round(Math.abs(ahead))} s`).replace('the time it is judged at', 'it came'), fix, ruledOut: [] }
}
