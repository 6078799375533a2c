import type { IncomingHttpHeaders } from 'node:http'
import type { FastifyBaseLogger } from 'fastify'
import { DeadlineExceeded, HandlerFailed, InProgress, Overloaded, Unavailable } from './errors.ts'
import { isPromise, then } from './maybe-promise.ts'
import type { Claims } from './pipeline/deduplicate.ts'
import { dispatch } from './pipeline/dispatch.ts'
import type { Handler } from './pipeline/dispatch.ts'
import { validate } from './pipeline/validate.ts'
import type { ParseJson, Validators } from './pipeline/validate.ts'
import { verify } from './pipeline/verify.ts'
import type { Verification } from './pipeline/verify.ts'
import type { HandlerTable } from './registry.ts'
import { Context, Run } from './run.ts'
import type { Answer, Outcome, Sender } from './run.ts'
import type { Job, Runner, RunnerHost } from './runners/runner.ts'
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
}

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
  authenticate (endpoint: Verification, headers: IncomingHttpHeaders, rawBody: Buffer): MaybePromise<Delivery> {
    const { parse, validators } = this.#options
    return then(verify(endpoint, { rawBody, headers }), ({ webhookId, timestamp }) => {
      return { webhookId, timestamp, rawBody, event: validate(rawBody, parse, validators) as WebhookEvent }
    })
  }

  /** deduplicate → dispatch: the event is handled once, however often it is delivered, and the sender told. */
  receive (endpoint: string, { webhookId, timestamp, event }: Delivery, sender: Sender): void {
    const key = keyOf(endpoint, webhookId)
    const running = this.#received.get(key) ?? this.#queued.get(key)
    if (running !== undefined) return join(running, sender)
    if (this.closing) return sender.failed(new Overloaded())

    const run = new Run(key, { webhookId, timestamp, endpoint, event }, sender)
    this.#received.set(key, run)
    proceed(() => this.#options.claims.begin(key), claim => this.#begun(run, claim), error => this.#answer(run, error))
  }

  /** RunnerHost: runs the handlers of a job that a runner holds. */
  process (job: Job): MaybePromise<void> {
    // inline() comes back while its job is being accepted: no look-up.
    const run = this.#accepting?.job === job ? this.#accepting : this.#received.get(keyOf(job.endpoint, job.webhookId))
    if (run?.started === true) return run.failed ? this.#processQueued(job) : run.processed
    if (run?.claim !== undefined) return this.#dispatch(run, run.claim.finished)
    return this.#processQueued(job)
  }

  /** RunnerHost */
  report (error: unknown, job?: Job): void {
    this.#options.report(error, job)
  }

  /** What the sender is told when a delivery is not done by its deadline. */
  lateness (endpoint: string, { webhookId }: Delivery): Error {
    const run = this.#received.get(keyOf(endpoint, webhookId))
    return run?.begun === false ? new Unavailable() : new DeadlineExceeded()
  }

  /** Resolves when nothing is running here. */
  async drained (): Promise<void> {
    if (this.#received.size + this.#queued.size > 0) await new Promise<void>(resolve => { this.#onIdle = resolve })
  }

  #begun (run: Run, claim: Claim): void {
    run.begun = true
    if (claim.state === 'done') return this.#answer(run, undefined, 'duplicate')
    if (claim.state === 'running') return this.#answer(run, this.#queued.has(run.key) ? undefined : new InProgress())
    run.claim = claim
    if (run.sender!.respond !== undefined) {
      // The route's own handler replies once the others have succeeded: they run here, whatever the runner.
      proceed(() => this.#dispatch(run, claim.finished), () => this.#respond(run), error => this.#answer(run, error))
    } else {
      proceed(() => this.#enqueue(run), () => this.#accepted(run), error => this.#refused(run, error))
    }
  }

  #enqueue (run: Run): MaybePromise<void> {
    this.#accepting = run
    try {
      return this.#options.runner.run(run.job)
    } finally {
      this.#accepting = undefined
    }
  }

  #accepted (run: Run): void {
    then(this.#letGo(run), () => this.#answer(run, undefined))
  }

  #refused (run: Run, error: unknown): void {
    then(this.#letGo(run), () => this.#answer(run, isCoded(error) ? error : new Unavailable({ cause: error })))
  }

  /** A queue has the job: the claim is left to whoever processes it. Handlers that were started settle it themselves. */
  #letGo (run: Run): MaybePromise<void> {
    if (run.started) return
    const released = this.#options.claims.release(run)
    run.claim = undefined
    return released
  }

  #dispatch (run: Run, finished: readonly string[]): MaybePromise<void> {
    const { claims, log, signal } = this.#options
    run.started = true
    const all = this.#handlers(run)
    const handlers = finished.length === 0 ? all : all.filter(({ name }) => !finished.includes(name))
    const responds = run.sender?.respond !== undefined
    run.processed = dispatch(handlers, run.job.event, new Context(run, log, signal), {
      // The last success is recorded by completing the delivery, unless the route's own handler comes after it.
      succeeded: ({ name }, last) => last && !responds ? undefined : claims.checkpoint(run, name),
      ended: errors => {
        const recorded = errors.length > 0 ? claims.release(run) : responds ? undefined : claims.complete(run)
        return then(recorded, () => {
          run.ended = true
          run.failed = errors.length > 0
          if (run.answer !== undefined) this.#forget(this.#received, run)
          if (errors.length > 0) throw failure(errors, all.length)
        })
      }
    })
    return run.processed
  }

  #respond (run: Run): void {
    const { claims } = this.#options
    run.sender!.respond!((succeeded, error) => {
      return then(succeeded ? claims.complete(run) : claims.release(run), () => {
        if (succeeded) this.#answer(run, undefined)
        else this.#answer(run, error === undefined ? new HandlerFailed() : failure([error], 1))
      })
    })
  }

  #answer (run: Run, error: unknown, outcome: Outcome = 'processed'): void {
    run.answer = { error, outcome }
    // A runner may acknowledge while the handlers still run: the run lasts as long as they do.
    if (!run.started || run.ended) this.#forget(this.#received, run)
    tell(run.sender!, run.answer)
    if (run.joined !== undefined) for (const sender of run.joined) tell(sender, run.answer)
  }

  #forget (runs: Map<string, Run>, { key }: Run): void {
    runs.delete(key)
    if (this.#onIdle !== undefined && this.#received.size + this.#queued.size === 0) this.#onIdle()
  }

  async #processQueued (job: Job): Promise<void> {
    const key = keyOf(job.endpoint, job.webhookId)
    // Whoever received it, here or in another process, may have yet to let go of it.
    for (let wait = FIRST_WAIT; this.#queued.has(key) || !await this.#attempt(key, job); wait *= 2) {
      if (wait > LONGEST_WAIT) throw new InProgress()
      await new Promise(resolve => setTimeout(resolve, wait))
    }
  }

  /** @returns false when somebody else has the claim */
  async #attempt (key: string, job: Job): Promise<boolean> {
    const run = new Run(key, job, undefined)
    this.#queued.set(key, run)
    try {
      const claim = await this.#options.claims.begin(key)
      if (claim.state === 'running') return false
      if (claim.state === 'claimed') {
        run.claim = claim
        await this.#dispatch(run, claim.finished)
      }
      return true
    } finally {
      this.#forget(this.#queued, run)
    }
  }

  #handlers ({ job }: Run): readonly Handler[] {
    return this.#options.handlersOf(job.endpoint).for(job.event.type)
  }
}

