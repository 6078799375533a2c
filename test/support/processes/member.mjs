// One of several processes that share a store or a queue. The argument configures it.
import { existsSync, openSync, writeSync } from 'node:fs'
import Fastify from 'fastify'
import openaiWebhook, { inline, memoryStore } from 'fastify-openai-webhook'
import { openSqlite } from '../sqlite.mjs'

const { secret, path, effects, store = 'memory', runner = 'inline', file, handle, redisPort, postgresUrl, lease = 30_000, worker, blockedUntil, fails, hangs, closeTimeout } = JSON.parse(process.argv[2])

let db
function openFile () {
  if (db !== undefined) return db
  db = openSqlite(file, handle)
  db.exec('PRAGMA busy_timeout = 10000')
  return db
}

let redis
const stores = {
  memory: () => memoryStore(),
  sqlite: async () => (await import('fastify-openai-webhook/sqlite')).sqliteStore(openFile()),
  redis: async () => {
    const { Redis } = await import('ioredis')
    redis = new Redis(redisPort, '127.0.0.1')
    return (await import('fastify-openai-webhook/redis')).redisStore(redis)
  }
}

let boss
const runners = {
  inline: () => inline(),
  durable: async () => (await import('fastify-openai-webhook/sqlite')).durable(openFile(), { lease, backoff: 1 }),
  bullmq: async () => {
    const { createPostgresBackend } = await import('bullmq')
    const queue = postgresUrl === undefined
      ? { connection: { host: '127.0.0.1', port: redisPort } }
      : { connection: { connectionString: postgresUrl }, backend: createPostgresBackend }
    return (await import('fastify-openai-webhook/bullmq')).bullmq({ ...queue, worker, backoff: 1 })
  },
  pgboss: async () => {
    const { PgBoss } = await import('pg-boss')
    boss = await new PgBoss(postgresUrl).on('error', () => {}).start()
    return (await import('fastify-openai-webhook/pgboss')).pgboss({ boss, worker, backoff: 0 })
  }
}

const app = Fastify()
await app.register(openaiWebhook, {
  secret,
  path,
  deadline: 600_000,
  closeTimeout,
  idempotency: { store: await stores[store](), lease },
  runner: await runners[runner]()
})

const log = openSync(effects, 'a')
app.openaiWebhook.on('batch.failed', async (_event, { webhookId }) => {
  writeSync(log, `${webhookId} ${process.pid}\n`)
  // The event loop is blocked, so no lease is renewed in the meantime.
  if (blockedUntil !== undefined) while (!existsSync(blockedUntil));
  else await new Promise(resolve => setImmediate(resolve))
  if (hangs) await new Promise(resolve => { if (typeof hangs === 'number') setTimeout(resolve, hangs) })
  if (fails) throw new Error('the handler failed')
}, { name: 'effect' })
app.openaiWebhook.onError(error => { process.send({ error: error.message }) })

await app.listen({ port: 0, host: '127.0.0.1' })
process.send({ port: app.server.address().port })
process.once('message', async () => {
  await app.close()
  // The process ends by itself, because nothing is left open except the user's own connections.
  redis?.disconnect()
  await boss?.stop()
  process.disconnect()
})
