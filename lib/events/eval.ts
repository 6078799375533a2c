// OpenAI spells it `canceled` here and `cancelled` everywhere else.
import { family, Thin } from './schema.ts'

const sample = { id: 'evalrun_685c059ab1e48190876c2fd05a39e1b4' }

export const evals = family({
  'eval.run.canceled': {
    description: 'Sent when an eval run has been canceled. data.id is the eval run id.',
    data: Thin,
    sample,
    once: true
  },
  'eval.run.failed': {
    description: 'Sent when an eval run has failed. data.id is the eval run id.',
    data: Thin,
    sample,
    once: true
  },
  'eval.run.succeeded': {
    description: 'Sent when an eval run has succeeded. data.id is the eval run id.',
    data: Thin,
    sample,
    once: true
  }
})
