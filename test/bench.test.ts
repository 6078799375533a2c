import { readFileSync } from 'node:fs'
import t from 'tap'
import { tableRows } from './support/docs.ts'

interface Spread { rounds: number[], median: number, min: number, max: number }

const load = async (file: string): Promise<any> => await import(new URL(`../bench/${file}`, import.meta.url).href)

const { renderReport, renderTargets, targetsOf } = await load('report.mjs')
const { compared, quantile } = await load('statistics.mjs') as { compared: (measured: object, other: object) => object, quantile: (values: number[], share: number) => number }

// Measurements that no machine has made: `cpu` µs, and 10 % less and more.
const spread = (cpu: number): Spread => ({ rounds: [cpu * 0.9, cpu, cpu * 1.1], median: cpu, min: cpu * 0.9, max: cpu * 1.1 })
const measured = (cpu: number): object => ({ cpu: spread(cpu), rate: 1_000_000 / cpu, p50: cpu / 50, p99: cpu / 10, worst: cpu })
const each = (figures: Record<string, number>): Record<string, object> => Object.fromEntries(Object.entries(figures).map(([name, cpu]) => [name, measured(cpu)]))
const half = (median: number): object => ({ median, low: median, high: median })
const plan = { rounds: 2, generations: 3, count: 8_000 }

const small = { bare: 10, hmac: 20, 'ours-sync': 21.4, ours: 22, octokit: 30, standardwebhooks: 40, 'raw-body-openai': 80, 'hono-openai': 60, 'express-openai': 160 }
const refused = {
  bare: 10,
  constant: 7,
  'ours-sync unsigned': 7,
  'ours-sync stale': 8,
  'ours-sync forged': 12,
  'standardwebhooks unsigned': 20,
  'standardwebhooks stale': 21,
  'standardwebhooks forged': 100
}

const results = {
  comparison: {
    results: [
      { size: 200, label: '200 B', what: 'a thin event', plan, contenders: each(small) },
      { size: 2_048, label: '2 KB', what: 'a call', plan, contenders: each({ ...small, 'ours-sync': 40 }) },
      { size: 65_536, label: '64 KB', what: 'the largest', plan, contenders: each(small) }
    ],
    leftOut: ['ours with Redis: there is no redis-server'],
    labels: Object.fromEntries(Object.keys(small).map(name => [name, `<${name}> & co`]))
  },
  refusals: [
    { label: '200 B', plan, contenders: each(refused) },
    { label: '64 KB', plan, contenders: each(refused) }
  ],
  production: { plan, variants: each({ 'inline HMAC': 20, 'raw-body + openai': 60, 'the plugin': 22, 'the plugin, metrics': 24 }) },
  handlers: { plan, variants: each({ '1 for 1 type': 20, '200 for 40 types': 20.4 }) },
  secrets: { plan, variants: each({ 1: 20, 5: 30 }) },
  tenants: { plan, variants: each({ 1: 20, '10,000': 20.2 }) },
  inspector: { plan, variants: each({ 'the plugin': 20, 'with the inspector': 22 }) },
  types: { plan, size: 512, variants: each({ 1: 20, 40: 21 }) },
  'cold-start': {
    starts: 3,
    contenders: {
      bare: { againstBare: half(1), wallAgainstBare: half(1), bootCpu: 100, bootWall: 120, processCpu: 130, processWall: 150, deliveryWall: 5 },
      'ours-sync': { againstBare: half(1.31), wallAgainstBare: half(1.25), bootCpu: 130, bootWall: 150, processCpu: 160, processWall: 180, deliveryWall: 6 }
    }
  },
  memory: {
    count: 100_000,
    remembered: { before: { live: 10e6, rss: 50e6 }, after: { live: 36.5e6, rss: 90e6 } },
    forgotten: { before: { live: 9e6, rss: 50e6 }, after: { live: 12e6, rss: 80e6 } }
  },
  runners: { rounds: 2, count: 100, results: [{ runner: 'inline', store: 'memory', ...measured(20) }, { runner: 'inline', store: 'sqlite', ...measured(25) }, { runner: 'bullmq', store: 'memory', ...measured(50) }], leftOut: ['`pgboss()`, memory: there is no PostgreSQL'] },
  steady: { rounds: 2, count: 100, results: [{ runner: 'inline', store: 'memory', ...measured(20), cpu: 20 }, { runner: 'inline', store: 'sqlite', ...measured(251), cpu: 40 }], leftOut: [] },
  growth: {
    connections: [{ runner: 'inline', store: 'memory', rates: [1, 10, 50, 200, 1_000] }],
    remembered: [{ runner: 'inline', store: 'sqlite', figures: [{ cpu: 20, rate: 1_500 }, { cpu: 21, rate: 1_000 }] }],
    leftOut: []
  },
  redis: { count: 1_000, commands: { evalsha: 2_000 } }
}

const machine = {
  date: '2026-01-02',
  commit: 'abc1234',
  cpu: 'Model <9>',
  cores: 2,
  memory: 8 * 2 ** 30,
  load: 0.25,
  os: 'Linux 6.1 x64',
  node: 'v20.20.2',
  openssl: '3.0.0',
  redis: undefined,
  packages: { fastify: '5.12.0', hono: '4.13.19' }
}

