// A receiver to be killed: the store and runner of its argument, and two handlers whose effects are fsynced lines.
import { fsyncSync, openSync, writeSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import Fastify from 'fastify'
import openaiWebhook, { background, inline, memoryStore } from 'fastify-openai-webhook'
import { openSqlite } from '../sqlite.mjs'

const { secret, port, effects, store, runner, file, handle, redisPort, prefix, failureRate, fsync = true, max } = JSON.parse(process.argv[2])

let db
function openFile () {
  db ??= openSqlite(file, handle)
  return db
}

async function connect () {
  const { Redis } = await import('ioredis')
  return new Redis(redisPort, '127.0.0.1', { maxRetriesPerRequest: 1 })
}

const stores = {
  memory: () => memoryStore({ ...(max !== undefined && { max }) }),
  sqlite: async () => (await import('fastify-openai-webhook/sqlite')).sqliteStore(openFile()),
  redis: async () => (await import('fastify-openai-webhook/redis')).redisStore(await connect(), { prefix })
}

const runners = {
  inline: () => inline(),
  background: () => background({ maxQueue: 10_000 }),
  durable: async () => (await import('fastify-openai-webhook/sqlite')).durable(openFile(), { attempts: 1_000, backoff: 10, lease: 1_000 }),
  bullmq: async () => (await import('fastify-openai-webhook/bullmq')).bullmq({
    connection: { host: '127.0.0.1', port: redisPort },
    queueName: prefix,
    attempts: 1_000,
    backoff: { type: 'fixed', delay: 10 },
    worker: { lockDuration: 1_000, stalledInterval: 500 }
  })
}

const app = Fastify({ logger: false })
await app.register(openaiWebhook, {
  secret,
  idempotency: { store: await stores[store](), lease: 1_000 },
  runner: await runners[runner]()
})

const log = openSync(effects, 'a')
const handler = name => async (event, { webhookId }) => {
  await sleep(Math.random() * 4)
  if (Math.random() < failureRate) throw new Error('a random failure')
  writeSync(log, `${webhookId} ${name}\n`)
  if (fsync) fsyncSync(log)
}
app.openaiWebhook.on('batch.*', handler('first'), { name: 'first' })
app.openaiWebhook.on('batch.failed', handler('second'), { name: 'second' })

await app.listen({ port, host: '127.0.0.1' })
process.send('ready')
process.on('disconnect', () => process.exit()) // whoever tortures it has gone
process.on('message', async message => {
  if (message === 'heap') {
    globalThis.gc()
    return process.send(process.memoryUsage().heapUsed)
  }
  await app.close()
  process.exit()
})
