// Puts each delivery into a queue of pg-boss, in PostgreSQL, and acknowledges it. One of the processes that run this handles
// it, and imports each batch exactly once. Its table: create table imports (batch text not null)
//
//   OPENAI_WEBHOOK_SECRET=whsec_… DATABASE_URL=postgres://… PORT=3000 node docs/examples/pgboss.mjs
import Fastify from 'fastify'
import openaiWebhook from 'fastify-openai-webhook'
import { pgboss } from 'fastify-openai-webhook/pgboss'
import { postgresInbox, postgresStore } from 'fastify-openai-webhook/postgres'
import pg from 'pg'
import { PgBoss } from 'pg-boss'

const connectionString = process.env.DATABASE_URL ?? 'postgres://postgres@127.0.0.1/postgres'
const app = Fastify({ logger: true })
const pool = new pg.Pool({ connectionString, max: 12, connectionTimeoutMillis: 4_000, query_timeout: 30_000 })

// It listens to PostgreSQL, so it hears at once of the jobs that another process has queued.
const boss = new PgBoss({ connectionString, useListenNotify: true })
boss.on('error', error => app.log.warn(error, 'pg-boss'))
await boss.start()

await app.register(openaiWebhook, {
  idempotency: { store: postgresStore(pool) },
  runner: pgboss({ boss, worker: { concurrency: 8 } })
})
const inbox = postgresInbox(pool)

app.openaiWebhook.on('batch.completed', inbox.once('import-batch', async (tx, event, { log }) => {
  await tx.query('insert into imports (batch) values ($1)', [event.data.id])
  log.info({ batch: event.data.id }, 'batch completed')
}))

async function shutDown () {
  await app.close()
  await boss.stop()
  await inbox.close()
  await pool.end()
}
for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, shutDown)

await app.listen({ port: Number(process.env.PORT ?? 3000) })
