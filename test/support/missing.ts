import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { join } from 'node:path'

/** Returns what is missing, so that a skipped test can say why. In CI nothing may be missing. */
function missing (remedy: string, ...commands: string[]): string | false {
  if (process.env['CI'] !== undefined) return false
  return commands.every(command => spawnSync(command, ['--version']).error === undefined) ? false : `needs ${remedy}`
}

export const redisMissing = missing('redis-server (apt-get install redis-server)', 'redis-server')
export const prometheusMissing = missing('promtool and prometheus (both in Debian\'s package prometheus)', 'promtool', 'prometheus')

/** The folder of PostgreSQL's programs, which Debian does not add to PATH. */
export function postgresBindir (): string {
  return spawnSync('pg_config', ['--bindir'], { encoding: 'utf8' }).stdout?.trim() ?? ''
}

const SERVER = 'PostgreSQL and PgBouncer (apt-get install postgresql pgbouncer)'
export const postgresMissing = process.env['CI'] === undefined && !existsSync(join(postgresBindir(), 'initdb')) ? `needs ${SERVER}` : missing(SERVER, 'pgbouncer')

export const nginxMissing = missing('nginx (apt-get install nginx-light)', 'nginx')

/** The path of Debian's package. */
export const CHROMIUM = '/usr/bin/chromium'
export const chromiumMissing: string | false = process.env['CI'] === undefined && !existsSync(CHROMIUM) ? 'needs chromium (apt-get install chromium)' : false
