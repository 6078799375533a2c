import type { Redis } from 'ioredis'
import t from 'tap'
import { redisStore } from '../../lib/stores/redis.ts'
import type { OpenAIWebhookOptions } from '../../lib/index.ts'
import { build, sign, thin } from '../support/deliveries.ts'
import { DEADLINE, IMPATIENT, IN_PROGRESS, TcpProxy, UNAVAILABLE, answer, batchFailed, commandsOf, deliverUntil200, redisClient, replicaOf, until } from '../support/faults.ts'
import { deferred, listen, redelivered } from '../support/observe.ts'
import { RedisServer, redisMissing } from '../support/redis.ts'

type Teardown = { teardown: (fn: () => unknown) => void }

/** ms; does not run out while a test lasts. */
const LONG = 600_000
const ENDPOINT = '/webhooks/openai'

const persistent = (dir: string): string[] => ['--appendonly', 'yes', '--appendfsync', 'always', '--dir', dir]

/** A receiver with a handler that counts its runs; the last one waits for what `work` gives. */
async function receiver (t: Teardown, client: Redis, { idempotency, ...options }: OpenAIWebhookOptions = {}) {
  const app = await build(t, { idempotency: { store: redisStore(client), lease: LONG, ...idempotency }, closeTimeout: 500, ...options })
  const told: string[] = []
  const state = { app, told, runs: 0, started: deferred(), work: async (): Promise<void> => {} }
  app.openaiWebhook.onError(error => { told.push(error.message) })
  app.openaiWebhook.on('batch.failed', async () => {
    state.runs++
    state.started.resolve()
    await state.work()
  }, { name: 'counted' })
  return state
}

/** A delivery whose handler runs until `finish` is called. */
async function handling (state: Awaited<ReturnType<typeof receiver>>) {
  const { promise, resolve: finish } = deferred()
  state.work = async () => await promise
  await listen(state.app)
  const delivery = batchFailed()
  const answered = answer(state.app, delivery)
  await state.started.promise
  return { delivery, answered, finish }
}

const skip = redisMissing

t.test('redisStore: Redis is down when a delivery comes', { skip }, async t => {
  t.test('it is refused at once by a client that gives up soon, and processed once when Redis is back', async t => {
    const server = await RedisServer.start(t)
    const state = await receiver(t, redisClient(t, server.port, IMPATIENT))
    await listen(state.app)
    t.equal(await answer(state.app, batchFailed()), '200')
    await server.stop()
    const delivery = batchFailed()
    t.equal(await answer(state.app, delivery), UNAVAILABLE)
    t.equal(await answer(state.app, redelivered(delivery)), UNAVAILABLE)
    t.equal(state.runs, 1, 'no handler has run for it')
    t.equal(state.told.length, 2)
    await server.start()
    const answers = await deliverUntil200(state.app, redelivered(delivery))
    t.equal(answers.at(-1), '200')
    t.equal(await answer(state.app, redelivered(delivery)), '200 duplicate')
    t.equal(state.runs, 2)
  })

  t.test('it is refused at the deadline while a default client waits, then processed once, and the retry finds it', async t => {
    const server = await RedisServer.start(t)
    const state = await receiver(t, redisClient(t, server.port), { deadline: 50 })
    await listen(state.app)
    await server.stop()
    const delivery = batchFailed()
    t.equal(await answer(state.app, delivery), UNAVAILABLE)
    t.equal(await answer(state.app, redelivered(delivery)), UNAVAILABLE, 'the retry joins it')
    t.equal(state.runs, 0)
    await server.start()
    await state.started.promise
    await deliverUntil200(state.app, redelivered(delivery))
    t.equal((await deliverUntil200(state.app, redelivered(delivery))).at(-1), '200 duplicate')
    t.equal(state.runs, 1)
  })

  t.test('the app boots without it', async t => {
    const server = await RedisServer.start(t)
    await server.stop()
    const state = await receiver(t, redisClient(t, server.port, IMPATIENT))
    await listen(state.app)
    const delivery = batchFailed()
    t.equal(await answer(state.app, delivery), UNAVAILABLE)
    await server.start()
    await deliverUntil200(state.app, redelivered(delivery))
    t.equal(state.runs, 1)
  })
})

