// Remembers processed deliveries in Redis, for any number of processes and machines.
//
//   OPENAI_WEBHOOK_SECRET=whsec_… REDIS_URL=redis://127.0.0.1:6379 PORT=3000 node docs/examples/redis.mjs
import Fastify from 'fastify'
import openaiWebhook from 'fastify-openai-webhook'
import { redisStore } from 'fastify-openai-webhook/redis'
import { Redis } from 'ioredis'

const app = Fastify({ logger: true })
const redis = new Redis(process.env.REDIS_URL ?? 'redis://127.0.0.1:6379', {
  maxRetriesPerRequest: 2,
  commandTimeout: 2_000,
  reconnectOnError: error => error.message.includes('READONLY') // after a failover
})
redis.on('error', error => app.log.warn(`redis: ${error.message}`))

await app.register(openaiWebhook, { idempotency: { store: redisStore(redis) } })

app.openaiWebhook.on('batch.completed', async (event, { log }) => {
  log.info({ batch: event.data.id }, 'batch completed')
}, { name: 'import-batch' })

async function shutDown () {
  await app.close()
  redis.disconnect()
}
for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, shutDown)

await app.listen({ port: Number(process.env.PORT ?? 3000) })
