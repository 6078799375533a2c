import { readFileSync, readdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import t from 'tap'
import type { Test } from 'tap'
import { Program, project, run, send, writeRecipe } from '../support/neighbours.ts'
import { nginxMissing } from '../support/missing.ts'
import { freePort } from '../support/port.mjs'
import { PostgresServer, postgresMissing } from '../support/postgres.ts'
import { RedisServer, redisMissing } from '../support/redis.ts'

// The recipes for what stands beside a Fastify app, as they are printed, with the real packages and the packed package.

const dir = t.testdir()
const RECEIVED = { status: 200, body: '{"received":true}' }

t.test('fastify-cli and autoload', async t => {
  const recipe = 'docs/recipes/fastify-cli.md'
  const home = await project(dir, 'fastify-cli', ['fastify-cli'], {})
  await run(home, 'npx', ['fastify', 'generate', 'my-app', '--esm'])
  const cwd = await project(home, 'my-app', [])
  t.same(writeRecipe(cwd, recipe), ['plugins/openai-webhook.js', 'routes/batches/index.js', 'test/helper.js', 'test/routes/batches.test.js'])
  t.match(await run(cwd, 'env', ['-u', 'OPENAI_WEBHOOK_SECRET', 'npm', 'test']), /^# pass 4$\n^# fail 0$/m, 'the generated tests and the recipe\'s')

  const manifest = join(cwd, 'package.json')
  const start = /"start": "([^"]+)"/.exec(readFileSync(recipe, 'utf8'))![1]!
  writeFileSync(manifest, readFileSync(manifest, 'utf8').replace(/(?<="start": ")[^"]+/, start))
  writeFileSync(join(cwd, 'plugins/alerts.js'), `
import fp from 'fastify-plugin'
export default fp(async fastify => {
  fastify.openaiWebhook.on('batch.failed', async (event, { log }) => {
    log.info('a slow handler has started')
    await new Promise(resolve => setTimeout(resolve, 1_000))
    log.info('a slow handler has ended')
  })
}, { name: 'alerts', dependencies: ['openai-webhook'] })
`)
  for (const [line, args, endsWell] of [['as printed', start.split(' ').slice(1), true], ['as generated', ['start', '-l', 'info', 'app.js', '--prefix', '/api'], false]] as const) {
    await t.test(`SIGTERM, ${line}`, async t => {
      const app = new Program(t, cwd, 'node_modules/.bin/fastify', args, { PORT: '0' })
      const url = `${await app.listening()}${endsWell ? '' : '/api'}/webhooks/openai`
      t.same(await send(url), RECEIVED)
      await app.until(/"batch":"batch_[^"]+","msg":"batch completed"/)
      const slow = send(url, 'batch.failed').catch(() => 'cut off')
      await app.until(/a slow handler has started/)
      await app.end()
      t.same(await slow, endsWell ? RECEIVED : 'cut off')
      t.equal(app.output.includes('a slow handler has ended'), endsWell)
      if (!endsWell) t.match(app.output, /killed by timeout \(500ms\)/)
    })
  }
})

