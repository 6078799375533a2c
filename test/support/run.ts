// npm test and npm run test:long: run tap. Coverage is checked if nothing is missing here. Arguments are test files or options of tap.
import { spawnSync } from 'node:child_process'
import { mkdirSync, readFileSync, readdirSync, writeFileSync } from 'node:fs'
import { chromiumMissing, nginxMissing, postgresMissing, prometheusMissing, redisMissing } from './missing.ts'
import { missing as missingHandles } from './sqlite.mjs'

const args = process.argv.slice(2)
const isLong = args[0] === '--long'
if (isLong) args.shift()
const files = args.filter(arg => !arg.startsWith('-'))

// A process takes two seconds of CPU before its first test, and its first tests are slow, so most files share one of a few processes. A
// file has its own process when it tests something about the whole process, or when it takes so long that the two cores would not finish
// together.
const ALONE = ['delivery/kept', 'docs', 'routes/unprotected', 'simulation', 'sqlite/sqlite', 'torture'].map(name => `test/${name}.test.ts`)
const PROCESSES = 4
const FILES = readdirSync('test', { recursive: true, encoding: 'utf8' }).filter(file => file.endsWith('.test.ts')).map(file => `test/${file}`).sort()
const LONG = FILES.filter(file => file.startsWith('test/long/'))
const SIZED = FILES.filter(file => !LONG.includes(file) && readFileSync(file, 'utf8').includes('support/size.ts'))
const SHARING = FILES.filter(file => !LONG.includes(file) && !ALONE.includes(file))

/** `entry` imports the files of a process. */
const shared = Array.from({ length: PROCESSES }, (_, nth) => ({ entry: `.tap/shared/${nth}.mjs`, files: SHARING.filter((_, n) => n % PROCESSES === nth) }))

const missing = [redisMissing, prometheusMissing, postgresMissing].filter(reason => reason !== false)
const isWhole = files.length === 0 && !isLong
const tap = ['run', ...args]
if (isWhole) {
  mkdirSync('.tap/shared', { recursive: true })
  for (const { entry, files } of shared) writeFileSync(entry, files.map(file => `import '../../${file}'\n`).join(''))
  tap.push(...shared.map(({ entry }) => entry), ...ALONE)
} else if (files.length === 0) tap.push(...SIZED, ...LONG)
// Only npm test without skipped tests covers every line of lib.
if (!isWhole || missing.length > 0) tap.push('--disable-coverage', '--allow-empty-coverage')
// The tests that kill processes need a core for them.
if (isLong) tap.push('--timeout=3600', '--jobs=2')

const { status } = spawnSync(process.execPath, ['node_modules/tap/dist/esm/run.mjs', ...tap], {
  stdio: 'inherit',
  env: { ...process.env, ...(isLong && { TEST_LONG: '1' }) }
})
// A missing browser does not affect the coverage, because the page is not in lib.
if (chromiumMissing !== false) console.log(`skipped: what ${chromiumMissing}`)
// A missing handle does not affect the coverage, because libsql covers the same lines.
for (const reason of Object.values(missingHandles)) if (reason !== false) console.log(`skipped: what ${reason}`)
if (isLong && nginxMissing !== false) console.log(`skipped: what ${nginxMissing}`)
for (const reason of missing) console.log(`skipped, and with it the check of coverage: what ${reason}`)
process.exit(status ?? 1)
