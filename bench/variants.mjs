// What several sections share: the plugin in several settings, compared with the first.
import { contenders } from './contenders/index.mjs'
import { extent, figures, ratio, table } from './markdown.mjs'

/** The plugin with what differs from its defaults. */
export const variant = (options, rest) => ({ ...contenders['ours-sync'], options: { ...contenders['ours-sync'].options, ...options }, ...rest })

export function renderVariants (what, plan, variants) {
  const [first] = Object.values(variants)
  const rows = Object.entries(variants).map(([name, measured]) => [name, ...figures(measured), ratio(measured.cpu.median / first.cpu.median)])
  return `${table([what, 'CPU ms per 1,000', 'min–max', 'requests/s', 'p50 ms', 'p99 ms', 'CPU ÷ first'], rows)}\n\n${extent(plan, 'deliveries')}`
}
