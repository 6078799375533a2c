import { createHash, randomUUID } from 'node:crypto'
import { assertRules } from '../checks.ts'
import { InvalidOptions } from '../errors.ts'
import { RETENTION } from './store.ts'
import type { Claim, IdempotencyStore } from './store.ts'

/** The part of an ioredis client (`Redis` or `Cluster`) that is used. */
export interface RedisClient {
  evalsha (sha: string, keys: number, ...args: Array<string | number>): Promise<unknown>
  eval (script: string, keys: number, ...args: Array<string | number>): Promise<unknown>
}

// Each delivery is a hash. A processed delivery has the field `done`, with the token that completed it. Any other has `token` and `ends` while it
// is claimed, and one field `f:<handler>` for each finished handler. `ends` is in ms on the server's clock, which all processes share. Each
// script touches only one key, as a cluster requires.

const NOW = `
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
`

// If the hash has the claimant's own token, the connection broke before the answer arrived, and the client has sent the command again.
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

// If Redis is out of memory, it refuses commands that need more of it, except in a script that has already written. The scripts of deliveries
// that are under way write this first, so that they still succeed.
const WRITING = `redis.call('PEXPIRE', KEYS[1], ${RETENTION})\n`

const CHECKPOINT = script(`${HELD}${WRITING}
redis.call('HSET', KEYS[1], 'f:' .. ARGV[2], 1)
return 1
`)

// `done` is the token that completed the delivery, because the client may send the command again, as for BEGIN.
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
 * Remembers deliveries in Redis (5 or later, or a cluster), for any number of processes. `begin` and `complete` take one round trip each. The
 * client belongs to the user and is never closed here. Its retry and timeout settings decide how soon a failure is reported.
 *
 * @param options.prefix text before every key; default `openai-webhook:`
 * @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS
 */
export function redisStore (redis: RedisClient, options: { prefix?: string } = {}): IdempotencyStore {
  assertRules('redisStore', options, { prefix: { expected: 'a string', accepts: value => typeof value === 'string' } })
  const { prefix = 'openai-webhook:' } = options
  if (typeof redis?.evalsha !== 'function' || typeof redis.eval !== 'function') {
    throw new InvalidOptions('redisStore: expected an ioredis client, which has eval() and evalsha()')
  }

  async function run ({ sha, text }: Script, key: string, ...args: Array<string | number>): Promise<unknown> {
    try {
      return await redis.evalsha(sha, 1, prefix + key, ...args)
    } catch (error) {
      // Redis does not know the script, for example after a restart.
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