t.test('NestJS on Fastify', async t => {
  const cwd = await project(dir, 'nest', ['@nestjs/core', '@nestjs/common', '@nestjs/platform-fastify', 'reflect-metadata', 'rxjs', 'typescript@6', '@types/node@22'])
  const written = writeRecipe(cwd, 'docs/recipes/nestjs.md', (file, code) => file === 'src/app.module.ts'
    ? code.replace('import { CallsController }', "import { BadController, swallowing } from './bad.controller.js'\nimport { CallsController }")
      .replace('[BatchesService]', '[BatchesService, ...swallowing]').replace('[CallsController]', '[CallsController, BadController]')
    : file === 'src/main.ts'
      ? code.replace('await app.listen', `app.setGlobalPrefix('api')
fastify.openaiWebhook.on('batch.failed', async () => {
  console.log('a slow handler has started')
  await new Promise(resolve => setTimeout(resolve, 1_000))
  console.log('a slow handler has ended')
}).on('batch.expired', () => { throw new Error('the handler failed') })
await app.listen`)
      : code)
  t.equal(written.length, 5)
  // What the recipe warns of.
  writeFileSync(join(cwd, 'src/bad.controller.ts'), `
import { Catch, Controller, HttpException, Post } from '@nestjs/common'
import type { ArgumentsHost, ExceptionFilter } from '@nestjs/common'
import { APP_FILTER } from '@nestjs/core'
import { RouteConfig } from '@nestjs/platform-fastify'

@Controller('bad')
export class BadController {
  @Post('created')
  @RouteConfig({ openaiWebhook: {} })
  async created (): Promise<void> {}

  @Post('throws')
  @RouteConfig({ openaiWebhook: {} })
  async throws (): Promise<void> { throw new HttpException('no', 400) }
}

@Catch()
class Swallow implements ExceptionFilter {
  catch (error: Error, host: ArgumentsHost): void { host.switchToHttp().getResponse().status(200).send({ swallowed: error.message }) }
}

export const swallowing = process.env['SWALLOW'] === undefined ? [] : [{ provide: APP_FILTER, useClass: Swallow }]
`)
  // As Nest's starter has it, and stricter.
  writeFileSync(join(cwd, 'tsconfig.json'), JSON.stringify({
    compilerOptions: { module: 'nodenext', moduleResolution: 'nodenext', target: 'ES2023', strict: true, emitDecoratorMetadata: true, experimentalDecorators: true, skipLibCheck: true, rootDir: 'src', outDir: 'dist', types: ['node'] },
    include: ['src']
  }))
  await run(cwd, 'npx', ['tsc', '-p', '.'])
  t.match(await run(cwd, process.execPath, ['dist/batches.check.js']), /^200$/m)

  const nest = new Program(t, cwd, process.execPath, ['dist/main.js'], { PORT: '0' })
  const url = await nest.listening()
  t.same(await send(`${url}/webhooks/openai`), RECEIVED, 'no prefix')
  await nest.until(/batch batch_\w+ has completed/)
  t.same(await send(`${url}/api/calls`, 'realtime.call.incoming', { webhookId: 'wh_1' }), { status: 200, body: '' }, 'as Nest answers')
  await nest.until(/realtime\.call\.incoming in delivery wh_1/)
  t.equal((await send(`${url}/api/bad/created`)).status, 201)
  t.equal((await send(`${url}/api/bad/throws`)).status, 400)
  t.equal((await send(`${url}/webhooks/openai`, 'batch.expired')).status, 500)
  const forged = { status: 401, body: '{"statusCode":401,"message":"no signature matches the body and the signing secret"}' }
  for (const path of ['/webhooks/openai', '/api/calls']) t.same(await send(url + path, 'batch.completed', { changed: '{}' }), forged, path)
  await nest.until(/"code":"FST_OPENAI_WEBHOOK_INVALID_SIGNATURE"/)
  const slow = send(`${url}/webhooks/openai`, 'batch.failed')
  await nest.until(/a slow handler has started/)
  await nest.end()
  t.same(await slow, RECEIVED)

  const swallowing = new Program(t, cwd, process.execPath, ['dist/main.js'], { PORT: '0', SWALLOW: '1' })
  const other = await swallowing.listening()
  t.equal((await send(`${other}/api/bad/throws`)).status, 200, 'swallowed')
  t.equal((await send(`${other}/webhooks/openai`, 'batch.expired')).status, 500)
  for (const path of ['/webhooks/openai', '/api/bad/throws']) t.equal((await send(other + path, 'batch.completed', { changed: '{}' })).status, 401, path)
})

