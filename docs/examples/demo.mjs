// `npm start`: a receiver on a real port, and a client that sends it one delivery of every event type, then three that
// must be refused. `--once` ends after the table, with exit code 0 only if every answer was right.
import { fork } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { fileURLToPath } from 'node:url'
import Fastify from 'fastify'
import openaiWebhook, { guideEvents } from 'fastify-openai-webhook'
import inspector from 'fastify-openai-webhook/inspector'

const once = process.argv.includes('--once')
const port = Number(process.env.PORT ?? (once ? 0 : 3000))
const ownSecret = process.env.OPENAI_WEBHOOK_SECRET === undefined
const secret = process.env.OPENAI_WEBHOOK_SECRET ?? `whsec_${randomBytes(32).toString('base64')}`

const app = Fastify({ logger: { level: 'fatal' } })
await app.register(openaiWebhook, { secret, events: guideEvents })
// It would refuse to start in production without an `onRequest` that authenticates.
if (process.env.NODE_ENV !== 'production') await app.register(inspector)

/** What the handlers got, by webhook-id. */
const got = new Map()
let printing = false
app.openaiWebhook.onAny((event, { webhookId }) => {
  const { id, call_id: callId, session_id: sessionId, safety_identifier: safetyId } = event.data ?? {}
  const resource = id ?? callId ?? sessionId ?? safetyId
  got.set(webhookId, resource)
  if (printing) console.log(`received ${event.type} ${resource}`)
})

try {
  await app.listen({ port, host: '127.0.0.1' })
} catch (error) {
  console.error(error.code === 'EADDRINUSE' ? `port ${port} is taken: choose another, as in PORT=3001 npm start` : error.message)
  process.exit(1)
}
const url = `http://127.0.0.1:${app.server.address().port}/webhooks/openai`

const COLUMNS = [30, 42, 26, 7]
const row = cells => cells.map((cell, i) => String(cell).padEnd(COLUMNS[i])).join('  ').trimEnd()
console.log(row(['TYPE', 'ANSWER', 'THE HANDLER GOT', 'MS']))

let wrong = 0
const client = fork(fileURLToPath(new URL('demo-client.mjs', import.meta.url)), {
  env: { ...process.env, OPENAI_WEBHOOK_SECRET: secret, WEBHOOK_URL: url }
})
client.on('message', ({ name, expected, answer }) => {
  const { webhookId, status, body, ms } = answer
  const { code } = JSON.parse(body)
  const handled = got.has(webhookId)
  const right = status === expected.status && code === expected.code && handled === (status === 200)
  if (!right) wrong++
  const told = code === undefined ? body : code.replace('FST_OPENAI_WEBHOOK_', '')
  console.log(row([name, `${status} ${told}`, got.get(webhookId) ?? '-', ms.toFixed(1)]) + (right ? '' : '  WRONG'))
})
client.on('exit', async code => {
  if (code !== 0) wrong++
  console.log(wrong === 0 ? '\nEvery answer was right.' : `\n${wrong} wrong.`)
  process.exitCode = wrong === 0 ? 0 : 1
  if (once) return await app.close()
  printing = true
  if (app.hasRoute({ method: 'GET', url: '/openai-webhook' })) console.log(`\nSee them at ${new URL('/openai-webhook', url).href}`)
  console.log(`\nListening on ${url}. Send one by hand from another terminal:\n`)
  const shown = ownSecret ? `OPENAI_WEBHOOK_SECRET=${secret} ` : ''
  console.log(`  ${shown}node docs/examples/send.mjs ${url} batch.failed\n\nCtrl-C ends it.`)
})
for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, () => app.close())
