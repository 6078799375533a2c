import { ownTypes, templatesOf, types } from '../event-types.mjs'
import { whole } from '../markdown.mjs'
import { renderVariants, variant } from '../variants.mjs'

export const name = 'types'

/** The smallest size in bytes that has room for the sample of every type. */
const SIZE = 512

export async function run (bench) {
  bench.log('event types in play')
  const candidates = Object.fromEntries([1, 5, 10, 20, 40].map(count => {
    const inPlay = types.slice(0, count)
    return [count, variant({ types: inPlay, ownTypes }, { plan: { templates: templatesOf(inPlay, SIZE) } })]
  }))
  const plan = bench.scaled({ count: 2_000, warmUp: 12_000, rounds: 12, generations: 3 })
  return { plan, size: SIZE, variants: await bench.compare(candidates, plan) }
}

export const render = ({ plan, size, variants }) => `${renderVariants('types in play', plan, variants)} Events of ${whole(size)} bytes, one type after the other.`

export const targets = () => []
