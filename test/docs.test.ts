import { existsSync } from 'node:fs'
import { join } from 'node:path'
import t from 'tap'
import * as errors from '../lib/errors.ts'
import { guideEntries, officialEntries } from '../lib/events/index.ts'
import { anchors, codeBlocks, interfaceProperties, readDocument, readDocuments, relativeLinks, ROOT, tableRows, typeCheck } from './support/docs.ts'
import { NODES, NODE_TYPES, TYPESCRIPTS, engines, oldestOf, peers } from './support/compatibility.ts'
import type { CodeBlock } from './support/docs.ts'

interface Generator {
  render (document: string, tables: Record<string, object>): string
}

const documents = readDocuments()
const catalogue = Object.values(errors).map(CodedError => {
  const { code, statusCode } = new CodedError()
  return { code, statusCode }
})
const PREFIX = 'FST_OPENAI_WEBHOOK_'

/** Rows whose first cell is one name in code: what a reference table lists. The first row of a name is its own. */
function listed (path: string): Map<string, string[]> {
  const rows = new Map<string, string[]>()
  for (const [first, ...rest] of tableRows(readDocument(path))) {
    const name = /^`([^`]+)`$/.exec(first!)?.[1]
    if (name !== undefined && !rows.has(name)) rows.set(name, rest)
  }
  return rows
}

/** What takes packages that are not installed here, and is compiled and run with them by test/long/neighbours.test.ts. */
const ELSEWHERE = ['nestjs', 'aws-lambda', 'dashboards', 'deployment'].map(name => `docs/recipes/${name}.md`)

/** The guide's events, merged as a user does. */
const A_USER = `
import type { EventType, GuideEvents, OfficialEvents } from 'fastify-openai-webhook'
import { guideEvents } from 'fastify-openai-webhook'
declare module 'fastify-openai-webhook' {
  interface OpenAIWebhookEvents extends GuideEvents {}
}
await app.register(openaiWebhook, { events: guideEvents })
app.openaiWebhook
  .on('batch.completed', event => {
    const id: string | undefined = event.id
    const file: string | undefined = event.data.output_file_id
    const done: number | undefined = event.data.request_counts?.completed
    // @ts-expect-error the guide's events may come without an id
    const must: string = event.id
    console.log(id, file, done, must)
  })
  .on('batch.in_progress', event => { console.log(event.data.request_counts?.total) })
  .on('batch.*', event => {
    if (event.type === 'batch.failed') console.log(event.data.errors?.code)
    if (event.type === 'batch.expired') {
      const id: string = event.id
      console.log(id)
    }
  })
  .on('fine_tune.*', event => { console.log(event.data.status) })
  .on('file.processed', event => {
    const bytes: number | undefined = event.data.bytes
    console.log(bytes)
  })
  .on('response.completed', event => {
    const same: OfficialEvents['response.completed'] = event
    console.log(same.id.length)
  })
// @ts-expect-error misspelt
app.openaiWebhook.on('file.process', () => {})
const event = await app.openaiWebhook.unwrap('', {})
if (event.type === 'batch.completed') console.log(event.data.output_file_id)
export const type: EventType = 'fine_tune.failed'
`

const madeUp = (line: number, code: string, language = 'ts'): CodeBlock => ({ path: 'docs/made-up.md', line, language, code })
const printed = documents.filter(({ path }) => !ELSEWHERE.includes(path)).flatMap(codeBlocks)
// At once: the compiler reads the same declarations for each program.
const { faults, checked } = await typeCheck([
  ...printed,
  { path: 'docs/a-user.md', line: 0, language: 'ts', code: A_USER },
  madeUp(10, "app.openaiWebhook\n  .on('batch.faild', () => {})\n"),
  madeUp(20, "import { memoryStor } from 'fastify-openai-webhook'\nmemoryStor()\n"),
  madeUp(30, 'app.openaiWebhook.handlr()\n', 'js'),
  // What another block declares does not hold here.
  madeUp(40, "import 'fastify-openai-webhook'\ndeclare module 'fastify-openai-webhook' { interface Other {} }\napp.openaiWebhook.on('file.processed', ({ data }) => { console.log(data.bytes) })\n"),
  madeUp(50, 'def f ():\n', 'python')
])

t.test('every TypeScript and JavaScript block type-checks, as do the guide\'s events merged by a user', async t => {
  t.same(faults.filter(fault => !fault.startsWith('docs/made-up.md')), [])
  t.ok(checked > 20, `${checked} blocks were checked`)
  t.equal(checked, printed.filter(({ language }) => /^(?:ts|js|typescript|javascript|mjs)$/.test(language)).length + 5)
})

t.test('a block that does not type-check is reported by document and line', async t => {
  const found = faults.filter(fault => fault.startsWith('docs/made-up.md')).sort()
  t.same([...new Set(found.map(fault => fault.split(' ')[0]))], [11, 20, 30, 42].map(line => `docs/made-up.md:${line}`))
  t.match(found, [/batch\.faild/, /memoryStor/, /handlr/, /file\.processed/])
})

t.test('every relative link leads to a file, and to a heading of it', async t => {
  for (const document of documents) {
    for (const { line, file, anchor } of relativeLinks(document)) {
      const place = `${document.path}:${line} ${file}`
      if (!t.ok(existsSync(join(ROOT, file)), place) || anchor === undefined) continue
      t.ok(anchors(readDocument(file)).has(anchor), `${place}#${anchor}`)
    }
  }
})

