import type { TSchema } from '@sinclair/typebox'
import type { TypeCheck } from '@sinclair/typebox/compiler'
import { InvalidOptions } from '../errors.ts'
import { isStandard, kindOf } from '../events/users.ts'
import type { AnySchema, StandardResult, StandardSchema } from '../events/users.ts'
import { isStray } from '../maybe-promise.ts'
import { TypeCompiler } from '../typebox.ts'

/**
 * Describes what in an event does not match its schema: paths and what was expected there, but never a value. Returns `undefined` if the event
 * matches, and throws if the schema itself fails.
 */
export type Check = (event: unknown) => string | undefined

/** A compiled schema of TypeBox 1.x. */
interface Compiled1 {
  Check (value: unknown): boolean
  Errors (value: unknown): Iterable<{ readonly keyword: string, readonly instancePath: string, readonly message: string }>
}

/** The compilers of the user's copies of TypeBox, which know the formats and kinds registered with them. Each is set only if there are schemas for it. */
export interface Compilers {
  'TypeBox 0.34'?: Pick<typeof TypeCompiler, 'Compile'>
  'TypeBox 1.x'?: { Compile (schema: object): Compiled1 }
}

/**
 * Loads the compilers for the user's schemas, from the user's own copies of TypeBox. Each import has a literal and stands in a `try`, so that a
 * user's bundler follows it, and goes on without a module that is not installed. Our own build bundles neither.
 *
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS
 */
export async function compilersFor (schemas: Readonly<Record<string, AnySchema>>): Promise<Compilers> {
  const kinds = new Set(Object.values(schemas).map(kindOf))
  const compilers: Compilers = {}
  let name = '@sinclair/typebox/compiler'
  try {
    if (kinds.has('TypeBox 0.34')) compilers['TypeBox 0.34'] = (await import('@sinclair/typebox/compiler')).TypeCompiler
    name = 'typebox/compile'
    if (kinds.has('TypeBox 1.x')) compilers['TypeBox 1.x'] = await import('typebox/compile')
    return compilers
  } catch (cause) {
    throw new InvalidOptions(`expected the module "${name}", which compiles the schemas in \`events\`, to be installed beside fastify-openai-webhook, got: ${(cause as Error).message}`, { cause })
  }
}

/**
 * Checks events by type. The user's schemas are compiled at boot, because they may be faulty. Each of our schemas is compiled when the first
 * event of its type arrives, because compiling all of them would add 7 ms to the start of an app.
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
        // Such as a kind or a reference that this copy of TypeBox does not know.
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

/** For TypeBox 0.34, whose messages contain nothing of the value. */
function compiled (validator: TypeCheck<TSchema>): Check {
  return event => validator.Check(event) ? undefined : listed(validator.Errors(event), ({ path, message }) => [path, message])
}

/** For TypeBox 1.x. Omits the messages of the user's own refinements. All other messages contain nothing of the value. */
function compiled1 (validator: Compiled1): Check {
  return event => validator.Check(event)
    ? undefined
    : listed(validator.Errors(event), ({ keyword, instancePath, message }) => [instancePath, keyword === '~refine' ? undefined : message])
}

/** For Standard Schema. Gives paths only, because the messages of some libraries quote values (`Expected string but received "…"`). */
function standard (schema: StandardSchema, type: string): Check {
  const { '~standard': props } = schema
  let probed: unknown
  try {
    probed = props.validate({ type })
  } catch {} // the cause may be this event, which is incomplete
  // A schema that is asynchronous only in a part may answer this probe synchronously. Deliveries that reach the part then fail.
  if (isStray(probed)) throw new TypeError(ASYNCHRONOUS)
  return event => {
    const result: unknown = props.validate(event)
    if (isStray(result)) throw new TypeError(ASYNCHRONOUS)
    if (typeof result !== 'object' || result === null) throw new TypeError('a validator that answers neither a value nor issues')
    const { issues } = result as StandardResult
    return issues === undefined ? undefined : listed(issues, ({ path = [] }) => [pointerOf(path), undefined])
  }
}

const ASYNCHRONOUS = 'a validator that answers with a promise: expected a synchronous one'

function pointerOf (path: Iterable<PropertyKey | { readonly key: PropertyKey }>): string {
  return Array.from(path, part => `/${String(typeof part === 'object' ? part.key : part).replaceAll('~', '~0').replaceAll('/', '~1')}`).join('')
}

const MAX_FAULTS = 5
const MAX_LENGTH = 400
const WHOLE = 'the event as a whole'

/** Lists each path once, with the first fault that was found there. */
function listed<Fault> (faults: Iterable<Fault>, read: (fault: Fault) => [path: string, expected: string | undefined]): string {
  const found = new Map<string, string>()
  for (const fault of faults) {
    const [path, expected] = read(fault)
    if (!found.has(path)) found.set(path, `${path || WHOLE}${expected === undefined ? '' : ` (${expected})`}`)
    if (found.size === MAX_FAULTS) break
  }
  // A schema may say that the event is wrong, and list no fault.
  return [...found.values()].join(', ').slice(0, MAX_LENGTH) || WHOLE
}
