import { ANYTHING, SIGNAL, assertRules, isId, show } from '../checks.ts'
import { InvalidOptions, NoResource } from '../errors.ts'
import { AGENTS, insteadOf, kindOf } from './kinds.ts'
import type { Problem, ResourceClient, ResourceKind, ResourceOf } from './kinds.ts'

interface EventLike {
  readonly type: string
}

/** A type that fails to compile for an event without a resource. The compiler's error says what to call instead. */
export type Retrievable<Event extends EventLike> = [Problem<Event['type']>] extends [never] ? unknown : Problem<Event['type']>

export interface RetrieveOptions {
  /** Aborts the request. A handler has such a signal in its context. */
  signal?: AbortSignal | undefined
  /** The eval that a run belongs to. The API requires it, and events of eval runs do not contain it. */
  evalId?: string | undefined
}

type Options<Type extends string> = [Extract<Type, `eval.run.${string}`>] extends [never]
  ? [options?: RetrieveOptions]
  : [options: RetrieveOptions & { evalId: string }]

interface Access {
  /** The path of the client's property that has `retrieve`. */
  readonly at: readonly string[]
  /** The parameters of `retrieve` between the id and the request's options. */
  readonly params?: (evalId: string | undefined) => object
  /** The path in the API, for a client without such a method. */
  readonly path: (id: string, evalId: string | undefined) => string
  readonly headers?: Readonly<Record<string, string>>
}

const ACCESS: Readonly<Record<ResourceKind, Access>> = {
  'agent.environment': { at: ['beta', 'agents', 'environments'], path: id => `/agents/environments/${id}`, headers: AGENTS },
  'agent.session': { at: ['beta', 'agents', 'sessions'], path: id => `/agents/sessions/${id}`, headers: AGENTS },
  batch: { at: ['batches'], path: id => `/batches/${id}` },
  'eval.run': { at: ['evals', 'runs'], params: evalId => ({ eval_id: evalId }), path: (id, evalId) => `/evals/${evalId!}/runs/${id}` },
  'fine_tuning.job': { at: ['fineTuning', 'jobs'], path: id => `/fine_tuning/jobs/${id}` },
  response: { at: ['responses'], params: () => ({}), path: id => `/responses/${id}` },
  'safety.alert': { at: ['safety', 'alerts'], path: id => `/safety/alerts/${id}` },
  'safety.case': { at: ['safety', 'cases'], path: id => `/safety/cases/${id}` },
  video: { at: ['videos'], path: id => `/videos/${id}` }
}

/**
 * Fetches the resource that a thin event is about, by its `data.id`: a Response, Batch, FineTuningJob, eval run, agent session or
 * environment, safety alert or case, or Video. It uses the SDK's own method if there is one, else the path in the API.
 *
 * Rejects with FST_OPENAI_WEBHOOK_NO_RESOURCE for an event without a resource, with FST_OPENAI_WEBHOOK_INVALID_OPTIONS when the id or
 * `evalId` is missing, and with the SDK's errors.
 *
 * @param client a client of the official `openai` package, with an API key of the project that the event belongs to
 * @returns the resource, with the client's own type for the resource of this event type
 */
export async function retrieve<Client extends ResourceClient, Event extends EventLike> (
  client: Client,
  event: Event & Retrievable<Event>,
  ...[options = {}]: Options<Event['type']>
): Promise<ResourceOf<Client, Event['type']>> {
  assertRules('retrieve()', options, { signal: SIGNAL, evalId: ANYTHING })
  const { type, data } = (event ?? {}) as Partial<EventLike> & { data?: { id?: unknown } }
  if (typeof type !== 'string') throw new InvalidOptions(`retrieve(): expected an event, as handlers get it, got ${typeof event === 'object' ? 'an object without a type' : `a value of type ${typeof event}`}`)
  assertClient('retrieve()', client)
  const kind = kindOf(type)
  if (kind === undefined) throw new NoResource(type, insteadOf(type))
  const id = assertId('retrieve(): expected event.data.id', data?.id)
  const { signal, evalId } = options as RetrieveOptions
  if (kind === 'eval.run') assertId('retrieve(): expected evalId', evalId)
  return await fetchResource(client, kind, id, { ...(signal !== undefined && { signal }) }, evalId) as ResourceOf<Client, Event['type']>
}

async function fetchResource (client: ResourceClient, kind: ResourceKind, id: string, options: object, evalId: string | undefined): Promise<unknown> {
  const { at, params, path, headers } = ACCESS[kind]
  const service = serviceAt(client, at)
  if (typeof service?.['retrieve'] !== 'function') {
    return await client.get(path(encodeURIComponent(id), evalId && encodeURIComponent(evalId)), { ...options, ...(headers && { headers }) })
  }
  return await service['retrieve'](id, ...params === undefined ? [] : [params(evalId)], options)
}

/** The property of the client at this path, or `undefined` when the client lacks it. */
function serviceAt (client: object, at: readonly string[]): Record<string, unknown> | undefined {
  return at.reduce<Record<string, unknown> | undefined>((part, name) => part?.[name] as typeof part, client as Record<string, unknown>)
}

/** @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS */
export function assertClient (caller: string, client: unknown): void {
  if (typeof client !== 'object' || client === null) throw new InvalidOptions(`${caller}: expected a client of the openai package as the first argument, got ${show(client)}`)
}

/** Checks an id that becomes part of a path. @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS */
export function assertId (expected: string, id: unknown): string {
  if (!isId(id) || /^\.+$/.test(id)) {
    throw new InvalidOptions(`${expected} to be an id of 1 to 256 visible ASCII characters, got ${typeof id === 'string' ? 'other text' : `a value of type ${typeof id}`}`)
  }
  return id
}
