import type { FastifyRequest, RouteHandlerMethod, RouteOptions } from 'fastify'
import { InvalidRoute, UnprotectedRoute } from '../errors.ts'
import type { Failures } from '../failures.ts'

/** Key in a route's config whose value is the hook that the plugin has added to the route. */
export const PROTECTED = Symbol('openai-webhook.protected')

const DECLARED_EARLY = 'was declared before fastify-openai-webhook had loaded, so nothing verifies it: declare the route below `await app.register(openaiWebhook)`, with the `await`, or in a plugin registered after it'
const UNMARKED = 'is not marked, so nothing verifies it: add config: { openaiWebhook: {} } to it, or declare it with app.openaiWebhook.route()'
const SKIPPED = 'a hook of the app has thrown null or undefined, which Fastify takes for no error while it skips the hooks that come after: throw an Error'

/**
 * Makes an onRequest hook that refuses requests to a route that asks for verification but lacks the plugin's hook. It is added to the plugin's
 * scope, or to the root if the routes of the app were not watched before the registration.
 */
export function guard (failures: Failures) {
  return (request: FastifyRequest, _reply: unknown, done: (error?: Error) => void): void => {
    const { config, method, url } = request.routeOptions
    if (config?.openaiWebhook === undefined || PROTECTED in config) return done()
    const error = new UnprotectedRoute(`${String(method)} ${String(url)}`, DECLARED_EARLY)
    failures.refused(error, { endpoint: String(url) }, request)
    done(error)
  }
}

/** The error for a request whose verification was skipped. */
export const unverified = (url: string): Error => new UnprotectedRoute(`POST ${url}`, SKIPPED)

/** Whether the route has the plugin's hook itself. A route that was given the config of a protected route has only the mark. */
export function isProtected ({ config, onRequest, preParsing }: RouteOptions): boolean {
  const mark = (config as { [PROTECTED]?: unknown } | undefined)?.[PROTECTED]
  return mark !== undefined && [onRequest, preParsing].flat<unknown[]>().includes(mark)
}

/**
 * Makes `app.openaiWebhook.handler`, which marks a route that dispatches. The plugin replaces this handler on a route that it recognises. The
 * handler runs only on a route that the plugin did not recognise, and throws.
 */
export const dispatching = (): RouteHandlerMethod => function ({ method, routeOptions: { config, url } }) {
  if (!(PROTECTED in config)) throw new UnprotectedRoute(`${method} ${String(url)}`, UNMARKED)
  throw new InvalidRoute(method, url, 'app.openaiWebhook.handler is not recognised where another plugin has wrapped it, as @fastify/otel, @fastify/websocket, Sentry and New Relic do: register that plugin after fastify-openai-webhook, or declare the route with app.openaiWebhook.route(), or for otel with `otel: { instrumentHandler: false }` in its config')
}
