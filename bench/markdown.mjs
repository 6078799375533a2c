/** @param {number} [labels] columns before the figures, which stand to the right */
export function table (header, rows, labels = 1) {
  const line = cells => `| ${cells.join(' | ')} |`
  return [line(header), line(header.map((_, index) => index < labels ? '---' : '---:')), ...rows.map(line)].join('\n')
}

export const decimals = (value, digits) => value.toLocaleString('en', { minimumFractionDigits: digits, maximumFractionDigits: digits })

export const whole = value => decimals(value, 0)

export const ratio = value => decimals(value, value < 10 ? 2 : 1)

/** See `compared`. */
const half = ({ low, high }) => `${ratio(low)}–${ratio(high)}`
export const ratioFigures = compared => [ratio(compared.median), half(compared)]
/** What a target says of it. */
export const ratioMeasured = compared => ({ measured: compared.median, half: half(compared) })

/** CPU µs a request are CPU ms per 1,000. */
export const cpuFigures = ({ cpu }) => [decimals(cpu.median, 1), `${decimals(cpu.min, 1)}–${decimals(cpu.max, 1)}`]

/** CPU, its least and greatest, requests a second, p50 and p99. */
export const figures = measured => [...cpuFigures(measured), whole(measured.rate), decimals(measured.p50, 2), decimals(measured.p99, 2)]

/** What a table rests on. */
export const extent = ({ rounds, generations, count }, what) =>
  `${rounds * generations} rounds of ${whole(count)} ${what} each, by ${generations === 1 ? 'one process' : `${generations} processes`} of each contender.`
