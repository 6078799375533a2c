import { ratio, table } from './markdown.mjs'

/** @param {Array<{ what: string, limit: number, measured: number, note?: string, show?: (value: number) => string }>} targets */
export function renderTargets (targets) {
  if (targets.length === 0) return ''
  return table(['Target', 'at most', 'measured', ''], targets.map(({ what, limit, measured, note, show = ratio }) => [
    what, show(limit), `${show(measured)}${note === undefined ? '' : ` (${note})`}`, measured <= limit ? 'met' : '**missed**'
  ]))
}