t.test('llms.txt has every document, and leads to nothing else', async t => {
  const links = relativeLinks(readDocument('llms.txt')).map(({ file }) => file)
  t.same([...new Set(links)].sort(), documents.map(({ path }) => path).filter(path => path !== 'docs/performance.md' && path !== 'CHANGELOG.md').sort())
})

t.test('the README is short, its pictures are there, and each is there in light and dark', async t => {
  const { text } = readDocument('README.md')
  t.ok(text.split('\n').length <= 221, `${text.split('\n').length - 1} lines`)
  const pictures = [...text.matchAll(/(?:src|srcset)="([^"]+)"/g)].map(([, path]) => path!)
  t.ok(pictures.length >= 2)
  for (const path of pictures) {
    t.ok(existsSync(join(ROOT, path)), path)
    t.ok(pictures.includes(path.replace(/light|dark/, theme => theme === 'light' ? 'dark' : 'light')), path)
  }
  const statuses = (theme: string): string[] => [...readDocument(`docs/images/delivery-${theme}.svg`).text.matchAll(/<text[^>]*>([^<]*)</g)]
    .flatMap(([, shown]) => shown!.match(/\b[245]\d\d\b/g) ?? [])
  t.same(new Set(statuses('light')), new Set(['200', '408', '413', '415', '401', '400', '409', '500', '503']))
  t.same(statuses('dark'), statuses('light'))
})

t.test('docs/assistants.md names no event type that does not exist, save as a mistake', async t => {
  const [names, mistakes] = readDocument('docs/assistants.md').text.split('## Mistakes to avoid')
  const types = new Set([...Object.keys(officialEntries)])
  for (const [, type] of names!.matchAll(/`((?:response|batch|fine_tuning|eval|realtime)\.[\w.]+)`/g)) t.ok(types.has(type!), `${type}`)
  for (const [, wrong] of mistakes!.matchAll(/^\| `((?:fine_tuning|eval|batch)\.[\w.]+)`/gm)) t.notOk(types.has(wrong!), `${wrong}`)
})

t.test('docs/events.md is what the generator makes of the event table', async t => {
  const { render } = await import(new URL('../docs/generate.mjs', import.meta.url).href) as Generator
  const { text } = readDocument('docs/events.md')
  t.equal(text, render(text, { official: officialEntries, guide: guideEntries }), 'npm run build && npm run docs')
  t.throws(() => render('no markers', { official: officialEntries }), /<!-- table official -->/)

  const types = [...Object.keys(officialEntries), ...Object.keys(guideEntries)]
  const rows = tableRows({ path: '', text }).map(([first]) => first!.slice(1, -1)).filter(name => types.includes(name))
  t.same(rows.sort(), types.sort(), 'each type has its row')
})

t.test('docs/errors.md lists every code with its status, and no other', async t => {
  const rows = [...listed('docs/errors.md')].map(([code, [statusCode]]) => ({ code, statusCode: Number(statusCode) }))
  const byCode = (a: { code: string }, b: { code: string }): number => a.code.localeCompare(b.code)
  t.same(rows.sort(byCode), catalogue.sort(byCode))
})

