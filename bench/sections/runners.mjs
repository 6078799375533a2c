import { summary } from '../bench.mjs'
import { eventOf } from '../deliveries.mjs'
import { cpuFigures, decimals, ratio, table, whole } from '../markdown.mjs'
import { contenderOf, labelOf, pairsThere, withLeftOut } from '../pairs.mjs'

export const name = 'runners'

/**
 * Runner, store, the least share of the deliveries and the greatest multiple of the CPU time of `inline()` with the memory store, on the
 * same cores.
 */
const LIMITS = [
  ['inline', 'sqlite', 0.5, 2.5], ['durable', 'memory', 0.5, 2.5], ['durable', 'sqlite', 0.35, 2.5],
  ['bullmq', 'memory', 0.45], ['inline', 'postgres', 0.25], ['pgboss', 'memory', 0.25]
]

export async function run (bench) {
  bench.log('runners and stores')
  const rounds = bench.quick ? 1 : 5
  const count = bench.quick ? 2_000 : 8_000
  const { pairs, leftOut } = pairsThere(bench)
  const entries = pairs.map(pair => ({ ...pair, samples: [] }))
  try {
    for (const entry of entries) entry.server = await bench.serve(contenderOf(entry))
    const templates = [eventOf(200)]
    for (let round = 0; round <= rounds; round++) {
      for (const { server, samples } of entries) {
        // The sender sleeps between answers, because SQLite's disk writes and Redis need a core too.
        const sample = await bench.send(server, { templates, count }, { untilHandled: count * (round + 1), poll: false })
        if (round > 0) samples.push(sample) // the first round warms up
      }
    }
  } finally {
    for (const { server } of entries) await server?.stop()
  }
  return { rounds, count, leftOut, results: entries.map(({ runner, store, samples }) => ({ runner, store, ...summary(samples) })) }
}

const find = (results, runner, store) => results.find(result => result.runner === runner && result.store === store)

export function render ({ rounds, count, results, leftOut }) {
  const first = find(results, 'inline', 'memory')
  const rows = results.map(({ runner, store, cpu, rate, p50, p99 }) => [
    labelOf({ runner, store }), whole(rate), ratio(rate / first.rate), ...cpuFigures({ cpu }), decimals(p50, 2), decimals(p99, 2)
  ])
  const text = `${table(['Runner, store', 'handled/s', '÷ first', 'CPU ms per 1,000', 'min–max', 'p50 ms', 'p99 ms'], rows)}\n\n${rounds} × ${whole(count)} deliveries each.`
  return withLeftOut(text, leftOut)
}

export function targets ({ results }) {
  const first = find(results, 'inline', 'memory')
  return LIMITS.flatMap(([runner, store, least, limit]) => {
    const measured = find(results, runner, store)
    if (measured === undefined) return []
    const of = `${labelOf({ runner, store })} ÷ ${labelOf(first)}`
    return [
      { what: `handled a second: ${of}`, least, measured: measured.rate / first.rate },
      ...(limit === undefined ? [] : [{ what: `CPU a delivery: ${of}`, limit, measured: measured.cpu.median / first.cpu.median }])
    ]
  })
}
