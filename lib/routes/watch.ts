import { subscribe } from 'node:diagnostics_channel'
import type { FastifyInstance, RouteOptions } from 'fastify'
import { InvalidRoute, UnprotectedRoute } from '../errors.ts'
import { editDistance } from '../nearest.ts'

// A registration sees the routes of its own scope and of scopes below. A route that is marked elsewhere would be served
// unverified, so every app is watched from its root where Fastify lets us.

/** Characters that may differ, case aside: `openai-webhook` is a slip, `openaiWebhookUrl` is not. */
const SLIPS = 2

interface Marked { readonly scope: FastifyInstance, readonly route: RouteOptions }

/** Servers of apps whose routes are all seen. */
const watched = new WeakSet<object>()
/** Servers of apps that have the plugin in some scope. */
const registered = new WeakSet<object>()

// Fastify() publishes it. An app that was made before this module was imported is watched from its registration on.
subscribe('fastify.initialization', message => watch((message as { fastify: FastifyInstance }).fastify))

/**
 * Notes that an app has the plugin.
 *
 * @returns the root of the app if its routes have not been watched so far
 */
export function registeredIn (instance: FastifyInstance): FastifyInstance | undefined {
  registered.add(instance.server)
  if (watched.has(instance.server)) return undefined
  const root = rootOf(instance)
  watch(root)
  return root
}

function rootOf (instance: FastifyInstance): FastifyInstance {
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

/** An app without the plugin may have a config of a similar name. */
function assertReached ({ scope, route }: Marked): void {
  if (!isMarked(route)) {
    if (registered.has(scope.server)) assertSpelling(route)
  } else if (!scope.hasDecorator('openaiWebhook')) {
    throw new UnprotectedRoute(`${String(route.method)} ${route.url}`, 'fastify-openai-webhook is registered neither in its scope nor in one above, so nothing verifies it: register the plugin there, or declare the route in the scope of the plugin')
  }
}

const isMarked = (route: RouteOptions): boolean => route.config?.openaiWebhook !== undefined

/** @throws FST_OPENAI_WEBHOOK_INVALID_ROUTE for a route whose mark is misspelt */
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
