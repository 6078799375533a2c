import { Redis } from 'ioredis'
import { contenders } from '../contenders/index.mjs'
import { eventOf } from '../deliveries.mjs'
import { decimals, table, whole } from '../markdown.mjs'

export const name = 'redis'

const COUNT = 1_000

export async function run (bench) {
  if (bench.missing.redis !== undefined) return { leftOut: bench.missing.redis }
  bench.log('Redis round trips')
  const server = await bench.serve(contenders['ours-redis'])
  const client = new Redis(bench.redisPort, '127.0.0.1')
  const monitor = await client.monitor()
  try {
    const templates = [eventOf(200)]
    await bench.send(server, { templates, count: 10 }) // loads the scripts
    const commands = {}
    const end = `end ${Date.now()}`
    const ended = new Promise(resolve => {
      monitor.on('monitor', (_time, [command, argument], source) => {
        if (argument === end) resolve()
        else if (source !== 'lua') commands[command.toLowerCase()] = (commands[command.toLowerCase()] ?? 0) + 1 // commands within a script are no round trips
      })
    })
    await bench.send(server, { templates, count: COUNT })
    await client.echo(end)
    await ended
    return { count: COUNT, commands }
  } finally {
    monitor.disconnect()
    client.disconnect()
    await server.stop()
  }
}

const total = ({ commands }) => Object.values(commands).reduce((sum, calls) => sum + calls, 0)

export function render (data) {
  if (data.leftOut !== undefined) return `Left out: ${data.leftOut}.`
  const rows = Object.entries(data.commands).map(([command, calls]) => [`\`${command.toUpperCase()}\``, whole(calls), decimals(calls / data.count, 2)])
  return `${table(['Command', `in ${whole(data.count)} deliveries`, 'a delivery'], rows)}`
}

export function targets (data) {
  const target = { what: 'Redis round trips a delivery', limit: 2 }
  return [data.leftOut !== undefined ? { ...target, note: data.leftOut } : { ...target, measured: total(data) / data.count }]
}
