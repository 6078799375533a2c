import type { IncomingHttpHeaders, ServerResponse } from 'node:http'
import type { FastifyReply, FastifyRequest } from 'fastify'
import type { DuplicateMessage } from '../channels.ts'
import { DeadlineExceeded, HandlerFailed } from '../errors.ts'
import { OWN_HANDLER } from '../handlers.ts'
import type { AttemptStart, ObservedAttempt, Observer } from '../observation.ts'
import type { Refused } from '../registry.ts'
import type { VerifiedRequest } from '../request.ts'
import { describe, describeFailure } from '../runners/handler-failures.ts'
import { keyOf } from '../runners/runner.ts'
import type { DeadDelivery, Job } from '../runners/runner.ts'
import { Entry, MAX_HANDLERS, resourceOf, rowOf, sizeOfErrors } from './entry.ts'
import type { Attempt, HandlerRun, Sent } from './entry.ts'
import type { Row } from './messages.ts'
import { Rate } from './rate.ts'
import { Ring } from './ring.ts'

/** Bytes, whatever the bodies: 16 MB in all. */
const MAX_BYTES = 12 * 1_048_576
const MAX_BYTES_REFUSED = 4 * 1_048_576
/** Refused deliveries that are kept: strangers may send any number. */
const MAX_REFUSED = 200

/** On a request and its response: what is kept of them. */
const ENTRY = Symbol('openai-webhook.entry')
type Noted = FastifyRequest & { [ENTRY]?: Entry }
type Observable = ServerResponse & { [ENTRY]?: Entry | undefined }

const DEADLINE = new DeadlineExceeded().code
const HANDLER_FAILED = new HandlerFailed().code
/** A hook of the app has answered, so that no step of the plugin's has. */
const BY_A_HOOK = 'ANSWERED_BY_A_HOOK'

/** Keeps the last deliveries of one registration, and tells which have changed. */
export class Journal implements Observer {
  readonly deliveries: Ring
  /** Of strangers, or of senders that look like one: in a ring of their own, so that a flood of them displaces no other. */
  readonly refusals: Ring
  readonly rate = new Rate()
  /** Those that a runner has, by key: what comes out of its queue belongs to them. */
  readonly #queued = new Map<string, Entry>()
  /** Those that the page is sending, by signature: nobody else can make it, and a refused delivery has one too. */
  readonly #sent = new Map<string, Sent>()
  /** Those that have changed since they were asked for; `undefined` while nobody looks. */
  #changed: Set<Entry> | undefined
  #lastId = 0
  /** One function for all responses, whose own listeners would be kept with them. */
  readonly #answered: (this: Observable) => void

  /** @param max deliveries */
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

  // What the inspector asks

  find (id: number): Entry | undefined {
    return [...this.deliveries, ...this.refusals].find(entry => entry.id === id)
  }

  /** All that are kept, the oldest first. */
  rows (): Row[] {
    return [...this.refusals, ...this.deliveries].sort((a, b) => a.id - b.id).map(rowOf)
  }

  /** The other deliveries with the webhook-id of one that was verified. */
  others (entry: Entry): Row[] {
    const { endpoint, tenant, webhookId } = entry
    if (webhookId === undefined) return []
    return [...this.deliveries].filter(other => other !== entry && other.webhookId === webhookId && other.endpoint === endpoint && other.tenant === tenant).map(rowOf)
  }

  /** Begins or ends to note what changes. */
  watch (watched: boolean): void {
    this.#changed = watched ? this.#changed ?? new Set() : undefined
  }

  /** What has changed since it was asked last. */
  takeChanged (): Row[] {
    const changed = this.#changed
    if (changed === undefined || changed.size === 0) return []
    const rows = [...changed].map(rowOf)
    changed.clear()
    return rows
  }

  /**
   * Follows a delivery that the page sends.
   *
   * @param signed its headers
   * @returns what `send` does, and the delivery's id; `undefined` where it has not arrived
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

  // What happens

  arrived (request: FastifyRequest, reply: FastifyReply, endpoint: string): void {
    const raw = reply.raw as Observable
    raw[ENTRY] = this.#note(request, endpoint)
    // After 'finish', and where a sender goes away, which causes no 'finish'.
    raw.on('close', this.#answered)
  }

  captured (request: FastifyRequest, rawBody: Buffer): void {
    const entry = this.#entryOf(request)
    entry.capturedAt = performance.now()
    entry.keepBody(rawBody)
  }

  verified (request: FastifyRequest): void {
    this.#entryOf(request).verifiedAt = performance.now()
  }

  validated (request: VerifiedRequest): void {
    const entry = this.#entryOf(request)
    const { webhookId, timestamp, event, tenant } = request.openaiWebhook as VerifiedRequest['openaiWebhook'] & { readonly tenant?: string }
    entry.validatedAt = performance.now()
    name(entry, { webhookId, timestamp, event, tenant })
    this.#keep(this.deliveries, entry)
  }

  deduplicated (request: VerifiedRequest): void {
    this.#entryOf(request).deduplicatedAt = performance.now()
  }

  duplicate (request: VerifiedRequest, state: DuplicateMessage['state']): void {
    const entry = this.#entryOf(request)
    if (Number.isNaN(entry.deduplicatedAt)) entry.deduplicatedAt = performance.now()
    entry.duplicate = state
    this.#move(entry, 'duplicate')
  }

  queued (job: Job, request: VerifiedRequest): void {
    const entry = this.#entryOf(request)
    entry.dispatchedAt = performance.now()
    if (entry.kept) this.#queued.set(keyOf(job), entry)
    this.#move(entry, 'queued')
  }

  started ({ job, request, attempt, handlers, finished, replies }: AttemptStart): ObservedAttempt {
    const entry = request === undefined ? this.#entryOfJob(job) : this.#entryOf(request)
    const startedAt = performance.now()
    const runs: HandlerRun[] = handlers.slice(0, MAX_HANDLERS).map(({ name }) => ({ name, outcome: 'running', ms: undefined }))
    const own: HandlerRun | undefined = replies ? { name: OWN_HANDLER, outcome: 'running', ms: undefined } : undefined
    if (own !== undefined) runs.push(own)
    const record: Attempt = {
      number: Math.max(attempt ?? 0, entry.started + 1),
      at: Date.now(),
      queued: request === undefined,
      handlers: runs,
      finished,
      outcome: 'running',
      ms: undefined,
      errors: []
    }
    entry.keepAttempt(record)
    this.#move(entry, 'running')
    return new Run(this, entry, record, own, request === undefined, startedAt, job)
  }

  /** The handlers have ended. */
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

