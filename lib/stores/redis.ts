import { createHash, randomUUID } from 'node:crypto'
import { assertNames } from '../checks.ts'
import { InvalidOptions } from '../errors.ts'
import { RETENTION } from './store.ts'
import type { Claim, IdempotencyStore } from './store.ts'

/** What is used of an ioredis client (`Redis` or `Cluster`). */
export interface RedisClient {
  evalsha (sha: string, keys: number, ...args: Array<string | number>): Promise<unknown>
  eval (script: string, keys: number, ...args: Array<string | number>): Promise<unknown>
}

// A hash a delivery: `done`, the token that completed it; or `token` and `ends` (ms, by the server's clock, which all processes share), and one field
// `f:<handler>` for each that finished. Each script touches one key, as a cluster asks.

const NOW = `
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
`

// The claimant's own token: the connection broke before the answer came, and the client has asked again.
const BEGIN = script(`${NOW}
local known = redis.call('HMGET', KEYS[1], 'done', 'token', 'ends')
if known[1] then return {'done'} end
if known[2] and known[2] ~= ARGV[1] and tonumber(known[3]) > now then return {'running'} end
redis.call('HSET', KEYS[1], 'token', ARGV[1], 'ends', now + ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
local answer = {'claimed'}
for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
  if string.sub(field, 1, 2) == 'f:' then answer[#answer + 1] = string.sub(field, 3) end
end
return answer
`)

const HELD = 'if redis.call(\'HGET\', KEYS[1], \'token\') ~= ARGV[1] then return 0 end\n'

// A Redis that is out of memory refuses what takes more of it, but not to a script that has already written: what is
// under way is still recorded there.
const WRITING = `redis.call('PEXPIRE', KEYS[1], ${RETENTION})\n`

const CHECKPOINT = script(`${HELD}${WRITING}
redis.call('HSET', KEYS[1], 'f:' .. ARGV[2], 1)
return 1
`)

// `done` is the token of whoever completed it: that one may ask again, as for BEGIN.
const COMPLETE = script(`
if redis.call('HGET', KEYS[1], 'done') == ARGV[1] then return 1 end
${HELD}
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'done', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
`)

const EXTEND = script(`${HELD}${NOW}${WRITING}
redis.call('HSET', KEYS[1], 'ends', now + ARGV[2])
return 1
`)

const RELEASE = script(`${HELD}
redis.call('HDEL', KEYS[1], 'token', 'ends')
if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 1
`)

interface Script {
  text: string
  sha: string
}

function script (text: string): Script {
  return { text, sha: createHash('sha1').update(text).digest('hex') }
}

/**
 * Remembers deliveries in Redis (5 or later, or a cluster), for any number of processes. One round trip each for `begin`
 * and `complete`. The client is the user's: its retry and timeout settings decide how soon trouble is told, and it is
 * never closed here.
 *
 * @param options.prefix put before every key; default `openai-webhook:`
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS
 */
export function redisStore (redis: RedisClient, options: { prefix?: string } = {}): IdempotencyStore {
  assertNames('redisStore', options, ['prefix'])
  const { prefix = 'openai-webhook:' } = options
  if (typeof redis?.evalsha !== 'function' || typeof redis.eval !== 'function') {
    throw new InvalidOptions('redisStore: expected an ioredis client, which has eval() and evalsha()')
  }
  if (typeof prefix !== 'string') throw new InvalidOptions(`redisStore: expected prefix to be a string, got ${typeof prefix}`)

  async function run ({ sha, text }: Script, key: string, ...args: Array<string | number>): Promise<unknown> {
    try {
      return await redis.evalsha(sha, 1, prefix + key, ...args)
    } catch (error) {
      // Redis has not seen the script since it started.
      if (!String((error as Error | null)?.message).startsWith('NOSCRIPT')) throw error
      return await redis.eval(text, 1, prefix + key, ...args)
    }
  }

  return {
    async begin (key, lease): Promise<Claim> {
      const token = randomUUID()
      const [state, ...finished] = await run(BEGIN, key, token, lease, RETENTION) as [Claim['state'], ...string[]]
      return state === 'claimed' ? { state, token, finished } : { state }
    },
    async checkpoint (key, token, handler) {
      await run(CHECKPOINT, key, token, handler)
    },
    async complete (key, token, retention) {
      return await run(COMPLETE, key, token, retention) === 1
    },
    async extend (key, token, lease) {
      return await run(EXTEND, key, token, lease) === 1
    },
    async release (key, token) {
      await run(RELEASE, key, token, RETENTION)
    }
  }
}
