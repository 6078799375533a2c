import type { FastifyInstance, RouteOptions } from 'fastify'

// A route of ours needs content type parsers of its own, so it stands in a child scope. All else it has to have from the
// scope that it was asked for in, what comes later included.

/**
 * Has the requests and replies of a child scope be those of its parent: it has a copy of the decorators that were there
 * when it was made, and the values of later ones would be missing.
 *
 * To be called before the child has routes or decorators of its own.
 */
export function shareDecorators (child: FastifyInstance): void {
  const own = child as unknown as Record<symbol, { props?: unknown } | undefined>
  for (const key of Object.getOwnPropertySymbols(child)) {
    // Fastify has no name for them. Should they look otherwise one day, the copies stay.
    if (Array.isArray(own[key]?.props)) delete own[key]
  }
}

type Settle = (error: null, done: () => void) => void

/**
 * Declares a route as the last one of its scope would be declared.
 *
 * @returns to be called when the app is ready: Fastify gives a route the error handler and the reply serializer of its
 * scope as soon as the plugins before it have loaded, and those may be set later
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
