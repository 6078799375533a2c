import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import t from 'tap'
import { memoryStore } from '../../lib/index.ts'
import type { Claim, IdempotencyStore } from '../../lib/index.ts'
import { stoppedClock } from '../support/deliveries.ts'
import { sized } from '../support/size.ts'

type Claimed = Extract<Claim, { state: 'claimed' }>

const LEASE = 30_000
const RETENTION = 270_000_000
const HOUR = 3_600_000

function claim (store: IdempotencyStore, key: string, lease = LEASE): Claimed {
  const claim = store.begin(key, lease) as Claim
  if (claim.state !== 'claimed') throw new Error(`expected the claim on ${key}, got ${claim.state}`)
  return claim
}

function complete (store: IdempotencyStore, key: string, retention = RETENTION): void {
  store.complete(key, claim(store, key).token, retention)
}

function release (store: IdempotencyStore, key: string, finished: string[]): void {
  const { token } = claim(store, key)
  for (const handler of finished) store.checkpoint(key, token, handler)
  store.release(key, token)
}

/** What `begin` says of keys that are settled or running; a claim is given up again. */
function states (store: IdempotencyStore, keys: string[]): string[] {
  return keys.map(key => {
    const claim = store.begin(key, LEASE) as Claim
    if (claim.state === 'claimed') store.release(key, claim.token)
    return claim.state
  })
}

t.test('`max`', async t => {
  for (const max of [0, -1, 1.5, Number.NaN, Number.POSITIVE_INFINITY, 8_000_001, '10', null]) {
    t.throws(() => memoryStore({ max: max as number }), {
      code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS',
      message: `memoryStore: expected max to be a whole number of deliveries, 1 to 8000000, got ${typeof max === 'string' ? `"${max as string}"` : max}`
    })
  }

  t.test('forgets the processed delivery that came first', async t => {
    const store = memoryStore({ max: 3 })
    for (const key of ['a', 'b', 'c', 'd']) complete(store, key)
    t.same(states(store, ['d', 'c', 'b', 'a']), ['done', 'done', 'done', 'claimed'])
  })

  t.test('keeps one that ran for long as long as the others', async t => {
    const store = memoryStore({ max: 2 })
    const { token } = claim(store, 'long')
    complete(store, 'a')
    complete(store, 'b')
    store.complete('long', token, RETENTION)
    t.same(states(store, ['long', 'b']), ['done', 'done'])
    complete(store, 'c')
    t.same(states(store, ['c', 'long', 'b']), ['done', 'done', 'claimed'])
  })

  t.test('keeps one that ran while others ended as long as the others', async t => {
    const max = 1_600
    const store = memoryStore({ max })
    const { token } = claim(store, 'slow')
    for (let n = 1; n < max; n++) complete(store, `before ${n}`)
    store.complete('slow', token, RETENTION)
    for (let n = 0; n < max - max / 16; n++) complete(store, `after ${n}`)
    t.same(store.begin('slow', LEASE), { state: 'done' })
  })

  t.test('keeps one that was attempted again longer than those that came before that', async t => {
    const store = memoryStore({ max: 3 })
    release(store, 'a', ['#0'])
    for (const key of ['b', 'c']) complete(store, key)
    release(store, 'a', ['#1'])
    complete(store, 'd')
    t.same(claim(store, 'a').finished, ['#0', '#1'])
    t.same(states(store, ['c', 'd', 'b']), ['done', 'done', 'claimed'])
  })

  t.test('counts those that were given up, and forgets what finished of them', async t => {
    const store = memoryStore({ max: 2 })
    release(store, 'a', ['#0'])
    release(store, 'b', ['#0', '#1'])
    t.same(claim(store, 'b').finished, ['#0', '#1'])
    complete(store, 'c')
    complete(store, 'd')
    t.same(claim(store, 'a').finished, [])
  })

  t.test('does not count those that are being processed, and never forgets one', async t => {
    const store = memoryStore({ max: 1 })
    const keys = Array.from({ length: 1_000 }, (_, n) => `running ${n}`)
    const claims = keys.map(key => claim(store, key))
    for (let n = 0; n < 100; n++) complete(store, `settled ${n}`)
    t.ok(states(store, keys).every(state => state === 'running'))

    for (const [n, key] of keys.entries()) store.checkpoint(key, claims[n]!.token, '#0')
    store.complete(keys[0]!, claims[0]!.token, RETENTION)
    t.same(store.begin(keys[0]!, LEASE), { state: 'done' })
    store.release(keys[1]!, claims[1]!.token)
    t.same(claim(store, keys[1]!).finished, ['#0'])
  })

  t.test('keeps a claim that was made of a forgotten delivery', async t => {
    const store = memoryStore({ max: 1 })
    release(store, 'a', ['#0'])
    const again = claim(store, 'a')
    complete(store, 'b') // takes the place of what was remembered of a
    t.same(store.begin('a', LEASE), { state: 'running' })
    store.release('a', again.token)
    t.same(claim(store, 'a').finished, ['#0'])
  })

  t.test('forgets in the order in which deliveries were last attempted', async t => {
    const clock = stoppedClock(t, 50) // between two ticks
    const max = 20
    const store = memoryStore({ max })
    let model: Array<{ key: string, done: boolean, until: number }> = [] // the first to be forgotten comes first
    let now = 0
    const keep = (key: string, done: boolean, ms: number): void => {
      model = model.filter(entry => entry.key !== key)
      model.push({ key, done, until: now + ms + 100 }) // to the next tick
      if (model.length > max) model.shift()
    }
    let random = 1
    const counts = { done: 0, finished: 0, forgotten: 0 }
    for (let step = 0; step < 20_000; step++) {
      random = (random * 1_103_515_245 + 12_345) % 2 ** 31
      const key = `key ${(random >> 8) % 40}`
      const seen = model.find(entry => entry.key === key)
      const isFresh = seen !== undefined && seen.until > now
      const answer = store.begin(key, LEASE) as Claim
      if (seen !== undefined) counts[!isFresh ? 'forgotten' : seen.done ? 'done' : 'finished']++
      if (isFresh && seen.done) {
        if (answer.state !== 'done') return t.fail(`step ${step}: ${key} is ${answer.state}, and was processed`)
      } else {
        if (answer.state !== 'claimed') return t.fail(`step ${step}: ${key} is ${answer.state}, and was not processed`)
        if (answer.finished.length !== (isFresh ? 1 : 0)) return t.fail(`step ${step}: ${answer.finished.length} handlers of ${key} had finished`)
        if (step % 5 === 0) {
          if (!isFresh) store.checkpoint(key, answer.token, '#0')
          store.release(key, answer.token)
          keep(key, false, 75 * HOUR)
        } else {
          const retention = step % 7 === 0 ? 30_000 : RETENTION
          store.complete(key, answer.token, retention)
          keep(key, true, retention)
        }
      }
      clock.advance(1_000)
      now += 1_000
    }
    t.ok(Object.values(counts).every(count => count > 100), JSON.stringify(counts))
    t.same(states(store, model.filter(({ until }) => until > now).map(({ key }) => key)), model.filter(({ until }) => until > now).map(({ done }) => done ? 'done' : 'claimed'))
  })

  t.test('is 100,000 by default', async t => {
    const store = memoryStore()
    for (let n = 0; n <= 100_000; n++) complete(store, String(n))
    t.same(store.begin('1', LEASE), { state: 'done' })
    t.match(store.begin('0', LEASE), { state: 'claimed' })
  })
})

