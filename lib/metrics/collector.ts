import { Counter, Gauge } from 'prom-client'
import type { CounterConfiguration, GaugeConfiguration, Metric, OpenMetricsContentType, PrometheusContentType, Registry } from 'prom-client'
import { channels } from '../channels.ts'
import type { DeliveryInfo, MessageChannel } from '../channels.ts'
import { InvalidOptions } from '../errors.ts'
import { OWN_HANDLER } from '../handlers.ts'
import { Histogram } from './histogram.ts'
import type { Series } from './histogram.ts'
import { OTHER, OVERLOADED, UNAVAILABLE, codeLabel, knownTypes, refusalCodes, secretLabel } from './labels.ts'
import { sumOfRunners } from './runners.ts'

export type MetricsRegistry = Registry<PrometheusContentType> | Registry<OpenMetricsContentType>

export interface CollectorOptions {
  readonly register: MetricsRegistry
  readonly eventTypes: readonly string[]
  readonly buckets: readonly number[]
}

const STATUSES = ['processed', 'failed', 'duplicate', 'queued', 'refused'] as const
/** Outcomes that get a sample of 0 as soon as their event type has been seen. The others get a sample when they first happen. */
const FROM_ZERO: ReadonlySet<string> = new Set(['processed', 'failed'])

/**
 * The outcomes of one event type since the last scrape. The scrape adds these numbers to a counter. That costs a delivery half a
 * microsecond less than `Counter.inc()`, which builds a string from its labels at every call.
 */
type Tally = Record<typeof STATUSES[number], number> & {
  readonly labels: { readonly event_type: string }
  /** The durations of all attempts. Unlike the outcomes, they are not reset by a scrape. */
  readonly durations: Series
}

/** Seconds. The last bucket ends at the 72 hours for which OpenAI retries. */
const AGE_BUCKETS = [1, 2, 5, 10, 30, 60, 300, 900, 3_600, 21_600, 86_400, 259_200]
/** Seconds by which the clock that set `created_at` may be ahead: the default tolerance of signed timestamps. */
const MAX_LEAD = 300

/** Keeps the metrics of one registry up to date from the diagnostics channels of this process, until it is closed. */
export class Collector {
  readonly #register: MetricsRegistry
  readonly #known: ReadonlySet<string>
  readonly #metrics = new Map<string, Metric>()
  readonly #unsubscribe: Array<() => void> = []
  readonly #tallies = new Map<string, Tally>()
  readonly #durations: Histogram

