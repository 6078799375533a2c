// A receiver that is killed. The argument names its store and its runner. Its two handlers write fsynced lines as their effects.
import { fsyncSync, openSync, writeSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import Fastify from 'fastify'
import openaiWebhook, { background, inline, memoryStore } from 'fastify-openai-webhook'
import { openSqlite } from '../sqlite.mjs'

const { secret, port, effects, store, runner, file, handle, redisPort, prefix, failureRate, fsync = true, max, lease = 1_000, delay = 4, inbox = 'none', postgresUrl } = JSON.parse(process.argv[2])

let db
function openFile () {
  db ??= openSqlite(file, handle)
  return db
}

let pool
async function openPool () {
  const { default: pg } = await import('pg')
  pool ??= new pg.Pool({ connectionString: postgresUrl, max: 12, connectionTimeoutMillis: 2_000 })
  return pool
}

async function connect () {
  const { Redis } = await import('ioredis')
  return new Redis(redisPort, '127.0.0.1', { maxRetriesPerRequest: 1 })
}

const stores = {
  memory: () => memoryStore({ ...(max !== undefined && { max }) }),
  sqlite: async () => (await import('fastify-openai-webhook/sqlite')).sqliteStore(openFile()),
  postgres: async () => (await import('fastify-openai-webhook/postgres')).postgresStore(await openPool()),
  redis: async () => (await import('fastify-openai-webhook/redis')).redisStore(await connect(), { prefix })
}

const runners = {
  inline: () => inline(),
  background: () => background({ maxQueue: 10_000 }),
  durable: async () => (await import('fastify-openai-webhook/sqlite')).durable(openFile(), { attempts: 1_000, backoff: 10, lease }),
  bullmq: async () => (await import('fastify-openai-webhook/bullmq')).bullmq({
    connection: { host: '127.0.0.1', port: redisPort },
    queueName: prefix,
    attempts: 1_000,
    backoff: { type: 'fixed', delay: 10 },
    worker: { lockDuration: lease, stalledInterval: lease / 2 }
  }),
  async pgboss () {
    const { PgBoss } = await import('pg-boss')
    const boss = new PgBoss({ connectionString: postgresUrl, superviseIntervalSeconds: 1, monitorIntervalSeconds: 1 })
    boss.on('error', () => {})
    await boss.start()
    return (await import('fastify-openai-webhook/pgboss')).pgboss({ boss, queueName: prefix, attempts: 1_000, backoff: 0, heartbeatSeconds: 10 })
  }
}

const app = Fastify({ logger: false })
await app.register(openaiWebhook, {
  secret,
  idempotency: { store: await stores[store](), lease },
  runner: await runners[runner]()
})

const inboxes = {
  /** An effect in a file. It is recorded elsewhere, so both cannot be written atomically. */
  async none () {
    const log = openSync(effects, 'a')
    return name => async (event, { webhookId }) => {
      await sleep(Math.random() * delay)
      if (Math.random() < failureRate) throw new Error('a random failure')
      writeSync(log, `${webhookId} ${name}\n`)
      if (fsync) fsyncSync(log)
    }
  },
  async sqlite () {
    const { once } = (await import('fastify-openai-webhook/sqlite')).sqliteInbox(openFile())
    return name => once(name, (tx, event, { webhookId }) => {
      tx.prepare('INSERT INTO effects (webhook_id, name) VALUES (?, ?)').run(webhookId, name)
      if (Math.random() < failureRate) throw new Error('a random failure')
    })
  },
  async postgres () {
    const { once } = (await import('fastify-openai-webhook/postgres')).postgresInbox(await openPool(), { lockTimeout: 1_000 })
    return name => once(name, async (tx, event, { webhookId }) => {
      await tx.query('INSERT INTO effects (webhook_id, name) VALUES ($1, $2)', [webhookId, name])
      await sleep(Math.random() * delay)
      if (Math.random() < failureRate) throw new Error('a random failure')
    })
  }
}
const handler = await inboxes[inbox]()
app.openaiWebhook.on('batch.*', handler('first'), { name: 'first' })
app.openaiWebhook.on('batch.failed', handler('second'), { name: 'second' })

await app.listen({ port, host: '127.0.0.1' })
process.send('ready')
process.on('disconnect', () => process.exit()) // the parent process has gone
process.on('message', async message => {
  if (message === 'heap') {
    globalThis.gc()
    return process.send(process.memoryUsage().heapUsed)
  }
  await app.close()
  process.exit()
})
