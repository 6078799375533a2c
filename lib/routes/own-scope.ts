import type { FastifyInstance, RouteOptions } from 'fastify'

// An own route needs content type parsers of its own, so it stands in a child scope. It has to have everything else from the scope
// that it was asked for in, whether that was set before or after.

/**
 * Makes a child scope use the requests and replies of its parent. Its own are copies, with the decorators that were there when it
 * was made, and would lack the values of later ones.
 *
 * To be called before the child has routes or decorators of its own.
 */
export function shareDecorators (child: FastifyInstance): void {
  const own = child as unknown as Record<symbol, { props?: unknown } | undefined>
  for (const key of Object.getOwnPropertySymbols(child)) {
    // Fastify has no public name for them. Should they look different one day, the copies stay.
    if (Array.isArray(own[key]?.props)) delete own[key]
  }
}

type Settle = (error: null, done: () => void) => void

/**
 * Declares a route as if it were the last one of its scope.
 *
 * @returns to be called when the app is ready. Fastify takes the error handler and the reply serializer of the scope as soon as the
 * plugins before the route have loaded, but the app may set them later
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
