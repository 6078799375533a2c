/** @param {number} [labels] the number of columns before the figures, which are aligned to the right */
export function table (header, rows, labels = 1) {
  const line = cells => `| ${cells.join(' | ')} |`
  return [line(header), line(header.map((_, index) => index < labels ? '---' : '---:')), ...rows.map(line)].join('\n')
}

export const decimals = (value, digits) => value.toLocaleString('en', { minimumFractionDigits: digits, maximumFractionDigits: digits })

export const whole = value => decimals(value, 0)

export const ratio = value => decimals(value, value < 10 ? 2 : 1)

/** The middle half, as `compared` returns it. */
const half = ({ low, high }) => `${ratio(low)}–${ratio(high)}`
export const ratioFigures = compared => [ratio(compared.median), half(compared)]
/** The fields of a target that state a ratio. */
export const ratioMeasured = compared => ({ measured: compared.median, half: half(compared) })

/** CPU µs per request are the same number as CPU ms per 1,000 requests. */
export const cpuFigures = ({ cpu }) => [decimals(cpu.median, 1), `${decimals(cpu.min, 1)}–${decimals(cpu.max, 1)}`]

/** The CPU time with its minimum and maximum, requests a second, p50 and p99. */
export const figures = measured => [...cpuFigures(measured), whole(measured.rate), decimals(measured.p50, 2), decimals(measured.p99, 2)]

/** The sample size of a table, in words. */
export const extent = ({ rounds, generations, count }, what) =>
  `${rounds * generations} rounds of ${whole(count)} ${what} each, by ${generations === 1 ? 'one process' : `${generations} processes`} of each contender.`
