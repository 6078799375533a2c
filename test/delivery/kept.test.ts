import { AsyncLocalStorage } from 'node:async_hooks'
import { once } from 'node:events'
import { connect as connect2 } from 'node:http2'
import type { ClientHttp2Stream } from 'node:http2'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import type { FastifyInstance } from 'fastify'
import t from 'tap'
import type { Test } from 'tap'
import { background } from '../../lib/index.ts'
import type { RunnerHost } from '../../lib/index.ts'
import { durable } from '../../lib/sqlite/index.ts'
import { build, post, SECRET, sign, stoppedClock, thin } from '../support/deliveries.ts'
import { deferred, handled, listen, redelivered } from '../support/observe.ts'
import { spawnProgram } from '../support/program.mjs'
import { isLong, long } from '../support/size.ts'
import { openSqlite } from '../support/sqlite.mjs'
import { CHUNKED, head, listen as listenOn, request, Wire } from '../support/wire.ts'

// What is kept of requests: little before they are known to be OpenAI's, nothing once they have been answered.

interface Memory { rss: number, held: number, read: number }

/** A receiver in a process of its own, under a small heap. */
async function receiver (t: Test, protocol: 'http1' | 'http2') {
  const child = spawnProgram(['--expose-gc', '--max-old-space-size=64', fileURLToPath(new URL('../support/uploads.mjs', import.meta.url)), protocol], {
    env: { PATH: process.env['PATH'], SECRET },
    stdio: ['pipe', 'pipe', 'inherit']
  })
  t.teardown(async () => {
    child.kill()
    if (child.exitCode === null && child.signalCode === null) await once(child, 'exit')
  })
  const told = createInterface({ input: child.stdout })[Symbol.asyncIterator]()
  const next = async (): Promise<string> => (await told.next()).value as string
  const port = Number(await next())
  return {
    port,
    async memory (): Promise<Memory> {
      child.stdin.write('\n')
      return JSON.parse(await next()) as Memory
    }
  }
}

/** Its memory once it holds less than `limit` bytes: a collector may leave what is dead to a later collection. After 100, as it is. */
async function settled (memory: () => Promise<Memory>, limit: number): Promise<Memory> {
  for (let n = 1; ; n++) {
    const now = await memory()
    if (now.held < limit || n === 100) return now
  }
}

const MB = (bytes: number): string => `${(bytes / 1e6).toFixed(1)} MB`

long(t, 'uploads that dribble take about two body limits each, under a heap of 64 MB', {}, async t => {
  const { port, memory } = await receiver(t, 'http1')
  const CONNECTIONS = 10
  const BYTES = 65_000
  const bytes = Buffer.from('1\r\nx\r\n'.repeat(BYTES))
  const EACH = 2 * 65_536 + 40_000
  const before = await memory()
  for (let n = 0; n < CONNECTIONS; n++) {
    const wire = await Wire.open(t, port)
    const delivery = sign(thin('batch.failed'))
    await wire.write(head([...Object.entries(delivery.headers), ...CHUNKED], n % 2 === 0 ? '/marked' : undefined))
    await wire.write(bytes)
  }
  while ((await memory()).read < CONNECTIONS * bytes.length);
  const after = await settled(memory, before.held + CONNECTIONS * EACH)
  const each = (after.held - before.held) / CONNECTIONS
  t.comment(`${Math.round(each / 1_000)} KB each; rss ${MB(before.rss)}, then ${MB(after.rss)}`)
  t.ok(each < EACH, `${each} bytes each`)
  t.ok(after.rss - before.rss < 100e6, `rss grew by ${MB(after.rss - before.rss)}`)
})

t.test('over HTTP/2 a few bytes keep nothing of what came with them', async t => {
  const { port, memory } = await receiver(t, 'http2')
  const session = connect2(`http://127.0.0.1:${port}`)
  t.teardown(() => session.destroy())
  const open = (path: string, headers: Record<string, string>): ClientHttp2Stream => session.request({ ...headers, ':method': 'POST', ':path': path }).on('error', () => {})
  const uploads = ['/webhooks/openai', '/marked'].map(url => open(url, sign(thin('batch.failed')).headers))
  const sink = open('/sink', { 'content-type': 'application/octet-stream' })
  const round = async (): Promise<void> => {
    for (const upload of uploads) upload.write('x')
    await new Promise(resolve => sink.write(Buffer.alloc(40_000), resolve))
  }
  await round()
  const before = await memory()
  for (let n = 0; n < 400; n++) await round()
  sink.end()
  await once(sink, 'response')
  const KEPT = 2e6
  const after = await settled(memory, before.held + KEPT)
  t.comment(`${MB(after.held - before.held)} more; rss ${MB(before.rss)}, then ${MB(after.rss)}`)
  t.ok(after.held - before.held < KEPT, `${MB(after.held - before.held)} for ${uploads.length * 400} bytes`)
})

