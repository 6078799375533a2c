// Checked by tsc, never run. The guide's events change the types of two official ones, so their merging is checked in a
// program of its own: test/events/events.test.ts.
import type { PGlite } from '@electric-sql/pglite'
import { Client } from 'pg'
import type { Pool, PoolClient } from 'pg'
import { postgresInbox, postgresStore } from '../lib/postgres/index.ts'
import type { Inbox } from '../lib/postgres/index.ts'
import { sqliteInbox } from '../lib/sqlite/index.ts'
import { Type } from '@sinclair/typebox'
import { type as arktype } from 'arktype'
import { Type as TypeBox1 } from 'typebox'
import * as v from 'valibot'
import * as z from 'zod'
import Fastify from 'fastify'
import type { FastifyBaseLogger, FastifyInstance } from 'fastify'
import type { UnwrapWebhookEvent } from 'openai/resources/webhooks'
import openaiWebhook, { deadDelivery, inline, memoryStore, standardWebhooks, xOpenAISignature } from '../lib/index.ts'
import type {
  Claim, DeadDelivery, Delivery, DeliveryRef, EventContext, EventHandler, EventOf, EventPattern, EventsOf, EventType, FailureInfo, GuideEvents, IdempotencyStore, Job,
  OfficialEvents, OpenAIWebhookOptions, RouteHandlers, RouteOverrides, Runner, RunnerHost, Secret, UnknownEvent, Verified, VerifiedRequest, Verifier, WebhookEvent
} from '../lib/index.ts'
import { ownEvents } from './support/own-events.ts'

type Equal<A, B> = (<T>() => T extends A ? 1 : 2) extends (<T>() => T extends B ? 1 : 2) ? true : false

/** Fails to compile unless both are the same type. */
declare function same<A, B> (..._proof: Equal<A, B> extends true ? [] : [never, A, B]): void

// The official SDK's types

type SdkEvents = { [Event in UnwrapWebhookEvent as Event['type']]: Event }
type Shared = keyof SdkEvents & keyof OfficialEvents

// Both lists of types are exact: one more on either side fails here.
same<Exclude<keyof SdkEvents, keyof OfficialEvents>, never>()
same<Exclude<keyof OfficialEvents, keyof SdkEvents>, 'safety_identifier.blocked' | 'video.completed' | 'video.failed'>()

/** Every key, whether it is optional, and its kind of value; not which texts. */
type Shape<T> = T extends string ? string : T extends object ? { [Key in keyof T]: Shape<T[Key]> } : T
type ShapeDrift = { [Name in Shared]: Equal<Shape<OfficialEvents[Name]>, Shape<SdkEvents[Name]>> extends true ? never : Name }[Shared]
same<ShapeDrift, never>()

// The SDK's events are assignable to ours.
type NotTaken = { [Name in Shared]: SdkEvents[Name] extends OfficialEvents[Name] ? never : Name }[Shared]
same<NotTaken, never>()

// Ours are assignable to the SDK's, save where it closes an enum that we keep open, so that a value which OpenAI adds
// does not refuse a delivery: these and no others.
type NotGiven = { [Name in Shared]: OfficialEvents[Name] extends SdkEvents[Name] ? never : Name }[Shared]
same<NotGiven, 'agent.session.action_required'>()

declare const ours: OfficialEvents
declare const theirs: SdkEvents

export const taken: OfficialEvents['agent.session.action_required'] = theirs['agent.session.action_required']
// @ts-expect-error required_action.type is open here and closed there
export const given: SdkEvents['agent.session.action_required'] = ours['agent.session.action_required']
// … and nothing else about it is.
export const givenOtherwise: SdkEvents['agent.session.action_required'] = {
  ...ours['agent.session.action_required'],
  data: { ...ours['agent.session.action_required'].data, required_action: { type: 'function_call' } }
}

