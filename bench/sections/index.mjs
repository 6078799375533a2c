import * as coldStart from './cold-start.mjs'
import * as comparison from './comparison.mjs'
import * as growth from './growth.mjs'
import * as handlers from './handlers.mjs'
import * as inspector from './inspector.mjs'
import * as memory from './memory.mjs'
import * as production from './production.mjs'
import * as redis from './redis.mjs'
import * as refusals from './refusals.mjs'
import * as runners from './runners.mjs'
import * as secrets from './secrets.mjs'
import * as steady from './steady.mjs'
import * as tenants from './tenants.mjs'
import * as types from './types.mjs'

/**
 * The sections, in the order of the report. Each has `run(bench, choice)`, which returns plain data; `render(data)`, which returns
 * Markdown; and `targets(data)`, see `renderTargets`.
 */
export const sections = Object.fromEntries([
  comparison, production, inspector, refusals, handlers, secrets, tenants, types, coldStart, memory, runners, steady, growth, redis
].map(section => [section.name, section]))
