import type { IncomingHttpHeaders, IncomingMessage, ServerResponse } from 'node:http'
import type { FastifyReply, FastifyRequest } from 'fastify'
import type { DuplicateMessage } from '../channels.ts'
import { BY_A_HOOK, codeOfClass } from '../coded.ts'
import { DeadlineExceeded, HandlerFailed } from '../errors.ts'
import { OWN_HANDLER } from '../handlers.ts'
import type { AttemptStart, ObservedAttempt, Observer, Refusal } from '../observation.ts'
import type { RefusedDelivery } from '../log.ts'
import type { VerifiedRequest } from '../request.ts'
import { deliveryError, describeFailure } from '../runners/handler-failures.ts'
import { keyOf } from '../runners/runner.ts'
import type { DeadDelivery, Job } from '../runners/runner.ts'
import { Entry, MAX_HANDLERS, resourceOf, rowOf, sizeOfErrors } from './entry.ts'
import type { Attempt, HandlerRun, Sent } from './entry.ts'
import type { Row } from './messages.ts'
import { Rate } from './rate.ts'
import { Ring } from './ring.ts'

/** The most bytes of all deliveries that are kept: 16 MB together with the refused ones. */
const MAX_BYTES = 12 * 1_048_576
const MAX_BYTES_REFUSED = 4 * 1_048_576
/** The most refused deliveries that are kept. Strangers may send any number of them. */
const MAX_REFUSED = 200

/** The property of a request, and of its raw response, that holds their entry. */
const ENTRY = Symbol('openai-webhook.entry')
type Noted = FastifyRequest & { [ENTRY]?: Entry }
type Observable = ServerResponse & { [ENTRY]?: Entry | undefined }

const DEADLINE = codeOfClass(DeadlineExceeded)
const HANDLER_FAILED = codeOfClass(HandlerFailed)

/** Keeps the last deliveries of one registration and tells which of them have changed. */
export class Journal implements Observer {
  readonly deliveries: Ring
  /** Refused deliveries have a ring of their own, so that a flood of requests from strangers displaces no verified delivery. */
  readonly refusals: Ring
  readonly rate = new Rate()
  /** Deliveries that a runner has accepted, by key. A job out of its queue belongs to one of them. */
  readonly #queued = new Map<string, Entry>()
  /** Deliveries that the page is sending, by signature. Only the inspector can make that signature, and a refused delivery has it too. */
  readonly #sent = new Map<string, Sent>()
  /** The deliveries that have changed since the last call of takeChanged(). `undefined` while no page is open. */
  #changed: Set<Entry> | undefined
  #lastId = 0
  /** One function for all responses. A listener per response would stay in memory with the response. */
  readonly #answered: (this: Observable) => void

