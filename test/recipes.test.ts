import { once } from 'node:events'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import type { FastifyInstance, FastifyReply } from 'fastify'
import t from 'tap'
import type { Test } from 'tap'
import ts from 'typescript'
import type { OpenAIWebhookOptions } from '../lib/index.ts'
import { deliver, redeliver, sampleEvent, testSecret } from '../lib/testing/index.ts'
import { build } from './support/deliveries.ts'
import { codeBlocks, readDocument } from './support/docs.ts'
import { OpenAIServer } from './support/openai-server.ts'

const SECRET = { secret: testSecret }
const BUSY = { status: 503, body: { error: { message: 'busy', type: 'server_error', param: null, code: null } }, headers: { 'retry-after-ms': '1' } }

/** An app that runs the first code block under a heading of a document, as it stands there, against an API of its own. */
async function run (t: Test, path: string, heading: string, given: object, options: OpenAIWebhookOptions = {}): Promise<{ app: FastifyInstance, server: OpenAIServer }> {
  const document = readDocument(path)
  const start = document.text.split('\n').findIndex(line => line.replace(/^#+ /, '') === heading)
  const { code } = codeBlocks(document).find(({ line }) => line > start)!
  const { outputText } = ts.transpileModule(code, { compilerOptions: { target: ts.ScriptTarget.ES2023, module: ts.ModuleKind.ESNext } })

  const server = await OpenAIServer.start(t)
  const app = await build(t, { ...SECRET, ...options })
  t.intercept(process, 'env', { value: { ...process.env, OPENAI_API_KEY: server.apiKey, OPENAI_BASE_URL: server.url } })
  const names = { app, ...given }
  t.intercept(globalThis, 'recipe' as keyof typeof globalThis, { value: names as never, configurable: true })
  const dir = t.testdir({ 'recipe.mjs': `const { ${Object.keys(names).join(', ')} } = globalThis.recipe\n${outputText}` })
  await import(pathToFileURL(join(dir, 'recipe.mjs')).href)
  return { app, server }
}

const RESOURCES = 'docs/recipes/resources.md'
const REALTIME = 'docs/recipes/realtime.md'

t.test('responses: the text is fetched and kept under the webhook-id, once the API answers', async t => {
  const saved: object[] = []
  const { app, server } = await run(t, RESOURCES, 'Responses', { saveAnswer: async (answer: object) => { saved.push(answer) } })
  server.resources.set('GET /v1/responses/resp_1', {
    object: 'response',
    id: 'resp_1',
    incomplete_details: { reason: 'max_output_tokens' },
    output: [{ type: 'message', role: 'assistant', content: [{ type: 'output_text', text: 'Hello', annotations: [] }, { type: 'output_text', text: ', you', annotations: [] }] }]
  })

  server.answers.push(BUSY, BUSY, BUSY)
  const event = sampleEvent('response.incomplete', { data: { id: 'resp_1' } })
  const failed = await deliver(app, event, { webhookId: 'wh_1' })
  t.equal(failed.statusCode, 500)
  t.equal(server.requests.length, 3, 'the SDK asks again by itself')

  const retried = await redeliver(app, failed)
  t.same([retried.statusCode, retried.json()], [200, { received: true }])
  t.same(saved, [{ webhookId: 'wh_1', responseId: 'resp_1', text: 'Hello, you', cutBy: 'max_output_tokens' }])
  t.same((await redeliver(app, retried)).json(), { received: true, duplicate: true })
  t.equal(server.requests.length, 4)

  server.resources.set('GET /v1/responses/resp_2', { object: 'response', id: 'resp_2', error: { code: 'server_error', message: 'no' }, output: [] })
  t.equal((await deliver(app, sampleEvent('response.failed', { data: { id: 'resp_2' } }))).statusCode, 200)
  t.equal(saved.length, 1)
})

t.test('batches: every line of both files is kept, though a file broke off at first', async t => {
  const rows = new Map<string, object>()
  const { app, server } = await run(t, RESOURCES, 'Batches', {
    saveResult: async ({ batch, request, ...result }: { batch: string, request: string }) => { rows.set(`${batch} ${request}`, result) }
  })
  const line = (request: string, response: object | null, error: object | null = null): string =>
    `${JSON.stringify({ id: `batch_req_${request}`, custom_id: request, response, error })}\n`
  const good = line('é-1', { status_code: 200, request_id: 'req_1', body: { answer: 'naïve' } }) + line('2', { status_code: 200, request_id: 'req_2', body: {} })
  const bad = line('3', { status_code: 400, request_id: 'req_3', body: { error: {} } }) + '\n' + line('4', null, { code: 'batch_expired', message: 'late' }).trimEnd()
  server.resources.set('GET /v1/batches/batch_1', { object: 'batch', id: 'batch_1', output_file_id: 'file-good', error_file_id: 'file-bad' })
  server.resources.set('GET /v1/files/file-bad/content', bad)
  server.resources.set('GET /v1/files/file-good/content', reply => {
    reply.hijack()
    reply.raw.writeHead(200, { 'content-length': Buffer.byteLength(good) })
    // Within a character.
    reply.raw.write(Buffer.from(good).subarray(0, Buffer.from(good).indexOf(0xc3, 60) + 1), () => { reply.raw.destroy() })
  })

  const failed = await deliver(app, sampleEvent('batch.expired', { data: { id: 'batch_1' } }))
  t.equal(failed.statusCode, 500)

  server.resources.set('GET /v1/files/file-good/content', good)
  t.equal((await redeliver(app, failed)).statusCode, 200)
  t.same(Object.fromEntries(rows), {
    'batch_1 é-1': { status: 200, body: { answer: 'naïve' }, error: null },
    'batch_1 2': { status: 200, body: {}, error: null },
    'batch_1 3': { status: 400, body: { error: {} }, error: { code: null, message: '' } },
    'batch_1 4': { status: undefined, body: undefined, error: { code: 'batch_expired', message: 'late' } }
  })

  server.resources.set('GET /v1/batches/batch_2', { object: 'batch', id: 'batch_2', output_file_id: null, error_file_id: null, errors: { data: [{ code: 'invalid_json_line' }] } })
  for (const type of ['batch.completed', 'batch.failed'] as const) {
    t.equal((await deliver(app, sampleEvent(type, { data: { id: 'batch_2' } }))).statusCode, 200, `${type} without files`)
  }
  t.equal(rows.size, 4)
})

t.test('batches: what is being fetched is given up when the app has to close', async t => {
  const { app, server } = await run(t, RESOURCES, 'Batches', { saveResult: async () => {} }, { closeTimeout: 1 })
  server.resources.set('GET /v1/batches/batch_1', { object: 'batch', id: 'batch_1', output_file_id: 'file-1' })
  const asked = new Promise<{ gone: Promise<unknown> }>(resolve => {
    server.resources.set('GET /v1/files/file-1/content', reply => {
      reply.hijack()
      reply.raw.writeHead(200).write('{')
      resolve({ gone: once(reply.raw, 'close') })
    })
  })
  const failures: unknown[] = []
  app.openaiWebhook.onError(error => { failures.push(error) })
  const answer = deliver(app, sampleEvent('batch.completed', { data: { id: 'batch_1' } }))
  const { gone } = await asked
  await app.close()
  await gone
  t.not((await answer).statusCode, 200, 'so that it comes again')
  t.equal(failures.length, 1)
})

t.test('fine-tuning jobs: a model is deployed when there is one', async t => {
  const deployed: object[] = []
  const { app, server } = await run(t, RESOURCES, 'Fine-tuning jobs', { deployModel: async (model: object) => { deployed.push(model) } })
  server.resources.set('GET /v1/fine_tuning/jobs/ftjob-1', { id: 'ftjob-1', status: 'succeeded', fine_tuned_model: 'ft:gpt:1', error: null })
  server.resources.set('GET /v1/fine_tuning/jobs/ftjob-2', { id: 'ftjob-2', status: 'failed', fine_tuned_model: null, error: { code: 'bad', message: 'bad data' } })
  t.equal((await deliver(app, sampleEvent('fine_tuning.job.succeeded', { data: { id: 'ftjob-1' } }), { webhookId: 'wh_1' })).statusCode, 200)
  t.equal((await deliver(app, sampleEvent('fine_tuning.job.failed', { data: { id: 'ftjob-2' } }))).statusCode, 200)
  t.same(deployed, [{ webhookId: 'wh_1', model: 'ft:gpt:1' }])
})

t.test('when the API fails: what is gone is acknowledged, anything else comes again', async t => {
  const { app, server } = await run(t, RESOURCES, "When OpenAI's API fails", { saveAnswer: async () => {} })
  const event = sampleEvent('response.completed', { data: { id: 'resp_gone' } })
  t.equal((await deliver(app, event)).statusCode, 200)
  server.answers.push({ status: 401, body: { error: { message: 'no', type: 'x', param: null, code: 'invalid_api_key' } } })
  t.equal((await deliver(app, event)).statusCode, 500)
})

t.test('realtime: a call is accepted or rejected while it rings', async t => {
  const { app, server } = await run(t, REALTIME, 'Answering calls', { isCustomer: async (number: string) => number === '+14255550100' })
  const done = (reply: { code: (status: number) => { send: () => unknown } }): unknown => reply.code(200).send()
  server.resources.set('POST /v1/realtime/calls/rtc_1/accept', done)
  server.resources.set('POST /v1/realtime/calls/rtc_2/reject', done)
  const call = (callId: string, from: string, age = 0): object => sampleEvent('realtime.call.incoming', {
    created_at: Math.floor(Date.now() / 1000) - age,
    data: { call_id: callId, sip_headers: [{ name: 'Call-ID', value: 'x' }, { name: 'FROM', value: from }] }
  })

  const customer = await deliver(app, call('rtc_1', '"Ada" <sip:+14255550100@sip.example.com>;tag=1'))
  t.equal(customer.statusCode, 200)
  t.equal((await redeliver(app, customer)).statusCode, 200)
  t.equal((await deliver(app, call('rtc_2', 'sip:anonymous@sip.example.com'))).statusCode, 200)
  t.same(server.requests.map(({ call, body }) => ({ call, body })), [
    { call: 'POST /v1/realtime/calls/rtc_1/accept', body: { type: 'realtime', model: 'gpt-realtime', instructions: 'You answer the phone of a bicycle shop.' } },
    { call: 'POST /v1/realtime/calls/rtc_2/reject', body: { status_code: 603 } }
  ], 'each once')

  t.equal((await deliver(app, call('rtc_3', 'sip:+14255550100@sip.example.com'))).statusCode, 200, 'the caller has hung up: 404')
  t.equal(server.requests.length, 3)
  t.equal((await deliver(app, call('rtc_1', 'sip:+14255550100@sip.example.com', 60))).statusCode, 200, 'nobody rings that long')
  t.equal(server.requests.length, 3)
  server.answers.push(BUSY)
  t.equal((await deliver(app, call('rtc_1', 'sip:+14255550100@sip.example.com'))).statusCode, 500)
  t.equal(server.requests.length, 4, 'no second attempt while the sender waits')
})

t.test('realtime: no request is given up within 10 s', async t => {
  const timeouts = [...readDocument(REALTIME).text.matchAll(/timeout: ([\d_]+)/g)].map(([, ms]) => Number(ms!.replaceAll('_', '')))
  t.ok(timeouts.length > 0)
  for (const ms of timeouts) t.ok(ms >= 10_000, `${ms} ms`)
})

t.test('realtime: an accept that outlasts the deadline runs on, and the retry joins it', async t => {
  const { app, server } = await run(t, REALTIME, 'Answering calls', { isCustomer: async () => true }, { deadline: 20 })
  const accepting = new Promise<FastifyReply['raw']>(resolve => {
    server.resources.set('POST /v1/realtime/calls/rtc_1/accept', reply => {
      reply.hijack()
      resolve(reply.raw)
    })
  })
  const late = await deliver(app, sampleEvent('realtime.call.incoming', { data: { call_id: 'rtc_1' } }))
  t.match(late.json(), { statusCode: 503, code: 'FST_OPENAI_WEBHOOK_DEADLINE' })
  const answer = await accepting
  t.equal((await redeliver(app, late)).statusCode, 503, 'so is a retry while it goes on')

  answer.writeHead(200).end()
  let retried = late
  while (retried.statusCode === 503) retried = await redeliver(app, late)
  t.same([retried.statusCode, retried.json().received], [200, true])
  t.equal(server.requests.length, 1, 'accepted once')
})

t.test('realtime: a Live session is accepted, unless it waits no longer', async t => {
  const { app, server } = await run(t, REALTIME, 'Live sessions', {})
  const SESSION = 'POST /v1/live/sessions/live_1/accept'
  server.resources.set(SESSION, reply => reply.code(200).send())
  const incoming = sampleEvent('live.transport.incoming', { data: { session_id: 'live_1' } })
  t.equal((await deliver(app, incoming)).statusCode, 200)
  t.same(server.requests.map(({ call, body }) => ({ call, body })), [
    { call: SESSION, body: { session: { type: 'live', model: 'gpt-live-1', instructions: 'You answer the phone of a bicycle shop.' } } }
  ])

  const CONFLICT = { status: 409, body: { error: { message: 'accepted', type: 'invalid_request_error', param: null, code: null } } }
  server.answers.push(CONFLICT)
  t.equal((await deliver(app, sampleEvent('live.call.incoming', { data: { session_id: 'live_1' } }))).statusCode, 200, 'the Realtime API was first')
  server.answers.push(BUSY)
  t.equal((await deliver(app, incoming)).statusCode, 500)
  t.equal(server.requests.length, 3)

  t.equal((await deliver(app, { ...incoming, created_at: incoming.created_at - 60 })).statusCode, 200, 'nobody rings that long')
  t.equal((await deliver(app, sampleEvent('live.transport.connected'))).statusCode, 200)
  t.equal(server.requests.length, 3)
})
