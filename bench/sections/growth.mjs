import { eventOf } from '../deliveries.mjs'
import { decimals, ratio, table, whole } from '../markdown.mjs'
import { contenderOf, labelOf, pairsThere, withLeftOut } from '../pairs.mjs'
import { median } from '../statistics.mjs'

export const name = 'growth'

const CONNECTIONS = [1, 10, 50, 200, 1_000]
const REMEMBERED = [100_000, 10_000_000]

const CONNECTED = [['inline', 'memory', 8_000], ['inline', 'sqlite', 3_000], ['durable', 'sqlite', 3_000], ['inline', 'redis', 3_000], ['inline', 'postgres', 2_000]]
const REMEMBERING = [['inline', 'sqlite', 4_000], ['inline', 'postgres', 2_000]]

const pairsOf = list => list.map(([runner, store, count]) => ({ runner, store, count }))

export async function run (bench) {
  const rounds = bench.quick ? 1 : bench.short ? 2 : 3
  const templates = [eventOf(200)]

  const connected = pairsThere(bench, pairsOf(CONNECTED))
  const connections = []
  for (const pair of connected.pairs) {
    bench.log(`connections: ${pair.runner}, ${pair.store}`)
    const server = await bench.serve(contenderOf(pair))
    try {
      let sent = 0
      const rate = async (count, connections) => {
        sent += count
        return (await bench.send(server, { templates, count, connections }, { untilHandled: sent, poll: false })).rate
      }
      await rate(pair.count, 50)
      const rates = Object.fromEntries(CONNECTIONS.map(count => [count, []]))
      for (let round = 0; round < rounds; round++) {
        for (const count of CONNECTIONS) rates[count].push(await rate(count === 1 ? pair.count / 4 : pair.count, count))
      }
      connections.push({ ...pair, rates: CONNECTIONS.map(count => median(rates[count])) })
    } finally {
      await server.stop()
    }
  }

  const remembering = pairsThere(bench, pairsOf(REMEMBERING))
  const remembered = []
  for (const pair of remembering.pairs) {
    const figures = REMEMBERED.map(() => [])
    const servers = []
    try {
      for (const count of REMEMBERED) {
        bench.log(`${count} remembered ids: ${pair.store}`)
        servers.push(await bench.serve(contenderOf(pair, { remembered: bench.quick ? count / 100 : count })))
      }
      for (let round = 0; round <= rounds; round++) {
        for (const [at, server] of servers.entries()) {
          const { cpu, rate } = await bench.send(server, { templates, count: pair.count }, { untilHandled: pair.count * (round + 1), poll: false })
          if (round > 0) figures[at].push({ cpu, rate }) // the first round warms up
        }
      }
    } finally {
      for (const server of servers) await server.stop()
    }
    remembered.push({ ...pair, figures: figures.map(rounds => ({ cpu: median(rounds.map(({ cpu }) => cpu)), rate: median(rounds.map(({ rate }) => rate)) })) })
  }
  return { connections, remembered, leftOut: [...connected.leftOut, ...remembering.leftOut] }
}

const grown = ([few, many]) => few.rate / many.rate

export function render ({ connections, remembered, leftOut }) {
  const byConnections = table(
    ['handled/s, by connections', ...CONNECTIONS.map(whole)],
    connections.map(({ rates, ...pair }) => [labelOf(pair), ...rates.map(whole)])
  )
  const byIds = table(
    ['Remembered ids', ...REMEMBERED.flatMap(count => [`${whole(count)}: handled/s`, 'CPU ms per 1,000']), 'a delivery takes'],
    remembered.map(({ figures, ...pair }) => [labelOf(pair), ...figures.flatMap(({ rate, cpu }) => [whole(rate), decimals(cpu, 1)]), `${ratio(grown(figures))} of before`])
  )
  return withLeftOut(`${byConnections}\n\n${byIds}`, leftOut)
}

export function targets ({ remembered }) {
  return remembered.map(({ figures, ...pair }) => ({ what: `what a delivery takes with ${REMEMBERED.toReversed().map(whole).join(' ids ÷ with ')}: ${labelOf(pair)}`, limit: 1.33, measured: grown(figures) }))
}
