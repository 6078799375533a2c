import { createHmac, createSecretKey } from 'node:crypto'
import { assertOption, isObject, show, wholeNumber } from './checks.ts'
import type { Rule } from './checks.ts'
import { InvalidOptions } from './errors.ts'
import { bodyCandidates, bodyFacts, isEvent } from './diagnose/bodies.ts'
import { causes as catalogue, found, merged, messageOf } from './diagnose/causes.ts'
import type { Cause, Found } from './diagnose/causes.ts'
import { matchSignature, readHeaders, toHeaderMap } from './diagnose/headers.ts'
import type { DiagnoseHeaders, HeadCandidate, HeaderMap, HeaderReading } from './diagnose/headers.ts'
import { readSecret } from './diagnose/secrets.ts'
import type { KeyCandidate } from './diagnose/secrets.ts'
import { xOpenAISignature } from './verifiers/x-openai-signature.ts'

export type { Cause } from './diagnose/causes.ts'
export type { DiagnoseHeaders } from './diagnose/headers.ts'

/** Not NaN, which a mistyped date gives, and with which every timestamp would be in time. */
const NUMBER: Rule = { expected: 'a finite number', accepts: Number.isFinite }

/** What cannot be missing. A missing secret is a finding. */
const REQUIRED = {
  headers: { expected: 'an object, a Headers or an array of pairs', accepts: value => typeof value === 'object' && value !== null },
  rawBody: { expected: 'a string or bytes', accepts: value => typeof value === 'string' || ArrayBuffer.isView(value) }
} satisfies Partial<Record<keyof DiagnoseOptions, Rule>>

export interface DiagnoseOptions {
  /** The headers as node:http has them, as a `Headers` object, or as pairs of name and value. */
  readonly headers: DiagnoseHeaders
  /** The bytes that arrived, or their UTF-8 text. */
  readonly rawBody: Uint8Array | string
  /**
   * The signing secret exactly as it is configured, or the bytes of its key; several during a rotation. A malformed secret is reported as
   * the finding.
   */
  readonly secret: string | Uint8Array | ReadonlyArray<string | Uint8Array>
  /**
   * When the delivery arrived, in ms since the epoch.
   *
   * @default Date.now()
   */
  readonly now?: number
  /**
   * How far the timestamp may be from `now`, in seconds, in the past and in the future.
   *
   * @default 300
   */
  readonly tolerance?: number
}

export interface Finding {
  /** A stable identifier that programs may compare. */
  readonly cause: Cause
  /** What is wrong. */
  readonly message: string
  /** What to change. */
  readonly fix: string
  /** The other causes, when there is more than one. */
  readonly also?: readonly Cause[]
}

export interface Diagnosis {
  /** Whether the plugin would accept the signature and the timestamp. */
  readonly verified: boolean
  /** The index of the secret whose key signed the delivery, when a key was found. */
  readonly keyIndex?: number
  /**
   * Why the delivery does not verify. Only a proved cause is named: a signature that matches once the cause is undone, or the form of the
   * input proves it.
   */
  readonly finding?: Finding
  /** Causes that were excluded, when no cause was found. */
  readonly ruledOut: readonly string[]
  /** The likeliest cause, not proved, when no cause was found. */
  readonly likely?: string
}

/** Limits to the work of one diagnosis, whatever the delivery holds. */
interface Bounds {
  readonly hmacs: number
  /** The most bytes that are hashed. */
  readonly hashed: number
  /** The largest body, in bytes, that is parsed and rewritten. */
  readonly body: number
  /** Whether the unchanged delivery is tried with every secret, even beyond the limits. */
  readonly everySecret: boolean
  /** What the diagnosis says when not every change could be tried. */
  readonly untried: string
}

