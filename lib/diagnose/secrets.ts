import { found } from './causes.ts'
import type { Found } from './causes.ts'
import { keyBytes } from '../verifiers/keyring.ts'

/** An HMAC key that the secret may have been meant to be. */
export interface KeyCandidate {
  readonly key: Uint8Array
  /** What would be wrong with the secret; empty for the key that the plugin makes of it. */
  readonly causes: readonly Found[]
  /** Which secret it comes from. */
  readonly index: number
  /** One of many guesses: not combined with other changes. */
  readonly guess: boolean
}

export interface SecretReading {
  readonly candidates: KeyCandidate[]
  /** What is wrong with the secret in any case. */
  readonly facts: Found[]
}

type Reading = readonly [bytes: Uint8Array, ...causes: Found[]]

export function readSecret (secret: unknown, index: number): SecretReading {
  const candidates: KeyCandidate[] = []
  const seen = new Set<string>()
  const add = (key: Uint8Array, causes: readonly Found[], guess = false): void => {
    const name = Buffer.from(key).toString('hex')
    if (key.length === 0 || seen.has(name)) return
    seen.add(name)
    candidates.push({ key, causes, index, guess })
  }

  if (secret instanceof Uint8Array) {
    add(secret, [])
    const bytes = Buffer.from(secret)
    const asText = bytes.toString('latin1')
    // Two texts lead to these bytes: they themselves where the secret has no prefix, and their base64.
    for (const text of [...(/^(?!whsec_)[\x20-\x7e]+$/.test(asText) ? [asText] : []), PREFIX + bytes.toString('base64')]) {
      for (const [key, ...causes] of readings(text)) if (causes.length > 0) add(key, causes)
    }
    return { candidates, facts: [] }
  }

  const text = typeof secret === 'string' ? secret : ''
  try {
    add(keyBytes(text, () => {}), [])
  } catch {} // refused at boot: `facts` says why
  const facts: Found[] = []
  const { bare, peeled } = peel(text)
  facts.push(...peeled)
  if (bare === '') return { candidates, facts: [found('secret-empty')] }
  if (/^sk-|^(?:sk|rk)_(?:live|test)_/.test(bare)) return { candidates, facts: [found('secret-is-api-key')] }
  if (/^(?:whe?|we|evt|proj|org)[-_][A-Za-z0-9]{16,}$/.test(bare)) facts.push(found('secret-is-id'))

  for (const [key, ...causes] of readings(bare)) add(key, [...peeled, ...causes])
  for (const [key, ...causes] of guesses(bare)) add(key, [...peeled, ...causes], true)
  facts.push(...faults(bare))
  return { candidates, facts }
}

const PREFIX = 'whsec_'
const PREFIX_LIKE = /^(?:whsec[_:.=\s-]?)+/i

