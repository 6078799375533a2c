import { Readable } from 'node:stream'
import { createContext, runInContext } from 'node:vm'
import Fastify from 'fastify'
import type { FastifyInstance, FastifyReply, FastifyRequest, FastifyServerOptions } from 'fastify'
import { HandlerFailed, InvalidSignature, MissingHeader } from '../../lib/errors.ts'
import openaiWebhook from '../../lib/index.ts'
import type { VerifiedRequest } from '../../lib/index.ts'
import { SECRET, sign, thin } from './deliveries.ts'
import type { Signed } from './deliveries.ts'

// Everything that an app may have around its routes, in every combination. A route of the plugin and a plain route that fails at the same
// point with the same error must give the same answer.

const turn = async (): Promise<void> => await new Promise(resolve => setImmediate(resolve))

export const fail = (value: unknown): never => { throw value }

// The values that are thrown

const realm = createContext()

const errorWith = (statusCode: number): Error => Object.assign(new Error('slow down'), { statusCode })

export const THROWN: Record<string, () => unknown> = {
  'an Error': () => new Error('broken'),
  'an Error with a status': () => errorWith(429),
  'an Error with the status 200': () => errorWith(200),
  'an object': () => ({ oops: true }),
  'an object with a status': () => ({ statusCode: 429, error: 'slow down' }),
  'an object with what others call a status': () => ({ status: 418 }),
  'a string': () => 'no',
  'a number': () => 7,
  true: () => true,
  'an Error of another realm': () => runInContext('new Error("from afar")', realm),
  'an Error of another realm with a status': () => runInContext('Object.assign(new Error("from afar"), { statusCode: 429 })', realm),
  'the empty string': () => '',
  null: () => null,
  nothing: () => undefined
}

/** Fastify does not take these for errors when they are thrown: it continues and skips the remaining hooks of the same kind. */
const NO_ERROR = new Set(['null', 'nothing'])

// What a hook does

type Done = (error?: unknown, payload?: unknown) => void

const WAYS: Record<string, (value: () => unknown, reply: FastifyReply, done: Done) => unknown> = {
  throws: value => fail(value()),
  rejects: value => Promise.reject(value()),
  'rejects later': async value => {
    await turn()
    throw value()
  },
  'calls done with': (value, _reply, done) => { done(value()) }
}

const SENDS: Record<string, (reply: FastifyReply, done: Done) => unknown> = {
  'sends an object': reply => { reply.send({ from: 'a hook' }) },
  'sends 202': reply => { reply.code(202).send('from a hook') },
  'sends 403': reply => { reply.code(403).send({ from: 'a hook' }) },
  'sends 302': reply => { reply.redirect('/elsewhere') },
  'sends an Error': reply => { reply.send(new Error('sent')) },
  'returns the reply': async reply => {
    await turn()
    return reply.code(204).send()
  }
}

export interface Behaviour {
  readonly name: string
  readonly kind: string
  readonly sends: boolean
  /** Whether Fastify may continue as if every hook of this kind had passed. */
  readonly skips: boolean
  readonly run: (reply: FastifyReply, done: Done) => unknown
}

const BEFORE_HANDLER = ['onRequest', 'preParsing', 'preValidation', 'preHandler']
const AROUND_ANSWER = ['preSerialization', 'onSend', 'onError', 'onResponse']

function behavioursOf (kind: string): Behaviour[] {
  const thrown = Object.entries(WAYS).flatMap(([way, run]) => Object.entries(THROWN).map(([what, value]) => ({
    name: `${kind} ${way} ${what}`,
    kind,
    sends: false,
    skips: way === 'throws' && NO_ERROR.has(what) && BEFORE_HANDLER.includes(kind),
    run: (reply: FastifyReply, done: Done) => run(value, reply, done)
  })))
  const sent = Object.entries(SENDS).map(([name, run]) => ({ name: `${kind} ${name}`, kind, sends: true, skips: false, run }))
  return BEFORE_HANDLER.includes(kind) ? [...thrown, ...sent] : thrown
}

