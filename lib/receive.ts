import { AsyncResource } from 'node:async_hooks'
import type { IncomingHttpHeaders } from 'node:http'
import type { FastifyBaseLogger } from 'fastify'
import { channels, trace } from './channels.ts'
import type { EnqueueMessage } from './channels.ts'
import { DeadlineExceeded, HandlerFailed, InProgress, MissingRoute, Overloaded, Unavailable } from './errors.ts'
import { handlersFailed } from './failure.ts'
import type { HandlerFailure } from './failure.ts'
import { isPromise, then } from './maybe-promise.ts'
import { isObserved, observeDelivery, observeDuplicate } from './observe.ts'
import type { Claims } from './pipeline/deduplicate.ts'
import { dispatch } from './pipeline/dispatch.ts'
import type { Handler, Progress } from './pipeline/dispatch.ts'
import { validate } from './pipeline/validate.ts'
import type { ParseJson, Validators } from './pipeline/validate.ts'
import { verify } from './pipeline/verify.ts'
import type { Verification } from './pipeline/verify.ts'
import type { Verified } from './verifiers/verifier.ts'
import type { HandlerTable } from './registry.ts'
import { Context, Run } from './run.ts'
import type { Answer, Outcome, Sender } from './run.ts'
import { keyOf } from './runners/runner.ts'
import type { Attempts, DeadDelivery, Job, Runner, RunnerHost } from './runners/runner.ts'
import type { Claim, MaybePromise } from './stores/store.ts'
import type { Delivery, WebhookEvent } from './types.ts'

export interface ReceiverOptions {
  parse: ParseJson
  validators: Validators
  claims: Claims
  runner: Runner
  log: FastifyBaseLogger
  signal: AbortSignal
  /** The handlers of a job's endpoint; of the app alone where this process does not have that route. */
  handlersOf: (endpoint: string) => HandlerTable
  report: RunnerHost['report']
  dead: NonNullable<RunnerHost['dead']>
}

/** Which secret matched: for the channels, and nobody else. */
export const SECRET_INDEX = Symbol('openai-webhook.secretIndex')

export type Authentic = Delivery & { readonly [SECRET_INDEX]: number | undefined }

/** The story: capture (the route's parser) → verify → validate → deduplicate → dispatch → acknowledge (its handler). */
export class Receiver implements RunnerHost {
  readonly #options: ReceiverOptions
  readonly #received = new Map<string, Run>()
  readonly #queued = new Map<string, Run>()
  #accepting: Run | undefined
  #onIdle: (() => void) | undefined
  closing = false