/** ms; the waits between them add up to about five seconds. */
const FIRST_WAIT = 20
const LONGEST_WAIT = 5_000

/** A second delivery of a webhook-id that is running here gets the answer of the first. */
function join (run: Run, sender: Sender): void {
  if (run.answer !== undefined) tell(sender, run.answer)
  else if (run.sender === undefined) tell(sender, ACCEPTED)
  else (run.joined ??= []).push(sender)
}

/** What the sender of a job that a queue holds has been told. */
const ACCEPTED: Answer = { error: undefined, outcome: 'processed' }

function tell (sender: Sender, { error, outcome }: Answer): void {
  if (error === undefined) sender.succeeded(outcome)
  else sender.failed(error)
}

function proceed<T> (work: () => MaybePromise<T>, next: (value: T) => void, failed: (error: unknown) => void): void {
  let value
  try {
    value = work()
  } catch (error) {
    return failed(error)
  }
  if (isPromise<T>(value)) value.then(next, failed)
  else next(value)
}

const MAX_SUMMARY = 1_000

/** The cause is for logs and dead letters; a sender never sees it. */
function failure (errors: readonly unknown[], handlers: number): Error {
  const summary = `${errors.length} of ${handlers} handlers failed: ${errors.map(textOf).join('; ').slice(0, MAX_SUMMARY)}`
  return new HandlerFailed({ cause: new AggregateError(errors, summary) })
}

function textOf (error: unknown): string {
  try {
    return error instanceof Error ? String(error.message).slice(0, MAX_SUMMARY) : `threw ${error === null ? 'null' : typeof error}`
  } catch {
    return 'an error that cannot be read'
  }
}

// Neither a URL nor a webhook-id holds a space.
function keyOf (endpoint: string, webhookId: string): string {
  return `${endpoint} ${webhookId}`
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