t.test('redisStore: Redis stops while a handler runs', { skip }, async t => {
  t.test('the sender is told of the success; what Redis forgot with its restart runs again', async t => {
    const server = await RedisServer.start(t)
    const state = await receiver(t, redisClient(t, server.port, IMPATIENT))
    const { delivery, answered, finish } = await handling(state)
    await server.stop()
    finish()
    t.equal(await answered, '200', 'processed, though it could not be recorded')
    t.equal(state.told.length, 1, 'which is told to onError')
    await server.start()
    t.equal((await deliverUntil200(state.app, redelivered(delivery))).at(-1), '200')
    t.equal(state.runs, 2)
  })

  t.test('with persistence, a success that is recorded after the restart does not run again', async t => {
    const server = await RedisServer.start(t, ...persistent(t.testdir()))
    const state = await receiver(t, redisClient(t, server.port), { deadline: LONG })
    const { delivery, answered, finish } = await handling(state)
    await server.stop()
    finish()
    await server.start()
    t.equal(await answered, '200')
    t.equal(await answer(state.app, redelivered(delivery)), '200 duplicate')
    t.equal(state.runs, 1)
    t.same(state.told, [])
  })

  t.test('with persistence, a success that could not be recorded is locked until its lease is over, then runs again', async t => {
    const server = await RedisServer.start(t, ...persistent(t.testdir()))
    const client = redisClient(t, server.port, IMPATIENT)
    const state = await receiver(t, client)
    const { delivery, answered, finish } = await handling(state)
    await server.stop()
    finish()
    t.equal(await answered, '200')
    await server.start()
    await until('Redis to be reached', async () => await client.ping().then(() => true, () => false))
    t.equal(await answer(state.app, redelivered(delivery)), IN_PROGRESS)
    await client.hset(`openai-webhook:${ENDPOINT} ${delivery.headers['webhook-id']!}`, 'ends', 0) // as if the lease were over
    t.equal(await answer(state.app, redelivered(delivery)), '200')
    t.equal(state.runs, 2)
  })

  t.test('with persistence, a handler on record does not run again when the other one fails', async t => {
    const server = await RedisServer.start(t, ...persistent(t.testdir()))
    const state = await receiver(t, redisClient(t, server.port), { deadline: LONG })
    const ran: string[] = []
    const { promise, resolve } = deferred()
    state.work = async () => {
      await promise
      if (state.runs === 1) throw new Error('the second handler failed')
    }
    state.app.openaiWebhook.on('batch.failed', () => { ran.push('first') }, { name: 'first' })
    await listen(state.app)
    const delivery = batchFailed()
    const key = `openai-webhook:${ENDPOINT} ${delivery.headers['webhook-id']!}`
    const answered = answer(state.app, delivery)
    const admin = redisClient(t, server.port)
    await until('the first handler to be on record', async () => await admin.hexists(key, 'f:first') === 1)
    await server.stop()
    resolve()
    await server.start()
    t.equal(await answered, '500 HANDLER_FAILED')
    t.equal(await answer(state.app, redelivered(delivery)), '200')
    t.same(ran, ['first'])
    t.equal(state.runs, 2)
  })
})

t.test('redisStore: the connection breaks after Redis has done what it was asked', { skip }, async t => {
  const server = await RedisServer.start(t)
  const proxy = await TcpProxy.start(t, server.port)
  const state = await receiver(t, redisClient(t, proxy.port, { retryStrategy: () => 20 }))
  await listen(state.app)
  t.equal(await answer(state.app, batchFailed()), '200')

  async function loseAnswers (): Promise<void> {
    await new Promise<void>(resolve => {
      proxy.onSwallowed = resolve
      proxy.swallowing = true
    })
    proxy.swallowing = false
    proxy.cut()
  }

  await t.test('a claim whose answer was lost is the claimant\'s when the client asks again', async t => {
    const delivery = batchFailed()
    const before = state.runs
    const [answered] = await Promise.all([answer(state.app, delivery), loseAnswers()])
    t.equal(answered, '200')
    t.equal(state.runs, before + 1)
  })

  await t.test('a completion whose answer was lost stays recorded', async t => {
    const delivery = batchFailed()
    const before = state.runs
    let lost: Promise<void> | undefined
    state.work = async () => { lost = loseAnswers() }
    t.equal(await answer(state.app, delivery), '200')
    await lost
    t.equal(await answer(state.app, redelivered(delivery)), '200 duplicate')
    t.equal(state.runs, before + 1)
    t.same(state.told, [], 'asking again is no lost claim')
  })
})

