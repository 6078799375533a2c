// Shared by several sections: variants of the plugin's settings, each compared with the first.
import { contenders } from './contenders/index.mjs'
import { extent, figures, ratioFigures, table } from './markdown.mjs'
import { compared } from './statistics.mjs'

/** The plugin with options that differ from its defaults. */
export const variant = (options, rest) => ({ ...contenders['ours-sync'], options: { ...contenders['ours-sync'].options, ...options }, ...rest })

export function renderVariants (what, plan, variants) {
  const [first] = Object.values(variants)
  const rows = Object.entries(variants).map(([name, measured]) => [name, ...figures(measured), ...ratioFigures(compared(measured, first))])
  return `${table([what, 'CPU ms per 1,000', 'min–max', 'requests/s', 'p50 ms', 'p99 ms', 'CPU ÷ first', 'middle half'], rows)}\n\n${extent(plan, 'deliveries')}`
}
