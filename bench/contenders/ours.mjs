import { join } from 'node:path'
import Fastify from 'fastify'
import { PATH, logTo, secretOf, secrets } from '../deliveries.mjs'

let handled = 0
let waiting

/** The only handler of a delivery. It does nothing else. */
function count () {
  handled++
  if (handled === waiting?.count) waiting.resolve()
}

/** Resolves once the handlers of this many deliveries have run. */
export function untilHandled (wanted) {
  if (handled >= wanted) return
  return new Promise(resolve => { waiting = { count: wanted, resolve } })
}

/**
 * @param {object} [options] what differs from the defaults
 * @param {string} [options.from] the URL of the plugin in another checkout
 * @param {'sync' | 'async'} [options.handler]
 * @param {string[]} [options.types] the event types of the handler that counts
 * @param {string[]} [options.otherHandlers] the event type of each further handler
 * @param {string[]} [options.ownTypes] event types for the `events` option
 * @param {number} [options.tenants] the number of tenants of one route
 * @param {number} [options.remembered] the number of deliveries that the store has already processed
 */
export async function build ({
  from = 'fastify-openai-webhook',
  handler = 'sync',
  types = ['response.completed', 'realtime.call.incoming'],
  otherHandlers = [],
  ownTypes = [],
  secretCount = 1,
  idempotency,
  store,
  runner,
  metrics = false,
  inspector = false,
  logger = false,
  remembered = 0,
  tenants = 0,
  ...resources
} = {}) {
  const { default: openaiWebhook } = await import(from)
  const app = Fastify({ logger: logger && logTo(resources) })
  if (metrics) await collectMetrics()
  await app.register(openaiWebhook, {
    secret: secrets(secretCount),
    path: PATH,
    ...(ownTypes.length > 0 && { events: await schemasOf(ownTypes) }),
    ...(idempotency !== undefined && { idempotency }),
    ...(store !== undefined && { idempotency: { store: await stores[store]({ ...resources, remembered }) } }),
    ...(runner !== undefined && { runner: await runners[runner](resources) })
  })
  if (inspector) await app.register((await import('fastify-openai-webhook/inspector')).default, { onRequest: (request, reply, done) => { done() } })
  app.openaiWebhook.on(types, handler === 'sync' ? () => { count() } : async () => { count() })
  for (const type of otherHandlers) app.openaiWebhook.on(type, () => {})
  if (tenants > 0) {
    app.openaiWebhook.route({ url: `${PATH}/:tenant`, tenant: { of: request => request.params.tenant, secret: secretsOfTenants() } })
  }
  return app
}

/**
 * The plugin looks up at most 100 new tenants a second, and the warm-up is too short for that. So each lookup advances the clock by its
 * share of a second.
 */
function secretsOfTenants () {
  const { now } = performance
  let ahead = 0
  performance.now = () => now.call(performance) + ahead
  return tenant => {
    ahead += 10
    return secretOf(tenant)
  }
}

// A module is imported only by the contenders that use it, because imports are measured too.

async function schemasOf (types) {
  const { Type } = await import('@sinclair/typebox')
  return Object.fromEntries(types.map(type => [type, Type.Object({
    id: Type.String(),
    created_at: Type.Integer(),
    object: Type.Literal('event'),
    type: Type.Literal(type),
    data: Type.Object({ id: Type.String() })
  })]))
}

async function collectMetrics () {
  const { Registry } = await import('prom-client')
  const { webhookMetrics } = await import('fastify-openai-webhook/metrics')
  webhookMetrics({ register: new Registry() })
}

async function openDatabase ({ directory }) {
  const { default: Database } = await import('libsql')
  return new Database(join(directory, `${process.pid}.db`))
}

async function openPool ({ postgresUrl }) {
  const { default: pg } = await import('pg')
  return new pg.Pool({ connectionString: postgresUrl, max: 10 })
}

const stores = {
  memory: async () => (await import('fastify-openai-webhook')).memoryStore(),
  async sqlite ({ remembered, ...resources }) {
    const { sqliteStore } = await import('fastify-openai-webhook/sqlite')
    const db = await openDatabase(resources)
    const store = sqliteStore(db)
    if (remembered > 0) await remember.sqlite(db, remembered)
    return store
  },
  async postgres ({ remembered, ...resources }) {
    const { postgresStore } = await import('fastify-openai-webhook/postgres')
    const pool = await openPool(resources)
    const table = `deliveries_${process.pid}`
    if (remembered > 0) await remember.postgres(pool, table, remembered)
    return postgresStore(pool, { table })
  },
  async redis ({ redisPort }) {
    const { Redis } = await import('ioredis')
    const { redisStore } = await import('fastify-openai-webhook/redis')
    return redisStore(new Redis(redisPort, '127.0.0.1'))
  }
}

// The keys lie evenly among those that deliveries will add. They are inserted in ascending order, since ten million in random order would
// take an hour.
const remember = {
  async sqlite (db, count) {
    db.exec(`
      INSERT INTO openai_webhook_deliveries (key, done, ends, forget)
      WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < ${count - 1})
      SELECT printf('${PATH} wh_%08x', CAST(i * (4294967296.0 / ${count}) AS INTEGER)) || '000000000000000000000000', 1, 0, 9000000000000 + i FROM n`)
  },
  async postgres (pool, table, count) {
    const { migration } = await import('fastify-openai-webhook/postgres')
    await pool.query(migration({ tables: { store: table, inbox: false } }))
    await pool.query(`
      INSERT INTO ${table} (key, done, ends, forget)
      SELECT '${PATH} wh_' || lpad(to_hex((i * (4294967296.0 / ${count}))::bigint), 8, '0') || repeat('0', 24), true, now(), now() + interval '72 hours' + i * interval '1 ms'
      FROM generate_series(0, ${count - 1}) AS i`)
    await pool.query(`VACUUM ANALYZE ${table}`)
  }
}

async function pgboss ({ postgresUrl }) {
  const { PgBoss } = await import('pg-boss')
  const { pgboss } = await import('fastify-openai-webhook/pgboss')
  const boss = new PgBoss({ connectionString: postgresUrl, useListenNotify: true })
  boss.on('error', error => { console.error(error) })
  await boss.start()
  return pgboss({ boss, queueName: `bench-${process.pid}` })
}

const runners = {
  inline: async () => (await import('fastify-openai-webhook')).inline(),
  background: async () => (await import('fastify-openai-webhook')).background({ maxQueue: 100_000 }), // enough for all deliveries of a round at full load
  durable: async resources => (await import('fastify-openai-webhook/sqlite')).durable(await openDatabase(resources)),
  pgboss,
  async bullmq ({ redisPort }) {
    const { bullmq } = await import('fastify-openai-webhook/bullmq')
    return bullmq({ connection: { port: redisPort, host: '127.0.0.1' }, queueName: `bench-${process.pid}` })
  }
}
