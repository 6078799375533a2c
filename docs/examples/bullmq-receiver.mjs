// Puts each delivery into a BullMQ queue and acknowledges it. Handlers run elsewhere: see bullmq-worker.mjs.
//
//   OPENAI_WEBHOOK_SECRET=whsec_… REDIS_URL=redis://127.0.0.1:6379 PORT=3000 node docs/examples/bullmq-receiver.mjs
import Fastify from 'fastify'
import openaiWebhook from 'fastify-openai-webhook'
import { bullmq } from 'fastify-openai-webhook/bullmq'

const app = Fastify({ logger: true })
await app.register(openaiWebhook, {
  runner: bullmq({
    // When Redis goes down, the sender is answered 503 at once, not at the deadline.
    connection: { url: process.env.REDIS_URL ?? 'redis://127.0.0.1:6379', enableOfflineQueue: false },
    worker: false,
    attempts: 20
  })
})

for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, () => app.close())

await app.listen({ port: Number(process.env.PORT ?? 3000) })