setFlagsFromString('--expose-gc')
const gc = runInNewContext('gc') as () => void

/** The requests of an app that are still in memory. */
function requestsOf (app: FastifyInstance, context?: AsyncLocalStorage<object>): { alive: (expected: number) => Promise<number> } {
  const requests: Array<WeakRef<object>> = []
  app.addHook('onRequest', (request, _reply, done) => {
    requests.push(new WeakRef(request))
    // As @fastify/request-context does.
    if (context === undefined) done()
    else context.run(request, done)
  })
  return {
    async alive (expected) {
      // A WeakRef holds until the end of the turn that has read it, and Node what a connection or a timer has just let go of for some
      // turns more.
      for (let n = 1; ; n++) {
        await new Promise(resolve => setTimeout(resolve, 1))
        if (n < 5) continue
        gc()
        const alive = requests.filter(request => request.deref() !== undefined).length
        if (alive <= expected || n === 100) return alive
      }
    }
  }
}

t.test('what a delivery was made of is gone with the next small collection, and does not wait for a full one', async t => {
  // What waits is copied twice and promoted, which doubles what a delivery costs.
  const minor = (): void => { (gc as (options: { type: 'minor' }) => void)({ type: 'minor' }) }
  const DELIVERIES = 200
  // The collector makes the young generation small while a process waits, as for the receivers above. Then it comes in the middle of the work,
  // and promotes what is in use. What is alive here makes the young generation large again.
  Array.from({ length: 1_000_000 }, () => ({ some: {} }))
  for (const [where, url] of [['the app', '/webhooks/openai'], ['a marked route', '/own']] as const) {
    for (const [kind, handler] of [['synchronous', () => {}], ['asynchronous', async () => {}]] as const) {
      if (kind === 'synchronous' && !isLong) continue // makes a part of what asynchronous ones make
      t.test(`${kind} handlers of ${where}`, async t => {
        const app = await build(t, { idempotency: false })
        app.openaiWebhook.on('batch.failed', handler)
        app.post('/own', { config: { openaiWebhook: {} } }, (_request, reply) => handler() ?? reply.send())
        app.post('/plain', async () => {})
        const wire = await Wire.open(t, await listenOn(app))
        /** Bytes a request that only a full collection frees. */
        async function waiting (url: string): Promise<number> {
          const requests = Array.from({ length: DELIVERIES }, () => {
            const { headers, body } = sign(thin('batch.failed'))
            return request(Object.entries(headers), Buffer.from(body), url)
          })
          gc()
          for (const each of requests) {
            await wire.write(each)
            await wire.answer()
          }
          for (let n = 0; n < 4; n++) minor()
          const before = process.memoryUsage().heapUsed
          gc()
          return (before - process.memoryUsage().heapUsed) / DELIVERIES
        }
        await waiting('/plain')
        await waiting(url)
        // The least of some, since the collector may do a part of its work in between. What waits for a full collection does so each time.
        const more: number[] = []
        for (let n = 0; n < 3; n++) {
          const [plain, ours] = [await waiting('/plain'), await waiting(url)]
          t.comment(`${Math.round(ours)} bytes a delivery, ${Math.round(plain)} of a plain route`)
          more.push(ours - plain)
        }
        t.ok(Math.min(...more) < 4_000, 'each way that eslint.config.js forbids keeps 8,000 and more')
      })
    }
  }
})

const OVERLOADED = /FST_OPENAI_WEBHOOK_OVERLOADED/

