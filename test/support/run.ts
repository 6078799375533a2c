// npm test and npm run test:long: run tap. Coverage is checked if nothing is missing here. Arguments are test files or options of tap.
import { execFile, spawn } from 'node:child_process'
import type { SpawnOptions } from 'node:child_process'
import { once } from 'node:events'
import { mkdirSync, readFileSync, readdirSync, writeFileSync } from 'node:fs'
import { dirname } from 'node:path'
import { promisify } from 'node:util'
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
const SHARING = [...SLOWEST, ...FILES.filter(file => ![...LONG, ...ALONE, ...SLOWEST].includes(file))]

/** The files that take longest at full size. */
const LONGEST = ['test/simulation.test.ts', 'test/torture.test.ts']

/** `entry` imports the files of a process. Tap sorts its files, so the entries come before all others. */
interface Shared { readonly entry: string, readonly files: readonly string[] }
const SHARED: readonly Shared[] = Array.from({ length: PROCESSES }, (_, nth) => ({ entry: `.tap/shared/${nth}.mjs`, files: SHARING.filter((_, n) => n % PROCESSES === nth) }))
const FIRST: readonly Shared[] = LONGEST.map((file, nth) => ({ entry: `.tap/first/${nth}.mjs`, files: [file] }))

const missing = [redisMissing, prometheusMissing, postgresMissing].filter(reason => reason !== false)
const isWhole = files.length === 0 && !isLong
const tap = ['run', ...args]
if (files.length === 0) {
  const together = isLong ? FIRST : SHARED
  for (const { entry, files } of together) {
    mkdirSync(dirname(entry), { recursive: true })
    writeFileSync(entry, files.map(file => `import '../../${file}'\n`).join(''))
  }
  tap.push(...together.map(({ entry }) => entry), ...(isLong ? [...SIZED, ...LONG].filter(file => !LONGEST.includes(file)) : ALONE))
}
// Only npm test without skipped tests covers every line of lib.
if (!isWhole || missing.length > 0) tap.push('--disable-coverage', '--allow-empty-coverage')
// The tests that kill processes need a core for them.
if (isLong) tap.push('--timeout=3600', '--jobs=2')

async function run (args: readonly string[], options: SpawnOptions = {}): Promise<number> {
  const [code] = await once(spawn(process.execPath, args, { stdio: 'inherit', ...options }), 'close') as [number | null]
  return code ?? 1
}

/** @returns what TypeScript has found; empty if all types are right */
async function typecheck (): Promise<string> {
  const check = promisify(execFile)('npm', ['run', '--silent', 'typecheck'], { shell: process.platform === 'win32', maxBuffer: 64e6 })
  return await check.then(() => '', ({ stdout, stderr }: { stdout: string, stderr: string }) => `${stdout}${stderr}npm run typecheck has failed, see above\n`)
}

// Beside the tests, because these wait for servers and leave a part of two cores free.
const checking = isWhole ? typecheck() : ''
const status = await run(['node_modules/tap/dist/esm/run.mjs', ...tap], { env: { ...process.env, ...(isLong && { TEST_LONG: '1' }) } })
const faults = await checking
process.stdout.write(faults)
// A missing browser does not affect the coverage, because the page is not in lib.
if (chromiumMissing !== false) console.log(`skipped: what ${chromiumMissing}`)
// A missing handle does not affect the coverage, because libsql covers the same lines.
for (const reason of Object.values(missingHandles)) if (reason !== false) console.log(`skipped: what ${reason}`)
if (isLong && nginxMissing !== false) console.log(`skipped: what ${nginxMissing}`)
for (const reason of missing) console.log(`skipped, and with it the check of coverage: what ${reason}`)
process.exitCode = status !== 0 || faults === '' ? status : 1