t.test('redisStore: Redis is paused for longer than the deadline', { skip }, async t => {
  const server = await RedisServer.start(t)
  const admin = redisClient(t, server.port)
  // Redis answers in less, also where two cores are busy with other tests.
  const state = await receiver(t, redisClient(t, server.port, IMPATIENT), { deadline: 300 })
  await listen(state.app)

  await t.test('before the delivery: 503 at the deadline, processed once afterwards, and the retry joins or finds it', async t => {
    await admin.client('PAUSE', LONG, 'WRITE')
    const delivery = batchFailed()
    t.equal(await answer(state.app, delivery), UNAVAILABLE)
    t.equal(await answer(state.app, redelivered(delivery)), UNAVAILABLE)
    t.equal(state.runs, 0)
    await admin.client('UNPAUSE')
    await state.started.promise
    await deliverUntil200(state.app, redelivered(delivery))
    t.equal((await deliverUntil200(state.app, redelivered(delivery))).at(-1), '200 duplicate')
    t.equal(state.runs, 1)
  })

  await t.test('while a handler runs: 503 at the deadline, and it does not run again', async t => {
    const delivery = batchFailed()
    const before = state.runs
    state.work = async () => { await admin.client('PAUSE', LONG, 'WRITE') }
    t.equal(await answer(state.app, delivery), DEADLINE)
    t.equal(await answer(state.app, redelivered(delivery)), DEADLINE, 'the retry joins it')
    await admin.client('UNPAUSE')
    await deliverUntil200(state.app, redelivered(delivery))
    t.equal((await deliverUntil200(state.app, redelivered(delivery))).at(-1), '200 duplicate')
    t.equal(state.runs, before + 1)
  })
})

t.test('redisStore: Redis is flushed while a handler runs', { skip }, async t => {
  const server = await RedisServer.start(t)
  const admin = redisClient(t, server.port)
  const one = await receiver(t, redisClient(t, server.port))
  const other = await receiver(t, redisClient(t, server.port))
  const [first, second] = [deferred(), deferred()]
  one.work = async () => await first.promise
  other.work = async () => await second.promise
  await listen(one.app)
  await listen(other.app)
  const delivery = batchFailed()
  const third = redisStore(redisClient(t, server.port))
  const key = `${ENDPOINT} ${delivery.headers['webhook-id']!}`

  const late = answer(one.app, delivery)
  await one.started.promise
  await admin.flushall()
  const holding = answer(other.app, redelivered(delivery))
  await other.started.promise
  first.resolve()
  t.equal(await late, '200', 'it was processed')
  t.same(one.told, [`the claim on ${key} was lost: its lease of ${LONG} ms ran out before its success was on record: what took it over may run it again`])
  t.same(await third.begin(key, LONG), { state: 'running' }, 'the claim of the other is as it was')
  t.equal(await answer(one.app, redelivered(delivery)), IN_PROGRESS)
  second.resolve()
  t.equal(await holding, '200')
  t.same(await third.begin(key, LONG), { state: 'done' })
})

t.test('redisStore: a claim that was forgotten while its handler runs is told', { skip }, async t => {
  const server = await RedisServer.start(t)
  const admin = redisClient(t, server.port)
  const lost = deferred<string>()
  const state = await receiver(t, redisClient(t, server.port), { idempotency: { lease: 150 } })
  state.app.openaiWebhook.onError(error => { lost.resolve(error.message) })
  state.work = async () => {
    await admin.flushall()
    await lost.promise
  }
  await listen(state.app)
  t.equal(await answer(state.app, batchFailed()), '200')
  t.match(await lost.promise, /^the claim on .* was lost/)
})

