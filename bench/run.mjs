// npm run bench: measures, prints, and writes docs/performance.md. See --help.
import { readFile, writeFile } from 'node:fs/promises'
import { resolve } from 'node:path'
import { pathToFileURL } from 'node:url'
import { parseArgs } from 'node:util'
import { Bench } from './bench.mjs'
import { contenders } from './contenders/index.mjs'
import { describeMachine } from './machine.mjs'
import { renderReport, renderTargets, targetsOf } from './report.mjs'
import { SIZES } from './sections/comparison.mjs'
import { sections } from './sections/index.mjs'

const HELP = `npm run bench [-- options]

  --quick                 fewer rounds, after a shorter warm-up, by one process of each contender: no verdict
  --short                 a third of the rounds, in half of the time
  --only SECTION          may be repeated: ${Object.keys(sections).join(', ')}
  --contenders NAME,…     of the comparison: ${Object.keys(contenders).join(', ')}
  --sizes BYTES,…         of the comparison: ${SIZES.map(({ size }) => size).join(', ')}
  --baseline DIRECTORY    in the comparison, the plugin as built in another checkout
  --profile DIRECTORY     where a CPU profile of each server goes
  --no-write              leaves docs/performance.md as it is; so does each of the above but --short
`

const { values: flags } = parseArgs({
  options: {
    quick: { type: 'boolean', default: false },
    short: { type: 'boolean', default: false },
    only: { type: 'string', multiple: true },
    contenders: { type: 'string' },
    sizes: { type: 'string' },
    baseline: { type: 'string' },
    profile: { type: 'string' },
    'no-write': { type: 'boolean', default: false },
    help: { type: 'boolean', default: false }
  }
})
if (flags.help) {
  console.log(HELP)
  process.exit()
}

const chosen = assertKnown('section', flags.only ?? Object.keys(sections), Object.keys(sections))
const choice = {
  ...(flags.contenders !== undefined && { names: assertKnown('contender', flags.contenders.split(','), Object.keys(contenders)) }),
  ...(flags.sizes !== undefined && { sizes: assertKnown('size', flags.sizes.split(','), SIZES.map(({ size }) => String(size))).map(Number) }),
  ...(flags.baseline !== undefined && { baseline: pathToFileURL(resolve(flags.baseline, 'dist/index.js')).href })
}

function assertKnown (kind, wanted, known) {
  const unknown = wanted.find(name => !known.includes(name))
  if (unknown === undefined) return wanted
  console.error(`There is no ${kind} ${unknown}. There are ${known.join(', ')}.`)
  process.exit(1)
}

for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, () => process.exit(1)) // cleans up in its 'exit' listeners

const start = performance.now()
const log = line => console.error(`${Math.round((performance.now() - start) / 1000)} s\t${line}`)
const machine = describeMachine()
const results = {}
const bench = await Bench.start({ quick: flags.quick, short: flags.short, log, ...(flags.profile !== undefined && { profile: resolve(flags.profile) }) })
try {
  for (const name of chosen) {
    results[name] = await sections[name].run(bench, choice)
    console.log(`## ${name}\n\n${sections[name].render(results[name])}\n`)
  }
} finally {
  await bench.close()
}
const targets = targetsOf(results)
if (targets.length > 0) console.log(renderTargets(targets))

const isComplete = !flags.quick && flags.only === undefined && flags.profile === undefined && Object.keys(choice).length === 0
if (isComplete && !flags['no-write']) {
  const template = await readFile(new URL('performance.template.md', import.meta.url), 'utf8')
  await writeFile(new URL('../docs/performance.md', import.meta.url), renderReport(template, machine, results))
  log('docs/performance.md is written')
}
