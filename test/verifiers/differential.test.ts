// Our verification beside the two that people use today, over generated deliveries: `standardwebhooks` and the official
// `openai` SDK. We never accept what both refuse, never refuse what a real sender sends, and where we are stricter, the
// reason is in the list below.
import assert from 'node:assert/strict'
import { createHmac } from 'node:crypto'
import fc from 'fast-check'
import OpenAI from 'openai'
import { Webhook } from 'standardwebhooks'
import t from 'tap'
import type { Test } from 'tap'
import { officialEntries } from '../../lib/events/index.ts'
import { build } from '../support/deliveries.ts'
import { sized } from '../support/size.ts'

/** A delivery under way, taken apart so that every part can be changed. */
interface Draft {
  /** What the sender signs with. */
  key: Uint8Array
  /** What the receiver was configured with. */
  secret: string
  id: string
  timestamp: string
  body: Buffer
  signature: string
}

/** Where and when it arrives. */
interface Arrival {
  /** ms past the second in which it was signed */
  after: number
  send: 'plain' | 'title case' | 'Headers'
  text: boolean
  otherSecret: 'none' | 'before' | 'after'
}

const SIGNED_AT = 1750861210
const OTHER_SECRET = `whsec_${Buffer.alloc(32, 7).toString('base64')}`

/** By node:crypto over bytes, for what `standardwebhooks` cannot sign. */
function mac (key: Uint8Array, head: string, body: Uint8Array): string {
  return createHmac('sha256', key).update(head).update(body).digest('base64')
}

const resigned = (draft: Draft): Draft =>
  ({ ...draft, signature: `v1,${mac(draft.key, `${draft.id}.${draft.timestamp}.`, draft.body)}` })

const signedAs = (draft: Draft, { head = `${draft.id}.${draft.timestamp}.`, body = draft.body, key = draft.key }): Draft =>
  ({ ...draft, signature: `v1,${mac(key, head, body)}` })

// What a real sender sends

const allowedInId = Array.from({ length: 0x7e - 0x20 }, (_, i) => String.fromCharCode(0x21 + i)).filter(char => char !== '.' && char !== ',')

const ids = fc.oneof(
  { weight: 3, arbitrary: fc.stringMatching(/^wh_[0-9a-f]{32}$/) },
  fc.string({ unit: fc.constantFrom(...allowedInId), minLength: 1, maxLength: 256 })
)

const secrets = fc.oneof(
  { weight: 3, arbitrary: fc.uint8Array({ minLength: 24, maxLength: 64 }).map(key => ({ key, secret: `whsec_${Buffer.from(key).toString('base64')}` })) },
  fc.uint8Array({ minLength: 24, maxLength: 64 }).map(key => ({ key, secret: `whsec_${Buffer.from(key).toString('base64').replace(/=+$/, '')}` })),
  fc.string({ unit: 'grapheme', maxLength: 40 }).map(text => {
    const secret = `p${text}s`
    return { key: Buffer.from(secret), secret }
  })
)

const names = Object.keys(officialEntries) as (keyof typeof officialEntries)[]

const events = fc.oneof(
  fc.constantFrom(...names).map(type => ({ id: 'evt_1', object: 'event', created_at: SIGNED_AT, type, data: officialEntries[type].sample })),
  fc.record({ type: fc.string({ unit: 'grapheme' }).map(text => `new:${text}`), data: fc.jsonValue() })
)

const spellings = fc.constantFrom<(event: unknown) => string>(
  event => JSON.stringify(event),
event => JSON.stringify(event, null, 2) + '\n',
event => '\r\n\t ' + JSON.stringify(event, null, '\t').replaceAll('\n', '\r\n'),
event => JSON.stringify(event).replace(/[\u0080-\uffff]/g, char => `\\u${char.charCodeAt(0).toString(16).padStart(4, '0')}`)
)

const bodies = fc.tuple(events, fc.jsonValue(), spellings)
  .map(([event, unlisted, spell]) => spell({ ...event, unlisted }))
  // Refused on purpose: see the list below.
  .filter(text => !/"(?:__proto__|constructor)"/.test(text))
  .map(text => Buffer.from(text))