t.test('a retry that has been answered while the handlers run on', async t => {
  for (const url of ['/webhooks/openai', '/dispatches', '/own']) {
    t.test(`leaves nothing of its request, at ${url}`, async t => {
      const app = await build(t, { deadline: 20 })
      const requests = requestsOf(app)
      const finish = deferred()
      app.openaiWebhook.on('batch.failed', async () => { await finish.promise })
      app.post('/dispatches', { config: { openaiWebhook: {} } }, app.openaiWebhook.handler)
      app.post('/own', { config: { openaiWebhook: {} } }, async () => { await finish.promise })
      await listen(app)
      const delivery = sign(thin('batch.failed'))
      const statuses: number[] = []
      for (let n = 0; n < 5; n++) statuses.push((await post(app, n === 0 ? delivery : redelivered(delivery), url)).statusCode)
      t.same(statuses, [503, 503, 503, 503, 503])
      t.equal(await requests.alive(1), 1, 'that of the first is its handlers\'')
      finish.resolve()
    })
  }

  t.test('leaves nothing of it where a runner has acknowledged before the handlers\' end', async t => {
    const finish = deferred()
    const acknowledge = deferred()
    let host: RunnerHost | undefined
    const app = await build(t, {
      deadline: 60_000,
      runner: {
        start (its) { host = its },
        async run (job) {
          host!.process(job)
          await acknowledge.promise
        }
      }
    })
    const requests = requestsOf(app)
    const third = handled(app, 3)
    app.openaiWebhook.on('batch.failed', async () => { await finish.promise })
    await app.ready()
    const delivery = sign(thin('batch.failed'))
    let answers = [delivery, redelivered(delivery), redelivered(delivery)].map(async each => (await post(app, each)).body)
    await third
    acknowledge.resolve()
    t.same(await Promise.all(answers), ['{"received":true}', '{"received":true}', '{"received":true}'])
    answers = []
    t.equal(await requests.alive(1), 1)
    finish.resolve()
  })

  for (const [name, create, context] of [
    ['background()', () => background({ concurrency: 1 }), undefined],
    ['durable(), in the async context of the request neither', () => durable(openSqlite(':memory:'), { concurrency: 1 }), new AsyncLocalStorage<object>()]
  ] as const) {
    t.test(`leaves nothing of the first either where the handlers do not run in the request: ${name}`, async t => {
      const finish = deferred()
      const started = deferred()
      const app = await build(t, { runner: create() })
      const requests = requestsOf(app, context)
      app.openaiWebhook.on('batch.failed', async () => {
        started.resolve()
        await finish.promise
      })
      await app.ready()
      const delivery = sign(thin('batch.failed'))
      const waiting = sign(thin('batch.failed'))
      for (const each of [delivery, waiting, redelivered(delivery), redelivered(waiting)]) t.equal((await post(app, each)).statusCode, 200)
      await started.promise
      t.equal(await requests.alive(0), 0)
      finish.resolve()
    })
  }
})

t.test('no more than 100 wait for the answer of one delivery', async t => {
  async function running (t: Test) {
    const finish = deferred()
    const app = await build(t, { deadline: 1_000 })
    const told: unknown[] = []
    app.openaiWebhook
      .onError(error => { told.push((error as { code?: unknown }).code) })
      .on('batch.failed', async () => { await finish.promise })
    const full = handled(app, 101)
    const next = handled(app, 102)
    await app.ready()
    const clock = stoppedClock(t)
    const delivery = sign(thin('batch.failed'))
    const answers = Array.from({ length: 101 }, async (_, n) => await post(app, n === 0 ? delivery : redelivered(delivery)))
    await full
    return { app, told, clock, delivery, answers, next, finish: finish.resolve }
  }

  t.test('the next is to come again at once, and another delivery is not concerned', async t => {
    const { app, told, delivery, answers, finish } = await running(t)
    const refused = await post(app, redelivered(delivery))
    t.same([refused.statusCode, refused.headers['retry-after']], [503, '5'])
    t.match(refused.body, OVERLOADED)
    t.same(told, ['FST_OPENAI_WEBHOOK_OVERLOADED'])
    t.equal((await post(app, sign(thin('batch.completed')))).statusCode, 200)
    finish()
    t.ok((await Promise.all(answers)).every(({ statusCode }) => statusCode === 200))
    t.match((await post(app, redelivered(delivery))).body, /"duplicate":true/)
  })

  t.test('those that have had their answer leave room', async t => {
    const { app, clock, delivery, answers, next, finish } = await running(t)
    clock.advance(1_000)
    t.ok((await Promise.all(answers)).every(({ statusCode }) => statusCode === 503))
    const retry = post(app, redelivered(delivery))
    await next
    finish()
    t.equal((await retry).body, '{"received":true}')
  })
})
