import { isId } from '../checks.ts'
import { officialEntries } from '../events/index.ts'
import type { EventEntry } from '../events/schema.ts'
import { DEFAULTS } from '../options.ts'
import type { Job } from '../runners/runner.ts'

/** Event types of which a resource has one at most: a second delivery can tell nothing new. */
const ONCE = new Set(Object.entries<EventEntry>(officialEntries).filter(([, { once }]) => once).map(([type]) => type))

/**
 * The key of what an event is about, in the store; `undefined` where the same resource may have such an event again, such as
 * an agent session that is idle, or where nothing is known of that.
 *
 * `resource <type> <resource id>`, followed by the endpoint unless that is the default one, since each has handlers of its own,
 * and by the tenant.
 */
export function resourceKeyOf ({ endpoint, tenant, event }: Job): string | undefined {
  if (!ONCE.has(event.type)) return undefined
  const { id } = (event as { data?: { id?: unknown } }).data ?? {}
  if (!isId(id)) return undefined
  const key = `resource ${event.type} ${id}`
  if (tenant !== undefined) return `${key} ${endpoint} ${tenant}`
  return endpoint === DEFAULTS.path ? key : `${key} ${endpoint}`
}
