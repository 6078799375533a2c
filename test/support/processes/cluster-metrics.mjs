// Two workers that receive, and a primary that scrapes both and prints the scrape.
import cluster from 'node:cluster'
import { once } from 'node:events'
import Fastify from 'fastify'
import openaiWebhook, { background } from 'fastify-openai-webhook'
import { webhookMetrics } from 'fastify-openai-webhook/metrics'
import { deliver, sampleEvent, testSecret } from 'fastify-openai-webhook/testing'
import { AggregatorRegistry } from 'prom-client'

const aggregator = new AggregatorRegistry()

if (cluster.isPrimary) {
  const workers = [cluster.fork(), cluster.fork()]
  await Promise.all(workers.map(async worker => await once(worker, 'message')))
  console.log(await aggregator.clusterMetrics())
  for (const worker of workers) worker.disconnect()
} else {
  webhookMetrics()
  const app = Fastify()
  // Nothing in this queue is ever run. Each worker reports the same depth, as the workers of a shared queue do.
  await app.register(openaiWebhook, { secret: testSecret, runner: { ...background(), run () {}, depth: () => 7 } })
  for (let count = 0; count < cluster.worker.id; count++) await deliver(app, sampleEvent('batch.failed'))
  process.send('ready')
}