  constructor (options: ReceiverOptions) {
    this.#options = options
    options.claims.renewing([this.#received, this.#queued])
  }

  /** verify → validate: the captured bytes become an event that can be trusted. */
  authenticate (endpoint: Verification, headers: IncomingHttpHeaders, rawBody: Buffer): MaybePromise<Authentic | Error> {
    const verified = verify(endpoint, { rawBody, headers })
    return then(verified, verified => this.#authentic(verified, rawBody))
  }

  #authentic (verified: Verified | Error, rawBody: Buffer): Authentic | Error {
    if (verified instanceof Error) return verified
    const { webhookId, timestamp, keyIndex } = verified
    const { parse, validators } = this.#options
    const event = validate(rawBody, parse, validators)
    if (event instanceof Error) return event
    return { webhookId, timestamp, rawBody, event: event as WebhookEvent, [SECRET_INDEX]: keyIndex }
  }

  /** deduplicate → dispatch: the event is handled once, however often it is delivered, and the sender told. */
  receive (endpoint: string, { webhookId, timestamp, event }: Delivery, sender: Sender): void {
    const key = keyOf({ endpoint, webhookId })
    const running = this.#received.get(key) ?? (this.#queued.size > 0 ? this.#queued.get(key) : undefined)
    if (running !== undefined) return this.#join(running, sender)
    if (this.closing) return sender.failed(new Overloaded())

    const run = new Run(key, { webhookId, timestamp, endpoint, event }, sender)
    this.#received.set(key, run)
    let claim
    try {
      claim = this.#options.claims.begin(key)
    } catch (error) {
      return this.#answer(run, error)
    }
    if (isPromise<Claim>(claim)) claim.then(claim => this.#begun(run, claim), error => this.#answer(run, error))
    else this.#begun(run, claim)
  }

  /** RunnerHost: runs the handlers of a job that a runner holds. */
  process (job: Job, attempt?: number): MaybePromise<void> {
    // inline() comes back while its job is being accepted: no look-up.
    const run = this.#accepting?.job === job ? this.#accepting : this.#received.get(keyOf(job))
    if (run?.started === true) return run.failed ? this.#processQueued(job, attempt) : run.processed
    if (run?.claim !== undefined) {
      run.attempt = attempt
      // One that was dead, requeued, and is being delivered again.
      if (job.finished !== undefined) run.job = job
      return this.#process(run, run.claim.finished)
    }
    return this.#processQueued(job, attempt)
  }

  /** RunnerHost */
  report (error: unknown, job?: Job, attempts?: Attempts): void {
    this.#options.report(error, job, attempts)
  }

  /** RunnerHost */
  dead (delivery: DeadDelivery, error: unknown): void {
    this.#options.dead(delivery, error)
  }

  /** RunnerHost: claims the job for as long as it takes to see what finished of it. */
  async recorded (job: Job): Promise<{ done: boolean, finished: readonly string[] }> {
    let finished: readonly string[] | undefined
    await this.#whenFree(job, undefined, async (run, claim) => {
      finished = union(claim.finished, job.finished)
      await this.#options.claims.release(run)
    })
    return { done: finished === undefined, finished: finished ?? NONE }
  }

  /** What the sender is told when a delivery is not done by its deadline. */
  lateness (endpoint: string, { webhookId }: Delivery): Error {
    const run = this.#received.get(keyOf({ endpoint, webhookId }))
    return run?.begun === false ? new Unavailable() : new DeadlineExceeded()
  }

  /** Resolves when nothing is running here. */
  async drained (): Promise<void> {
    if (this.#received.size + this.#queued.size > 0) await new Promise<void>(resolve => { this.#onIdle = resolve })
  }

  /** A second delivery of a webhook-id that is running here gets the answer of the first. */
  #join (run: Run, sender: Sender): void {
    const isWaiting = run.answer === undefined && run.sender !== undefined
    if (isWaiting && run.joined !== undefined && run.joined.size >= MAX_JOINED) return sender.failed(new Overloaded())
    observeDuplicate(run.job, sender, 'joined')
    if (!isWaiting) return tell(sender, run.answer ?? QUEUED)
    const joined = (run.joined ??= new Set())
    // Answered in the async context of its own request, not of the one that it joins.
    const answered = AsyncResource.bind((answer: Answer) => tell(sender, answer))
    joined.add(answered)
    // The run may outlast its deadline by hours: nothing of its request is kept for that.
    sender.leave = () => { joined.delete(answered) }
  }

  #begun (run: Run, claim: Claim): void {
    run.begun = true
    if (claim.state === 'claimed') {
      run.claim = claim
      this.#accept(run, claim.finished)
    } else if (claim.state === 'done') {
      observeDuplicate(run.job, run.sender!, 'processed')
      this.#answer(run, undefined, 'duplicate')
    } else {
      const isQueued = this.#queued.has(run.key)
      observeDuplicate(run.job, run.sender!, isQueued ? 'joined' : 'elsewhere')
      if (isQueued) this.#answer(run, undefined, 'duplicate')
      else this.#answer(run, new InProgress())
    }
  }

  #accept (run: Run, finished: readonly string[]): void {
    let accepted
    let pending
    try {
      // The route's own handler replies once the others have succeeded: they run here, whatever the runner.
      accepted = run.sender!.respond !== undefined ? this.#process(run, finished) : this.#enqueue(run)
      pending = isPromise<Accepted>(accepted) // reads its `then`, which may be a getter
    } catch (error) {
      return this.#refused(run, error)
    }
    if (pending) Promise.resolve(accepted).then(accepted => this.#accepted(run, accepted), error => this.#refused(run, error))
    else this.#accepted(run, accepted as Accepted)
  }

