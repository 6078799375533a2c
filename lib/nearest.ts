/** Whether an event type is meant by a pattern, which is the type itself or a family such as `batch.*`. */
export function matches (pattern: string, type: string): boolean {
  return pattern.endsWith('.*') ? type.startsWith(pattern.slice(0, -1)) : pattern === type
}

/** Returns `, did you mean "…"?` if a known name is close to the given one, or else an empty string. `prefix` is put before the known name. */
export function nearest (given: string, names: readonly string[], prefix = ''): string {
  let best = ''
  let bestDistance = Math.max(2, Math.floor(given.length / 4)) + 1
  for (const name of names) {
    const distance = editDistance(given, name)
    if (distance < bestDistance) {
      best = name
      bestDistance = distance
    }
  }
  return best === '' ? '' : `, did you mean "${prefix}${best}"?`
}

/**
 * Like `nearest()`, for an event type or a pattern. Within a family only the rest of the name is compared, because "fine_tuning.job.completed"
 * as a whole is close to "fine_tuning.job.cancelled". If no name is close, all types of the family are listed.
 *
 * @param others further known words
 */
export function nearestType (given: string, types: readonly string[], others: readonly string[] = []): string {
  const family = given.slice(0, given.lastIndexOf('.') + 1)
  const members = types.filter(type => family !== '' && type.startsWith(family))
  if (members.length === 0) return nearest(given, [...others, ...types, ...families(types)])
  return nearest(given.slice(family.length), members.map(type => type.slice(family.length)), family) || `, expected one of ${members.join(', ')}`
}

function families (types: readonly string[]): Set<string> {
  const patterns = new Set<string>()
  for (const type of types) {
    for (let dot = type.indexOf('.'); dot !== -1; dot = type.indexOf('.', dot + 1)) patterns.add(`${type.slice(0, dot)}.*`)
  }
  return patterns
}

export function editDistance (a: string, b: string): number {
  let previous = Array.from({ length: b.length + 1 }, (_, j) => j)
  for (let i = 1; i <= a.length; i++) {
    const row = [i]
    for (let j = 1; j <= b.length; j++) {
      row.push(Math.min(previous[j]! + 1, row[j - 1]! + 1, previous[j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1)))
    }
    previous = row
  }
  return previous[b.length]!
}
