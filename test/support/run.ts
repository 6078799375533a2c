// npm test and npm run test:long: run tap. Coverage is checked if nothing is missing here. Arguments are test files or options of tap.
import { spawn } from 'node:child_process'
import type { SpawnOptions } from 'node:child_process'
import { once } from 'node:events'
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
const PROCESSES = 6
/** The files that take longest, dealt first, so that no process has two of them. */
const SLOWEST = ['runners/bullmq', 'inspector/page', 'postgres/postgres', 'runners/pgboss', 'examples', 'processes'].map(name => `test/${name}.test.ts`)
const FILES = readdirSync('test', { recursive: true, encoding: 'utf8' }).filter(file => file.endsWith('.test.ts')).map(file => `test/${file}`).sort()
const LONG = FILES.filter(file => file.startsWith('test/long/'))
const SIZED = FILES.filter(file => !LONG.includes(file) && readFileSync(file, 'utf8').includes('support/size.ts'))
/** The files that take longest at full size, started first, so that none of them runs alone in the end. */
const LONGEST = ['test/simulation.test.ts', 'test/long/compatibility.test.ts']
const SHARING = [...SLOWEST, ...FILES.filter(file => ![...LONG, ...ALONE, ...SLOWEST].includes(file))]

/** `entry` imports the files of a process. */
const shared = Array.from({ length: PROCESSES }, (_, nth) => ({ entry: `.tap/shared/${nth}.mjs`, files: SHARING.filter((_, n) => n % PROCESSES === nth) }))

const missing = [redisMissing, prometheusMissing, postgresMissing].filter(reason => reason !== false)
const isWhole = files.length === 0 && !isLong
const tap = ['run', ...args]
if (isWhole) {
  mkdirSync('.tap/shared', { recursive: true })
  for (const { entry, files } of shared) writeFileSync(entry, files.map(file => `import '../../${file}'\n`).join(''))
  tap.push(...shared.map(({ entry }) => entry), ...ALONE)
} else if (files.length === 0) tap.push(...new Set([...LONGEST, ...SIZED, ...LONG]))
// Only npm test without skipped tests covers every line of lib.
if (!isWhole || missing.length > 0) tap.push('--disable-coverage', '--allow-empty-coverage')
// The tests that kill processes need a core for them.
if (isLong) tap.push('--timeout=3600', '--jobs=2')

async function run (args: readonly string[], options: SpawnOptions = {}): Promise<number> {
  const [code] = await once(spawn(process.execPath, args, { stdio: 'inherit', ...options }), 'close') as [number | null]
  return code ?? 1
}

// Beside the tests, because these wait for servers and leave a part of two cores free.
const checks = isWhole ? run(['test/support/together.mjs', 'typecheck', 'lint']) : undefined
const status = await run(['node_modules/tap/dist/esm/run.mjs', ...tap], { env: { ...process.env, ...(isLong && { TEST_LONG: '1' }) } })
const checked = await checks ?? 0
if (checked !== 0) console.log('npm run typecheck or npm run lint has failed, see above')
// A missing browser does not affect the coverage, because the page is not in lib.
if (chromiumMissing !== false) console.log(`skipped: what ${chromiumMissing}`)
// A missing handle does not affect the coverage, because libsql covers the same lines.
for (const reason of Object.values(missingHandles)) if (reason !== false) console.log(`skipped: what ${reason}`)
if (isLong && nginxMissing !== false) console.log(`skipped: what ${nginxMissing}`)
for (const reason of missing) console.log(`skipped, and with it the check of coverage: what ${reason}`)
process.exit(status !== 0 ? status : checked)