  #enqueue (run: Run): MaybePromise<Accepted> {
    if (this.#options.handlersOf(run.job.endpoint).hasRouteHandlers) {
      const { webhookId, timestamp, endpoint, event } = run.job // by name: to spread it costs 4 µs
      run.job = { webhookId, timestamp, endpoint, event, routeHandlers: true }
    }
    // A runner without a queue runs the handlers now.
    if (this.#options.runner.depth === undefined || !channels.enqueue.hasSubscribers) return this.#hand(run, run.job)
    const { webhookId, timestamp, endpoint, event } = run.job
    const message: EnqueueMessage = { webhookId, timestamp, endpoint, event, request: run.sender!.request, carrier: {} }
    return trace(channels.enqueue, message, () => {
      if (Object.keys(message.carrier).length > 0) run.job = { ...run.job, carrier: message.carrier }
      return then(this.#hand(run, run.job), accepted => {
        message.duplicate = accepted === 'duplicate'
        return accepted
      })
    })
  }

  #hand (run: Run, job: Job): MaybePromise<Accepted> {
    this.#accepting = run
    try {
      return this.#options.runner.run(job)
    } finally {
      this.#accepting = undefined
    }
  }

  #accepted (run: Run, accepted: Accepted): void {
    // Handlers that were started settle the claim themselves.
    if (run.started) return this.#answer(run, undefined)
    then(this.#letGo(run), () => {
      if (accepted !== 'duplicate') return this.#answer(run, undefined)
      observeDuplicate(run.job, run.sender!, 'queued')
      this.#answer(run, undefined, 'duplicate')
    })
  }

  #refused (run: Run, error: unknown): void {
    const answer = isCoded(error) ? error : new Unavailable({ cause: error })
    if (run.started) this.#answer(run, answer)
    else then(this.#letGo(run), () => this.#answer(run, answer))
  }

  /** A queue has the job: the claim is left to whoever processes it. */
  #letGo (run: Run): MaybePromise<void> {
    const released = this.#options.claims.release(run)
    run.claim = undefined
    return released
  }

  /** Runs the handlers that have not succeeded, and keeps their end for whoever asks for it again. */
  #process (run: Run, recorded: readonly string[]): MaybePromise<void> {
    run.started = true
    const { log } = this.#options
    const all = this.#handlers(run)
    const finished = union(recorded, run.job.finished)
    run.finished = finished
    const handlers = finished.length === 0 ? all : all.filter(({ name }) => !finished.includes(name))
    if (channels.unhandled.hasSubscribers) this.#tellUnhandled(run)
    run.processed = isObserved(run, log)
      ? observeDelivery(run, handlers, log, observed => this.#handle(run, observed))
      : this.#handle(run, handlers)
    return run.processed
  }

  #handle (run: Run, handlers: readonly Handler[]): MaybePromise<void> {
    const { log, signal } = this.#options
    return dispatch(handlers, run.job.event, new Context(run, log, signal), this.#progress, run)
  }

  readonly #progress: Progress<Run> = {
    // The last success is recorded by completing the delivery, unless the route's own handler comes after it.
    succeeded: (run, { name }, last) => last && run.sender?.respond === undefined ? undefined : this.#options.claims.checkpoint(run, name),
    ended: (run, failures) => {
      const { claims } = this.#options
      if (failures.length > 0) return then(claims.release(run), () => this.#ended(run, this.#failed(run, failures)))
      if (run.sender?.respond !== undefined) return this.#respond(run)
      const recorded = claims.complete(run)
      return isPromise<void>(recorded) ? recorded.then(() => this.#ended(run)) : this.#ended(run)
    }
  }

  /** All of them have ended: those that have not failed are finished. */
  #failed (run: Run, failures: readonly HandlerFailure[]): Error {
    const handlers = this.#handlers(run)
    const succeeded = handlers.map(({ name }) => name).filter(name => !failures.some(({ handler }) => handler === name))
    return handlersFailed(failures, handlers.length, union(run.finished, succeeded))
  }

  #respond (run: Run): Promise<void> {
    const { claims } = this.#options
    return new Promise((resolve, reject) => {
      run.sender!.respond!((succeeded, error) => then(succeeded ? claims.complete(run) : claims.release(run), () => {
        try {
          this.#ended(run, succeeded ? undefined : error === undefined ? new HandlerFailed() : handlersFailed([{ handler: OWN_HANDLER, error }], 1, NONE))
          resolve()
        } catch (failed) {
          reject(failed)
        }
      }))
    })
  }

  /** Their end is on record. */
  #ended (run: Run, error?: Error): void {
    run.ended = true
    run.failed = error !== undefined
    if (run.answer !== undefined) this.#forget(this.#received, run)
    if (error !== undefined) throw error
  }

  #answer (run: Run, error: unknown, outcome: Outcome = 'processed'): void {
    run.answer = { error, outcome }
    // A runner may acknowledge while the handlers still run: the run lasts as long as they do.
    if (!run.started || run.ended) this.#forget(this.#received, run)
    tell(run.sender!, run.answer)
    const { answer, joined } = run
    if (joined === undefined) return
    // It may go on after this answer: nothing of their requests is kept for that.
    run.joined = undefined
    for (const answered of joined) answered(answer)
  }

  #forget (runs: Map<string, Run>, { key }: Run): void {
    runs.delete(key)
    if (this.#onIdle !== undefined && this.#received.size + this.#queued.size === 0) this.#onIdle()
  }

  #handlers ({ job }: Run): readonly Handler[] {
    return this.#options.handlersOf(job.endpoint).for(job.event.type)
  }

  #tellUnhandled ({ job, sender }: Run): void {
    const isHandled = sender?.respond !== undefined || this.#options.handlersOf(job.endpoint).matches(job.event.type)
    if (!isHandled) channels.unhandled.publish(job)
  }

  async #processQueued (job: Job, attempt: number | undefined): Promise<void> {
    if (job.routeHandlers === true && !this.#options.handlersOf(job.endpoint).hasRouteHandlers) throw new MissingRoute(job.endpoint)
    await this.#whenFree(job, attempt, async (run, claim) => await this.#process(run, claim.finished))
  }

  /** Does its work with the claim, unless the job has been processed. */
  async #whenFree (job: Job, attempt: number | undefined, work: Work): Promise<void> {
    const key = keyOf(job)
    // Whoever received it, here or in another process, may have yet to let go of it.
    for (let wait = FIRST_WAIT; this.#queued.has(key) || !await this.#attempt(key, job, attempt, work); wait *= 2) {
      if (wait > LONGEST_WAIT) throw new InProgress()
      await new Promise(resolve => setTimeout(resolve, wait))
    }
  }

  /** @returns false when somebody else has the claim */
  async #attempt (key: string, job: Job, attempt: number | undefined, work: Work): Promise<boolean> {
    const run = new Run(key, job, undefined)
    run.attempt = attempt
    this.#queued.set(key, run)
    try {
      const claim = await this.#options.claims.begin(key)
      if (claim.state === 'running') return false
      if (claim.state === 'claimed') {
        run.claim = claim
        await work(run, claim)
      }
      return true
    } finally {
      this.#forget(this.#queued, run)
    }
  }
}

