import { spawnSync } from 'node:child_process'

/** Named where it is missing, so that a skipped test says why; CI must have it. */
function missing (remedy: string, ...commands: string[]): string | false {
  if (process.env['CI'] !== undefined) return false
  return commands.every(command => spawnSync(command, ['--version']).error === undefined) ? false : `needs ${remedy}`
}

export const redisMissing = missing('redis-server (apt-get install redis-server)', 'redis-server')
export const prometheusMissing = missing('promtool and prometheus (both in Debian\'s package prometheus)', 'promtool', 'prometheus')
