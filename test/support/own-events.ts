// A user's own event types, as test/types.ts uses them. The augmentation applies to every file that is type-checked.
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