  /** @param max the most deliveries that are kept */
  constructor (max: number) {
    const dropped = (entry: Entry): void => {
      this.#changed?.delete(entry)
      if (this.#queued.size === 0) return
      const { endpoint, tenant, webhookId = '' } = entry
      const key = keyOf({ endpoint, webhookId, ...(tenant !== undefined && { tenant }) })
      if (this.#queued.get(key) === entry) this.#queued.delete(key)
    }
    this.deliveries = new Ring(max, MAX_BYTES, dropped)
    this.refusals = new Ring(Math.min(max, MAX_REFUSED), MAX_BYTES_REFUSED, dropped)
    const over = (response: Observable): void => { this.#over(response[ENTRY]!, response) }
    const answered = function (this: Observable): void { over(this) }
    this.#answered = answered
  }

  // Called by the inspector

  find (id: number): Entry | undefined {
    return [...this.deliveries, ...this.refusals].find(entry => entry.id === id)
  }

  /** All deliveries that are kept, the oldest first. */
  rows (): Row[] {
    return [...this.refusals, ...this.deliveries].sort((a, b) => a.id - b.id).map(rowOf)
  }

  /** The other deliveries with the webhook-id of a verified delivery. */
  others (entry: Entry): Row[] {
    const { endpoint, tenant, webhookId } = entry
    if (webhookId === undefined) return []
    return [...this.deliveries].filter(other => other !== entry && other.webhookId === webhookId && other.endpoint === endpoint && other.tenant === tenant).map(rowOf)
  }

  /** Starts or stops recording which deliveries change. */
  watch (watched: boolean): void {
    this.#changed = watched ? this.#changed ?? new Set() : undefined
  }

  /** The deliveries that have changed since the last call. */
  takeChanged (): Row[] {
    const changed = this.#changed
    if (changed === undefined || changed.size === 0) return []
    const rows = [...changed].map(rowOf)
    changed.clear()
    return rows
  }

  /**
   * Sends a delivery of the page and recognises it on arrival.
   *
   * @param signed the signed headers of the delivery
   * @param again the id of the delivery that is repeated
   * @returns the result of `send`, and the id of the delivery; `undefined` when it has not arrived
   */
  async sending<T> (signed: IncomingHttpHeaders, again: number | undefined, send: () => Promise<T>): Promise<{ answer: T, id: number | undefined }> {
    const sent: Sent = { again, id: undefined }
    const signature = signatureOf(signed)
    this.#sent.set(signature, sent)
    try {
      return { answer: await send(), id: sent.id }
    } finally {
      this.#sent.delete(signature)
    }
  }

  // Called by the plugin

  arrived (request: FastifyRequest, reply: FastifyReply, endpoint: string): void {
    const raw = reply.raw as Observable
    raw[ENTRY] = this.#note(request, endpoint)
    // 'close' follows 'finish', and comes without it when the sender disconnects.
    raw.on('close', this.#answered)
  }

  captured (request: FastifyRequest, rawBody: Buffer): void {
    const entry = this.#entryOf(request)
    entry.capturedAt = entry.elapsed()
    entry.keepBody(rawBody)
  }

  verified (request: FastifyRequest): void {
    const entry = this.#entryOf(request)
    entry.verifiedAt = entry.elapsed()
  }

  validated (request: VerifiedRequest): void {
    const entry = this.#entryOf(request)
    entry.validatedAt = entry.elapsed()
    name(entry, request.openaiWebhook)
    this.#keep(this.deliveries, entry)
  }

  deduplicated (request: VerifiedRequest): void {
    const entry = this.#entryOf(request)
    entry.deduplicatedAt = entry.elapsed()
  }

  duplicate (request: VerifiedRequest, state: DuplicateMessage['state']): void {
    const entry = this.#entryOf(request)
    entry.deduplicatedAt ??= entry.elapsed()
    entry.duplicate = state
    this.#move(entry, 'duplicate')
  }

  queued (job: Job, request: VerifiedRequest): void {
    const entry = this.#entryOf(request)
    entry.dispatchedAt = entry.elapsed()
    if (entry.kept) this.#queued.set(keyOf(job), entry)
    this.#move(entry, 'queued')
  }

  started ({ job, request, attempt, handlers, finished, replies }: AttemptStart): ObservedAttempt {
    const entry = request === undefined ? this.#entryOfJob(job) : this.#entryOf(request)
    const runs = (handlers.length > MAX_HANDLERS ? handlers.slice(0, MAX_HANDLERS) : handlers).map(runOf)
    const own = replies ? runOf({ name: OWN_HANDLER }) : undefined
    if (own !== undefined) runs.push(own)
    const record: Attempt = {
      number: Math.max(attempt ?? 0, entry.started + 1),
      startedAt: entry.elapsed(),
      queued: request === undefined,
      handlers: runs,
      finished,
      outcome: 'running',
      duration: undefined,
      errors: []
    }
    entry.keepAttempt(record)
    this.#move(entry, 'running')
    return new Run(this, entry, record, own, job)
  }

  /** Called when the handlers have ended. */
  ended (entry: Entry, { attempt, job, error }: { readonly attempt: Attempt, readonly job: Job, readonly error: unknown }): void {
    if (error === undefined) {
      attempt.outcome = 'processed'
      if (this.#queued.size > 0) this.#queued.delete(keyOf(job))
      return this.#move(entry, 'processed')
    }
    attempt.outcome = 'failed'
    attempt.errors = describeFailure(job, error).errors
    this.rate.failed(performance.now())
    this.deliveries.grow(entry, sizeOfErrors(attempt.errors))
    this.#move(entry, 'failed')
  }

  refused ({ code, statusCode, error }: Refusal, { endpoint, tenant }: RefusedDelivery, request: FastifyRequest): void {
    // A hook of the app may have refused the request before it was noted.
    const entry = (request as Noted)[ENTRY] ?? this.#note(request, endpoint)
    const { cause, message } = error as { cause?: unknown, message?: unknown }
    // The errors of the handlers are kept in the attempt.
    const described = code === HANDLER_FAILED || cause === undefined ? null : deliveryError(null, cause)
    entry.refusal = { code: code.slice(0, 100), statusCode, message: String(message).slice(0, 500), error: described }
    if (entry.webhookId === undefined) {
      entry.status = statusCode
      entry.state = 'refused'
      entry.tenant = tenant
      if (!entry.kept) this.#keepRefused(entry)
      return
    }
    if (described !== null) this.deliveries.grow(entry, sizeOfErrors([described]))
    // After a deadline the handlers run on. A delivery whose handlers have failed, or that is a duplicate, keeps its state.
    if (code === DEADLINE && entry.state === 'running') this.#move(entry, 'late')
    else if (entry.state === 'received') this.#move(entry, 'refused')
    else this.#move(entry, entry.state)
  }

  dead (delivery: DeadDelivery): void {
    const entry = this.#entryOfJob(delivery)
    entry.death = delivery
    entry.started = Math.max(entry.started, delivery.attempts)
    this.deliveries.grow(entry, sizeOfErrors(delivery.errors))
    this.#move(entry, 'dead')
  }

  /** A hook of the app that throws null makes Fastify skip the hook that notes the arrival. */
  #entryOf (request: FastifyRequest): Entry {
    return (request as Noted)[ENTRY] ?? this.#note(request, String(request.routeOptions.url))
  }

  #note (request: FastifyRequest, endpoint: string): Entry {
    // The URL that the sender used, because Fastify's rewriteUrl is applied to a repeated delivery too. A mount of Express, which cuts off its
    // `baseUrl` and sets originalUrl as well, is not.
    const { url = '', originalUrl = url, baseUrl = '' } = request.raw as IncomingMessage & { originalUrl?: string, baseUrl?: string }
    const entry = new Entry(++this.#lastId, Date.now(), performance.now(), endpoint, baseUrl === '' ? originalUrl : url, request.headers)
    ;(request as Noted)[ENTRY] = entry
    if (this.#sent.size > 0) this.#recognise(entry, signatureOf(request.headers))
    return entry
  }

  #recognise (entry: Entry, signature: string): void {
    const sent = this.#sent.get(signature)
    if (sent === undefined) return
    entry.sent = sent
    sent.id = entry.id
    // A copy of this request that somebody forwards is a new delivery.
    this.#sent.delete(signature)
  }

  /** The delivery that a job belongs to. When this process did not receive it, a new one. */
  #entryOfJob (job: Job): Entry {
    const key = keyOf(job)
    const known = this.#queued.get(key)
    if (known !== undefined) return known
    const { endpoint, event } = job
    const entry = new Entry(++this.#lastId, Date.now(), performance.now(), endpoint, endpoint, undefined)
    entry.keepBody(Buffer.from(JSON.stringify(event)))
    name(entry, job)
    this.#keep(this.deliveries, entry)
    this.#queued.set(key, entry)
    return entry
  }

  #keep (ring: Ring, entry: Entry): void {
    ring.add(entry)
    this.rate.came(entry.startedAt)
    this.#changed?.add(entry)
  }

  #keepRefused (entry: Entry): void {
    this.#keep(this.refusals, entry)
    this.rate.failed(entry.startedAt)
  }

  #over (entry: Entry, { headersSent, statusCode }: ServerResponse): void {
    entry.answeredAt = entry.elapsed()
    // No headers were sent if the sender disconnected before the answer.
    if (headersSent) entry.status = statusCode
    if (entry.state === 'received') {
      entry.state = 'refused'
      entry.refusal ??= { code: BY_A_HOOK, statusCode, message: 'a hook of the app has answered, so the delivery was not processed', error: null }
      if (!entry.kept && entry.webhookId === undefined) this.#keepRefused(entry)
    }
    if (entry.kept) this.#changed?.add(entry)
  }

  #move (entry: Entry, state: Entry['state']): void {
    entry.state = state
    if (entry.kept) this.#changed?.add(entry)
  }
}

