// npm test, npm run test:long: tap, with the coverage that what is here allows. Arguments are files or options of tap's.
import { spawnSync } from 'node:child_process'
import { readFileSync, readdirSync } from 'node:fs'
import { chromiumMissing, nginxMissing, postgresMissing, prometheusMissing, redisMissing } from './missing.ts'
import { missing as missingHandles } from './sqlite.mjs'

const args = process.argv.slice(2)
const isLong = args[0] === '--long'
if (isLong) args.shift()
const files = args.filter(arg => !arg.startsWith('-'))

// What takes longest comes first, so that no core waits for it at the end.
const FIRST = ['torture', 'simulation', 'sqlite/sqlite', 'cli/cli', 'docs', 'examples', 'processes', 'diagnose/diagnose'].map(name => `test/${name}.test.ts`)
const FILES = readdirSync('test', { recursive: true, encoding: 'utf8' }).filter(file => file.endsWith('.test.ts')).map(file => `test/${file}`)
const LONG = FILES.filter(file => file.startsWith('test/long/'))
const ALL = FILES.filter(file => !LONG.includes(file))
const SIZED = ALL.filter(file => readFileSync(file, 'utf8').includes('support/size.ts'))

const missing = [redisMissing, prometheusMissing, postgresMissing].filter(reason => reason !== false)
const isWhole = files.length === 0 && !isLong
const tap = ['run', ...args]
if (files.length === 0) tap.push(...isLong ? [...SIZED, ...LONG] : new Set([...FIRST, ...ALL]))
// Every line of lib is covered by npm test, where nothing is skipped.
if (!isWhole || missing.length > 0) tap.push('--disable-coverage', '--allow-empty-coverage')
if (isLong) tap.push('--timeout=3600')

const { status } = spawnSync(process.execPath, ['node_modules/tap/dist/esm/run.mjs', ...tap], {
  stdio: 'inherit',
  env: { ...process.env, ...(isLong && { TEST_LONG: '1' }) }
})
// The page is not in lib.
if (chromiumMissing !== false) console.log(`skipped: what ${chromiumMissing}`)
// libsql covers the same lines.
for (const reason of Object.values(missingHandles)) if (reason !== false) console.log(`skipped: what ${reason}`)
if (isLong && nginxMissing !== false) console.log(`skipped: what ${nginxMissing}`)
for (const reason of missing) console.log(`skipped, and with it the check of coverage: what ${reason}`)
process.exit(status ?? 1)