/** For the command line, where a person waits: up to some seconds for a large body. */
const THOROUGH: Bounds = { hmacs: 500, hashed: 64 * 1_048_576, body: 1_048_576, everySecret: true, untried: 'the body is too large to try every change to it' }
/** For a server, whose event loop is blocked meanwhile: some ms. OpenAI's events are smaller than this limit. */
const QUICK: Bounds = { hmacs: 300, hashed: 262_144, body: 4_096, everySecret: false, untried: 'not every change was tried here: save the delivery and have `openai-webhook diagnose` look at it' }

/**
 * Finds out why a delivery does not verify, by undoing the usual mistakes until the signature matches. The result contains no secret, no
 * expected signature and nothing of the payload. A diagnosis may take seconds of CPU time: call it for a few deliveries and not for each
 * request.
 *
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS for a value of the wrong kind
 */
export function diagnose (options: DiagnoseOptions): Diagnosis {
  if (!isObject(options)) throw new InvalidOptions(`diagnose(): expected options to be an object, got ${show(options)}`)
  for (const [name, { expected, accepts }] of Object.entries(REQUIRED)) {
    const value = options[name as keyof typeof REQUIRED]
    if (!accepts(value)) throw new InvalidOptions(`diagnose(): expected ${name} to be ${expected}, got ${show(value)}`)
  }
  assertOption('diagnose()', 'now', options.now, NUMBER)
  assertOption('diagnose()', 'tolerance', options.tolerance, wholeNumber('seconds', 1))
  return diagnoseWithin(THOROUGH, options)
}

/** Diagnoses within some ms, for a server. Rare causes and large bodies are not tried. */
export function diagnoseQuickly (options: DiagnoseOptions): Diagnosis {
  return diagnoseWithin(QUICK, options)
}

function diagnoseWithin (bounds: Bounds, { headers, rawBody, secret, now = Date.now(), tolerance = 300 }: DiagnoseOptions): Diagnosis {
  const body = typeof rawBody === 'string' ? Buffer.from(rawBody) : Buffer.from(rawBody.buffer, rawBody.byteOffset, rawBody.byteLength)
  const secrets: ReadonlyArray<string | Uint8Array> = Array.isArray(secret) ? secret : [secret as string | Uint8Array]
  const map = toHeaderMap(headers)
  const reading = readHeaders(map, isEvent(body, bounds.body))
  const secretReadings = secrets.map(readSecret)
  const keys = secretReadings.flatMap(({ candidates }) => candidates).sort((a, b) => a.causes.length - b.causes.length)

  const { match, isComplete } = search(reading, keys, body, bounds)
  if (match !== undefined) {
    const { causes, head, key: { index: keyIndex } } = match
    const late = clockCause(head.seconds, now, tolerance)
    if (causes.length === 0 && late === undefined) return { verified: true, keyIndex, ruledOut: [] }
    const which = secrets.length > 1 && causes.some(isOfSecret) ? ` (secret ${keyIndex + 1} of ${secrets.length})` : ''
    return { verified: false, keyIndex, finding: proved(causes, late, which), ruledOut: [] }
  }

  const guide = guideCause(map, secrets, body)
  if (guide !== undefined) return { verified: false, finding: toFinding([guide], messageOf(guide)), ruledOut: [] }
  const [fact] = [...secretReadings.flatMap(({ facts }) => facts), ...reading.facts, ...bodyFacts(body, map, bounds.body)]
  if (fact !== undefined) {
    const wasUndone = reading.heads.length > 0 && [...keys, ...reading.heads].some(({ causes }) => causes.some(({ cause }) => cause === fact.cause))
    const message = `${messageOf(fact)}${wasUndone ? '; that is not all: with that undone the signature does not match either' : ''}`
    return { verified: false, finding: toFinding([fact], message), ruledOut: [] }
  }
  return { verified: false, ruledOut: isComplete ? [...notTheBody, ...notItsBody] : notTheBody, likely: likely(body, secrets, isComplete ? undefined : bounds.untried) }
}

const isOfSecret = ({ cause }: Found): boolean => cause.startsWith('secret-')

