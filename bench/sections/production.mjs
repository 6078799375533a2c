import { contenders } from '../contenders/index.mjs'
import { eventOf } from '../deliveries.mjs'
import { ratioMeasured } from '../markdown.mjs'
import { compared } from '../statistics.mjs'
import { renderVariants, variant } from '../variants.mjs'

export const name = 'production'

/** What a real app has enabled: a log file at level info with a line for each delivery, an async handler, the deadline, and metrics. */
const candidates = () => ({
  'inline HMAC, a logger and a line of its own': { ...contenders.hmac, options: { logger: true } },
  'fastify-raw-body + openai, a logger and metrics of its own': { ...contenders['raw-body-openai'], options: { logger: true, metrics: true } },
  'the plugin, a logger': variant({ handler: 'async', logger: true }),
  'the plugin, a logger and metrics': variant({ handler: 'async', logger: true, metrics: true })
})

export async function run (bench) {
  bench.log('as in production')
  const plan = bench.scaled({ count: 2_000, warmUp: 12_000, rounds: 12, generations: 3 })
  return { plan, variants: await bench.compare(candidates(), { ...plan, templates: [eventOf(200)] }) }
}

export const render = ({ plan, variants }) => renderVariants('what is on', plan, variants)

export function targets ({ variants }) {
  const [hmac, , logged, measured] = Object.values(variants)
  return [
    { what: 'CPU a delivery with a logger ÷ inline HMAC with a logger', limit: 1.12, ...ratioMeasured(compared(logged, hmac)) },
    { what: 'CPU a delivery with a logger and metrics ÷ inline HMAC with a logger', limit: 1.18, ...ratioMeasured(compared(measured, hmac)) }
  ]
}