const passes: Behaviour = { name: 'no hook', kind: 'none', sends: false, skips: false, run: () => {} }

export const BEHAVIOURS: readonly Behaviour[] = [passes, ...[...BEFORE_HANDLER, ...AROUND_ANSWER].flatMap(behavioursOf)]

// Error handlers

const AGAIN = '{"again":true}'

export type ErrorHandler = (error: unknown, request: FastifyRequest, reply: FastifyReply) => unknown

export const statusOf = (error: unknown): number => {
  const { statusCode } = Object(error) as { statusCode?: number }
  return statusCode !== undefined && statusCode >= 400 ? statusCode : 500
}

const bodyOf = (error: unknown): object => ({ handled: error instanceof Object && 'message' in error ? error.message : error })

export const HANDLERS: Record<string, ErrorHandler> = {
  'returns a body': (error, _request, reply) => {
    reply.code(statusOf(error))
    return bodyOf(error)
  },
  'returns a body, status forgotten': error => bodyOf(error),
  'returns a string, status forgotten': () => 'handled',
  sends: (error, _request, reply) => { reply.code(statusOf(error)).send(bodyOf(error)) },
  'returns what it sends': (error, _request, reply) => reply.code(statusOf(error)).send(bodyOf(error)),
  'sends 200': (error, _request, reply) => { reply.code(200).send(bodyOf(error)) },
  'sends 204': (_error, _request, reply) => { reply.code(204).send() },
  'sends 302': (_error, _request, reply) => { reply.redirect('/sorry') },
  'sends a stream': (_error, _request, reply) => { reply.send(Readable.from(['hand', 'led'])) },
  'sends a Response': (_error, _request, reply) => { reply.send(new Response('handled', { status: 200, headers: { 'x-from': 'response' } })) },
  'is async, returns a body': async (error, _request, reply) => {
    await turn()
    reply.code(statusOf(error))
    return bodyOf(error)
  },
  'is async, returns a body, status forgotten': async error => bodyOf(error),
  'is async, returns nothing': async () => {},
  'is async, sends later': async (error, _request, reply) => {
    await turn()
    await reply.code(statusOf(error)).send(bodyOf(error))
  },
  'sends later': (error, _request, reply) => { setImmediate(() => reply.code(statusOf(error)).send(bodyOf(error))) },
  'throws what it was given': error => { throw error },
  'throws another': () => { throw errorWith(507) },
  'throws an object': () => fail(JSON.parse(AGAIN)),
  'is async, throws what it was given': async error => { throw error },
  'is async, throws another': async () => {
    await turn()
    throw errorWith(507)
  },
  'is async, throws an object': async () => fail(JSON.parse(AGAIN)),
  'sends what it was given': (error, _request, reply) => { reply.send(error) }
}

// Where the error handler is set

export type Target = 'own' | 'route' | 'answering' | 'marked'

export const TARGETS: readonly Target[] = ['own', 'route', 'answering', 'marked']

/** The status of Fastify's default answer to an error. */
const errorStatus = (error: unknown): number => {
  const { statusCode, status } = Object(error) as { statusCode?: number, status?: number }
  return [statusCode, status].find(status => status !== undefined && status >= 400 && status <= 599) ?? 500
}

/** Adds a header with the status of the error that the first error handler received. */
const told = (handler: ErrorHandler): ErrorHandler => (error, request, reply) => {
  if (!reply.hasHeader('x-first')) reply.header('x-first', errorStatus(error))
  return handler(error, request, reply)
}

const settled = async (scope: FastifyInstance): Promise<void> => { await scope.register(async () => {}) }

async function withPlugin (scope: FastifyInstance, processed: Set<string>): Promise<void> {
  await scope.register(openaiWebhook, { secret: SECRET, path: '/own' })
  scope.openaiWebhook.onAny((_event, { webhookId, request }) => work(request!, processed, webhookId))
}

function work (request: FastifyRequest, processed: Set<string>, webhookId: string): void {
  if (request.headers['x-delivery'] === 'failing') throw new Error('disk full')
  processed.add(webhookId)
}

