import { execFileSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { arch, availableParallelism, cpus, loadavg, release, totalmem, type } from 'node:os'

const ROOT = new URL('../', import.meta.url)
const PACKAGES = [
  'fastify', 'standardwebhooks', 'svix', 'openai', 'fastify-raw-body', 'hono', '@hono/node-server', 'express',
  '@octokit/webhooks', 'ioredis', 'bullmq', 'libsql', 'pg', 'pg-boss', 'prom-client'
]

/** What the figures depend on. Called at the start of a run, while the load average is that of other programs. */
export function describeMachine () {
  return {
    date: new Date().toISOString().slice(0, 10),
    commit: commit(),
    cpu: cpus()[0]?.model ?? 'unknown',
    cores: availableParallelism(),
    memory: totalmem(),
    load: loadavg()[0],
    os: `${type()} ${release()} ${arch()}`,
    node: process.version,
    openssl: process.versions.openssl,
    redis: line('redis-server', '--version')?.match(/v=(\S+)/)?.[1],
    packages: Object.fromEntries(PACKAGES.map(name => [name, JSON.parse(readFileSync(new URL(`node_modules/${name}/package.json`, ROOT), 'utf8')).version]))
  }
}

function commit () {
  const head = line('git', 'rev-parse', '--short', 'HEAD')
  if (head === undefined) return 'unknown'
  return line('git', 'status', '--porcelain', '--', 'lib', 'bench', 'package-lock.json') === '' ? head : `${head} with changes`
}

/** What a command prints; `undefined` when the command is not available. */
function line (command, ...args) {
  try {
    return execFileSync(command, args, { cwd: ROOT, encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] }).trim()
  } catch {
    return undefined
  }
}
