/** Turns one value or a list into a list. Fastify accepts both for the hooks of a route. */
export function toArray<T> (value: T | readonly T[] | undefined): T[] {
  if (value === undefined) return []
  return Array.isArray(value) ? [...value] : [value as T]
}
