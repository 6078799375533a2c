// The pairs of a runner and a store that several sections run.
import { variant } from './variants.mjs'

/** A runner, a store, and the deliveries in one round at full load. */
const PAIRS = [
  ['inline', 'memory', 8_000],
  ['inline', 'sqlite', 4_000],
  ['inline', 'redis', 4_000],
  ['inline', 'postgres', 2_000],
  ['background', 'memory', 8_000],
  ['background', 'sqlite', 4_000],
  ['background', 'redis', 4_000],
  ['durable', 'memory', 4_000],
  ['durable', 'sqlite', 4_000],
  ['bullmq', 'memory', 2_000],
  ['bullmq', 'redis', 2_000],
  ['pgboss', 'memory', 2_000]
].map(([runner, store, count]) => ({ runner, store, count }))

export const contenderOf = ({ runner, store }, options) => variant({ runner, store, handler: 'async', ...options })

export const labelOf = ({ runner, store }) => `\`${runner}()\`, ${store}`

const needs = ({ runner, store }) => runner === 'bullmq' || store === 'redis' ? 'redis' : runner === 'pgboss' || store === 'postgres' ? 'postgres' : undefined

/** @returns the pairs whose server is available, and a line for each other pair that says why it is left out */
export function pairsThere (bench, pairs = PAIRS) {
  const isThere = pair => bench.has({ needs: needs(pair) })
  return {
    pairs: pairs.filter(isThere),
    leftOut: pairs.filter(pair => !isThere(pair)).map(pair => `${labelOf(pair)}: ${bench.missing[needs(pair)]}`)
  }
}

export const withLeftOut = (text, leftOut) => leftOut.length === 0 ? text : `${text}\n\nLeft out: ${leftOut.join('; ')}.`
