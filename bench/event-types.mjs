import { officialEntries } from '../dist/events/index.js'
import { template } from './deliveries.mjs'

const COUNT = 40
const official = Object.keys(officialEntries).slice(0, COUNT)

/** What is missing to 40, for the `events` option. */
export const ownTypes = Array.from({ length: COUNT - official.length }, (_, index) => `own.event_${index + 1}`)

/** 40 event types, that of the thin event first. */
export const types = ['response.completed', ...[...official, ...ownTypes].filter(type => type !== 'response.completed')]

/** An event of each type, all of one size. */
export function templatesOf (types, size) {
  return types.map(type => {
    const data = officialEntries[type]?.sample ?? { id: 'own_685c059ae39c8190' }
    const event = { object: 'event', created_at: Math.floor(Date.now() / 1000), type, data: { ...data, note: '' } }
    return template(event, size, ({ data }, length) => { data.note = '.'.repeat(length) })
  })
}
