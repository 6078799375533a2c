import { eventOf } from '../deliveries.mjs'
import { renderVariants, variant } from '../variants.mjs'

export const name = 'secrets'

export async function run (bench) {
  bench.log('secrets')
  const candidates = Object.fromEntries([1, 2, 3, 4, 5].map(secretCount => [secretCount, variant({ secretCount })]))
  const plan = bench.scaled({ count: 2_000, warmUp: 12_000, rounds: 12, generations: 3 })
  return { plan, variants: await bench.compare(candidates, { ...plan, templates: [eventOf(200)] }) }
}

export const render = ({ plan, variants }) => renderVariants('secrets', plan, variants)

export const targets = () => []
