// Runs the handlers for the deliveries that bullmq-receiver.mjs has queued. Start as many workers as you need: they listen
// on no port and need no signing secret.
//
//   REDIS_URL=redis://127.0.0.1:6379 node docs/examples/bullmq-worker.mjs
import Fastify from 'fastify'
import openaiWebhook from 'fastify-openai-webhook'
import { bullmq } from 'fastify-openai-webhook/bullmq'
import { redisStore } from 'fastify-openai-webhook/redis'
import { Redis } from 'ioredis'

const url = process.env.REDIS_URL ?? 'redis://127.0.0.1:6379'
const app = Fastify({ logger: true })
const redis = new Redis(url, {
  maxRetriesPerRequest: 2,
  commandTimeout: 2_000,
  reconnectOnError: error => error.message.includes('READONLY') // after a failover
})
redis.on('error', error => app.log.warn(`redis: ${error.message}`))

await app.register(openaiWebhook, {
  path: false,
  // Shared by all workers, so that the next attempt runs only the handlers that have not succeeded.
  idempotency: { store: redisStore(redis) },
  runner: bullmq({ connection: { url }, worker: { concurrency: 10 } })
})

app.openaiWebhook.on('batch.completed', async (event, { log }) => {
  log.info({ batch: event.data.id }, 'batch completed')
}, { name: 'import-batch' })

async function shutDown () {
  await app.close()
  redis.disconnect()
}
for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, shutDown)

await app.ready()
app.log.info('working')