/** The values that are known of an open enum. */
type Known<Text extends string> = Text extends string ? string extends Text ? never : Text : never
type ActionType = OfficialEvents['agent.session.action_required']['data']['required_action']['type']
same<Known<ActionType>, SdkEvents['agent.session.action_required']['data']['required_action']['type']>()
export const openAction: ActionType = 'something_new'

// Enums that both keep open, with the same known values.
type Media<Event extends { data: { sip_media_security?: string } }> = Known<Exclude<Event['data']['sip_media_security'], undefined>>
same<Media<OfficialEvents['realtime.call.incoming']>, 'rtp' | 'srtp'>()
same<Media<OfficialEvents['realtime.call.incoming']>, Media<SdkEvents['realtime.call.incoming']>>()
same<Media<OfficialEvents['live.call.incoming']>, Media<SdkEvents['live.call.incoming']>>()
same<Media<OfficialEvents['live.transport.incoming']>, Media<SdkEvents['live.transport.incoming']>>()

// The SDK has any text for the environment's type; we suggest the known ones.
same<Known<OfficialEvents['agent.session.created']['data']['environment_type']>, 'none' | 'openai_hosted' | 'self_hosted'>()
same<SdkEvents['agent.session.created']['data']['environment_type'], string>()

// Whatever has a handler for the SDK's events can be given ours.
declare function handleSdkEvent (event: Exclude<UnwrapWebhookEvent, { type: 'agent.session.action_required' }>): void

// on()

const app: FastifyInstance = Fastify()
await app.register(openaiWebhook, { events: ownEvents })
const webhook = app.openaiWebhook

webhook.on('batch.failed', function (event, context) {
  same<typeof this, FastifyInstance>()
  same<typeof event, OfficialEvents['batch.failed']>()
  same<typeof event.type, 'batch.failed'>()
  same<typeof event.data.id, string>()
  same<typeof event.object, 'event' | undefined>()
  same<typeof context, EventContext>()
  same<typeof context.webhookId, string>()
  same<typeof context.timestamp, number>()
  same<typeof context.endpoint, string>()
  same<typeof context.log, FastifyBaseLogger>()
  same<typeof context.signal, AbortSignal>()
  same<typeof context.request, VerifiedRequest | undefined>()
  handleSdkEvent(event)
  // @ts-expect-error handlers have no reply: they may run outside the request
  context.reply.send()
  // @ts-expect-error a field that the event does not have
  event.data.output_file_id.toUpperCase()
})

webhook.on('realtime.call.incoming', async ({ data }) => {
  same<typeof data.call_id, string>()
  same<typeof data.sip_headers, Array<{ name: string, value: string }>>()
  // @ts-expect-error incoming calls have no data.id
  data.id.toUpperCase()
})

webhook.on(['response.completed', 'response.failed'], event => {
  same<typeof event.type, 'response.completed' | 'response.failed'>()
})

webhook.on(['eval.run.canceled', 'fine_tuning.job.cancelled'] as const, event => {
  same<typeof event.type, 'eval.run.canceled' | 'fine_tuning.job.cancelled'>()
})

webhook.on('batch.*', event => {
  same<typeof event.type, 'batch.cancelled' | 'batch.completed' | 'batch.expired' | 'batch.failed'>()
  if (event.type === 'batch.failed') same<typeof event, OfficialEvents['batch.failed']>()
})

webhook.on('agent.session.*', event => {
  same<typeof event.type, `agent.session.${'action_required' | 'created' | 'failed' | 'idle' | 'in_progress'}`>()
  if (event.type === 'agent.session.created') same<typeof event.data.connect, { remote_url: string } | undefined>()
  // @ts-expect-error not every event of the family has it
  event.data.connect?.remote_url.toUpperCase()
})

webhook.on('agent.*', event => {
  same<typeof event.type, EventType & `agent.${string}`>()
})

webhook.on(['batch.*', 'video.completed'], event => {
  same<typeof event.type, EventType & `batch.${string}` | 'video.completed'>()
})

