// The receiver of OpenAI's guide.
import express from 'express'
import OpenAI from 'openai'
import { PATH, SECRET } from '../deliveries.mjs'
import { createServer } from 'node:http'

export async function build () {
  const client = new OpenAI({ apiKey: 'unused', webhookSecret: SECRET })
  const app = express()
  app.post(PATH, express.text({ type: 'application/json' }), async (request, response) => {
    try {
      await client.webhooks.unwrap(request.body, request.headers)
    } catch {
      return response.status(400).json({ error: 'not verified' })
    }
    response.json({ received: true })
  })
  return createServer(app)
}
