import { isId } from '../checks.ts'
import { officialEntries } from '../events/index.ts'
import type { EventEntry } from '../events/schema.ts'
import { DEFAULTS } from '../options.ts'
import { partOfKey } from '../runners/runner.ts'
import type { Job } from '../runners/runner.ts'

/** Event types that occur at most once for a resource, so that a second delivery contains nothing new. */
const ONCE = new Set(Object.entries<EventEntry>(officialEntries).filter(([, { once }]) => once).map(([type]) => type))

/**
 * The store's key for the resource that an event is about. `undefined` if the same resource may have such an event again, such as an agent
 * session that becomes idle, or if that is not known.
 *
 * The key is `resource <type> <resource id>`, followed by `<endpoint> <tenant>` if there is a tenant, or else by `<endpoint>` unless that is the
 * default one. The endpoint is part of the key because each endpoint has its own handlers.
 */
export function resourceKeyOf ({ endpoint, tenant, event }: Job): string | undefined {
  if (!ONCE.has(event.type)) return undefined
  const { id } = (event as { data?: { id?: unknown } }).data ?? {}
  if (!isId(id)) return undefined
  const key = `resource ${event.type} ${id}`
  if (tenant !== undefined) return `${key} ${partOfKey(endpoint)} ${tenant}`
  return endpoint === DEFAULTS.path ? key : `${key} ${partOfKey(endpoint)}`
}
