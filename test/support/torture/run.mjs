// `npm run torture`: every store with every runner, killed again and again. KILLS and SEED by environment.
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { missing as missingHandles } from '../sqlite.mjs'
import { PAIRS, torture } from './torture.mjs'

const kills = Number(process.env.KILLS ?? 100)
const seed = Number(process.env.SEED ?? Date.now() % 1_000_000)
const only = process.argv[2]

const socket = createServer().listen(0, '127.0.0.1')
await once(socket, 'listening')
const { port: redisPort } = socket.address()
socket.close()
const redis = spawn('redis-server', ['--port', String(redisPort), '--bind', '127.0.0.1', '--save', '', '--appendonly', 'no'], { stdio: ['ignore', 'pipe', 'inherit'] })
const missing = await Promise.race([once(redis.stdout, 'data').then(() => false), once(redis, 'error').then(() => true)])

console.log(`SEED=${seed}, ${kills} kills for each pair\n`)
console.log('| store | runner | kills | acknowledged | effects | repeated | lost | ran again after its success was recorded | s |')
console.log('|---|---|---:|---:|---:|---:|---:|---:|---:|')
let broken = 0
for (const { store, runner, handle = 'libsql', needsRedis, losesOnCrash } of PAIRS) {
  if (only !== undefined && only !== `${store}/${runner}`) continue
  const lacks = needsRedis && missing ? 'needs redis-server' : missingHandles[handle]
  if (lacks) {
    console.log(`| ${store} | ${runner} | ${lacks} | | | | | | |`)
    continue
  }
  const dir = await mkdtemp(join(tmpdir(), 'torture-'))
  const started = Date.now()
  const { acknowledged, effects, repeated, lost, rerun } = await torture({ store, runner, handle, kills, seed, dir, redisPort })
  const seconds = Math.round((Date.now() - started) / 1000)
  console.log(`| ${store} | ${runner}${handle === 'libsql' ? '' : `, ${handle}`} | ${kills} | ${acknowledged} | ${effects} | ${repeated} | ${lost.length} | ${rerun.length} | ${seconds} |`)
  if ((lost.length > 0 && !losesOnCrash) || rerun.length > 0) {
    broken++
    console.log(JSON.stringify({ lost: lost.slice(0, 5), rerun: rerun.slice(0, 5), dir }))
  } else {
    await rm(dir, { recursive: true })
  }
}
redis.kill()
process.exitCode = broken === 0 ? 0 : 1
