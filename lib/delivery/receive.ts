import { channels, deliveryInfoOf, trace } from '../channels.ts'
import type { EnqueueMessage } from '../channels.ts'
import { isCoded } from '../coded.ts'
import { InProgress, Overloaded, Unavailable } from '../errors.ts'
import type { Begun, Claims, Held } from '../pipeline/deduplicate.ts'
import type { Observation } from '../observation.ts'
import { keyOf } from '../runners/runner.ts'
import type { Job, Runner } from '../runners/runner.ts'
import { after, then } from '../maybe-promise.ts'
import type { MaybePromise } from '../maybe-promise.ts'
import type { Handling } from './handling.ts'
import { observeDuplicate } from './observe.ts'
import { Work } from './work.ts'
import type { Sender, Verdict, Works } from './work.ts'

/** What `run` of a runner resolves to. */
type Accepted = void | 'duplicate'

const PROCESSED: Verdict = { outcome: 'processed' }
const DUPLICATE: Verdict = { outcome: 'duplicate' }

/**
 * Takes a verified delivery through deduplicate → dispatch → acknowledge. The handlers of a delivery run once, however often it is sent, and
 * each sender is told one verdict.
 */
export class Receiver {
  constructor (
    readonly works: Works,
    readonly claims: Claims,
    readonly handling: Handling,
    readonly runner: Runner,
    readonly observation: Observation
  ) {}

  /** @returns the delivery whose verdict the sender gets; `undefined` if the sender has been told a verdict at once and joins no delivery */
  receive (sender: Sender): Work | undefined {
    const delivery = sender.request.openaiWebhook
    const key = keyOf(delivery)
    const known = this.works.find(key)
    if (known !== undefined) return this.#join(known, sender)
    if (this.works.closing) return this.#refuse(sender, new Overloaded())

    const { webhookId, timestamp, endpoint, tenant, event } = delivery
    const { hasRouteHandlers } = this.handling.registry.handlersOf(endpoint)
    const job: Job = { webhookId, timestamp, endpoint, event, ...(tenant !== undefined && { tenant }), ...(hasRouteHandlers && { routeHandlers: true }) }
    const work = new Work(key, job, sender)
    this.works.received.set(key, work)
    after(() => this.claims.begin(key, job), begun => this.#begun(work, begun), error => { this.#over(work, refused(error)) })
    return work
  }

  #begun (work: Work, claim: Begun): MaybePromise<void> {
    this.observation.observer?.deduplicated(work.sender!.request)
    if (claim.state === 'done') return this.#duplicate(work, 'processed')
    if (claim.state === 'running') return this.#duplicate(work, this.works.isQueued(work.key) ? 'joined' : 'elsewhere')
    work.move({ at: 'claimed', claim })
    return after<Accepted, void>(
      // A route's own handler replies after the event handlers have succeeded, so all of them run in the request, whatever the runner.
      () => work.sender!.ownHandler === undefined ? this.#enqueue(work) : this.handling.start(work, claim),
      accepted => this.#answered(work, accepted === 'duplicate' ? DUPLICATE : PROCESSED),
      error => this.#answered(work, refused(isCoded(error) ? error : new Unavailable({ cause: error })))
    )
  }

  /**
   * Called when the runner has answered, or the handlers have ended. Handlers that were started settle the claim. If none were started, the
   * runner has queued or refused the job.
   */
  #answered (work: Work, verdict: Verdict): MaybePromise<void> {
    const { state } = work
    return then(state.at === 'claimed' ? this.#releaseOrKeep(work, state.claim, verdict) : undefined, () => {
      if (verdict.outcome === 'duplicate') observeDuplicate(work.sender!, 'queued', this.observation)
      this.#tell(work, verdict)
    })
  }

  /** Releases the claim, so that any process can take the job from the queue, or keeps the claim if the runner has asked for that. */
  #releaseOrKeep (work: Work, claim: Held, verdict: Verdict): MaybePromise<void> {
    // Moved before the release is awaited, because an attempt that takes the job from the queue meanwhile must not use this claim.
    work.move({ at: 'over', succeeded: false })
    if (verdict.outcome === 'processed') this.observation.observer?.queued(work.job, work.sender!.request)
    if (work.keepsClaim && verdict.outcome === 'processed') this.works.keptClaims.set(work.key, claim)
    else return this.claims.release(claim)
  }

  #enqueue (work: Work): MaybePromise<Accepted> {
    // A runner without a queue runs the handlers now, so there is no queueing to trace.
    if (this.runner.depth === undefined || !channels.enqueue.hasSubscribers) return this.runner.run(work.job)
    const message: EnqueueMessage = { ...deliveryInfoOf(work.job), request: work.sender!.request, carrier: {} }
    return trace(channels.enqueue, message, () => {
      if (Object.keys(message.carrier).length > 0) work.job = { ...work.job, carrier: message.carrier }
      return then(this.runner.run(work.job), accepted => {
        message.duplicate = accepted === 'duplicate'
        return accepted
      })
    })
  }

  /** Joins a delivery that this process already has: the sender gets the verdict of the first one. */
  #join (work: Work, sender: Sender): Work | undefined {
    const waits = work.verdict === undefined && !work.isFromQueue
    if (waits && work.isCrowded) return this.#refuse(sender, new Overloaded())
    observeDuplicate(sender, 'joined', this.observation)
    if (!waits) {
      sender.tell(work.verdict ?? DUPLICATE)
      return
    }
    work.join(sender)
    return work
  }

  #duplicate (work: Work, state: 'processed' | 'joined' | 'elsewhere'): void {
    observeDuplicate(work.sender!, state, this.observation)
    this.#over(work, state === 'elsewhere' ? refused(new InProgress()) : DUPLICATE)
  }

  #refuse (sender: Sender, error: Error): undefined {
    sender.tell(refused(error))
  }

  #over (work: Work, verdict: Verdict): void {
    work.move({ at: 'over', succeeded: false })
    this.#tell(work, verdict)
  }

  #tell (work: Work, verdict: Verdict): void {
    work.verdict = verdict
    // A runner may accept a delivery while the handlers still run. The work is then kept until they end.
    if (work.canBeForgotten) this.works.forget(work)
    work.tell(verdict)
  }
}

function refused (error: unknown): Verdict {
  return { outcome: 'refused', error: error as Error }
}
