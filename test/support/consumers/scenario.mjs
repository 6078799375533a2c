// A user's program, with the versions of its peers that are installed in its folder. It exits with 0 when the package keeps its promises.
import assert from 'node:assert/strict'
import { createRequire } from 'node:module'
import { setImmediate as turn } from 'node:timers/promises'
import Fastify from 'fastify'
import openaiWebhook, { memoryStore } from 'fastify-openai-webhook'
import { deliver, redeliver, sampleEvent, sign, testSecret } from 'fastify-openai-webhook/testing'

const { peers, redisPort, postgresUrl } = JSON.parse(process.argv[2])
const event = sampleEvent('batch.failed')
const RECEIVED = '200 {"received":true}'
const told = ({ statusCode, body }) => `${statusCode} ${body}`

async function start (options = {}, serverOptions = {}) {
  const app = Fastify(serverOptions)
  await app.register(openaiWebhook, { secret: testSecret, ...options })
  const handled = []
  app.openaiWebhook.on('batch.failed', ({ data }, { webhookId }) => { handled.push([data.id, webhookId]) })
  return { app, handled }
}

async function until (what, holds) {
  const end = Date.now() + 20_000
  while (!await holds()) {
    if (Date.now() > end) throw new Error(`expected ${what} within 20 s`)
    await new Promise(resolve => setTimeout(resolve, 10))
  }
}

