import { family, Thin } from './schema.ts'

const sample = { id: 'resp_685c059ad29c819095b60e7fa1c3d8420b7f4e91c6a2d35e' }

export const response = family({
  'response.cancelled': {
    description: 'Sent when a background response has been cancelled. data.id is the model response id.',
    data: Thin,
    sample,
    once: true
  },
  'response.completed': {
    description: 'Sent when a background response has been completed. data.id is the model response id.',
    data: Thin,
    sample,
    once: true
  },
  'response.failed': {
    description: 'Sent when a background response has failed. data.id is the model response id.',
    data: Thin,
    sample,
    once: true
  },
  'response.incomplete': {
    description: 'Sent when a background response has been interrupted. data.id is the model response id.',
    data: Thin,
    sample,
    once: true
  }
})
