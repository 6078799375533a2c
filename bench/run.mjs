// npm run bench. Measures, prints, and writes docs/performance.md: see --help.
import { readFile, writeFile } from 'node:fs/promises'
import { resolve } from 'node:path'
import { pathToFileURL } from 'node:url'
import { parseArgs } from 'node:util'
import { Bench } from './bench.mjs'
import { describeMachine } from './machine.mjs'
import { renderChart, renderReport, renderTargets, targetsOf } from './report.mjs'
import { sections } from './sections/index.mjs'

const HELP = `npm run bench [-- options]

  --quick                 fewer rounds; writes nothing
  --only SECTION          ${Object.keys(sections).join(', ')}; may be repeated; writes nothing
  --contenders NAME,…     of the comparison, see bench/contenders/index.mjs; writes nothing
  --sizes BYTES,…         of the comparison: 200, 2048, 65536; writes nothing
  --baseline DIRECTORY    one contender more: the plugin as built in another checkout; writes nothing
  --profile DIRECTORY     writes a CPU profile of each server there, and nothing else
  --no-write              prints only
`

const { values: flags } = parseArgs({
  options: {
    quick: { type: 'boolean', default: false },
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

const chosen = flags.only ?? Object.keys(sections)
for (const name of chosen) {
  if (!Object.hasOwn(sections, name)) throw new Error(`there is no section ${name}: ${Object.keys(sections).join(', ')}`)
}
const choice = {
  ...(flags.contenders !== undefined && { names: flags.contenders.split(',') }),
  ...(flags.sizes !== undefined && { sizes: flags.sizes.split(',').map(Number) }),
  ...(flags.baseline !== undefined && { baseline: pathToFileURL(resolve(flags.baseline, 'dist/index.js')).href })
}
for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, () => process.exit(1)) // cleans up at the exit

const start = performance.now()
const log = line => console.error(`${Math.round((performance.now() - start) / 1000)} s\t${line}`)
const machine = describeMachine()
const results = {}
const bench = await Bench.start({ quick: flags.quick, log, ...(flags.profile !== undefined && { profile: resolve(flags.profile) }) })
try {
  for (const name of chosen) {
    results[name] = await sections[name].run(bench, choice)
    console.log(`## ${name}\n\n${sections[name].render(results[name])}\n`)
  }
} finally {
  await bench.close()
}
console.log(renderTargets(targetsOf(results)))

const isComplete = !flags.quick && flags.only === undefined && flags.profile === undefined && Object.keys(choice).length === 0
if (isComplete && !flags['no-write']) {
  const template = await readFile(new URL('performance.template.md', import.meta.url), 'utf8')
  const docs = new URL('../docs/', import.meta.url)
  await writeFile(new URL('performance.md', docs), renderReport(template, machine, results))
  await writeFile(new URL('performance.svg', docs), renderChart(results.comparison))
  log('docs/performance.md and docs/performance.svg are written')
}
