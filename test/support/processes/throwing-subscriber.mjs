// A subscriber that throws, and one that does not. The argument says whether the process listens for uncaught exceptions.
import Fastify from 'fastify'
import openaiWebhook, { channels } from 'fastify-openai-webhook'
import { deliver, sampleEvent, testSecret } from 'fastify-openai-webhook/testing'

const told = []
if (process.argv[2] === 'listens') process.on('uncaughtException', error => { told.push(error.message) })

const fail = () => { throw new Error('a subscriber failed') }
for (const part of [channels.verified, channels.delivery.start, channels.delivery.asyncEnd]) part.subscribe(fail)
channels.verified.subscribe(({ webhookId }) => { told.push(webhookId) })

const app = Fastify()
await app.register(openaiWebhook, { secret: testSecret })
app.openaiWebhook.on('batch.failed', () => { told.push('handled') })
const { statusCode, body } = await deliver(app, sampleEvent('batch.failed'), { webhookId: 'wh_1' })
await app.close()
console.log(JSON.stringify({ statusCode, body, told }))
