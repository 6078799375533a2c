import Fastify from 'fastify'
import rawBody from 'fastify-raw-body'
import OpenAI from 'openai'
import { PATH, SECRET, logTo } from '../deliveries.mjs'

/**
 * @param {{ logger?: boolean, metrics?: boolean, directory?: string }} [options] logger: a line for each delivery; metrics: the same counts
 * as ours
 */
export async function build ({ logger = false, metrics = false, directory } = {}) {
  const client = new OpenAI({ apiKey: 'unused', webhookSecret: SECRET })
  const app = Fastify({ logger: logger && logTo({ directory }) })
  const count = metrics ? await counting() : () => {}
  await app.register(rawBody, { global: false, runFirst: true })
  app.post(PATH, { config: { rawBody: true } }, async (request, reply) => {
    const start = performance.now()
    let event
    try {
      event = await client.webhooks.unwrap(request.rawBody, request.headers)
    } catch {
      return reply.code(400).send({ error: 'not verified' })
    }
    if (logger) request.log.info({ webhookId: request.headers['webhook-id'], type: event.type }, 'webhook delivery processed')
    count(event.type, performance.now() - start)
    return { received: true }
  })
  return app
}

async function counting () {
  const { Counter, Histogram, Registry } = await import('prom-client')
  const registers = [new Registry()]
  const deliveries = new Counter({ name: 'webhook_deliveries_total', help: 'Deliveries', labelNames: ['type', 'outcome'], registers })
  const seconds = new Histogram({ name: 'webhook_delivery_seconds', help: 'How long they took', labelNames: ['type'], registers })
  return (type, ms) => {
    deliveries.inc({ type, outcome: 'processed' })
    seconds.observe({ type }, ms / 1_000)
  }
}