/** What surrounds a secret that was pasted with too much. `\n` may be two characters: env files are not unescaped. */
const wrappings = [
  [found('secret-whitespace'), /^[\s\u200b-\u200d\u2060]+|(?:[\s\u200b-\u200d\u2060]|\\[nrt])+$/g],
  [found('secret-with-name'), /^(?:export\s+|set\s+)?(?!whsec)[A-Za-z_][\w.]*\s*[=:]\s*(?=["'\s]*(?:whsec|sk-))/i],
  [found('secret-quoted'), /^["'`\u2018-\u201f\u00ab\u00bb<]+|["'`\u2018-\u201f\u00ab\u00bb>]+[,;]?$/g]
] as const

function peel (text: string): { bare: string, peeled: Found[] } {
  const peeled = new Set<Found>()
  let bare = text
  for (let before; before !== bare;) {
    before = bare
    for (const [cause, pattern] of wrappings) {
      const less = bare.replace(pattern, '')
      if (less !== bare) peeled.add(cause)
      bare = less
    }
  }
  return { bare, peeled: [...peeled] }
}

/** The secret's text without its prefix, and what is wrong with that. */
function unprefixed (bare: string): { rest: string, causes: Found[] } {
  const prefix = PREFIX_LIKE.exec(bare)?.[0]
  if (prefix === undefined) return { rest: bare, causes: [found('secret-prefix-missing')] }
  return { rest: bare.slice(prefix.length), causes: prefix === PREFIX ? [] : [found('secret-prefix-mangled')] }
}

/** Every key that the text may stand for, the likelier first. */
function * readings (bare: string): Generator<Reading> {
  const { rest, causes } = unprefixed(bare)
  for (const [bytes, ...more] of base64Readings(rest)) {
    yield [bytes, ...causes, ...more]
    const inner = peel(bytes.toString('latin1')).bare
    // Encoded twice, with the prefix within or without.
    const bytesOfInner = strictBase64(inner.startsWith(PREFIX) ? inner.slice(PREFIX.length) : inner)
    if (bytesOfInner !== undefined) yield [bytesOfInner, ...(inner.startsWith(PREFIX) ? [] : causes), ...more, found('secret-base64-twice')]
  }
  const parts = bare.split(/[\s,;|]+/)
  if (parts.length > 1) {
    for (const part of parts) {
      const bytes = part.startsWith(PREFIX) ? strictBase64(part.slice(PREFIX.length)) : undefined
      if (bytes !== undefined) yield [bytes, found('secret-list')]
    }
  }
  if (isHex(rest)) yield [Buffer.from(rest, 'hex'), found('secret-base64-decoded', 'hexadecimal')]
  if (/[^\x20-\x7e]/.test(rest)) {
    yield [Buffer.from(rest), found('secret-base64-decoded', 'its bytes as UTF-8 text')]
    yield [Buffer.from(rest, 'latin1'), found('secret-base64-decoded', 'its bytes as Latin-1 text')]
  }
  yield [Buffer.from(bare), found('secret-as-text')]
  yield [Buffer.from(rest), found('secret-as-text')]
}

/** The base64 that the text may have been before it was escaped, wrapped or rewritten. */
function * base64Readings (rest: string): Generator<readonly [bytes: Buffer, ...causes: Found[]]> {
  const forms: Array<readonly [text: string, ...causes: Found[]]> = [[rest]]
  const change = (cause: Found, to: (text: string) => string): void => {
    for (const [text, ...causes] of [...forms]) {
      const changed = to(text)
      if (changed !== text) forms.push([changed, ...causes, cause])
    }
  }
  change(found('secret-escaped', 'URL-encoded'), text => text.replace(/%(2b|2f|3d)/gi, (_, hex: string) => String.fromCharCode(parseInt(hex, 16))))
  change(found('secret-escaped', 'JSON or shell escapes'), text => text.replace(/\\u00(2b|2f|3d)/gi, (_, hex: string) => String.fromCharCode(parseInt(hex, 16))).replace(/\\(?=[/+=])/g, ''))
  change(found('secret-escaped', '"+" became a space'), text => text.replaceAll(' ', '+'))
  change(found('secret-whitespace'), text => text.replace(/\s+/g, ''))
  change(found('secret-base64-urlsafe'), text => text.replaceAll('-', '+').replaceAll('_', '/'))
  change(found('secret-base64-padding'), unpadded)
  for (const [text, ...causes] of forms) {
    const bytes = strictBase64(text)
    if (bytes !== undefined) yield [bytes, ...causes]
  }
}

const ALPHABET = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/'

/** Where one character is gone from the end of the base64, it can be found. */
function * guesses (bare: string): Generator<Reading> {
  const { rest, causes } = unprefixed(bare)
  const text = unpadded(rest)
  for (const last of ALPHABET) {
    const bytes = strictBase64(text + last)
    if (bytes !== undefined && bytes.length % 8 === 0) yield [bytes, ...causes, found('secret-cut', 'its last character is missing')]
  }
}

/** What no signing secret is, whether or not the rest of it is right. */
function faults (bare: string): Found[] {
  const { rest, causes } = unprefixed(bare)
  // Without the prefix any text is a secret.
  if (causes.some(({ cause }) => cause === 'secret-prefix-missing')) return []
  const letters = rest.replace(/[^A-Za-z]/g, '')
  const isOneCase = letters.length >= MIN_LETTERS && (letters === letters.toLowerCase() || letters === letters.toUpperCase())
  if (isOneCase && !isHex(rest)) return [...causes, found('secret-case-changed')]
  if (strictBase64(rest) !== undefined) return causes
  if (bare.split(/[\s,;|]+/).filter(part => part.startsWith(PREFIX)).length > 1) return [found('secret-list')]
  const [readable] = base64Readings(rest)
  if (readable !== undefined) {
    const [, ...faults] = readable
    return [...causes, ...faults]
  }
  return [...causes, /^[A-Za-z0-9+/]*=*$/.test(rest) ? found('secret-cut', 'what follows whsec_ is no whole base64') : found('secret-not-base64')]
}

/** As many letters as chance does not leave in one case. */
const MIN_LETTERS = 20

function isHex (text: string): boolean {
  return /^(?:[0-9a-f]{2}){16,}$/i.test(text)
}

function unpadded (text: string): string {
  return text.replace(/=+$/, '')
}

/** As the plugin reads what follows the prefix. */
function strictBase64 (text: string): Buffer | undefined {
  try {
    return Buffer.from(keyBytes(PREFIX + text, () => {}))
  } catch {
    return undefined
  }
}
