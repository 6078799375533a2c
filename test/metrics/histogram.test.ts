import { AggregatorRegistry, Histogram as Theirs, Registry } from 'prom-client'
import type { Metric } from 'prom-client'
import t from 'tap'
import { Histogram } from '../../lib/metrics/histogram.ts'

const NAME = 'a_duration_seconds'
const HELP = 'What it is, with "quotes" and a \\'
const BUCKETS = [0.005, 0.1, 1, 2.5, 10]
// On the bounds, between them, below and above all of them.
const VALUES = [0, 0.001, 0.005, 0.0050001, 0.1, 0.7, 1, 2.5, 2.6, 10, 10.5, 3e5]

/** One of prom-client's and one of ours, each in a registry of its own. */
function pair (label?: string, registry = () => new Registry()) {
  const theirRegistry = registry()
  const ourRegistry = registry()
  const theirs = new Theirs({ name: NAME, help: HELP, buckets: BUCKETS, registers: [theirRegistry], ...(label !== undefined && { labelNames: [label] }) })
  const ours = new Histogram({ name: NAME, help: HELP, buckets: BUCKETS, ...(label !== undefined && { label }) })
  ourRegistry.registerMetric(ours as unknown as Metric)
  return { theirs, ours, theirRegistry, ourRegistry }
}

const OpenMetrics = Registry as unknown as new (contentType: string) => Registry
const openMetrics = (): Registry => new OpenMetrics('application/openmetrics-text; version=1.0.0; charset=utf-8')

/** A scrape whose labels have one order: default labels come first or last. */
async function scraped (registry: { metrics (): Promise<string> }): Promise<string> {
  const text = await registry.metrics()
  return text.replace(/\{(.*)\}/g, (_, labels: string) => `{${labels.split(',').sort().join(',')}}`)
}

async function json (registry: Registry): Promise<unknown> {
  const metrics = await registry.getMetricsAsJSON() as Array<{ values: Array<{ labels: object, value: number, metricName?: string }> }>
  return metrics.map(metric => ({ ...metric, values: metric.values.map(({ labels, value, metricName }) => ({ labels, value, metricName })) }))
}

for (const [format, registry] of Object.entries({ Prometheus: () => new Registry(), OpenMetrics: openMetrics })) {
  t.test(`a scrape has what prom-client's own histogram has, ${format}`, async t => {
    await t.test('with a label', async t => {
      const { theirs, ours, theirRegistry, ourRegistry } = pair('event_type', registry)
      for (const each of [theirRegistry, ourRegistry]) each.setDefaultLabels({ app: 'x' })
      t.equal(await scraped(ourRegistry), await scraped(theirRegistry), 'before the first observation')
      for (const [index, value] of VALUES.entries()) {
        const label = index % 3 === 0 ? 'batch.failed' : 'a "type"\n'
        theirs.observe({ event_type: label }, value)
        ours.series(label).observe(value)
      }
      t.equal(await scraped(ourRegistry), await scraped(theirRegistry))
      t.strictSame(await json(ourRegistry), await json(theirRegistry))
    })

    await t.test('without one', async t => {
      const { theirs, ours, theirRegistry, ourRegistry } = pair(undefined, registry)
      const series = ours.series()
      t.equal(await scraped(ourRegistry), await scraped(theirRegistry), 'before the first observation')
      for (const value of VALUES) {
        theirs.observe(value)
        series.observe(value)
      }
      t.equal(await scraped(ourRegistry), await scraped(theirRegistry))
    })
  })
}

t.test('a label that nothing was observed for has no samples', async t => {
  const { ours, theirRegistry, ourRegistry } = pair('event_type')
  ours.series('batch.failed')
  t.equal(await scraped(ourRegistry), await scraped(theirRegistry))
})

t.test('resetMetrics() of the registry begins anew', async t => {
  const { theirs, ours, theirRegistry, ourRegistry } = pair('event_type')
  const series = ours.series('batch.failed')
  for (const value of VALUES) series.observe(value)
  ourRegistry.resetMetrics()
  t.equal(await scraped(ourRegistry), await scraped(theirRegistry))
  series.observe(2)
  theirs.observe({ event_type: 'batch.failed' }, 2)
  t.equal(await scraped(ourRegistry), await scraped(theirRegistry))
})

t.test('the processes of a cluster add up', async t => {
  const values = [0, 0.5, 2, 11] // whose sum does not depend on their order
  const registries = [pair('event_type'), pair('event_type')].map(({ ours, ourRegistry }, index) => {
    for (const value of values.slice(index)) ours.series('batch.failed').observe(value)
    return ourRegistry
  })
  const all = AggregatorRegistry.aggregate(await Promise.all(registries.map(async each => await each.getMetricsAsJSON())) as never)
  const { theirs, theirRegistry } = pair('event_type')
  for (const value of [...values, ...values.slice(1)]) theirs.observe({ event_type: 'batch.failed' }, value)
  t.equal(await scraped(all), await scraped(theirRegistry))
})