t.test('AWS Lambda', async t => {
  const cwd = await project(dir, 'lambda', ['fastify', '@fastify/aws-lambda'])
  t.same(writeRecipe(cwd, 'docs/recipes/aws-lambda.md'), ['lambda.mjs'])
  writeFileSync(join(cwd, 'invoke.mjs'), `
import { sampleEvent, sign } from 'fastify-openai-webhook/testing'
import { handler } from './lambda.mjs'

const body = JSON.stringify({ ...sampleEvent('batch.completed'), note: 'ünïcode €' })
const base64 = Buffer.from(body).toString('base64')
const path = '/webhooks/openai'
const make = {
  url: (headers, change) => ({ version: '2.0', rawPath: path, headers, requestContext: { http: { method: 'POST', path, sourceIp: '192.0.2.1' }, stage: '$default' }, body, isBase64Encoded: false, ...change }),
  rest: (headers, change) => ({ path, httpMethod: 'POST', headers, multiValueHeaders: Object.fromEntries(Object.entries(headers).map(([name, value]) => [name, [value]])), requestContext: { stage: 'prod' }, body, isBase64Encoded: false, ...change }),
  alb: (headers, change) => ({ path, httpMethod: 'POST', headers, requestContext: { elb: { targetGroupArn: 'arn' } }, body, isBase64Encoded: false, ...change }),
  albMany: (headers, change) => ({ path, httpMethod: 'POST', multiValueHeaders: Object.fromEntries(Object.entries(headers).map(([name, value]) => [name, [value]])), requestContext: { elb: { targetGroupArn: 'arn' } }, body, isBase64Encoded: false, ...change })
}
const answers = {}
for (const [name, from, change] of [
  ['a function URL', 'url'], ['in base64', 'url', { body: base64, isBase64Encoded: true }], ['a REST API', 'rest'], ['a load balancer', 'alb'],
  ['multi-value headers', 'albMany'], ['base64 that says nothing of it', 'url', { body: base64 }], ['a mapping template', 'url', { body: JSON.stringify(JSON.parse(body), null, 2) }]
]) {
  const { statusCode, body: answer } = await handler(make[from](sign(body, { secret: process.env.OPENAI_WEBHOOK_SECRET }), change), {})
  answers[name] = statusCode + ' ' + (JSON.parse(answer).code ?? answer)
}
console.log('ANSWERS ' + JSON.stringify(answers))
`)
  const answersOf = async (): Promise<unknown> => JSON.parse(/^ANSWERS (.*)$/m.exec(await run(cwd, process.execPath, ['invoke.mjs']))![1]!)
  const OK = '200 {"received":true}'
  const answers = {
    'a function URL': OK,
    'in base64': OK,
    'a REST API': OK,
    'a load balancer': OK,
    'multi-value headers': '401 FST_OPENAI_WEBHOOK_MISSING_HEADER',
    'base64 that says nothing of it': '401 FST_OPENAI_WEBHOOK_INVALID_SIGNATURE',
    'a mapping template': '401 FST_OPENAI_WEBHOOK_INVALID_SIGNATURE'
  }
  t.same(await answersOf(), answers)
  writeRecipe(cwd, 'docs/recipes/aws-lambda.md', (_file, code) => code.replace('awsLambdaFastify(app)', 'awsLambdaFastify(app, { albMultiValueHeaders: true })'))
  t.same(await answersOf(), { ...answers, 'multi-value headers': OK })
  await t.rejects(run(cwd, 'env', ['-u', 'OPENAI_WEBHOOK_SECRET', process.execPath, 'lambda.mjs']), /OPENAI_WEBHOOK_SECRET/)
})

t.test('Vitest', async t => {
  const cwd = await project(dir, 'vitest', ['fastify', 'vitest'])
  t.same(writeRecipe(cwd, 'docs/testing.md').slice(0, 1), ['webhook.test.ts'])
  for (const pool of ['forks', 'threads']) t.match(await run(cwd, 'npx', ['vitest', 'run', '--pool', pool, 'webhook.test.ts']), /Tests +\d+ passed \(\d+\)/, pool)
})

t.test('Jest', async t => {
  const [major, minor] = process.versions.node.split('.').map(Number) as [number, number]
  const requires = major > 24 || (major === 24 && minor >= 9)
  const cwd = await project(dir, 'jest', ['fastify', 'jest', 'babel-jest', '@babel/core', '@babel/preset-env'], {
    type: 'module', ...(!requires && { overrides: { cookie: '1.1.1' } })
  })
  t.same(writeRecipe(cwd, 'docs/testing.md').slice(1), ['webhook.test.mjs', 'jest.config.cjs'])
  writeFileSync(join(cwd, 'required.test.cjs'), `
const Fastify = require('fastify')
const openaiWebhook = require('fastify-openai-webhook')
const { deliver, sampleEvent, testSecret } = require('fastify-openai-webhook/testing')

test('a failed batch is handled', async () => {
  const app = Fastify()
  await app.register(openaiWebhook, { secret: testSecret })
  expect((await deliver(app, sampleEvent('batch.failed'))).json()).toEqual({ received: true })
  await app.close()
})
`)
  const withFlag = { NODE_OPTIONS: '--experimental-vm-modules' }
  const passed = /Tests: +1 passed, 1 total/
  t.match(await run(cwd, 'npx', ['jest', '--config={}', 'webhook.test.mjs'], withFlag), passed, 'an ES module')
  const inCommonJs = requires ? await run(cwd, 'npx', ['jest', '--config={}', 'required.test.cjs'], withFlag) : await run(cwd, 'npx', ['jest', 'required.test.cjs'])
  t.match(inCommonJs, passed, requires ? 'CommonJS' : 'CommonJS, by Babel')
})