/** The routes of `.route()`. They are declared before whatever comes after the plugin. */
function ownRoutes (scope: FastifyInstance, processed: Set<string>): void {
  scope.openaiWebhook
    .route({ url: '/route' })
    .route({ url: '/answering', handler: async request => { work(request, processed, request.openaiWebhook.webhookId) } })
}

/** The routes of the user, and the plain routes that fail at the same points. They are declared last. */
function userRoutes (scope: FastifyInstance, processed: Set<string>, errorHandler?: ErrorHandler): void {
  const own = errorHandler === undefined ? {} : { errorHandler: told(errorHandler) }
  scope.post('/marked', { ...own, config: { openaiWebhook: {} } }, async request => { work(request, processed, (request as VerifiedRequest).openaiWebhook.webhookId) })
  const refused = (delivery: string, error: () => Error) => (request: FastifyRequest): Error | undefined =>
    request.headers['x-delivery'] === delivery ? error() : undefined
  const header = refused('no header', () => new MissingHeader('webhook-signature'))
  const signature = refused('bad signature', () => new InvalidSignature())
  const failing = refused('failing', () => new HandlerFailed())
  const handler = (request: FastifyRequest, reply: FastifyReply): void => {
    const error = failing(request)
    if (error !== undefined) reply.send(error)
    else reply.code(200).header('content-type', 'application/json; charset=utf-8').send('{"received":true}')
  }
  const onRequest = (request: FastifyRequest, _reply: FastifyReply, done: (error?: Error) => void): void => done(header(request))
  scope.post('/plain', {
    onRequest,
    preHandler: (request, _reply, done) => done(signature(request)),
    handler
  })
  scope.post('/plain-marked', {
    ...own,
    onRequest,
    preParsing: (request, _reply, payload, done) => done(signature(request) ?? null, payload),
    handler
  })
}

type Place = (app: FastifyInstance, handler: ErrorHandler | undefined, processed: Set<string>) => Promise<void>

function set (scope: FastifyInstance, handler: ErrorHandler | undefined): void {
  if (handler !== undefined) scope.setErrorHandler(told(handler))
}

export const PLACES: Record<string, Place> = {
  'before the plugin': async (app, handler, processed) => {
    set(app, handler)
    await withPlugin(app, processed)
    ownRoutes(app, processed)
    userRoutes(app, processed)
  },
  'after the plugin': async (app, handler, processed) => {
    await withPlugin(app, processed)
    ownRoutes(app, processed)
    await settled(app)
    set(app, handler)
    userRoutes(app, processed)
  },
  'in a parent': async (app, handler, processed) => {
    set(app, handler)
    await app.register(async scope => {
      await withPlugin(scope, processed)
      ownRoutes(scope, processed)
      userRoutes(scope, processed)
    })
  },
  'in a parent, later': async (app, handler, processed) => {
    app.register(async scope => {
      await withPlugin(scope, processed)
      ownRoutes(scope, processed)
      userRoutes(scope, processed)
    })
    set(app, handler)
    await app.after()
  },
  'in the scope of the plugin, where the parent has another': async (app, handler, processed) => {
    set(app, HANDLERS['sends what it was given'])
    await app.register(async scope => {
      await withPlugin(scope, processed)
      ownRoutes(scope, processed)
      await settled(scope)
      set(scope, handler)
      userRoutes(scope, processed)
    })
  },
  'on the route itself': async (app, handler, processed) => {
    set(app, HANDLERS['is async, throws another'])
    await withPlugin(app, processed)
    userRoutes(app, processed, handler)
  },
  'in a scope below the plugin': async (app, handler, processed) => {
    await withPlugin(app, processed)
    await app.register(async scope => {
      set(scope, handler)
      ownRoutes(scope, processed)
      userRoutes(scope, processed)
    })
  },
  'before the plugin, and after it another that fails': async (app, handler, processed) => {
    set(app, handler)
    await app.register(async scope => {
      await withPlugin(scope, processed)
      ownRoutes(scope, processed)
      await settled(scope)
      set(scope, HANDLERS['is async, throws another'])
      userRoutes(scope, processed)
    })
  }
}

