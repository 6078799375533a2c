import t from 'tap'
import { RedisServer, redisMissing } from './support/redis.ts'
import { sized } from './support/size.ts'
import { missing } from './support/sqlite.mjs'
import type { HandleName } from './support/sqlite.mjs'
// @ts-expect-error plain JavaScript, which `npm run torture` runs as it is
import { PAIRS, torture } from './support/torture/torture.mjs'

interface Result { kills: number, acknowledged: number, lost: string[], rerun: string[], repeated: number }

/** For each store and runner; `npm run torture` does it hundreds of times each. */
const KILLS = sized(3, 25)

t.test('a receiver killed with SIGKILL at random instants, under load', { timeout: sized(300_000, 1_800_000) }, async t => {
  const seed = Number(process.env['SEED'] ?? Date.now() % 1_000_000)
  t.comment(`SEED=${seed}`)
  const redis = redisMissing === false ? await RedisServer.start(t) : undefined
  const dir = t.testdir()
  for (const { store, runner, handle, needsRedis, losesOnCrash } of PAIRS as Array<{ store: string, runner: string, handle?: HandleName, needsRedis: boolean, losesOnCrash: boolean }>) {
    await t.test(`${store} store, ${runner} runner${handle === undefined ? '' : `, ${handle}`}`, { skip: (needsRedis && redisMissing) || missing[handle ?? 'libsql'] }, async t => {
      const result = await torture({ store, runner, handle, kills: KILLS, seed, dir, redisPort: redis?.port }) as Result
      t.ok(result.acknowledged > KILLS, `${result.acknowledged} deliveries were acknowledged`)
      // What background() promises over a crash is nothing, and that is documented.
      if (!losesOnCrash) t.same(result.lost, [], 'every acknowledged delivery has had its handlers run')
      t.same(result.rerun, [], 'no handler ran again whose success was on record')
    })
  }
})