t.test('targets are told as met or missed', async t => {
  const rows = tableRows({ path: '', text: renderTargets(targetsOf(results)) })
  const verdict = (what: RegExp): unknown => rows.find(([target]) => what.test(target!))?.slice(1)
  t.same(verdict(/<hmac> & co, 200 B/), ['at most 1.10', '1.10', '1.10–1.10', 'met'])
  t.same(verdict(/above .* <express-openai> & co, 200 B/), ['at most 0.08', '0.08', '0.08–0.08', 'met'])
  t.same(verdict(/above .* <standardwebhooks> & co, 2 KB/), ['at most 0.60', '1.00', '1.00–1.00', '**missed**'])
  t.same(verdict(/header missing.*constant.*64 KB/), ['at most 1.05', '1.00', '1.00–1.00', 'met'])
  t.same(verdict(/an hour old.*constant.*64 KB/), ['at most 1.05', '1.14', '1.14–1.14', '**missed**'])
  t.same(verdict(/with a logger ÷/), ['at most 1.12', '1.10', '1.10–1.10', 'met'])
  t.same(verdict(/logger and metrics ÷/), ['at most 1.18', '1.20', '1.20–1.20', '**missed**'])
  t.same(verdict(/handled a second: `inline\(\)`, sqlite/), ['at least 0.50', '0.80', '', 'met'])
  t.same(verdict(/handled a second: `bullmq\(\)`, memory/), ['at least 0.45', '0.40', '', '**missed**'])
  t.same(verdict(/CPU a delivery: `inline\(\)`, sqlite/), ['at most 2.50', '1.25', '', 'met'])
  t.same(verdict(/p99.*`inline\(\)`, memory/), ['at most 25.0', '2.0', '', 'met'])
  t.same(verdict(/p99.*`inline\(\)`, sqlite/), ['at most 25.0', '25.1', '', '**missed**'])
  t.same(verdict(/10,000,000 ids.*sqlite/), ['at most 1.33', '1.50', '', '**missed**'])
  t.same(verdict(/200 handlers/), ['at most 1.020', '1.020', '1.02–1.02', 'met'])
  t.same(verdict(/import to ready/), ['at most 1.30', '1.31 (1.25 by wall clock)', '1.31–1.31', '**missed**'])
  t.same(verdict(/100,000 ids/), ['at most 25.0', '24.5', '', 'met'])
  t.same(verdict(/round trips/), ['at most 2.00', '2.00', '', 'met'])
  t.equal(rows.filter(([, , , , outcome]) => outcome === 'met' || outcome === '**missed**').length, rows.length - 2, 'all but the header')

  const without = tableRows({ path: '', text: renderTargets(targetsOf({ redis: { leftOut: 'there is no redis-server' } })) })
  t.same(without.at(-1)!.slice(1), ['at most 2.00', 'not measured (there is no redis-server)', '', ''])
})

t.test('contenders are compared round by round, so that what slows a machine for a while does not count', async t => {
  const slowing = { cpu: { rounds: [10, 20, 40, 80] } }
  t.same(compared({ cpu: { rounds: [15, 30, 60, 160] } }, slowing), { median: 1.5, low: 1.5, high: 1.625 })
  t.same([0, 0.25, 0.5, 0.9, 1].map(share => quantile([40, 10, 30, 20], share)), [10, 17.5, 25, 37, 40])
})

t.test('docs/performance.md is made of a template and of measurements alone', async t => {
  const template = readFileSync(new URL('../bench/performance.template.md', import.meta.url), 'utf8')
  const text = renderReport(template, machine, results) as string
  t.notMatch(text, /\{\{|undefined|NaN/)

  const rows = tableRows({ path: '', text })
  const row = (first: RegExp): string[] | undefined => rows.find(cells => first.test(cells[0]!))
  t.same(row(/^<hmac>/), ['<hmac> & co', '20.0', '18.0–22.0', '50,000', '0.40', '2.00', '1.00', '1.00–1.00', '2.00', '2.00–2.00'])
  t.same(row(/^\*\*<ours-sync>/), ['**<ours-sync> & co**', '21.4', '19.3–23.5', '46,729', '0.43', '2.14', '1.07', '1.07–1.07', '2.14', '2.14–2.14'])
  t.same(row(/^Machine/), ['Machine', 'Model <9>, 2 cores, 8 GiB, Linux 6.1 x64; load average before the run 0.25'])
  t.same(row(/^Measured/), ['Measured', '2026-01-02, commit abc1234'])
  t.same(row(/^Redis$/), ['Redis', 'not installed'])
  t.same(row(/^`EVALSHA`/), ['`EVALSHA`', '2,000', '2.00'])
  t.match(text, '6 rounds of 8,000 deliveries each, by 3 processes of each contender.')
  t.match(text, 'Left out: ours with Redis: there is no redis-server.')
  t.match(text, 'To remember 100,000 ids takes 24.5 MB.')
  t.match(text, /^fastify-openai-webhook, async handler +█{4} 12$/m)
  t.match(text, /^Express \+ openai +█{50} 150$/m)
  t.match(text, '40,000 with `inline()`, sqlite (0.80) handled a second, of 50,000 in memory.')
  t.match(text, 'answered within 25 ms with the slowest pair, `inline()`, sqlite.')

  const { redis, ...withoutOne } = results
  t.throws(() => renderReport(template, machine, withoutOne), { message: 'there is nothing for {{redis}}' })
  t.throws(() => renderReport(template.replace('{{redis}}', ''), machine, results), { message: 'the template has no place for redis' })
})
