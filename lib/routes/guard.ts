import type { FastifyRequest, RouteHandlerMethod, RouteOptions } from 'fastify'
import { InvalidRoute, UnprotectedRoute } from '../errors.ts'
import type { Failures } from '../failures.ts'
import { toArray } from './hooks.ts'

/** In a route's config: the hook that the plugin has put on the route. */
export const PROTECTED = Symbol('openai-webhook.protected')

/** On the scope of an own route. It spares `request.routeOptions`, which is built anew each time, for 0.4 µs. */
export const OWN = Symbol('openai-webhook.own')

const DECLARED_EARLY = 'was declared before fastify-openai-webhook had loaded, so nothing verifies it: declare the route below `await app.register(openaiWebhook)`, with the `await`, or in a plugin registered after it'
const SKIPPED = 'a hook of the app has thrown null or undefined, which Fastify takes for no error while it skips the hooks that come after: throw an Error'

/** onRequest of the whole app: a route that asks for verification and cannot have it fails closed. */
export function guard (failures: Failures) {
  return (request: FastifyRequest, _reply: unknown, done: (error?: Error) => void): void => {
    if (OWN in request.server) return done()
    const { config, method, url } = request.routeOptions
    if (config?.openaiWebhook === undefined || PROTECTED in config) return done()
    const error = new UnprotectedRoute(`${String(method)} ${String(url)}`, DECLARED_EARLY)
    failures.refused(error, { endpoint: String(url) }, request)
    done(error)
  }
}

/** Of a delivery that has come past its verification. */
export const unverified = (url: string): Error => new UnprotectedRoute(`POST ${url}`, SKIPPED)

/** Whether the route has the hook itself. One that was given the config of a protected route has only the mark. */
export function isProtected ({ config, onRequest, preParsing }: RouteOptions): boolean {
  const mark = (config as { [PROTECTED]?: unknown } | undefined)?.[PROTECTED]
  return mark !== undefined && [...toArray<unknown>(onRequest), ...toArray<unknown>(preParsing)].includes(mark)
}

/** `app.openaiWebhook.handler`: marks a route that dispatches. It runs only where it was not recognised, and then throws. */
export const dispatching = (): RouteHandlerMethod => function ({ method, routeOptions: { config, url } }) {
  if (!(PROTECTED in config)) throw new UnprotectedRoute(`${method} ${String(url)}`, DECLARED_EARLY)
  throw new InvalidRoute(method, url, 'app.openaiWebhook.handler cannot be told where another plugin has wrapped it, as @fastify/otel, @fastify/websocket, Sentry and New Relic do: register that plugin after fastify-openai-webhook, or declare the route with app.openaiWebhook.route(), or for otel with `otel: { instrumentHandler: false }` in its config')
}
