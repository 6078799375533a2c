import { Type } from '../typebox.ts'
import { family, markedFamily, Thin } from './schema.ts'

const nullableString = Type.Optional(Type.Union([Type.String(), Type.Null()]))

const alert = { id: 'alert_685c059a8b2c8190d46f19e3a7508cb2' }
const safetyCase = { id: 'C-7h3kq9' }

export const safety = markedFamily({
  'safety.alert.created': {
    description: 'Sent when an approved safety alert is available for an API project.',
    data: Thin,
    sample: alert
  },
  'safety.org_alert.created': {
    description: 'Sent when an approved safety alert is available for an enterprise workspace.',
    data: Thin,
    sample: alert
  },
  'safety.warning_issued': {
    description: 'Sent when a warning is issued for a safety identifier. data.id is a safety case id (GET /v1/safety/cases/{id}), not an alert id.',
    data: Thin,
    sample: safetyCase
  },
  'safety.deactivation_issued': {
    description: 'Sent when a deactivation is issued for a safety identifier. data.id is a safety case id (GET /v1/safety/cases/{id}), not an alert id.',
    data: Thin,
    sample: safetyCase
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
      project_id: 'proj_Vt5kJ8wQmB2xLzR7nYcG4hDs',
      request_id: 'req_7c1e4b9fd2a860358e07f4c5b1d93a62'
    }
  }
})
