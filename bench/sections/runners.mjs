import { summary } from '../bench.mjs'
import { eventOf } from '../deliveries.mjs'
import { cpuFigures, decimals, table, whole } from '../markdown.mjs'
import { variant } from '../variants.mjs'

export const name = 'runners'

/** Runner, store, and deliveries a round. */
const COMBINATIONS = [
  ['inline', 'memory', 8_000],
  ['inline', 'sqlite', 4_000],
  ['inline', 'redis', 4_000],
  ['inline', 'postgres', 2_000],
  ['background', 'memory', 8_000],
  ['background', 'sqlite', 4_000],
  ['background', 'redis', 4_000],
  ['durable', 'memory', 4_000],
  ['durable', 'sqlite', 4_000],
  ['bullmq', 'memory', 2_000],
  ['bullmq', 'redis', 2_000],
  ['pgboss', 'memory', 2_000]
]

/** At least so much of what `inline()` with memory handles, on the same cores. */
const LIMITS = [
  ['inline', 'sqlite', 0.5], ['durable', 'memory', 0.5], ['durable', 'sqlite', 0.35],
  ['bullmq', 'memory', 0.45], ['inline', 'postgres', 0.25], ['pgboss', 'memory', 0.25]
]

const needs = ([runner, store]) => runner === 'bullmq' || store === 'redis' ? 'redis' : runner === 'pgboss' || store === 'postgres' ? 'postgres' : undefined

export async function run (bench) {
  bench.log('runners and stores')
  const rounds = bench.quick ? 1 : 5
  const isThere = combination => bench.has({ needs: needs(combination) })
  const entries = COMBINATIONS.filter(isThere).map(([runner, store, count]) => ({ runner, store, count, samples: [] }))
  try {
    for (const entry of entries) entry.server = await bench.serve(variant({ runner: entry.runner, store: entry.store, handler: 'async' }))
    const templates = [eventOf(200)]
    for (let round = 0; round <= rounds; round++) {
      for (const { server, count, samples } of entries) {
        // The sender sleeps while it waits: SQLite's disk and Redis need a core as well.
        const sample = await bench.send(server, { templates, count }, { untilHandled: count * (round + 1), poll: false })
        if (round > 0) samples.push(sample) // the first warms up
      }
    }
  } finally {
    for (const { server } of entries) await server?.stop()
  }
  return {
    rounds,
    results: entries.map(({ runner, store, count, samples }) => ({ runner, store, count, ...summary(samples) })),
    leftOut: COMBINATIONS.filter(combination => !isThere(combination)).map(([runner, store]) => `${runner}() with ${store}: ${bench.missing[needs([runner, store])]}`)
  }
}

export function render ({ rounds, results, leftOut }) {
  const rows = results.map(({ runner, store, count, cpu, rate, p50, p99 }) => [
    `\`${runner}()\``, store, whole(rate), ...cpuFigures({ cpu }), decimals(p50, 2), decimals(p99, 2), `${rounds} × ${whole(count)}`
  ])
  const text = table(['Runner', 'Store', 'handled/s', 'CPU ms per 1,000', 'min–max', 'p50 ms', 'p99 ms', 'deliveries'], rows, 2)
  return leftOut.length === 0 ? text : `${text}\n\nLeft out: ${leftOut.join('; ')}.`
}

export function targets ({ results }) {
  const of = (runner, store) => results.find(result => result.runner === runner && result.store === store)
  const limit = of('inline', 'memory')
  return LIMITS.flatMap(([runner, store, least]) => {
    const measured = of(runner, store)
    if (measured === undefined) return []
    // Turned round: what is measured has to stay below its limit.
    return [{ what: `deliveries a second of \`inline()\` with memory ÷ \`${runner}()\` with ${store}`, limit: 1 / least, measured: limit.rate / measured.rate }]
  })
}
