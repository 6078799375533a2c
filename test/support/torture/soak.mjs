// `npm run soak`: a fixed arrival rate for minutes against every store, with the heap size after a forced collection each minute. The
// environment variables MINUTES and RATE (deliveries a second) configure it. It fails when the heap has grown.
import { fork, spawn } from 'node:child_process'
import { createHmac, randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import http from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { freePort } from '../port.mjs'

const minutes = Number(process.env.MINUTES ?? 3)
const rate = Number(process.env.RATE ?? 200)
/** Bytes. The collector and the JIT make the size of such a heap uncertain by this much. */
const TOLERANCE = 3 * 1024 * 1024

const secret = randomBytes(32)
const redisPort = await freePort()
const redis = spawn('redis-server', ['--port', String(redisPort), '--bind', '127.0.0.1', '--save', '', '--appendonly', 'no'], { stdio: ['ignore', 'pipe', 'inherit'] })
const missing = await Promise.race([once(redis.stdout, 'data').then(() => false), once(redis, 'error').then(() => true)])

console.log(`${rate} deliveries a second for ${minutes} minutes each; heap after a forced collection\n`)
console.log(`| store | deliveries | not 200 | ${Array.from({ length: minutes }, (_, i) => `minute ${i + 1}`).join(' | ')} | growth |`)
console.log(`|---|---:|---:|${'---:|'.repeat(minutes + 1)}`)
for (const store of ['memory', 'sqlite', 'redis']) {
  if (store === 'redis' && missing) console.log('| redis | needs redis-server |')
  else await soak(store)
}
redis.kill()

async function soak (store) {
  const dir = await mkdtemp(join(tmpdir(), 'soak-'))
  const port = await freePort()
  const config = {
    secret: `whsec_${secret.toString('base64')}`, port, effects: join(dir, 'effects'), file: join(dir, 'soak.db'), store, runner: 'inline', redisPort, prefix: `soak-${port}`, failureRate: 0, fsync: false, max: rate * 20
  }
  const child = fork(fileURLToPath(new URL('app.mjs', import.meta.url)), [JSON.stringify(config)], { execArgv: ['--expose-gc'] })
  await once(child, 'message')
  const agent = new http.Agent({ keepAlive: true, maxSockets: 64 })
  let sent = 0
  let refused = 0

  async function heap () {
    child.send('heap')
    const [bytes] = await once(child, 'message')
    return bytes
  }

  const heaps = []
  for (let minute = 0; minute < minutes; minute++) {
    const end = performance.now() + 60_000
    // Deliveries start in slices of 50 ms, so that the arrival rate does not depend on the answers.
    for (let due = performance.now(); due < end; due += 50) {
      await sleep(Math.max(0, due - performance.now()))
      for (let i = 0; i < rate / 20; i++) deliver(`wh_${store}_${sent++}`, port, agent).then(status => { if (status !== 200) refused++ })
    }
    heaps.push(await heap())
  }
  child.send('close')
  await once(child, 'exit')
  agent.destroy()
  await rm(dir, { recursive: true })

  const growth = heaps.at(-1) - heaps[0]
  const mb = bytes => `${(bytes / 1024 / 1024).toFixed(1)} MB`
  console.log(`| ${store} | ${sent} | ${refused} | ${heaps.map(mb).join(' | ')} | ${mb(growth)} |`)
  if (growth > TOLERANCE || refused > 0) process.exitCode = 1
}

function deliver (webhookId, port, agent) {
  const body = JSON.stringify({ id: `evt_${webhookId}`, object: 'event', created_at: 1, type: 'batch.failed', data: { id: 'batch_1' } })
  const timestamp = String(Math.floor(Date.now() / 1000))
  const signature = createHmac('sha256', secret).update(`${webhookId}.${timestamp}.${body}`).digest('base64')
  return new Promise(resolve => {
    const request = http.request({
      port, host: '127.0.0.1', path: '/webhooks/openai', method: 'POST', agent, headers: { 'content-type': 'application/json', 'content-length': body.length, 'webhook-id': webhookId, 'webhook-timestamp': timestamp, 'webhook-signature': `v1,${signature}` }
    }, response => {
      response.resume()
      response.on('close', () => resolve(response.statusCode))
    })
    request.on('error', () => resolve(0))
    request.end(body)
  })
}
