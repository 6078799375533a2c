// `npm run drift` compares the event table with the newest `openai` package on npm; `npm run drift -- --installed` compares it with the
// package in node_modules. Exit code 0: nothing differs; 1: something differs, listed line by line; 2: nothing was compared.
import { execFile } from 'node:child_process'
import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import ts from 'typescript'

/** Event types that no type of the package has, each with its source. */
const ELSEWHERE = { 'safety_identifier.blocked': "openai-python's types/webhooks" }

/**
 * A field of an event. Its key is its path, such as `data.sip_headers[].name`.
 *
 * @typedef {object} Field
 * @property {boolean} optional may be absent
 * @property {string} type `string`, `number`, `array` or `object`, each perhaps with ` | null`, or the name of another type
 * @property {string[]} values the known texts of the field
 * @property {boolean} open other texts are accepted too
 *
 * @typedef {Map<string, Field>} Fields
 * @typedef {{ version: string, events: Map<string, Fields>, subscribable: string[] }} Package
 */

/**
 * Reads from a copy of the `openai` package its typed events, by type, and the types that an endpoint can subscribe to.
 *
 * @param {string} folder the folder of its package.json
 * @returns {Promise<Package>}
 */
export async function readPackage (folder) {
  const { version } = JSON.parse(await readFile(join(folder, 'package.json'), 'utf8'))
  const file = join(folder, 'resources/webhooks/webhooks.d.ts')
  // All types of events are in this one file. Following its imports would parse the whole package, which takes ten times as long. An
  // imported type is represented by its name.
  const program = ts.createProgram([file], { noResolve: true, types: [], lib: ['lib.es5.d.ts'], strict: true, skipLibCheck: true })
  const checker = program.getTypeChecker()
  const source = program.getSourceFile(file)
  const names = source?.symbol === undefined ? [] : checker.getExportsOfModule(source.symbol)
  const typed = name => {
    const symbol = names.find(symbol => symbol.name === name)
    if (symbol === undefined) throw new Error(`expected openai ${version} to declare ${name} in resources/webhooks/webhooks.d.ts, found none; tell docs/drift.mjs where it is now`)
    return checker.getDeclaredTypeOfSymbol(symbol)
  }

  const event = typed('UnwrapWebhookEvent')
  const members = event.isUnion() ? event.types : [event]
  const events = new Map(members.map(member => {
    const fields = declared(checker, member)
    return [fields.get('type').values[0], fields]
  }))
  return { version, events, subscribable: declared(checker, typed('WebhookCreateParams')).get('event_types[]').values }
}

/** @returns {Fields} the fields of an object type of TypeScript */
function declared (checker, object, path = '') {
  const fields = new Map()
  for (const property of checker.getPropertiesOfType(object)) {
    add(path + property.name, checker.getTypeOfSymbol(property), (property.flags & ts.SymbolFlags.Optional) !== 0)
  }
  return fields

  function add (path, type, optional) {
    const all = type.isUnion() ? type.types : [type]
    const parts = all.filter(part => (part.flags & (ts.TypeFlags.Null | ts.TypeFlags.Undefined)) === 0)
    const values = parts.filter(part => part.isStringLiteral()).map(part => part.value)
    const types = new Set(parts.map(kindOf))
    if (all.some(part => part.flags & ts.TypeFlags.Null)) types.add('null')
    fields.set(path, { optional, type: [...types].join(' | '), values, open: values.length < parts.length })
    for (const part of parts) {
      if (checker.isArrayType(part)) add(`${path}[]`, checker.getTypeArguments(part)[0], false)
      else if (kindOf(part) === 'object') for (const [inner, field] of declared(checker, part, `${path}.`)) fields.set(inner, field)
    }
  }

  function kindOf (type) {
    const { flags } = type
    // `string & {}` also counts as a string: with it, editors still suggest the literals of a union
    if (flags & ts.TypeFlags.StringLike || (type.isIntersection() && type.types.some(part => part.flags & ts.TypeFlags.String))) return 'string'
    if (flags & ts.TypeFlags.BooleanLike) return 'boolean'
    if (checker.isArrayType(type)) return 'array'
    return flags & ts.TypeFlags.Object ? 'object' : checker.typeToString(type)
  }
}

/** @returns {Fields} the fields of an object schema of the event table */
function tabled (schema, path = '', fields = new Map()) {
  for (const [name, field] of Object.entries(schema.properties)) {
    add(path + name, field, !(schema.required ?? []).includes(name))
  }
  return fields

  function add (path, field, optional) {
    const parts = field.anyOf ?? [field]
    const type = parts.map(({ type }) => type === 'integer' ? 'number' : type).join(' | ')
    const { const: only, examples = [], items } = field
    fields.set(path, { optional, type, values: only === undefined ? examples : [only], open: only === undefined })
    if (items !== undefined) add(`${path}[]`, items, false)
    if (field.properties !== undefined) tabled(field, `${path}.`, fields)
  }
}

