// The first screen of docs/performance.md: one chart, and the figures that readers need most.
import { contenders } from './contenders/index.mjs'
import { decimals, ratio, whole } from './markdown.mjs'
import { labelOf } from './pairs.mjs'
import { above, compared, median } from './statistics.mjs'

/** The length of the longest bar in characters. */
const WIDTH = 50

const DRAWN = ['ours', 'hmac', 'standardwebhooks', 'octokit', 'raw-body-openai', 'hono-openai', 'express-openai']

/** @param {Record<string, any>} results what the `run` of each section returned */
export function renderSummary (results) {
  return `${picture(results)}\n\n${lines(results).map(line => `- ${line}`).join('\n')}`
}

const thinEvent = ({ comparison }) => comparison.results.find(({ label }) => label === '200 B').contenders

function picture (results) {
  const measured = thinEvent(results)
  const bars = DRAWN.filter(name => measured[name] !== undefined).map(name => ({ label: contenders[name].label, us: above(measured.bare, measured[name]) }))
  const longest = Math.max(...bars.map(({ us }) => us))
  const margin = Math.max(...bars.map(({ label }) => label.length))
  const drawn = bars.map(({ label, us }) => `${label.padEnd(margin)}  ${'█'.repeat(Math.max(1, Math.round(us / longest * WIDTH)))} ${decimals(us, 0)}`)
  return `CPU in µs per delivery of 200 B, above the ${decimals(median(measured.bare.cpu.rounds), 0)} that Node and Fastify take to receive and answer it:\n\n\`\`\`text\n${drawn.join('\n')}\n\`\`\``
}

function lines (results) {
  const { production, runners, steady, refusals, memory } = results
  const { hmac, ours } = thinEvent(results)
  const [own, , logged, metered] = Object.values(production.variants)
  const first = runners.results.find(({ runner, store }) => runner === 'inline' && store === 'memory')
  const rate = (runner, store) => {
    const found = runners.results.find(result => result.runner === runner && result.store === store)
    return found === undefined ? [] : [`${whole(found.rate)} with ${labelOf(found)} (${ratio(found.rate / first.rate)})`]
  }
  const small = refusals[0].contenders
  const slowest = steady.results.toSorted((a, b) => b.p99 - a.p99)[0]
  return [
    `**A delivery** takes ${ratio(compared(ours, hmac).median)} times the CPU of a handler that checks the signature with \`node:crypto\` and does nothing else. With a logger it takes ${ratio(compared(logged, own).median)} times, and with a logger and metrics ${ratio(compared(metered, own).median)} times, the CPU of that handler with a logger.`,
    `**Durable**, with every commit on disk before the answer: ${[...rate('inline', 'sqlite'), ...rate('durable', 'sqlite'), ...rate('inline', 'postgres')].join(', ')} handled a second, of ${whole(first.rate)} in memory.`,
    `**Queues**: ${[...rate('durable', 'memory'), ...rate('bullmq', 'memory'), ...rate('pgboss', 'memory')].join(', ')}, with the worker, the server and the sender on the same cores.`,
    `**At 1,000 deliveries a second**, 99 of 100 are answered within ${decimals(slowest.p99, 0)} ms with the slowest pair, ${labelOf(slowest)}.`,
    `**A flood** of unsigned requests takes ${ratio(compared(small['ours-sync unsigned'], small.constant).median)} times the CPU of a route that answers 401 with a constant. Remembering 100,000 ids takes ${decimals((memory.remembered.after.live - memory.forgotten.after.live) / 1e6, 0)} MB.`
  ]
}
