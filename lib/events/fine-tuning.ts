import { family, Thin } from './schema.ts'

const sample = { id: 'ftjob-qX7mRz2LkV9bTnW4cYpD8sHe' }

export const fineTuning = family({
  'fine_tuning.job.cancelled': {
    description: 'Sent when a fine-tuning job has been cancelled. data.id is the fine-tuning job id.',
    data: Thin,
    sample,
    once: true
  },
  'fine_tuning.job.failed': {
    description: 'Sent when a fine-tuning job has failed. data.id is the fine-tuning job id.',
    data: Thin,
    sample,
    once: true
  },
  'fine_tuning.job.succeeded': {
    description: 'Sent when a fine-tuning job has succeeded. data.id is the fine-tuning job id.',
    data: Thin,
    sample,
    once: true
  }
})
