import { eventOf } from '../deliveries.mjs'
import { ratioMeasured } from '../markdown.mjs'
import { compared } from '../statistics.mjs'
import { renderVariants, variant } from '../variants.mjs'

export const name = 'inspector'

/** The same deliveries with and without the inspector. No page is open. */
const candidates = () => ({
  'the plugin, an async handler': variant({ handler: 'async' }),
  'with the inspector': variant({ handler: 'async', inspector: true })
})

export async function run (bench) {
  bench.log('the inspector')
  const plan = bench.scaled({ count: 1_000, warmUp: 12_000, rounds: 40, generations: 3 })
  return { plan, variants: await bench.compare(candidates(), { ...plan, templates: [eventOf(200)] }) }
}

export const render = ({ plan, variants }) => renderVariants('the inspector', plan, variants)

export function targets ({ variants }) {
  const [off, on] = Object.values(variants)
  return [{ what: 'CPU a delivery with the inspector ÷ without it', limit: 1.15, ...ratioMeasured(compared(on, off)) }]
}
