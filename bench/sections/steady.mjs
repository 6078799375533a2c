import { eventOf } from '../deliveries.mjs'
import { decimals, table, whole } from '../markdown.mjs'
import { contenderOf, labelOf, pairsThere, withLeftOut } from '../pairs.mjs'
import { max, median } from '../statistics.mjs'

export const name = 'steady'

/** Deliveries a second, whether or not the earlier ones have been answered. */
const ARRIVALS = 1_000
/** The greatest p99 in ms. */
const LIMIT = 25

export async function run (bench) {
  const rounds = bench.quick ? 1 : bench.short ? 2 : 3
  const count = bench.quick ? 1_000 : 3_000
  const { pairs, leftOut } = pairsThere(bench)
  const results = []
  for (const pair of pairs) {
    bench.log(`${ARRIVALS} a second: ${pair.runner}, ${pair.store}`)
    const server = await bench.serve(contenderOf(pair))
    try {
      const templates = [eventOf(200)]
      await bench.send(server, { templates, count: 2_000 }, { untilHandled: 2_000, poll: false })
      const samples = []
      for (let round = 1; round <= rounds; round++) {
        samples.push(await bench.send(server, { templates, count, arrivals: ARRIVALS }, { untilHandled: 2_000 + round * count, poll: false }))
      }
      const of = figure => samples.map(sample => sample[figure])
      results.push({ ...pair, cpu: median(of('cpu')), p50: median(of('p50')), p99: median(of('p99')), worst: max(of('worst')) })
    } finally {
      await server.stop()
    }
  }
  return { rounds, count, results, leftOut }
}

export function render ({ rounds, count, results, leftOut }) {
  const rows = results.map(({ cpu, p50, p99, worst, ...pair }) => [labelOf(pair), decimals(cpu, 1), decimals(p50, 1), decimals(p99, 1), decimals(worst, 1)])
  const text = `${table(['Runner, store', 'CPU ms per 1,000', 'p50 ms', 'p99 ms', 'greatest ms'], rows)}\n\n${rounds} × ${whole(count)} deliveries each; medians of the rounds, and the greatest of all.`
  return withLeftOut(text, leftOut)
}

export function targets ({ results }) {
  return results.map(({ p99, ...pair }) => ({ what: `p99 in ms at ${whole(ARRIVALS)} a second: ${labelOf(pair)}`, limit: LIMIT, measured: p99, digits: 1 }))
}