  refused ({ code, statusCode, error }: { code: string, statusCode: number, error: unknown }, { endpoint, tenant }: Refused, request: FastifyRequest): void {
    // A hook of the app before ours may have refused it.
    const entry = (request as Noted)[ENTRY] ?? this.#note(request, endpoint)
    const { cause, message } = error as { cause?: unknown, message?: unknown }
    // What the handlers threw stands at the attempt.
    const described = code === HANDLER_FAILED || cause === undefined ? null : describe(null, cause)
    entry.refusal = { code: code.slice(0, 100), statusCode, message: String(message).slice(0, 500), error: described }
    if (entry.webhookId === undefined) {
      entry.status = statusCode
      entry.state = 'refused'
      entry.tenant = tenant
      if (!entry.kept) this.#keepRefused(entry)
      return
    }
    if (described !== null) this.deliveries.grow(entry, sizeOfErrors([described]))
    // Its handlers run on, or have failed; or it is told that it is a duplicate of one that runs elsewhere.
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

  /** A hook of the app that throws null has Fastify skip the one that notes the arrival. */
  #entryOf (request: FastifyRequest): Entry {
    return (request as Noted)[ENTRY] ?? this.#note(request, String(request.routeOptions.url))
  }

  #note (request: FastifyRequest, endpoint: string): Entry {
    const entry = new Entry(++this.#lastId, Date.now(), performance.now(), endpoint, request.url, request.headers)
    ;(request as Noted)[ENTRY] = entry
    if (this.#sent.size > 0) this.#recognise(entry, signatureOf(request.headers))
    return entry
  }

  #recognise (entry: Entry, signature: string): void {
    const sent = this.#sent.get(signature)
    if (sent === undefined) return
    entry.sent = sent
    sent.id = entry.id
    // Whoever forwards it sends another.
    this.#sent.delete(signature)
  }

  /** The delivery that a job came with, or where this process has not received it a new one. */
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
    entry.answeredAt = performance.now()
    // Else the sender has gone before.
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

/** One run of a delivery's handlers. */
class Run implements ObservedAttempt {
  constructor (
    readonly journal: Journal,
    readonly entry: Entry,
    readonly attempt: Attempt,
    readonly own: HandlerRun | undefined,
    readonly queued: boolean,
    readonly startedAt: number,
    readonly job: Job
  ) {}

  succeeded (index: number): void {
    this.#end(this.#run(index), 'succeeded')
  }

  failed (index: number): void {
    this.#end(this.#run(index), 'failed')
  }

  ended (error?: unknown): void {
    const { journal, entry, attempt, own, queued, startedAt, job } = this
    this.#end(own, error === undefined ? 'succeeded' : 'failed')
    attempt.ms = performance.now() - startedAt
    if (!queued) entry.dispatchedAt = startedAt + attempt.ms
    // Where the sender was answered here, its answer did not wait for a queue.
    else if (entry.headers === undefined) entry.ms = attempt.ms
    journal.ended(entry, { attempt, job, error })
  }

  /** Behind those that are kept stands the route's own handler. */
  #run (index: number): HandlerRun | undefined {
    return index < MAX_HANDLERS ? this.attempt.handlers[index] : undefined
  }

  #end (run: HandlerRun | undefined, outcome: 'succeeded' | 'failed'): void {
    if (run === undefined) return
    run.outcome = outcome
    run.ms = performance.now() - this.startedAt
  }
}

/** In either scheme. */
const signatureOf = ({ 'webhook-signature': standard, 'x-openai-signature': older }: IncomingHttpHeaders): string => String(standard ?? older)

function name (entry: Entry, { webhookId, timestamp, event, tenant }: Pick<Job, 'webhookId' | 'timestamp'> & { event: { type: string, data?: unknown }, tenant?: string | undefined }): void {
  entry.webhookId = webhookId
  entry.timestamp = timestamp
  entry.type = event.type
  entry.resource = resourceOf(event)
  entry.tenant = tenant
}
