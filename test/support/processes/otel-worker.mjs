// A worker of a BullMQ queue with its own tracer. Each ended span is sent to the parent process.
import { trace } from '@opentelemetry/api'
import { NodeTracerProvider, SimpleSpanProcessor } from '@opentelemetry/sdk-trace-node'
import Fastify from 'fastify'
import openaiWebhook from 'fastify-openai-webhook'
import { bullmq } from 'fastify-openai-webhook/bullmq'
import { webhookTracing } from 'fastify-openai-webhook/otel'

const redisPort = Number(process.argv[2])

const toParent = {
  export (spans, done) {
    for (const span of spans) {
      const { name, kind, parentSpanContext, status, attributes, links, events } = span
      const { traceId, spanId } = span.spanContext()
      process.send({ span: { name, kind, traceId, spanId, parentSpanId: parentSpanContext?.spanId, status, attributes, links, events } })
    }
    done({ code: 0 })
  },
  async shutdown () {}
}
new NodeTracerProvider({ spanProcessors: [new SimpleSpanProcessor(toParent)] }).register()

const tracing = webhookTracing()
const app = Fastify()
await app.register(openaiWebhook, { path: false, runner: bullmq({ connection: { host: '127.0.0.1', port: redisPort } }) })
let runs = 0
app.openaiWebhook.on('batch.failed', async () => {
  await new Promise(resolve => setImmediate(resolve))
  trace.getTracer('worker').startSpan('work').end()
  if (++runs === 1) throw new Error('the first attempt fails')
}, { name: 'import-batch' })

await app.ready()
process.send({ ready: true })
process.once('message', async () => {
  await app.close()
  tracing.close()
  process.disconnect()
})