// @ts-expect-error misspelt
webhook.on('batch.complete', () => {})
// @ts-expect-error misspelt: OpenAI spells it eval.run.canceled
webhook.on('eval.run.cancelled', () => {})
// @ts-expect-error one of them is misspelt
webhook.on(['batch.completed', 'batch.fail'], () => {})
// @ts-expect-error no such family
webhook.on('batches.*', () => {})
// @ts-expect-error a pattern ends with ".*"
webhook.on('batch*', () => {})
// @ts-expect-error every event: onAny()
webhook.on('*', () => {})
// @ts-expect-error an event of the community guide, whose schemas are not given here
webhook.on('file.processed', () => {})
// @ts-expect-error a handler for another event
webhook.on('batch.failed', (event: OfficialEvents['batch.completed']) => event)
// @ts-expect-error no handler
webhook.on('batch.failed')
// @ts-expect-error handlers return nothing
webhook.on('batch.failed', () => 'text')
// What a promise resolves to counts for nothing either.
webhook.on('batch.failed', async () => ({ rows: 1 })).route({ url: '/own', on: { 'batch.failed': async () => 1 } })

webhook.on('batch.failed', () => {}, { name: 'alert' })
// @ts-expect-error misspelt option
webhook.on('batch.failed', () => {}, { nam: 'alert' })

// Handlers that stand on their own
export const failed: EventHandler<EventOf<'batch.failed'>> = async function (event, { log }) {
  log.info({ batch: event.data.id, version: this.version }, event.type)
}
export const wide: EventHandler<WebhookEvent> = event => { same<typeof event.type, EventType>() }
webhook.on('batch.failed', failed).on('batch.failed', wide).on('video.*', wide)

webhook
  .onAny(event => {
    same<typeof event, WebhookEvent>()
    if (event.type === 'live.call.incoming') same<typeof event.data.session_id, string>()
  })
  .onUnhandled(event => {
    same<typeof event, WebhookEvent | UnknownEvent>()
    same<typeof event.type, string>()
  })
  .onError((error, info) => {
    same<typeof error, Error>()
    same<typeof info, FailureInfo>()
    same<typeof info.event, { readonly type: string } | undefined>()
  })

// Names as types
same<EventPattern & `agent${string}`, 'agent.*' | 'agent.environment.*' | 'agent.session.*'>()
same<EventPattern & `safety${string}`, 'safety.*' | 'safety.alert.*' | 'safety.org_alert.*' | 'safety_identifier.*'>()
same<EventOf<'eval.*'>['type'], `eval.run.${'canceled' | 'failed' | 'succeeded'}`>()
same<EventOf<'video.failed'>, OfficialEvents['video.failed']>()

// Events of one's own

same<EventType, keyof OfficialEvents | 'acme.invoice.paid'>()
webhook.on('acme.invoice.paid', event => {
  same<typeof event, EventsOf<typeof ownEvents>['acme.invoice.paid']>()
  same<typeof event.data.cents, number>()
  same<typeof event.data.currency, string | undefined>()
})
webhook.on('acme.*', event => { same<typeof event.type, 'acme.invoice.paid'>() })
webhook.on('acme.invoice.*', event => { same<typeof event.data.cents, number>() })
// @ts-expect-error misspelt
webhook.on('acme.invoice.payed', () => {})

// The guide's events, as they are before they are merged
same<GuideEvents['batch.completed']['id'], string | undefined>()
same<GuideEvents['batch.completed']['data']['output_file_id'], string | undefined>()
same<Exclude<keyof GuideEvents, keyof OfficialEvents>, 'batch.created' | 'batch.in_progress' | 'fine_tune.completed' | 'fine_tune.failed' | 'file.processed'>()

// Routes

const handlers: RouteHandlers = {
  'batch.failed': event => { same<typeof event, OfficialEvents['batch.failed']>() },
  'response.*': [event => { same<typeof event.type, EventType & `response.${string}`>() }, wide]
}

