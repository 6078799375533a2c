import { createAdaptorServer } from '@hono/node-server'
import { Hono } from 'hono'
import OpenAI from 'openai'
import { PATH, SECRET } from '../deliveries.mjs'

export async function build () {
  const client = new OpenAI({ apiKey: 'unused', webhookSecret: SECRET })
  const app = new Hono()
  app.post(PATH, async context => {
    try {
      await client.webhooks.unwrap(await context.req.text(), context.req.raw.headers)
    } catch {
      return context.json({ error: 'not verified' }, 400)
    }
    return context.json({ received: true })
  })
  return createAdaptorServer({ fetch: app.fetch })
}
