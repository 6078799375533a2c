import type { FastifyBaseLogger, FastifyRequest } from 'fastify'
import { channels } from './channels.ts'
import { BY_A_HOOK, codeOf, statusOf } from './coded.ts'
import { InvalidEvent, InvalidSignature, UnknownTenant } from './errors.ts'
import { isSuccess } from './pipeline/refusal.ts'
import { causeOf, isHandlersFailure } from './runners/handler-failures.ts'
import { tryOr } from './maybe-promise.ts'
import { logError, logFields, write } from './log.ts'
import type { Described, RefusedDelivery } from './log.ts'
import type { Observation, Refusal } from './observation.ts'
import { RefusalLog } from './refusal-log.ts'
import type { FailureInfo, Registry } from './registry.ts'
import type { Attempts, DeadDelivery, Job } from './runners/runner.ts'

/** Maximum number of characters in a code, because a user's verifier may throw an error with any code. */
const MAX_CODE = 256
/** Endpoints that are warned of. */
const MAX_FOREIGN = 100

/** The only place where a failure is logged, published and reported to the `onError` handlers. */
export class Failures {
  readonly #refusals: RefusalLog
  readonly #foreign = new Set<string>()

  /** @param log for failures outside a request */
  constructor (readonly log: FastifyBaseLogger, readonly registry: Registry, readonly observation: Observation) {
    this.#refusals = new RefusalLog(log)
  }

  /**
   * Handles a delivery that is not answered 200. The log gets the cause of a 5xx, and of a refusal because a user's verifier, schema or
   * `tenant.of` has failed. All other refusals are logged without a cause.
   */
  refused (error: unknown, delivery: RefusedDelivery, request: FastifyRequest): void {
    const given = codeOf(error)
    // The error of a database or gRPC client in a hook of the app may have a number as its code.
    const code = typeof given === 'string' || typeof given === 'number' ? String(given).slice(0, MAX_CODE) : 'UNKNOWN'
    const refusal = { code, statusCode: statusOf(error), error }
    this.#log(refusal, delivery, request)
    this.#publish(refusal, delivery, request)
  }

