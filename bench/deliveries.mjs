// Builds signed requests as bytes, before the clock starts. Each has its own webhook-id, event id and signature, because a repeated request
// would measure the duplicate path.
import { createHash, createHmac, createSecretKey, randomBytes, randomUUID } from 'node:crypto'

export const PATH = '/webhooks/openai'

/** `count` secrets. Requests are signed with the last of them. */
export const secrets = (count = 1) => Array.from({ length: count }, (_, index) => `whsec_${Buffer.alloc(32, count - index).toString('base64')}`)

export const [SECRET] = secrets()
const key = createSecretKey(Buffer.from(SECRET.slice('whsec_'.length), 'base64'))

/** The secret of a tenant. */
export const secretOf = tenant => `whsec_${createHash('sha256').update(tenant).digest('base64')}`

export const tenantNames = count => Array.from({ length: count }, (_, index) => `proj_${String(index).padStart(8, '0')}`)

const EVENT_ID = '<event-id>'
const EVENT_ID_LENGTH = 'evt_'.length + 32
/** Bytes. A longer text after the event id is shared by all requests, because the sender would otherwise run out of memory. */
const SHARED_FROM = 16_384

/**
 * An event as JSON, split where its id belongs.
 *
 * @param {object} event without its id
 * @param {number} size bytes, with the id
 * @param {(event: object, length: number) => void} pad adds ASCII text of that length to the event
 */
export function template (event, size, pad) {
  const padded = structuredClone({ id: EVENT_ID, ...event })
  const missing = size - (Buffer.byteLength(JSON.stringify(padded)) - EVENT_ID.length + EVENT_ID_LENGTH)
  if (missing < 0) throw new Error(`a ${event.type} event of ${size} bytes has no room for its fields: ${-missing} bytes too few`)
  pad(padded, missing)
  const parts = JSON.stringify(padded).split(EVENT_ID)
  if (parts.length !== 2 || parts.join('').length + EVENT_ID_LENGTH !== size) throw new Error(`the padding of ${event.type} does not make it ${size} bytes`)
  return parts
}

/** A typical event of the given size: a thin event, a SIP call, or one as large as the default `bodyLimit`. */
export function eventOf (size) {
  const envelope = { object: 'event', created_at: Math.floor(Date.now() / 1000) }
  if (size < 1_000) {
    const event = { ...envelope, type: 'response.completed', data: { id: 'resp_' } }
    return template(event, size, ({ data }, length) => { data.id += hex(length) })
  }
  if (size < 10_000) {
    const event = { ...envelope, type: 'realtime.call.incoming', data: { call_id: `rtc_${hex(32)}`, sip_headers: sipHeaders(), sip_media_security: 'srtp' } }
    return template(event, size, ({ data }, length) => { data.sip_headers.at(-1).value += hex(length) })
  }
  const output = Array.from({ length: Math.floor(size / 280) }, () => ({ type: 'message', id: `msg_${hex(48)}`, role: 'assistant', content: 'lorem ipsum '.repeat(12) }))
  const event = { ...envelope, type: 'response.completed', data: { id: `resp_${hex(48)}`, output, instructions: '' } }
  return template(event, size, ({ data }, length) => { data.instructions = hex(length) })
}

const hex = length => randomBytes(Math.ceil(length / 2)).toString('hex').slice(0, length)

