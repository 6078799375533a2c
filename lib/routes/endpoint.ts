import type { FastifyInstance } from 'fastify'
import { InvalidRoute } from '../errors.ts'
import type { Verification } from '../pipeline/verify.ts'
import { HandlerList, HandlerTable } from '../registry.ts'
import type { Registry } from '../registry.ts'
import type { RouteOverrides } from '../options.ts'
import { toArray } from './hooks.ts'
import type { Tenants } from './tenants.ts'

/** A receiving route: its own verification, and the URL that names it in jobs, logs and idempotency keys. */
export type Endpoint = Verification & {
  readonly name: string
  /** Where it serves many: each has a verification of its own, and the endpoint no keys. */
  readonly tenants: Tenants | undefined
}

/** The receiving routes of one registration, with their handlers. */
export class Endpoints {
  readonly #registry: Registry
  readonly #all = new Map<string, Endpoint>()
  readonly #lists = new Map<string, readonly HandlerList[]>()
  readonly #tables = new Map<string, HandlerTable>()
  #appTable: HandlerTable | undefined

  constructor (registry: Registry) {
    this.#registry = registry
  }

  /** @throws FST_OPENAI_WEBHOOK_INVALID_ROUTE */
  add (name: string, verification: Verification, lists: readonly HandlerList[], tenants?: Tenants): Endpoint {
    // Routes that differ by a constraint alone would share jobs and idempotency keys, which go by the URL.
    if (this.#lists.has(name)) throw new InvalidRoute('POST', name, 'expected a URL of its own, got that of another receiving route')
    this.#lists.set(name, lists)
    const endpoint = { ...verification, name, tenants }
    this.#all.set(name, endpoint)
    return endpoint
  }

  get all (): ReadonlyMap<string, Endpoint> { return this.#all }

  /** The handlers in a route's `on`. */
  listOf (on: RouteOverrides['on'], scope: FastifyInstance): HandlerList {
    const list = new HandlerList(this.#registry.known, 'route')
    for (const [type, handlers] of Object.entries(on ?? {})) {
      for (const handler of toArray(handlers)) list.on(type, handler as never, scope)
    }
    return list
  }

  /** Works out the handlers of each type, once none can be added any more. */
  settle (): void {
    for (const [name, lists] of this.#lists) this.#tables.set(name, new HandlerTable(lists, this.#registry.known))
  }

  handlersOf (name: string): HandlerTable {
    // A worker may lack the route that received the job. It has the app's handlers.
    return this.#tables.get(name) ?? (this.#appTable ??= new HandlerTable([this.#registry.app], this.#registry.known))
  }
}
