import { isUtf8 } from 'node:buffer'
import zlib from 'node:zlib'
import { found } from './causes.ts'
import type { Found } from './causes.ts'
import { inEventOrder, isCutJson, parseJson, serialize, sorted, withPlainNumbers } from './json.ts'
import type { Escaping, Json, Layout } from './json.ts'

/** What may have been signed in place of the bytes that arrived. */
export interface BodyCandidate {
  readonly bytes: Buffer
  readonly causes: readonly Found[]
  /** One of many guesses: not combined with other changes. */
  readonly guess: boolean
}

/**
 * Every body that the arrived bytes may have been made of, the likelier first.
 *
 * @param max bytes of a body that is rewritten, or decompressed to
 */
export function * bodyCandidates (body: Buffer, max: number): Generator<BodyCandidate> {
  if (body.length === 0 || body.length > max) return
  const text = body.toString()
  for (const [content, ...causes] of changes(body, text, max)) {
    const bytes = typeof content === 'string' ? Buffer.from(content) : content
    if (!bytes.equals(body)) yield { bytes, causes, guess: false }
  }
  for (const [bytes, cause] of decompressed(body, max)) yield { bytes, causes: [cause], guess: true }
  for (const bytes of replaced(body, text)) yield { bytes, causes: [found('body-charset', 'a character was lost to U+FFFD')], guess: true }
}

type Change = readonly [content: Buffer | string, cause: Found]

function * changes (body: Buffer, text: string, max: number): Generator<Change> {
  const json = parseJson(text.replace(BOM, ''))
  yield * lines(body)
  yield * charsets(body, text)
  yield * wrapped(text)
  yield * compressed(body, json, max)
  if (json !== undefined) yield * serializations(json)
}

const BOM = /^\ufeff/
const BOM_BYTES = Buffer.from('\ufeff')

/** Latin-1 keeps each byte: these work on bodies of any charset. */
function * lines (body: Buffer): Generator<Change> {
  const text = body.toString('latin1')
  const bytes = (changed: string): Buffer => Buffer.from(changed, 'latin1')
  yield [bytes(text.replace(/\r?\n$/, '')), found('body-newline-added')]
  yield [bytes(text.replace(/[\r\n]{1,8}$/, '')), found('body-newline-added')]
  yield [bytes(`${text}\n`), found('body-newline-removed')]
  yield [bytes(`${text}\r\n`), found('body-newline-removed')]
  yield [bytes(text.trim()), found('body-whitespace')]
  if (body.indexOf(BOM_BYTES) === 0) yield [body.subarray(BOM_BYTES.length), found('body-bom-added')]
  else yield [Buffer.concat([BOM_BYTES, body]), found('body-bom-removed')]
  yield [bytes(text.replaceAll('\r\n', '\n')), found('body-crlf', 'LF became CRLF')]
  yield [bytes(text.replaceAll(/\r?\n/g, '\r\n')), found('body-crlf', 'CRLF became LF')]
}

function * charsets (body: Buffer, text: string): Generator<Change> {
  if (/^(?:\xff\xfe|\xfe\xff)|^.\0|^\0./s.test(body.toString('latin1', 0, 2))) {
    for (const charset of ['utf-16le', 'utf-16be']) {
      yield [new TextDecoder(charset).decode(body), found('body-charset', 'it arrived as UTF-16')]
    }
  }
  if (!/[^\0-\x7f]/.test(text)) return
  if (isUtf8(body)) {
    yield [Buffer.from(text, 'latin1'), found('body-charset', 'UTF-8 was read as Latin-1 and encoded again, or Latin-1 was turned into UTF-8')]
    yield [toWindows1252(text), found('body-charset', 'UTF-8 was read as windows-1252 and encoded again')]
    for (const form of ['NFC', 'NFD']) yield [text.normalize(form), found('body-charset', 'its characters were composed or decomposed: Unicode normalization')]
  } else {
    yield [body.toString('latin1'), found('body-charset', 'UTF-8 was turned into Latin-1')]
    yield [fromWindows1252(body), found('body-charset', 'UTF-8 was turned into windows-1252')]
    yield [text, found('body-charset', 'the sender signed the text, in which bytes that are not UTF-8 are U+FFFD')]
  }
}

/** What is not Latin-1 in windows-1252. By hand: Node 20 decodes it as Latin-1. */
const WINDOWS_1252 = '\u20ac\x81\u201a\u0192\u201e\u2026\u2020\u2021\u02c6\u2030\u0160\u2039\u0152\x8d\u017d\x8f' +
  '\x90\u2018\u2019\u201c\u201d\u2022\u2013\u2014\u02dc\u2122\u0161\u203a\u0153\x9d\u017e\u0178'

function fromWindows1252 (body: Buffer): string {
  return body.toString('latin1').replaceAll(/[\x80-\x9f]/g, char => WINDOWS_1252[char.charCodeAt(0) - 0x80]!)
}

