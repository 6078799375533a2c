import { BOOLEAN, assertRules, wholeNumber } from './checks.ts'
import type { Rule } from './checks.ts'
import { InvalidOptions, NoDeadLetters } from './errors.ts'
import type { DeadDelivery, DeliveryRef, RequeueOptions, Runner } from './runners/runner.ts'

export interface DeadLettersOptions {
  /**
   * Maximum number of deliveries.
   *
   * @default 100
   */
  limit?: number
  /** Lists only deliveries of one event type, such as `batch.completed`. */
  type?: string
}

/**
 * The deliveries whose attempts are used up, for a person to look at.
 *
 * Each method rejects with FST_OPENAI_WEBHOOK_NO_DEAD_LETTERS if the runner keeps none, with FST_OPENAI_WEBHOOK_INVALID_OPTIONS for invalid
 * arguments, and with the queue's own error if the queue cannot be reached.
 */
export interface DeadLetters {
  /** Lists the dead deliveries, the oldest first. */
  list (options?: DeadLettersOptions): Promise<DeadDelivery[]>
  /** The number of dead deliveries. */
  count (): Promise<number>
  /**
   * Queues a dead delivery again, with as many attempts as a new one. Handlers that have succeeded do not run again. Unless `force` is set,
   * rejects with FST_OPENAI_WEBHOOK_NEEDS_FORCE if an effect could happen twice.
   *
   * @returns false if the delivery is not among the dead: it never was, it was requeued already, or it was removed
   */
  requeue (delivery: DeliveryRef, options?: RequeueOptions): Promise<boolean>
}

const TYPE: Rule = { expected: 'an event type, such as "batch.completed"', accepts: value => typeof value === 'string' }

export function deadLettersOf (runner: Runner): DeadLetters {
  return {
    async list (options = {}) {
      if (runner.dead === undefined) throw new NoDeadLetters()
      assertRules('deadLetters.list()', options, { limit: wholeNumber('deliveries', 1), type: TYPE })
      const { limit = 100, type } = options
      return await runner.dead(limit, type)
    },
    async count () {
      if (runner.deadCount === undefined) throw new NoDeadLetters()
      return await runner.deadCount()
    },
    async requeue (delivery, options = {}) {
      if (runner.requeue === undefined) throw new NoDeadLetters()
      assertRules('deadLetters.requeue()', options, { force: BOOLEAN })
      const { force = false } = options
      const { endpoint, webhookId, tenant } = (delivery ?? {}) as Partial<DeliveryRef>
      if (typeof endpoint !== 'string' || typeof webhookId !== 'string') {
        throw new InvalidOptions('deadLetters.requeue(): expected { endpoint, webhookId }, such as a delivery of list()')
      }
      return await runner.requeue({ endpoint, webhookId, ...(tenant !== undefined && { tenant }) }, { force })
    }
  }
}
