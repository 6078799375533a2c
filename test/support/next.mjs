// npm run test:next: runs the tests with the newest version of Fastify's next major, in a copy of the repository.
import { spawnSync } from 'node:child_process'
import { cpSync, existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

const NEXT = '>=6.0.0-0 <7.0.0'
// Tests that need a server, a browser or minutes, and tests that do not use Fastify.
const LEFT_OUT = /^test\/(?:long|postgres|sqlite|stores|inbox|cli|diagnose|inspector)\/|^test\/(?:torture|simulation|processes|examples|bench|docs|drift)\.test|bullmq|pgboss|kept/

function run (cwd, command, ...args) {
  const { status } = spawnSync(command, args, { cwd, stdio: 'inherit' })
  if (status !== 0) throw Object.assign(new Error(`${command} ${args.join(' ')} ended with ${status}`), { status })
}

const ask = (command, ...args) => spawnSync(command, args, { encoding: 'utf8' }).stdout.trim()

if (Number(process.versions.node.split('.')[0]) < 22) throw new Error(`expected Node 22 or later, which Fastify 6 needs, got ${process.version}`)
const versions = [JSON.parse(ask('npm', 'view', `fastify@${NEXT}`, 'version', '--json'))].flat()
const version = versions.at(-1)
const files = ask('git', 'ls-files').split('\n').filter(existsSync)

const copy = mkdtempSync(join(tmpdir(), 'webhook-next-'))
try {
  for (const file of [...files, 'node_modules']) cpSync(file, join(copy, file), { recursive: true, verbatimSymlinks: true })
  run(copy, 'npm', 'install', '--no-save', '--force', '--no-audit', '--no-fund', '--loglevel=error', `fastify@${version}`)
  // The plugin refuses Fastify 6 until it is known to work there. The tests' other plugins refuse it too.
  const plugin = join(copy, 'lib/plugin.ts')
  writeFileSync(plugin, readFileSync(plugin, 'utf8').replace("fastify: '5.x'", "fastify: '>=5.x'"))
  run(copy, 'npm', 'run', '--silent', 'build')
  run(copy, 'npm', 'run', '--silent', 'typecheck')
  const given = process.argv.slice(2)
  const tests = given.length > 0 ? given : files.filter(file => file.endsWith('.test.ts') && !LEFT_OUT.test(file))
  console.log(`\n${tests.length} test files with Fastify ${version}\n`)
  run(copy, process.execPath, 'node_modules/tap/dist/esm/run.mjs', 'run', '--disable-coverage', '--allow-empty-coverage', ...tests)
} catch (error) {
  console.error(error.message)
  process.exitCode = error.status ?? 1
} finally {
  rmSync(copy, { recursive: true, force: true })
}