/** One attempt: one run of a delivery's handlers. */
class Run implements ObservedAttempt {
  constructor (
    readonly journal: Journal,
    readonly entry: Entry,
    readonly attempt: Attempt,
    readonly own: HandlerRun | undefined,
    readonly job: Job
  ) {}

  succeeded (index: number): void {
    this.#end(this.#run(index), 'succeeded')
  }

  failed (index: number): void {
    this.#end(this.#run(index), 'failed')
  }

  ended (error?: unknown): void {
    const { journal, entry, attempt, own, job } = this
    this.#end(own, error === undefined ? 'succeeded' : 'failed')
    attempt.duration = entry.elapsed() - attempt.startedAt
    if (!attempt.queued) entry.dispatchedAt = attempt.startedAt + attempt.duration
    // When this process received the request, its row shows the time until the answer, which did not wait for the queue.
    else if (entry.headers === undefined) entry.duration = attempt.duration
    journal.ended(entry, { attempt, job, error })
  }

  /** Only the first MAX_HANDLERS event handlers are kept. The run after them is that of the route's own handler. */
  #run (index: number): HandlerRun | undefined {
    return index < MAX_HANDLERS ? this.attempt.handlers[index] : undefined
  }

  #end (run: HandlerRun | undefined, outcome: 'succeeded' | 'failed'): void {
    if (run === undefined) return
    run.outcome = outcome
    run.duration = this.entry.elapsed() - this.attempt.startedAt
  }
}

const runOf = ({ name }: { readonly name: string }): HandlerRun => ({ name, outcome: 'running', duration: undefined })

/** The signature in either scheme. */
const signatureOf = ({ 'webhook-signature': standard, 'x-openai-signature': older }: IncomingHttpHeaders): string => String(standard ?? older)

function name (entry: Entry, { webhookId, timestamp, event, tenant }: Pick<Job, 'webhookId' | 'timestamp'> & { event: { type: string, data?: unknown }, tenant?: string | undefined }): void {
  entry.webhookId = webhookId
  entry.timestamp = timestamp
  entry.type = event.type
  entry.resource = resourceOf(event)
  entry.tenant = tenant
}
