import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import t from 'tap'
import { durable, sqliteStore } from '../lib/sqlite/index.ts'
import { redisStore } from '../lib/stores/redis.ts'
import type { IdempotencyStore } from '../lib/index.ts'
import { build } from './support/deliveries.ts'
import type { Signed } from './support/deliveries.ts'
import { IN_PROGRESS, Member, answer, batchFailed, effectsIn, redisClient, until } from './support/faults.ts'
import type { MemberOptions } from './support/faults.ts'
import { deferred, listen, redelivered } from './support/observe.ts'
import { RedisServer, redisMissing } from './support/redis.ts'
import { isLong, sized } from './support/size.ts'
import { HANDLES, missing, openSqlite } from './support/sqlite.mjs'
import type { HandleName } from './support/sqlite.mjs'
import { Wire, request } from './support/wire.ts'

type Teardown = { teardown: (fn: () => unknown) => void }

const ENDPOINT = '/webhooks/openai'
/** ms; does not run out while a test lasts. */
const LONG = 600_000
const IDS = sized(100, 10_000)
/** Deliveries under way at once. */
const LANES = 24

/** Sends every delivery to all of the processes at once, to each again until it is answered 200; counts the answers. */
async function sendAll (t: Teardown, ports: readonly number[], deliveries: readonly Buffer[]): Promise<Array<Record<number, number>>> {
  const answers = ports.map((): Record<number, number> => ({}))
  let next = 0

  async function send (wire: Wire, counts: Record<number, number>, delivery: Buffer): Promise<void> {
    for (;;) {
      await wire.write(delivery)
      const { status } = await wire.answer()
      counts[status] = (counts[status] ?? 0) + 1
      if (status === 200) return
      if (status !== 409 && status !== 503) throw new Error(`answered ${status}`)
      // Long enough for the other process to be done, mostly.
      await sleep(5)
    }
  }

  await Promise.all(Array.from({ length: LANES }, async () => {
    const wires = await Promise.all(ports.map(async port => await Wire.open(t, port)))
    while (next < deliveries.length) {
      const first = next++
      const delivery = deliveries[first]!
      // Each process is the first to be sent to in turn.
      await Promise.all(wires.map(async (_, i) => {
        const which = (first + i) % wires.length
        await send(wires[which]!, answers[which]!, delivery)
      }))
    }
    for (const { socket } of wires) socket.destroy()
  }))
  return answers
}

const bytesOf = ({ headers, body }: Signed): Buffer => request(Object.entries(headers), body)

/** Where it exists, the disk does not decide how long this takes: what is shown is not durability. */
const SHARED_MEMORY = '/dev/shm'

/** One store for several processes. */
interface Shared {
  options: Pick<MemberOptions, 'store' | 'file' | 'handle' | 'redisPort'>
  /** A further client of it, for this process. */
  open: () => IdempotencyStore
}

type Share = (t: Teardown & { testdir: () => string }) => Promise<Shared>

function inFile (handle: HandleName): Share {
  return async t => {
    t.testdir()
    const dir = mkdtempSync(join(existsSync(SHARED_MEMORY) ? SHARED_MEMORY : tmpdir(), 'webhooks-'))
    t.teardown(() => rmSync(dir, { recursive: true }))
    const file = join(dir, 'webhooks.db')
    const open = (): IdempotencyStore => {
      const db = openSqlite(file, handle)
      t.teardown(() => db.close())
      return sqliteStore(db)
    }
    return { options: { store: 'sqlite', file, handle }, open }
  }
}

const inRedis: Share = async t => {
  t.testdir()
  const { port } = await RedisServer.start(t)
  return { options: { store: 'redis', redisPort: port }, open: () => redisStore(redisClient(t, port)) }
}

const stores: Array<[name: string, skip: string | false, share: Share]> = [
  ...HANDLES.map((handle): [string, string | false, Share] => [`sqlite, ${handle},`, missing[handle], inFile(handle)]),
  ...(isLong ? [['redis', redisMissing, inRedis] satisfies [string, string | false, Share]] : [])
]

