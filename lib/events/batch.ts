import { family, Thin } from './schema.ts'

const sample = { id: 'batch_685c059ac7b08190a3e41f0d92b6c875' }

export const batch = family({
  'batch.cancelled': {
    description: 'Sent when a batch API request has been cancelled. data.id is the batch id.',
    data: Thin,
    sample,
    once: true
  },
  'batch.completed': {
    description: 'Sent when a batch API request has been completed. data.id is the batch id.',
    data: Thin,
    sample,
    once: true
  },
  'batch.expired': {
    description: 'Sent when a batch API request has expired. data.id is the batch id.',
    data: Thin,
    sample,
    once: true
  },
  'batch.failed': {
    description: 'Sent when a batch API request has failed. data.id is the batch id.',
    data: Thin,
    sample,
    once: true
  }
})