t.test('redisStore: Redis is out of memory', { skip }, async t => {
  const server = await RedisServer.start(t)
  const admin = redisClient(t, server.port)
  await admin.config('SET', 'maxmemory-policy', 'noeviction')
  const full = async (): Promise<void> => { await admin.config('SET', 'maxmemory', '1') }
  const roomy = async (): Promise<void> => { await admin.config('SET', 'maxmemory', '0') }
  const client = redisClient(t, server.port)

  await t.test('a delivery is refused, and processed once when there is room again', async t => {
    const state = await receiver(t, client)
    await listen(state.app)
    await admin.config('SET', 'maxmemory', '3mb')
    const fill = async (): Promise<number> => await admin.append('filling', 'x'.repeat(100_000)).then(() => fill(), () => 0)
    await fill()
    await admin.append('filling', 'x'.repeat(10_000)).catch(() => {})
    await full()
    const delivery = batchFailed()
    t.equal(await answer(state.app, delivery), UNAVAILABLE)
    t.equal(state.runs, 0)
    await roomy()
    t.equal(await answer(state.app, redelivered(delivery)), '200')
    t.equal(await answer(state.app, redelivered(delivery)), '200 duplicate')
    t.equal(state.runs, 1)
  })

  await t.test('what was claimed before is renewed, checkpointed, completed and released', async t => {
    await roomy()
    const store = redisStore(client, { prefix: 'full:' })
    const claim = async (key: string): Promise<string> => {
      const begun = await store.begin(key, LONG)
      if (begun.state !== 'claimed') throw new Error(`expected to claim ${key}`)
      return begun.token
    }
    const [completed, released] = [await claim('completed'), await claim('released')]
    await full()
    t.equal(await store.extend('completed', completed, LONG), true)
    await store.checkpoint('completed', completed, 'a')
    await store.complete('completed', completed, LONG)
    await store.checkpoint('released', released, 'a')
    await store.release('released', released)
    await t.rejects(async () => await store.begin('new', LONG), /OOM/)
    await roomy()
    t.same(await store.begin('completed', LONG), { state: 'done' })
    t.match(await store.begin('released', LONG), { state: 'claimed', finished: ['a'] })
  })
})

t.test('redisStore: scripts that Redis has forgotten are given again', { skip }, async t => {
  const server = await RedisServer.start(t)
  const admin = redisClient(t, server.port)
  const store = redisStore(redisClient(t, server.port))
  const flush = async (): Promise<void> => { await admin.script('FLUSH') }
  const begun = await store.begin('key', LONG)
  const token = begun.state === 'claimed' ? begun.token : ''
  await flush()
  await store.checkpoint('key', token, 'a')
  await flush()
  t.equal(await store.extend('key', token, LONG), true)
  await flush()
  await store.release('key', token)
  await flush()
  const again = await store.begin('key', LONG)
  t.match(again, { state: 'claimed', finished: ['a'] })
  await flush()
  await store.complete('key', again.state === 'claimed' ? again.token : '', LONG)
  await flush()
  t.same(await store.begin('key', LONG), { state: 'done' })
})