for (const [name, skip, share] of stores) {
  t.test(`${name} store`, { skip }, async t => {
    for (const processes of isLong ? [2, 4] : [3]) {
      await t.test(`${processes} processes that receive the same ${IDS} deliveries at once run the handler once for each`, { timeout: 120_000 }, async t => {
        const { options } = await share(t)
        const effects = join(t.testdirName, 'effects')
        const members = await Promise.all(Array.from({ length: processes }, async () => await Member.start(t, { ...options, effects })))
        const ids = Array.from({ length: IDS }, (_, i) => `wh_${i}`)
        const deliveries = ids.map(id => bytesOf(batchFailed(id)))

        const answers = await sendAll(t, members.map(({ port }) => port), deliveries)

        t.comment(answers.map(each => JSON.stringify(each)).join(' '))
        t.same(answers.map(each => each[200]), members.map(() => IDS), 'each process answered 200 to all of them')
        const ran = effectsIn(effects)
        t.equal(ran.length, IDS)
        t.equal(new Set(ran.map(({ webhookId }) => webhookId)).size, IDS)
        // Of a few, the fastest may have all.
        if (isLong) t.equal(new Set(ran.map(({ pid }) => pid)).size, processes, 'all had a part in it')
        t.same(members.flatMap(({ told }) => told.filter(message => !message.includes('another process'))), [])
        await Promise.all(members.map(async member => await member.close()))
      })
    }

    for (const fails of [false, true]) {
      await t.test(`a holder whose event loop was blocked for longer than its lease cannot ${fails ? 'release' : 'complete'} any more`, async t => {
        const { options, open } = await share(t)
        const effects = join(t.testdirName, 'effects')
        const blockedUntil = join(t.testdirName, 'go-on')
        const late = await Member.start(t, { ...options, effects, blockedUntil, fails, lease: 300 })
        const app = await build(t, { idempotency: { store: open(), lease: LONG } })
        const [started, finish] = [deferred(), deferred()]
        let runs = 0
        app.openaiWebhook.on('batch.failed', async () => {
          runs++
          started.resolve()
          await finish.promise
        })
        await listen(app)
        const delivery = batchFailed()
        const key = `${ENDPOINT} ${delivery.headers['webhook-id']!}`
        const store = open()

        const wire = await Wire.open(t, late.port)
        await wire.write(bytesOf(delivery))
        await until('the handler to block', () => effectsIn(effects).length === 1)
        let taken: Promise<string> | undefined
        await until('the claim to be taken over', async () => {
          // Refused while the claim holds; the delivery that is given it waits for its handler.
          taken = answer(app, redelivered(delivery))
          const refused = await Promise.race([taken, started.promise])
          if (refused !== undefined) t.equal(refused, IN_PROGRESS)
          return refused === undefined
        })
        writeFileSync(blockedUntil, '')
        t.equal((await wire.answer()).status, fails ? 500 : 200)

        t.same(await store.begin(key, LONG), { state: 'running' }, 'the claim is still the other\'s')
        finish.resolve()
        t.equal(await taken, '200')
        t.same(await store.begin(key, LONG), { state: 'done' })
        t.equal(runs, 1)
        await late.close()
      })
    }
  })
}

for (const handle of HANDLES) {
  t.test(`durable, ${handle}`, { skip: missing[handle] }, async t => {
    await t.test('processes that share a file run each job once', async t => {
      const file = join(t.testdir(), 'webhooks.db')
      const effects = join(t.testdirName, 'effects')
      const members = await Promise.all([0, 1].map(async () => await Member.start(t, { effects, runner: 'durable', file, handle })))
      const ids = Array.from({ length: 300 }, (_, i) => `wh_${i}`)
      const deliveries = ids.map(id => bytesOf(batchFailed(id)))
      const answers = await sendAll(t, members.map(({ port }) => port), deliveries)
      t.same(answers.map(each => each[200]), [ids.length, ids.length])
      await until('all to run', () => effectsIn(effects).length >= ids.length)
      await Promise.all(members.map(async member => await member.close()))
      t.same(effectsIn(effects).map(({ webhookId }) => webhookId).sort(), ids.sort())
    })

    for (const fails of [false, true]) {
      await t.test(`a job whose process was blocked for longer than the lease is taken over; the late one cannot ${fails ? 'postpone' : 'end'} it`, async t => {
        const file = join(t.testdir(), 'webhooks.db')
        const effects = join(t.testdirName, 'effects')
        const blockedUntil = join(t.testdirName, 'go-on')
        const late = await Member.start(t, { effects, runner: 'durable', file, handle, blockedUntil, fails, lease: 300 })
        const db = openSqlite(file, handle)
        t.teardown(() => db.close())
        const row = (): unknown => db.prepare('SELECT state, attempts, due, error FROM openai_webhook_jobs').all()[0]

        const wire = await Wire.open(t, late.port)
        await wire.write(bytesOf(batchFailed()))
        t.equal((await wire.answer()).status, 200)
        await until('the handler to block', () => effectsIn(effects).length === 1)

        const app = await build(t, { runner: durable(db, { lease: LONG }) })
        const [started, finish] = [deferred(), deferred()]
        app.openaiWebhook.on('batch.failed', async () => {
          started.resolve()
          await finish.promise
        })
        await listen(app)
        await started.promise
        const held = row()
        t.match(held, { state: 'pending', attempts: 2, error: null })
        writeFileSync(blockedUntil, '')
        await until('the late one to tell', () => late.told.some(message => message.startsWith('the job was taken over while it ran')))
        await late.close()
        t.same(row(), held, 'as the other holds it')
        finish.resolve()
        await until('the job to be done', () => (row() as { state: string }).state === 'done')
        t.match(row(), { attempts: 2, error: null })
      })
    }
  })
}
