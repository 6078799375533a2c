import { InProgress, MissingRoute } from '../errors.ts'
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

/** ms. The waits double from the first on, up to the longest, and add up to about five seconds. */
const FIRST_WAIT = 20
const LONGEST_WAIT = 2_560

/** The host of a runner: handles the jobs that come out of its queue. */
export class Queued implements RunnerHost {
  constructor (
    readonly works: Works,
    readonly claims: Claims,
    readonly handling: Handling,
    readonly failures: Failures
  ) {}

  process (job: Job, attempt?: number, record?: () => MaybePromise<void>): MaybePromise<void> {
    // A runner of the user's may fail here, and must not have a processed delivery fail.
    const onSuccess = record && (() => tryOr(record, error => this.report(error, job)))
    const { offered, received } = this.works
    // inline() handles the job while it is being offered it.
    const work = offered?.job === job ? offered : received.get(keyOf(job))
    switch (work?.state.at) {
      case 'claimed':
        work.attempt = attempt
        work.onSuccess = onSuccess
        // A dead delivery that was requeued, and is being sent again at the same time.
        if (job.finished !== undefined || job.remembered !== undefined) work.job = job
        return this.handling.start(work)
      case 'handling':
        return work.end
      case 'over':
        if (work.state.succeeded) return work.end
    }
    return this.#processQueued(job, attempt, onSuccess)
  }

  keep (job: Job): () => MaybePromise<void> {
    const key = keyOf(job)
    // Looked up each time: a work has the request of its sender, who may have been answered long since.
    const keep = (isKept: boolean): void => {
      const work = this.works.received.get(key)
      if (work?.job === job) work.isKept = isKept
    }
    keep(true)
    return () => {
      keep(false)
      const claim = this.works.takeKept(key)
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
    const remembered = this.handling.mayBeRemembered(job)
    return remembered === undefined ? job : { ...job, remembered }
  }

  async recorded (job: Job): Promise<{ done: boolean } & Required<Pick<Job, 'finished'>> & Pick<Job, 'remembered'>> {
    let finished: readonly string[] | undefined
    await this.#whenFree(job, undefined, async (_work, claim) => {
      finished = union(claim.finished, job.finished)
      await this.claims.release(claim)
    })
    if (finished === undefined) return { done: true, finished: [] }
    const { remembered } = this.interrupted(job)
    return { done: false, finished, ...(remembered !== undefined && { remembered }) }
  }

  async #processQueued (job: Job, attempt: number | undefined, onSuccess: (() => MaybePromise<void>) | undefined): Promise<void> {
    if (job.routeHandlers === true && !this.handling.hasRouteHandlers(job.endpoint)) throw new MissingRoute(job.endpoint)
    if (this.handling.lacks(job.endpoint)) this.failures.foreign(job)
    await this.#whenFree(job, attempt, async work => {
      work.onSuccess = onSuccess
      await this.handling.start(work)
    })
  }

  /** Calls `use` with the claim once nobody else has it; not at all where the job has been processed. */
  async #whenFree (job: Job, attempt: number | undefined, use: (work: Work, claim: Held) => Promise<void>): Promise<void> {
    const key = keyOf(job)
    // The process that received it releases its claim a moment after the runner has the job.
    for (let wait = FIRST_WAIT; this.works.queued.has(key) || !await this.#claim(key, job, attempt, use); wait *= 2) {
      if (wait > LONGEST_WAIT) throw new InProgress()
      await new Promise(resolve => setTimeout(resolve, wait))
    }
  }

  /** @returns false when somebody else has the claim */
  async #claim (key: string, job: Job, attempt: number | undefined, use: (work: Work, claim: Held) => Promise<void>): Promise<boolean> {
    const work = new Work(key, job, undefined)
    work.attempt = attempt
    this.works.queued.set(key, work)
    try {
      const kept = this.works.takeKept(key)
      const isLost = kept !== undefined && !this.claims.holds(kept)
      // Where it is on a resource too, that half of it may be held still.
      if (isLost) await this.claims.release(kept)
      const claim = kept !== undefined && !isLost ? kept : await this.claims.begin(key, job)
      if (claim.state === 'running') return false
      if (claim.state === 'claimed') {
        work.move({ at: 'claimed', claim })
        await use(work, claim)
      }
      return true
    } finally {
      this.works.forget(this.works.queued, work)
    }
  }
}
