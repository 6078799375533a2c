import { FastifyOtelInstrumentation } from '@fastify/otel'
import { BatchSpanProcessor, ConsoleSpanExporter, NodeTracerProvider } from '@opentelemetry/sdk-trace-node'
import Fastify from 'fastify'
import openaiWebhook from 'fastify-openai-webhook'
import { webhookTracing } from 'fastify-openai-webhook/otel'

// For a collector, use the OTLPTraceExporter of @opentelemetry/exporter-trace-otlp-http instead of the console.
const provider = new NodeTracerProvider({
  spanProcessors: [new BatchSpanProcessor(new ConsoleSpanExporter())]
})
provider.register()
webhookTracing()

const app = Fastify({ logger: true })
// Register it before the routes: it makes no spans for earlier ones.
await app.register(new FastifyOtelInstrumentation({ instrumentHooks: false }).plugin())
await app.register(openaiWebhook)

app.openaiWebhook.on('batch.completed', async (event, { log }) => {
  log.info({ batch: event.data.id }, 'batch completed')
}, { name: 'import-batch' })

async function shutDown () {
  await app.close()
  await provider.shutdown()
}
for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, shutDown)

await app.listen({ port: Number(process.env.PORT ?? 3000) })
