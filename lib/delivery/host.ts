import { setTimeout as sleep } from 'node:timers/promises'
import { InProgress, MissingRoute, Overloaded } from '../errors.ts'
import { shortestRetention } from '../inbox/inbox.ts'
import type { Failures } from '../failures.ts'
import { union } from '../pipeline/deduplicate.ts'
import type { Claims, Held } from '../pipeline/deduplicate.ts'
import { keyOf } from '../runners/runner.ts'
import type { Attempts, DeadDelivery, Job, RunnerHost } from '../runners/runner.ts'
import { tryOr } from '../maybe-promise.ts'
import type { MaybePromise } from '../maybe-promise.ts'
import type { Handling } from './handling.ts'
import { Work } from './work.ts'
import type { Works } from './work.ts'

/** ms. Each wait is twice as long as the one before, up to the longest. Together they take about 5 s. */
const FIRST_WAIT = 20
const LONGEST_WAIT = 2_560

/** What is done with the claim on a job. */
type Use = (work: Work, claim: Held) => Promise<void>

/** The host of a runner: runs the handlers of the jobs in its queue, and takes its reports. */
export class Host implements RunnerHost {
  constructor (
    readonly works: Works,
    readonly claims: Claims,
    readonly handling: Handling,
    readonly failures: Failures
  ) {}

  process (job: Job, attempt?: number, record?: () => MaybePromise<void>): MaybePromise<void> {
    // A user's runner may throw here, which must not make a processed delivery fail.
    const onSuccess = record && (() => tryOr(record, error => this.report(error, job)))
    const work = this.works.received.get(keyOf(job))
    switch (work?.state.at) {
      case 'claimed':
        work.attempt = attempt
        work.onSuccess = onSuccess
        // A dead delivery was requeued, and its sender sends it again at the same time. Only the requeued job has the results of earlier
        // attempts.
        if (job.finished !== undefined || job.remembered !== undefined) work.job = job
        return this.handling.start(work, work.state.claim)
      case 'handling':
        return work.end
      case 'over':
        if (work.state.succeeded) return work.end
    }
    return this.#processQueued(job, attempt, onSuccess)
  }

  keep (job: Job): () => MaybePromise<void> {
    const key = keyOf(job)
    // Looks the work up each time, because a work holds its sender's request, and the sender may have been answered long ago.
    const mark = (keepsClaim: boolean): void => {
      const work = this.works.received.get(key)
      if (work?.job === job) work.keepsClaim = keepsClaim
    }
    mark(true)
    return () => {
      mark(false)
      const claim = this.works.takeKeptClaim(key)
      return claim && this.claims.release(claim)
    }
  }

  report (error: unknown, job?: Job, attempts?: Attempts): void {
    this.failures.ofRunner(error, job, attempts)
  }

  dead (delivery: DeadDelivery, error: unknown): void {
    this.failures.dead(delivery, error)
  }

  interrupted (job: Job): Job {
    // Any handler may have used any inbox, so the shortest retention counts.
    const retention = shortestRetention()
    if (retention === undefined) return job
    const { endpoint, event, timestamp, remembered } = job
    const handlers = this.handling.registry.handlersOf(endpoint).for(event.type)
    return { ...job, remembered: { ...Object.fromEntries(handlers.map(({ name }) => [name, timestamp * 1_000 + retention])), ...remembered } }
  }

  async recorded (job: Job): Promise<{ done: boolean } & Required<Pick<Job, 'finished'>> & Pick<Job, 'remembered'>> {
    let finished: readonly string[] | undefined
    await this.#whenFree(job, async (_work, claim) => { finished = union(claim.finished, job.finished) })
    if (finished === undefined) return { done: true, finished: [] }
    const { remembered } = this.interrupted(job)
    return { done: false, finished, ...(remembered !== undefined && { remembered }) }
  }

  async #processQueued (job: Job, attempt: number | undefined, onSuccess: (() => MaybePromise<void>) | undefined): Promise<void> {
    if (job.routeHandlers === true && !this.handling.registry.handlersOf(job.endpoint).hasRouteHandlers) throw new MissingRoute(job.endpoint)
    if (this.handling.registry.lacks(job.endpoint)) this.failures.foreign(job)
    await this.#whenFree(job, async (work, claim) => {
      work.attempt = attempt
      work.onSuccess = onSuccess
      await this.handling.start(work, claim)
    })
  }

  /**
   * Calls `use` with the claim once no other caller holds it, and releases the claim if `use` starts no handlers. Does not call `use` if the job
   * has been processed.
   *
   * @throws FST_OPENAI_WEBHOOK_IN_PROGRESS if another caller still holds the claim after the last wait, FST_OPENAI_WEBHOOK_OVERLOADED if
   * `closeTimeout` is over
   */
  async #whenFree (job: Job, use: Use): Promise<void> {
    const key = keyOf(job)
    // Tries again, because the process that received the delivery releases its claim a moment after the runner has the job.
    for (let wait = FIRST_WAIT; this.works.queued.has(key) || !await this.#claim(key, job, use); wait *= 2) {
      if (wait > LONGEST_WAIT) throw new InProgress()
      await sleep(wait, undefined, { signal: this.handling.signal }).catch(() => {})
      // The app is about to close what the store needs.
      if (this.handling.signal.aborted) throw new Overloaded()
    }
  }

  /** @returns false if another caller has the claim */
  async #claim (key: string, job: Job, use: Use): Promise<boolean> {
    const work = new Work(key, job, undefined)
    this.works.queued.set(key, work)
    try {
      const kept = this.works.takeKeptClaim(key)
      const isLost = kept !== undefined && !this.claims.holds(kept)
      // If the claim includes a claim on a resource, one of the two may still be held.
      if (isLost) await this.claims.release(kept)
      const claim = kept !== undefined && !isLost ? kept : await this.claims.begin(key, job)
      if (claim.state === 'running') return false
      if (claim.state === 'claimed') {
        work.move({ at: 'claimed', claim })
        await use(work, claim)
      }
      return true
    } finally {
      if (work.state.at === 'claimed') await this.claims.release(work.state.claim)
      this.works.forget(work)
    }
  }
}