/** The finding when the signature matches once `causes` are undone. */
function proved (causes: readonly Found[], late: Found | undefined, which: string): Finding {
  const undone = causes.map(messageOf).join(', and ')
  if (late === undefined) return toFinding(causes, `${undone}${which}: with that undone the signature matches`)
  if (causes.length === 0) return toFinding([late], `the signature matches, but ${messageOf(late)}`)
  return toFinding([...causes, late], `${undone}${which}: with that undone the signature matches, but ${messageOf(late)}`)
}

function toFinding (causes: readonly Found[], message: string): Finding {
  const [first, ...others] = causes.map(({ cause }) => cause) as [Cause, ...Cause[]]
  return {
    cause: first,
    message,
    fix: [first, ...others].map(cause => catalogue[cause][1]).join('. Then: '),
    ...(others.length > 0 && { also: others })
  }
}

function clockCause (seconds: number, now: number, tolerance: number): Found | undefined {
  const age = now / 1000 - seconds
  if (Math.abs(age) > tolerance) return found(age > 0 ? 'timestamp-stale' : 'timestamp-future', duration(Math.abs(age)))
  return undefined
}

const UNITS = [['d', 86_400], ['h', 3_600], ['min', 60], ['s', 1]] as const

/** A duration in its two largest units: `2 h 5 min`. */
function duration (seconds: number): string {
  let rest = Math.round(seconds)
  const parts: string[] = []
  for (const [unit, size] of UNITS) {
    const count = Math.floor(rest / size)
    rest -= count * size
    if (count > 0) parts.push(`${count} ${unit}`)
  }
  return parts.slice(0, 2).join(' ')
}

/** Whether the delivery is signed in the scheme of `xOpenAISignature()` with one of the secrets. */
function guideCause (headers: HeaderMap, secrets: ReadonlyArray<string | Uint8Array>, body: Buffer): Found | undefined {
  if (headers.has('webhook-signature')) return undefined
  try {
    const keys = secrets.map(secret => createSecretKey(Buffer.from(secret as string)))
    xOpenAISignature()({ rawBody: body, headers: Object.fromEntries(headers) }, keys)
    return found('x-openai-signature', ', and its signature matches this secret')
  } catch {
    return undefined
  }
}

const notTheBody: readonly string[] = [
  'an API key, an identifier or nothing in place of the signing secret',
  'quotes or white space around the secret; a missing, mangled or doubled whsec_',
  'the secret\'s base64 encoded twice, or without its last character',
  'the secret\'s text used as the key',
  'headers that are missing, renamed or doubled, or have white space around them; names in another case do no harm',
  'a timestamp in milliseconds or as a date',
  'a signature of another version, in hexadecimal, without its prefix, or of another provider'
]

const notItsBody: readonly string[] = [
  'an empty body',
  'a newline at its end, added or removed',
  'Latin-1',
  'gzip, deflate or Brotli',
  'form data, base64, a Buffer\'s JSON, a gateway\'s envelope',
  'JSON parsed and serialised again: compact, Python\'s, indented by 2, with sorted keys, with escapes as PHP or Go write them'
]

/** The length of the key in OpenAI's signing secrets, in bytes. */
const SECRET_BYTES = 32

function likely (body: Buffer, secrets: ReadonlyArray<string | Uint8Array>, untried: string | undefined): string {
  const hints = ['not proved, but likeliest: the secret is that of another endpoint or project, each has its own; or the body was changed in a way that cannot be undone']
  if (secrets.some(secret => typeof secret === 'string' && !secret.startsWith('whsec_'))) hints.push('a secret of OpenAI\'s begins with whsec_, which this one does not')
  else if (secrets.some(secret => typeof secret === 'string' && Buffer.from(secret.slice('whsec_'.length), 'base64').length !== SECRET_BYTES)) hints.push(`a secret of OpenAI's stands for ${SECRET_BYTES} bytes, this one for another number: it may be cut`)
  if (body.includes('\ufffd')) hints.push('the body holds U+FFFD, which is left where bytes were decoded in the wrong charset')
  if (untried !== undefined) hints.push(untried)
  return hints.join('; ')
}

