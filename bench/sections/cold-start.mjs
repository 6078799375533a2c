import { contenders } from '../contenders/index.mjs'
import { decimals, ratio, ratioFigures, ratioMeasured, table } from '../markdown.mjs'
import { Child } from '../processes.mjs'
import { compared, median } from '../statistics.mjs'

export const name = 'cold-start'

const NAMES = ['bare', 'ours-sync', 'standardwebhooks', 'raw-body-openai']

export async function run (bench) {
  const starts = bench.quick ? 5 : 21
  bench.log(`${starts} cold starts each`)
  const samples = Object.fromEntries(NAMES.map(name => [name, []]))
  for (let start = -1; start < starts; start++) {
    for (const name of NAMES) {
      const child = await Child.start('cold-start.mjs', [contenders[name].module])
      await child.stop()
      if (start >= 0) samples[name].push(child.hello) // the first start reads the files from the disk
    }
  }
  const of = (name, get) => median(samples[name].map(get))
  const rounds = (name, what) => ({ cpu: { rounds: samples[name].map(({ boot }) => boot[what]) } })
  return {
    starts,
    contenders: Object.fromEntries(NAMES.map(name => [name, {
      againstBare: compared(rounds(name, 'cpu'), rounds('bare', 'cpu')),
      wallAgainstBare: compared(rounds(name, 'wall'), rounds('bare', 'wall')),
      bootCpu: of(name, ({ boot }) => boot.cpu),
      bootWall: of(name, ({ boot }) => boot.wall),
      processCpu: of(name, ({ process }) => process.cpu),
      processWall: of(name, ({ process }) => process.wall),
      deliveryWall: of(name, ({ delivery }) => delivery.wall)
    }]))
  }
}

export function render ({ starts, contenders: measured }) {
  const rows = Object.entries(measured).map(([name, { againstBare, bootCpu, bootWall, processCpu, processWall, deliveryWall }]) => [
    name.startsWith('ours') ? `**${contenders[name].label}**` : contenders[name].label,
    ...[bootCpu, bootWall, processCpu, processWall].map(ms => decimals(ms, 0)),
    ...ratioFigures(againstBare),
    decimals(deliveryWall, 1)
  ])
  const header = ['ms', 'CPU, import to ready', 'wall, import to ready', 'CPU, process to ready', 'wall, process to ready', 'CPU, import to ready ÷ bare app', 'middle half', 'wall, first delivery']
  return `${table(header, rows)}\n\nMedians of ${starts} starts each, taking turns. The first delivery is injected, and includes what is compiled on first use.`
}

export function targets ({ contenders: { 'ours-sync': { againstBare, wallAgainstBare } } }) {
  return [{ what: 'CPU from import to ready ÷ bare app', limit: 1.3, ...ratioMeasured(againstBare), note: `${ratio(wallAgainstBare.median)} by wall clock` }]
}