// The cells

export const DELIVERIES = ['good', 'bad signature', 'no header', 'failing'] as const

export interface Cell {
  readonly behaviour: Behaviour
  readonly handler: string
  readonly place: string
  readonly target: Target
  readonly delivery: typeof DELIVERIES[number]
  /** Whether the hook was added before or after the plugin. */
  readonly at: 'early' | 'late'
}

export const nameOf = ({ behaviour, handler, place, target, delivery, at }: Cell): string =>
  `${delivery} delivery to ${target}; ${behaviour.name} (${at}); error handler ${handler}, set ${place}`

export interface Answer {
  readonly status: number
  readonly headers: Record<string, unknown>
  readonly body: string
}

export interface Composed {
  readonly app: FastifyInstance
  readonly processed: Set<string>
}

/** Builds an app whose hooks do what the `x-hook` header of a request says. */
export async function compose (place: string, handler: string, server: FastifyServerOptions = {}): Promise<Composed> {
  const app = Fastify(server)
  const processed = new Set<string>()
  addHooks(app, 'early')
  await PLACES[place]!(app, HANDLERS[handler], processed)
  addHooks(app, 'late')
  await app.ready()
  return { app, processed }
}

function addHooks (app: FastifyInstance, at: string): void {
  for (const kind of [...BEFORE_HANDLER, ...AROUND_ANSWER]) {
    const done = new WeakSet<FastifyRequest>()
    const act = (request: FastifyRequest, reply: FastifyReply, next: Done, payload?: unknown): unknown => {
      // These hooks must not fail on what Fastify's default error handler sends: then even a plain route gives no answer ("cb is not a
      // function").
      if (kind === 'preSerialization' && !isOfHandler(payload)) return next()
      if (kind === 'onSend' && payload === AGAIN) return next()
      const behaviour = BEHAVIOURS[Number(request.headers['x-hook'])]
      // Acts once per request, because the answer to an error passes the same hooks again.
      if (behaviour?.kind !== kind || request.headers['x-at'] !== at || done.has(request)) return next()
      done.add(request)
      return behaviour.run(reply, next)
    }
    const hook = ['preParsing', 'preSerialization', 'onSend', 'onError'].includes(kind)
      ? (request: FastifyRequest, reply: FastifyReply, payload: unknown, next: Done) => act(request, reply, next, payload)
      : (request: FastifyRequest, reply: FastifyReply, next: Done) => act(request, reply, next)
    app.addHook(kind as 'onRequest', hook as never)
  }
}

const isOfHandler = (payload: unknown): boolean => 'handled' in Object(payload) || 'from' in Object(payload)

function signed (delivery: string): Signed {
  const good = sign(thin('batch.failed'))
  if (delivery === 'bad signature') return { ...good, headers: { ...good.headers, 'webhook-signature': `v1,${Buffer.alloc(32).toString('base64')}` } }
  if (delivery !== 'no header') return good
  const { 'webhook-signature': _, ...headers } = good.headers
  return { ...good, headers }
}

export function requestOf ({ behaviour, delivery, at }: Cell): Signed {
  const { headers, body } = signed(delivery)
  return { body, headers: { ...headers, 'x-hook': String(BEHAVIOURS.indexOf(behaviour)), 'x-at': at, 'x-delivery': delivery } }
}

export type Ask = (url: string, request: Signed) => Promise<Answer>

export const inject = (app: FastifyInstance): Ask => async (url, { headers, body }) => {
  const response = await app.inject({ method: 'POST', url, headers, payload: body })
  return { status: response.statusCode, headers: response.headers, body: response.body }
}

/**
 * Compares the answer with that of a plain route.
 *
 * @returns the difference, or `undefined`
 */