const SLOW = `
app.openaiWebhook.on('batch.failed', async (event, { log }) => {
  log.info('a slow handler has started')
  // To stop a process takes PM2 any time: one that is to be cut off counts from then.
  if (process.env.IS_CUT_OFF) await new Promise(resolve => process.once('SIGINT', resolve))
  await new Promise(resolve => setTimeout(resolve, 3_000))
  log.info('a slow handler has ended')
})
app.openaiWebhook.onAny((event, { log }) => { log.info('handled') })
`

t.test('processes', { skip: redisMissing }, async t => {
  const recipe = 'docs/recipes/deployment.md'
  const { port } = await RedisServer.start(t)
  const cwd = await project(dir, 'processes', ['fastify', 'ioredis', 'pm2'])
  writeRecipe(cwd, recipe, (file, code) => file === 'server.mjs' ? code.replace("app.get('/healthz'", `${SLOW}\napp.get('/healthz'`).replace('redisStore(redis) } }', 'redisStore(redis) }, deadline: 60_000 }') : code)
  const settings: Record<string, string> = { REDIS_URL: `redis://127.0.0.1:${port}`, PM2_HOME: join(cwd, 'pm2') }

  await t.test('Docker and Kubernetes', async t => {
    const [, command, ...args] = /CMD \["([^"]+)", "([^"]+)"\]/.exec(readFileSync(join(cwd, 'Dockerfile'), 'utf8'))!
    const server = new Program(t, cwd, command!, args, { ...settings, PORT: '0' })
    const url = await server.listening()
    t.equal((await fetch(`${url}/healthz`)).status, 200)
    const slow = send(`${url}/webhooks/openai`, 'batch.failed')
    await server.until(/a slow handler has started/)
    t.equal(await server.end(), 0)
    t.same(await slow, RECEIVED)

    const pod = readFileSync(join(cwd, 'deployment.yaml'), 'utf8')
    const seconds = (pattern: RegExp): number => Number(pattern.exec(pod)![1])
    t.ok(seconds(/terminationGracePeriodSeconds: (\d+)/) > seconds(/"sleep", "(\d+)"/) + 10, 'preStop and closeTimeout fit in')
  })

  /** Ten senders of one delivery: it is handled once, by whichever process. */
  async function handledOnce (t: Test, url: string, output: () => string): Promise<void> {
    const webhookId = `wh_${t.name.replaceAll(/\W/g, '')}`
    const answers = await Promise.all(Array.from({ length: 10 }, async () => await send(url, 'batch.completed', { webhookId })))
    t.equal(answers.filter(({ body }) => body === RECEIVED.body).length >= 1, true)
    t.same(await send(url, 'batch.completed', { webhookId }), { status: 200, body: '{"received":true,"duplicate":true}' })
    t.equal([...output().matchAll(new RegExp(`"webhookId":"${webhookId}"[^\n]*"msg":"handled"`, 'g'))].length, 1)
    for (let nth = 0; nth < 20; nth++) await send(url)
    const workers = new Set([...output().matchAll(/"pid":(\d+)[^\n]*"msg":"handled"/g)].map(([, pid]) => pid))
    t.ok(workers.size > 1, `${workers.size} processes have handled deliveries`)
  }

  await t.test('node:cluster', async t => {
    const port = await freePort()
    const primary = new Program(t, cwd, process.execPath, ['cluster.mjs'], { ...settings, PORT: String(port) })
    await primary.until(/(?:Server listening at http:\/\/127[\s\S]*){2}/)
    const url = `http://127.0.0.1:${port}/webhooks/openai`
    await handledOnce(t, url, () => primary.output)
    const slow = send(url, 'batch.failed')
    await primary.until(/a slow handler has started/)
    t.equal(await primary.end(), 0)
    t.same(await slow, RECEIVED)
  })

  await t.test('PM2', async t => {
    const port = await freePort()
    const url = `http://127.0.0.1:${port}/webhooks/openai`
    const pm2 = async (...args: string[]): Promise<string> => await run(cwd, 'npx', ['pm2', ...args], { ...settings, PORT: String(port) })
    t.teardown(async () => await pm2('kill'))
    /** What the processes of an app have printed, which PM2 keeps in files. */
    const output = (): string => readdirSync(join(cwd, 'pm2/logs')).filter(file => file.includes('-out')).map(file => readFileSync(join(cwd, 'pm2/logs', file), 'utf8')).join('')
    async function printed (what: string, times: number): Promise<void> {
      while (output().split(what).length <= times) await sleep(50)
    }

    await pm2('start', 'ecosystem.config.cjs')
    await printed('Server listening at http://127', 2)
    await handledOnce(t, url, output)
    const slow = send(url, 'batch.failed')
    await printed('a slow handler has started', 1)
    await pm2('reload', 'webhooks')
    t.same(await slow, RECEIVED)
    t.same(await send(url), RECEIVED)

    await pm2('delete', 'webhooks')
    const listening = output().split('Server listening at http://127').length - 1
    settings['IS_CUT_OFF'] = 'yes'
    await pm2('start', 'server.mjs', '--name', 'by-default', '-i', '2')
    await printed('Server listening at http://127', listening + 2)
    const cut = send(url, 'batch.failed').catch(() => 'cut off')
    await printed('a slow handler has started', 2)
    await pm2('stop', 'by-default')
    t.equal(await cut, 'cut off', 'without kill_timeout')
  })
})