const sipHeaders = () => [
  ['Via', 'SIP/2.0/TLS 203.0.113.10:5061;branch=z9hG4bK-524287-1---8f2c1d0e7a3b4c5d;rport'],
  ['From', '"+1 415 555 0100" <sip:+14155550100@sip.example.com;user=phone>;tag=36d1ac0f7b'],
  ['To', '<sip:proj_8mXq2KcVn1Rz5TyB@sip.api.openai.com;transport=tls>'],
  ['Call-ID', '03782086-4ce9-44bf-8b0d-4e303d2cc590'],
  ['CSeq', '1 INVITE'],
  ['Contact', '<sip:+14155550100@203.0.113.10:5061;transport=tls>'],
  ['Max-Forwards', '69'],
  ['User-Agent', 'ExampleTrunk/7.2.1'],
  ['Allow', 'INVITE, ACK, CANCEL, OPTIONS, BYE, REFER, NOTIFY, UPDATE'],
  ['Supported', 'timer, 100rel, replaces'],
  ['Session-Expires', '1800;refresher=uac'],
  ['P-Asserted-Identity', '"Example Caller" <sip:+14155550100@sip.example.com>'],
  ['Diversion', '<sip:+14155550199@sip.example.com>;reason=unconditional;counter=1'],
  ['X-Trunk-Region', 'us1'],
  ['X-Account', 'AC0f1e2d3c4b5a69788796a5b4c3d2e1f0'],
  ['X-Correlation', '']
].map(([name, value]) => ({ name, value }))

const unixNow = () => Math.floor(Date.now() / 1000)

/** The header lines of a delivery that is signed, unsigned, stale (an hour old) or forged. */
const schemes = {
  standard (kind, parts, key) {
    const id = `wh_${randomUUID().replaceAll('-', '')}`
    const timestamp = unixNow() - (kind === 'stale' ? 3_600 : 0)
    const lines = [`webhook-id: ${id}`, `webhook-timestamp: ${timestamp}`]
    if (kind !== 'unsigned') lines.push(`webhook-signature: v1,${kind === 'forged' ? randomBytes(32).toString('base64') : mac(key, [`${id}.${timestamp}.`, ...parts], 'base64')}`)
    return ['user-agent: OpenAI/1.0 (+https://platform.openai.com/docs/webhooks)', ...lines]
  },
  github (kind, parts) {
    const lines = [`x-github-delivery: ${randomUUID()}`, 'x-github-event: push', 'x-github-hook-id: 292430182']
    if (kind !== 'unsigned') lines.push(`x-hub-signature-256: sha256=${kind === 'forged' ? hex(64) : mac(SECRET, parts, 'hex')}`)
    return ['user-agent: GitHub-Hookshot/044aadd', ...lines]
  }
}

function mac (key, parts, encoding) {
  const hmac = createHmac('sha256', key)
  for (const part of parts) hmac.update(part)
  return hmac.digest(encoding)
}

/** Continues from one call to the next, so that every tenant gets deliveries. */
let sender = 0

/**
 * @param {{ templates: string[][], count: number, kind?: string, scheme?: string, tenants?: number }} plan
 * @returns {Buffer[][]} the pieces of each request
 */
export function buildRequests ({ templates, count, kind = 'signed', scheme = 'standard', tenants = 0 }) {
  const senders = tenantNames(tenants).map(name => ({ path: `${PATH}/${name}`, key: createSecretKey(Buffer.from(secretOf(name).slice('whsec_'.length), 'base64')) }))
  const events = templates.map(([head, tail]) => ({ head, tail: Buffer.from(tail) }))
  return Array.from({ length: count }, (_, index) => {
    const { head, tail } = events[index % events.length]
    const { path, key: ofSender } = tenants > 0 ? senders[sender++ % tenants] : { path: PATH, key }
    const first = Buffer.from(`${head}evt_${randomUUID().replaceAll('-', '')}`)
    const lines = [
      `POST ${path} HTTP/1.1`,
      'host: 127.0.0.1',
      'accept: */*',
      'content-type: application/json',
      `content-length: ${first.length + tail.length}`,
      ...schemes[scheme](kind, [first, tail], ofSender)
    ]
    const start = Buffer.concat([Buffer.from(`${lines.join('\r\n')}\r\n\r\n`), first])
    return tail.length > SHARED_FROM ? [start, tail] : [Buffer.concat([start, tail])]
  })
}

/** The `logger` option of Fastify for a log file at level info. */
export const logTo = ({ directory }) => ({ file: `${directory}/${process.pid}.log` })