webhook
  .route({ url: '/second', secret: ['a', 'b'], tolerance: 60, bodyLimit: 1_000, bodyTimeout: 1_000, verifier: standardWebhooks(), on: handlers })
  .route({
    url: '/third',
    on: { 'video.completed' (event) { same<typeof event.type, 'video.completed'>(); same<typeof this, FastifyInstance>() } },
    handler: async (request, reply) => reply.code(202).send(request.openaiWebhook.webhookId)
  })
webhook
  .route({ url: '/of/:project', tenant: { of: request => request.params.project, secret: async project => project === 'a' ? ['b', 'c'] : undefined, ttl: 1_000, max: 7 } })
  .route({ url: '/of', tenant: { of: ({ hostname }) => hostname, secret: () => null } })
// @ts-expect-error no secret
webhook.route({ url: '/of', tenant: { of: () => 'a' } })
// @ts-expect-error a tenant is named by text
webhook.route({ url: '/of', tenant: { of: () => 7, secret: () => 'a' } })
// @ts-expect-error no route, no tenants
webhook.unwrap('', {}, { tenant: { of: () => 'a', secret: () => 'b' } })
webhook.on('batch.failed', (_event, { tenant }) => { same<typeof tenant, string | undefined>() })
// @ts-expect-error no url
webhook.route({ secret: 'a' })
// @ts-expect-error misspelt event type
webhook.route({ url: '/x', on: { 'batch.fail': () => {} } })
// @ts-expect-error the store is shared by the routes
webhook.route({ url: '/x', idempotency: false })

app.post('/marked', { config: { openaiWebhook: { tolerance: 60, secret: async () => 'a', on: handlers } } }, async request => {
  const { event } = request.openaiWebhook
  same<typeof request.openaiWebhook, Delivery>()
  same<typeof event, WebhookEvent>()
  same<Omit<Delivery, 'event'>, { readonly rawBody: Buffer, readonly webhookId: string, readonly timestamp: number, readonly endpoint: string, readonly tenant?: string }>()
  if (event.type === 'batch.completed') same<typeof event.data.id, string>()
  // @ts-expect-error read-only
  request.openaiWebhook.webhookId = 'another'
})
app.post('/ordinary', async request => { same<typeof request.openaiWebhook, Delivery | null>() })
app.post('/ordinary', { config: { rateLimit: false } }, async request => { same<typeof request.openaiWebhook, Delivery | null>() })
app.addHook('preHandler', async request => { same<typeof request.openaiWebhook, Delivery | null>() })
app.route({
  method: 'POST',
  url: '/marked',
  config: { openaiWebhook: {} },
  preHandler: async request => { same<typeof request.openaiWebhook, Delivery>() },
  handler: async request => { same<typeof request.openaiWebhook, Delivery>() }
})
app.post<{ Params: { id: string } }, { openaiWebhook: object }>('/marked/:id', { config: { openaiWebhook: {} } }, async request => {
  same<typeof request.params.id, string>()
  same<typeof request.openaiWebhook, Delivery>()
})
Fastify({ http2: true }).post('/marked', { config: { openaiWebhook: {} } }, async request => { same<typeof request.openaiWebhook, Delivery>() })
app.post('/dispatching', { config: { openaiWebhook: {} } }, webhook.handler)
app.post('/handling', {
  config: { openaiWebhook: { on: { 'batch.failed' (event) { same<typeof event, OfficialEvents['batch.failed']>() } } } }
}, async () => {})
// @ts-expect-error not a number
app.post('/wrong', { config: { openaiWebhook: { tolerance: '60' } } }, async () => {})
// @ts-expect-error not a handler
app.post('/wrong', { config: { openaiWebhook: { on: { 'batch.failed': 'log' } } } }, async () => {})
// Fastify takes any further key in a config, so a misspelt one is told at boot, or here:
export const overrides: RouteOverrides = {
  // @ts-expect-error misspelt
  tolerence: 60
}

// unwrap()

