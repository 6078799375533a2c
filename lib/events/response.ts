import { family, Thin } from './schema.ts'

export const response = family({
  'response.cancelled': {
    description: 'Sent when a background response has been cancelled. data.id is the model response id.',
    data: Thin,
    sample: { id: 'resp_685c059ae39c8190' }
  },
  'response.completed': {
    description: 'Sent when a background response has been completed. data.id is the model response id.',
    data: Thin,
    sample: { id: 'resp_685c059ae39c8190' }
  },
  'response.failed': {
    description: 'Sent when a background response has failed. data.id is the model response id.',
    data: Thin,
    sample: { id: 'resp_685c059ae39c8190' }
  },
  'response.incomplete': {
    description: 'Sent when a background response has been interrupted. data.id is the model response id.',
    data: Thin,
    sample: { id: 'resp_685c059ae39c8190' }
  }
})
