import type { TSchema } from '@sinclair/typebox'
import type { TypeCheck } from '@sinclair/typebox/compiler'
import { InvalidOptions } from '../errors.ts'
import { isStandard, kindOf } from '../events/users.ts'
import type { AnySchema, StandardResult, StandardSchema } from '../events/users.ts'
import { isPromise } from '../maybe-promise.ts'
import { TypeCompiler } from '../typebox.ts'

/**
 * Says what does not fit the schema of an event: paths, and what was expected there, never a value. `undefined` where all fits. Throws
 * where the schema itself fails.
 */
export type Check = (event: unknown) => string | undefined

/** The compiler of one copy of TypeBox 0.34. It knows the formats and kinds that were registered with that copy. */
export type Compiler = Pick<typeof TypeCompiler, 'Compile'>

/** Of TypeBox 1.x. */
interface Compiled1 {
  Check (value: unknown): boolean
  Errors (value: unknown): Iterable<{ readonly keyword: string, readonly instancePath: string, readonly message: string }>
}

/** The compilers of the user's copies, where there are schemas for them. */
export interface Compilers {
  readonly 'TypeBox 0.34'?: Compiler
  readonly 'TypeBox 1.x'?: { Compile (schema: object): Compiled1 }
}

/** The user's own copies of TypeBox compile the user's schemas. @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS */
export async function compilersFor (schemas: Readonly<Record<string, AnySchema>>): Promise<Compilers> {
  const kinds = new Set(Object.values(schemas).map(kindOf))
  return {
    ...(kinds.has('TypeBox 0.34') && { 'TypeBox 0.34': (await copyOf('@sinclair/typebox/compiler')).TypeCompiler }),
    ...(kinds.has('TypeBox 1.x') && { 'TypeBox 1.x': await copyOf('typebox/compile') })
  }
}

/** @param name one that the bundler cannot see, or it would bundle our copy @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS */
export async function copyOf (name: string): Promise<any> {
  try {
    return await import(name)
  } catch (cause) {
    throw new InvalidOptions(`expected the module "${name}", which compiles the schemas in \`events\`, to be installed beside fastify-openai-webhook, got: ${(cause as Error).message}`, { cause })
  }
}

/**
 * Checks events by type. The user's schemas are compiled at boot, since they may be faulty; ours when the first event of the type
 * comes, since all of them would take 7 ms of an app's start.
 */
export class Validators {
  readonly #checks = new Map<string, Check>()
  readonly #ours: Readonly<Record<string, TSchema>>

  /** @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS */
  constructor (ours: Readonly<Record<string, TSchema>>, users: Readonly<Record<string, AnySchema>>, compilers: Compilers) {
    this.#ours = ours
    for (const [type, schema] of Object.entries(users)) {
      try {
        this.#checks.set(type, checkOf(schema, type, compilers))
      } catch (cause) {
        // A kind or a reference that this copy of TypeBox does not know.
        throw new InvalidOptions(`expected events["${type}"] to be a synchronous schema that can be compiled, got: ${(cause as Error).message}`, { cause })
      }
    }
  }

  /** @returns undefined for an unknown type */
  for (type: string): Check | undefined {
    const check = this.#checks.get(type)
    if (check !== undefined || !Object.hasOwn(this.#ours, type)) return check
    const made = compiled(TypeCompiler.Compile(this.#ours[type]!))
    this.#checks.set(type, made)
    return made
  }
}

function checkOf (schema: AnySchema, type: string, compilers: Compilers): Check {
  if (isStandard(schema)) return standard(schema, type)
  const { 'TypeBox 0.34': typebox, 'TypeBox 1.x': typebox1 } = compilers
  return kindOf(schema) === 'TypeBox 1.x' ? compiled1(typebox1!.Compile(schema)) : compiled(typebox!.Compile(schema as TSchema))
}

/** TypeBox 0.34. Its messages hold nothing of the value. */
function compiled (validator: TypeCheck<TSchema>): Check {
  return event => validator.Check(event) ? undefined : listed(validator.Errors(event), ({ path, message }) => [path, message])
}

/** TypeBox 1.x. So do its messages, but for those of the user's own refinements. */
function compiled1 (validator: Compiled1): Check {
  return event => validator.Check(event)
    ? undefined
    : listed(validator.Errors(event), ({ keyword, instancePath, message }) => [instancePath, keyword === '~refine' ? undefined : message])
}

/** Standard Schema. Messages of libraries quote values (`Expected string but received "…"`), so there are paths alone. */
function standard (schema: StandardSchema, type: string): Check {
  const { '~standard': props } = schema
  let probed: unknown
  try {
    probed = props.validate({ type })
  } catch {} // may be due to this event, which is none
  // One that is asynchronous somewhere within may answer this one at once: then a delivery fails.
  if (isLater(probed)) throw new TypeError(LATER)
  return event => {
    const result: unknown = props.validate(event)
    if (isLater(result)) throw new TypeError(LATER)
    if (typeof result !== 'object' || result === null) throw new TypeError('a validator that answers neither a value nor issues')
    const { issues } = result as StandardResult
    return issues === undefined ? undefined : listed(issues, ({ path = [] }) => [pointerOf(path), undefined])
  }
}

const LATER = 'a validator that answers with a promise: expected a synchronous one'

/** Nobody waits for a promise. Unheard, its rejection would end the process. */
function isLater (result: unknown): boolean {
  if (!isPromise(result)) return false
  result.then(undefined, () => {})
  return true
}

function pointerOf (path: Iterable<PropertyKey | { readonly key: PropertyKey }>): string {
  return Array.from(path, part => `/${String(typeof part === 'object' ? part.key : part).replaceAll('~', '~0').replaceAll('/', '~1')}`).join('')
}

const MAX_FAULTS = 5
const MAX_LENGTH = 400

/** Each path once, with what was first found there. */
function listed<Fault> (faults: Iterable<Fault>, read: (fault: Fault) => [path: string, expected: string | undefined]): string {
  const found = new Map<string, string>()
  for (const fault of faults) {
    const [path, expected] = read(fault)
    if (!found.has(path)) found.set(path, `${path || 'the event as a whole'}${expected === undefined ? '' : ` (${expected})`}`)
    if (found.size === MAX_FAULTS) break
  }
  return [...found.values()].join(', ').slice(0, MAX_LENGTH)
}
