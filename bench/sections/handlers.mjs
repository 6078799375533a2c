import { eventOf } from '../deliveries.mjs'
import { ownTypes, types } from '../event-types.mjs'
import { ratioMeasured } from '../markdown.mjs'
import { compared } from '../statistics.mjs'
import { renderVariants, variant } from '../variants.mjs'

export const name = 'handlers'

export async function run (bench) {
  bench.log('handlers registered')
  const [delivered, ...others] = types
  const candidates = { '1, for one type': variant({ types: [delivered] }) }
  for (const count of [10, 50, 200]) {
    const otherHandlers = Array.from({ length: count - 1 }, (_, index) => others[index % others.length])
    candidates[`${count}, for ${Math.min(count, types.length)} types`] = variant({ types: [delivered], otherHandlers, ownTypes })
  }
  const plan = bench.scaled({ count: 2_000, warmUp: 12_000, rounds: 16, generations: 4 })
  return { plan, variants: await bench.compare(candidates, { ...plan, templates: [eventOf(200)] }) }
}

export const render = ({ plan, variants }) => renderVariants('handlers registered', plan, variants)

export function targets ({ variants }) {
  const [one, ...more] = Object.values(variants)
  return [{ what: 'CPU a delivery with 200 handlers for 40 types ÷ one handler for one', limit: 1.02, ...ratioMeasured(compared(more.at(-1), one)), digits: 3 }]
}
