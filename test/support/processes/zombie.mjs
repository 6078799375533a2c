// One of two processes that share a database. One of them is stopped at a known point, which the argument names.
import { existsSync } from 'node:fs'
import { once } from 'node:events'
import Fastify from 'fastify'
import openaiWebhook from 'fastify-openai-webhook'
import { openSqlite } from '../sqlite.mjs'

const { secret, lease, postgresUrl, file, idleTimeout, goesOn, pauses } = JSON.parse(process.argv[2])

/** Tells the parent that this point has been reached, and resolves once it has stopped the process and continued it. */
async function pause (where) {
  if (pauses !== where) return
  process.send({ at: where })
  await once(process, 'message')
}

async function onPostgres () {
  const { default: pg } = await import('pg')
  const { postgresInbox, postgresStore } = await import('fastify-openai-webhook/postgres')
  const pool = new pg.Pool({ connectionString: postgresUrl })
  const inbox = postgresInbox(pool, { lockTimeout: 100, idleTimeout })
  return {
    store: postgresStore(pool),
    handler: inbox.once('settle', async (tx, _event, { webhookId }) => {
      await tx.query('INSERT INTO effects VALUES ($1)', [webhookId])
      await pause('within')
    })
  }
}

async function onSqlite () {
  const { sqliteInbox, sqliteStore } = await import('fastify-openai-webhook/sqlite')
  const db = openSqlite(file)
  db.exec('PRAGMA busy_timeout = 50')
  return {
    store: sqliteStore(db),
    handler: sqliteInbox(db).once('settle', (tx, _event, { webhookId }) => {
      tx.prepare('INSERT INTO effects VALUES (?)').run(webhookId)
      if (pauses !== 'within') return
      process.send({ at: 'within' })
      while (!existsSync(goesOn));
    })
  }
}

const { store, handler } = await (file === undefined ? onPostgres() : onSqlite())
const app = Fastify()
await app.register(openaiWebhook, { secret, deadline: 600_000, idempotency: { store, lease } })
app.openaiWebhook.on('batch.failed', async function (event, context) {
  await pause('before')
  await handler.call(this, event, context)
}, { name: 'settle' })
await app.listen({ port: 0, host: '127.0.0.1' })
process.send({ port: app.server.address().port })
process.on('disconnect', () => process.exit())
