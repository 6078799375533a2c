import Fastify from 'fastify'
import rawBody from 'fastify-raw-body'
import OpenAI from 'openai'
import { PATH, SECRET } from '../deliveries.mjs'

export async function build () {
  const client = new OpenAI({ apiKey: 'unused', webhookSecret: SECRET })
  const app = Fastify()
  await app.register(rawBody, { global: false, runFirst: true })
  app.post(PATH, { config: { rawBody: true } }, async (request, reply) => {
    try {
      await client.webhooks.unwrap(request.rawBody, request.headers)
    } catch {
      return reply.code(400).send({ error: 'not verified' })
    }
    return { received: true }
  })
  return app
}