t.test('redisStore: Redis fails over to a replica', { skip }, async t => {
  const main = await RedisServer.start(t, '--repl-diskless-sync-delay', '0')
  const replica = await replicaOf(t, main)
  const proxy = await TcpProxy.start(t, main.port)
  const client = redisClient(t, proxy.port, IMPATIENT)
  const state = await receiver(t, client, { deadline: LONG })
  const ran: string[] = []
  const { promise, resolve } = deferred()
  state.app.openaiWebhook.on('batch.completed', (_event, { webhookId }) => { ran.push(`${webhookId} first`) }, { name: 'first' })
  state.app.openaiWebhook.on('batch.completed', async (_event, { webhookId }) => {
    ran.push(`${webhookId} second`)
    if (ran.length > 2) return
    await promise
    throw new Error('the second handler failed')
  }, { name: 'second' })
  await listen(state.app)
  const acknowledged = batchFailed()
  t.equal(await answer(state.app, acknowledged), '200')
  const interrupted = sign(thin('batch.completed', { id: 'batch_1' }), { webhookId: 'wh_interrupted' })
  const answered = answer(state.app, interrupted)
  const admin = redisClient(t, main.port)
  await until('the first handler to be on record', async () => await admin.hexists(`openai-webhook:${ENDPOINT} wh_interrupted`, 'f:first') === 1)
  // What WAIT does: a write of its own, so that it waits for all that came before it.
  await admin.set('written', 1)
  t.equal(await admin.wait(1, LONG), 1, 'the replica has it all')

  await main.stop()
  proxy.down()
  const refused = batchFailed()
  t.equal(await answer(state.app, refused), UNAVAILABLE, 'nobody is there')
  await proxy.up(replica.port)
  await until('the client to reach the replica', async () => await client.ping().then(() => true, () => false))
  t.equal(await answer(state.app, redelivered(refused)), UNAVAILABLE, 'a replica takes no writes')
  await redisClient(t, replica.port).replicaof('NO', 'ONE')
  t.equal(await answer(state.app, redelivered(refused)), '200', 'promoted, it does')
  resolve()
  t.equal(await answered, '500 HANDLER_FAILED')
  t.equal(await answer(state.app, redelivered(interrupted)), '200')
  t.same(ran, ['wh_interrupted first', 'wh_interrupted second', 'wh_interrupted second'], 'what was on record has not run again')
  t.equal(await answer(state.app, redelivered(acknowledged)), '200 duplicate')
  t.equal(await answer(state.app, redelivered(refused)), '200 duplicate')
  t.equal(state.runs, 2)
})

t.test('redisStore: round trips and keys', { skip }, async t => {
  const server = await RedisServer.start(t)
  const client = redisClient(t, server.port)
  const prefix = '{webhooks}:'
  const one = await build(t, { idempotency: { store: redisStore(client, { prefix }) } })
  one.openaiWebhook.on('batch.failed', async () => {})
  const three = await build(t, { idempotency: { store: redisStore(client, { prefix }) } })
  for (let i = 0; i < 3; i++) three.openaiWebhook.on('batch.failed', async () => {})
  // Once each, so that Redis knows the scripts.
  await answer(one, batchFailed())
  await answer(three, batchFailed())

  await t.test('a delivery with one handler takes two: begin and complete', async t => {
    const commands = await commandsOf(t, server.port, async () => { t.equal(await answer(one, batchFailed()), '200') })
    t.same(commands.filter(({ inScript }) => !inScript).map(({ name }) => name), ['evalsha', 'evalsha'])
  })

  await t.test('one with three handlers takes two more: a checkpoint for each but the last', async t => {
    const commands = await commandsOf(t, server.port, async () => { t.equal(await answer(three, batchFailed()), '200') })
    t.equal(commands.filter(({ inScript }) => !inScript).length, 4)
  })

  await t.test('a duplicate takes one', async t => {
    const delivery = batchFailed()
    await answer(one, delivery)
    const commands = await commandsOf(t, server.port, async () => { t.equal(await answer(one, redelivered(delivery)), '200 duplicate') })
    t.equal(commands.filter(({ inScript }) => !inScript).length, 1)
  })

  await t.test('every script touches the one key that it is called with, under the prefix', async t => {
    const store = redisStore(client, { prefix })
    const commands = await commandsOf(t, server.port, async () => {
      for (const end of ['complete', 'release'] as const) {
        const key = `${ENDPOINT} wh_${end}`
        const begun = await store.begin(key, LONG)
        const token = begun.state === 'claimed' ? begun.token : ''
        await store.checkpoint(key, token, 'a')
        await store.extend(key, token, LONG)
        await (end === 'complete' ? store.complete(key, token, LONG) : store.release(key, token))
      }
    })
    const called = commands.filter(({ name }) => name === 'evalsha')
    t.equal(called.length, 8)
    t.ok(called.every(({ args: [, keys, key] }) => keys === '1' && key!.startsWith(`${prefix}${ENDPOINT} wh_`)))
    let current = ''
    for (const { name, args, inScript } of commands) {
      if (!inScript) current = args[2]!
      else if (name !== 'time') t.equal(args[0], current, `${name} is given the key of its script`)
    }
    t.same((await client.keys('*')).filter(key => !key.startsWith(prefix)), [])
  })
})