const drafts = fc.tuple(secrets, ids, bodies).map(([{ key, secret }, id, body]): Draft => ({
  key,
  secret,
  id,
  body,
  timestamp: String(SIGNED_AT),
  signature: new Webhook(key, { format: 'raw' }).sign(id, new Date(SIGNED_AT * 1000), body)
}))

const prompt = fc.record<Arrival>({
  after: fc.oneof(fc.integer({ min: -300_000, max: 300_000 }), fc.constantFrom(-300_000, 0, 300_000)),
  send: fc.constantFrom('plain', 'title case', 'Headers'),
  text: fc.boolean(),
  otherSecret: fc.constantFrom('none', 'before', 'after')
})

const someMac = fc.uint8Array({ minLength: 32, maxLength: 32 }).map(bytes => Buffer.from(bytes).toString('base64'))

type Change = fc.Arbitrary<(draft: Draft) => Draft>

const always = (change: (draft: Draft) => Draft): Change => fc.constant(change)

/** A list of signatures with the right one somewhere in it. */
const among = (others: fc.Arbitrary<string>, max: number): Change => fc.tuple(fc.array(others, { maxLength: max }), fc.nat())
  .map(([list, at]) => draft => ({ ...draft, signature: list.toSpliced(at % (list.length + 1), 0, draft.signature).join(' ') }))

const HONEST: Record<string, Change> = {
  'as it is': always(draft => draft),
  'signed with two secrets while one replaces the other': among(someMac.map(text => `v1,${text}`), 1),
  'signed with several': among(someMac.map(text => `v1,${text}`), 40),
  'signatures of other versions beside it': among(fc.tuple(fc.constantFrom('v1a', 'v2'), someMac).map(([version, text]) => `${version},${text}`), 4)
}

// Where we are stricter

type Peer = 'openai' | 'standardwebhooks'

interface Stricter {
  reason: string
  /** Who accepts such a delivery. */
  than: Peer[]
  code: string
  change: Change
  /** ms past signing */
  after?: fc.Arbitrary<number>
}

const BOTH: Peer[] = ['openai', 'standardwebhooks']

const base64Key = fc.uint8Array({ minLength: 32, maxLength: 32 })
const withKey = (secretOf: (key: Buffer) => { key?: Buffer, secret: string }): Change => base64Key.map(bytes => draft => {
  const key = Buffer.from(bytes)
  return resigned({ ...draft, key, ...secretOf(key) })
})

/** `whsec_`, so that both peers take the key for the same bytes. */
const prefixed = (change: (draft: Draft) => Draft): Change => withKey(key => ({ secret: `whsec_${key.toString('base64')}` }))
  .map(setKey => draft => change(setKey(draft)))

const signedBody = (texts: fc.Arbitrary<string>): Change => fc.tuple(texts, prefixed(draft => draft))
  .map(([text, setKey]) => draft => resigned({ ...setKey(draft), body: Buffer.from(text) }))