const scenarios = {
  async 'require() and import are one module' () {
    assert.equal(createRequire(import.meta.url)('fastify-openai-webhook').default, openaiWebhook)
  },

  async 'a delivery is handled once, and a forged one never' () {
    const { app, handled } = await start()
    const first = await deliver(app, event, { webhookId: 'wh_1' })
    assert.equal(told(first), RECEIVED)
    assert.equal(told(await redeliver(app, first)), '200 {"received":true,"duplicate":true}')
    const body = JSON.stringify(event)
    const headers = { 'content-type': 'application/json', ...sign(body) }
    const url = `${await app.listen({ port: 0, host: '127.0.0.1' })}/webhooks/openai`
    const forged = await fetch(url, { method: 'POST', headers, body: body.replace(event.data.id, 'batch_other') })
    assert.equal(forged.status, 401)
    const received = await fetch(url, { method: 'POST', headers, body })
    assert.equal(received.status, 200)
    assert.deepEqual(handled.map(([id]) => id), [event.data.id, event.data.id])
    await app.close()
  },

  async 'a marked route, whose answer cannot be sent, is answered 500 whatever the store' () {
    const later = store => Object.fromEntries(Object.entries(store).map(([name, method]) => [name, async (...args) => {
      await turn()
      return method(...args)
    }]))
    for (const store of [memoryStore(), later(memoryStore())]) {
      const { app } = await start({ path: false, idempotency: { store } })
      app.post('/own', { config: { openaiWebhook: {} } }, async (request, reply) => {
        if (request.openaiWebhook.webhookId === 'wh_bad') reply.header('x-own', 'two\nlines')
        return { own: request.openaiWebhook.event.data.id }
      })
      assert.equal(told(await deliver(app, event, { url: '/own' })), `200 {"own":"${event.data.id}"}`)
      const { statusCode } = await deliver(app, event, { url: '/own', webhookId: 'wh_bad' })
      assert.equal(statusCode, 500)
      assert.equal((await app.inject({ method: 'POST', url: '/own', payload: {} })).statusCode, 401)
      await app.close()
    }
  },

  async 'an unknown option, and a route that was declared too early, are refused' () {
    await assert.rejects(start({ secrte: 'x' }), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS' })
    const app = Fastify()
    app.register(openaiWebhook, { secret: testSecret })
    app.post('/early', { config: { openaiWebhook: {} } }, async () => 'unverified')
    const { statusCode, body } = await app.inject({ method: 'POST', url: '/early', payload: {} })
    assert.equal(statusCode, 500)
    assert.equal(JSON.parse(body).code, 'FST_OPENAI_WEBHOOK_UNPROTECTED_ROUTE')
    await app.close()
  }
}

const withPeers = {
  async 'prom-client: deliveries are counted' () {
    const { Registry } = await import('prom-client')
    const { webhookMetrics } = await import('fastify-openai-webhook/metrics')
    const register = new Registry()
    const metrics = webhookMetrics({ register })
    const { app } = await start()
    await app.register(metrics)
    await deliver(app, event)
    const { body } = await app.inject('/metrics')
    assert.match(body, /webhook_\w+_total\{[^}]*event_type="batch\.failed"[^}]*\} 1/)
    metrics.close()
    await app.close()
  },

  async '@opentelemetry/api: a delivery and its handler are spans' () {
    const { webhookTracing } = await import('fastify-openai-webhook/otel')
    const { INVALID_SPAN_CONTEXT, trace } = await import('@opentelemetry/api')
    const spans = []
    const startSpan = name => {
      spans.push(name)
      return trace.wrapSpanContext(INVALID_SPAN_CONTEXT)
    }
    const tracing = webhookTracing({ tracerProvider: { getTracer: () => ({ startSpan }) } })
    const { app } = await start()
    await deliver(app, event)
    assert.deepEqual(spans.map(name => name.split(' ')[0]), ['process', 'handler'])
    tracing.close()
    await app.close()
  },

  async 'openai: it unwraps what the test kit signs, and the command says when it is too old for endpoints' () {
    const { OpenAI } = await import('openai')
    const client = new OpenAI({ apiKey: 'none', webhookSecret: testSecret })
    const body = JSON.stringify(event)
    const unwrapped = await client.webhooks.unwrap(body, sign(body))
    assert.equal(unwrapped.data.id, event.data.id)
    const { spawnSync } = await import('node:child_process')
    const { stderr } = spawnSync(process.execPath, ['node_modules/.bin/openai-webhook', 'endpoints', 'list', '--base-url', 'http://127.0.0.1:9'], {
      encoding: 'utf8', env: { ...process.env, OPENAI_API_KEY: 'none' }
    })
    assert.match(stderr, 'create' in client.webhooks ? /cannot reach/ : /needs a newer openai package/)
  },

  async 'pg: the contract of the store, and an effect that happens once' () {
    const { default: pg } = await import('pg')
    const { postgresInbox, postgresStore } = await import('fastify-openai-webhook/postgres')
    const { storeContract } = await import('fastify-openai-webhook/testing')
    const pool = new pg.Pool({ connectionString: postgresUrl })
    const store = postgresStore(pool)
    for (const { run } of storeContract(() => store)) await run()
    await pool.query('DROP TABLE IF EXISTS effects, openai_webhook_inbox')
    await pool.query('CREATE TABLE effects (row text)')
    const inbox = postgresInbox(pool)
    // The app does not remember deliveries, so only the inbox prevents a second effect.
    const { app } = await start({ idempotency: false })
    app.openaiWebhook.on('batch.failed', inbox.once('settle', async (tx, { data }) => {
      await tx.query('INSERT INTO effects VALUES ($1)', [data.id])
    }))
    const first = await deliver(app, event)
    assert.equal(told(first), RECEIVED)
    assert.equal(told(await redeliver(app, first)), RECEIVED)
    assert.deepEqual((await pool.query('SELECT row FROM effects')).rows, [{ row: event.data.id }])
    await app.close()
    await inbox.close()
    await store.close?.()
    await pool.end()
  },

  async 'pg-boss: the contract of the runner, and workers that share a queue' () {
    const { PgBoss } = await import('pg-boss')
    const { pgboss } = await import('fastify-openai-webhook/pgboss')
    const { runnerContract } = await import('fastify-openai-webhook/testing')
    const schema = `boss_${Date.now()}`
    const [boss, other] = await Promise.all([{}, { useListenNotify: true }].map(async options => await new PgBoss({ connectionString: postgresUrl, schema, ...options }).on('error', () => {}).start()))
    let queues = 0
    for (const { run } of runnerContract(() => pgboss({ boss, queueName: `queue-${++queues}`, backoff: 0, attempts: 2 }), { attempts: 2 })) await run()
    const receiving = await start({ runner: pgboss({ boss, worker: false }) })
    const working = await start({ path: false, runner: pgboss({ boss: other }) })
    await working.app.ready()
    const first = await deliver(receiving.app, event, { webhookId: 'wh_1' })
    assert.equal(told(first), RECEIVED)
    await until('the delivery to be handled', () => working.handled.length === 1)
    assert.equal(told(await redeliver(receiving.app, first)), '200 {"received":true,"duplicate":true}')
    await receiving.app.close()
    await working.app.close()
    await Promise.all([boss.stop(), other.stop()])
  },

  async 'bullmq: a delivery that fails at first is handled by the worker, once for each webhook-id' () {
    const { bullmq } = await import('fastify-openai-webhook/bullmq')
    const runner = bullmq({ connection: { url: `redis://127.0.0.1:${redisPort}` }, queueName: `compatibility-${Date.now()}`, backoff: 5 })
    const { app, handled } = await start({ runner })
    let failures = 0
    app.openaiWebhook.on('batch.failed', () => { if (failures++ === 0) throw new Error('at first') })
    const first = await deliver(app, event, { webhookId: 'wh_1' })
    assert.equal(told(first), RECEIVED)
    await until('two attempts', () => failures === 2)
    assert.match(told(await redeliver(app, first)), /^200 /)
    assert.match(told(await deliver(app, event, { webhookId: 'wh_2' })), /^200 /)
    await until('the other delivery', () => handled.some(([, id]) => id === 'wh_2'))
    assert.equal(handled.filter(([, id]) => id === 'wh_1').length, 1, 'what had succeeded does not run again')
    await app.close()
  }
}

for (const [name, run] of Object.entries({ ...scenarios, ...(peers && withPeers) })) {
  await run()
  console.log(name)
}
