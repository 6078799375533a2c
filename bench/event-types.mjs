import { guideEvents } from 'fastify-openai-webhook'
import { sampleEvent, sampleTypes } from 'fastify-openai-webhook/testing'
import { template } from './deliveries.mjs'

const COUNT = 40
/** Event types that the plugin knows without the `events` option. */
const known = sampleTypes.filter(type => !Object.hasOwn(guideEvents, type)).slice(0, COUNT)

/** The event types that are missing to 40, for the `events` option. */
export const ownTypes = Array.from({ length: COUNT - known.length }, (_, index) => `own.event_${index + 1}`)

/** 40 event types, the type of the thin event first. */
export const types = ['response.completed', ...[...known, ...ownTypes].filter(type => type !== 'response.completed')]

/** One event of each type, all of the same size. */
export function templatesOf (types, size) {
  return types.map(type => {
    const { id, data, ...envelope } = ownTypes.includes(type) ? { ...sampleEvent('response.completed'), type } : sampleEvent(type)
    const event = { ...envelope, data: { ...data, note: '' } }
    return template(event, size, ({ data }, length) => { data.note = '.'.repeat(length) })
  })
}
