// A sender that, like OpenAI, delivers until the answer is 200. In the meantime the receiver is killed at random instants.
import { createHmac, randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { existsSync, readFileSync } from 'node:fs'
import http from 'node:http'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { freePort } from '../port.mjs'
import { forkProgram } from '../program.mjs'
import { openSqlite } from '../sqlite.mjs'

const SECRET = randomBytes(32)
const HANDLERS = ['first', 'second']
/** ms. The lease of the store's claims and of the runner's attempts. */
const LEASE = 1_000
/** ms without progress, after which what is missing counts as lost. */
const STANDSTILL = 60_000
const APP = fileURLToPath(new URL('app.mjs', import.meta.url))

/** `losesOnCrash`: a crash of the process may lose acknowledged deliveries, as the runner's documentation says. */
export const PAIRS = [
  { store: 'memory', runner: 'inline', needsRedis: false, losesOnCrash: false },
  { store: 'sqlite', runner: 'inline', needsRedis: false, losesOnCrash: false },
  { store: 'redis', runner: 'inline', needsRedis: true, losesOnCrash: false },
  { store: 'sqlite', runner: 'background', needsRedis: false, losesOnCrash: true },
  { store: 'memory', runner: 'durable', needsRedis: false, losesOnCrash: false },
  { store: 'sqlite', runner: 'durable', needsRedis: false, losesOnCrash: false, small: true },
  { store: 'sqlite', runner: 'durable', handle: 'node:sqlite', needsRedis: false, losesOnCrash: false, small: true },
  { store: 'memory', runner: 'bullmq', needsRedis: true, losesOnCrash: false },
  { store: 'redis', runner: 'bullmq', needsRedis: true, losesOnCrash: false }
]

/**
 * With an inbox every effect happens exactly once: nothing is lost and nothing is repeated. In pairs with PostgreSQL, its server is crashed
 * in turn with the receiver. `zombies`: no process is killed. Instead, one of two receivers is stopped for longer than a lease and then
 * continues. `small`: the pair also runs at the small size.
 */
export const EXACT = [
  { store: 'memory', runner: 'inline', inbox: 'sqlite' },
  { store: 'sqlite', runner: 'durable', inbox: 'sqlite' },
  { store: 'memory', runner: 'inline', inbox: 'postgres' },
  { store: 'postgres', runner: 'inline', inbox: 'postgres', small: true },
  { store: 'postgres', runner: 'inline', inbox: 'postgres', zombies: true },
  { store: 'memory', runner: 'durable', inbox: 'postgres' },
  { store: 'memory', runner: 'bullmq', inbox: 'postgres', needsRedis: true },
  { store: 'memory', runner: 'pgboss', inbox: 'postgres' }
].map(pair => ({ needsRedis: false, needsPostgres: pair.inbox === 'postgres', small: false, zombies: false, ...pair }))

/** mulberry32. A run can be repeated with its seed. */
export function randomFrom (seed) {
  let state = seed
  return () => {
    state = (state + 0x6d2b79f5) | 0
    let t = Math.imul(state ^ (state >>> 15), 1 | state)
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296
  }
}

/**
 * @param {object} options
 * @param {'memory' | 'sqlite' | 'redis' | 'postgres'} options.store
 * @param {'inline' | 'background' | 'durable' | 'bullmq' | 'pgboss'} options.runner
 * @param {number} options.kills how often the receiver is killed with SIGKILL
 * @param {number} options.seed of the random instants
 * @param {string} options.dir the folder for the files of the run
 * @param {number} [options.redisPort]
 * @param {'libsql' | 'node:sqlite'} [options.handle] the SQLite library; default libsql
 * @param {number} [options.senders] the number of concurrent senders
 * @param {'sqlite' | 'postgres'} [options.inbox] the inbox by which the handlers make their effects
 * @param {{ url: string, crash: () => Promise<void> }} [options.postgres] a server that is crashed in turn with the receiver
 * @param {boolean} [options.zombies] stops one of two receivers instead of killing it
 * @returns {Promise<{ kills: number, acknowledged: number, attempts: number, effects: number, repeated: number, lost: string[], rerun:
 * string[] }>} `lost`: effects of acknowledged deliveries that are missing; `rerun`: handlers that ran again although their success had
 * been recorded
 */
export async function torture ({ store, runner, kills, seed, dir, redisPort, handle, senders = 16, failureRate = 0.05, inbox, postgres, zombies = false }) {
  const random = randomFrom(seed)
  const queues = ['durable', 'bullmq', 'pgboss'].includes(runner)
  const prefix = `torture-${store}-${runner}${handle === 'node:sqlite' ? '-node' : ''}${inbox === undefined ? '' : `-${inbox}`}${zombies ? '-zombies' : ''}`
  const config = {
    secret: `whsec_${SECRET.toString('base64')}`,
    port: await freePort(),
    effects: join(dir, `${prefix}.effects`),
    file: join(dir, `${prefix}.db`),
    store,
    runner,
    handle,
    redisPort,
    prefix,
    failureRate,
    lease: LEASE,
    // A process that is stopped should be in the middle of its work.
    delay: zombies ? 50 : 4,
    inbox,
    postgresUrl: postgres?.url
  }
  const ports = zombies ? [config.port, await freePort()] : [config.port]
  const table = inbox === undefined ? undefined : await effectsTable(inbox, config)
  const agent = new http.Agent({ keepAlive: true, maxSockets: senders })
  const acknowledged = new Set()
  let attempts = 0
  let sent = 0
  const ending = new AbortController()

  async function boot (port = config.port) {
    const child = forkProgram(APP, [JSON.stringify({ ...config, port })])
    const [message] = await Promise.race([once(child, 'message'), once(child, 'exit')])
    if (message !== 'ready') throw new Error(`the receiver did not start: ${message}`)
    return child
  }

  async function sender () {
    while (!ending.signal.aborted) {
      // Without this pause the senders fill the queue faster than handlers with a database empty it.
      if (queues && inbox !== undefined) await sleep(100)
      const webhookId = `wh_${prefix}_${seed}_${sent++}`
      // With an inbox, some deliveries are not retried: their effect then happens once, or not at all.
      if (await (inbox !== undefined && sent % 10 === 0 ? deliver(webhookId) : deliverUntilAcknowledged(webhookId))) acknowledged.add(webhookId)
    }
  }

  async function deliverUntilAcknowledged (webhookId) {
    for (let attempt = sent; !await deliver(webhookId, ports[attempt % ports.length]); attempt++) await sleep(25)
    return true
  }

  /** @returns whether the answer was 200 */
  function deliver (webhookId, port = config.port) {
    attempts++
    const body = JSON.stringify({ id: `evt_${webhookId}`, object: 'event', created_at: 1, type: 'batch.failed', data: { id: 'batch_1' } })
    const timestamp = String(Math.floor(Date.now() / 1000))
    const signature = createHmac('sha256', SECRET).update(`${webhookId}.${timestamp}.${body}`).digest('base64')
    return new Promise(resolve => {
      const request = http.request({
        port,
        host: '127.0.0.1',
        // A stopped process does not answer.
        ...(zombies && { timeout: LEASE / 5 }),
        path: '/webhooks/openai',
        method: 'POST',
        agent,
        headers: { 'content-type': 'application/json', 'content-length': body.length, 'webhook-id': webhookId, 'webhook-timestamp': timestamp, 'webhook-signature': `v1,${signature}` }
      }, response => {
        response.resume()
        response.on('close', () => resolve(response.statusCode === 200))
      })
      request.on('error', () => resolve(false))
      request.on('timeout', () => request.destroy())
      request.end(body)
    })
  }

  async function effectCounts () {
    const counts = new Map()
    if (table !== undefined) {
      for (const { webhook_id: id, name } of await table.rows()) counts.set(`${id} ${name}`, (counts.get(`${id} ${name}`) ?? 0) + 1)
      return counts
    }
    if (!existsSync(config.effects)) return counts
    for (const line of readFileSync(config.effects, 'utf8').split('\n')) {
      if (line !== '') counts.set(line, (counts.get(line) ?? 0) + 1)
    }
    return counts
  }

  /** Handlers whose success the store has recorded, with the number of their runs at that time. */
  const recorded = new Map()
  async function record () {
    if (table !== undefined) return
    const counts = await effectCounts()
    for (const effect of await recordedSuccesses(config)) {
      if (!recorded.has(effect)) recorded.set(effect, counts.get(effect) ?? 0)
    }
  }

  let child = await boot()
  const other = zombies ? await boot(ports[1]) : undefined
  const senderLoops = Array.from({ length: senders }, sender)
  for (let kill = 0; kill < kills; kill++) {
    // Every other life is long enough to acknowledge something, however slow the machine is.
    const enough = acknowledged.size + (kill % 2 === 0 ? 2 : 0)
    while (acknowledged.size < enough) await sleep(5)
    // A process that was continued first has to clean up what expired while it was stopped.
    await sleep(random() * (inbox === undefined ? 100 : 250) + (zombies ? 400 : 0))
    if (zombies) {
      child.kill('SIGSTOP')
      await sleep(LEASE * 1.5)
      child.kill('SIGCONT')
      continue
    }
    if (postgres !== undefined && kill % 2 === 1) {
      await postgres.crash()
      continue
    }
    const exited = once(child, 'exit')
    child.kill('SIGKILL')
    await exited
    await record()
    child = await boot()
  }
  ending.abort()
  await Promise.all(senderLoops)

  const missing = async () => {
    const counts = await effectCounts()
    return [...acknowledged].flatMap(id => HANDLERS.map(name => `${id} ${name}`)).filter(effect => !counts.has(effect))
  }
  // A queue continues with acknowledged deliveries. What was only in memory is lost.
  if (queues) {
    let left = Infinity
    let end = 0
    for (;;) {
      const { length } = await missing()
      if (length < left) end = Date.now() + STANDSTILL
      if (length === 0 || Date.now() > end) break
      left = length
      await sleep(50)
    }
  }
  for (const each of [child, other]) {
    each?.send('close')
    if (each !== undefined) await once(each, 'exit')
  }
  agent.destroy()

  const counts = await effectCounts()
  const lost = await missing()
  await table?.close()
  return {
    kills,
    acknowledged: acknowledged.size,
    attempts,
    effects: counts.size,
    repeated: [...counts.values()].reduce((sum, count) => sum + count - 1, 0),
    lost,
    rerun: [...recorded].filter(([effect, count]) => counts.get(effect) !== count).map(([effect]) => effect)
  }
}

/** A table of effects without a constraint, so that an effect that happens twice is there twice. */
async function effectsTable (inbox, { file, handle, postgresUrl, prefix }) {
  const create = 'CREATE TABLE IF NOT EXISTS effects (webhook_id TEXT, name TEXT)'
  if (inbox === 'sqlite') {
    const db = openSqlite(file, handle)
    db.exec(create)
    return { rows: () => db.prepare('SELECT webhook_id, name FROM effects').all(), close: () => db.close() }
  }
  const { default: pg } = await import('pg')
  const pool = new pg.Pool({ connectionString: postgresUrl, max: 1 })
  pool.on('error', () => {})
  await pool.query(`DROP TABLE IF EXISTS effects; ${create}`)
  return { rows: async () => (await pool.query('SELECT webhook_id, name FROM effects')).rows, close: async () => await pool.end() }
}

async function recordedSuccesses ({ store, runner, file, handle, redisPort, prefix }) {
  const all = id => HANDLERS.map(name => `${id} ${name}`)
  const idOf = key => key.slice(key.lastIndexOf(' ') + 1)
  const found = []
  if (store === 'sqlite' || runner === 'durable') {
    const db = openSqlite(file, handle)
    if (store === 'sqlite') {
      for (const { key, done, finished } of db.prepare('SELECT key, done, finished FROM openai_webhook_deliveries').all()) {
        found.push(...done === 1 ? all(idOf(key)) : JSON.parse(finished).map(name => `${idOf(key)} ${name}`))
      }
    }
    if (runner === 'durable') {
      for (const { key } of db.prepare("SELECT key FROM openai_webhook_jobs WHERE state = 'done'").all()) found.push(...all(idOf(key)))
    }
    db.close()
  }
  if (store === 'redis') {
    const { Redis } = await import('ioredis')
    const redis = new Redis(redisPort, '127.0.0.1')
    for (const key of await redis.keys(`${prefix}/*`)) {
      const hash = await redis.hgetall(key)
      found.push(...hash.done === '1' ? all(idOf(key)) : Object.keys(hash).filter(field => field.startsWith('f:')).map(field => `${idOf(key)} ${field.slice(2)}`))
    }
    redis.disconnect()
  }
  return found
}