const STRICTER: Stricter[] = [
  {
    reason: 'a "." in the webhook-id: the signed text could be split at another place',
    than: BOTH,
    code: 'INVALID_ID',
    change: prefixed(draft => resigned({ ...draft, id: `${draft.id.slice(0, 200)}.x` }))
  },
  {
    reason: 'a day-old delivery, split at another place to look fresh',
    than: BOTH,
    code: 'INVALID_ID',
    change: prefixed(draft => {
      const old = SIGNED_AT - 86_400
      const rest = '{"type":"new:event"}'
      const signed = resigned({ ...draft, timestamp: String(old), body: Buffer.from(`{"id":"evt_1"}.${SIGNED_AT}.${rest}`) })
      return { ...signed, id: `${draft.id}.${old}.{"id":"evt_1"}`, timestamp: String(SIGNED_AT), body: Buffer.from(rest) }
    })
  },
  {
    reason: 'a "," in the webhook-id: a doubled header',
    than: BOTH,
    code: 'INVALID_ID',
    change: prefixed(draft => resigned({ ...draft, id: `${draft.id.slice(0, 100)}, ${draft.id.slice(0, 100)}` }))
  },
  {
    reason: 'a space in the webhook-id',
    than: BOTH,
    code: 'INVALID_ID',
    change: prefixed(draft => resigned({ ...draft, id: `wh ${draft.id.slice(0, 200)}` }))
  },
  {
    reason: 'a non-ASCII character in the webhook-id',
    than: BOTH,
    code: 'INVALID_ID',
    change: prefixed(draft => resigned({ ...draft, id: `wh_\u00e9${draft.id.slice(0, 200)}` }))
  },
  {
    reason: 'a control character in the webhook-id',
    than: BOTH,
    code: 'INVALID_ID',
    change: prefixed(draft => resigned({ ...draft, id: `wh_\u0001${draft.id.slice(0, 200)}` }))
  },
  {
    reason: 'a webhook-id over 256 characters',
    than: BOTH,
    code: 'INVALID_ID',
    change: prefixed(draft => resigned({ ...draft, id: draft.id.padEnd(257, 'x') }))
  },
  {
    reason: 'an empty webhook-id: the delivery could not be told apart from others',
    than: ['openai'],
    code: 'MISSING_HEADER',
    change: prefixed(draft => signedAs({ ...draft, id: '' }, { head: `${draft.timestamp}.` }))
  },
  {
    reason: 'a timestamp with more than digits in it, signed as it is written',
    than: ['openai'],
    code: 'INVALID_TIMESTAMP',
    change: fc.tuple(fc.constantFrom('+#', '#abc', '#.5', '#e0', '# 1', '#.{"id":"evt_1"}'), prefixed(draft => draft))
      .map(([form, setKey]) => draft => resigned({ ...setKey(draft), timestamp: form.replace('#', draft.timestamp) }))
  },
  {
    reason: 'a timestamp with more than digits in it, signed as a number',
    than: ['standardwebhooks'],
    code: 'INVALID_TIMESTAMP',
    change: fc.tuple(fc.constantFrom('+#', '#abc', '#.5', '#e0', '# 1', '#, #'), prefixed(draft => draft))
      .map(([form, setKey]) => draft => ({ ...resigned(setKey(draft)), timestamp: form.replaceAll('#', draft.timestamp) }))
  },
  {
    reason: 'a timestamp past the tolerance by a fraction of a second',
    than: BOTH,
    code: 'TIMESTAMP_OUT_OF_TOLERANCE',
    change: prefixed(draft => draft),
    after: fc.integer({ min: 300_001, max: 300_999 })
  },
  {
    reason: 'a signature without its version',
    than: ['openai'],
    code: 'INVALID_SIGNATURE',
    change: prefixed(draft => ({ ...draft, signature: draft.signature.slice(3) }))
  },
  {
    reason: 'a signature in base64 without padding, of the URL alphabet, with other last bits or with characters that are not base64',
    than: ['openai'],
    code: 'INVALID_SIGNATURE',
    change: fc.tuple(fc.constantFrom<(text: string) => string>(
      text => text.replace('=', ''),
    text => text + '=',
    text => text.slice(0, 20) + '*' + text.slice(20),
    text => text.slice(0, 42) + String.fromCharCode(text.charCodeAt(42) + 1) + '=',
    text => /[+/]/.test(text) ? text.replaceAll('+', '-').replaceAll('/', '_') : text.replace('=', '')
    ), prefixed(draft => draft)).map(([spell, setKey]) => draft => {
      const signed = setKey(draft)
      return { ...signed, signature: `v1,${spell(signed.signature.slice(3))}` }
    })
  },
  {
    reason: 'a signature with something behind a second ","',
    than: BOTH,
    code: 'INVALID_SIGNATURE',
    change: prefixed(draft => ({ ...draft, signature: `${draft.signature},x` }))
  },
  {
    reason: 'a doubled webhook-signature header',
    than: BOTH,
    code: 'INVALID_SIGNATURE',
    change: fc.tuple(someMac, prefixed(draft => draft)).map(([other, setKey]) => draft => {
      const signed = setKey(draft)
      return { ...signed, signature: `v1,${other}, ${signed.signature}` }
    })
  },
  {
    reason: 'bytes that are not UTF-8 in the place of the U+FFFD that was signed',
    than: BOTH,
    code: 'INVALID_SIGNATURE',
    change: prefixed(draft => {
      const signed = resigned({ ...draft, body: Buffer.from('{"type":"new:\ufffd"}') })
      return { ...signed, body: Buffer.from('{"type":"new:\xff"}', 'latin1') }
    })
  },
  {
    reason: 'a signed body that is JSON but no event',
    than: BOTH,
    code: 'INVALID_BODY',
    change: signedBody(fc.oneof(
      fc.constantFrom('null', '1', '"response.completed"', 'true', '{}', '{"type":null}', '{"type":["response.completed"]}'),
      fc.array(fc.jsonValue()).map(value => JSON.stringify(value))
    ))
  },
  {
    reason: 'a signed body with a key that pollutes prototypes',
    than: BOTH,
    code: 'INVALID_BODY',
    change: signedBody(fc.constantFrom(
      '{"type":"new:event","__proto__":{"admin":true}}',
      '{"type":"new:event","data":{"\\u005f_proto__":{}}}',
      '{"type":"new:event","constructor":{"prototype":{}}}'
    ))
  },
  {
    reason: 'a signed body that is not JSON',
    than: ['standardwebhooks'],
    code: 'INVALID_BODY',
    change: signedBody(fc.constantFrom('', '{"type":"response.completed"', 'type=response.completed', '\ufeff{"type":"new:event"}'))
  },
  {
    reason: 'a known type with the wrong shape',
    than: BOTH,
    code: 'INVALID_EVENT',
    change: signedBody(fc.tuple(fc.constantFrom(...names), fc.constantFrom(
      { id: 1 }, { id: undefined }, { created_at: 1.5 }, { created_at: '1750861210' }, { object: 'batch' }, { data: null }, { data: {} }
    )).map(([type, wrong]) => JSON.stringify({ id: 'evt_1', object: 'event', created_at: SIGNED_AT, type, data: officialEntries[type].sample, ...wrong })))
  },
  {
    reason: 'a secret with white space behind it',
    than: ['openai'],
    code: 'INVALID_SECRET',
    change: withKey(key => ({ secret: `whsec_${key.toString('base64')}\n` }))
  },
  {
    reason: 'a secret whose base64 is of the URL alphabet',
    than: ['openai'],
    code: 'INVALID_SECRET',
    change: base64Key.map(bytes => draft => {
      const key = Buffer.from([0xfb, 0xff, ...bytes.subarray(2)])
      return resigned({ ...draft, key, secret: `whsec_${key.toString('base64url')}` })
    })
  },
  {
    reason: 'an API key in the place of the secret',
    than: ['openai'],
    code: 'INVALID_SECRET',
    change: fc.stringMatching(/^sk-[A-Za-z0-9_-]{20,40}$/).map(secret => draft => resigned({ ...draft, key: Buffer.from(secret), secret }))
  },
  {
    reason: 'base64 without "whsec_" is text, as OpenAI has it',
    than: ['standardwebhooks'],
    code: 'INVALID_SIGNATURE',
    change: withKey(key => ({ key, secret: key.toString('base64') }))
  }
]

