import type { MetricObjectWithValues, MetricValueWithName } from 'prom-client'

/** The observations for one value of the label. */
export class Series {
  /** One count for each bucket, and one for the values above all buckets. */
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
 * A histogram with one label or none, for a registry of prom-client. Observations are stored as plain numbers and rendered by a scrape.
 * prom-client's own histogram builds a string from the labels at every call, which costs a delivery 8 µs for three calls.
 */
export class Histogram {
  readonly name: string
  readonly help: string
  readonly type = 'histogram'
  readonly aggregator = 'sum'
  readonly labelNames: readonly string[]
  readonly #bounds: readonly number[]
  readonly #series = new Map<string | undefined, Series>()

  /** @param label the name of the label */
  constructor ({ name, help, buckets, label }: { name: string, help: string, buckets: readonly number[], label?: string }) {
    this.name = name
    this.help = help
    this.#bounds = buckets
    this.labelNames = label === undefined ? [] : [label]
  }

  /** @param label the value of the label; absent when the histogram has no label */
  series (label?: string): Series {
    let series = this.#series.get(label)
    if (series === undefined) this.#series.set(label, series = new Series(label, this.#bounds))
    return series
  }

  /** Called by the registry during a scrape. */
  async get (): Promise<MetricObjectWithValues<MetricValueWithName<string>>> {
    const { name, help, type, aggregator } = this
    const values = [...this.#series.values()].flatMap(series => this.#valuesOf(series))
    return { name, help, type, aggregator, values } as unknown as MetricObjectWithValues<MetricValueWithName<string>>
  }

  /** Called by the registry. A series stays in use after it, so its counts are reset in place. */
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
    // Like prom-client's own histogram, a label value without observations has no samples.
    if (count === 0 && label !== undefined) return []
    return [...buckets, { labels, value: sum, metricName: `${this.name}_sum` }, { labels, value: count, metricName: `${this.name}_count` }]
  }
}