export async function fault (cell: Cell, { processed }: Composed, ask: Ask): Promise<string | undefined> {
  const { behaviour, target, delivery } = cell
  const request = requestOf(cell)
  const ours = await inTime(ask(`/${target}`, request))
  if (ours === undefined) return 'no answer'
  const isProcessed = processed.has(request.headers['webhook-id']!)
  const isSuccess = ours.status < 300
  if (isSuccess && !isProcessed && !behaviour.sends) return `nothing was processed, and the answer is ${show(ours)}`
  if (isProcessed && delivery !== 'good') return 'it was processed'
  if (behaviour.skips && (delivery !== 'good' || behaviour.kind === (target === 'marked' ? 'preParsing' : 'preHandler'))) {
    return ours.status >= 400 ? undefined : `verification was skipped, and the answer is ${show(ours)}`
  }
  const plain = await ask(target === 'marked' ? '/plain-marked' : '/plain', request)
  const [seen, wanted] = [show(ours), show(ofRefusal(plain, isProcessed, ours))]
  return seen === wanted ? undefined : `expected ${wanted}, got ${seen}`
}

/** ms to wait for an answer. A later one is taken as none. */
const PATIENCE = 10_000

async function inTime (answer: Promise<Answer>): Promise<Answer | undefined> {
  let timer: NodeJS.Timeout | undefined
  const late = new Promise<undefined>(resolve => { timer = setTimeout(resolve, PATIENCE, undefined) })
  const first = await Promise.race([answer, late])
  clearTimeout(timer)
  return first
}

/** The answer to expect. An error handler cannot turn a refusal into a success. */
function ofRefusal (plain: Answer, isProcessed: boolean, ours: Answer): Answer {
  const first = plain.headers['x-first']
  if (first === undefined || plain.status >= 400 || isProcessed) return plain
  // Fastify drops the body of a 204.
  return plain.status === 204 ? { ...ours, status: Number(first) } : { ...plain, status: Number(first) }
}

function show ({ status, headers, body }: Answer): string {
  const { date, 'keep-alive': _, ...others } = headers
  return JSON.stringify([status, others, body])
}

/**
 * Adapts the target to the place: a scope below the plugin has no default path, and only the user's own routes have error handlers of their
 * own.
 */
function targetIn (place: string, target: Target): Target {
  if (place === 'on the route itself') return 'marked'
  return place === 'in a scope below the plugin' && target === 'own' ? 'route' : target
}

/** @param every 1 for all cells; a larger number for that fraction of them, which still includes every value of each dimension */
export function cellsOf (every: number, places: readonly string[] = Object.keys(PLACES), targets: readonly Target[] = TARGETS): Cell[] {
  const cells: Cell[] = []
  let n = 0
  const turnOf = <T>(values: readonly T[], step: number): T => values[Math.floor(n / step) % values.length]!
  for (const behaviour of BEHAVIOURS) {
    for (const handler of ['none', ...Object.keys(HANDLERS)]) {
      if (n++ % every !== 0) continue
      const target = turnOf(targets, every * 3)
      const place = turnOf(places, every)
      cells.push({
        behaviour,
        handler,
        place,
        target: targetIn(place, target),
        delivery: turnOf(DELIVERIES, every * 5),
        at: turnOf(['early', 'late'], every * 2)
      })
    }
  }
  return cells
}

/** Returns the differences in these cells. One app is built for each place and error handler. */
export async function faults (cells: readonly Cell[], reach: (composed: Composed) => Promise<Ask> | Ask, server?: FastifyServerOptions): Promise<string[]> {
  const apps = new Map<string, { composed: Composed, ask: Ask }>()
  const found: string[] = []
  for (const cell of cells) {
    const key = `${cell.place}: ${cell.handler}`
    let entry = apps.get(key)
    if (entry === undefined) {
      const composed = await compose(cell.place, cell.handler, server)
      apps.set(key, entry = { composed, ask: await reach(composed) })
    }
    const differs = await fault(cell, entry.composed, entry.ask)
    if (differs !== undefined) found.push(`${nameOf(cell)}: ${differs}`)
  }
  await Promise.all([...apps.values()].map(({ composed }) => composed.app.close()))
  return found
}
