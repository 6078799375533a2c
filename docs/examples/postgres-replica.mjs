// Remembers processed deliveries in PostgreSQL, for any number of processes and machines, and imports each batch exactly
// once: the row and the record that the handler has run commit together. Its table: create table imports (batch text not null)
//
//   OPENAI_WEBHOOK_SECRET=whsec_… DATABASE_URL=postgres://… PORT=3000 node docs/examples/postgres-replica.mjs
import Fastify from 'fastify'
import openaiWebhook from 'fastify-openai-webhook'
import { postgresInbox, postgresStore } from 'fastify-openai-webhook/postgres'
import pg from 'pg'

const app = Fastify({ logger: true })
const pool = new pg.Pool({
  connectionString: process.env.DATABASE_URL,
  max: 12,
  connectionTimeoutMillis: 4_000,
  query_timeout: 30_000
})

await app.register(openaiWebhook, { idempotency: { store: postgresStore(pool) } })
const inbox = postgresInbox(pool)

app.openaiWebhook.on('batch.completed', inbox.once('import-batch', async (tx, event, { log }) => {
  await tx.query('insert into imports (batch) values ($1)', [event.data.id])
  log.info({ batch: event.data.id }, 'batch completed')
}))

async function shutDown () {
  await app.close()
  await inbox.close()
  await pool.end()
}
for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, shutDown)

await app.listen({ port: Number(process.env.PORT ?? 3000) })