// What nobody accepts

const flipped = (bytes: Buffer, bit: number): Buffer => {
  const changed = Buffer.from(bytes)
  const at = bit % (bytes.length * 8)
  changed[at >> 3]! ^= 1 << (at & 7)
  return changed
}

const FORGED: Record<string, Change> = {
  'one bit of the body': fc.nat().map(bit => draft => ({ ...draft, body: flipped(draft.body, bit) })),
  'one bit of the signature': fc.nat().map(bit => draft => ({ ...draft, signature: `v1,${flipped(Buffer.from(draft.signature.slice(3), 'base64'), bit).toString('base64')}` })),
  'a body cut short': fc.nat().map(at => draft => ({ ...draft, body: draft.body.subarray(0, at % draft.body.length) })),
  'a body with something behind it': fc.constantFrom(' ', '\n', '{}', '\0').map(more => draft => ({ ...draft, body: Buffer.concat([draft.body, Buffer.from(more)]) })),
  'another webhook-id': ids.map(id => draft => ({ ...draft, id: id === draft.id ? `${id.slice(0, 255)}${id.endsWith('x') ? 'y' : 'x'}` : id })),
  'another timestamp': fc.integer({ min: 1, max: 100 }).map(more => draft => ({ ...draft, timestamp: String(SIGNED_AT + more) })),
  'another secret': base64Key.map(key => draft => ({ ...draft, secret: `whsec_${Buffer.from(key).toString('base64')}` })),
  'another signature': someMac.map(text => draft => ({ ...draft, signature: `v1,${text}` })),
  'a signature of another version': fc.constantFrom('v1a', 'v2', 'V1', 'v1,v1').map(version => draft => ({ ...draft, signature: `${version},${draft.signature.slice(3)}` })),
  'a hex signature': always(draft => ({ ...draft, signature: `v1,${Buffer.from(draft.signature.slice(3), 'base64').toString('hex')}` })),
  'half a signature': fc.integer({ min: 0, max: 40 }).map(length => draft => ({ ...draft, signature: draft.signature.slice(0, length) })),
  'signed too long ago, or ahead': fc.oneof(fc.integer({ min: 601, max: 1e9 }), fc.integer({ min: -1e9, max: -601 }))
    .map(seconds => draft => resigned({ ...draft, timestamp: String(SIGNED_AT - seconds) })),
  'a timestamp that is none': fc.constantFrom('', 'NaN', 'abc', '-1', '1e9', '99999999999999999999', '9'.repeat(400))
    .map(timestamp => draft => resigned({ ...draft, timestamp })),
  'no signature': fc.constantFrom('', ' ', 'v1', 'v1,', 'v1,  v1,').map(signature => draft => ({ ...draft, signature })),
  'the empty key': always(draft => resigned({ ...draft, secret: 'whsec_', key: Buffer.alloc(0) })),
  'the secret\'s text as the key': withKey(key => ({ key: Buffer.from(`whsec_${key.toString('base64')}`), secret: `whsec_${key.toString('base64')}` }))
}

