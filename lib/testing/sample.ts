import { randomUUID } from 'node:crypto'
import { isObject } from '../checks.ts'
import { guideEntries, officialEntries } from '../events/index.ts'
import type { GuideEvents, OfficialEvents } from '../events/index.ts'
import { nearest } from '../nearest.ts'

/** OpenAI's events, and the events that only the community guide documents. */
type SampleEvents = OfficialEvents & Omit<GuideEvents, keyof OfficialEvents>

export type SampleType = keyof SampleEvents & string

type DeepPartial<T> = T extends readonly unknown[] ? T : T extends object ? { [Key in keyof T]?: DeepPartial<T[Key]> } : T

/** OpenAI's own samples replace the guide's samples of the same type, although the guide's have more fields. */
const entries: Readonly<Record<string, { sample: object }>> = { ...guideEntries, ...officialEntries }

/** Every event type that `sampleEvent` knows. */
export const sampleTypes = Object.keys(entries) as SampleType[]

/**
 * Returns a realistic event of a type, with a new id and the present time.
 *
 * @param overrides values for fields of the sample; objects are merged, arrays are replaced
 * @throws TypeError for an unknown type
 */
export function sampleEvent<Type extends SampleType> (type: Type, overrides: DeepPartial<SampleEvents[Type]> = {} as never): SampleEvents[Type] {
  const entry = Object.hasOwn(entries, type) ? entries[type] : undefined
  if (entry === undefined) throw new TypeError(`sampleEvent: expected an event type such as "batch.failed", got "${String(type)}"${nearest(String(type), Object.keys(entries))}`)
  const event = {
    id: `evt_${randomUUID().replaceAll('-', '')}`,
    object: 'event',
    created_at: Math.floor(Date.now() / 1000),
    type,
    data: structuredClone(entry.sample)
  }
  return merge(event, overrides) as SampleEvents[Type]
}

/** A sample about a resource of its own: with `idempotency.reconcile`, a second event of one resource would be a duplicate. */
export function newSample (type: SampleType): SampleEvents[SampleType] {
  const event = sampleEvent(type)
  const data = event.data as { id?: string }
  if (data.id !== undefined) data.id = data.id.replace(/\w{6,12}$/, end => randomUUID().slice(-end.length))
  return event
}

function merge (into: Record<string, unknown>, from: object): Record<string, unknown> {
  for (const [key, value] of Object.entries(from)) {
    const present = Object.hasOwn(into, key) ? into[key] : undefined
    const merged = isObject(present) && isObject(value) ? merge(present, value) : value
    // Defined, because setting `__proto__` would set the prototype.
    Object.defineProperty(into, key, { value: merged, enumerable: true, configurable: true, writable: true })
  }
  return into
}