t.test('docs/compatibility.md says what test/long/compatibility.test.ts checks, and package.json declares', t => {
  const { text } = readDocument('docs/compatibility.md')
  const rows = tableRows({ path: '', text })
  t.match(text, `\`engines\` is \`${engines.node}\``)
  t.ok(rows.some(([nodes]) => nodes === NODES.join(', ')), NODES.join(', '))
  t.ok(rows.some(([versions, types]) => versions === TYPESCRIPTS.join(', ') && types === NODE_TYPES.join(', ')), 'TypeScript')
  const listedPeers = listed('docs/compatibility.md')
  for (const [name, range] of Object.entries(peers)) {
    t.same(listedPeers.get(name)?.slice(0, 2), [`\`${range.replaceAll('|', '\\|')}\``, oldestOf(range)], name)
  }
  t.end()
})

t.test('no document names a code that does not exist', async t => {
  const known = new Set(catalogue.map(({ code }) => code))
  for (const { path, text } of documents) {
    for (const [code] of text.matchAll(/FST_OPENAI_WEBHOOK_[A-Z_]*[A-Z]/g)) t.ok(known.has(code), `${path} ${code}`)
  }
})

t.test('the drawing in docs/lifecycle.md has every answer to a sender, with its status', async t => {
  const drawing = codeBlocks(readDocument('docs/lifecycle.md')).find(({ language }) => language === 'text')!.code
  const drawn = drawing.split('\n').flatMap(line => {
    const status = /► +(\d{3}) /.exec(line)?.[1]
    const codes = line.matchAll(/(?<=[ ·])[A-Z]{2,}(?:_[A-Z]+)*(?= |$)/g)
    return status === undefined ? [] : [...codes].map(([code]) => `${status} ${code}`)
  })
  const noAnswers = [
    errors.InvalidOptions, errors.InvalidSecret, errors.InvalidRoute, errors.AlreadyRegistered, errors.AlreadyStarted, errors.MissingRoute, errors.NoDeadLetters, errors.NeedsForce, errors.InspectorRefused,
    errors.TransactionOver, errors.RolledBack, errors.NoTransaction, errors.AsyncWork, errors.UnknownTenant,
    errors.NoResource, errors.BatchNotEnded, errors.BatchStalled, errors.BatchBroken, errors.InvalidBatchLine, errors.BatchLineTooLong,
    errors.UnexpectedList
  ].map(CodedError => new CodedError().code)
  const answers = catalogue
    .filter(({ code }) => !noAnswers.includes(code) && code !== new errors.UnprotectedRoute().code)
    .map(({ code, statusCode }) => `${statusCode} ${code.slice(PREFIX.length)}`)
  t.same([...new Set(drawn)].sort(), answers.sort())
})

t.test('docs/options.md and README.md list every option with its default', async t => {
  const interfaces = interfaceProperties('lib/options.ts')
  const own = ['EndpointOptions', 'ReceivingOptions', 'OpenAIWebhookOptions'].flatMap(name => [...interfaces.get(name)!])
  const ofRoutes = ['RouteOverrides', 'WebhookRouteOptions'].flatMap(name => [...interfaces.get(name)!.keys()])
  const nested = [['idempotency', 'IdempotencyOptions'], ['tenant', 'TenantOptions']].flatMap(([of, name]) =>
    [...interfaces.get(name!)!].map(([option, property]) => [`${of}.${option}`, property] as const))
  t.equal(interfaces.size, 7, 'options are in the seven interfaces that this test reads')

  const reference = listed('docs/options.md')
  for (const [name, { fallback }] of [...own, ...nested]) {
    const row = reference.get(name)
    if (!t.ok(row, `docs/options.md ${name}`) || fallback === undefined) continue
    t.equal(row![1]!.replaceAll('`', ''), fallback, `docs/options.md ${name}: the default`)
  }
  const overview = listed('README.md')
  for (const [name, { fallback }] of own) {
    const row = overview.get(name)
    if (!t.ok(row, `README.md ${name}`) || fallback === undefined) continue
    t.equal(row![0]!.replaceAll('`', ''), fallback, `README.md ${name}: the default`)
  }

  const ofInspector = [...interfaceProperties('lib/inspector/options.ts').get('InspectorOptions')!.keys()]
  for (const name of ofInspector) t.ok(reference.has(name), `docs/options.md ${name}, of the inspector`)
  const allowed = new Set([...own, ...nested].map(([name]) => name).concat(ofRoutes, ofInspector))
  t.same([...reference.keys()].filter(name => !allowed.has(name)), [], 'no option that does not exist')
})