/** Any text, anywhere, signed or not. */
const edits: Change = fc.record({
  part: fc.constantFrom('id', 'timestamp', 'signature', 'body', 'secret' as const),
  at: fc.nat(),
  remove: fc.nat({ max: 3 }),
  insert: fc.oneof(fc.constant(''), fc.constantFrom('.', ',', ' ', ', ', 'v1,', '0', '=', '\n', '\xff', '{}'), fc.string({ unit: 'binary', maxLength: 3 })),
  sign: fc.boolean()
}).map(({ part, at, remove, insert, sign }) => draft => {
  const text = part === 'body' ? draft.body.toString('latin1') : draft[part]
  const position = at % (text.length + 1)
  const edited = text.slice(0, position) + insert + text.slice(position + remove)
  const changed = { ...draft, [part]: part === 'body' ? Buffer.from(edited, 'latin1') : edited }
  return sign ? resigned(changed) : changed
})

// The comparison

interface Verdicts {
  /** 'accepted', or the code of the refusal without FST_OPENAI_WEBHOOK_. */
  ours: string
  event?: unknown
  accepting: Peer[]
}

const client = new OpenAI({ apiKey: 'none', webhookSecret: 'none' })

async function accepts (verification: () => unknown): Promise<boolean> {
  try {
    await verification()
    return true
  } catch {
    return false
  }
}

function headersOf ({ id, timestamp, signature }: Draft, send: Arrival['send'] = 'plain'): Record<string, string> {
  const spell = (name: string): string => send === 'title case' ? name.replace(/\b[a-z]/g, char => char.toUpperCase()) : name
  return { [spell('webhook-id')]: id, [spell('webhook-timestamp')]: timestamp, [spell('webhook-signature')]: signature, 'content-type': 'application/json' }
}

const isUtf8 = (body: Buffer): boolean => Buffer.from(body.toString()).equals(body)

