// npm test, npm run test:long: tap, with the coverage that what is here allows. Arguments are files or options of tap's.
import { spawnSync } from 'node:child_process'
import { mkdirSync, readFileSync, readdirSync, writeFileSync } from 'node:fs'
import { dirname } from 'node:path'
import { chromiumMissing, nginxMissing, postgresMissing, prometheusMissing, redisMissing } from './missing.ts'
import { missing as missingHandles } from './sqlite.mjs'

const args = process.argv.slice(2)
const isLong = args[0] === '--long'
if (isLong) args.shift()
const files = args.filter(arg => !arg.startsWith('-'))

// A process takes two seconds of CPU before its first test: the files of a room share one. A file has its own when it takes
// long, so that two cores end together, or says something about its whole process.
const ALONE = [
  'cli/cli', 'composition', 'delivery/kept', 'docs', 'examples', 'interop', 'processes', 'routes/unwatched', 'simulation', 'sqlite/sqlite', 'torture'
].map(name => `test/${name}.test.ts`)
const FILES = readdirSync('test', { recursive: true, encoding: 'utf8' }).filter(file => file.endsWith('.test.ts')).map(file => `test/${file}`)
const LONG = FILES.filter(file => file.startsWith('test/long/'))
const SIZED = FILES.filter(file => !LONG.includes(file) && readFileSync(file, 'utf8').includes('support/size.ts'))
const SHARING = FILES.filter(file => !LONG.includes(file) && !ALONE.includes(file))

/** A file that imports those of a room that share a process. */
function entry (room: string): string {
  const file = `.tap/rooms/${room.replaceAll('/', '-')}.mjs`
  mkdirSync(dirname(file), { recursive: true })
  writeFileSync(file, SHARING.filter(file => dirname(file) === room).map(file => `import '../../${file}'\n`).join(''))
  return file
}

const missing = [redisMissing, prometheusMissing, postgresMissing].filter(reason => reason !== false)
const isWhole = files.length === 0 && !isLong
const tap = ['run', ...args]
if (files.length === 0) tap.push(...isLong ? [...SIZED, ...LONG] : [...ALONE, ...[...new Set(SHARING.map(file => dirname(file)))].map(entry)])
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
