import { Type } from '../typebox.ts'
import { family, markedFamily, Thin } from './schema.ts'

const nullableString = Type.Optional(Type.Union([Type.String(), Type.Null()]))

export const safety = markedFamily({
  'safety.alert.created': {
    description: 'Sent when an approved safety alert is available for an API project.',
    data: Thin,
    sample: { id: 'alert_685c059ae39c8190' }
  },
  'safety.org_alert.created': {
    description: 'Sent when an approved safety alert is available for an enterprise workspace.',
    data: Thin,
    sample: { id: 'alert_685c059ae39c8190' }
  },
  'safety.warning_issued': {
    description: 'Sent when a warning is issued for a safety identifier.',
    data: Thin,
    sample: { id: 'alert_685c059ae39c8190' }
  },
  'safety.deactivation_issued': {
    description: 'Sent when a deactivation is issued for a safety identifier.',
    data: Thin,
    sample: { id: 'alert_685c059ae39c8190' }
  }
})

// Known from openai-python's types/webhooks; the Node SDK has no type for it yet.
export const safetyIdentifier = family({
  'safety_identifier.blocked': {
    description: 'Sent when a request associated with a safety identifier has been blocked. No data.id.',
    data: Type.Object({
      safety_category: Type.String(),
      safety_identifier: Type.String(),
      model: nullableString,
      project_id: nullableString,
      request_id: nullableString
    }),
    sample: {
      safety_category: 'bio',
      safety_identifier: 'user_4f9a1c',
      model: 'gpt-5',
      project_id: 'proj_abc123',
      request_id: 'req_685c059ae39c8190'
    }
  }
})
