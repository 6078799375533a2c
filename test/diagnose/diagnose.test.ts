import { createHmac, createSecretKey } from 'node:crypto'
import { once } from 'node:events'
import { readFileSync, utimesSync, writeFileSync } from 'node:fs'
import { createRequire, syncBuiltinESMExports } from 'node:module'
import { join } from 'node:path'
import { Writable } from 'node:stream'
import { styleText } from 'node:util'
import zlib from 'node:zlib'
import Fastify from 'fastify'
import type { FastifyInstance } from 'fastify'
import t from 'tap'
import openaiWebhook, { diagnose, standardWebhooks, xOpenAISignature } from '../../lib/index.ts'
import type { Diagnosis, DiagnoseOptions, OpenAIWebhookOptions } from '../../lib/index.ts'
import { formatSaved } from '../../lib/cli/saved.ts'
import { diagnoseQuickly } from '../../lib/diagnose.ts'
import { causes } from '../../lib/diagnose/causes.ts'
import { sampleEvent, sampleTypes, sign } from '../../lib/testing/index.ts'
import { launch, start } from '../support/command.ts'
import { post, stoppedClock, VECTOR } from '../support/deliveries.ts'
import { sized } from '../support/size.ts'

// With "+" and "/" in its base64, and 32 bytes as OpenAI's have.
const KEY = Buffer.from('fbff6e1d0a42c97b35e88c11d7064fa92be370b85d9e16f3a4c8027d61eb9fbe', 'hex')
const BASE64 = KEY.toString('base64')
const SECRET = `whsec_${BASE64}`
const OTHER = `whsec_${Buffer.from('0f1e2d3c4b5a69788796a5b4c3d2e1f00112233445566778899aabbccddeeff0', 'hex').toString('base64')}`
const SECONDS = 1_800_000_000
const NOW = SECONDS * 1000
const ID = 'wh_685c059ae39c8190af8c71ed1022a24d'
const EVENT = {
  id: 'evt_685c059ae3a481909bdc86819b066fb6',
  object: 'event',
  created_at: SECONDS,
  type: 'response.completed',
  data: { id: 'resp_PAYLOAD4711', note: 'Grüße <b>"π"</b> & a/b+c’s €', n: [1, 2.5, { yes: true, no: null }], none: [], empty: {} }
}
const BODY = JSON.stringify(EVENT)

type Headers = Record<string, string>

const signed = (body: string | Uint8Array = BODY, options: Parameters<typeof sign>[1] = {}): Headers =>
  sign(body, { secret: SECRET, webhookId: ID, timestamp: SECONDS, ...options })

/** As a sender does that is not OpenAI. */
const mac = (key: string | Buffer, content: string | Buffer = BODY, id = ID, timestamp = String(SECONDS)): Buffer =>
  createHmac('sha256', key).update(`${id}.${timestamp}.`).update(content).digest()
const v1 = (digest: Buffer): Headers => ({ 'webhook-signature': `v1,${digest.toString('base64')}` })

/** Without some headers, and with others. */
const changed = (headers: Headers, changes: Record<string, string | undefined>): Headers =>
  Object.fromEntries(Object.entries({ ...headers, ...changes }).filter((entry): entry is [string, string] => entry[1] !== undefined))
const renamed = (to: (name: string) => string, headers = signed()): Headers =>
  Object.fromEntries(Object.entries(headers).map(([name, value]) => [name.startsWith('webhook-') ? to(name) : name, value]))
const each = (change: (value: string) => string, ...names: string[]): Headers =>
  Object.fromEntries(Object.entries(signed()).map(([name, value]) => [name, names.includes(name) ? change(value) : value]))

interface Fixture extends Partial<DiagnoseOptions> {
  also?: string[]
  says?: RegExp
}

/** What arrived, where something else was signed. */
const arrived = (rawBody: string | Buffer, was: string | Buffer = BODY, headers: Record<string, string | undefined> = {}): Fixture =>
  ({ rawBody, headers: changed(signed(was), headers) })

const python = (json: string): string => json.replaceAll('":', '": ').replaceAll(',"', ', "').replaceAll(',{', ', {').replaceAll('1,2', '1, 2')
const ascii = (json: string): string => json.replaceAll(/[\u0080-\uffff]/g, char => `\\u${char.charCodeAt(0).toString(16).padStart(4, '0')}`)
const pretty = JSON.stringify(EVENT, null, 2)
const cafe = '{"type":"response.completed","data":{"id":"resp_PAYLOAD4711","note":"caf\u00e9"}}'
const umlaut = (note: Buffer): Buffer => Buffer.concat([Buffer.from('{"type":"response.completed","note":"'), note, Buffer.from('"}')])

