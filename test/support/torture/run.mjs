// `npm run torture`: every store with every runner, and every inbox, killed again and again. The environment variables KILLS and SEED
// configure it. Its argument chooses one pair by name, such as `sqlite/durable` or `postgres/inline/postgres`, or one half: `stores` or
// `inboxes`.
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { PostgresServer, postgresMissing } from '../postgres.ts'
import { missing as missingHandles } from '../sqlite.mjs'
import { EXACT, PAIRS, torture } from './torture.mjs'

const kills = Number(process.env.KILLS ?? 100)
const seed = Number(process.env.SEED ?? Date.now() % 1_000_000)
const only = process.argv[2]

const socket = createServer().listen(0, '127.0.0.1')
await once(socket, 'listening')
const { port: redisPort } = socket.address()
socket.close()
const redis = spawn('redis-server', ['--port', String(redisPort), '--bind', '127.0.0.1', '--save', '', '--appendonly', 'no'], { stdio: ['ignore', 'pipe', 'inherit'] })
const missing = await Promise.race([once(redis.stdout, 'data').then(() => false), once(redis, 'error').then(() => true)])

const teardowns = []
const server = postgresMissing === false && await PostgresServer.start({ teardown: fn => teardowns.unshift(fn) }, '-c', 'fsync=on')

console.log(`SEED=${seed}, ${kills} kills for each pair\n`)
let broken = 0

/** @returns what is missing here, or a falsy value */
function lacks ({ handle = 'libsql', needsRedis, needsPostgres }) {
  return (needsRedis && missing && 'needs redis-server') || (needsPostgres && postgresMissing) || missingHandles[handle]
}

const isChosen = (group, { store, runner, inbox }) => only === undefined || only === group || only === [store, runner, inbox].filter(Boolean).join('/')

/** @param verdict whether a result keeps the promises */
async function run (group, pairs, columns, row, verdict) {
  const chosen = pairs.filter(pair => isChosen(group, pair))
  if (chosen.length === 0) return
  const heads = [...columns, 'kills', 'acknowledged', 'effects', 'repeated', 'lost', 'ran again after its success was recorded', 's']
  if (group === 'inboxes') heads.splice(-2, 1)
  console.log(`| ${heads.join(' | ')} |\n|${'---|'.repeat(columns.length)}${'---:|'.repeat(heads.length - columns.length)}`)
  for (const pair of chosen) {
    const reason = lacks(pair)
    if (reason) {
      console.log(`| ${row(pair).join(' | ')} | ${reason} |${' |'.repeat(heads.length - columns.length - 1)}`)
      continue
    }
    const dir = await mkdtemp(join(tmpdir(), 'torture-'))
    const started = Date.now()
    const postgres = pair.needsPostgres && { url: server.url, crash: async () => await server.restart() }
    const result = await torture({ ...pair, kills, seed, dir, redisPort, ...(postgres && { postgres }) })
    const { acknowledged, effects, repeated, lost, rerun } = result
    const counts = [kills, acknowledged, effects, repeated, lost.length, ...(group === 'inboxes' ? [] : [rerun.length])]
    console.log(`| ${[...row(pair), ...counts, Math.round((Date.now() - started) / 1000)].join(' | ')} |`)
    if (verdict(pair, result)) {
      await rm(dir, { recursive: true })
    } else {
      broken++
      console.log(JSON.stringify({ lost: lost.slice(0, 5), rerun: rerun.slice(0, 5), dir }))
    }
  }
  console.log()
}

await run('stores', PAIRS, ['store', 'runner'], ({ store, runner, handle }) => [store, handle === undefined ? runner : `${runner}, ${handle}`],
  ({ losesOnCrash }, { lost, rerun }) => (lost.length === 0 || losesOnCrash) && rerun.length === 0)
await run('inboxes', EXACT, ['inbox', 'store', 'runner', 'is'], ({ inbox, store, runner, zombies, needsPostgres }) =>
  [inbox, store, runner, zombies ? 'stopped beyond its lease' : needsPostgres ? 'killed, in turn with PostgreSQL' : 'killed'],
(_pair, { lost, repeated }) => lost.length === 0 && repeated === 0)

redis.kill()
for (const teardown of teardowns) await teardown()
process.exitCode = broken === 0 ? 0 : 1
