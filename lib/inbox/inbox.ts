import type { FastifyInstance } from 'fastify'
import { InvalidOptions } from '../errors.ts'
import type { EventContext, EventHandler } from '../handlers.ts'
import type { MaybePromise } from '../maybe-promise.ts'

/** Names the delivery: an event handler's context, or `request.openaiWebhook` on a marked route. */
export interface InboxContext {
  readonly webhookId: string
  readonly endpoint: string
  readonly tenant?: string | undefined
  /** Gets a line when old records could not be deleted. */
  readonly log?: { warn (fields: object, message: string): void } | undefined
}

/**
 * Runs a statement in the caller's own transaction. Its parameters, `$1` to `$n` in PostgreSQL and `?` in SQLite, come once
 * each and in order; `values` are strings. Answers the rows, as objects, or an object that has them as `rows`.
 */
export type InboxQuery<Answer = unknown> = (text: string, values: string[]) => Answer

/** @param tx works until this returns, or what it returns settles; `event` is what `on` says. */
export type InboxWork<Tx, Event> = (this: FastifyInstance, tx: Tx, event: Event, context: EventContext) => unknown

/**
 * Makes effects in a database happen once: the effect and the record that its handler has run commit together. A record is
 * (endpoint, tenant, webhook-id, handler name).
 *
 * - Of any number of callers with the same record, in any number of processes, one commits; the others do nothing.
 * - Work that fails rolls back its writes and its record, so that the next attempt runs it anew.
 * - It needs neither the idempotency store nor the runner, and holds over a crash at any instant.
 * - A rollback does not undo effects outside the transaction, such as a call to another service.
 */
export interface Inbox<Tx> {
  /** Makes an event handler that has `name` wherever it is registered; `work` writes by `tx`. */
  once<Event> (name: string, work: InboxWork<Tx, Event>): EventHandler<Event>
  /** In a transaction of the caller's own. @returns whether the caller is the one to make the effect */
  first (query: InboxQuery, name: string, context: InboxContext): MaybePromise<boolean>
  /** Ends what runs in the background, which is deleting old records. */
  close? (): Promise<void>
}

/** ms for which a record is kept, unless told otherwise: 30 days. */
export const INBOX_RETENTION = 30 * 24 * 3_600_000

/**
 * A method on a handler's context. It hears for how many ms an inbox keeps a record of the handler. The symbol is shared by
 * all copies of the package in a process.
 */
export const REMEMBER = Symbol.for('fastify-openai-webhook.inboxKeeps')

let shortest: number | undefined

/** Called when an inbox is made. */
export function noteRetention (retention: number): void {
  shortest = Math.min(shortest ?? retention, retention)
}

/** The shortest retention of this process's inboxes, in ms; `undefined` where there is none. */
export function shortestRetention (): number | undefined {
  return shortest
}

/** In the order of the columns. @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS */
export function recordOf (name: string, context: InboxContext, retention: number): [string, string, string, string] {
  const { endpoint, tenant = '', webhookId } = context
  if (typeof endpoint !== 'string' || typeof webhookId !== 'string') {
    throw new InvalidOptions(`inbox: expected the context of a delivery for "${name}", with its endpoint and webhookId`)
  }
  ;(context as { [REMEMBER]?: (name: string, retention: number) => void })[REMEMBER]?.(name, retention)
  return [endpoint, tenant, webhookId, name]
}
