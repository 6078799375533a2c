/** The share of the values that lies below, 0 to 1. */
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
 * How one contender compares with another, round by round: what slows a machine for seconds slows both.
 *
 * @param {{ cpu: { rounds: number[] } }} measured
 * @param {{ cpu: { rounds: number[] } }} other
 * @returns the median of the rounds' ratios, and between what the middle half of them lies
 */
export function compared (measured, other) {
  return spread(measured.cpu.rounds.map((cpu, round) => cpu / other.cpu.rounds[round]))
}

/** As `compared`, of what each costs above a third, which both contain. */
export function comparedAbove (base, measured, other) {
  return spread(measured.cpu.rounds.map((cpu, round) => (cpu - base.cpu.rounds[round]) / (other.cpu.rounds[round] - base.cpu.rounds[round])))
}

/** CPU µs a request above those of another. */
export const above = (base, measured) => median(measured.cpu.rounds.map((cpu, round) => cpu - base.cpu.rounds[round]))

function spread (ratios) {
  return { median: median(ratios), low: quantile(ratios, 0.25), high: quantile(ratios, 0.75) }
}
