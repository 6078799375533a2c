import { eventOf } from '../deliveries.mjs'
import { decimals, table, whole } from '../markdown.mjs'
import { variant } from '../variants.mjs'

export const name = 'memory'

/** The number of deliveries that the memory store remembers by default. */
const COUNT = 100_000
const BATCH = 10_000

export async function run (bench) {
  bench.log(`memory for ${COUNT} remembered ids`)
  const results = {}
  for (const [name, candidate] of Object.entries({ remembered: variant({}), forgotten: variant({ idempotency: false }) })) {
    const server = await bench.serve(candidate)
    try {
      const templates = [eventOf(200)]
      const before = await server.ask('memory')
      for (let sent = 0; sent < COUNT; sent += BATCH) await bench.send(server, { templates, count: BATCH })
      results[name] = { before, after: await server.ask('memory') }
    } finally {
      await server.stop()
    }
  }
  return { count: COUNT, ...results }
}

const toMb = bytes => bytes / 1_000_000
const cost = ({ remembered, forgotten }) => toMb(remembered.after.live - forgotten.after.live)

export function render (data) {
  const row = (name, { before, after }) => [name, ...[before.live, after.live, after.rss].map(bytes => decimals(toMb(bytes), 1))]
  const rows = [row('remembered: `memoryStore()`', data.remembered), row('not remembered: `idempotency: false`', data.forgotten)]
  return `${table(['MB', 'live when ready', `live after ${whole(data.count)} deliveries`, 'resident then'], rows)}\n\nTo remember ${whole(data.count)} ids takes ${decimals(cost(data), 1)} MB.`
}

export const targets = data => [{ what: `MB to remember ${whole(data.count)} ids`, limit: 25, measured: cost(data), digits: 1 }]
