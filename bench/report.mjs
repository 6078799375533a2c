// Turns measurements into docs/performance.md. Nothing is measured here.
import { decimals, table } from './markdown.mjs'
import { sections } from './sections/index.mjs'
import { renderSummary } from './summary.mjs'

/**
 * @param {string} template Markdown with `{{summary}}`, `{{machine}}`, `{{targets}}`, and `{{…}}` for each section
 * @param {object} machine see `describeMachine`
 * @param {Record<string, unknown>} results what the `run` of each section returned
 */
export function renderReport (template, machine, results) {
  const parts = { summary: renderSummary(results), machine: renderMachine(machine), targets: renderTargets(targetsOf(results)) }
  for (const [name, data] of Object.entries(results)) parts[name] = sections[name].render(data)
  const used = new Set()
  const text = template.replaceAll(/\{\{([\w-]+)\}\}/g, (_, name) => {
    if (!Object.hasOwn(parts, name)) throw new Error(`there is nothing for {{${name}}}`)
    used.add(name)
    return parts[name]
  })
  const unused = Object.keys(parts).filter(name => !used.has(name))
  if (unused.length > 0) throw new Error(`the template has no place for ${unused.join(', ')}`)
  return text
}

export const targetsOf = results => Object.entries(results).flatMap(([name, data]) => sections[name].targets(data))

/** @param {Array<{ what: string, limit?: number, least?: number, measured?: number, half?: string, note?: string, digits?: number }>} targets */
export function renderTargets (targets) {
  return table(['Target', 'wanted', 'measured', 'middle half', ''], targets.map(({ what, limit, least, measured, half = '', note, digits = 2 }) => {
    const wanted = least === undefined ? `at most ${decimals(limit, digits)}` : `at least ${decimals(least, digits)}`
    const notes = note === undefined ? '' : ` (${note})`
    if (measured === undefined) return [what, wanted, `not measured${notes}`, half, '']
    const met = least === undefined ? measured <= limit : measured >= least
    return [what, wanted, `${decimals(measured, digits)}${notes}`, half, met ? 'met' : '**missed**']
  }))
}

function renderMachine ({ date, commit, cpu, cores, memory, load, os, node, openssl, redis, packages }) {
  const rows = [
    ['Measured', `${date}, commit ${commit}`],
    ['Machine', `${cpu}, ${cores} cores, ${decimals(memory / 2 ** 30, 0)} GiB, ${os}; load average before the run ${decimals(load, 2)}`],
    ['Node', `${node}, OpenSSL ${openssl}`],
    ['Packages', Object.entries(packages).map(([name, version]) => `${name} ${version}`).join(', ')],
    ['Redis', redis ?? 'not installed']
  ]
  return table(['', ''], rows, 2)
}
