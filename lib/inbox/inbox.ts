import type { FastifyInstance } from 'fastify'
import { show } from '../checks.ts'
import { InvalidOptions } from '../errors.ts'
import { assertHandlerName } from '../handler-name.ts'
import type { EventContext, EventHandler } from '../handlers.ts'
import type { MaybePromise } from '../maybe-promise.ts'
import type { Pruning } from '../pruning.ts'

/** Identifies the delivery: the context of an event handler, or `request.openaiWebhook` on a marked route. */
export interface InboxContext {
  readonly webhookId: string
  readonly endpoint: string
  readonly tenant?: string | undefined
  /** Gets a warning when old records could not be deleted. */
  readonly log?: { warn (fields: object, message: string): void } | undefined
}

/**
 * Runs a statement in the caller's own transaction. The parameters are `$1` to `$n` in PostgreSQL and `?` in SQLite. Each occurs once and in
 * order, and `values` are strings. The answer is the rows as objects, or an object with the rows as `rows`.
 */
export type InboxQuery<Answer = unknown> = (text: string, values: string[]) => Answer

/** @param tx works until this function returns, or until its promise settles. @param event of the type that `on` infers. */
export type InboxWork<Tx, Event> = (this: FastifyInstance, tx: Tx, event: Event, context: EventContext) => unknown

/**
 * Makes effects in a database happen once: the effect and the record that its handler has run are committed together. A record consists of
 * endpoint, tenant, webhook-id and handler name.
 *
 * - Of any number of callers with the same record, in any number of processes, one commits and the others do nothing.
 * - If the work fails, its writes and its record are rolled back, so that the next attempt runs it again.
 * - The inbox depends neither on the idempotency store nor on the runner, and a crash at any moment does not break it.
 * - A rollback does not undo effects outside the transaction, such as a call to another service.
 */
export interface Inbox<Tx> {
  /** Makes an event handler that has `name` wherever it is registered. `work` writes with `tx`. */
  once<Event> (name: string, work: InboxWork<Tx, Event>): EventHandler<Event>
  /** Writes the record in a transaction of the caller. @returns whether the caller is to make the effect */
  first (query: InboxQuery, name: string, context: InboxContext): MaybePromise<boolean>
  /** Ends the deletion of old records, which runs in the background. */
  close? (): Promise<void>
}

/** The default of `retention`: ms for which a record is kept (30 days). */
export const INBOX_RETENTION = 30 * 24 * 3_600_000

/**
 * Key of a method on a handler's context. An inbox calls it with the handler's name and the ms for which the record is kept. All copies of the
 * package in a process share the symbol.
 */
export const REMEMBER = Symbol.for('fastify-openai-webhook.inboxKeeps')

let shortest: number | undefined

/** To be called when an inbox is created. @param retention ms */
export function noteRetention (retention: number): void {
  shortest = Math.min(shortest ?? retention, retention)
}

/** The shortest retention of this process's inboxes, in ms; `undefined` if there are none. */
export function shortestRetention (): number | undefined {
  return shortest
}

/** Checks the arguments of `first()`. @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS */
export function assertFirst (query: unknown, name: unknown): void {
  if (typeof query !== 'function') {
    throw new InvalidOptions(`first(): expected a function that runs a statement in your transaction, such as (text, values) => client.query(text, values), got a value of type ${typeof query}`)
  }
  assertHandlerName('first', name)
}

/** The values of a record, in the order of the columns. Calls REMEMBER of the context. @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS */
export function recordOf (name: string, context: InboxContext, retention: number): [string, string, string, string] {
  // `request.openaiWebhook` of a route that is not marked is null.
  const { endpoint, tenant = '', webhookId } = (context ?? {}) as Partial<InboxContext>
  if (typeof endpoint !== 'string' || typeof webhookId !== 'string') {
    throw new InvalidOptions(`inbox: expected the context of a delivery for "${name}", with its endpoint and webhookId, got ${show(context)}`)
  }
  ;(context as { [REMEMBER]?: (name: string, retention: number) => void })[REMEMBER]?.(name, retention)
  return [endpoint, tenant, webhookId, name]
}

/** To be called after each record. */
export function prune (pruning: Pruning, { log }: InboxContext): void {
  pruning.inserted(error => log?.warn({ err: error }, 'old records of the inbox could not be deleted'))
}