interface Match {
  readonly key: KeyCandidate
  readonly head: HeadCandidate
  readonly causes: readonly Found[]
}

type Attempt = readonly [key: KeyCandidate, head: HeadCandidate, bytes: Buffer, causes: readonly Found[]]

/** @returns the match, if there is one, and whether every single change was tried */
function search ({ heads, signatures }: HeaderReading, keys: readonly KeyCandidate[], body: Buffer, bounds: Bounds): { match?: Match, isComplete: boolean } {
  let hmacs = 0
  let hashed = 0
  for (const step of [oneChange, twoChanges]) {
    for (const [key, head, bytes, causes] of step(keys, heads, body, bounds.body)) {
      const isFree = bounds.everySecret && isOwn(key) && isOwn(head) && bytes === body
      const size = head.id.length + head.timestamp.length + bytes.length
      if (!isFree && (hmacs >= bounds.hmacs || hashed + size > bounds.hashed)) return { isComplete: step === twoChanges && body.length <= bounds.body }
      hmacs++
      hashed += size
      const digest = createHmac('sha256', key.key).update(`${head.id}.${head.timestamp}.`).update(bytes).digest()
      const signatureCauses = matchSignature(signatures, digest)
      if (signatureCauses !== undefined) {
        return { match: { key, head, causes: merged([...key.causes, ...head.causes, ...signatureCauses, ...causes]) }, isComplete: true }
      }
    }
  }
  return { isComplete: body.length <= bounds.body }
}

/** Whether nothing is wrong with a candidate, so that the plugin would use it. */
function isOwn ({ causes }: { causes: readonly Found[] }): boolean {
  return causes.length === 0
}

/** The candidates with nothing wrong, or else those with the fewest causes. */
function likeliest (keys: readonly KeyCandidate[], heads: readonly HeadCandidate[]): { likelyKeys: KeyCandidate[], likelyHeads: HeadCandidate[] } {
  return {
    likelyKeys: keys.some(isOwn) ? keys.filter(isOwn) : keys.filter(({ guess }) => !guess).slice(0, 4),
    likelyHeads: heads.slice(0, heads.some(isOwn) ? 1 : 3)
  }
}

/** The delivery as it arrived, then with one change to it. */
function * oneChange (keys: readonly KeyCandidate[], heads: readonly HeadCandidate[], body: Buffer, maxBody: number): Generator<Attempt> {
  const { likelyKeys, likelyHeads } = likeliest(keys, heads)
  const arrived = { bytes: body, causes: [] }
  yield * pairs(likelyKeys, likelyHeads, arrived)
  yield * pairs(keys.filter(key => !likelyKeys.includes(key)), likelyHeads, arrived)
  yield * pairs(likelyKeys, heads.filter(head => !likelyHeads.includes(head)), arrived)
  for (const changed of bodyCandidates(body, maxBody)) yield * pairs(likelyKeys, likelyHeads, changed)
}

function * twoChanges (keys: readonly KeyCandidate[], heads: readonly HeadCandidate[], body: Buffer, maxBody: number): Generator<Attempt> {
  const { likelyKeys, likelyHeads } = likeliest(keys, heads)
  const otherKeys = keys.filter(key => !key.guess && !likelyKeys.includes(key))
  const otherHeads = heads.filter(head => !likelyHeads.includes(head))
  yield * pairs(otherKeys, otherHeads, { bytes: body, causes: [] })
  for (const changed of bodyCandidates(body, maxBody)) {
    yield * pairs(otherKeys, likelyHeads, changed)
    yield * pairs(likelyKeys, otherHeads, changed)
  }
}

function * pairs (keys: readonly KeyCandidate[], heads: readonly HeadCandidate[], { bytes, causes }: { bytes: Buffer, causes: readonly Found[] }): Generator<Attempt> {
  for (const key of keys) for (const head of heads) yield [key, head, bytes, causes]
}
