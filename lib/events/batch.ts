import { family, Thin } from './schema.ts'

export const batch = family({
  'batch.cancelled': {
    description: 'Sent when a batch API request has been cancelled. data.id is the batch id.',
    data: Thin,
    sample: { id: 'batch_685c059ae39c8190' }
  },
  'batch.completed': {
    description: 'Sent when a batch API request has been completed. data.id is the batch id.',
    data: Thin,
    sample: { id: 'batch_685c059ae39c8190' }
  },
  'batch.expired': {
    description: 'Sent when a batch API request has expired. data.id is the batch id.',
    data: Thin,
    sample: { id: 'batch_685c059ae39c8190' }
  },
  'batch.failed': {
    description: 'Sent when a batch API request has failed. data.id is the batch id.',
    data: Thin,
    sample: { id: 'batch_685c059ae39c8190' }
  }
})