t.test('what is kept of a claim is not the caller\'s to change', async t => {
  const store = memoryStore()
  release(store, 'a', ['#0'])
  const again = claim(store, 'a')
  ;(again.finished as string[]).push('#1')
  store.release('a', again.token)
  t.same(claim(store, 'a').finished, ['#0'])
})

t.test('a processed delivery is forgotten within 100 ms of its retention', async t => {
  const clock = stoppedClock(t, 50) // between two ticks
  const store = memoryStore()
  complete(store, 'a', 10_000)
  complete(store, 'b', 20_000)
  clock.advance(10_000)
  t.same(store.begin('a', LEASE), { state: 'done' })
  clock.advance(101)
  t.same(claim(store, 'a').finished, [])
  t.same(store.begin('b', LEASE), { state: 'done' })
  clock.advance(10_000)
  t.match(store.begin('b', LEASE), { state: 'claimed' })
})

t.test('what finished of an unfinished delivery outlives OpenAI\'s 72 hours of retries', async t => {
  const clock = stoppedClock(t)
  const store = memoryStore()
  release(store, 'a', ['#0'])
  release(store, 'b', ['#0'])
  clock.advance(72 * HOUR)
  t.same(claim(store, 'a').finished, ['#0'])
  clock.advance(4 * HOUR)
  t.same(claim(store, 'b').finished, [])
})