t.test('bull-board', { skip: redisMissing }, async t => {
  const { port } = await RedisServer.start(t)
  const cwd = await project(dir, 'board', ['fastify', 'bullmq', 'ioredis', '@bull-board/api', '@bull-board/fastify'])
  writeRecipe(cwd, 'docs/recipes/dashboards.md', (_file, code) => code.replace('attempts: 20', 'attempts: 2, backoff: 1').replace('const queue =', `
let isMended = false
app.openaiWebhook.on('batch.failed', () => { if (!isMended) throw new Error('not mended') })
app.post('/mend', async () => { isMended = true })
app.get('/dead', async () => await app.openaiWebhook.deadLetters.list({ limit: 10 }))
const queue =`))
  const app = new Program(t, cwd, process.execPath, ['board.mjs'], { PORT: '0', BOARD_PASSWORD: 'secret', REDIS_URL: `redis://127.0.0.1:${port}` })
  const url = await app.listening()
  t.same(await send(`${url}/webhooks/openai`, 'batch.failed', { webhookId: 'wh_dead' }), RECEIVED)
  await app.until(/webhook delivery is dead/)

  t.equal((await fetch(`${url}/queues`)).status, 401)
  const headers = { authorization: `Basic ${btoa('admin:secret')}` }
  t.match(await (await fetch(`${url}/queues`, { headers })).text(), /<title>Bull Dashboard/)
  const failed = await fetch(`${url}/queues/api/queues?activeQueue=openai-webhook&status=failed&page=1`, { headers })
  const { queues: [queue] } = await failed.json() as { queues: Array<{ jobs: Array<{ id: string, stacktrace: string[] }> }> }
  t.equal(queue!.jobs.length, 1)
  t.match(queue!.jobs[0]!.stacktrace.join(), /not mended[\s\S]*board\.mjs/, 'the handler\'s own stack')
  const dead = async (): Promise<unknown> => await (await fetch(`${url}/dead`)).json()
  t.match(await dead(), [{ webhookId: 'wh_dead' }])

  await fetch(`${url}/mend`, { method: 'POST' })
  t.equal((await fetch(`${url}/queues/api/queues/openai-webhook/${encodeURIComponent(queue!.jobs[0]!.id)}/retry`, { method: 'PUT', headers })).status, 204)
  await app.until(/"webhookId":"wh_dead"[^\n]*webhook delivery processed/)
  t.same(await dead(), [])
  await app.end()
})

const needsNode22 = process.versions.node.startsWith('20.') ? 'needs Node 22.12' : false

