import { found, merged } from './causes.ts'
import type { Found } from './causes.ts'
import { WEBHOOK_ID } from '../verifiers/standard-webhooks.ts'

/** By lower-case name. Several values of one name are joined by ", ", as node:http joins them. */
export type HeaderMap = ReadonlyMap<string, string>

export type DiagnoseHeaders =
  | Iterable<readonly [name: string, value: string]>
  | Readonly<Record<string, string | readonly string[] | undefined>>

export function toHeaderMap (headers: DiagnoseHeaders): HeaderMap {
  const map = new Map<string, string>()
  const pairs: Iterable<readonly [string, unknown]> = Symbol.iterator in headers
    ? headers as Iterable<readonly [string, string]>
    : Object.entries(headers)
  for (const [name, value] of pairs) {
    if (value === undefined || value === null) continue
    const key = String(name).toLowerCase()
    const text = Array.isArray(value) ? value.join(', ') : String(value)
    const before = map.get(key)
    map.set(key, before === undefined ? text : `${before}, ${text}`)
  }
  return map
}

const ROLES = ['id', 'timestamp', 'signature'] as const
type Role = typeof ROLES[number]

/** The signed text before the body, as the headers may have stated it. */
export interface HeadCandidate {
  readonly id: string
  readonly timestamp: string
  /** The timestamp in Unix seconds; NaN when it cannot be read as a time. */
  readonly seconds: number
  readonly causes: readonly Found[]
}

export interface HeaderReading {
  /** Empty when one of the three headers is missing under every known name. */
  readonly heads: HeadCandidate[]
  readonly signatures: SignatureCandidate[]
  /** Faults of the headers that need no signature to be proved. */
  readonly facts: Found[]
}

/** @param isEvent whether the body looks like one of OpenAI's events */
export function readHeaders (headers: HeaderMap, isEvent: boolean): HeaderReading {
  const values = new Map<Role, string>()
  const renamed: string[] = []
  const missing: string[] = []
  for (const role of ROLES) {
    const name = nameOf(headers, role)
    if (name === undefined) missing.push(`webhook-${role}`)
    else {
      values.set(role, headers.get(name)!)
      if (name !== `webhook-${role}`) renamed.push(`webhook-${role} as ${name}`)
    }
  }
  const { id, timestamp, signature } = Object.fromEntries(values) as Partial<Record<Role, string>>
  if (id === undefined || timestamp === undefined || signature === undefined) {
    return { heads: [], signatures: [], facts: [missingFact(headers, missing)] }
  }
  const base = renamed.length === 0 ? [] : [found('header-renamed', renamed.join(', '))]
  const heads = []
  for (const [idText, ...idCauses] of untangled(id, 'webhook-id')) {
    for (const [timestampText, seconds, ...timestampCauses] of times(timestamp)) {
      heads.push({ id: idText, timestamp: timestampText, seconds, causes: merged([...base, ...idCauses, ...idFault(idText), ...timestampCauses]) })
    }
  }
  heads.sort((a, b) => a.causes.length - b.causes.length)
  const signatures = readSignatures(signature)
  const bySvix = !isEvent && renamed.some(name => name.includes(' as svix'))
  const facts = [...(bySvix ? [found('provider-svix')] : base), ...idFacts(id), ...timestampFacts(timestamp), ...signatureFacts(signature, signatures)]
  return { heads, signatures, facts }
}

/** The header itself, or a name that a gateway, CGI or a queue made from it: HTTP_WEBHOOK_ID, x-webhook-id, webhookId. */
function nameOf (headers: HeaderMap, role: Role): string | undefined {
  if (isPresent(headers, `webhook-${role}`)) return `webhook-${role}`
  for (const family of ['webhook', 'svix']) {
    const pattern = new RegExp(`(?:^|[-_.])${family}[-_]?${role}$`)
    for (const name of headers.keys()) if (pattern.test(name) && isPresent(headers, name)) return name
  }
  return undefined
}

function isPresent (headers: HeaderMap, name: string): boolean {
  return (headers.get(name) ?? '').trim() !== ''
}

function missingFact (headers: HeaderMap, missing: readonly string[]): Found {
  if (missing.includes('webhook-signature') && headers.has('x-openai-signature')) return found('x-openai-signature')
  return found('header-missing', `${missing.join(', ')} ${missing.length === 1 ? 'is' : 'are'} missing or empty`)
}

type Change = readonly [text: string, ...causes: Found[]]

/** The value as it is, then without the white space around it, then each part of it when the header was doubled. */
function untangled (value: string, name: string): Change[] {
  const text = value.trim()
  const causes = text === value ? [] : [found('header-whitespace', name)]
  const parts = text.includes(',') ? text.split(',').map(part => part.trim()).filter(part => part !== '') : []
  const changes: Change[] = [[value]]
  if (causes.length > 0) changes.push([text, ...causes])
  for (const part of new Set(parts)) changes.push([part, ...causes, found('header-doubled', name)])
  return changes.slice(0, 6)
}

/** From this number on a timestamp must be milliseconds: as seconds it would be after the year 5138. */
export const LEAST_MS = 1e11

