import { eventOf } from '../deliveries.mjs'
import { ratioMeasured } from '../markdown.mjs'
import { compared } from '../statistics.mjs'
import { renderVariants, variant } from '../variants.mjs'

export const name = 'tenants'

export async function run (bench) {
  bench.log('tenants')
  const candidates = Object.fromEntries([1, 10_000].map(tenants => [tenants.toLocaleString('en'), variant({ tenants }, { plan: { tenants } })]))
  const plan = bench.scaled({ count: 5_000, warmUp: 48_000, rounds: 32, generations: 4 })
  return { plan, variants: await bench.compare(candidates, { ...plan, templates: [eventOf(200)] }) }
}

export const render = ({ plan, variants }) => renderVariants('tenants', plan, variants)

export function targets ({ variants }) {
  const [one, many] = Object.values(variants)
  return [{ what: 'CPU a delivery with 10,000 tenants behind the route ÷ one', limit: 1.05, ...ratioMeasured(compared(many, one)), digits: 3 }]
}
