import { contenders } from '../contenders/index.mjs'
import { eventOf } from '../deliveries.mjs'
import { cpuFigures, extent, ratioFigures, ratioMeasured, table, whole } from '../markdown.mjs'
import { compared } from '../statistics.mjs'
import { SIZES } from './comparison.mjs'

export const name = 'refusals'

const KINDS = { unsigned: 'signature header missing', stale: 'timestamp an hour old', forged: 'signature wrong' }
const REFUSING = ['ours-sync', 'standardwebhooks']

export async function run (bench) {
  const candidates = { bare: contenders.bare, constant: { ...contenders.bare, options: { status: 401 }, refusesAll: true } }
  for (const name of REFUSING) {
    for (const kind of Object.keys(KINDS)) candidates[`${name} ${kind}`] = { ...contenders[name], plan: { kind } }
  }
  const results = []
  for (const { size, label, count, warmUp } of SIZES) {
    bench.log(`refusals, ${label}`)
    const plan = bench.scaled({ count, warmUp, rounds: 12, generations: 3 })
    results.push({ label, plan, contenders: await bench.compare(candidates, { ...plan, templates: [eventOf(size)] }) })
  }
  return results
}

export function render (results) {
  const parts = results.map(({ label, plan, contenders: measured }) => {
    const row = (who, what, figures) => [who, what, ...cpuFigures(figures), whole(figures.rate), ...ratioFigures(compared(figures, measured.bare))]
    const rows = [row(contenders.bare.label, 'accepts it', measured.bare), row('bare Fastify route', 'answers 401 with a constant', measured.constant)]
    for (const name of REFUSING) {
      for (const [kind, what] of Object.entries(KINDS)) rows.push(row(name === 'ours-sync' ? `**${contenders[name].label}**` : contenders[name].label, what, measured[`${name} ${kind}`]))
    }
    return `### ${label}, refused\n\n${table(['', 'what is wrong', 'CPU ms per 1,000', 'min–max', 'requests/s', 'CPU ÷ bare route', 'middle half'], rows, 2)}\n\n${extent(plan, 'requests')}`
  })
  return parts.join('\n\n')
}

export function targets (results) {
  return results.flatMap(({ label, contenders: measured }) => {
    const against = (name, other) => ratioMeasured(compared(measured[name], measured[other]))
    return ['unsigned', 'stale'].map(kind => ({
      what: `CPU a refusal (${KINDS[kind]}) ÷ a bare route that answers 401 with a constant, ${label}`,
      limit: 1.05,
      ...against(`ours-sync ${kind}`, 'constant')
    }))
  })
}
