import t from 'tap'
import { PostgresServer, postgresMissing } from './support/postgres.ts'
import { RedisServer, redisMissing } from './support/redis.ts'
import { isLong, sized } from './support/size.ts'
import { missing } from './support/sqlite.mjs'
import type { HandleName } from './support/sqlite.mjs'
// @ts-expect-error plain JavaScript, which `npm run torture` runs as it is
import { EXACT, PAIRS, torture } from './support/torture/torture.mjs'

interface Pair { store: string, runner: string, inbox: string, zombies: boolean, small: boolean, needsPostgres: boolean, needsRedis: boolean }
interface Result { kills: number, acknowledged: number, lost: string[], rerun: string[], repeated: number }

/** For each store and runner; `npm run torture` does it hundreds of times each. */
const KILLS = sized(2, 25)

t.test('a receiver killed with SIGKILL at random instants, under load', { timeout: sized(300_000, 1_800_000) }, async t => {
  const seed = Number(process.env['SEED'] ?? Date.now() % 1_000_000)
  t.comment(`SEED=${seed}`)
  const redis = redisMissing === false ? await RedisServer.start(t) : undefined
  const dir = t.testdir()
  for (const { store, runner, handle, needsRedis, losesOnCrash, small = false } of PAIRS as Array<{ store: string, runner: string, handle?: HandleName, needsRedis: boolean, losesOnCrash: boolean, small?: boolean }>) {
    if (!small && !isLong) continue
    await t.test(`${store} store, ${runner} runner${handle === undefined ? '' : `, ${handle}`}`, { skip: (needsRedis && redisMissing) || missing[handle ?? 'libsql'] }, async t => {
      const result = await torture({ store, runner, handle, kills: KILLS, seed, dir, redisPort: redis?.port }) as Result
      t.ok(result.acknowledged > KILLS, `${result.acknowledged} deliveries were acknowledged`)
      // What background() promises over a crash is nothing, and that is documented.
      if (!losesOnCrash) t.same(result.lost, [], 'every acknowledged delivery has had its handlers run')
      t.same(result.rerun, [], 'no handler ran again whose success was on record')
    })
  }
})

t.test('with an inbox every effect is there exactly once, whoever is killed: the receiver, PostgreSQL', { timeout: sized(300_000, 1_800_000) }, async t => {
  const seed = Number(process.env['SEED'] ?? Date.now() % 1_000_000)
  t.comment(`SEED=${seed}`)
  const redis = redisMissing === false ? await RedisServer.start(t) : undefined
  const server = postgresMissing === false ? await PostgresServer.start(t, '-c', 'fsync=on') : undefined
  const dir = t.testdir()
  for (const { needsRedis, needsPostgres, small, ...pair } of EXACT as Pair[]) {
    if (!small && !isLong) continue
    const { store, runner, inbox, zombies } = pair
    const kills = zombies ? 10 : sized(2, 30)
    const skip = (needsPostgres && postgresMissing) || (needsRedis && redisMissing)
    await t.test(`${inbox} inbox, ${store} store, ${runner} runner${zombies ? ', a receiver that is stopped beyond its lease' : ''}`, { skip }, async t => {
      const postgres = needsPostgres ? { url: server!.url, crash: async () => await server!.restart() } : undefined
      const { acknowledged, lost, repeated } = await torture({ ...pair, kills, seed, dir, redisPort: redis?.port, postgres }) as Result
      t.ok(acknowledged > kills, `${acknowledged} deliveries were acknowledged`)
      t.same(lost, [], 'every effect has been made')
      t.equal(repeated, 0, 'and none twice')
    })
  }
})
