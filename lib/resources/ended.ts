import { UnexpectedList } from '../errors.ts'
import { AGENTS } from './kinds.ts'
import type { ResourceClient } from './kinds.ts'

/** A resource that has ended, and the event that OpenAI sent for it. */
export interface Ended {
  readonly type: string
  /** The `data` of the event. Its `id` is that of the resource. */
  readonly data: { readonly id: string }
  /** When the resource ended, in Unix seconds. When it was created, if the API does not say when it ended. */
  readonly endedAt: number
}

type Item = Readonly<Record<string, unknown>>

interface Family {
  /** The event type for each final value of the resource's `status`. */
  readonly types: Readonly<Record<string, string>>
  readonly path: (evalId: string) => string
  /** The query that makes the API list the newest first, where that is not the default. */
  readonly query?: object
  readonly headers?: Readonly<Record<string, string>>
  /** When the resource ended, in Unix seconds. */
  readonly endedAt: (item: Item, status: string) => unknown
  /** Seconds that a resource may take to end. Lists are ordered by creation, so they are read that much further back. */
  readonly takes: number
  readonly data?: (item: Item) => object
}

const DAY = 86_400

/** The families of events whose resources the API can list. */
const FAMILIES: Readonly<Record<string, Family>> = {
  'batch.*': {
    types: { cancelled: 'batch.cancelled', completed: 'batch.completed', expired: 'batch.expired', failed: 'batch.failed' },
    path: () => '/batches',
    endedAt: (item, status) => item[`${status}_at`],
    takes: 2 * DAY // a batch expires after one day
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
    // `idle` is not a final state: a session may become idle many times.
    types: { failed: 'agent.session.failed' },
    path: () => '/agents/sessions',
    query: { order: 'desc' },
    headers: AGENTS,
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

/** The largest page that the API returns. */
const PAGE = 100

/**
 * Yields the resources of a family that have ended since a time, page by page, the newest first.
 *
 * Throws the SDK's errors, and FST_OPENAI_WEBHOOK_UNEXPECTED_LIST.
 *
 * @param since Unix seconds
 * @param options.evalId the eval whose runs are listed, for `eval.run.*`
 */
export async function * endedSince (client: ResourceClient, family: string, since: number, { evalId = '', signal }: { evalId?: string, signal?: AbortSignal | undefined } = {}): AsyncGenerator<Ended[]> {
  const { types, path, query, headers, endedAt, takes, data } = FAMILIES[family]!
  const at = path(evalId)
  for (let after: string | undefined; ;) {
    // The list is requested by its path, because the SDK's own lists accept an answer that is not the API's as an empty page.
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