function * times (value: string): Generator<readonly [text: string, seconds: number, ...causes: Found[]]> {
  const changes = untangled(value, 'webhook-timestamp')
  for (const [text, ...causes] of changes) {
    const given = Number(text)
    if (/^\d+$/.test(text)) {
      if (given < LEAST_MS) {
        yield [text, given, ...causes]
        yield [`${text}000`, given, ...causes, found('timestamp-milliseconds', 'milliseconds were signed, seconds arrived')]
      } else {
        yield [text, given / 1000, ...causes, found('timestamp-milliseconds', 'they were signed')]
        yield [text.slice(0, -3), given / 1000, ...causes, found('timestamp-milliseconds', 'seconds were signed, and converted on the way')]
      }
      continue
    }
    const seconds = text === '' || Number.isNaN(given) ? Date.parse(text) / 1000 : given < LEAST_MS ? given : given / 1000
    yield [text, seconds, ...causes, found('timestamp-format')]
    // A value that was untangled gets no such candidate. Its parts are tried instead.
    if (!Number.isNaN(seconds) && changes.length === 1) yield [String(Math.floor(seconds)), seconds, ...causes, found('timestamp-format')]
  }
}

function idFault (id: string): Found[] {
  if (WEBHOOK_ID.test(id)) return []
  return [found(/^[\x21-\x2b\x2d-\x7e]{1,256}$/.test(id) ? 'webhook-id-dot' : 'webhook-id-invalid')]
}

function idFacts (id: string): Found[] {
  if (WEBHOOK_ID.test(id)) return []
  const untangle = untangled(id, 'webhook-id').flatMap(([text, ...causes]) => WEBHOOK_ID.test(text) ? causes : [])
  return [...untangle, ...idFault(id)]
}

function timestampFacts (timestamp: string): Found[] {
  if (/^\d+$/.test(timestamp)) return Number(timestamp) < LEAST_MS ? [] : [found('timestamp-milliseconds', 'or a smaller unit')]
  const untangle = untangled(timestamp, 'webhook-timestamp').flatMap(([text, ...causes]) => /^\d+$/.test(text) ? causes : [])
  return [...untangle, found('timestamp-format')]
}

/** A signature as the sender may have meant it. */
export interface SignatureCandidate {
  /** The signature in standard base64, when it is complete. */
  readonly base64?: string
  /** Empty when the plugin would accept the signature. */
  readonly causes: readonly Found[]
}

const ENTRY = /(?:(v\d+[a-z]?|sha256)(\s*[,=:.]\s*))?([A-Za-z0-9+/_-]{20,}={0,2})/gi

function readSignatures (value: string): SignatureCandidate[] {
  const accepted = new Set(value.includes(', ') ? [] : value.split(' '))
  const isDoubled = /,\s*v\d+[a-z]?,/i.test(value)
  const candidates: SignatureCandidate[] = []
  for (const [, version, separator = '', body = ''] of [...value.matchAll(ENTRY)].slice(0, 32)) {
    if (accepted.has(`v1,${body}`) && isStandard(body)) {
      candidates.push({ base64: body, causes: [] })
      continue
    }
    const [base64, cause] = toStandard(body)
    const causes = [...(isDoubled ? [found('header-doubled', 'webhook-signature')] : []), ...(cause === undefined ? [] : [cause])]
    if (version === undefined || /^sha/i.test(version) || separator.trim() !== ',') causes.push(found('signature-prefix'))
    else if (version !== 'v1') causes.push(found('signature-version', version))
    // Only the white space around the signature prevents the plugin from accepting it.
    if (causes.length === 0) causes.push(found('header-whitespace', 'webhook-signature'))
    candidates.push({ ...(base64 !== undefined && { base64 }), causes })
  }
  return candidates.sort((a, b) => a.causes.length - b.causes.length)
}

function isStandard (text: string): boolean {
  return text.length === 44 && Buffer.from(text, 'base64').toString('base64') === text
}

/** Converts a signature to standard base64. A signature of 32 bytes may have been written in hexadecimal. */
function toStandard (text: string): [base64?: string, cause?: Found] {
  if (isStandard(text)) return [text]
  const inner = Buffer.from(text, 'base64').toString('latin1') // base64 of the hexadecimal digits
  const hex = [text, inner].find(each => /^[0-9a-f]{64}$/i.test(each))
  return hex === undefined ? [] : [Buffer.from(hex, 'hex').toString('base64'), found('signature-hex')]
}

/**
 * The causes of the signature that equals this digest.
 *
 * @returns `undefined` when no signature equals it
 */
export function matchSignature (signatures: readonly SignatureCandidate[], digest: Buffer): readonly Found[] | undefined {
  const expected = digest.toString('base64')
  return signatures.find(({ base64 }) => base64 === expected)?.causes
}

function signatureFacts (value: string, signatures: readonly SignatureCandidate[]): Found[] {
  if (signatures.some(({ causes }) => causes.length === 0)) return []
  const whole = signatures.find(({ base64 }) => base64 !== undefined)
  if (whole !== undefined) return [...whole.causes]
  const version = /\bv1,/.test(value) ? undefined : /\bv\d+[a-z]?(?=,)/i.exec(value)?.[0]
  return [version === undefined ? found('signature-malformed') : found('signature-version', version)]
}