t.test('beside standardwebhooks and the openai SDK', async t => {
  const app = await build(t)
  await app.ready()
  let now = 0
  t.intercept(Date, 'now', { value: () => now })

  async function compare (draft: Draft, { after, send, text, otherSecret }: Arrival): Promise<Verdicts> {
    now = SIGNED_AT * 1000 + after
    const headers = headersOf(draft)
    const accepting: Peer[] = []
    if (await accepts(() => client.webhooks.unwrap(draft.body.toString(), headers, draft.secret))) accepting.push('openai')
    if (await accepts(() => new Webhook(draft.secret).verify(draft.body, headers, { jsonParse: false }))) accepting.push('standardwebhooks')

    const secret = otherSecret === 'none' ? draft.secret : otherSecret === 'before' ? [OTHER_SECRET, draft.secret] : [draft.secret, OTHER_SECRET]
    const sent = headersOf(draft, send)
    try {
      const event = await app.openaiWebhook.unwrap(
        text && isUtf8(draft.body) ? draft.body.toString() : draft.body,
        // Headers trims values and refuses some: what it would change is handed over as it is.
        send === 'Headers' && Object.values(sent).every(value => /^[\x20-\x7e]*$/.test(value) && value === value.trim()) ? new Headers(sent) : sent,
        { secret })
      return { ours: 'accepted', event, accepting }
    } catch (error) {
      const { code } = error as { code?: string }
      if (code?.startsWith('FST_OPENAI_WEBHOOK_') !== true) throw error
      return { ours: code.slice('FST_OPENAI_WEBHOOK_'.length), accepting }
    }
  }

  async function holds (t: Test, name: string, numRuns: number, change: Change, check: (draft: Draft, verdicts: Verdicts) => void, arrivals = prompt): Promise<void> {
    const property = fc.asyncProperty(drafts, change, arrivals, async (draft, change, arrival) => {
      const changed = change(draft)
      check(changed, await compare(changed, arrival))
    })
    await t.resolves(fc.assert(property, { numRuns }), name)
  }

  t.test('accepts what a real sender sends, and gives back the event that was sent', async t => {
    for (const [name, change] of Object.entries(HONEST)) {
      await holds(t, name, sized(40, 300), change, ({ body }, { ours, event, accepting }) => {
        assert.equal(ours, 'accepted')
        assert.deepEqual(event, JSON.parse(body.toString()))
        assert.ok(accepting.includes('openai'), 'the generated delivery is one that the SDK accepts')
      })
    }
  })

  t.test('is stricter for these reasons', async t => {
    for (const { reason, than, code, change, after } of STRICTER) {
      await holds(t, reason, sized(12, 60), change, (_draft, { ours, accepting }) => {
        assert.deepEqual({ ours, accepting }, { ours: code, accepting: than })
      }, after === undefined ? prompt : fc.tuple(prompt, after).map(([arrival, after]) => ({ ...arrival, after })))
    }
  })

  t.test('accepts no forgery, as they do not', async t => {
    for (const [name, change] of Object.entries(FORGED)) {
      await holds(t, name, sized(12, 60), change, (_draft, { ours, accepting }) => {
        assert.notEqual(ours, 'accepted')
        assert.deepEqual(accepting, [])
      })
    }
  })

  t.test('accepts nothing that both refuse, whatever was changed', async t => {
    const changes = fc.array(fc.oneof(
      { weight: 2, arbitrary: edits },
      ...Object.values(HONEST),
      ...Object.values(FORGED),
      ...STRICTER.map(({ change }) => change)
    ), { minLength: 1, maxLength: 4 })
    let accepted = 0
    await holds(t, 'up to four changes', sized(200, 2_000), changes.map(list => draft => list.reduce((changed, change) => change(changed), draft)), ({ body }, { ours, event, accepting }) => {
      if (ours !== 'accepted') return
      accepted++
      assert.notDeepEqual(accepting, [])
      assert.deepEqual(event, JSON.parse(body.toString()))
    })
    t.not(accepted, 0, 'some of them are still valid')
  })
})
