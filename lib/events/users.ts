// A JSDoc comment, because other comments are not copied to the declarations, which the app's compiler reads. Not @ts-expect-error, because
// there is no error if the peer dependency is installed.
/** @ts-ignore -- because the peer is optional: an app without `typebox` cannot resolve the import, and has none of its schemas */
import type { Static as StaticOf1 } from 'typebox'
import { KindGuard } from '../typebox.ts'

/**
 * A schema of any library that implements Standard Schema, https://standardschema.dev, such as Zod, Valibot or ArkType. `validate` must be
 * synchronous. The type is copied from the specification, as the specification allows, and reduced to the fields that are used here.
 */
export interface StandardSchema<Input = unknown, Output = Input> {
  readonly '~standard': {
    readonly version: 1
    readonly vendor: string
    readonly validate: (value: unknown, ...options: never[]) => StandardResult<Output> | Promise<StandardResult<Output>>
    readonly types?: { readonly input: Input, readonly output: Output } | undefined
    /** Standard JSON Schema, if the library implements it. */
    readonly jsonSchema?: { readonly input: (options: { readonly target: any }) => Record<string, unknown> } | undefined
  }
}

export type StandardResult<Output = unknown> =
  | { readonly value: Output, readonly issues?: undefined }
  | { readonly issues: ReadonlyArray<{ readonly message: string, readonly path?: ReadonlyArray<PropertyKey | { readonly key: PropertyKey }> | undefined }> }

/**
 * A schema of TypeBox 0.34, the package `@sinclair/typebox`. By its structure: the package's types for CommonJS and those for ES modules
 * are not assignable to each other, because their symbols are not the same.
 */
export interface TypeBox034Schema {
  params: unknown[]
  static: unknown
}

/** A schema of TypeBox 1.x, the package `typebox`. */
export type TypeBoxSchema = { readonly '~kind': string } | { readonly '~unsafe': unknown }

/** A schema that `events` accepts: of TypeBox 0.34, of TypeBox 1.x, or with Standard Schema. */
export type AnySchema = TypeBox034Schema | TypeBoxSchema | StandardSchema

/** The type of an event as it arrives. Handlers get the same type, because a schema checks an event and does not change it. */
export type EventOfSchema<Schema> = Schema extends { readonly '~standard': { readonly types?: infer Types } }
  ? NonNullable<Types> extends { readonly input: infer Input } ? Input : never
  : Schema extends TypeBox034Schema ? (Schema & { params: [] })['static'] : StaticOf1<Schema & {}>

/** The TypeScript types of a set of schemas, for declaration merging into `OpenAIWebhookEvents`. */
export type EventsOf<Schemas extends Readonly<Record<string, AnySchema>>> = { [Name in keyof Schemas]: EventOfSchema<Schemas[Name]> }

export type SchemaKind = 'TypeBox 0.34' | 'TypeBox 1.x' | 'Standard Schema'

/** @returns undefined if the value is not a schema that `events` accepts */
export function kindOf (schema: unknown): SchemaKind | undefined {
  // ArkType's schemas are functions.
  if ((typeof schema !== 'object' && typeof schema !== 'function') || schema === null) return undefined
  if (isStandard(schema)) return 'Standard Schema'
  if (Object.hasOwn(schema, '~kind') || Object.hasOwn(schema, '~unsafe')) return 'TypeBox 1.x'
  return KindGuard.IsSchema(schema) ? 'TypeBox 0.34' : undefined
}

export function isStandard (schema: object): schema is StandardSchema {
  const { '~standard': standard } = schema as { '~standard'?: { version?: unknown, validate?: unknown } }
  return standard?.version === 1 && typeof standard.validate === 'function'
}

/** The JSON Schema of an event as it arrives, or an empty one if the library cannot provide it. @param targets versions to try first */
export function jsonSchemaOf (schema: AnySchema, ...targets: string[]): object {
  if (!isStandard(schema)) return kindOf(schema) === 'TypeBox 1.x' ? selfContained(schema) : schema
  const { jsonSchema } = schema['~standard']
  for (const target of [...targets, 'draft-2020-12', 'draft-07']) {
    try {
      const { $schema, ...converted } = jsonSchema!.input({ target })
      return selfContained(converted)
    } catch {} // an unknown target, a schema that JSON Schema cannot express, or a library without the method
  }
  return {}
}

/** Replaces a schema with references by an empty one, because the references would be broken once the schema is a part of a document. */
function selfContained (schema: object): object {
  return JSON.stringify(schema).includes('"$ref"') ? {} : schema
}