function toWindows1252 (text: string): Buffer {
  return Buffer.from(text.replaceAll(/[^\0-\x7f\xa0-\xff]/g, char => {
    const index = WINDOWS_1252.indexOf(char)
    return index === -1 ? '?' : String.fromCharCode(0x80 + index)
  }), 'latin1')
}

/** The text within another text. */
function * wrapped (text: string): Generator<Change> {
  const trimmed = text.trim()
  if (trimmed.length > 0 && /^[\w+/-]+=*$/.test(trimmed)) yield [Buffer.from(trimmed, 'base64'), found('body-base64')]
  if (/^(?:[\w.]*=)?(?:%7B|%5B|%22)/i.test(trimmed) || /^[^{]*=\s*\{|\}=$/.test(trimmed)) {
    const [[name, value] = ['', '']] = new URLSearchParams(trimmed)
    yield [value, found('body-form-encoded')]
    yield [name, found('body-form-encoded')]
    yield [trimmed.replace(/=$/, ''), found('body-form-encoded')]
    // A "+" that was not encoded is itself.
    yield [attempt(() => decodeURIComponent(trimmed.replace(/^[\w.]*=/, ''))) ?? value, found('body-form-encoded')]
  }
  if (trimmed.includes(' ')) yield [text.replaceAll(' ', '+'), found('body-url-decoded')]
  yield [encodeURIComponent(text), found('body-url-decoded')]
  yield [encodeURIComponent(text).replaceAll('%20', '+'), found('body-url-decoded')]
  if (text.includes('&quot;') || text.includes('&#34;') || text.includes('&amp;')) yield [unescapeHtml(text), found('body-html-escaped')]

  const value = attempt(() => JSON.parse(text) as unknown)
  if (typeof value === 'string') yield [value, found('body-stringified')]
  if (typeof value !== 'object' || value === null) return
  const { type, data, isBase64Encoded } = value as Record<string, unknown>
  if (type === 'Buffer' && Array.isArray(data)) yield [Buffer.from(data as number[]), found('body-buffer-json')]
  for (const field of ['body', 'rawBody', 'payload', 'data', 'content', 'message']) {
    const inner = (value as Record<string, unknown>)[field]
    if (typeof inner === 'string') yield [Buffer.from(inner, isBase64Encoded === true ? 'base64' : 'utf8'), found('body-in-envelope')]
  }
}

function attempt<T> (work: () => T): T | undefined {
  try {
    return work()
  } catch {
    return undefined
  }
}

const ENTITIES: Readonly<Record<string, string>> = { '&quot;': '"', '&#34;': '"', '&#39;': "'", '&#x27;': "'", '&lt;': '<', '&gt;': '>', '&amp;': '&' }

function unescapeHtml (text: string): string {
  return text.replaceAll(/&(?:quot|lt|gt|amp|#34|#39|#x27);/g, entity => ENTITIES[entity]!)
}

/** The best Brotli takes a second for a megabyte. Its window alone takes some ms, which are too many where bodies are bounded below this. */
const MAX_BROTLI = 16_384

/** The sender signed the plain bytes. */
function * compressed (body: Buffer, json: Json | undefined, max: number): Generator<Change> {
  if (json !== undefined) return
  const bound = { maxOutputLength: max }
  for (const [name, decompress] of [['gzip', zlib.gunzipSync], ['deflate', zlib.inflateSync], ['raw deflate', zlib.inflateRawSync], ['br', zlib.brotliDecompressSync]] as const) {
    if (name === 'br' && max < MAX_BROTLI) return
    const plain = attempt(() => decompress(body, bound)) // not compressed in this way, or a bomb
    if (plain !== undefined) yield [plain, found('body-compressed', name)]
  }
}

/** The sender signed the compressed bytes, which the usual tools make in few ways. */
function * decompressed (body: Buffer, max: number): Generator<readonly [bytes: Buffer, cause: Found]> {
  for (const level of [6, 9, 1]) {
    const gzipped = zlib.gzipSync(body, { level })
    for (const system of [3, 255, 0]) {
      const bytes = Buffer.from(gzipped)
      bytes[9] = system // Unix, unknown, FAT: libraries differ
      yield [bytes, found('body-decompressed', 'gzip')]
    }
    yield [zlib.deflateSync(body, { level }), found('body-decompressed', 'deflate')]
  }
  if (body.length > MAX_BROTLI || max < MAX_BROTLI) return
  for (const quality of [11, 4, 6]) {
    yield [zlib.brotliCompressSync(body, { params: { [zlib.constants.BROTLI_PARAM_QUALITY]: quality } }), found('body-decompressed', 'br')]
  }
}

const layouts: readonly Layout[] = [
  { name: 'JSON.stringify(value) writes it (no spaces)', comma: ',', colon: ':' },
  { name: 'Python\'s json.dumps(value) writes it (", " and ": ")', comma: ', ', colon: ': ' },
  { name: 'JSON.stringify(value, null, 2) writes it (indented by 2)', comma: ',', colon: ': ', indent: '  ' },
  { name: 'JSON.stringify(value, null, 4) writes it (indented by 4)', comma: ',', colon: ': ', indent: '    ' },
  { name: 'JSON.stringify(value, null, "\\t") writes it (indented by tabs)', comma: ',', colon: ': ', indent: '\t' },
  { name: 'a writer with "," and ": " makes it', comma: ',', colon: ': ' },
  { name: 'a writer with ", " and ":" makes it', comma: ', ', colon: ':' }
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
  { name: 'upper-case \\u escapes for what is not ASCII', escape: json => json.replaceAll(/[\x7f-\uffff]/g, upperHex) },
  {
    name: '\\u escapes as .NET',
    escape: json => json[0] + json.slice(1, -1).replaceAll(/\\.|[<>&'+`\x7f-\uffff]/g, match => match === '\\"' ? '\\u0022' : match.length > 1 ? match : upperHex(match)) + json[0]
  }
]

function * serializations (json: Json): Generator<Change> {
  const seen = new Set<string>()
  const plain = serialize(json, layouts[0]!, escapings[0]!)
  // What an escaping does not change needs no trying: it rarely does.
  const effective = escapings.filter(({ escape, name }) => name === '' || escape(`"${plain.slice(1, -1)}"`) !== `"${plain.slice(1, -1)}"`)
  for (const [order, ordered] of [
    ['', json],
    ['its keys in the order of OpenAI\'s events', inEventOrder(json)],
    ['its keys sorted', sorted(json)],
    ['numbers as JavaScript writes them', withPlainNumbers(json)]
  ] as const) {
    // The order is told by the compact form.
    const form = serialize(ordered, layouts[0]!, escapings[0]!)
    if (seen.has(form)) continue
    seen.add(form)
    for (const escaping of effective) {
      const rank = escapings.indexOf(escaping)
      // Seldom ways are not combined with each other: the work is bounded.
      if (order !== '' && rank > 2) continue
      for (const layout of rank === 0 ? layouts : layouts.slice(0, 5)) {
        const text = serialize(ordered, layout, escaping)
        const names = [layout.name, escaping.name, order].filter(name => name !== '')
        yield [text, found('body-reserialized', names.join(', with '))]
        if (rank < 2) yield [`${text}\n`, found('body-reserialized', [...names, 'a newline at the end'].join(', with '))]
        if (rank === 0 && layout.indent !== undefined) yield [text.replaceAll('\n', '\r\n'), found('body-reserialized', [...names, 'CRLF line ends'].join(', with '))]
      }
    }
  }
}

/** What one lost character may have been: a Latin-1 letter, in that charset or in UTF-8. */
function * replaced (body: Buffer, text: string): Generator<Buffer> {
  const [run = '', ...others] = text.match(/\ufffd+/g) ?? []
  if (run === '' || run.length > 2 || others.length > 0 || !isUtf8(body)) return
  const [before, after] = text.split(run) as [string, string]
  for (let code = 0x80; code <= 0xff; code++) {
    const lost = run.length === 1 ? Buffer.of(code) : Buffer.from(String.fromCharCode(code))
    yield Buffer.concat([Buffer.from(before), lost, Buffer.from(after)])
  }
}

/** What is wrong with the body in any case. @param max bytes of a body that is read */
export function bodyFacts (body: Buffer, headers: ReadonlyMap<string, string>, max: number): Found[] {
  const facts: Found[] = []
  if (body.length === 0) return [found('body-empty')]
  const text = body.toString('utf8', 0, max)
  const coerced = /^(?:\[object \w+\]|undefined)$/.exec(text.trim())?.[0]
  if (coerced !== undefined) return [found('body-not-captured', coerced)]
  const announced = headers.get('content-length')
  // A decoded body has another length than the encoded one that was announced.
  const length = announced !== undefined && /^\d+$/.test(announced) && !headers.has('content-encoding') ? Number(announced) : body.length
  if (body.length <= max && isCutJson(text)) {
    facts.push(found('body-cut', length > body.length ? `: ${body.length} of ${length} bytes arrived` : ` after ${body.length} bytes`))
  }
  if (length !== body.length) facts.push(found('body-length-differs', `${length} bytes, ${body.length} arrived`))
  return facts
}

/** Whether this is one of OpenAI's events, as far as that can be told of a body that nobody has verified. @param max bytes of a body that is read */
export function isEvent (body: Buffer, max: number): boolean {
  const value = body.length > max ? undefined : attempt(() => JSON.parse(body.toString()) as { object?: unknown, type?: unknown } | null)
  return value?.object === 'event' && typeof value.type === 'string'
}