t.test('the dashboard of pg-boss', { skip: postgresMissing || needsNode22 }, async t => {
  const { url: postgresUrl } = await PostgresServer.start(t)
  const cwd = await project(dir, 'pg-boss-dashboard', ['fastify', 'pg', 'pg-boss', '@pg-boss/dashboard'])
  writeFileSync(join(cwd, 'app.mjs'), `
import Fastify from 'fastify'
import openaiWebhook from 'fastify-openai-webhook'
import { pgboss } from 'fastify-openai-webhook/pgboss'
import { PgBoss } from 'pg-boss'

const boss = await new PgBoss({ connectionString: process.env.DATABASE_URL, useListenNotify: true }).on('error', () => {}).start()
const app = Fastify({ logger: true })
await app.register(openaiWebhook, { runner: pgboss({ boss, attempts: 1 }) })
let isMended = false
app.openaiWebhook.on('batch.failed', () => { if (!isMended) throw new Error('not mended') })
app.post('/mend', async () => { isMended = true })
app.get('/dead', async () => await app.openaiWebhook.deadLetters.list({ limit: 10 }))
app.get('/job', async () => await boss.findJobs('openai-webhook', {}))
await app.listen({ port: 0 })
`)
  const app = new Program(t, cwd, process.execPath, ['app.mjs'], { DATABASE_URL: postgresUrl })
  const url = await app.listening()
  t.same(await send(`${url}/webhooks/openai`, 'batch.failed', { webhookId: 'wh_dead' }), RECEIVED)
  await app.until(/webhook delivery is dead/)

  const port = await freePort()
  const login = { PGBOSS_DASHBOARD_AUTH_USERNAME: 'admin', PGBOSS_DASHBOARD_AUTH_PASSWORD: 'secret' }
  const dashboard = new Program(t, cwd, process.execPath, ['node_modules/@pg-boss/dashboard/bin/cli.js'], { DATABASE_URL: postgresUrl, PORT: String(port), ...login })
  await dashboard.until(/listening on/)
  const queues = `http://127.0.0.1:${port}/queues`
  t.equal((await fetch(queues)).status, 401)
  const headers = { authorization: `Basic ${btoa('admin:secret')}`, origin: `http://127.0.0.1:${port}` }
  t.match(await (await fetch(queues, { headers })).text(), /openai-webhook-dead/)

  const dead = async (): Promise<unknown> => await (await fetch(`${url}/dead`)).json()
  t.match(await dead(), [{ webhookId: 'wh_dead' }])
  await fetch(`${url}/mend`, { method: 'POST' })
  const [{ id }] = await (await fetch(`${url}/job`)).json() as [{ id: string }]
  await fetch(`${queues}/openai-webhook/jobs/${id}`, { method: 'POST', headers, body: new URLSearchParams({ intent: 'retry' }) })
  await app.until(/"webhookId":"wh_dead"[^\n]*webhook delivery processed/)
  t.match(await dead(), [{ webhookId: 'wh_dead' }], 'a retry there leaves the dead letter')
})

t.test('nginx', { skip: nginxMissing }, async t => {
  const cwd = await project(dir, 'nginx', ['fastify'])
  const [port, appPort] = [await freePort(), await freePort()]
  writeRecipe(cwd, 'docs/recipes/proxies.md', (file, code) => file === 'location.conf'
    ? code.replace('127.0.0.1:3000', `127.0.0.1:${appPort}`)
    : code.replace('await app.listen', "app.openaiWebhook.onAny((event, { request, log }) => { log.info({ ip: request?.ip }, 'handled') })\nawait app.listen"))
  const account = process.getuid?.() === 0 ? 'user root;' : ''
  const temporary = ['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map(name => `${name}_temp_path ${cwd}/${name};`).join('\n')
  writeFileSync(join(cwd, 'nginx.conf'), `
daemon off; ${account} pid ${cwd}/nginx.pid; error_log stderr;
events {}
http { access_log off; ${temporary} server { listen 127.0.0.1:${port}; include ${cwd}/location.conf; } }
`)
  const app = new Program(t, cwd, process.execPath, ['app.mjs'], { PORT: String(appPort) })
  await app.listening()
  const nginx = new Program(t, cwd, 'nginx', ['-p', cwd, '-c', join(cwd, 'nginx.conf')])
  const url = `http://127.0.0.1:${port}/webhooks/openai`
  while (await send(url).then(({ status }) => status !== 200, () => true)) await sleep(20)

  t.same(await send(url, 'batch.completed', { headers: { 'x-forwarded-for': '198.51.100.7' }, from: '127.0.0.2' }), RECEIVED)
  await app.until(/"ip":"127\.0\.0\.2"/)
  t.notMatch(app.output, /"ip":"198\.51\.100\.7/, 'what a stranger names is not believed')
  t.match(await send(url, 'batch.completed', { changed: '{}' }), { status: 401, body: /INVALID_SIGNATURE/ })
  t.match(await send(url, 'batch.completed', { changed: ' '.repeat(65_537) }), { status: 413, body: /nginx/ })
  t.match(await send(url, 'batch.completed', { headers: { 'x-long': 'x'.repeat(9_000) } }), { status: 400, body: /nginx/ })
  t.notMatch(app.output, /"statusCode":4(?:00|13)/, 'which the app has not seen')
  await nginx.end('SIGQUIT')
})
