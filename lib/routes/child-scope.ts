import type { FastifyInstance, RouteOptions } from 'fastify'

// A route that the plugin declares itself needs its own content type parsers, so it is declared in a child scope. Everything else has to come
// from the scope in which the route was requested, whether the app sets it before or after the route.

/**
 * Makes a child scope use the request and reply classes of its parent. Fastify gives the child copies that have only the decorators that
 * existed when the child was created, and would lack the values of later ones.
 *
 * To be called before the child has any routes or decorators.
 */
export function shareDecorators (child: FastifyInstance): void {
  const own = child as unknown as Record<symbol, { props?: unknown } | undefined>
  for (const key of Object.getOwnPropertySymbols(child)) {
    // Fastify has no public API for the two classes. If a later version changes their shape, nothing matches and the copies stay.
    if (Array.isArray(own[key]?.props)) delete own[key]
  }
}

type Settle = (error: null, done: () => void) => void

/**
 * Declares a route as if it were the last one of its scope.
 *
 * @returns a function to be called when the app is ready. Fastify reads the error handler and the reply serializer of the scope as soon as
 * the plugins before the route have loaded, but the app may set them later
 */
export function declareRoute (child: FastifyInstance, scope: FastifyInstance, options: RouteOptions): () => void {
  const settles: Settle[] = []
  const { after } = child
  child.after = function (settle: Settle) {
    settles.push(settle)
    return after.call(child, settle as never)
  } as typeof after
  child.route({
    ...options,
    childLoggerFactory: (...given) => scope.childLoggerFactory.apply(scope, given)
  })
  child.after = after
  return () => { for (const settle of settles) settle(null, () => {}) }
}
