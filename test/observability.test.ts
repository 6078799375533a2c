import { readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import Fastify from 'fastify'
import type { FastifyInstance } from 'fastify'
import { Registry } from 'prom-client'
import t from 'tap'
import * as errors from '../lib/errors.ts'
import openaiWebhook, { channels } from '../lib/index.ts'
import { webhookMetrics } from '../lib/metrics.ts'
import { SECRET, post, sign, thin } from './support/deliveries.ts'
import { readDocument, tableRows, ROOT } from './support/docs.ts'
import { redelivered } from './support/observe.ts'
import { prometheusMissing, promtool, startPrometheus } from './support/prometheus.ts'
import { isLong } from './support/size.ts'

type Teardown = { teardown: (fn: () => unknown) => void }

const EXAMPLES = join(ROOT, 'docs/examples/observability')
const example = (name: string): string => readFileSync(join(EXAMPLES, name), 'utf8')

interface Panel {
  id: number
  type: string
  title: string
  description?: string
  gridPos: { x: number, y: number, w: number, h: number }
  datasource?: { type: string, uid: string }
  targets?: Array<{ refId: string, expr: string, legendFormat: string, datasource: { type: string, uid: string } }>
}

interface Dashboard {
  uid: string
  title: string
  schemaVersion: number
  templating: { list: Array<{ name: string, type: string, query: unknown }> }
  panels: Panel[]
}

const dashboard = JSON.parse(example('dashboard.json')) as Dashboard
const panels = dashboard.panels.filter(({ type }) => type !== 'row')
/** As Grafana would send them. */
const queries = panels.flatMap(({ title, targets = [] }) => targets.map(({ expr, legendFormat }) => ({
  title, legendFormat, expr: expr.replaceAll('$__rate_interval', '1m').replaceAll('$job', 'webhooks')
})))
const alerts = [...example('alerts.yml').matchAll(/^ +- alert: (\w+)$/gm)].map(([, name]) => name!)

/** The metrics as the registry has them. */
interface Registered {
  name: string
  type: string
  labelNames: string[]
}

function registered (t: Teardown): Registered[] {
  const register = new Registry()
  const metrics = webhookMetrics({ register })
  t.teardown(() => metrics.close())
  return register.getMetricsAsArray() as unknown as Registered[]
}

/** An app, and deliveries to it of which every query has something to tell. */
async function busyApp (t: Teardown): Promise<{ app: FastifyInstance, register: Registry, deliver: () => Promise<void> }> {
  const register = new Registry()
  const metrics = webhookMetrics({ register })
  const app = Fastify() as unknown as FastifyInstance
  t.teardown(async () => {
    metrics.close()
    await app.close()
  })
  const old = `whsec_${Buffer.alloc(32, 'old').toString('base64')}`
  let sent = 0
  await app.register(openaiWebhook, { secret: [SECRET, old] })
  await app.register(metrics)
  app.openaiWebhook
    .on('batch.completed', () => {})
    .on('batch.failed', () => { throw new Error('the handler failed') }, { name: 'alert-team' })
  return {
    app,
    register,
    async deliver () {
      const first = sign(thin('batch.completed'), { webhookId: `wh_${sent++}` })
      await post(app, first)
      await post(app, redelivered(first))
      await post(app, sign(thin('batch.failed'), { secret: old }))
      await post(app, sign(thin('made.up')))
      await post(app, { ...first, headers: { ...first.headers, 'webhook-signature': 'v1,Zm9yZ2Vk' } })
    }
  }
}

t.test('the metrics are what Prometheus would have them be', { skip: prometheusMissing }, async t => {
  const { register, deliver } = await busyApp(t)
  await deliver()
  t.equal(await promtool(['check', 'metrics'], await register.metrics()), '', 'no fault of form, no advice on names')
  await t.rejects(promtool(['check', 'metrics'], '# TYPE webhook_events counter\nwebhook_events 1\n'), 'it does find faults')
})

t.test('the configuration and the alert rules are valid', { skip: prometheusMissing }, async t => {
  const told = await promtool(['check', 'config', join(EXAMPLES, 'prometheus.yml')])
  t.match(told, new RegExp(`SUCCESS: ${alerts.length} rules found`))
})

t.test('each alert fires when it should, and no other does', { skip: prometheusMissing }, async t => {
  const files = ['alerts.test.yml', 'alerts-days.test.yml']
  t.match(await promtool(['test', 'rules', ...files.map(file => join(EXAMPLES, file))]), /SUCCESS.*SUCCESS/s)
  const expected = new Set([...files.map(example).join('\n').matchAll(/alertname="(\w+)"/g)].map(([, name]) => name))
  t.same([...expected].sort(), [...alerts].sort(), 'each is shown firing')
})

t.test('the dashboard\'s queries are PromQL', { skip: prometheusMissing }, async t => {
  const rules = { groups: [{ name: 'dashboard', rules: queries.map(({ expr }, index) => ({ record: `panel:${index}`, expr })) }] }
  const file = join(t.testdir({ 'rules.yml': JSON.stringify(rules) }), 'rules.yml') // JSON is YAML
  t.match(await promtool(['check', 'rules', file]), new RegExp(`SUCCESS: ${queries.length} rules found`))
  rules.groups[0]!.rules[0]!.expr += ')'
  writeFileSync(file, JSON.stringify(rules))
  await t.rejects(promtool(['check', 'rules', file]), 'it does find faults')
})

t.test('queries, rules and documents name metrics and labels that there are', async t => {
  const metrics = registered(t)
  const labels = new Set(metrics.flatMap(({ labelNames }) => labelNames).concat('le', 'job', 'instance'))
  const names = new Set(metrics.flatMap(({ name, type }) => type === 'histogram' ? [name, `${name}_bucket`, `${name}_sum`, `${name}_count`] : [name]))
  const texts = {
    'dashboard.json': example('dashboard.json'),
    'alerts.yml': example('alerts.yml'),
    'alerts.test.yml': example('alerts.test.yml'),
    'docs/observability.md': readDocument('docs/observability.md').text
  }
  for (const [file, text] of Object.entries(texts)) {
    for (const [name] of text.matchAll(/\bwebhook_[a-z_]+/g)) t.ok(names.has(name), `${file} ${name}`)
  }
  for (const expr of [...queries.map(({ expr }) => expr), ...example('alerts.yml').matchAll(/expr:([^]*?)\n {8}\w/g)].map(String)) {
    const used = [...expr.matchAll(/\b(?:by|on) \(([^)]*)\)/g)].flatMap(([, list]) => list!.split(/, ?/))
      .concat([...expr.matchAll(/(\w+)(?:=|!=|=~|!~)"/g)].map(([, label]) => label!))
    for (const label of used) t.ok(labels.has(label), `${label} in ${expr}`)
  }
  for (const { title, legendFormat } of queries) {
    for (const [, label] of legendFormat.matchAll(/\{\{(\w+)\}\}/g)) t.ok(labels.has(label!), `${label} in the legend of ${title}`)
  }
})

t.test('every metric has its panel', async t => {
  for (const { name } of registered(t)) t.ok(queries.some(({ expr }) => new RegExp(`\\b${name}(?:_bucket)?\\{`).test(expr)), name)
})

t.test('the dashboard is one that Grafana takes', async t => {
  t.match(dashboard, { uid: 'fastify-openai-webhook', title: String, schemaVersion: 39 })
  t.same(dashboard.templating.list.map(({ name, type }) => ({ name, type })), [{ name: 'DS_PROMETHEUS', type: 'datasource' }, { name: 'job', type: 'query' }])
  const chosen = `\${${dashboard.templating.list[0]!.name}}`
  t.equal(new Set(dashboard.panels.map(({ id }) => id)).size, dashboard.panels.length, 'ids are unique')
  for (const { title, description, datasource, targets = [] } of panels) {
    t.ok(description, `${title} says what it means`)
    for (const each of [datasource, ...targets.map(({ datasource }) => datasource)]) t.same(each, { type: 'prometheus', uid: chosen }, `${title}: no data source of its own`)
    t.equal(new Set(targets.map(({ refId }) => refId)).size, targets.length)
    t.ok(targets.length > 0, title)
  }
  const cells = dashboard.panels.flatMap(({ title, gridPos: { x, y, w, h } }) => {
    t.ok(x + w <= 24, `${title} is within the grid`)
    return Array.from({ length: w * h }, (_, cell) => `${x + cell % w} ${y + Math.floor(cell / w)}`)
  })
  t.equal(new Set(cells).size, cells.length, 'no panel is on another')
})

if (isLong) {
  t.test('a real Prometheus scrapes the route, answers every query and evaluates every alert', { skip: prometheusMissing }, async t => {
    const { app, deliver } = await busyApp(t)
    await app.listen({ port: 0, host: '127.0.0.1' })
    const { port } = app.server.address() as { port: number }
    const directory = t.testdir({
      'alerts.yml': example('alerts.yml'),
      'prometheus.yml': example('prometheus.yml').replaceAll('15s', '500ms').replace('127.0.0.1:3000', `127.0.0.1:${port}`)
    })
    const ask = await startPrometheus(t, join(directory, 'prometheus.yml'), join(directory, 'data'))

    const waiting = new Map(queries.map(({ title, expr }) => [expr, title]))
    const end = performance.now() + 60_000
    while (waiting.size > 0) {
      if (performance.now() > end) return t.same([...waiting.values()], [], 'panels without data')
      await deliver()
      for (const expr of waiting.keys()) {
        const { result } = await ask(`query?query=${encodeURIComponent(expr)}`) as { result: unknown[] }
        if (result.length > 0) waiting.delete(expr)
      }
    }
    t.pass('every panel has data')

    let rules: Array<{ name: string, health: string, lastError?: string }> = []
    do {
      const { groups } = await ask('rules') as { groups: Array<{ rules: typeof rules }> }
      rules = groups.flatMap(({ rules }) => rules)
    } while (rules.some(({ health }) => health === 'unknown'))
    t.same(rules.map(({ name, health }) => ({ name, health })), alerts.map(name => ({ name, health: 'ok' })))
  })
}

// docs/observability.md

const rows = tableRows(readDocument('docs/observability.md'))
const code = (cell: string | undefined): string | undefined => /^`([^`]+)`$/.exec(cell ?? '')?.[1]

t.test('the document lists every metric with its kind and its labels, and no other', async t => {
  const documented = rows.filter(([first]) => code(first)?.startsWith('webhook_')).map(([name, type, labels]) => ({
    name: code(name), type, labels: [...labels!.matchAll(/`(\w+)`/g)].map(([, label]) => label).sort()
  }))
  const byName = (a: { name?: string | undefined }, b: { name?: string | undefined }): number => a.name!.localeCompare(b.name!)
  t.same(documented.sort(byName), registered(t).map(({ name, type, labelNames }) => ({ name, type, labels: [...labelNames].sort() })).sort(byName))
})

t.test('the document lists every channel with its kind, and no other', async t => {
  const documented = rows.filter(([first]) => code(first)?.startsWith('fastify-openai-webhook.')).map(([name, kind]) => ({ name: code(name), kind }))
  t.same(documented, Object.entries(channels).map(([name, channel]) => ({
    name: `fastify-openai-webhook.${name}`, kind: 'start' in channel ? 'tracing' : 'plain'
  })))
})

t.test('the document lists every alert, and no other', async t => {
  const documented = rows.map(([first]) => code(first)).filter(name => /^OpenAIWebhook[A-Z]/.test(name ?? ''))
  t.same(documented, alerts)
})

/** Level and text of what a file of lib writes to a log; of a text that is put together, its longest part. */
function logged (file: string): Array<{ level: string, text: string }> {
  const source = readFileSync(join(ROOT, 'lib', file), 'utf8')
  const calls = source.matchAll(/(?<!\.)\b(?:logError|this\.#refusals\.failed|(?:\w+\.)*?(?:log|to)\??\.(info|warn|debug|error)|(warn))\((?:[^()'`]|\([^()]*\))*(['`])((?:\\.|(?!\3).)*)\3(?:, '\w+')?\)/g)
  const writes = source.matchAll(/\bwrite\([\w.#]+, '(info|warn|error)', (?:[^()'`]|\([^()]*\))*(['`])((?:\\.|(?!\2).)*)\2\)/g)
  return [
    ...[...calls].map(([, level, warn, , text]) => ({ level: level ?? warn ?? 'error', text: text! })),
    ...[...writes].map(([, level, , text]) => ({ level: level!, text: text! }))
  ].map(({ level, text }) => ({
    level,
    text: text.replaceAll('\\', '').split(/\$\{[^}]*\}/).sort((a, b) => b.length - a.length)[0]!.trim()
  }))
}

t.test('the document lists every log line with its level, and no other', async t => {
  const files = readdirSync(join(ROOT, 'lib'), { recursive: true, encoding: 'utf8' }).filter(file => file.endsWith('.ts') && !/^(?:cli|testing)/.test(file))
  const inCode = files.flatMap(logged)
  const documented = rows.filter(([level]) => ['debug', 'info', 'warn', 'error'].includes(level!)).map(([level, message]) => ({
    level: level!, text: code(message)!.replaceAll(/<n>|…/g, '').trim()
  }))
  t.ok(inCode.length >= 10, `${inCode.length} lines in lib`)
  for (const { level, text } of inCode) t.ok(documented.some(line => line.level === level && text.startsWith(line.text)), `${level} ${text}`)

  // With the errors behind it, a refusal is logged by its own message.
  const refusals = Object.values(errors).map(CodedError => ({ level: 'error', text: new CodedError().message }))
  for (const line of documented) {
    t.ok([...inCode, ...refusals].some(({ level, text }) => level === line.level && text.startsWith(line.text)), `documented: ${line.level} ${line.text}`)
  }
})
