import { found } from './causes.ts'
import type { Found } from './causes.ts'
import { keyBytes } from '../verifiers/keyring.ts'

/** An HMAC key that the configured secret may have been meant to be. */
export interface KeyCandidate {
  readonly key: Uint8Array
  /** What is wrong with the secret if this is the key. Empty for the key that the plugin derives from it. */
  readonly causes: readonly Found[]
  /** The index of the secret that the key comes from. */
  readonly index: number
  /** Whether the key is one of many guesses, which are not combined with other changes. */
  readonly guess: boolean
}

export interface SecretReading {
  readonly candidates: KeyCandidate[]
  /** Faults of the secret that need no signature to be proved. */
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
    // Two texts give these bytes: the bytes themselves as text, if it has no prefix, and whsec_ with their base64.
    for (const text of [...(/^(?!whsec_)[\x20-\x7e]+$/.test(asText) ? [asText] : []), PREFIX + bytes.toString('base64')]) {
      for (const [key, ...causes] of readings(text)) if (causes.length > 0) add(key, causes)
    }
    return { candidates, facts: [] }
  }

  const text = typeof secret === 'string' ? secret : ''
  try {
    add(keyBytes(text, () => {}), [])
  } catch {} // the plugin refuses the secret at boot, and `facts` say why
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
const PREFIX_LIKE = /^(?:v\d,)?(?:whsec[_:.=\s-]?)+/i

/** What may surround a secret that was pasted carelessly. `\n` may be two characters, because some env files are not unescaped. */
const wrappings = [
  [found('secret-whitespace'), /^[\s\u200b-\u200d\u2060]+|(?:[\s\u200b-\u200d\u2060]|\\[nrt])+$/g],
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

/** The text of the secret without its prefix and, when it is base64, without line breaks. */
function unprefixed (bare: string): { rest: string, causes: Found[] } {
  const prefix = PREFIX_LIKE.exec(bare)?.[0]
  const after = bare.slice(prefix?.length ?? 0)
  const causes = prefix === undefined ? [found('secret-prefix-missing')] : prefix === PREFIX ? [] : [found('secret-prefix-mangled')]
  const joined = after.replace(/\s+/g, '')
  return joined === after || strictBase64(joined) === undefined ? { rest: after, causes } : { rest: joined, causes: [...causes, found('secret-whitespace')] }
}

/** The keys that the text may stand for, the likelier first. */
function * readings (bare: string): Generator<Reading> {
  const { rest, causes } = unprefixed(bare)
  const bytes = strictBase64(rest)
  if (bytes !== undefined) {
    yield [bytes, ...causes]
    const inner = peel(bytes.toString('latin1')).bare
    // Encoded twice, with the prefix inside the inner text or without it.
    const bytesOfInner = strictBase64(inner.startsWith(PREFIX) ? inner.slice(PREFIX.length) : inner)
    if (bytesOfInner !== undefined) yield [bytesOfInner, ...(inner.startsWith(PREFIX) ? [] : causes), found('secret-base64-twice')]
  }
  yield [Buffer.from(bare), found('secret-as-text')]
  yield [Buffer.from(rest), found('secret-as-text')]
}

const ALPHABET = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/'

/** One character that is missing at the end of the base64 can be found by trying all of them. */
function * guesses (bare: string): Generator<Reading> {
  const { rest, causes } = unprefixed(bare)
  for (const last of ALPHABET) {
    const bytes = strictBase64(rest.replace(/=+$/, '') + last)
    if (bytes !== undefined && bytes.length % 8 === 0) yield [bytes, ...causes, found('secret-cut', 'its last character is missing')]
  }
}

/** Faults that no signing secret can have, even if a key is found. */
function faults (bare: string): Found[] {
  const { rest, causes } = unprefixed(bare)
  // Without the prefix, any text is a valid secret.
  if (causes.some(({ cause }) => cause === 'secret-prefix-missing')) return []
  if (strictBase64(rest) !== undefined) return causes
  return [...causes, /^[A-Za-z0-9+/]*=*$/.test(rest) ? found('secret-cut', 'what follows whsec_ is no whole base64') : found('secret-not-base64')]
}

/** Decodes the text as the plugin decodes what follows the prefix. */
function strictBase64 (text: string): Buffer | undefined {
  try {
    return Buffer.from(keyBytes(PREFIX + text, () => {}))
  } catch {
    return undefined
  }
}
