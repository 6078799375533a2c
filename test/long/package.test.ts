import { execFile } from 'node:child_process'
import { readFile, writeFile } from 'node:fs/promises'
import { join, resolve } from 'node:path'
import { promisify } from 'node:util'
import Fastify from 'fastify'
import t from 'tap'
import openaiWebhook, { guideEvents } from '../../lib/index.ts'
import { sampleTypes } from '../../lib/testing/index.ts'
import { VECTOR } from '../support/deliveries.ts'
import { environment as env } from '../support/program.mjs'

const run = promisify(execFile)
const root = resolve(import.meta.dirname, '../..')
const bin = (name: string): string => join(root, 'node_modules', '.bin', name)

t.test('the packed tarball', async t => {
  const dir = t.testdir({
    consumer: {
      'package.json': JSON.stringify({ name: 'consumer', private: true, type: 'module' }),
      'tsconfig.json': JSON.stringify({
        compilerOptions: { module: 'NodeNext', target: 'ES2022', strict: true, exactOptionalPropertyTypes: true, types: ['node'], typeRoots: [join(root, 'node_modules/@types')] },
        files: ['app.ts']
      }),
      'app.ts': `
import { FormatRegistry, Type } from '@sinclair/typebox'
import Fastify from 'fastify'
import openaiWebhook, { guideEvents, inline, memoryStore, standardWebhooks, xOpenAISignature } from 'fastify-openai-webhook'
import type { GuideEvents, WebhookEvent } from 'fastify-openai-webhook'

declare module 'fastify-openai-webhook' {
  interface OpenAIWebhookEvents extends GuideEvents {}
}

const vector = ${JSON.stringify(VECTOR)}
Date.now = () => vector.timestamp * 1000

const app = Fastify()
await app.register(openaiWebhook, {
  secret: vector.secret,
  events: guideEvents,
  verifier: standardWebhooks(),
  idempotency: { store: memoryStore({ max: 10 }) },
  runner: inline()
})
console.log(typeof xOpenAISignature)
app.openaiWebhook
  .on('response.completed', function (event) { console.log(event.type, event.data.id, this === app) })
  .on('batch.completed', event => { const file: string | undefined = event.data.output_file_id; console.log(file) })
  .onAny((event: WebhookEvent) => { console.log(event.type) })
// @ts-expect-error a misspelt event type
try { app.openaiWebhook.on('batch.complete', () => {}) } catch (error) { console.log((error as Error).message) }
const response = await app.inject({ method: 'POST', url: '/webhooks/openai', headers: vector.headers, payload: vector.body })
console.log(response.statusCode, response.body)
await app.close()

FormatRegistry.Set('response-id', value => value.startsWith('resp_'))
for (const format of ['response-id', 'never-registered']) {
  const strict = Fastify()
  const events = { 'response.completed': Type.Object({ type: Type.Literal('response.completed'), data: Type.Object({ id: Type.String({ format }) }) }) }
  await strict.register(openaiWebhook, { secret: vector.secret, events })
  const { statusCode } = await strict.inject({ method: 'POST', url: '/webhooks/openai', headers: vector.headers, payload: vector.body })
  console.log(format, statusCode)
  await strict.close()
}
`,
      'required.cjs': `
const openaiWebhook = require('fastify-openai-webhook')
const app = require('fastify')()
app.register(openaiWebhook, { secret: ${JSON.stringify(VECTOR.secret)} })
app.ready().then(() => console.log(typeof app.openaiWebhook.on, typeof openaiWebhook.inline))
`
    }
  })
  const { stdout: packed } = await run('npm', ['pack', '--ignore-scripts', '--json', '--pack-destination', dir], { cwd: root, env })
  const [{ filename, files }] = JSON.parse(packed) as [{ filename: string, files: Array<{ path: string }> }]
  const tarball = join(dir, filename)

  await t.test('ships only what a user needs', async t => {
    const stray = files.map(({ path }) => path)
      .filter(path => !/^dist\/.+\.(?:js|d\.ts)$|^dist\/inspector\/page\/(?:index\.html|page\.css)$|^docs\/(?:recipes\/)?[^/]+\.md$|^docs\/examples\/observability\/[^/]+\.(?:json|yml)$|^(?:LICENSE|README\.md|CHANGELOG\.md|llms\.txt|package\.json)$/.test(path))
    t.same(stray, [])
    t.ok(files.some(({ path }) => path === 'dist/index.js'))
    for (const name of ['LICENSE', 'llms.txt', 'docs/assistants.md']) t.ok(files.some(({ path }) => path === name), name)
  })

  await t.test('is clean for publint and attw', async t => {
    await t.resolves(run(bin('publint'), ['run', tarball, '--strict'], { cwd: root, env }))
    await t.resolves(run(bin('attw'), ['--profile', 'esm-only', tarball], { cwd: root, env }))
  })

  await t.test('a consumer that installs it compiles and receives the known vector', async t => {
    const cwd = join(dir, 'consumer')
    await run('npm', ['install', '--no-audit', '--no-fund', '--prefer-offline', tarball, 'fastify@5'], { cwd, env })
    await run(process.execPath, [join(root, 'node_modules/typescript-7/lib/tsc.js'), '-p', '.'], { cwd, env })
    const { stdout } = await run(process.execPath, ['app.js'], { cwd, env })
    t.same(stdout.trim().split('\n'), [
      'function',
      'on(): unknown event type "batch.complete", did you mean "batch.completed"?; a type of your own needs a schema in the `events` option',
      'response.completed',
      'response.completed resp_123 true',
      '200 {"received":true}',
      'response-id 200',
      'never-registered 400'
    ])
    const required = await run(process.execPath, ['required.cjs'], { cwd, env })
    t.equal(required.stdout.trim(), 'function function')
  })

  await t.test('so does its bundle, with no node_modules beside it', async t => {
    const alone = t.testdir()
    for (const format of ['esm', 'cjs']) {
      await writeFile(join(dir, 'consumer', 'bundled.js'), `
import Fastify from 'fastify'
import openaiWebhook from 'fastify-openai-webhook'
import { Type } from '@sinclair/typebox'
const app = Fastify()
app.register(openaiWebhook, { secret: ${JSON.stringify(VECTOR.secret)}, tolerance: 1e9, events: { 'acme.paid': Type.Object({ type: Type.Literal('acme.paid') }) } })
app.inject({ method: 'POST', url: '/webhooks/openai', headers: ${JSON.stringify(VECTOR.headers)}, payload: ${JSON.stringify(VECTOR.body)} }).then(({ body }) => console.log(body))
`)
      const file = join(alone, `bundled.${format === 'esm' ? 'mjs' : 'cjs'}`)
      // As Fastify itself needs it in an ES module.
      const banner = format === 'esm' ? ['--banner:js=import { createRequire as of } from "node:module"; const require = of(import.meta.url);'] : []
      const { stderr } = await run(bin('esbuild'), ['bundled.js', '--bundle', '--platform=node', `--format=${format}`, `--outfile=${file}`, '--log-level=error', ...banner], { cwd: join(dir, 'consumer'), env })
      t.equal(stderr, '')
      t.equal((await run(process.execPath, [file], { cwd: alone, env })).stdout, '{"received":true}\n', format)
    }
  })

  await t.test('its bin runs under both names, by npx too', async t => {
    const cwd = join(dir, 'consumer')
    const { version } = JSON.parse(await readFile(join(root, 'package.json'), 'utf8')) as { version: string }
    for (const name of ['openai-webhook', 'fastify-openai-webhook']) {
      const direct = await run(join(cwd, 'node_modules', '.bin', name), ['--version'], { cwd, env })
      t.equal(direct.stdout, `${version}\n`, 'executable')
      const { stdout } = await run('npx', ['--no', name, 'trigger', '--help'], { cwd, env })
      t.match(stdout, /^Usage: openai-webhook trigger /)
    }
    const app = Fastify()
    t.teardown(() => app.close())
    await app.register(openaiWebhook, { secret: VECTOR.secret, events: guideEvents })
    const url = await app.listen({ port: 0, host: '127.0.0.1' })
    const argv = ['--no', 'fastify-openai-webhook', 'trigger', 'all', '--json', '--url', `${url}/webhooks/openai`]
    const { stdout } = await run('npx', argv, { cwd, env: { ...env, OPENAI_WEBHOOK_SECRET: VECTOR.secret } })
    t.match(JSON.parse(stdout.trimEnd().split('\n').at(-1)!), { summary: { deliveries: sampleTypes.length, answers: { 200: sampleTypes.length } } })
  })

  await t.test('imports with nothing but the declared dependencies', async t => {
    const cwd = join(dir, 'consumer')
    const { dependencies, peerDependencies } = JSON.parse(await readFile(join(root, 'package.json'), 'utf8')) as { [kind in 'dependencies' | 'peerDependencies']: Record<string, string> }
    await writeFile(join(cwd, 'bare.mjs'), 'await import("fastify-openai-webhook"); console.log("imported")')
    const { stdout: tree } = await run('npm', ['ls', '--json', '--depth=1'], { cwd, env })
    const installed = JSON.parse(tree) as { dependencies: Record<string, { dependencies?: object }> }
    t.same(
      Object.keys(installed.dependencies['fastify-openai-webhook']?.dependencies ?? {}).sort(),
      [...Object.keys(dependencies), ...Object.keys(peerDependencies)].sort()
    )
    t.equal((await run(process.execPath, ['bare.mjs'], { cwd, env })).stdout.trim(), 'imported')
  })
})