/**
 * Lists what differs, in a line each.
 *
 * @param {Package} sdk
 * @param {Record<string, { schema: object }>} entries the event table
 */
export function compare ({ events, subscribable }, entries) {
  const known = new Set([...events.keys(), ...subscribable, ...Object.keys(ELSEWHERE)])
  return [...new Set([...known, ...Object.keys(entries)])].sort().flatMap(type => {
    if (!Object.hasOwn(entries, type)) return Object.hasOwn(ELSEWHERE, type) ? [] : [`${type}: not in the table`]
    if (!known.has(type)) return [`${type}: in the table alone`]
    if (!events.has(type)) return []
    return compareFields(events.get(type), tabled(entries[type].schema)).map(line => `${type} ${line}`)
  })
}

function compareFields (theirs, ours) {
  return [...new Set([...theirs.keys(), ...ours.keys()])].sort().flatMap(path => {
    const [their, our] = [theirs.get(path), ours.get(path)]
    if (our === undefined) return [`${path}: not in the table`]
    if (their === undefined) return [`${path}: in the table alone`]
    return [...compareField(their, our)].map(line => `${path}: ${line}`)
  })
}

function * compareField (their, our) {
  const presence = ({ optional }) => optional ? 'may be absent' : 'always there'
  if (their.optional !== our.optional) yield `${presence(our)} in the table, ${presence(their)} in openai`
  if (their.type !== our.type) yield `${our.type} in the table, ${their.type} in openai`
  // The opposite is intended: the table accepts values that OpenAI may add, so that they do not cause refusals.
  if (their.open && !our.open) yield `only ${our.values.join(', ')} in the table, other values too in openai`
  const missing = their.values.filter(value => !our.values.includes(value))
  if (missing.length > 0) yield `${missing.join(', ')} not in the table`
  // Where openai declares any text, the values in the table come from its prose.
  const extra = our.values.filter(value => !their.values.includes(value))
  if (their.values.length > 0 && extra.length > 0) yield `${extra.join(', ')} in the table alone`
}

/** The event table in lib/, which may be newer than dist/. */
async function readTable () {
  const { build } = await import('esbuild')
  const { outputFiles: [{ text }] } = await build({
    entryPoints: [fileURLToPath(new URL('../lib/events/index.ts', import.meta.url))],
    bundle: true,
    write: false,
    platform: 'node',
    format: 'esm'
  })
  return (await import(`data:text/javascript,${encodeURIComponent(text)}`)).officialEntries
}

/** Downloads the newest `openai` package into a folder. No code of the package is run. */
async function download (folder) {
  try {
    await run('npm', ['pack', 'openai@latest', '--ignore-scripts', '--prefer-online', '--fetch-retries=1', '--fetch-retry-mintimeout=1000'])
    const archive = (await readdir(folder)).find(name => name.endsWith('.tgz'))
    await run('tar', ['-xzf', archive, 'package/package.json', 'package/resources/webhooks'])
  } catch ({ message, stderr = '' }) {
    const reason = /^npm (?:error|ERR!) code .+$/m.exec(stderr)?.[0] ?? message.trim()
    throw new Error(`the newest openai package could not be fetched (${reason}); npm run drift -- --installed compares with the installed one`)
  }
  return join(folder, 'package')

  function run (command, args) {
    return promisify(execFile)(command, args, { cwd: folder, timeout: 60_000 })
  }
}

/** @returns {Promise<{ code: 0 | 1 | 2, text: string }>} the exit code and the text to print */
export async function drift (args) {
  const folder = await mkdtemp(join(tmpdir(), 'openai-drift-'))
  try {
    if (args.some(arg => arg !== '--installed')) throw new Error(`expected no argument but --installed, got ${args.join(' ')}`)
    const sdk = await readPackage(args.length > 0 ? fileURLToPath(new URL('../node_modules/openai', import.meta.url)) : await download(folder))
    const lines = compare(sdk, await readTable())
    return lines.length === 0
      ? { code: 0, text: `openai ${sdk.version}: nothing differs in its ${sdk.events.size} typed events and ${sdk.subscribable.length} event types of endpoints` }
      : { code: 1, text: `openai ${sdk.version} and the event table differ:\n${lines.map(line => `  ${line}`).join('\n')}` }
  } catch (error) {
    return { code: 2, text: `nothing was compared: ${error.message}` }
  } finally {
    await rm(folder, { recursive: true, force: true })
  }
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const { code, text } = await drift(process.argv.slice(2))
  process.exitCode = code
  console[code === 2 ? 'error' : 'log'](text)
}
