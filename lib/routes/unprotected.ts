import { subscribe } from 'node:diagnostics_channel'
import type { FastifyInstance, RouteOptions } from 'fastify'
import { InvalidRoute, UnprotectedRoute } from '../errors.ts'
import { editDistance } from '../nearest.ts'

// A registration of the plugin sees only the routes of its own scope and of the scopes below. A route that is marked elsewhere would be served
// unverified, so every app is watched from its root as early as Fastify allows.

/** Edit distance, ignoring case, up to which a name counts as misspelt: `openai-webhook` does, `openaiWebhookUrl` does not. */
const SLIPS = 2

interface Marked { readonly scope: FastifyInstance, readonly route: RouteOptions }

/** Servers of the apps that are watched from their root. */
const watched = new WeakSet<object>()
/** Servers of apps that have the plugin in some scope. */
const registered = new WeakSet<object>()

// fastify() publishes this message. An app that was created before this module was imported is watched only from the registration on.
subscribe('fastify.initialization', message => watch((message as { fastify: FastifyInstance }).fastify))

/**
 * Records that an app has the plugin.
 *
 * @returns the scope that needs the guard: this one, or the root of the app if its routes were not watched before
 */
export function guardedScope (instance: FastifyInstance): FastifyInstance {
  registered.add(instance.server)
  if (watched.has(instance.server)) return instance
  const root = rootOf(instance)
  watch(root)
  return root
}

export function rootOf (instance: FastifyInstance): FastifyInstance {
  const parent = Object.getPrototypeOf(instance) as FastifyInstance
  return 'register' in parent ? rootOf(parent) : instance
}

function watch (root: FastifyInstance): void {
  watched.add(root.server)
  const marked: Marked[] = []
  root.addHook('onRoute', function (route) {
    if (!isMarked(route) && misspelt(route) === undefined) return
    if (marked.push({ scope: this, route }) === 1) root.addHook('onReady', async () => { marked.forEach(assertReached) })
  })
}

/** Does not check the spelling in an app without the plugin, which may use a config key with a similar name. */
function assertReached ({ scope, route }: Marked): void {
  if (!isMarked(route)) {
    if (registered.has(scope.server)) assertSpelling(route)
  } else if (!scope.hasDecorator('openaiWebhook')) {
    throw new UnprotectedRoute(`${String(route.method)} ${route.url}`, 'fastify-openai-webhook is registered neither in its scope nor in one above, so nothing verifies it: register the plugin there, or declare the route in the scope of the plugin')
  }
}

const isMarked = (route: RouteOptions): boolean => route.config?.openaiWebhook !== undefined

/** @throws FST_OPENAI_WEBHOOK_INVALID_ROUTE if the mark of the route is misspelt */
export function assertSpelling (route: RouteOptions): void {
  const given = misspelt(route)
  if (given !== undefined) throw new InvalidRoute(String(route.method), route.url, `${given} asks for nothing, did you mean config.openaiWebhook?`)
}

function misspelt (route: RouteOptions): string | undefined {
  if ((route as { openaiWebhook?: unknown }).openaiWebhook !== undefined) return 'the route option openaiWebhook'
  const config: Record<string, unknown> = { ...route.config }
  const key = Object.keys(config).find(key => key !== 'openaiWebhook' && config[key] !== undefined && editDistance(key.toLowerCase(), 'openaiwebhook') <= SLIPS)
  return key === undefined ? undefined : `config.${key}`
}
