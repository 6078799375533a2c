import { InvalidOptions } from './errors.ts'
import { nearest } from './nearest.ts'

// Checks of values from users and from senders.

/** The longest delay of a timer, in ms. */
export const LONGEST_TIMER = 2 ** 31 - 1

export const isObject = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' && value !== null && !Array.isArray(value)

/** 1 to 256 visible ASCII characters. Ids and names of tenants are parts of keys, in which a space separates them. */
export const isId = (value: unknown): value is string => typeof value === 'string' && /^[\x21-\x7e]{1,256}$/.test(value)

/** Whether a text can be the type of an event. A pattern such as `batch.*` cannot. */
export const isEventType = (value: unknown): value is string => typeof value === 'string' && value !== '' && value !== '*' && !value.endsWith('.*')

export const isFunction = (value: unknown): boolean => typeof value === 'function'

/** The values that an option accepts. */
export interface Rule {
  readonly expected: string
  readonly accepts: (value: unknown) => boolean
}

export const wholeNumber = (unit: string, min: number, max = Number.MAX_SAFE_INTEGER): Rule => ({
  expected: `a whole number of ${unit}, ${min} ${max < Number.MAX_SAFE_INTEGER ? `to ${max}` : 'or more'}`,
  accepts: value => Number.isSafeInteger(value) && (value as number) >= min && (value as number) <= max
})

export const BOOLEAN: Rule = { expected: 'true or false', accepts: value => typeof value === 'boolean' }
export const FUNCTION: Rule = { expected: 'a function', accepts: isFunction }
export const SIGNAL: Rule = { expected: 'an AbortSignal', accepts: value => isFunction((value as Partial<AbortSignal> | null)?.addEventListener) }

/** Whether to run handlers in this process, or how. */
export const WORKER: Rule = { expected: 'true, false or an object', accepts: value => typeof value === 'boolean' || isObject(value) }

/** An option that other code checks. */
export const ANYTHING: Rule = { expected: 'anything', accepts: () => true }

interface Place {
  /** Text before the name of the option. */
  readonly at?: string
  /** Options that other code reads. */
  readonly ignored?: readonly string[]
  /** Returns what to do about an unknown name; `undefined` if there is no special advice. */
  readonly advice?: (name: string) => string | undefined
}

/** @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS for an option that is given and has a wrong value */
export function assertOption (caller: string, name: string, value: unknown, { expected, accepts }: Rule): void {
  if (value !== undefined && !accepts(value)) throw new InvalidOptions(`${head(caller)}expected ${name} to be ${expected}, got ${show(value)}`)
}

/**
 * Refuses an option that has no rule, because a misspelt option would silently do nothing, or whose rule does not accept its value.
 *
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS
 */
export function assertRules (caller: string, options: unknown, rules: Readonly<Record<string, Rule>>, { at = '', ignored = [], advice }: Place = {}): void {
  if (!isObject(options)) throw new InvalidOptions(`${head(caller)}expected options to be an object, got ${show(options)}`)
  for (const [name, value] of Object.entries(options)) {
    if (ignored.includes(name) || value === undefined) continue
    const rule = Object.hasOwn(rules, name) ? rules[name] : undefined
    if (rule === undefined) throw new InvalidOptions(`${head(caller)}unknown option "${at}${name}"${advice?.(name) ?? adviceOn(name, Object.keys(rules))}`)
    assertOption(caller, at + name, value, rule)
  }
}

/** The same for options whose values the caller checks. */
export function assertNames (caller: string, options: object, names: readonly string[]): void {
  assertRules(caller, options, Object.fromEntries(names.map(name => [name, ANYTHING])))
}

const head = (caller: string): string => caller && `${caller}: `

/** Suggests the name that was probably meant, or lists all names. */
function adviceOn (name: string, names: readonly string[]): string {
  return nearest(name, names) || `: expected ${[names.slice(0, -1).join(', '), names.at(-1)].filter(Boolean).join(' or ')}`
}

/** @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS for any argument of a function that has none */
export function assertNone (caller: string, given: readonly unknown[], advice: string): void {
  if (given.length > 0) throw new InvalidOptions(`${caller}(): expected no options, got ${show(given[0])}: ${advice}`)
}

/** The functions that make a verifier, a store or a runner. Listed by name, because an app does not load all of them. */
const MAKERS = ['standardWebhooks', 'xOpenAISignature', 'memoryStore', 'sqliteStore', 'redisStore', 'postgresStore', 'inline', 'background', 'durable', 'bullmq', 'pgboss']

/** Shows short values, and only the kind of all others, because a value in the wrong place may be a secret. */
export function show (value: unknown): string {
  if (typeof value === 'string') return value.length <= 16 && !/^(?:whsec_|sk-)/.test(value) ? `"${value}"` : 'a string'
  if (typeof value === 'number' || typeof value === 'boolean' || value === null || value === undefined) return String(value)
  if (typeof value === 'function' && MAKERS.includes(value.name)) return `a value of type function: call it, ${value.name}()`
  return Array.isArray(value) ? 'an array' : `a value of type ${typeof value}`
}
