/** `, did you mean "…"?` when a known name is close to what was given, else nothing. The name is told with `prefix` before it. */
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

/** The Levenshtein distance. */
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
