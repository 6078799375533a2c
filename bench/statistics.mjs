/** @param share of the values that lie below the result, 0 to 1 */
export function quantile (values, share) {
  const sorted = values.toSorted((a, b) => a - b)
  const at = (sorted.length - 1) * share
  const below = sorted[Math.floor(at)]
  return below + (sorted[Math.ceil(at)] - below) * (at % 1)
}

export const median = values => quantile(values, 0.5)
export const min = values => Math.min(...values)
export const max = values => Math.max(...values)

/**
 * Compares one contender with another, round by round, because whatever slows the machine for seconds slows both.
 *
 * @param {{ cpu: { rounds: number[] } }} measured
 * @param {{ cpu: { rounds: number[] } }} other
 * @returns the median of the rounds' ratios, and the limits of their middle half
 */
export function compared (measured, other) {
  return spread(measured.cpu.rounds.map((cpu, round) => cpu / other.cpu.rounds[round]))
}

/** Like `compared`, but of the costs above those of `base`, which both of them include. */
export function comparedAbove (base, measured, other) {
  return spread(measured.cpu.rounds.map((cpu, round) => (cpu - base.cpu.rounds[round]) / (other.cpu.rounds[round] - base.cpu.rounds[round])))
}

/** The median of CPU µs per request above those of another contender. */
export const above = (base, measured) => median(measured.cpu.rounds.map((cpu, round) => cpu - base.cpu.rounds[round]))

function spread (ratios) {
  return { median: median(ratios), low: quantile(ratios, 0.25), high: quantile(ratios, 0.75) }
}
