// Remembers processed deliveries in an SQLite file, across restarts.
//
//   OPENAI_WEBHOOK_SECRET=whsec_… SQLITE_FILE=webhooks.db PORT=3000 node docs/examples/sqlite.mjs
import Fastify from 'fastify'
import openaiWebhook from 'fastify-openai-webhook'
import { sqliteStore } from 'fastify-openai-webhook/sqlite'
import Database from 'libsql'

const db = new Database(process.env.SQLITE_FILE ?? 'webhooks.db')
const app = Fastify({ logger: true })
await app.register(openaiWebhook, { idempotency: { store: sqliteStore(db) } })

app.openaiWebhook.on('batch.completed', async (event, { log }) => {
  log.info({ batch: event.data.id }, 'batch completed')
}, { name: 'import-batch' })

async function shutDown () {
  await app.close()
  db.close()
}
for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, shutDown)

await app.listen({ port: Number(process.env.PORT ?? 3000) })
