import { isUtf8 } from 'node:buffer'
import zlib from 'node:zlib'
import { found } from './causes.ts'
import type { Found } from './causes.ts'
import { parseJson, serialize, sorted } from './json.ts'
import type { Escaping, Json, Layout } from './json.ts'

/** Bytes that may have been signed instead of those that arrived. */
export interface BodyCandidate {
  readonly bytes: Buffer
  readonly causes: readonly Found[]
}

/**
 * The bodies from which the arrived bytes may have been made, the likelier first.
 *
 * @param max the largest body, in bytes, that is rewritten, or that is decompressed to
 */
export function * bodyCandidates (body: Buffer, max: number): Generator<BodyCandidate> {
  if (body.length === 0 || body.length > max) return
  const text = body.toString()
  for (const [content, ...causes] of changes(body, text, max)) {
    const bytes = typeof content === 'string' ? Buffer.from(content) : content
    if (!bytes.equals(body)) yield { bytes, causes }
  }
}

type Change = readonly [content: Buffer | string, cause: Found]

function * changes (body: Buffer, text: string, max: number): Generator<Change> {
  const json = parseJson(text)
  yield * newlines(body)
  yield * charsets(body, text)
  yield * wrapped(text)
  if (json === undefined) yield * compressed(body, max)
  else yield * serializations(json)
}

/** Works on the Latin-1 text, which has one character for each byte, so that bodies in any charset are preserved. */
function * newlines (body: Buffer): Generator<Change> {
  const text = body.toString('latin1')
  const bytes = (changed: string): Buffer => Buffer.from(changed, 'latin1')
  yield [bytes(text.replace(/\r?\n$/, '')), found('body-newline-added')]
  yield [bytes(text.replace(/[\r\n]{1,8}$/, '')), found('body-newline-added')]
  yield [bytes(`${text}\n`), found('body-newline-removed')]
  yield [bytes(`${text}\r\n`), found('body-newline-removed')]
}

function * charsets (body: Buffer, text: string): Generator<Change> {
  if (!/[^\0-\x7f]/.test(text)) return
  if (isUtf8(body)) {
    yield [Buffer.from(text, 'latin1'), found('body-charset', 'UTF-8 was read as Latin-1 and encoded again, or Latin-1 was turned into UTF-8')]
  } else {
    yield [body.toString('latin1'), found('body-charset', 'UTF-8 was turned into Latin-1')]
    yield [text, found('body-charset', 'the sender signed the text, in which bytes that are not UTF-8 are U+FFFD')]
  }
}

