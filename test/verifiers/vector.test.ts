import t from 'tap'
import { build, post, stoppedClock, VECTOR } from '../support/deliveries.ts'

t.test('the known-good vector of OpenAI reaches its handler', async t => {
  const app = await build(t)
  const seen: unknown[] = []
  app.openaiWebhook.on('response.completed', (event, { webhookId, timestamp, endpoint }) => {
    seen.push([event.data.id, webhookId, timestamp, endpoint])
  })
  await app.ready()
  stoppedClock(t, VECTOR.timestamp * 1000)
  const response = await post(app, { headers: VECTOR.headers, body: Buffer.from(VECTOR.body) })
  t.equal(response.statusCode, 200)
  t.equal(response.body, '{"received":true}')
  t.same(seen, [['resp_123', VECTOR.headers['webhook-id'], VECTOR.timestamp, '/webhooks/openai']])
})