t.test('a lease', async t => {
  t.test('runs out, and the next claim finds what finished', async t => {
    const clock = stoppedClock(t)
    const store = memoryStore()
    const late = claim(store, 'a', 3_000)
    store.checkpoint('a', late.token, '#0')
    clock.advance(2_999)
    t.same(store.begin('a', 3_000), { state: 'running' })
    clock.advance(1)
    const holder = claim(store, 'a', 3_000)
    t.same(holder.finished, ['#0'])
    t.not(holder.token, late.token)
  })

  t.test('that ran out fences its holder', async t => {
    const clock = stoppedClock(t)
    const store = memoryStore()
    const late = claim(store, 'a', 3_000)
    clock.advance(3_000)
    const holder = claim(store, 'a', 3_000)
    t.equal(store.extend('a', late.token, 60_000), false)
    store.checkpoint('a', late.token, '#0')
    store.release('a', late.token)
    store.complete('a', late.token, RETENTION)
    t.same(store.begin('a', 3_000), { state: 'running' })
    clock.advance(3_000) // and not the 60,000 ms of the late holder
    t.same(claim(store, 'a', 3_000).finished, [])
    t.equal(store.extend('a', holder.token, 3_000), false)
  })

  t.test('that ran out unnoticed is still its holder\'s', async t => {
    const clock = stoppedClock(t)
    const store = memoryStore()
    const { token } = claim(store, 'a', 3_000)
    clock.advance(60_000)
    t.equal(store.extend('a', token, 3_000), true)
    t.same(store.begin('a', 3_000), { state: 'running' })
    store.complete('a', token, RETENTION)
    t.same(store.begin('a', 3_000), { state: 'done' })
  })

  t.test('is renewed from the time it is extended', async t => {
    const clock = stoppedClock(t)
    const store = memoryStore()
    const { token } = claim(store, 'a', 3_000)
    clock.advance(2_000)
    t.equal(store.extend('a', token, 3_000), true)
    clock.advance(2_999)
    t.same(store.begin('a', 3_000), { state: 'running' })
    clock.advance(1)
    t.match(store.begin('a', 3_000), { state: 'claimed' })
  })
})

t.test('a wall clock that is set forward or back changes nothing', async t => {
  const store = memoryStore()
  const { now } = Date
  t.teardown(() => { Date.now = now })
  claim(store, 'running')
  complete(store, 'done')
  for (const jump of [100 * HOUR, -100 * HOUR]) {
    Date.now = () => now() + jump
    t.same(store.begin('running', LEASE), { state: 'running' })
    t.same(store.begin('done', LEASE), { state: 'done' })
  }
})

/** Deliveries; as many as `max` is by default, in test:long. */
const REMEMBERED = sized(20_000, 100_000)

setFlagsFromString('--expose-gc')
const gc = runInNewContext('gc') as () => void

/** What stays: newer collectors leave some of what is dead to the next collection. */
function heap (): number {
  for (let before = Infinity; ;) {
    gc()
    const { heapUsed, arrayBuffers } = process.memoryUsage()
    const now = (heapUsed + arrayBuffers) / 1e6
    if (now > before - 0.1) return now
    before = now
  }
}

t.test('one that is attempted without end takes no more memory, and makes no other one forgotten', async t => {
  const max = 1_000
  const store = memoryStore({ max })
  for (let n = 0; n <= max; n++) complete(store, String(n))
  release(store, 'again', ['#0'])
  const before = heap()
  for (let n = 0; n < 200_000; n++) release(store, 'again', [])
  t.ok(heap() - before < 3)
  t.same(claim(store, 'again').finished, ['#0'])
  t.same(states(store, [String(max), String(max - 100), '1']), ['done', 'done', 'claimed'])
})

t.test('a remembered delivery takes less than 400 bytes', async t => {
  /** As the endpoint and a header make it: one flat string of its own. */
  const keyOf = (n: number): string => Buffer.from(`/webhooks/openai wh_${n.toString(16).padStart(32, '0')}`).toString('latin1')
  const empty = heap()
  let store: IdempotencyStore | undefined

  for (const [kind, settle] of Object.entries({
    processed: (store: IdempotencyStore, key: string) => complete(store, key),
    'given up': (store: IdempotencyStore, key: string) => release(store, key, ['#0', '#1'])
  })) {
    store = undefined
    t.ok(heap() - empty < 5, 'nothing outlives its store')
    store = memoryStore({ max: REMEMBERED })
    for (let n = 0; n < REMEMBERED; n++) settle(store, keyOf(n))
    const full = heap()
    t.comment(`${kind}: ${(full - empty).toFixed(1)} MB`)
    t.ok(full - empty < REMEMBERED * 400 / 1e6, kind)

    for (let n = REMEMBERED; n < 3 * REMEMBERED; n++) settle(store, keyOf(n))
    t.ok(heap() - full < 5, `${kind}: no more, however many come`)
    t.match(store.begin(keyOf(0), LEASE), { state: 'claimed' })
  }
})
