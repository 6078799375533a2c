import { Type } from '../typebox.ts'
import type { Static, TLiteral, TObject, TSchema, TUnsafe } from '@sinclair/typebox'

type Envelope = { id: TSchema, created_at: TSchema, object: TSchema }

/** Objects are open: fields that are not listed are accepted and kept. */
export type EventSchema<Name extends string, Data extends TSchema, Head extends Envelope> =
  TObject<Head & { type: TLiteral<Name>, data: Data }>

export interface EventEntry<Schema extends TSchema = TSchema> {
  /** One sentence that says when the event is sent. */
  readonly description: string
  readonly schema: Schema
  /** A realistic `data` object, without the envelope of the event. */
  readonly sample: object
  /** Set if a resource can have only one event of this type, because the event means that the resource has ended. */
  readonly once?: true
}

type Entries<Data extends Record<string, TSchema>> = {
  [Name in keyof Data]: { description: string, data: Data[Name], sample: Static<Data[Name]>, once?: true }
}

type Family<Data extends Record<string, TSchema>, Head extends Envelope> = {
  [Name in keyof Data & string]: EventEntry<EventSchema<Name, Data[Name], Head>>
}

/** A family whose events may come without `object: 'event'`. */
export function family<Data extends Record<string, TSchema>> (entries: Entries<Data>): Family<Data, typeof standard> {
  return build(entries, standard) as never
}

/** A family whose events always carry `object: 'event'`. */
export function markedFamily<Data extends Record<string, TSchema>> (entries: Entries<Data>): Family<Data, typeof marked> {
  return build(entries, marked) as never
}

/** A family of events of the community guide. They have `type` and `data`; the rest of the envelope may be absent. */
export function guideFamily<Data extends Record<string, TSchema>> (entries: Entries<Data>): Family<Data, typeof sparse> {
  return build(entries, sparse) as never
}

const marker = Type.Literal('event')
const marked = { id: Type.String(), created_at: Type.Integer(), object: marker }
const standard = { ...marked, object: Type.Optional(marker) }
const sparse = { id: Type.Optional(marked.id), created_at: Type.Optional(marked.created_at), object: standard.object }

function build (entries: Entries<Record<string, TSchema>>, envelope: Envelope): Record<string, EventEntry> {
  return Object.fromEntries(Object.entries(entries).map(([name, { description, data, sample, once }]) => [name, {
    description,
    sample: sample as object,
    ...(once && { once }),
    schema: Type.Object({ ...envelope, type: Type.Literal(name), data })
  }]))
}

/** The thin payload of most events, which is the id of the resource to fetch. */
export const Thin = Type.Object({ id: Type.String() })

/** An enum of which only some values are known. Any string is accepted, and editors suggest the known values. */
export function known<const Values extends readonly string[]> (...values: Values): TUnsafe<Values[number] | (string & {})> {
  return Type.Unsafe<Values[number] | (string & {})>(Type.String({ examples: values }))
}
