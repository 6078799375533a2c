import type { FastifyInstance } from 'fastify'
import { ANYTHING, assertRules } from './checks.ts'
import { AlreadyStarted, InvalidOptions } from './errors.ts'
import { guideEvents } from './events/index.ts'
import { assertHandlerName, givenName } from './handler-name.ts'
import { matches, nearestType } from './nearest.ts'
import type { EventContext, Handler, RouteHandlers } from './handlers.ts'
import type { DeadDelivery } from './runners/runner.ts'

/** A handler of any event. The type of the event is checked where the handler is registered. */
export type AnyHandler = (this: FastifyInstance, event: never, context: EventContext) => unknown

export interface HandlerOptions {
  /**
   * The name of the handler in the idempotency store (1 to 128 characters, none of them U+0000). With a name, a retry recognises the handler after a deployment that
   * changes the order of registration. A handler of `inbox.once()` already has a name.
   *
   * @default its place in the order of registration
   */
  name?: string | undefined
}

export type ErrorHandler = (error: Error, info: FailureInfo) => unknown

export type DeadHandler = (delivery: DeadDelivery) => unknown

/** What is known about the delivery that failed. For a refusal by the headers, that is only the endpoint. For other trouble it may be nothing. */
export interface FailureInfo {
  endpoint?: string
  /** Set only if the route serves many tenants. For a refusal, the name is what the sender gave, and may be that of no tenant. */
  tenant?: string
  webhookId?: string
  event?: { readonly type: string }
}

interface Registration {
  pattern: string
  handler: Handler
}

/** A list of handlers by event type: the app's, or one route's. */
export class HandlerList {
  readonly names = new Set<string>()
  readonly #matching: Registration[] = []
  readonly any: Handler[] = []
  readonly unhandled: Handler[] = []

  /** @param label keeps the names of a route's handlers apart from the app's; empty for the app's */
  constructor (readonly known: ReadonlySet<string>, readonly label: string) {}

  on (types: string | readonly string[], fn: AnyHandler, scope: FastifyInstance, options?: HandlerOptions): void {
    const list = typeof types === 'string' ? [types] : types
    if (!Array.isArray(list) || list.length === 0) {
      throw new InvalidOptions(`on(): expected an event type, a pattern such as "batch.*" or a non-empty array of them, got ${Array.isArray(list) ? 'an empty array' : types === null ? 'null' : typeof types}`)
    }
    for (const type of list) this.#assertKnown(type)
    // All types share one handler and one name, because a delivery has one type and runs the handler once.
    const handler = this.#handler('on', fn, scope, options)
    for (const pattern of new Set(list)) this.#matching.push({ pattern, handler })
  }

  onAny (fn: AnyHandler, scope: FastifyInstance, options?: HandlerOptions): void {
    this.any.push(this.#handler('onAny', fn, scope, options))
  }

  onUnhandled (fn: AnyHandler, scope: FastifyInstance, options?: HandlerOptions): void {
    this.unhandled.push(this.#handler('onUnhandled', fn, scope, options))
  }

  /** The handlers that match a type, each once, in the order of registration. */
  matching (type: string): Handler[] {
    const handlers = new Set<Handler>()
    for (const { pattern, handler } of this.#matching) if (matches(pattern, type)) handlers.add(handler)
    return [...handlers]
  }

  #handler (method: string, fn: AnyHandler, scope: FastifyInstance, options: HandlerOptions = {}): Handler {
    if (typeof fn !== 'function') throw new InvalidOptions(`${method}(): expected a handler function, got ${fn === null ? 'null' : typeof fn}`)
    assertRules(`${method}()`, options, { name: ANYTHING })
    const given = givenName(fn)
    const { name = given ?? `${this.label}#${this.names.size}` } = options
    assertHandlerName(method, name)
    // The inbox records the handler under the name that once() got.
    if (given !== undefined && name !== given) throw new InvalidOptions(`${method}(): expected the name that once() gave the handler, "${given}", or none, got "${name}"`)
    if (this.names.has(name)) throw new InvalidOptions(`${method}(): the handler name "${name}" is taken: names tell finished handlers apart, so each is used once`)
    this.names.add(name)
    return { name, run: (fn as (event: unknown, context: EventContext) => unknown).bind(scope) }
  }

  #assertKnown (type: unknown): void {
    if (typeof type !== 'string') throw new InvalidOptions(`on(): expected an event type (a string), got ${typeof type}`)
    if ([...this.known].some(name => matches(type, name))) return
    // A handler for a misspelt type would never run, while its events would be acknowledged.
    throw new InvalidOptions(`on(): ${adviceOnType(type, [...this.known])}`)
  }
}

/** Says what to do about an event type or a pattern that is not known. */
function adviceOnType (type: string, known: readonly string[]): string {
  if (type === '*' || type === '**') return `"${type}" is no pattern: onAny(handler) runs for every event, a pattern has a family, such as "batch.*"`
  if (Object.keys(guideEvents).some(name => matches(type, name))) {
    return `"${type}" is known from an older guide alone: register the plugin with { events: guideEvents }, which fastify-openai-webhook exports`
  }
  return `unknown event type "${type}"${nearestType(type, known)}; a type of your own needs a schema in the \`events\` option`
}

/** The handlers of one registration of the plugin. None can be added once the app is ready. */
export class Registry {
  readonly app: HandlerList
  /** The handlers of each receiving route, by endpoint. */
  readonly lists = new Map<string, readonly HandlerList[]>()
  readonly errorHandlers: ErrorHandler[] = []
  readonly deadHandlers: DeadHandler[] = []
  readonly #tables = new Map<string, HandlerTable>()
  #appTable: HandlerTable | undefined
  /** Whether the app is ready, so that nothing can be added any more. */
  #isComplete = false

