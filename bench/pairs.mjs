// The pairs of a runner and a store that several sections run.
import { variant } from './variants.mjs'

/** A runner and a store. */
const PAIRS = [
  ['inline', 'memory'],
  ['inline', 'sqlite'],
  ['inline', 'redis'],
  ['inline', 'postgres'],
  ['background', 'memory'],
  ['background', 'sqlite'],
  ['background', 'redis'],
  ['durable', 'memory'],
  ['durable', 'sqlite'],
  ['bullmq', 'memory'],
  ['bullmq', 'redis'],
  ['pgboss', 'memory']
].map(([runner, store]) => ({ runner, store }))

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