const event = await webhook.unwrap('{}', {})
same<typeof event, WebhookEvent>()
if (event.type === 'agent.session.created') same<typeof event.data.environment_id, string | undefined>()
switch (event.type) {
  case 'response.completed': same<typeof event, OfficialEvents['response.completed']>(); break
  case 'acme.invoice.paid': same<typeof event.data.cents, number>(); break
  // @ts-expect-error no such type
  case 'response.complete': break
}
await webhook.unwrap(Buffer.from('{}'), new Headers(), { tolerance: 60, secret: () => ['a'], verifier: xOpenAISignature() })
await webhook.unwrap(new Uint8Array(), { 'webhook-id': 'a', accept: ['b'], absent: undefined } as const)
app.get('/', async request => await webhook.unwrap('{}', request.headers))
// @ts-expect-error a parsed body cannot be verified
await webhook.unwrap({ type: 'batch.failed' }, {})
// @ts-expect-error no headers
await webhook.unwrap('{}')
// @ts-expect-error the body has been read
await webhook.unwrap('{}', {}, { bodyLimit: 1 })
// @ts-expect-error the body has been read
await webhook.unwrap('{}', {}, { bodyTimeout: 1 })

// Options

export const everyOption: Required<OpenAIWebhookOptions> = {
  secret: async () => ['a', 'b'],
  path: '/hooks',
  prefix: '/v1',
  tolerance: 300,
  bodyLimit: 65_536,
  bodyTimeout: 10_000,
  events: { 'acme.x': Type.Object({ type: Type.Literal('acme.x') }) },
  verifier: standardWebhooks(),
  rateLimit: { max: 100 },
  idempotency: { store: memoryStore({ max: 10 }), lease: 1_000, retention: 1_000 },
  runner: inline(),
  deadline: 1_000,
  closeTimeout: 1_000
}
export const secrets: Secret[] = ['a', ['a', 'b'], Object.freeze(['a'] as const), () => 'a', () => ['a'], async () => 'a', async () => ['a']]
await app.register(openaiWebhook, { path: false, idempotency: false })
// @ts-expect-error misspelt
await app.register(openaiWebhook, { tolerence: 300 })
// @ts-expect-error not a number
await app.register(openaiWebhook, { tolerance: '300' })
// @ts-expect-error false, or a path
await app.register(openaiWebhook, { path: true })
// @ts-expect-error not a schema
await app.register(openaiWebhook, { events: { 'acme.x': {} } })
// @ts-expect-error false, or its options
await app.register(openaiWebhook, { idempotency: true })
// @ts-expect-error misspelt
await app.register(openaiWebhook, { idempotency: { leese: 1 } })
// The program imports @fastify/rate-limit, in test/interop.test.ts, and with it its types.
await app.register(openaiWebhook, { rateLimit: { max: 1, keyGenerator: request => request.ip } })
app.openaiWebhook.route({ url: '/limited', rateLimit: false })
// @ts-expect-error misspelt
app.openaiWebhook.route({ url: '/limited', rateLimit: { mx: 1 } })
// @ts-expect-error not a secret
await app.register(openaiWebhook, { secret: async () => undefined })
// @ts-expect-error a number is no secret
await app.register(openaiWebhook, { secret: [42] })

// What a user may write

export const verifier: Verifier = ({ rawBody, headers }, keys) => {
  same<typeof rawBody, Buffer>()
  return { webhookId: String(headers['x-id']), timestamp: 0, keyIndex: keys.length - 1 }
}
export const fullVerifier: Verifier = Object.assign(
  (): Verified => ({ webhookId: 'a', timestamp: 0 }),
  { checkHeaders: () => 0, keyBytes: (secret: string) => Buffer.from(secret) }
)
// @ts-expect-error verification is synchronous
export const lateVerifier: Verifier = async () => ({ webhookId: 'a', timestamp: 0 })
// @ts-expect-error no timestamp
export const looseVerifier: Verifier = () => ({ webhookId: 'a' })

const nothingDone: Claim = { state: 'claimed', token: 'a', finished: [] }