/** Others that may wait for the answer of one delivery, each with its request. OpenAI sends one at a time. */
const MAX_JOINED = 100

type Work = (run: Run, claim: Extract<Claim, { state: 'claimed' }>) => Promise<void>

/** What a runner says to a job that it was given. */
type Accepted = void | 'duplicate'

/** ms; the waits between them add up to about five seconds. */
const FIRST_WAIT = 20
const LONGEST_WAIT = 5_000

/** What the sender of a job that a queue holds is told. */
const QUEUED: Answer = { error: undefined, outcome: 'duplicate' }

const NONE: readonly string[] = []

/** The route's own handler, which replies, where handlers are named. */
const OWN_HANDLER = 'handler'

function union (names: readonly string[], others: readonly string[] = NONE): readonly string[] {
  return others.length === 0 ? names : [...new Set([...names, ...others])]
}

function tell (sender: Sender, { error, outcome }: Answer): void {
  if (error === undefined) sender.succeeded(outcome)
  else sender.failed(error)
}

function isCoded (error: unknown): boolean {
  try {
    const { code } = error as { code?: unknown }
    // Fastify would send any other object as a body, with the status 200.
    return error instanceof Error && typeof code === 'string' && code.startsWith('FST_OPENAI_WEBHOOK_')
  } catch {
    return false // null, or a getter that throws
  }
}
