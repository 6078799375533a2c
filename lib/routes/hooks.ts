/** Fastify takes one hook of a route, or a list. */
export function toArray<T> (value: T | readonly T[] | undefined): T[] {
  if (value === undefined) return []
  return Array.isArray(value) ? [...value] : [value as T]
}
