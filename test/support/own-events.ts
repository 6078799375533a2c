// Event types of a user's own, as test/types.ts sees them. The augmentation holds for every file that is checked.
import { Type } from '@sinclair/typebox'
import type { EventsOf } from '../../lib/index.ts'

export const ownEvents = {
  'acme.invoice.paid': Type.Object({
    id: Type.String(),
    created_at: Type.Integer(),
    type: Type.Literal('acme.invoice.paid'),
    data: Type.Object({ id: Type.String(), cents: Type.Integer(), currency: Type.Optional(Type.String()) })
  })
}

declare module '../../lib/index.ts' {
  interface OpenAIWebhookEvents extends EventsOf<typeof ownEvents> {}
}
