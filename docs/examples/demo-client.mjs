// The sending side of `npm start`, in a process of its own.
import { sampleEvent, send, types } from './send.mjs'

const { WEBHOOK_URL: url, OPENAI_WEBHOOK_SECRET: secret } = process.env
const ok = { status: 200 }
const refused = (status, code) => ({ status, code: `FST_OPENAI_WEBHOOK_${code}` })
const report = (name, expected, answer) => new Promise(resolve => process.send({ name, expected, answer }, resolve))

for (const type of types) await report(type, ok, await send(url, secret, JSON.stringify(sampleEvent(type))))

const body = JSON.stringify(sampleEvent('batch.failed'))
const forged = body.replace('batch.failed', 'batch.completed')
await report('(forged: changed once signed)', refused(401, 'INVALID_SIGNATURE'), await send(url, secret, body, { sent: forged }))
const hourAgo = new Date(Date.now() - 3_600_000)
await report('(stale: signed an hour ago)', refused(401, 'TIMESTAMP_OUT_OF_TOLERANCE'), await send(url, secret, body, { date: hourAgo }))
await report('(malformed: signed, cut JSON)', refused(400, 'INVALID_BODY'), await send(url, secret, body.slice(0, -9)))
process.disconnect()