export const store: IdempotencyStore = {
  begin: (key, lease) => { same<[typeof key, typeof lease], [string, number]>(); return nothingDone },
  checkpoint: (_key, _token, handler) => { same<typeof handler, string>() },
  complete: (_key, _token, retention) => { same<typeof retention, number>() },
  extend: () => true,
  release: () => {}
}
export const lateStore: IdempotencyStore = {
  begin: async () => ({ state: 'done' }),
  checkpoint: async () => {},
  complete: async () => {},
  extend: async () => false,
  release: async () => {}
}
export class ClassStore implements IdempotencyStore {
  async begin (): Promise<Claim> { return { state: 'running' } }
  checkpoint (): void {}
  async complete (): Promise<void> {}
  extend (): boolean { return true }
  release (): void {}
}
// @ts-expect-error release() is missing
export const halfStore: IdempotencyStore = { begin: () => nothingDone, checkpoint () {}, complete () {}, extend: () => true }
// @ts-expect-error a claim needs its token
export const tokenless: IdempotencyStore = { ...store, begin: () => ({ state: 'claimed', finished: [] }) }

export const runner: Runner = {
  run (job) {
    same<typeof job, Job>()
    JSON.stringify(job)
  }
}
export class ClassRunner implements Runner {
  #host: RunnerHost | undefined
  async start (host: RunnerHost): Promise<void> { this.#host = host }
  async run (job: Job): Promise<void> {
    try {
      await this.#host?.process(job)
    } catch (error) {
      this.#host?.report(error, job)
    }
  }

  async close (): Promise<void> {}
}
/** Keeps what it gives up, for `deadLetters`. */
export class KeepingRunner implements Runner {
  #host: RunnerHost | undefined
  readonly #dead: DeadDelivery[] = []
  start (host: RunnerHost): void { this.#host = host }
  async run (job: Job): Promise<'duplicate' | undefined> {
    if (this.#dead.some(({ webhookId }) => webhookId === job.webhookId)) return 'duplicate'
    try {
      await this.#host?.process(job, 1)
    } catch (error) {
      const delivery = deadDelivery(job, 1, error)
      this.#dead.push(delivery)
      this.#host?.dead?.(delivery, error)
    }
    return undefined
  }

  dead (limit = 100, type?: string): DeadDelivery[] { return this.#dead.filter(({ event }) => type === undefined || event.type === type).slice(0, limit) }
  deadCount (): number { return this.#dead.length }
  requeue ({ webhookId }: DeliveryRef, { force = false } = {}): boolean { return force && this.#dead.some(each => each.webhookId === webhookId) }
}
// @ts-expect-error run() is missing
export const idle: Runner = { close () {} }

export const options: OpenAIWebhookOptions[] = [
  { verifier, idempotency: { store }, runner },
  { verifier: fullVerifier, idempotency: { store: lateStore }, runner: new ClassRunner() },
  { idempotency: { store: new ClassStore() }, runner: new KeepingRunner() }
]

// With exactOptionalPropertyTypes too, `undefined` means the default

app.register(openaiWebhook, { secret: process.env['SECRET'], tolerance: undefined, runner: undefined, idempotency: { store: memoryStore({ max: undefined }), lease: undefined } })
app.openaiWebhook.on('batch.failed', () => {}, { name: undefined })
app.openaiWebhook.route({ url: '/defaults', on: undefined, tenant: undefined, handler: undefined })

// Dead deliveries

app.openaiWebhook.onDead(delivery => {
  same<typeof delivery, DeadDelivery>()
  const job: Job = delivery
  same<DeadDelivery['errors'][number]['handler'], string | null>()
  JSON.stringify({ job, finished: delivery.finished, attempts: delivery.attempts, diedAt: delivery.diedAt })
}).onDead(async () => {})
export async function requeueAll ({ deadLetters }: typeof app.openaiWebhook): Promise<number> {
  for (const delivery of await deadLetters.list({ limit: 10, type: 'batch.failed' })) {
    const requeued: boolean = await deadLetters.requeue(delivery, { force: true })
    if (!requeued) await deadLetters.requeue({ endpoint: delivery.endpoint, webhookId: delivery.webhookId, tenant: 'acme' })
  }
  // @ts-expect-error a delivery is named by its endpoint too
  await deadLetters.requeue({ webhookId: 'wh_1' })
  return await deadLetters.count()
}

// An inbox: `tx` is the client of what was passed in, the event is what `on` says

declare const pgPool: Pool
declare const pglite: PGlite
declare const sqlite: { exec: (sql: string) => void, prepare: (sql: string) => { run: () => { changes: number }, get: () => unknown, all: () => unknown[] }, own: true }

app.openaiWebhook.on('batch.completed', postgresInbox(pgPool).once('one', async (tx, event, { webhookId }) => {
  const client: PoolClient = tx
  const type: 'batch.completed' = event.type
  await client.query('select $1, $2', [type, webhookId])
}))
app.openaiWebhook.on(['batch.failed', 'batch.expired'], postgresInbox(pglite).once('two', async (tx, event) => {
  const type: 'batch.failed' | 'batch.expired' = event.type
  // @ts-expect-error of two types
  const narrower: 'batch.failed' = event.type
  await tx.query<{ one: number }>('select 1 as one', [type, narrower])
}))
app.openaiWebhook.on('batch.*', sqliteInbox(sqlite).once('three', (tx, event) => {
  const own: true = tx.own
  return [own, event.data.id]
}))
app.openaiWebhook.route({ url: '/inbox', on: { 'response.completed': postgresInbox(pgPool).once('four', async (tx, event) => await tx.query(event.data.id)) } })
// @ts-expect-error without a pool there is no once()
postgresInbox().once('five', () => {})
const answered: Promise<boolean> = postgresInbox().first(async (text, values) => (await pgPool.query(text, values)).rows, 'six', { webhookId: 'wh_1', endpoint: '/' })
app.post('/settle', { config: { openaiWebhook: {} } }, async request => await postgresInbox().first(async () => [], 'seven', request.openaiWebhook))
const atOnce: boolean = sqliteInbox(sqlite).first(() => [], 'seven', { webhookId: 'wh_1', endpoint: '/', tenant: 'acme' })
// @ts-expect-error a promise is no answer of SQLite's
sqliteInbox(sqlite).first(async () => [], 'eight', { webhookId: 'wh_1', endpoint: '/' })
// @ts-expect-error not a client alone
postgresStore(new Client())
export const inboxes: Array<Inbox<PoolClient> | Promise<boolean> | boolean> = [postgresInbox(pgPool), answered, atOnce]

// Schemas of any library: the event as it arrives

const schemas = {
  old: Type.Object({ data: Type.Object({ id: Type.String(), note: Type.Optional(Type.String()) }) }),
  typebox: TypeBox1.Object({ data: TypeBox1.Object({ id: TypeBox1.String(), note: TypeBox1.Optional(TypeBox1.String()) }) }),
  unsafe: TypeBox1.Unsafe<{ data: { id: string } }>({ type: 'object' }),
  zod: z.object({ data: z.object({ id: z.string(), note: z.string().default('none') }) }),
  valibot: v.object({ data: v.object({ id: v.string(), note: v.optional(v.string(), 'none') }) }),
  arktype: arktype({ data: { id: 'string', note: "string = 'none'" } })
}
type BySchema = EventsOf<typeof schemas>
same<BySchema['old'], { data: { id: string, note?: string } }>()
same<BySchema['typebox'], { data: { id: string, note?: string } }>()
same<BySchema['unsafe'], { data: { id: string } }>()
same<BySchema['zod'], { data: { id: string, note?: string | undefined } }>()
same<BySchema['valibot'], { data: { id: string, note?: string | undefined } }>()
same<BySchema['arktype'], { data: { id: string, note?: string } }>()
app.register(openaiWebhook, { events: schemas })
// @ts-expect-error a plain JSON Schema
app.register(openaiWebhook, { events: { 'a.b': { type: 'object' } } })
