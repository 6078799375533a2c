// `npm run docs` writes the tables of docs/events.md from the event table.
import { readFile, writeFile } from 'node:fs/promises'
import { fileURLToPath } from 'node:url'

/** @typedef {Record<string, { description: string, schema: object }>} Entries */

/**
 * Returns the document with its tables rendered again.
 *
 * @param {string} document text with `<!-- table NAME -->` … `<!-- end -->` for each of the tables
 * @param {Record<string, Entries>} tables by NAME
 */
export function render (document, tables) {
  for (const [name, entries] of Object.entries(tables)) {
    const [begin, end] = [`<!-- table ${name} -->`, '<!-- end -->']
    const from = document.indexOf(begin)
    const to = document.indexOf(end, from)
    if (from === -1 || to === -1) throw new Error(`docs/events.md: expected ${begin} followed by ${end}`)
    document = `${document.slice(0, from)}${begin}\n\n${families(entries)}\n${document.slice(to)}`
  }
  return document
}

/** One table for each family, under the pattern by which `on()` takes the family. */
function families (entries) {
  const byFamily = new Map()
  for (const entry of Object.entries(entries)) {
    const [family] = entry[0].split('.')
    byFamily.set(family, [...byFamily.get(family) ?? [], entry])
  }
  return [...byFamily].map(([family, members]) => [
    `### \`${family}.*\``,
    '',
    '| Type | `data` | `object` | When |',
    '|---|---|---|---|',
    ...members.map(([type, { description, schema }]) =>
      `| \`${type}\` | ${fields(schema.properties.data)} | ${isRequired(schema, 'object') ? 'always' : 'may be absent'} | ${cell(description)} |`),
    ''
  ].join('\n')).join('\n')
}

const isRequired = (schema, name) => schema.required?.includes(name) ?? false

function fields (schema) {
  return Object.entries(schema.properties).map(([name, field]) => {
    const notes = knownValues('', field)
    return `\`${cell(property(schema, name))}\`${notes.length === 0 ? '' : ` (${notes.join('; ')})`}`
  }).join('<br>')
}

function knownValues (path, field) {
  if (field.examples !== undefined) return [`known${path}: ${field.examples.map(value => `\`${value}\``).join(', ')}`]
  return Object.entries(field.properties ?? {}).flatMap(([inner, innerField]) => knownValues(`${path} \`${inner}\``, innerField))
}

const property = (schema, name) => `${name}${isRequired(schema, name) ? '' : '?'}: ${typeOf(schema.properties[name])}`

/** The TypeScript of a schema. It supports only the part of JSON Schema that the event table uses. */
function typeOf (schema) {
  if (schema.anyOf !== undefined) return schema.anyOf.map(typeOf).join(' | ')
  if (schema.const !== undefined) return `'${schema.const}'`
  if (schema.type === 'array') return `Array<${typeOf(schema.items)}>`
  if (schema.type === 'object') return `{ ${Object.keys(schema.properties).map(name => property(schema, name)).join(', ')} }`
  return schema.type === 'integer' ? 'number' : schema.type
}

const cell = text => text.replaceAll('|', '\\|')

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const { guideEntries, officialEntries } = await import('../dist/events/index.js')
  const file = new URL('events.md', import.meta.url)
  await writeFile(file, render(await readFile(file, 'utf8'), { official: officialEntries, guide: guideEntries }))
}