const fixtures: Record<string, Record<string, Fixture>> = {
  'secret-empty': {
    'no text': { secret: '' },
    'white space': { secret: ' \n' },
    quotes: { secret: '""' },
    'no secret at all': { secret: undefined as never }
  },
  'secret-is-api-key': {
    "OpenAI's": { secret: 'sk-proj-abcdefghijklmnopqrstuvwxyz0123456789' },
    'with quotes and a newline': { secret: '"sk-abcdefghijklmnopqrstuvwxyz0123456789"\n' },
    "Stripe's": { secret: 'sk_live_abcdefghijklmnopqrstuvwxyz' }
  },
  'secret-is-id': {
    'of the endpoint': { secret: 'we_685c059ae39c8190af8c71ed1022a24d' },
    'of the project': { secret: 'proj_AbCdEfGhIjKlMnOpQrSt' }
  },
  'secret-quoted': {
    double: { secret: `"${SECRET}"`, says: /with that undone the signature matches$/ },
    single: { secret: `'${SECRET}'` },
    'one of them': { secret: `${SECRET}"` },
    typographic: { secret: `“${SECRET}”` },
    'angle brackets': { secret: `<${SECRET}>` },
    'out of a program': { secret: `"${SECRET}",` },
    'one secret of two': { secret: [OTHER, `"${SECRET}"`], says: /\(secret 2 of 2\)/ },
    'without the prefix': { secret: `"${BASE64}"`, also: ['secret-prefix-missing'] },
    'around another secret': { secret: `"${OTHER}"`, says: /that is not all/ },
    'and a clock that is ahead': { secret: `"${SECRET}"`, now: NOW + 3_600_000, also: ['timestamp-stale'], says: /matches, but .* 1 h before/ },
    'and JSON serialised again': { secret: `"${SECRET}"`, rawBody: python(BODY), also: ['body-reserialized'] }
  },
  'secret-whitespace': {
    'a newline': { secret: `${SECRET}\n` },
    CRLF: { secret: `${SECRET}\r\n` },
    spaces: { secret: `  ${SECRET} ` },
    'a newline in two characters': { secret: `${SECRET}\\n` },
    'a character of no width': { secret: `\u200b${SECRET}` },
    'a line break within': { secret: `${SECRET.slice(0, 30)}\n${SECRET.slice(30)}` },
    'a line break within another secret': { secret: `${OTHER.slice(0, 30)}\n${OTHER.slice(30)}` }
  },
  'secret-prefix-missing': {
    'its base64 alone': { secret: BASE64 },
    'used as text by the plugin': { secret: Buffer.from(BASE64) }
  },
  'secret-prefix-mangled': {
    'upper case': { secret: `WHSEC_${BASE64}` },
    hyphen: { secret: `whsec-${BASE64}` },
    'no underscore': { secret: `whsec${BASE64}` },
    doubled: { secret: `whsec_${SECRET}` },
    'with the version of a signature': { secret: `v1,${SECRET}` },
    'of another secret': { secret: `whsec_${OTHER}`, says: /that is not all/ }
  },
  'secret-base64-twice': {
    'all of it': { secret: Buffer.from(SECRET).toString('base64') },
    'with its newline': { secret: Buffer.from(`${SECRET}\n`).toString('base64') },
    'after the prefix': { secret: `whsec_${Buffer.from(BASE64).toString('base64')}` },
    'all of it, read as text': { secret: Buffer.from(Buffer.from(SECRET).toString('base64')) },
    'of which only the key is left': { secret: Buffer.from(SECRET) }
  },
  'secret-cut': {
    'two characters': { secret: SECRET.slice(0, -2), says: /last character/ },
    'one of two': { secret: [OTHER, SECRET.slice(0, -2)] },
    'in the middle of a byte': { secret: SECRET.slice(0, -3), says: /no whole base64/ },
    'to the prefix': { secret: 'whsec_' }
  },
  'secret-not-base64': {
    'another text': { secret: 'whsec_your secret goes here!' }
  },
  'secret-as-text': {
    'with the prefix': { headers: changed(signed(), v1(mac(SECRET))) },
    'without the prefix': { headers: changed(signed(), v1(mac(BASE64))) },
    'of which only the key is left': { secret: KEY, headers: changed(signed(), v1(mac(SECRET))) }
  },
  'header-missing': {
    id: { headers: changed(signed(), { 'webhook-id': undefined }), says: /^webhook-id is missing/ },
    'empty timestamp': { headers: changed(signed(), { 'webhook-timestamp': '' }), says: /^webhook-timestamp is/ },
    'all of them': { headers: {}, says: /webhook-id, webhook-timestamp, webhook-signature are/ },
    undefined: { headers: { ...signed(), 'webhook-signature': undefined } }
  },
  'header-renamed': {
    'x-webhook-id': { headers: renamed(name => `x-${name}`), says: /webhook-id as x-webhook-id/ },
    webhook_id: { headers: renamed(name => name.replace('-', '_')) },
    HTTP_WEBHOOK_ID: { headers: renamed(name => `HTTP_${name.toUpperCase().replace('-', '_')}`) },
    webhookId: { headers: renamed(name => name.replace(/-(.)/, (_, letter: string) => letter.toUpperCase())) },
    'svix-id': { headers: renamed(name => name.replace('webhook', 'svix')) },
    'one of them': { headers: renamed(name => name === 'webhook-id' ? 'x-webhook-id' : name) },
    'with another secret': { headers: renamed(name => `x-${name}`), secret: OTHER, says: /that is not all/ },
    'svix-id with another secret': { headers: renamed(name => name.replace('webhook', 'svix')), secret: OTHER },
    'and JSON serialised again': { headers: renamed(name => `x-${name}`), rawBody: python(BODY), also: ['body-reserialized'] }
  },
  'header-doubled': {
    'pairs of name and value': { headers: [...Object.entries(signed()), ...Object.entries(signed())], says: /webhook-id, webhook-timestamp, webhook-signature arrived/ },
    id: { headers: each(value => `${value}, ${value}`, 'webhook-id') },
    'array of timestamps': { headers: { ...signed(), 'webhook-timestamp': [String(SECONDS), String(SECONDS)] } },
    signature: { headers: each(value => `${value},${value}`, 'webhook-signature') },
    'with another secret': { headers: each(value => `${value}, ${value}`, 'webhook-id', 'webhook-timestamp', 'webhook-signature'), secret: OTHER }
  },
  'header-whitespace': {
    id: { headers: each(value => ` ${value} `, 'webhook-id'), says: /^webhook-id has/ },
    timestamp: { headers: each(value => `${value} `, 'webhook-timestamp') },
    'tab between signatures': { headers: each(value => `v1,${'A'.repeat(43)}=\t${value}`, 'webhook-signature') },
    'space in a signature': { headers: each(value => value.replace(',', ', '), 'webhook-signature') },
    'with another secret': { headers: each(value => ` ${value}`, 'webhook-timestamp'), secret: OTHER }
  },
  'webhook-id-dot': {
    signed: { headers: signed(BODY, { webhookId: 'wh_1.2' }), says: /with that undone/ },
    'with another secret': { headers: signed(BODY, { webhookId: 'wh_1.2' }), secret: OTHER }
  },
  'webhook-id-invalid': {
    'too long': { headers: signed(BODY, { webhookId: 'w'.repeat(257) }) },
    'space within': { headers: signed(BODY, { webhookId: 'wh 1' }), secret: OTHER }
  },
  'timestamp-milliseconds': {
    signed: { headers: changed(signed(), { 'webhook-timestamp': String(NOW), ...v1(mac(KEY, BODY, ID, String(NOW))) }) },
    'converted on the way': { headers: changed(signed(), { 'webhook-timestamp': String(NOW + 123) }), says: /seconds were signed/ },
    'signed, and converted on the way': { headers: changed(signed(), v1(mac(KEY, BODY, ID, String(NOW)))), says: /milliseconds were signed/ },
    'an hour ago': { headers: changed(signed(), { 'webhook-timestamp': String(NOW) }), now: NOW + 3_600_000, also: ['timestamp-stale'] },
    'with another secret': { headers: changed(signed(), { 'webhook-timestamp': String(NOW) }), secret: OTHER }
  },
  'timestamp-format': {
    date: { headers: changed(signed(), { 'webhook-timestamp': new Date(NOW).toISOString() }) },
    decimal: { headers: changed(signed(), { 'webhook-timestamp': `${SECONDS}.0` }) },
    'decimal milliseconds': { headers: changed(signed(), { 'webhook-timestamp': `${NOW}.25` }) },
    'no time': { headers: changed(signed(), { 'webhook-timestamp': 'soon' }) },
    'no time, signed': { headers: changed(signed(), { 'webhook-timestamp': 'soon', ...v1(mac(KEY, BODY, ID, 'soon')) }), says: /with that undone/ }
  },
  'timestamp-stale': {
    'a bit': { now: NOW + 301_000, says: /signed 5 min 1 s before/ },
    days: { now: NOW + 2 * 86_400_000 + 3_600_000, says: /signed 2 d 1 h before/ },
    'of another tolerance': { now: NOW + 61_000, tolerance: 60, says: /1 min 1 s/ },
    'a hair': { now: NOW + 60_100, tolerance: 60, says: /1 min/ }
  },
  'timestamp-future': {
    'a bit': { now: NOW - 400_000, says: /signed 6 min 40 s after/ },
    years: { now: 0, says: /\d+ d .* after/ }
  },
  'signature-version': {
    v1a: { headers: each(() => `v1a,${Buffer.alloc(64, 7).toString('base64')}`, 'webhook-signature'), says: /\(v1a\)/ },
    v2: { headers: each(value => value.replace('v1', 'v2'), 'webhook-signature'), says: /v2.*with that undone/ },
    'another version that is no signature': { headers: each(() => 'v3,none', 'webhook-signature'), says: /\(v3\)/ }
  },
  'signature-prefix': {
    none: { headers: each(value => value.slice(3), 'webhook-signature'), says: /with that undone/ },
    'v1=': { headers: each(value => value.replace(',', '='), 'webhook-signature') },
    'with another secret': { headers: each(value => value.slice(3), 'webhook-signature'), secret: OTHER }
  },
  'signature-hex': {
    'v1,': { headers: each(() => `v1,${mac(KEY).toString('hex')}`, 'webhook-signature') },
    bare: { headers: each(() => mac(KEY).toString('hex').toUpperCase(), 'webhook-signature'), also: ['signature-prefix'] },
    'sha256=': { headers: each(() => `sha256=${mac(KEY).toString('hex')}`, 'webhook-signature'), also: ['signature-prefix'] },
    'in base64': { headers: each(() => `v1,${Buffer.from(mac(KEY).toString('hex')).toString('base64')}`, 'webhook-signature') },
    'with another secret': { headers: each(() => `v1,${mac(KEY).toString('hex')}`, 'webhook-signature'), secret: OTHER }
  },
  'signature-malformed': {
    'a word': { headers: each(() => 'yes', 'webhook-signature') },
    'too short': { headers: each(() => `v1,${'A'.repeat(24)}`, 'webhook-signature') }
  },
  'x-openai-signature': {
    'with this secret': {
      headers: { 'x-openai-timestamp': String(SECONDS), 'x-openai-signature': createHmac('sha256', SECRET).update(`${SECONDS}.${BODY}`).digest('hex') },
      says: /matches this secret/
    },
    'with another secret': { headers: { 'x-openai-timestamp': String(SECONDS), 'x-openai-signature': 'ab'.repeat(32) }, says: /community guide$/ }
  },
  'provider-svix': {
    'another product': { headers: renamed(name => name.replace('webhook', 'svix')), rawBody: '{"type":"user.created","data":{}}' },
    'no JSON': { headers: renamed(name => name.replace('webhook', 'svix')), rawBody: 'hello' }
  },
  'body-empty': {
    'no bytes': arrived('')
  },
  'body-not-captured': {
    '[object Object]': arrived('[object Object]', BODY, { 'content-length': String(BODY.length) }),
    undefined: arrived('undefined')
  },
  'body-length-differs': {
    'a value changed': { ...arrived(BODY.replace('resp_', 'res_'), BODY, { 'content-length': '999' }), says: /says 999 bytes/ },
    'not JSON, and longer': arrived('{"a":1}}', BODY, { 'content-length': '2' }),
    'not JSON, and brackets open': arrived('{a:[', BODY, { 'content-length': '2' })
  },
  'body-newline-added': {
    LF: arrived(`${BODY}\n`),
    CRLF: arrived(`${BODY}\r\n`),
    several: arrived(`${BODY}\n\n\n`)
  },
  'body-newline-removed': {
    LF: arrived(BODY, `${BODY}\n`),
    CRLF: arrived(BODY, `${BODY}\r\n`)
  },
  'body-charset': {
    'read as Latin-1, encoded as UTF-8': arrived(Buffer.from(cafe).toString('latin1'), cafe),
    'turned into Latin-1': { ...arrived(Buffer.from(cafe, 'latin1'), cafe), says: /turned into Latin-1/ },
    'Latin-1 turned into UTF-8': arrived(cafe, Buffer.from(cafe, 'latin1')),
    'signed as text with U+FFFD': { ...arrived(umlaut(Buffer.of(0xfc)), umlaut(Buffer.of(0xfc)).toString()), says: /sender signed the text/ }
  },
  'body-compressed': {
    gzip: { ...arrived(zlib.gzipSync(BODY)), says: /gzip/ },
    deflate: { ...arrived(zlib.deflateSync(BODY)), says: /\(deflate/ },
    br: { ...arrived(zlib.brotliCompressSync(BODY)), says: /br/ }
  },
  'body-form-encoded': {
    whole: arrived(encodeURIComponent(BODY)),
    field: arrived(String(new URLSearchParams({ payload: BODY }))),
    'name of a field': arrived(`${BODY}=`),
    'field, "+" not encoded': arrived(`payload=${encodeURIComponent(BODY).replaceAll('%2B', '+')}`),
    'a "%" of its own': arrived('payload={"id":"evt_1","note":"100%25"}', '{"id":"evt_1","note":"100%"}'),
    'not well encoded': arrived('payload={"id":"evt_1","note":"50%"}', '{"id":"evt_1","note":"50%"}')
  },
  'body-buffer-json': {
    'JSON.stringify of a Buffer': arrived(JSON.stringify(Buffer.from(BODY)))
  },
  'body-base64': {
    'of a Lambda event': arrived(Buffer.from(BODY).toString('base64'))
  },
  'body-in-envelope': {
    text: arrived(JSON.stringify({ version: '2.0', body: BODY, isBase64Encoded: false })),
    base64: arrived(JSON.stringify({ body: Buffer.from(BODY).toString('base64'), isBase64Encoded: true }))
  },
  'body-reserialized': {
    'compact, was Python\'s': { ...arrived(BODY, python(BODY)), says: /Python's json\.dumps\(value\) writes it/ },
    "Python's, was compact": { ...arrived(python(BODY)), says: /JSON\.stringify\(value\) writes it \(no spaces\)/ },
    "Python's with ASCII, was compact": arrived(ascii(python(BODY))),
    "compact, was Python's with ASCII": { ...arrived(BODY, ascii(python(BODY))), says: /Python's json\.dumps\(value\).*\\u escapes/ },
    'was indented by 2': { ...arrived(BODY, pretty), says: /indented by 2/ },
    'is indented': arrived(pretty),
    'was Python\'s with a newline': { ...arrived(BODY, `${python(BODY)}\n`), says: /a newline at the end/ },
    'was of PHP': { ...arrived(BODY, ascii(BODY).replaceAll('/', '\\/')), says: /PHP/ },
    'was with escaped slashes': { ...arrived(BODY, BODY.replaceAll('/', '\\/')), says: /escaped slashes/ },
    'is of PHP': arrived(ascii(BODY).replaceAll('/', '\\/')),
    'was of Go': { ...arrived(BODY, BODY.replaceAll('<', '\\u003c').replaceAll('>', '\\u003e').replaceAll('&', '\\u0026')), says: /Go and Rails/ },
    'was with upper-case escapes': { ...arrived(cafe, cafe.replace('\u00e9', '\\u00E9')), says: /upper-case/ },
    'was sorted': { ...arrived('{"b":[{"d":1,"c":2}],"a":3,"a":4}', '{"a":3,"a":4,"b":[{"c":2,"d":1}]}'), says: /sorted/ },
    'numbers that JavaScript would lose': arrived('{"n": 12345678901234567890, "m": 1.0}', '{"n":12345678901234567890,"m":1.0}'),
    'a list': arrived('[ 1, {} ]', '[1,{}]')
  }
}

function judge (delivery: Partial<DiagnoseOptions>): Diagnosis {
  return diagnose({ headers: signed(), rawBody: BODY, secret: SECRET, now: NOW, ...delivery })
}

/** What must not be in any output: secrets in every form, signatures that would be valid, the payload. */
const confidential = [
  ...[SECRET, OTHER, VECTOR.secret].flatMap(secret => [secret.slice(6), secret.slice(6).toLowerCase(), Buffer.from(secret.slice(6), 'base64').toString('hex')]),
  'abcdefghijklmnopqrstuvwxyz', 'AbCdEfGhIjKlMnOpQrSt', 'Schlüssel', mac(KEY).toString('base64'), mac(KEY).toString('hex'), 'PAYLOAD4711', 'Grüße', ID
]

t.test('each cause is named rightly', async t => {
  for (const [cause, cases] of Object.entries(fixtures)) {
    for (const [name, { also, says, ...fixture }] of Object.entries(cases)) {
      const { verified, finding, ruledOut, likely } = judge(fixture)
      t.same({ verified, cause: finding?.cause, also: finding?.also, ruledOut, likely }, { verified: false, cause, also, ruledOut: [], likely: undefined }, `${cause}: ${name}`)
      if (says !== undefined) t.match(finding?.message, says)
      t.notMatch(finding?.message, '%s')
      const told = JSON.stringify(finding ?? {})
      t.same(confidential.filter(text => told.includes(text)), [], 'it tells nothing confidential')
    }
  }
  t.same(Object.keys(fixtures).sort(), Object.keys(causes).sort(), 'every cause has a fixture')
})

// Deliveries of many kinds, the same in every run.

function randomness (seed: number) {
  let state = seed
  const next = (): number => {
    state = (state + 0x6d2b79f5) | 0
    let bits = Math.imul(state ^ (state >>> 15), state | 1)
    bits ^= bits + Math.imul(bits ^ (bits >>> 7), bits | 61)
    return ((bits ^ (bits >>> 14)) >>> 0) / 4_294_967_296
  }
  const below = (max: number): number => Math.floor(next() * max)
  const pick = <T>(from: readonly T[]): T => from[below(from.length)]!
  const bytes = (length: number): Buffer => Buffer.from(Array.from({ length }, () => below(256)))
  const alphabets = ['abcXYZ019 ', 'äöüßéñ', '漢字かな', '😀🧪', '\u0000\u001f"\\/\b', '<>&\'+%=;#', '\r\n\t', '\u2028\ufeff\ufffd', '{}[]:,']
  const text = (max: number): string => Array.from({ length: below(max) }, () => pick([...pick(alphabets)])).join('')
  const value = (depth: number): unknown => {
    const kind = below(depth > 3 ? 4 : 6)
    if (kind === 0) return text(40)
    if (kind === 1) return pick([0, -1, 1.5, 1e21, below(1e9), Number.MAX_SAFE_INTEGER])
    if (kind === 2) return pick([true, false, null])
    if (kind === 3) return `${pick(['resp', 'batch', 'evt', 'file'])}_${bytes(16).toString('hex')}`
    if (kind === 4) return Array.from({ length: below(4) }, () => value(depth + 1))
    return Object.fromEntries(Array.from({ length: below(5) }, () => [text(10), value(depth + 1)]))
  }
  const body = (): string | Buffer => {
    const event = sampleEvent(pick(sampleTypes))
    if (below(3) > 0) Object.assign(event.data, { extra: value(0) })
    const json = JSON.stringify(event, null, pick([0, 0, 0, 2, '\t']))
    return pick<() => string | Buffer>([
      () => json, () => json, () => json, () => python(json), () => ascii(json), () => `${json}\n`, () => `\ufeff${json}`,
      () => JSON.stringify(value(0)), () => bytes(below(200)), () => text(100), () => '', () => zlib.gzipSync(json), () => encodeURIComponent(json),
      () => Buffer.from(json).toString('base64'), () => Buffer.from(json, 'latin1'), () => JSON.stringify({ body: json })
    ])()
  }
  const secret = (): string => {
    const base64 = bytes(24 + below(41)).toString('base64')
    return pick([`whsec_${base64}`, `whsec_${base64}`, `whsec_${base64.replace(/=+$/, '')}`, base64, bytes(20).toString('hex'), `of-mine-${bytes(9).toString('base64url')}é`])
  }
  const id = (): string => pick([() => `wh_${bytes(16).toString('hex')}`, () => `msg_${bytes(12).toString('base64url')}`, () => `${below(1e9)}`, () => `%2C"${below(9)}'`])()
  return { below, pick, body, secret, id }
}

interface Healthy {
  delivery: { headers: Headers, rawBody: Buffer, secret: string | string[], now: number }
  /** The index of the secret that signed it. */
  signer: number
  random: ReturnType<typeof randomness>
}

function healthy (seed: number): Healthy {
  const random = randomness(seed)
  const { below, pick } = random
  const secret = random.secret()
  const body = random.body()
  const headers = { ...signed(Buffer.from(body), { secret, webhookId: random.id(), timestamp: SECONDS - 300 + below(601) }) }
  if (below(2) === 0) headers['content-length'] = String(Buffer.byteLength(body))
  if (below(4) === 0) headers['webhook-signature'] = `v1,${Buffer.alloc(32, below(256)).toString('base64')} ${headers['webhook-signature']!} v1a,${Buffer.alloc(64).toString('base64')}`
  if (below(8) === 0) headers['x-openai-signature'] = 'ab'.repeat(32)
  const secrets = pick<() => string | string[]>([() => secret, () => [secret], () => [random.secret(), secret], () => [secret, OTHER]])()
  const signer = Array.isArray(secrets) ? secrets.indexOf(secret) : 0
  return { delivery: { headers, rawBody: Buffer.from(body), secret: secrets, now: NOW }, signer, random }
}

const SEEDS = sized(100, 1_000)

t.test('healthy deliveries verify, and nothing is found', async t => {
  const found: unknown[] = []
  for (let seed = 0; seed < SEEDS; seed++) {
    const { delivery, signer, random } = healthy(seed)
    const { headers } = delivery
    const cased = Object.fromEntries(Object.entries(headers).map(([name, value]) => [random.pick([name, name.toUpperCase()]), value]))
    const form = random.pick([headers, cased, new globalThis.Headers(headers), Object.entries(cased), new Map(Object.entries(headers))])
    const rawBody = delivery.rawBody.toString('utf8') === '' ? '' : random.pick([delivery.rawBody, new Uint8Array(delivery.rawBody)])
    const { verified, finding, ruledOut, likely, keyIndex } = judge({ ...delivery, headers: form, rawBody })
    const isSigner = keyIndex === signer
    if (!verified || finding !== undefined || ruledOut.length > 0 || likely !== undefined || !isSigner) found.push({ seed, finding, likely, keyIndex })
  }
  t.same(found, [])
})

t.test('deliveries signed with another secret: no cause is claimed', async t => {
  const found: unknown[] = []
  for (let seed = 1_000; seed < 1_000 + SEEDS; seed++) {
    const { delivery, random } = healthy(seed)
    const { verified, finding, ruledOut, likely } = judge({ ...delivery, secret: random.pick([random.secret(), [random.secret(), random.secret()], Buffer.from(random.secret())]) })
    // One fact explains a refusal by itself, whatever the secret: no body.
    const fact = delivery.rawBody.length === 0 ? 'body-empty' : undefined
    const tellsRest = ruledOut.length === 13 && likely?.includes('another endpoint or project') === true
    if (verified || finding?.cause !== fact || tellsRest !== (fact === undefined)) found.push({ seed, finding, ruledOut })
  }
  t.same(found, [])
})

t.test('what no cause explains: what was ruled out, and what is left', async t => {
  const told = judge({ secret: OTHER })
  t.same({ verified: told.verified, finding: told.finding, keyIndex: told.keyIndex }, { verified: false, finding: undefined, keyIndex: undefined })
  t.match(told.ruledOut.join('\n'), /API key[^]+another case do no harm[^]+JSON parsed and serialised again/)
  t.match(told.likely, /^not proved, but likeliest: the secret is that of another endpoint or project/)

  t.match(judge({ secret: OTHER.slice(0, 38) }).likely, /stands for 32 bytes, this one for another number/)
  t.match(judge({ secret: 'a text of mine' }).likely, /begins with whsec_, which this one does not/)
  t.match(judge(arrived(`${BODY.slice(0, -1)},"a":"\ufffd","b":"\ufffd"}`)).likely, /U\+FFFD/)
  t.equal(judge(arrived('payload={"note":"50%"}', 'x')).likely, told.likely, 'form data that is not well encoded')
  t.equal(judge({ secret: KEY.subarray(1) }).likely, told.likely, 'of a key alone nothing more is known')
})

t.test('verifies what the plugin verifies, and nothing else', async t => {
  const keyOf = (secret: string | Uint8Array): Buffer => typeof secret === 'string' && secret.startsWith('whsec_') ? Buffer.from(secret.slice(6), 'base64') : Buffer.from(secret)
  const differing: unknown[] = []
  let accepted = 0
  for (let seed = 2_000; seed < 2_000 + SEEDS; seed++) {
    const { delivery, random } = healthy(seed)
    const name = random.pick(['webhook-id', 'webhook-timestamp', 'webhook-signature'])
    const value = delivery.headers[name]!
    const at = random.below(value.length)
    delivery.headers[name] = random.pick([
      () => value, () => ` ${value}`, () => `${value} `, () => `${value},`, () => `${value}, ${value}`, () => `${value} ${value}`, () => '', () => `${value}.1`,
      () => value.slice(0, at) + value.slice(at + 1), () => value.slice(0, at) + value[at]!.toUpperCase() + value.slice(at + 1), () => `v1,${value}`
    ])()
    const secrets = [delivery.secret].flat()
    let verified: boolean
    try {
      const { timestamp } = standardWebhooks()({ headers: delivery.headers, rawBody: delivery.rawBody }, secrets.map(secret => createSecretKey(keyOf(secret))))
      verified = Math.abs(SECONDS - timestamp) <= 300
    } catch {
      verified = false
    }
    if (verified) accepted++
    if (judge(delivery).verified !== verified) differing.push({ seed, name, verified })
  }
  t.same(differing, [])
  t.ok(accepted > 0.1 * SEEDS && accepted < 0.9 * SEEDS, `${accepted} of ${SEEDS} verify`)
})

t.test('a time or a tolerance that is no number is refused: with NaN every timestamp would be right', async t => {
  const { delivery } = healthy(1)
  for (const [name, expected, ...others] of [['now', 'a finite number'], ['tolerance', 'a whole number of seconds, 1 or more', 0, 0.5]]) {
    for (const wrong of [NaN, Infinity, 'x', null, new Date(NaN), ...others]) {
      t.throws(() => diagnose({ ...delivery, [name as string]: wrong }), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: `diagnose(): expected ${name!} to be ${expected!}, got ` })
    }
  }
})

t.test('what is missing, or of the wrong kind, is refused', async t => {
  const { delivery } = healthy(1)
  for (const [options, message] of [
    [undefined, 'diagnose(): expected options to be an object, got undefined'],
    [{}, 'diagnose(): expected headers to be an object, a Headers or an array of pairs, got undefined'],
    [{ ...delivery, headers: null }, 'diagnose(): expected headers to be an object, a Headers or an array of pairs, got null'],
    [{ ...delivery, rawBody: { id: 'evt_1' } }, 'diagnose(): expected rawBody to be a string or bytes, got a value of type object']
  ] as const) t.throws(() => diagnose(options as never), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message })
})

t.test('headers in every form', async t => {
  const { 'webhook-id': id, 'webhook-timestamp': timestamp, 'webhook-signature': signature } = signed()
  const forms: Array<DiagnoseOptions['headers']> = [
    { 'webhook-id': [id!], 'Webhook-Timestamp': timestamp!, 'WEBHOOK-SIGNATURE': signature, 'x-none': undefined },
    new globalThis.Headers(signed()),
    Object.entries(signed()),
    { 'webhook-id': id!, 'webhook-timestamp': SECONDS as unknown as string, 'webhook-signature': signature, 'x-null': null as unknown as undefined }
  ]
  for (const headers of forms) t.equal(judge({ headers }).verified, true)
  t.equal(diagnose({ headers: sign(BODY, { secret: SECRET }), rawBody: BODY, secret: SECRET }).verified, true, 'now, within 300 s, by default')
})

// Its work

/** Counts HMACs and the bytes that they run over. */
function counted (work: () => Diagnosis): { diagnosis: Diagnosis, hmacs: number, bytes: number } {
  const crypto = createRequire(import.meta.url)('node:crypto') as { createHmac: typeof createHmac }
  const original = crypto.createHmac
  let hmacs = 0
  let bytes = 0
  crypto.createHmac = (...args) => {
    hmacs++
    const hmac = original(...args)
    const update = hmac.update.bind(hmac) as (data: string | Buffer) => typeof hmac
    hmac.update = (data: string | NodeJS.ArrayBufferView) => {
      bytes += Buffer.byteLength(data as Buffer)
      return update(data as Buffer)
    }
    return hmac
  }
  syncBuiltinESMExports()
  try {
    return { diagnosis: work(), hmacs, bytes }
  } finally {
    crypto.createHmac = original
    syncBuiltinESMExports()
  }
}

t.test('its work is bounded', async t => {
  const megabyte = JSON.stringify({ note: 'ü/<'.repeat(200_000), z: 1, a: [1.0] })
  const nasty: Record<string, Fixture> = {
    'a megabyte of JSON': arrived(megabyte, 'x'),
    'a gzip bomb': arrived(zlib.gzipSync(Buffer.alloc(50_000_000)), 'x'),
    'a Brotli bomb': arrived(zlib.brotliCompressSync(Buffer.alloc(50_000_000), { params: { [zlib.constants.BROTLI_PARAM_QUALITY]: 1 } }), 'x'),
    'JSON nested 100,000 deep': arrived('['.repeat(100_000) + ']'.repeat(100_000), 'x'),
    'unclosed brackets': arrived('['.repeat(500_000), 'x'),
    'quotes alone': arrived('"'.repeat(500_001), 'x'),
    'white space': arrived(' \n'.repeat(250_000), 'x'),
    'every header': { headers: each(value => `${value}, `.repeat(200), 'webhook-id', 'webhook-timestamp', 'webhook-signature'), secret: OTHER },
    'a thousand secrets': { secret: Array.from({ length: 1000 }, (_, i) => `whsec_${Buffer.alloc(32, `${i}`).toString('base64')}`) },
    'a long secret': { secret: `whsec_${'AAAA'.repeat(20_000)}` }
  }
  const diagnoses = new Map<string, Diagnosis>()
  for (const [name, fixture] of Object.entries(nasty)) {
    const { diagnosis, hmacs, bytes } = counted(() => judge(fixture))
    diagnoses.set(name, diagnosis)
    t.equal(diagnosis.verified, false, name)
    t.ok(hmacs <= Math.max(500, [fixture.secret].flat().length), `${name}: ${hmacs} HMACs`)
    t.ok(bytes < 70_000_000, `${name}: over ${bytes} bytes`)
  }
  t.same(judge({ secret: [...nasty['a thousand secrets']!.secret as string[], SECRET] }), { verified: true, keyIndex: 1000, ruledOut: [] }, 'every secret is tried as it is')

  const { ruledOut, likely } = diagnoses.get('a megabyte of JSON')!
  t.notMatch(ruledOut.join(), 'serialised', 'what was not tried to the end is not ruled out')
  t.match(likely, /too large to try every change/)
})

t.test('in a server its work is some ms: a small event is enough for it, and a large one is left alone', async t => {
  const note = (bytes: number): string => JSON.stringify({ ...EVENT, note: 'ü/<'.repeat(bytes / 4) })
  const nasty: Record<string, Fixture> = {
    'a thin event of another secret': { secret: [OTHER, VECTOR.secret] },
    'an event of 3 KB': arrived(note(3_000), 'x'),
    'an event of 64 KB': arrived(note(64_000), 'x'),
    'a megabyte of JSON': arrived(note(1_000_000), 'x'),
    'ten megabytes': arrived(Buffer.alloc(10_000_000, 'x'), 'x'),
    'bytes that are no JSON': arrived(Buffer.alloc(4_000, '\x93\xe4', 'latin1'), 'x'),
    'a gzip bomb': arrived(zlib.gzipSync(Buffer.alloc(3_500_000)), 'x'),
    'a Brotli bomb': arrived(zlib.brotliCompressSync(Buffer.alloc(50_000_000), { params: { [zlib.constants.BROTLI_PARAM_QUALITY]: 1 } }), 'x'),
    'a lost character': arrived(`"${'ä'.repeat(1_900)}\ufffd"`, 'x'),
    'JSON nested 2,000 deep': arrived('['.repeat(2_000) + ']'.repeat(2_000), 'x'),
    'unclosed brackets': arrived('['.repeat(4_000), 'x'),
    'a word, cut': arrived(`{"a":${'w'.repeat(4_000)}`, 'x'),
    'every header': { headers: each(value => `${value}, `.repeat(200), 'webhook-id', 'webhook-timestamp', 'webhook-signature'), secret: OTHER },
    'many signatures': { headers: { ...signed(), 'webhook-signature': Array.from({ length: 300 }, (_, i) => `v1,${mac(`${i}`).toString('base64')}`).join(' ') } }
  }
  const spied = ['gzipSync', 'deflateSync', 'brotliCompressSync'] as const
  let compressed = 0
  const originals = spied.map(name => zlib[name])
  spied.forEach((name, i) => {
    zlib[name] = (...args: Parameters<typeof zlib.gzipSync>) => {
      compressed += name === 'brotliCompressSync' ? Infinity : Buffer.byteLength(args[0] as Buffer)
      return originals[i]!(...args)
    }
  })
  syncBuiltinESMExports()
  t.teardown(() => {
    spied.forEach((name, i) => { zlib[name] = originals[i]! })
    syncBuiltinESMExports()
  })
  for (const [name, fixture] of Object.entries(nasty)) {
    compressed = 0
    const { diagnosis, hmacs, bytes } = counted(() => diagnoseQuickly({ headers: signed(), rawBody: BODY, secret: SECRET, now: NOW, ...fixture }))
    t.equal(diagnosis.verified, false, name)
    t.ok(hmacs <= 300, `${name}: ${hmacs} HMACs`)
    t.ok(bytes <= 262_144 + 2 * hmacs, `${name}: over ${bytes} bytes`)
    t.ok(compressed <= 10 * 4_096, `${name}: ${compressed} bytes compressed`)
    const size = Buffer.byteLength(fixture.rawBody ?? BODY)
    if (size > 4_096) t.ok(hmacs < 10, `${name}: not rewritten`)
    if (size > 4_096) t.match(diagnosis.likely, /not every change was tried here: save the delivery and have `openai-webhook diagnose` look at it/)
  }
})

t.test('it finds there what there is time for', async t => {
  const missed: string[] = []
  for (const [cause, cases] of Object.entries(fixtures)) {
    for (const [name, { also, says, ...fixture }] of Object.entries(cases)) {
      const { finding } = diagnoseQuickly({ headers: signed(), rawBody: BODY, secret: SECRET, now: NOW, ...fixture })
      if (finding?.cause !== cause) missed.push(`${cause}: ${name}`)
    }
  }
  t.same(missed, ['body-compressed: br'], 'Brotli takes some ms to begin')
})

t.test('a body above a megabyte is judged as it arrived', async t => {
  const large = Buffer.alloc(1_048_577, 'x')
  t.equal(judge({ rawBody: large, headers: signed(large) }).verified, true)
  t.equal(judge({ rawBody: large, headers: signed(large), secret: `"${SECRET}"` }).finding?.cause, 'secret-quoted')
  const told = judge({ rawBody: Buffer.concat([large, Buffer.from('\n')]), headers: signed(large) })
  t.equal(told.finding, undefined)
  t.match(told.likely, /too large/)
})

// The plugin

interface Line { level: number, msg: string, cause?: string, fix?: string, endpoint?: string }

async function logging (t: { teardown: (fn: () => unknown) => void }, level: string, options: OpenAIWebhookOptions = {}): Promise<{ app: FastifyInstance, lines: Line[], told: (count: number) => Promise<Line[]> }> {
  const lines: Line[] = []
  const stream = new Writable({
    write (chunk: Buffer, _encoding, done) {
      lines.push(JSON.parse(chunk.toString()) as Line)
      stream.emit('line')
      done()
    }
  })
  const app = Fastify({ logger: { level, stream } }) as FastifyInstance
  t.teardown(() => app.close())
  await app.register(openaiWebhook, { secret: SECRET, ...options })
  const findings = (): Line[] => lines.filter(({ msg }) => msg.startsWith('the signature does not match'))
  const told = async (count: number): Promise<Line[]> => {
    while (findings().length < count) await once(stream, 'line')
    return findings()
  }
  return { app, lines, told }
}

const delivered = (body: string, headers: Headers) => ({ body: Buffer.from(body), headers: { 'content-type': 'application/json', ...headers } })

t.test('at debug level the plugin logs why a signature does not match, and tells the sender nothing', async t => {
  const { app, told } = await logging(t, 'debug')
  app.openaiWebhook.route({ url: '/second', tolerance: 60 })
  await app.ready()
  const clock = stoppedClock(t, NOW)

  const answer = await post(app, delivered(python(BODY), signed()))
  t.equal(answer.statusCode, 401)
  t.equal(answer.json<{ message: string }>().message, 'no signature matches the body and the signing secret')
  const [line] = await told(1)
  t.match(line, { level: 20, cause: 'body-reserialized', endpoint: '/webhooks/openai', msg: /same JSON as JSON\.stringify/, fix: /verify the bytes/ })

  await post(app, delivered(`${BODY}\n`, signed()))
  await post(app, delivered(`${BODY}\n`, signed()), '/second')
  t.match((await told(2))[1], { cause: 'body-newline-added', endpoint: '/second' }, 'each endpoint has its own turn')

  clock.advance(9_999)
  await post(app, delivered(BODY, each(value => value.slice(3), 'webhook-signature')))
  clock.advance(1)
  await post(app, delivered(BODY, signed(BODY, { secret: OTHER })))
  const lines = await told(3)
  t.equal(lines.length, 3, 'at most one in 10 s')
  t.match(lines[2], { cause: undefined, msg: /not proved, but likeliest: the secret is that of another endpoint/ })
  clock.advance(10_000)
  await post(app, delivered(JSON.stringify({ ...EVENT, note: 'ü'.repeat(30_000) }), signed()))
  t.match((await told(4))[3], { cause: undefined, msg: /not every change was tried here/ }, 'a large body would hold up the server')
  const logged = JSON.stringify(lines)
  t.same(confidential.filter(text => logged.includes(text)), [])
})

t.test('it says nothing at another level, of other refusals, or of another verifier', async t => {
  const bad = delivered(`${BODY}\n`, signed())
  const quiet = await logging(t, 'info')
  const custom = await logging(t, 'debug', { verifier: xOpenAISignature() })
  const debug = await logging(t, 'debug')
  await Promise.all([quiet, custom, debug].map(({ app }) => app.ready()))
  stoppedClock(t, NOW)
  t.equal((await post(quiet.app, bad)).statusCode, 401)
  t.equal((await post(custom.app, delivered(BODY, { 'x-openai-timestamp': String(SECONDS), 'x-openai-signature': 'ab'.repeat(32) }))).statusCode, 401)
  t.equal((await post(debug.app, delivered(BODY, signed(BODY, { timestamp: SECONDS - 999 })))).statusCode, 401)
  t.equal((await post(debug.app, delivered('{}', signed('{}')))).statusCode, 400)
  // The one that is told comes last: the others would have come before it.
  t.equal((await post(debug.app, bad)).statusCode, 401)
  t.equal((await debug.told(1)).length, 1)
  t.notMatch(JSON.stringify([quiet.lines, custom.lines]), 'does not match:')
})

t.test('a logger that fails does not fail the process', async t => {
  const app = Fastify({
    loggerInstance: Object.assign(Object.fromEntries(['fatal', 'error', 'warn', 'info', 'trace', 'silent'].map(level => [level, () => {}])), {
      level: 'debug',
      debug: () => { throw new Error('the disk is full') },
      child () { return this }
    }) as never
  }) as unknown as FastifyInstance
  t.teardown(() => app.close())
  await app.register(openaiWebhook, { secret: SECRET })
  const reported = new Promise<Error>(resolve => { app.openaiWebhook.onError(error => { if (error.message === 'the disk is full') resolve(error) }) })
  await app.ready()
  stoppedClock(t, NOW)
  t.equal((await post(app, delivered(`${BODY}\n`, signed()))).statusCode, 401)
  t.match(await reported, { message: 'the disk is full' })
})

// The command

const env = { OPENAI_WEBHOOK_SECRET: SECRET }

async function run (t: Parameters<typeof start>[0], argv: string[], options: Parameters<typeof start>[2] = { env }): Promise<{ code: number | null, out: string, err: string }> {
  const session = start(t, ['diagnose', ...argv], options)
  return { code: await session.ended, out: session.out, err: session.err }
}

const plain = { validateStream: false }
const file = (rawBody: string | Buffer, headers = signed()): Buffer => formatSaved({ headers: Object.entries(headers), body: Buffer.from(rawBody) })
const NAMED = `${new Date(NOW).toISOString().replace(/[-:]/g, '')}-${ID}.http`

t.test('diagnose FILE', async t => {
  const dir = t.testdir({ [NAMED]: file(BODY), 'reserialized.http': file(python(BODY)), 'secrets.txt': `${OTHER}\n${SECRET}\n`, 'quoted.txt': `"${SECRET}"\n`, 'empty.txt': '' })
  const named = join(dir, NAMED)
  const other = join(dir, 'reserialized.http')
  utimesSync(other, SECONDS + 2, SECONDS + 2)

  t.match(await run(t, [named]), { code: 0, out: /^verified: secret 1 signed it.*\nJudged at 2027-01-15T08:00:00\.000Z, the time in the file's name; --now judges at another\.\n$/, err: '' })
  const reserialized = await run(t, [other])
  t.match(reserialized, { code: 1, err: '', out: /^not verified: body-reserialized\n\n {2}The body was parsed.+\n\n {2}What to change: Verify the bytes.+\n\nJudged at 2027-01-15T08:00:02\.000Z, when the file was last written/ })
  t.match(await run(t, [named, '--now', String(SECONDS + 3600)]), { code: 1, out: /^not verified: timestamp-stale\n[^]+1 h before[^]+as --now says/ })
  t.equal((await run(t, [named, '--now', String(SECONDS + 3600), '--tolerance', '3600'])).code, 0)
  t.match(await run(t, [named, '--secret-file', join(dir, 'secrets.txt')]), { code: 0, out: /^verified: secret 2 signed it/ })
  t.match(await run(t, [named, '--secret-file', join(dir, 'quoted.txt')]), { code: 1, out: /^not verified: secret-quoted\n/ })
  t.match(await run(t, [named, '--secret-file', join(dir, 'quoted.txt'), '--now', '0']), { code: 1, out: /^not verified: secret-quoted \+ timestamp-future\n/ })
  t.match(await run(t, [named, '--secret-file', join(dir, 'empty.txt')]), { code: 1, out: /^not verified: secret-empty\n/ })
  t.match(await run(t, [named, '--secret', 'sk-abcdefghijklmnopqrstuvwxyz']), { code: 1, out: /^not verified: secret-is-api-key\n/ })
  const unexplained = await run(t, [named, '--secret', OTHER])
  t.match(unexplained, { code: 1, out: /^not verified: no known cause fits\n\n {2}Not proved, but likeliest: .+\.\n\n {2}Ruled out:\n(?: {2}- .+\n){13}\nJudged at/ })
  t.match(await run(t, [other], { env, isTTY: true }), { out: `${styleText('red', 'not verified', plain)}: body-reserialized` })
  t.match(await run(t, [named], { env, isTTY: true }), { out: styleText('green', 'verified', plain) })

  const said = [reserialized, unexplained].map(({ out }) => out).join()
  t.same(confidential.filter(text => text !== ID && said.includes(text)), [])
})

t.test('diagnose --json is one document', async t => {
  const dir = t.testdir({ [NAMED]: file(python(BODY)), [`later-${NAMED}`]: file(BODY) })
  const found = await run(t, [join(dir, NAMED), '--json'])
  t.match({ ...found, out: JSON.parse(found.out) as object }, {
    code: 1, err: '', out: { file: join(dir, NAMED), verified: false, finding: { cause: 'body-reserialized', message: /same JSON/, fix: /bytes/ }, ruledOut: [], judgedAt: '2027-01-15T08:00:00.000Z' }
  })
  const verified = await run(t, [join(dir, `later-${NAMED}`), '--json', '--now', String(SECONDS)])
  t.match({ ...verified, out: JSON.parse(verified.out) as object }, { code: 0, out: { verified: true, keyIndex: 0, judgedAt: '2027-01-15T08:00:00.000Z' } })
})

t.test('diagnose --headers FILE --body FILE', async t => {
  const lines = Object.entries(signed()).map(([name, value]) => `${name}: ${value}`)
  const dir = t.testdir({ 'headers.txt': lines.join('\n'), 'crlf.txt': `POST /webhooks/openai HTTP/1.1\r\n${lines.join('\r\n')}\r\n\r\n`, 'bad.txt': 'no header', 'body.json': BODY, 'edited.json': `${BODY}\n` })
  const paths = (headers: string, body: string): string[] => ['--headers', join(dir, headers), '--body', join(dir, body), '--now', String(SECONDS)]
  for (const headers of ['headers.txt', 'crlf.txt']) {
    t.equal((await run(t, paths(headers, 'body.json'))).code, 0)
    t.match(await run(t, paths(headers, 'edited.json')), { code: 1, out: /^not verified: body-newline-added\n/ })
  }
  t.same(await run(t, paths('bad.txt', 'body.json')), { code: 1, out: '', err: `openai-webhook: ${join(dir, 'bad.txt')}: not a saved delivery: line 1 is not "Name: value"\n` })
  utimesSync(join(dir, 'headers.txt'), SECONDS, SECONDS)
  t.equal((await run(t, paths('headers.txt', 'body.json').slice(0, 4))).code, 0, 'judged when the headers were written')
})

t.test('wrong usage, and files that cannot be read', async t => {
  const dir = t.testdir({ 'a.http': file(BODY), 'b.http': 'nothing' })
  const a = join(dir, 'a.http')
  const wrong: Array<[argv: string[], code: number, err: RegExp, env?: object]> = [
    [[], 2, /missing FILE, or --headers FILE and --body FILE/],
    [['--headers', a], 2, /missing FILE/],
    [['--body', a], 2, /missing FILE/],
    [[a, a], 2, /expected one FILE/],
    [[a, '--body', a], 2, /got both/],
    [[a, '--headers', a], 2, /got both/],
    [[a, '--now', 'yesterday'], 2, /--now: expected a whole number/],
    [[a, '--now', String(NOW)], 2, /--now: expected seconds since the Unix epoch, got 1800000000000, which would be milliseconds/],
    [[a, '--tolerance', '-1'], 2, /tolerance/],
    [[a, '--tolerance', '0'], 2, /--tolerance: expected a whole number, 1 or more, got "0"/],
    [[a, '--nwo', '1'], 2, /--nwo/],
    [[join(dir, 'none.http')], 1, /cannot read .*none\.http: ENOENT/],
    [[join(dir, 'b.http')], 1, /b\.http: not a saved delivery/],
    [['--headers', a, '--body', join(dir, 'none')], 1, /cannot read .*none: ENOENT/],
    [[a, '--secret-file', join(dir, 'none')], 1, /cannot read .*none: ENOENT/],
    [[a], 1, /no signing secret/, {}]
  ]
  for (const [argv, code, err, environment = env] of wrong) {
    const told = await run(t, argv, { env: environment as Record<string, string> })
    t.match(told, { code, out: '', err: /^openai-webhook: .+\n$/ }, argv.join(' '))
    t.match(told.err, err)
  }
})

t.test('the built command, on what it knows and on a published vector', async t => {
  const dir = t.testdir({})
  const vector = join(dir, 'vector.http')
  writeFileSync(vector, file(VECTOR.body, VECTOR.headers))
  const at = ['--now', String(VECTOR.timestamp)]
  const built = async (argv: string[], secret: string): Promise<{ code: number | null, out: string, err: string }> => {
    const session = launch(t, ['diagnose', vector, ...at, ...argv], { env: { OPENAI_WEBHOOK_SECRET: secret } })
    return { code: await session.ended, out: session.out, err: session.err }
  }
  const [verified, quoted, apiKey, other] = await Promise.all([built([], VECTOR.secret), built([], `'${VECTOR.secret}'`), built(['--json'], 'sk-proj-0123456789abcdefghij'), built([], SECRET)])
  t.match(verified, { code: 0, err: '', out: /^verified/ })
  t.match(quoted, { code: 1, err: '', out: /^not verified: secret-quoted\n/ })
  t.match({ ...apiKey, out: JSON.parse(apiKey.out) as object }, { code: 1, err: '', out: { finding: { cause: 'secret-is-api-key' } } })
  t.match(other, { code: 1, err: '', out: /^not verified: no known cause fits\n/ })
})

// The documents

t.test('docs/troubleshooting.md lists every cause, and no other', async t => {
  const text = readFileSync(join(import.meta.dirname, '../../docs/troubleshooting.md'), 'utf8')
  const rows = [...text.matchAll(/^\| `([a-z0-9-]+)` \|/gm)].map(([, cause]) => cause!)
  t.same(rows.sort(), Object.keys(causes).sort())
})
