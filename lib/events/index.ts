import { agent } from './agent.ts'
import { batch } from './batch.ts'
import { call, connection } from './call.ts'
import { evals } from './eval.ts'
import { fineTuning } from './fine-tuning.ts'
import { guideEntries } from './guide.ts'
import { response } from './response.ts'
import { safety, safetyIdentifier } from './safety.ts'
import type { EventEntry } from './schema.ts'
import type { EventsOf } from './users.ts'
import { video } from './video.ts'

/**
 * Every event type that OpenAI documents or accepts (openai-node 7.57 `UnwrapWebhookEvent` and
 * `WebhookCreateParams.event_types`, openai-python `types/webhooks`). The schemas, TypeScript types, names, samples and docs/events.md are all
 * derived from this list.
 */
export const officialEntries = {
  ...agent,
  ...batch,
  ...call,
  ...connection,
  ...evals,
  ...fineTuning,
  ...response,
  ...safety,
  ...safetyIdentifier,
  ...video
}

export { guideEntries }

type SchemasOf<Entries extends Record<string, EventEntry>> = { [Name in keyof Entries]: Entries[Name]['schema'] }

export type OfficialEvents = EventsOf<SchemasOf<typeof officialEntries>>

export const officialEvents = schemasOf(officialEntries)

/**
 * Schemas for the `events` option: the 5 event types that only a community guide describes, and `batch.completed` and `batch.failed` with the
 * additional fields of that guide. In all of them `id`, `created_at` and `object` may be absent.
 */
export const guideEvents = schemasOf(guideEntries)

export type GuideEvents = EventsOf<typeof guideEvents>

function schemasOf<Entries extends Record<string, EventEntry>> (entries: Entries): SchemasOf<Entries> {
  return Object.fromEntries(Object.entries(entries).map(([name, { schema }]) => [name, schema])) as never
}
