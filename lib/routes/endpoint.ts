import type { FastifyInstance } from 'fastify'
import { InvalidRoute } from '../errors.ts'
import type { Verification } from '../pipeline/verify.ts'
import { HandlerList, HandlerTable } from '../registry.ts'
import type { Registry } from '../registry.ts'
import type { RouteOverrides } from '../options.ts'
import type { Tenants } from './tenants.ts'

/** A receiving route: how it verifies, and the URL that names it in jobs, logs and idempotency keys. */
export type Endpoint = Verification & {
  readonly name: string
  /** Set if the route serves many tenants. Each tenant then has its own verification, and the endpoint has no keys. */
  readonly tenants: Tenants | undefined
}

/** The receiving routes of one registration of the plugin, and their handlers. */
export class Endpoints {
  readonly all = new Map<string, Endpoint>()
  readonly #lists = new Map<string, readonly HandlerList[]>()
  readonly #tables = new Map<string, HandlerTable>()
  #appTable: HandlerTable | undefined

  constructor (readonly registry: Registry) {}

  /** @throws FST_OPENAI_WEBHOOK_INVALID_ROUTE */
  add (name: string, verification: Verification, lists: readonly HandlerList[], tenants?: Tenants): Endpoint {
    // Routes that differ only in a constraint would share jobs and idempotency keys, because those contain just the URL.
    if (this.#lists.has(name)) throw new InvalidRoute('POST', name, 'expected a URL of its own, got that of another receiving route')
    this.#lists.set(name, lists)
    const endpoint = { ...verification, name, tenants }
    this.all.set(name, endpoint)
    return endpoint
  }

  /** Makes a list of the handlers in a route's `on`. */
  listOf (on: RouteOverrides['on'], scope: FastifyInstance): HandlerList {
    const list = new HandlerList(this.registry.known, 'route')
    for (const [type, handlers = []] of Object.entries(on ?? {})) {
      for (const handler of [handlers].flat()) list.on(type, handler as never, scope)
    }
    return list
  }

  /** Computes the handlers for each event type. To be called when no more handlers can be added. */
  makeTables (): void {
    for (const [name, lists] of this.#lists) this.#tables.set(name, new HandlerTable(lists, this.registry.known))
  }

  /** Whether the registration has routes, and this endpoint is none of them. A worker has no routes. */
  lacks (name: string): boolean {
    return this.#tables.size > 0 && !this.#tables.has(name)
  }

  handlersOf (name: string): HandlerTable {
    // A worker process may lack the route that received the job. It then runs the app's handlers.
    return this.#tables.get(name) ?? (this.#appTable ??= new HandlerTable([this.registry.app], this.registry.known))
  }
}
