/** Hooks of a route, which Fastify takes as one or as a list. */
export function toArray<T> (value: T | readonly T[] | undefined): T[] {
  if (value === undefined) return []
  return Array.isArray(value) ? [...value] : [value as T]
}