  constructor (readonly known: ReadonlySet<string>) {
    this.app = new HandlerList(known, '')
  }

  /** To be called before anything is added. @param method names the caller @throws FST_OPENAI_WEBHOOK_ALREADY_STARTED */
  open (method: string): this {
    if (this.#isComplete) throw new AlreadyStarted(method)
    return this
  }

  /** Makes a list of the handlers in a route's `on`. */
  listOf (on: RouteHandlers = {}, scope: FastifyInstance): HandlerList {
    const list = new HandlerList(this.known, 'route')
    for (const [type, handlers = []] of Object.entries(on)) {
      for (const handler of [handlers].flat()) list.on(type, handler as never, scope)
    }
    return list
  }

  /** Computes the handlers for each event type. To be called when the app is ready. */
  complete (): void {
    this.#isComplete = true
    for (const [endpoint, lists] of this.lists) this.#tables.set(endpoint, new HandlerTable(lists, this.known))
  }

  /** Whether the registration has routes, and this endpoint is none of them. A worker has no routes. */
  lacks (endpoint: string): boolean {
    return this.#tables.size > 0 && !this.#tables.has(endpoint)
  }

  handlersOf (endpoint: string): HandlerTable {
    // A worker process may lack the route that received the job. It then runs the app's handlers.
    return this.#tables.get(endpoint) ?? (this.#appTable ??= new HandlerTable([this.app], this.known))
  }
}

/** The handlers of one endpoint by event type. They are computed when the app is ready, so that a request only looks them up. */
export class HandlerTable {
  /** Has the types that an `on` handler matches. */
  readonly #byType = new Map<string, readonly Handler[]>()
  /**
   * The handlers of all other types. A family such as `batch.*` does not match unknown types, because its handlers are typed by the known types,
   * and the shape of an unknown type has not been checked.
   */
  readonly #others: readonly Handler[]
  /** Whether the route has its own event handlers in addition to the app's. */
  readonly hasRouteHandlers: boolean

  /** @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS if two lists have a name in common */
  constructor (lists: readonly HandlerList[], known: ReadonlySet<string>) {
    const names = new Set<string>()
    for (const name of lists.flatMap(list => [...list.names])) {
      if (names.has(name)) throw new InvalidOptions(`the handler name "${name}" is taken: names tell finished handlers apart, so each is used once over the app's handlers and those of a route`)
      names.add(name)
    }
    const any = lists.flatMap(list => list.any)
    const unhandled = lists.flatMap(list => list.unhandled)
    this.#others = [...any, ...unhandled]
    this.hasRouteHandlers = lists.some(list => list.label !== '' && list.names.size > 0)
    for (const type of known) {
      const matching = lists.flatMap(list => list.matching(type))
      if (matching.length > 0) this.#byType.set(type, [...any, ...matching])
    }
  }

  for (type: string): readonly Handler[] {
    return this.#byType.get(type) ?? this.#others
  }

  /** Whether an `on` handler matches the type. */
  handles (type: string): boolean {
    return this.#byType.has(type)
  }
}
