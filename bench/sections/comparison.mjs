import { fileURLToPath } from 'node:url'
import { contenders } from '../contenders/index.mjs'
import { eventOf } from '../deliveries.mjs'
import { extent, figures, ratioFigures, ratioMeasured, table } from '../markdown.mjs'
import { compared, comparedAbove } from '../statistics.mjs'

export const name = 'comparison'

/** The sizes of a body in bytes, and the deliveries in one round. 65,536 is the default `bodyLimit`. */
export const SIZES = [
  { size: 200, label: '200 B', what: 'a thin event', count: 2_000, warmUp: 16_000 },
  { size: 2_048, label: '2 KB', what: 'an incoming SIP call', count: 2_000, warmUp: 12_000 },
  { size: 65_536, label: '64 KB', what: 'as large as the default `bodyLimit` lets through', count: 300, warmUp: 1_500 }
]

/**
 * @param {import('../bench.mjs').Bench} bench
 * @param {{ names?: string[], sizes?: number[], baseline?: string }} [choice] the contenders and sizes to measure, and the URL of another
 * build to compare with
 */
export async function run (bench, { names = Object.keys(contenders), sizes, baseline } = {}) {
  const all = { ...contenders }
  if (baseline !== undefined) {
    all.baseline = { ...contenders['ours-sync'], label: `the plugin at ${fileURLToPath(new URL('..', baseline))}`, options: { handler: 'sync', from: baseline } }
    names = [...names, 'baseline']
  }
  const chosen = Object.fromEntries(names.filter(name => bench.has(all[name])).map(name => [name, all[name]]))
  const leftOut = names.filter(name => !bench.has(all[name])).map(name => `${all[name].label}: ${bench.missing[all[name].needs]}`)
  const results = []
  for (const { size, label, what, count, warmUp } of SIZES) {
    if (sizes !== undefined && !sizes.includes(size)) continue
    bench.log(`${label}: ${Object.keys(chosen).join(', ')}`)
    const plan = bench.scaled({ count, warmUp, rounds: 12, generations: 3 })
    results.push({ size, label, what, plan, contenders: await bench.compare(chosen, { ...plan, templates: [eventOf(size)] }) })
  }
  return { results, leftOut, labels: Object.fromEntries(Object.entries(chosen).map(([name, { label }]) => [name, label])) }
}

export function render ({ results, leftOut, labels }) {
  const references = Object.entries({ hmac: 'inline HMAC', bare: 'bare route' }).filter(([name]) => labels[name] !== undefined)
  const parts = results.map(({ label, what, plan, contenders }) => {
    const rows = Object.entries(contenders).map(([name, measured]) => [
      name.startsWith('ours') ? `**${labels[name]}**` : labels[name],
      ...figures(measured),
      ...references.flatMap(([reference]) => ratioFigures(compared(measured, contenders[reference])))
    ])
    const header = ['', 'CPU ms per 1,000', 'min–max', 'requests/s', 'p50 ms', 'p99 ms', ...references.flatMap(([, what]) => [`CPU ÷ ${what}`, 'middle half'])]
    return `### ${label}: ${what}\n\n${table(header, rows)}\n\n${extent(plan, 'deliveries')}`
  })
  if (leftOut.length > 0) parts.push(`Left out: ${leftOut.join('; ')}.`)
  return parts.join('\n\n')
}

/** The limits to our cost above the bare route, divided by the cost of another contender above it. */
const ABOVE_BARE = [
  ['raw-body-openai', { '200 B': 0.15, '2 KB': 0.15 }],
  ['hono-openai', { '200 B': 0.15, '2 KB': 0.15 }],
  ['express-openai', { '200 B': 0.08, '2 KB': 0.08 }],
  ['standardwebhooks', { '200 B': 0.75, '2 KB': 0.6 }],
  ['octokit', { '200 B': 0.75, '2 KB': 0.75 }]
]
const HMAC = { '200 B': 1.1, '2 KB': 1.1 }

export function targets ({ results, labels }) {
  const of = (label, names) => {
    const contenders = results.find(result => result.label === label)?.contenders
    return contenders !== undefined && names.every(name => contenders[name] !== undefined) ? contenders : undefined
  }
  const whole = Object.entries(HMAC).flatMap(([label, limit]) => {
    const contenders = of(label, ['hmac', 'ours'])
    if (contenders === undefined) return []
    return [{ what: `CPU a delivery, async handler ÷ ${labels.hmac}, ${label}`, limit, ...ratioMeasured(compared(contenders.ours, contenders.hmac)) }]
  })
  return [...whole, ...ABOVE_BARE.flatMap(([name, limits]) => Object.entries(limits).flatMap(([label, limit]) => {
    const contenders = of(label, ['bare', 'ours-sync', name])
    if (contenders === undefined) return []
    return [{ what: `CPU above the bare route ÷ that of ${labels[name]}, ${label}`, limit, ...ratioMeasured(comparedAbove(contenders.bare, contenders['ours-sync'], contenders[name])) }]
  }))]
}
