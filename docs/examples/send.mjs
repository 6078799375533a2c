// Sends signed deliveries to a receiver, as OpenAI would:
//
//   OPENAI_WEBHOOK_SECRET=whsec_… node docs/examples/send.mjs http://127.0.0.1:3000/webhooks/openai batch.failed
//
// It signs with `standardwebhooks`, which knows nothing of the receiver.
import { randomUUID } from 'node:crypto'
import { fileURLToPath } from 'node:url'
import { Webhook } from 'standardwebhooks'
import { guideEntries, officialEntries } from '../../dist/events/index.js'

const entries = { ...guideEntries, ...officialEntries }

export const types = Object.keys(entries)

/** A realistic event of a known type. */
export function sampleEvent (type) {
  return {
    id: `evt_${randomUUID().replaceAll('-', '')}`,
    object: 'event',
    created_at: Math.floor(Date.now() / 1000),
    type,
    data: entries[type].sample
  }
}

/**
 * @param {string} url
 * @param {string} secret
 * @param {string} body what is signed
 * @param {{ date?: Date, sent?: string }} [how] when it was signed; what is sent in the body's place
 */
export async function send (url, secret, body, { date = new Date(), sent = body } = {}) {
  const webhookId = `wh_${randomUUID().replaceAll('-', '')}`
  const started = performance.now()
  const response = await fetch(url, {
    method: 'POST',
    headers: {
      'content-type': 'application/json',
      'webhook-id': webhookId,
      'webhook-timestamp': String(Math.floor(date.getTime() / 1000)),
      'webhook-signature': new Webhook(secret).sign(webhookId, date, body)
    },
    body: sent
  })
  return { webhookId, status: response.status, body: await response.text(), ms: performance.now() - started }
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const [url, ...wanted] = process.argv.slice(2)
  const secret = process.env.OPENAI_WEBHOOK_SECRET
  const unknown = wanted.filter(type => !types.includes(type))
  if (url === undefined || wanted.length === 0 || secret === undefined || unknown.length > 0) {
    console.error(`usage: OPENAI_WEBHOOK_SECRET=whsec_… node docs/examples/send.mjs URL TYPE…\ntypes: ${types.join(' ')}`)
    process.exit(2)
  }
  for (const type of wanted) {
    const { status, body } = await send(url, secret, JSON.stringify(sampleEvent(type)))
    console.log(`${type}  ${status}  ${body}`)
  }
}
