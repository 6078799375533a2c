import type { MetricObjectWithValues, MetricValueWithName } from 'prom-client'

/** The observations of one label. */
export class Series {
  /** One for each bucket, and one for what is above all. */
  readonly counts: number[]
  sum = 0

  constructor (readonly label: string | undefined, readonly bounds: readonly number[]) {
    this.counts = new Array<number>(bounds.length + 1).fill(0)
  }

  observe (value: number): void {
    const { bounds, counts } = this
    let bucket = 0
    while (bucket < bounds.length && value > bounds[bucket]!) bucket++
    counts[bucket]!++
    this.sum += value
  }
}

/**
 * A histogram with one label or none, for a registry of prom-client's. Its observations are plain numbers, which a scrape renders:
 * prom-client's own makes a text of the labels at every call, and three calls take a delivery 8 µs.
 */
export class Histogram {
  readonly name: string
  readonly help: string
  readonly type = 'histogram'
  readonly aggregator = 'sum'
  readonly labelNames: readonly string[]
  readonly #bounds: readonly number[]
  readonly #series = new Map<string | undefined, Series>()

  /** @param label its name */
  constructor ({ name, help, buckets, label }: { name: string, help: string, buckets: readonly number[], label?: string }) {
    this.name = name
    this.help = help
    this.#bounds = buckets
    this.labelNames = label === undefined ? [] : [label]
  }

  /** @param label its value; absent where the histogram has none */
  series (label?: string): Series {
    let series = this.#series.get(label)
    if (series === undefined) this.#series.set(label, series = new Series(label, this.#bounds))
    return series
  }

  /** For the registry, when it is scraped. */
  async get (): Promise<MetricObjectWithValues<MetricValueWithName<string>>> {
    const { name, help, type, aggregator } = this
    const values = [...this.#series.values()].flatMap(series => this.#valuesOf(series))
    return { name, help, type, aggregator, values } as unknown as MetricObjectWithValues<MetricValueWithName<string>>
  }

  /** For the registry. Whoever holds a series goes on with it. */
  reset (): void {
    for (const series of this.#series.values()) {
      series.counts.fill(0)
      series.sum = 0
    }
  }

  #valuesOf ({ label, bounds, counts, sum }: Series): Array<MetricValueWithName<string>> {
    const labels = Object.fromEntries(this.labelNames.map(name => [name, label!]))
    let count = 0
    const buckets = counts.map((own, index) => {
      count += own
      return { labels: { le: bounds[index] ?? '+Inf', ...labels }, value: count, metricName: `${this.name}_bucket` }
    })
    // As of prom-client's: a label that nothing was observed for has no samples.
    if (count === 0 && label !== undefined) return []
    return [...buckets, { labels, value: sum, metricName: `${this.name}_sum` }, { labels, value: count, metricName: `${this.name}_count` }]
  }
}
