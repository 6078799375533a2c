import { UnexpectedList } from '../errors.ts'
import type { ResourceClient } from './kinds.ts'

/** A resource that has ended, and the event that tells of it. */
export interface Ended {
  readonly type: string
  /** The event's data; its `id` is the resource's. */
  readonly data: { readonly id: string }
  /** Unix seconds: when it ended; where the API does not say that, when it was created. */
  readonly endedAt: number
}

type Item = Readonly<Record<string, unknown>>

interface Family {
  /** The event that is sent for each final state, by the resource's `status`. */
  readonly types: Readonly<Record<string, string>>
  readonly path: (evalId: string) => string
  /** How the API is asked to begin with the newest, where it does not by itself. */
  readonly query?: object
  readonly headers?: Readonly<Record<string, string>>
  /** When it ended, in Unix seconds. */
  readonly endedAt: (item: Item, status: string) => unknown
  /** Seconds that it may take to end. Lists are by creation: they are read that much further back. */
  readonly takes: number
  readonly data?: (item: Item) => object
}

const DAY = 86_400

/** What the API can list, by the family of its events. */
const FAMILIES: Readonly<Record<string, Family>> = {
  'batch.*': {
    types: { cancelled: 'batch.cancelled', completed: 'batch.completed', expired: 'batch.expired', failed: 'batch.failed' },
    path: () => '/batches',
    endedAt: (item, status) => item[`${status}_at`],
    takes: 2 * DAY // it expires after one
  },
  'fine_tuning.job.*': {
    types: { cancelled: 'fine_tuning.job.cancelled', failed: 'fine_tuning.job.failed', succeeded: 'fine_tuning.job.succeeded' },
    path: () => '/fine_tuning/jobs',
    endedAt: item => item['finished_at'],
    takes: 30 * DAY
  },
  'video.*': {
    types: { completed: 'video.completed', failed: 'video.failed' },
    path: () => '/videos',
    query: { order: 'desc' },
    endedAt: item => item['completed_at'],
    takes: DAY
  },
  'agent.session.*': {
    // Idle is no end: a session may be that many times.
    types: { failed: 'agent.session.failed' },
    path: () => '/agents/sessions',
    query: { order: 'desc' },
    headers: { 'OpenAI-Beta': 'agents=v1' },
    endedAt: item => item['last_active_at'],
    takes: 7 * DAY,
    data: ({ environment }) => {
      const { type, id } = Object(environment) as { type?: unknown, id?: unknown }
      return { environment_type: typeof type === 'string' ? type : 'none', ...(typeof id === 'string' && { environment_id: id }) }
    }
  },
  'eval.run.*': {
    types: { canceled: 'eval.run.canceled', completed: 'eval.run.succeeded', failed: 'eval.run.failed' },
    path: evalId => `/evals/${encodeURIComponent(evalId)}/runs`,
    query: { order: 'desc' },
    endedAt: () => undefined,
    takes: 0
  }
}

export const EVALS = 'eval.run.*'
export const FAMILY_NAMES = Object.keys(FAMILIES)

/** The event types of a family that can be made. */
export function typesOf (family: string): string[] {
  return Object.values(FAMILIES[family]!.types)
}

/** As many as the API gives at once. */
const PAGE = 100

/**
 * The resources of a family that have ended since a time, by pages, newest first.
 *
 * Throws the SDK's errors, and FST_OPENAI_WEBHOOK_UNEXPECTED_LIST.
 *
 * @param since Unix seconds
 * @param evalId of `eval.run.*`
 */
export async function * endedSince (client: ResourceClient, family: string, since: number, { evalId = '', signal }: { evalId?: string, signal?: AbortSignal | undefined } = {}): AsyncGenerator<Ended[]> {
  const { types, path, query, headers, endedAt, takes, data } = FAMILIES[family]!
  const at = path(evalId)
  for (let after: string | undefined; ;) {
    // By its path, not by the SDK's own lists: these take an answer that is not the API's for an empty page.
    const page = await client.get(at, {
      query: { limit: PAGE, ...query, ...(after !== undefined && { after }) },
      ...(headers && { headers }),
      ...(signal && { signal })
    })
    const { items, hasMore } = readPage(page, at)
    yield items.flatMap(item => {
      const type = types[item.status]
      if (type === undefined) return []
      const ended = endedAt(item.all, item.status)
      const time = typeof ended === 'number' ? ended : item.createdAt
      return time < since ? [] : [{ type, data: { id: item.id, ...data?.(item.all) }, endedAt: time }]
    })
    const last = items.at(-1)?.id
    if (!hasMore || last === undefined || items.every(({ createdAt }) => createdAt < since - takes)) return
    if (last === after) throw new UnexpectedList(at, 'another page than the one before')
    after = last
  }
}

interface Page {
  readonly items: ReadonlyArray<{ readonly id: string, readonly status: string, readonly createdAt: number, readonly all: Item }>
  readonly hasMore: boolean
}

/** @throws FST_OPENAI_WEBHOOK_UNEXPECTED_LIST */
function readPage (page: unknown, at: string): Page {
  const { data, has_more: hasMore } = Object(page) as { data?: unknown, has_more?: unknown }
  if (!Array.isArray(data)) throw new UnexpectedList(at, 'a list')
  const items = data.map((all: Item) => {
    const { id, status, created_at: createdAt } = Object(all) as Item
    if (typeof id !== 'string' || typeof status !== 'string' || typeof createdAt !== 'number') throw new UnexpectedList(at, 'each to have an id, a status and created_at')
    return { id, status, createdAt, all }
  })
  return { items, hasMore: hasMore === true }
}
