import type { FastifyPluginAsync } from 'fastify'
import { register as globalRegister } from 'prom-client'
import { assertNames, isEventType, show } from './checks.ts'
import { InvalidOptions } from './errors.ts'
import { Collector } from './metrics/collector.ts'
import type { MetricsRegistry } from './metrics/collector.ts'

export type { MetricsRegistry }

export interface WebhookMetricsOptions {
  /**
   * A registry of prom-client, or prom-client itself, whose global registry is then used.
   *
   * @default prom-client's global registry
   */
  register?: MetricsRegistry | { readonly register: MetricsRegistry } | undefined
  /** The event types of your `events` option. Any type that is neither OpenAI's nor listed here is counted as `other`. */
  eventTypes?: readonly string[] | undefined
  /**
   * Upper bounds of the buckets of `webhook_processing_duration_seconds`, in seconds and in ascending order.
   *
   * @default [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300]
   */
  buckets?: readonly number[] | undefined
}

export interface MetricsRouteOptions {
  /**
   * The path of the route, within the `prefix` of `register`.
   *
   * @default '/metrics'
   */
  path?: string | undefined
}

/** A Fastify plugin with one route, which is optional: metrics are collected even if it is not registered. */
export interface WebhookMetrics extends FastifyPluginAsync<MetricsRouteOptions> {
  /** Stops collecting and removes the metrics from the registry. */
  close (): void
}

const BUCKETS = [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300]

/**
 * Starts to collect metrics about the deliveries of every app in this process.
 *
 * `await app.register(webhookMetrics({ register }))` serves all metrics of the registry at `GET /metrics`.
 *
 * @returns the plugin that serves the metrics
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS, also when the registry already has a metric of one of these names
 */
export function webhookMetrics (options: WebhookMetricsOptions = {}): WebhookMetrics {
  // register() was given this function instead of its result. The error is a rejection, because a plugin function may not throw.
  if ('decorateRequest' in Object(options)) return Promise.reject(new InvalidOptions('webhookMetrics() makes the plugin: expected await app.register(webhookMetrics()), with the call')) as never
  assertNames('webhookMetrics()', options, ['register', 'eventTypes', 'buckets'])
  const { register = globalRegister, eventTypes = [], buckets = BUCKETS } = options
  if (!isList(eventTypes, isEventType)) {
    const got = Array.isArray(eventTypes) ? `one with ${show(eventTypes.find(type => !isEventType(type)))}` : show(eventTypes)
    throw new InvalidOptions(`webhookMetrics(): expected eventTypes to be an array of event types, such as ["order.paid"], got ${got}`)
  }
  if (!isList(buckets, (bound, index) => Number.isFinite(bound) && (index === 0 || (bound as number) > (buckets[index - 1] as number)))) {
    throw new InvalidOptions('webhookMetrics(): expected buckets to be an array of numbers of seconds in ascending order')
  }
  const registry = registryOf(register)
  const collector = new Collector({ register: registry, eventTypes, buckets })

  const plugin: FastifyPluginAsync<MetricsRouteOptions> = async (app, routeOptions) => {
    // The options of this route and those of Fastify's `register`.
    assertNames('webhookMetrics()', routeOptions, ['path', 'prefix', 'logLevel', 'logSerializers'])
    const { path = '/metrics' } = routeOptions
    if (typeof path !== 'string' || !path.startsWith('/')) throw new InvalidOptions('webhookMetrics(): expected path to begin with "/"')
    const schema: object = { hide: true } // hides the route from @fastify/swagger
    app.get(path, { schema }, async (_request, reply) => {
      reply.type(registry.contentType)
      return await registry.metrics()
    })
  }
  return Object.assign(plugin, { close: () => { collector.close() } })
}

function isList (value: unknown, accepts: (item: unknown, index: number) => boolean): boolean {
  return Array.isArray(value) && value.every(accepts)
}

function registryOf (register: unknown): MetricsRegistry {
  if (isRegistry(register)) return register
  const inner = (register as { register?: unknown } | null)?.register
  if (isRegistry(inner)) return inner
  throw new InvalidOptions('webhookMetrics(): expected register to be a Registry of prom-client\'s, or prom-client itself')
}

function isRegistry (value: unknown): value is MetricsRegistry {
  return ['metrics', 'registerMetric', 'getSingleMetric', 'removeSingleMetric']
    .every(method => typeof (value as Record<string, unknown> | null | undefined)?.[method] === 'function')
}