  #log ({ code, statusCode, error }: Refusal, delivery: RefusedDelivery, { log }: FastifyRequest): void {
    const { cause, message } = error as Error
    if (cause === undefined) return this.#refusals.write(log, code, statusCode, delivery, message)
    // A verified delivery is logged each time, because no stranger can cause many of them.
    if (statusCode >= 500 && delivery.webhookId !== undefined) return logError(log, cause, { code, ...logFields(delivery) }, message)
    if (statusCode >= 500) return this.#refusals.failed(log, code, cause, delivery, message)
    if (error instanceof InvalidEvent) return this.#refusals.failed(log, code, cause, delivery, 'a schema failed, and the delivery was refused', 'SCHEMA_FAILED')
    if (error instanceof UnknownTenant) return this.#refusals.failed(log, code, cause, delivery, 'tenant.of failed, and the delivery was refused', 'TENANT_OF_FAILED')
    // A verifier may throw any other error to say that no signature matches.
    const isMistake = cause instanceof TypeError || cause instanceof ReferenceError
    if (error instanceof InvalidSignature && isMistake) return this.#refusals.failed(log, code, cause, delivery, 'the verifier failed, and the delivery was refused', 'VERIFIER_FAILED')
    this.#refusals.write(log, code, statusCode, delivery, message)
  }

  /** Handles a delivery whose route's own handler has not answered 2xx. @param statusCode of that answer */
  ownFailed (error: Error, delivery: RefusedDelivery, request: FastifyRequest, statusCode: number): void {
    const code = String(codeOf(error))
    logError(request.log, causeOf(error), { code, reason: `the route's handler answered ${statusCode}`, ...logFields(delivery) }, error.message)
    this.#publish({ code, statusCode, error }, delivery, request)
  }

  /** Publishes and reports a refusal. */
  #publish (refusal: Refusal, delivery: RefusedDelivery, request: FastifyRequest): void {
    const { endpoint, tenant, webhookId, event } = delivery
    if (channels.refused.hasSubscribers) channels.refused.publish({ ...refusal, endpoint, tenant, webhookId, event, request })
    this.observation.observer?.refused(refusal, delivery, request)
    this.report(refusal.error, delivery, request.log)
  }

  /** Handles a delivery that fails after its sender has been answered. */
  late (error: Error, delivery: RefusedDelivery, { log }: FastifyRequest): void {
    logError(log, causeOf(error), logFields(delivery), error.message)
    this.report(error, delivery, log)
  }

  /** Handles a delivery that a hook of the app has answered, so that its handlers do not run. After a 2xx OpenAI does not send it again. */
  answeredByHook (endpoint: string, request: FastifyRequest, statusCode: number): void {
    if (isSuccess(statusCode)) return this.#refusals.unprocessed(request.log, BY_A_HOOK, statusCode, endpoint)
    const delivery = request.openaiWebhook ?? { endpoint }
    const error = Object.assign(new Error(`a hook of the app has answered ${statusCode}, so the delivery was not processed`), { code: BY_A_HOOK, statusCode })
    this.#refusals.write(request.log, BY_A_HOOK, statusCode, delivery, error.message)
    this.#publish({ code: BY_A_HOOK, statusCode, error }, delivery, request)
  }

  /** Handles a failure that no sender is told about, such as that of a store after the handlers have run. */
  trouble (error: unknown, delivery: Described = {}, attempt?: number): void {
    logError(this.log, error, logFields(delivery, attempt), 'webhook trouble')
    const { endpoint, tenant, webhookId, event } = delivery
    if (channels.trouble.hasSubscribers) channels.trouble.publish({ error, endpoint, tenant, webhookId, event })
    this.report(error, delivery)
  }

  /**
   * Warns once of queued deliveries whose endpoint this process does not have. The app's handlers run for them, which is right after a route was
   * renamed, and wrong if another service or another registration shares the queue.
   */
  foreign ({ endpoint }: Job): void {
    if (this.#foreign.has(endpoint) || this.#foreign.size === MAX_FOREIGN) return
    this.#foreign.add(endpoint)
    write(this.log, 'warn', { endpoint }, 'the queue has deliveries of an endpoint that this process does not have, and the handlers of the app run for them')
  }

  /** Handles trouble that a runner reports, or a job whose handlers failed after the delivery was acknowledged. */
  ofRunner (error: unknown, job?: Job, attempts?: Attempts): void {
    if (job === undefined || !isHandlersFailure(error)) return this.trouble(error, job, attempts?.attempt)
    const fate = attempts === undefined ? '' : ' and will be attempted again'
    logError(this.log, causeOf(error), { ...logFields(job, attempts?.attempt), attempts: attempts?.attempts }, `webhook delivery failed${fate}`)
    this.report(error, job)
  }

  /** Handles a delivery whose attempts are used up. */
  dead (delivery: DeadDelivery, error: unknown): void {
    logError(this.log, causeOf(error), logFields(delivery, delivery.attempts), 'webhook delivery is dead')
    if (channels.dead.hasSubscribers) channels.dead.publish(delivery)
    this.observation.observer?.dead(delivery)
    this.report(error, delivery)
    for (const handler of this.registry.deadHandlers) tryOr(() => handler(delivery), thrown => logError(this.log, thrown, logFields(delivery), 'an onDead handler failed'))
  }

  /** Reports to the `onError` handlers only. What they throw does not fail the delivery. */
  report (error: unknown, delivery: Described, log = this.log): void {
    for (const handler of this.registry.errorHandlers) tryOr(() => handler(error as Error, infoOf(delivery)), thrown => logError(log, thrown, {}, 'an onError handler failed'))
  }

  /** Logs now how many refusals were counted but not logged. */
  flush (): void {
    this.#refusals.flush()
  }
}

function infoOf ({ endpoint, tenant, webhookId, event }: Described): FailureInfo {
  return {
    ...(endpoint !== undefined && { endpoint }),
    ...(tenant !== undefined && { tenant }),
    ...(webhookId !== undefined && { webhookId }),
    ...(event !== undefined && { event })
  }
}
