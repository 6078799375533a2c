import { guideEvents } from 'fastify-openai-webhook'
import { sampleEvent, sampleTypes } from 'fastify-openai-webhook/testing'
import { template } from './deliveries.mjs'

const COUNT = 40
/** Types that the plugin knows without being told. */
const known = sampleTypes.filter(type => !Object.hasOwn(guideEvents, type)).slice(0, COUNT)

/** What is missing to 40, for the `events` option. */
export const ownTypes = Array.from({ length: COUNT - known.length }, (_, index) => `own.event_${index + 1}`)

/** 40 event types, that of the thin event first. */
export const types = ['response.completed', ...[...known, ...ownTypes].filter(type => type !== 'response.completed')]

/** An event of each type, all of one size. */
export function templatesOf (types, size) {
  return types.map(type => {
    const { id, data, ...envelope } = ownTypes.includes(type) ? { ...sampleEvent('response.completed'), type } : sampleEvent(type)
    const event = { ...envelope, data: { ...data, note: '' } }
    return template(event, size, ({ data }, length) => { data.note = '.'.repeat(length) })
  })
}
