// npm run bench. Measures, prints, and writes docs/performance.md: see --help.
import { resolve } from 'node:path'
import { pathToFileURL } from 'node:url'
import { parseArgs } from 'node:util'
import { Bench } from './bench.mjs'
import { renderTargets } from './report.mjs'
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
const start = performance.now()
const bench = await Bench.start({
  quick: flags.quick,
  ...(flags.profile !== undefined && { profile: resolve(flags.profile) }),
  log: line => console.error(`${Math.round((performance.now() - start) / 1000)} s\t${line}`)
})
try {
  for (const name of chosen) {
    const data = await sections[name].run(bench, choice)
    console.log(`${sections[name].render(data)}\n`)
    console.log(`${renderTargets(sections[name].targets(data))}\n`)
  }
} finally {
  await bench.close()
}