/** The signed text may be contained in the text that arrived. */
function * wrapped (text: string): Generator<Change> {
  const trimmed = text.trim()
  if (trimmed.length > 0 && /^[\w+/-]+=*$/.test(trimmed)) yield [Buffer.from(trimmed, 'base64'), found('body-base64')]
  if (/^(?:[\w.]*=)?(?:%7B|%5B|%22)/i.test(trimmed) || /^[^{]*=\s*\{|\}=$/.test(trimmed)) {
    const [[name, value] = ['', '']] = new URLSearchParams(trimmed)
    yield [value, found('body-form-encoded')]
    yield [name, found('body-form-encoded')]
    yield [trimmed.replace(/=$/, ''), found('body-form-encoded')]
    // URLSearchParams reads "+" as a space. decodeURIComponent() keeps a "+" that was not encoded.
    yield [orUndefined(() => decodeURIComponent(trimmed.replace(/^[\w.]*=/, ''))) ?? value, found('body-form-encoded')]
  }

  const value = orUndefined(() => JSON.parse(text) as unknown)
  if (typeof value !== 'object' || value === null) return
  const { type, data, isBase64Encoded } = value as Record<string, unknown>
  if (type === 'Buffer' && Array.isArray(data)) yield [Buffer.from(data as number[]), found('body-buffer-json')]
  for (const field of ['body', 'rawBody', 'payload', 'data', 'content', 'message']) {
    const inner = (value as Record<string, unknown>)[field]
    if (typeof inner === 'string') yield [Buffer.from(inner, isBase64Encoded === true ? 'base64' : 'utf8'), found('body-in-envelope')]
  }
}

function orUndefined<T> (work: () => T): T | undefined {
  try {
    return work()
  } catch {
    return undefined
  }
}

/** Allocating the window of Brotli takes some ms, which is too long for diagnoseQuickly(), whose limit is below this size. */
const MIN_BROTLI = 16_384

/** The sender signed the uncompressed bytes. */
function * compressed (body: Buffer, max: number): Generator<Change> {
  for (const [name, decompress] of [['gzip', zlib.gunzipSync], ['deflate', zlib.inflateSync], ['br', zlib.brotliDecompressSync]] as const) {
    if (name === 'br' && max < MIN_BROTLI) return
    const plain = orUndefined(() => decompress(body, { maxOutputLength: max })) // not compressed in this format, or larger than `max`
    if (plain !== undefined) yield [plain, found('body-compressed', name)]
  }
}

const layouts: readonly Layout[] = [
  { name: 'JSON.stringify(value) writes it (no spaces)', comma: ',', colon: ':' },
  { name: 'Python\'s json.dumps(value) writes it (", " and ": ")', comma: ', ', colon: ': ' },
  { name: 'JSON.stringify(value, null, 2) writes it (indented by 2)', comma: ',', colon: ': ', indent: '  ' }
]

const hex = (char: string): string => `\\u${char.charCodeAt(0).toString(16).padStart(4, '0')}`
const upperHex = (char: string): string => `\\u${char.charCodeAt(0).toString(16).toUpperCase().padStart(4, '0')}`
const ascii = (json: string): string => json.replaceAll(/[\x7f-\uffff]/g, hex)
const slashes = (json: string): string => json.replaceAll('/', '\\/')

const escapings: readonly Escaping[] = [
  { name: '', escape: json => json },
  { name: '\\u escapes for what is not ASCII', escape: ascii },
  { name: 'escaped slashes and \\u escapes, as PHP\'s json_encode', escape: json => slashes(ascii(json)) },
  { name: 'escaped slashes', escape: slashes },
  { name: '\\u escapes for <, > and &, as Go and Rails', escape: json => json.replaceAll(/[<>&\u2028\u2029]/g, hex) },
  { name: 'upper-case \\u escapes for what is not ASCII', escape: json => json.replaceAll(/[\x7f-\uffff]/g, upperHex) }
]

function * serializations (json: Json): Generator<Change> {
  const seen = new Set<string>()
  for (const [order, ordered] of [['', json], ['its keys sorted', sorted(json)]] as const) {
    for (const escaping of escapings) {
      for (const layout of layouts) {
        const text = serialize(ordered, layout, escaping)
        if (seen.has(text)) continue
        seen.add(text)
        const names = [layout.name, escaping.name, order].filter(name => name !== '')
        yield [text, found('body-reserialized', names.join(', with '))]
        yield [`${text}\n`, found('body-reserialized', [...names, 'a newline at the end'].join(', with '))]
      }
    }
  }
}

/**
 * Faults of the body that need no signature to be proved.
 *
 * @param max bytes of the body that are read
 */
export function bodyFacts (body: Buffer, headers: ReadonlyMap<string, string>, max: number): Found[] {
  if (body.length === 0) return [found('body-empty')]
  const coerced = /^(?:\[object \w+\]|undefined)$/.exec(body.toString('utf8', 0, max).trim())?.[0]
  if (coerced !== undefined) return [found('body-not-captured', coerced)]
  const announced = headers.get('content-length')
  // The announced length is that of the encoded body, so it cannot be compared once the body has been decoded.
  const isTold = announced !== undefined && /^\d+$/.test(announced) && !headers.has('content-encoding')
  return isTold && Number(announced) !== body.length ? [found('body-length-differs', `${announced} bytes, ${body.length} arrived`)] : []
}

/**
 * Whether an unverified body looks like one of OpenAI's events.
 *
 * @param max the largest body, in bytes, that is parsed
 */
export function isEvent (body: Buffer, max: number): boolean {
  const value = body.length > max ? undefined : orUndefined(() => JSON.parse(body.toString()) as { object?: unknown, type?: unknown } | null)
  return value?.object === 'event' && typeof value.type === 'string'
}
