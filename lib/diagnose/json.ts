/**
 * JSON whose numbers, duplicate keys and order of keys are kept as they were written, because a signature covers them. JSON.parse would
 * lose `1.0`, large integers, duplicate keys and the order of numeric keys. The escapes in strings are not kept.
 */
export type Json = Scalar | Text | Collection

/** A number or a literal, as it was written. */
type Scalar = string
interface Text { readonly text: string }
interface Collection {
  readonly open: '{' | '['
  readonly close: '}' | ']'
  readonly entries: ReadonlyArray<{ readonly key?: string, readonly value: Json }>
}

/** The limit to the nesting, which keeps untrusted JSON from exhausting the stack. OpenAI's events are three levels deep. */
const MAX_DEPTH = 100

const TOKEN = /"(?:[^"\\]+|\\.)*"|[{}[\]]|[^\s{}[\]:,"]+/gs

/** @returns `undefined` when the text is not JSON or is nested too deep */
export function parseJson (text: string): Json | undefined {
  try {
    JSON.parse(text) // throws for invalid JSON, so that `parseValue` reads only valid JSON
    const tokens = text.matchAll(TOKEN)
    const next = (): string => tokens.next().value![0]
    return parseValue(next(), next, 0)
  } catch {
    return undefined
  }
}

function parseValue (token: string, next: () => string, depth: number): Json {
  if (token.startsWith('"')) return { text: JSON.parse(token) as string }
  if (token !== '{' && token !== '[') return token
  if (depth === MAX_DEPTH) throw new RangeError('nested too deep')
  const close = token === '{' ? '}' : ']'
  const entries = []
  for (let part = next(); part !== close; part = next()) {
    entries.push(token === '{'
      ? { key: JSON.parse(part) as string, value: parseValue(next(), next, depth + 1) }
      : { value: parseValue(part, next, depth + 1) })
  }
  return { open: token, close, entries } as const
}

export interface Layout {
  readonly name: string
  readonly comma: string
  readonly colon: string
  readonly indent?: string
}

export interface Escaping {
  readonly name: string
  /** @param json a string as JSON.stringify writes it */
  readonly escape: (json: string) => string
}

export function serialize (json: Json, layout: Layout, escaping: Escaping, margin = '\n'): string {
  if (typeof json === 'string') return json
  if ('text' in json) return escaping.escape(JSON.stringify(json.text))
  const { open, close, entries } = json
  if (entries.length === 0) return open + close
  const inner = layout.indent === undefined ? '' : margin + layout.indent
  const parts = entries.map(({ key, value }) =>
    (key === undefined ? '' : escaping.escape(JSON.stringify(key)) + layout.colon) + serialize(value, layout, escaping, inner))
  return open + inner + parts.join(layout.comma + inner) + (inner === '' ? '' : margin) + close
}

/** Sorts the keys of every object. */
export function sorted (json: Json): Json {
  if (typeof json === 'string' || 'text' in json) return json
  const entries = json.entries.map(entry => ({ ...entry, value: sorted(entry.value) }))
  return { ...json, entries: json.open === '[' ? entries : entries.sort(byKey) }
}

function byKey ({ key: a = '' }: { key?: string }, { key: b = '' }: { key?: string }): number {
  return a < b ? -1 : a > b ? 1 : 0
}