  /** @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS when the registry already has a metric of one of the names */
  constructor ({ register, eventTypes, buckets }: CollectorOptions) {
    this.#register = register
    this.#known = knownTypes(eventTypes)
    this.#durations = new Histogram({
      name: 'webhook_processing_duration_seconds',
      help: 'Time from the start of the handlers of a delivery until their end is on record',
      label: 'event_type',
      buckets: [...buckets]
    })
    try {
      this.#observeOutcomes()
      this.#observeHandlers()
      this.#observeRefusals()
      this.#observeSecrets()
      this.#observeTheRest()
    } catch (error) {
      this.close()
      throw error
    }
  }

  /** Ends the subscriptions and removes the metrics from the registry. */
  close (): void {
    for (const unsubscribe of this.#unsubscribe.splice(0)) unsubscribe()
    for (const [name, metric] of this.#metrics) {
      // The user may have called `register.clear()` and registered another metric of this name.
      if (this.#register.getSingleMetric(name) === metric) this.#register.removeSingleMetric(name)
    }
  }

  #observeOutcomes (): void {
    const tallies = this.#tallies
    this.#counter({
      name: 'webhook_events_total',
      help: 'Verified deliveries by what became of them: processed, failed, duplicate, queued or refused',
      labelNames: ['event_type', 'status'],
      collect () {
        for (const tally of tallies.values()) {
          for (const status of STATUSES) {
            // Prometheus sees no increase in a sample that appears for the first time, so without a 0 before it a rate of failures would
            // miss the first one.
            if (tally[status] === 0 && !FROM_ZERO.has(status)) continue
            this.inc({ ...tally.labels, status }, tally[status])
            tally[status] = 0
          }
        }
      }
    })
    this.#subscribe(channels.enqueue.asyncEnd, message => {
      // When the runner already had the delivery, the `duplicate` channel counts it.
      if (message.error === undefined && message.duplicate !== true) this.#tally(message).queued++
    })

    const duplicates = this.#counter({
      name: 'webhook_duplicates_total',
      help: 'Deliveries of a webhook-id that had been seen: processed before, joined to one that was running here, running elsewhere, or queued',
      labelNames: ['state']
    })
    for (const state of ['processed', 'joined', 'elsewhere', 'queued']) duplicates.inc({ state }, 0)
    this.#subscribe(channels.duplicate, message => {
      this.#tally(message).duplicate++
      duplicates.inc({ state: message.state })
    })

    const unhandled = this.#counter({
      name: 'webhook_unhandled_total',
      help: 'Deliveries of a type that no handler of on() takes',
      labelNames: ['event_type']
    })
    this.#subscribe(channels.unhandled, delivery => { unhandled.inc(this.#tally(delivery).labels) })
  }

  #observeHandlers (): void {
    this.#histogram(this.#durations)
    const deliveryAge = this.#ages({
      name: 'webhook_delivery_age_seconds',
      help: 'Time from the signing of a delivery to the start of its handlers'
    })
    const eventAge = this.#ages({
      name: 'webhook_event_age_seconds',
      help: 'Time from created_at of an event to the start of its handlers'
    })
    const failures = this.#counter({
      name: 'webhook_handler_failures_total',
      help: 'Handlers that threw or rejected',
      labelNames: ['event_type', 'handler']
    })
    let inFlight = 0
    this.#gauge({
      name: 'webhook_deliveries_in_flight',
      help: 'Deliveries whose handlers are running',
      collect () { this.set(inFlight) }
    })

    // The values are kept on the message, which is the same object from start to end. The symbols belong to this collector alone.
    const startedAt = Symbol('webhook-metrics.startedAt')
    const handlerFailed = Symbol('webhook-metrics.handlerFailed')
    this.#subscribe(channels.delivery.start, message => {
      inFlight++
      note(message, startedAt, performance.now())
      const now = Date.now() / 1_000
      const { timestamp, event: { created_at: createdAt } } = message
      // A queue may return a job with any timestamp.
      if (Number.isFinite(timestamp)) deliveryAge.observe(Math.max(0, now - timestamp))
      if (isPlausible(createdAt, now)) eventAge.observe(Math.max(0, now - createdAt))
    })
    this.#subscribe(channels.handler.error, ({ delivery, handler }) => {
      failures.inc({ ...this.#tally(delivery).labels, handler })
      note(delivery, handlerFailed, true)
    })
    this.#subscribe(channels.delivery.asyncEnd, message => {
      const started = noted(message, startedAt)
      if (started === undefined) return // the delivery started before this collector subscribed
      inFlight--
      const tally = this.#tally(message)
      tally.durations.observe((performance.now() - (started as number)) / 1_000)
      if (message.error === undefined) {
        tally.processed++
        return
      }
      tally.failed++
      // No event handler has failed, so the failure is that of the route's `handler`, which replies.
      if (noted(message, handlerFailed) === undefined) failures.inc({ ...tally.labels, handler: OWN_HANDLER })
    })
  }

  #observeRefusals (): void {
    const refusals = this.#counter({
      name: 'webhook_refusals_total',
      help: 'Deliveries that were not answered 200, by the code of the answer',
      labelNames: ['code']
    })
    for (const code of refusalCodes) refusals.inc({ code }, 0)
    this.#subscribe(channels.refused, ({ code, event }) => {
      refusals.inc({ code: codeLabel(code) })
      // All other refusals of a verified delivery are counted as duplicates or when its handlers end.
      if (event !== undefined && (code === OVERLOADED || code === UNAVAILABLE)) this.#tally({ event }).refused++
    })
  }

  #observeSecrets (): void {
    const matches = new Map<string, Map<string, number>>()
    this.#counter({
      name: 'webhook_secret_matches_total',
      help: 'Verified deliveries by the secret that matched: its index in the secret option',
      labelNames: ['endpoint', 'secret_index'],
      collect () {
        for (const [endpoint, bySecret] of matches) {
          for (const [index, count] of bySecret) {
            this.inc({ endpoint, secret_index: index }, count)
            bySecret.set(index, 0)
          }
        }
      }
    })
    this.#subscribe(channels.verified, ({ endpoint, secretIndex }) => {
      let bySecret = matches.get(endpoint)
      if (bySecret === undefined) matches.set(endpoint, bySecret = new Map())
      const index = secretLabel(secretIndex)
      bySecret.set(index, (bySecret.get(index) ?? 0) + 1)
    })
  }

  #observeTheRest (): void {
    const trouble = this.#counter({
      name: 'webhook_trouble_total',
      help: 'Failures that no sender is told of: of a store, a queue or a secret function'
    })
    this.#subscribe(channels.trouble, () => { trouble.inc() })

    const dead = this.#counter({
      name: 'webhook_dead_total',
      help: 'Deliveries whose attempts were used up'
    })
    this.#subscribe(channels.dead, () => { dead.inc() })

    this.#sumOfRunners('depth', 'webhook_queue_depth', 'Deliveries that wait in the queue of a runner')
    this.#sumOfRunners('deadCount', 'webhook_dead_deliveries', 'Deliveries whose attempts are used up, kept for a person to look at')
  }

  #sumOfRunners (question: Parameters<typeof sumOfRunners>[0], name: string, help: string): void {
    this.#gauge({
      name,
      help,
      // Each process that shares a queue reports the whole queue, so the values must not be added.
      aggregator: 'max',
      async collect () {
        const sum = await sumOfRunners(question)
        // No sample is better than an outdated one.
        if (sum === undefined) this.remove()
        else this.set(sum)
      }
    })
  }

  #tally ({ event: { type } }: Pick<DeliveryInfo, 'event'>): Tally {
    return this.#tallies.get(type) ?? this.#tallyOf(this.#known.has(type) ? type : OTHER)
  }

  #tallyOf (label: string): Tally {
    let tally = this.#tallies.get(label)
    if (tally === undefined) {
      tally = { labels: { event_type: label }, durations: this.#durations.series(label), processed: 0, failed: 0, duplicate: 0, queued: 0, refused: 0 }
      this.#tallies.set(label, tally)
    }
    return tally
  }

  #subscribe<Message> (channel: MessageChannel<Message>, listener: (message: Message) => void): void {
    channel.subscribe(listener)
    this.#unsubscribe.push(() => { channel.unsubscribe(listener) })
  }

  #counter (configuration: CounterConfiguration<string>): Counter {
    return this.#own(configuration.name, () => new Counter({ ...configuration, registers: [this.#register] }))
  }

  #gauge (configuration: GaugeConfiguration<string>): Gauge {
    return this.#own(configuration.name, () => new Gauge({ ...configuration, registers: [this.#register] }))
  }

  /** A histogram of ages, without a label. */
  #ages (named: { name: string, help: string }): Series {
    return this.#histogram(new Histogram({ ...named, buckets: AGE_BUCKETS })).series()
  }

  #histogram (histogram: Histogram): Histogram {
    // Histogram implements what a registry calls on a metric.
    const metric = histogram as unknown as Metric
    this.#own(histogram.name, () => {
      this.#register.registerMetric(metric)
      return metric
    })
    return histogram
  }

  #own<T extends Metric> (name: string, make: () => T): T {
    if (this.#register.getSingleMetric(name) !== undefined) {
      throw new InvalidOptions(`webhookMetrics(): the registry has a metric "${name}" already. One webhookMetrics() observes every app of the process: ` +
        'call it once for a registry, register what it returns in each app that shall serve the metrics, or close() it before it is called again')
    }
    const metric = make()
    this.#metrics.set(name, metric)
    return metric
  }
}

function note (message: object, key: symbol, value: unknown): void {
  (message as Record<symbol, unknown>)[key] = value
}

function noted (message: object, key: symbol): unknown {
  return (message as Record<symbol, unknown>)[key]
}

/** Whether a value can be a time in Unix seconds, as OpenAI sends it, and not in milliseconds or in the future. */
function isPlausible (createdAt: unknown, now: number): createdAt is number {
  return typeof createdAt === 'number' && createdAt > 0 && createdAt <= now + MAX_LEAD
}
