import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import type { FastifyReply } from 'fastify'
import OpenAI from 'openai'
import t from 'tap'
import type { Test } from 'tap'
import { batchResults } from '../../lib/resources/index.ts'
import type { BatchEvent, BatchLike, BatchResult, BatchResultsOptions } from '../../lib/resources/index.ts'
import { sampleEvent } from '../../lib/testing/index.ts'
import { OpenAIServer } from '../support/openai-server.ts'
import { sized } from '../support/size.ts'

const MB = 1_048_576

const line = (customId: string, response: object | null, error: object | null = null): string =>
  `${JSON.stringify({ id: `batch_req_${customId}`, custom_id: customId, response, error })}\n`
const ok = (body: object): object => ({ status_code: 200, request_id: 'req_1', body })

interface Under {
  server: OpenAIServer
  client: OpenAI
  /** Reads everything, from an event of the batch `batch_1` or from what is given. */
  read: (options?: BatchResultsOptions, of?: BatchLike | BatchEvent) => Promise<Array<BatchResult<OpenAI>>>
  /** What has come before it failed, and how it did. */
  fails: (options?: BatchResultsOptions) => Promise<{ read: string[], error: unknown }>
  /** Serves the output file. */
  serve: (file: string | ((reply: FastifyReply) => unknown)) => void
}

const EVENT = sampleEvent('batch.completed', { data: { id: 'batch_1' } })

async function setUp (t: Test, batch: object = {}): Promise<Under> {
  const server = await OpenAIServer.start(t)
  const client = new OpenAI({ apiKey: server.apiKey, baseURL: server.url, maxRetries: 0 })
  server.resources.set('GET /v1/batches/batch_1', {
    object: 'batch', id: 'batch_1', status: 'completed', endpoint: '/v1/responses', output_file_id: 'file-1', error_file_id: null, ...batch
  })
  const under: Under = {
    server,
    client,
    async read (options, of = EVENT) {
      const results = []
      for await (const result of batchResults(client, of, options)) results.push(result)
      return results
    },
    async fails (options) {
      const read: string[] = []
      try {
        for await (const { customId } of batchResults(client, EVENT, options)) read.push(customId)
      } catch (error) {
        return { read, error }
      }
      throw new Error('expected a failure')
    },
    serve (file) { server.resources.set('GET /v1/files/file-1/content', file) }
  }
  return under
}

t.test('every line of both files, in their order, with what it answered or failed with', async t => {
  const { server, read, client } = await setUp(t, { status: 'expired', error_file_id: 'file-2' })
  server.resources.set('GET /v1/files/file-1/content', line('é-1', ok({ object: 'response', text: 'naïve' })) + '\r\n  \n' + line('2', { status_code: 201, body: {} }).trimEnd())
  server.resources.set('GET /v1/files/file-2/content',
    line('3', { status_code: 400, request_id: 'req_3', body: { error: { code: 'bad', message: 'no such model', param: 'model' } } }) +
    line('4', { status_code: 500, request_id: 'req_4', body: 'oops' }) +
    line('5', null, { code: 'batch_expired', message: 'late' }) +
    '{"custom_id":"6","error":{}}\n')

  const expected = [
    { customId: 'é-1', id: 'batch_req_é-1', file: 'output', line: 1, requestId: 'req_1', endpoint: '/v1/responses', status: 200, body: { object: 'response', text: 'naïve' }, error: null },
    { customId: '2', id: 'batch_req_2', file: 'output', line: 4, requestId: undefined, endpoint: '/v1/responses', status: 201, body: {}, error: null },
    {
      customId: '3',
      id: 'batch_req_3',
      file: 'error',
      line: 1,
      requestId: 'req_3',
      endpoint: '/v1/responses',
      status: 400,
      body: { error: { code: 'bad', message: 'no such model', param: 'model' } },
      error: { code: 'bad', message: 'no such model' }
    },
    { customId: '4', id: 'batch_req_4', file: 'error', line: 2, requestId: 'req_4', endpoint: '/v1/responses', status: 500, body: 'oops', error: { code: null, message: 'the request was answered 500' } },
    { customId: '5', id: 'batch_req_5', file: 'error', line: 3, requestId: undefined, endpoint: '/v1/responses', status: undefined, body: undefined, error: { code: 'batch_expired', message: 'late' } },
    { customId: '6', id: undefined, file: 'error', line: 4, requestId: undefined, endpoint: '/v1/responses', status: undefined, body: undefined, error: { code: null, message: '' } }
  ]
  t.same(await read(), expected)
  t.same(server.calls, ['GET /v1/batches/batch_1', 'GET /v1/files/file-1/content', 'GET /v1/files/file-2/content'])

  // The batch itself needs no call.
  t.same(await read({}, await client.batches.retrieve('batch_1')), expected)
  t.same(server.calls.slice(3), ['GET /v1/batches/batch_1', 'GET /v1/files/file-1/content', 'GET /v1/files/file-2/content'])
})

t.test('a batch without files has no results; one that goes on is no batch to read yet', async t => {
  const { server, read, fails } = await setUp(t, { status: 'failed', output_file_id: undefined })
  t.same(await read(), [])
  t.same(await read({}, { endpoint: '/v1/embeddings' }), [])
  for (const status of ['in_progress', 'finalizing', 'cancelling']) {
    server.resources.set('GET /v1/batches/batch_1', { object: 'batch', id: 'batch_1', status, endpoint: '/v1/responses' })
    t.match((await fails()).error, { code: 'FST_OPENAI_WEBHOOK_BATCH_NOT_ENDED' }, status)
  }
})

t.test('an empty file has no results', async t => {
  const { read, serve } = await setUp(t)
  serve('')
  t.same(await read(), [])
})

t.test('wrong options and other events are refused before anything is asked', async t => {
  const { server, read } = await setUp(t)
  for (const options of [{ idleTimeout: 0 }, { idleTimeout: 2 ** 31 }, { lineLimit: 1.5 }, { lineLimit: '5' as never }]) {
    await t.rejects(read(options), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS' })
  }
  for (const of of ['batch_1', 7, null]) await t.rejects(read({}, of as never), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: /^batchResults\(\): expected a batch or an event of one, got a value of type/ })
  for (const of of [sampleEvent('batch.completed'), { endpoint: '/v1/responses' }]) {
    await t.rejects(batchResults(undefined as never, of as never).next(), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: 'batchResults(): expected a client of the openai package as the first argument, got undefined' })
  }
  for (const of of [{}, { id: 'batch_1' }]) await t.rejects(read({}, of as never), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: /none of endpoint, status and the ids of files/ })
  await t.rejects(read({}, { type: 'batch.failed', data: {} } as never), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: /^batchResults\(\): expected event\.data\.id/ })
  await t.rejects(read({}, sampleEvent('response.completed') as never), { code: 'FST_OPENAI_WEBHOOK_NO_RESOURCE', message: /expects a batch/ })
  await t.rejects(read({ signal: AbortSignal.abort(new Error('enough')) }), { message: 'enough' })
  t.same(server.calls, [])
})

t.test('a bad line is told by its number, never by what it says', async t => {
  const { fails, serve } = await setUp(t)
  const bad = [
    'not json SECRET', '[1,"SECRET"]', '7', 'null', '"SECRET"', '{"custom_id":7,"response":null,"error":{}}', '{"response":null,"error":{}}',
    '{"custom_id":"x","response":null,"error":null}', '{"custom_id":"x"}', '{"custom_id":"x","response":"SECRET"}', '{"custom_id":"x","response":{"status_code":"200"}}',
    '{"custom_id":"x","response":{"body":"SECRET"}}', '{"custom_id":"x","error":"SECRET"}', '{"custom_id":"x","response":[]}',
    Buffer.from('{"custom_id":"\xff","error":{}}', 'latin1'), '{"custom_id":"SECRET","error":{}} {'
  ]
  for (const each of bad) {
    const file = Buffer.concat([Buffer.from(line('1', ok({}))), Buffer.from(each), Buffer.from(`\n${line('3', ok({}))}`)])
    serve(reply => reply.type('application/octet-stream').send(file))
    const { read, error } = await fails()
    t.same(read, ['1'])
    t.match(error, { code: 'FST_OPENAI_WEBHOOK_INVALID_BATCH_LINE', message: /^line 2 of the batch's output file is not a result: expected / })
    t.notMatch(JSON.stringify([String(error), (error as Error).stack, (error as Error).cause]), 'SECRET')
  }
})

t.test('a line is held in memory up to lineLimit', async t => {
  const { fails, read, serve } = await setUp(t)
  const [short, long] = [line('1', ok({})), line('2', ok({ text: 'x'.repeat(100_000) }))]
  serve(short + long + short)
  t.equal((await read({ lineLimit: long.length - 1 })).length, 3)
  for (const file of [short + long + short, short + long.trimEnd()]) {
    serve(file)
    const failed = await fails({ lineLimit: long.length - 2 })
    t.same(failed.read, ['1'])
    t.match(failed.error, { code: 'FST_OPENAI_WEBHOOK_BATCH_LINE_TOO_LONG', message: `line 2 of the batch's output file is longer than lineLimit, which is ${long.length - 2} bytes` })
  }
  serve(long)
  t.match((await fails({ lineLimit: 10 })).error, { code: 'FST_OPENAI_WEBHOOK_BATCH_LINE_TOO_LONG' })
})

/** Sends a part of a file and leaves the rest; resolves once the client has gone. */
function partly (reply: FastifyReply, part: string | Buffer, headers: Record<string, string | number> = {}, status = 200): Promise<unknown> {
  reply.hijack()
  reply.raw.writeHead(status, headers).write(part)
  return once(reply.raw, 'close')
}

t.test('a body that stalls ends at idleTimeout, and its connection with it', async t => {
  const { fails, serve } = await setUp(t)
  let gone: Promise<unknown> | undefined
  serve(reply => { gone = partly(reply, line('1', ok({})) + '{"cust') })
  const { read, error } = await fails({ idleTimeout: 50 })
  t.same(read, ['1'])
  t.match(error, { code: 'FST_OPENAI_WEBHOOK_BATCH_STALLED', message: 'no byte of the batch\'s output file has come for 50 ms' })
  await gone
})

t.test('a consumer may take its time', async t => {
  const { client, serve } = await setUp(t)
  serve(reply => {
    reply.hijack()
    reply.raw.writeHead(200).write(line('1', ok({})))
    released.then(() => reply.raw.end(line('2', ok({}))))
  })
  let release = (): void => {}
  const released = new Promise<void>(resolve => { release = resolve })
  const read: string[] = []
  for await (const { customId } of batchResults(client, EVENT, { idleTimeout: 200 })) {
    read.push(customId)
    // Longer than idleTimeout, while nothing is being read.
    if (customId === '1') await new Promise(resolve => setTimeout(resolve, 400))
    release()
  }
  t.same(read, ['1', '2'])
})

t.test('the signal ends it with its reason, and the connection with it', async t => {
  const { client, serve } = await setUp(t)
  let gone: Promise<unknown> | undefined
  const abort = new AbortController()
  serve(reply => { gone = partly(reply, line('1', ok({}))) })
  const read: string[] = []
  await t.rejects(async () => {
    for await (const { customId } of batchResults(client, EVENT, { signal: abort.signal })) {
      read.push(customId)
      // Once the next read waits.
      setImmediate(() => abort.abort(new Error('closing')))
    }
  }, { message: 'closing' })
  t.same(read, ['1'])
  await gone

  const between = new AbortController()
  serve(line('1', ok({})) + line('2', ok({})))
  await t.rejects(async () => {
    for await (const { error } of batchResults(client, EVENT, { signal: between.signal })) between.abort(error ?? new Error('closing'))
  }, { message: 'closing' })
})

t.test('a consumer that breaks the loop ends the connection', async t => {
  const { client, serve } = await setUp(t)
  let gone: Promise<unknown> | undefined
  serve(reply => { gone = partly(reply, line('1', ok({})) + line('2', ok({}))) })
  for await (const { customId } of batchResults(client, EVENT)) if (customId === '1') break
  await gone
  t.pass('the server sees it go')
})

t.test('the SDK\'s errors come as they are, when the file is asked for', async t => {
  const { fails, server } = await setUp(t)
  t.match((await fails()).error, { status: 404 })
  server.resources.delete('GET /v1/batches/batch_1')
  t.match((await fails()).error, { status: 404 })
})

/** A file that breaks off again and again, and is resumed by Range. */
function breaking (file: Buffer, breaksAt: (asked: number, from: number) => number, { etag }: { etag?: string } = {}): (reply: FastifyReply) => void {
  let asked = 0
  return reply => {
    const from = Number(/^bytes=(\d+)-$/.exec(String(reply.request.headers.range))?.[1] ?? 0)
    const to = breaksAt(asked++, from)
    reply.hijack()
    reply.raw.writeHead(from === 0 ? 200 : 206, {
      'content-length': file.length - from,
      ...(from > 0 && { 'content-range': `bytes ${from}-${file.length - 1}/${file.length}` }),
      ...(etag !== undefined && { etag })
    })
    if (to >= file.length) reply.raw.end(file.subarray(from))
    else if (to > from) reply.raw.write(file.subarray(from, to), () => reply.raw.destroy())
    else { reply.raw.flushHeaders(); setTimeout(() => reply.raw.destroy(), 5) }
  }
}

const MANY = Buffer.from(Array.from({ length: 50 }, (_, i) => line(`é${i}`, ok({ i }))).join(''))
const ALL = Array.from({ length: 50 }, (_, i) => `é${i}`)

t.test('a body that breaks off is resumed where it broke, with no line twice', async t => {
  const { read, serve, server } = await setUp(t)
  // Wherever it breaks: within a line, within a character, at a newline.
  for (const step of [1_000, 1_777, MANY.indexOf(0xc3, 400) + 1, MANY.indexOf('\n', 500) + 1]) {
    server.requests.length = 0
    serve(breaking(MANY, (_asked, from) => from + step, { etag: '"v1"' }))
    t.same((await read()).map(({ customId }) => customId), ALL)
    const asked = server.requests.slice(1).map(({ headers }) => headers)
    t.ok(asked.length > 1)
    t.same(asked.map(headers => headers['range']), [undefined, ...asked.slice(1).map((_, i) => `bytes=${(i + 1) * step}-`)])
    t.same(new Set(asked.slice(1).map(headers => headers['if-range'])), new Set(['"v1"']), 'the same file')
    t.same(new Set(asked.map(headers => headers['accept-encoding'])), new Set(['identity']), 'whose bytes are counted')
  }

  serve(breaking(MANY, (asked, from) => asked % 2 === 0 ? from + 1_000 : from, { etag: 'W/"weak"' }))
  t.same((await read()).map(({ customId }) => customId), ALL, 'though not every resumption brings a byte')
  t.equal(server.requests.at(-1)!.headers['if-range'], undefined)
})

t.test('an ETag that is weak in one answer and strong in the other is that of the same file', async t => {
  const { read, serve } = await setUp(t)
  for (const [first, then] of [['W/"1"', '"1"'], ['"1"', 'W/"1"']] as const) {
    serve(reply => {
      reply.hijack()
      if (reply.request.headers.range === undefined) reply.raw.writeHead(200, { 'content-length': MANY.length, etag: first }).write(MANY.subarray(0, 1_000), () => reply.raw.destroy())
      else reply.raw.writeHead(206, { 'content-range': `bytes 1000-${MANY.length - 1}/${MANY.length}`, etag: then }).end(MANY.subarray(1_000))
    })
    t.same((await read()).map(({ customId }) => customId), ALL)
  }
})

t.test('a body of unknown length is resumed likewise, until the server says that there is no more', async t => {
  const { read, serve, server, fails } = await setUp(t)
  const unsaid = (end: Record<string, string>, step: number) => (reply: FastifyReply) => {
    reply.hijack()
    const from = Number(/bytes=(\d+)-/.exec(reply.request.headers.range ?? '')?.[1] ?? 0)
    if (from === 0) reply.raw.writeHead(200).write(MANY.subarray(0, 1_000), () => reply.raw.destroy())
    else if (from >= MANY.length) reply.raw.writeHead(416, end).end()
    else reply.raw.writeHead(206, { 'content-range': `bytes ${from}-${Math.min(from + step, MANY.length) - 1}/*` }).end(MANY.subarray(from, from + step))
  }
  for (const step of [MANY.length, 1_500]) {
    for (const end of [{}, { 'content-range': `bytes */${MANY.length}` }]) {
      server.requests.length = 0
      serve(unsaid(end, step))
      t.same((await read()).map(({ customId }) => customId), ALL)
      t.equal(server.requests.at(-1)!.headers['range'], `bytes=${MANY.length}-`)
    }
  }
  serve(unsaid({ 'content-range': `bytes */${MANY.length + 1}` }, MANY.length))
  t.match((await fails()).error, { code: 'FST_OPENAI_WEBHOOK_BATCH_BROKEN' }, 'of a file of another length')
  serve(unsaid({}, 0))
  t.match((await fails()).error, { code: 'FST_OPENAI_WEBHOOK_BATCH_BROKEN', cause: { message: 'the body ended before the unknown number of bytes of the file' } }, 'that brings nothing more')
})

t.test('a server may answer with less than was asked for', async t => {
  const { read, serve } = await setUp(t)
  for (const length of [{}, { 'content-length': MANY.length }]) {
    serve(reply => {
      reply.hijack()
      const from = Number(/bytes=(\d+)-/.exec(reply.request.headers.range ?? '')?.[1] ?? 0)
      if (from === 0) reply.raw.writeHead(200, length).write(MANY.subarray(0, 1_000), () => reply.raw.destroy())
      else reply.raw.writeHead(206, { 'content-range': `bytes ${from}-${Math.min(from + 999, MANY.length - 1)}/${MANY.length}` }).end(MANY.subarray(from, from + 1_000))
    })
    t.same((await read()).map(({ customId }) => customId), ALL)
  }
})

t.test('where the server does not resume it, it is broken', async t => {
  const { serve, server, fails } = await setUp(t)
  const cases: Record<string, { first?: Record<string, string>, then: (reply: FastifyReply) => unknown, asked?: number, cause?: object }> = {
    'the whole file again': { then: reply => reply.send(MANY), cause: { message: 'asked for the rest, the server answered 200 with the content-range (none)' } },
    'another part': { then: reply => partly(reply, MANY.subarray(990), { 'content-range': `bytes 990-${MANY.length - 1}/${MANY.length}` }, 206) },
    'of a file of another length': { then: reply => partly(reply, MANY.subarray(1_000), { 'content-range': `bytes 1000-${MANY.length}/${MANY.length + 1}` }, 206) },
    'a part of no place': { then: reply => partly(reply, MANY.subarray(1_000), {}, 206) },
    'of another version of the file': {
      first: { etag: 'W/"1"' },
      then: reply => partly(reply, MANY.subarray(1_000), { 'content-range': `bytes 1000-${MANY.length - 1}/${MANY.length}`, etag: 'W/"2"' }, 206),
      cause: { message: 'asked for the rest, the server answered with another etag: the file has changed' }
    },
    'of another time of change, where there is no version': {
      first: { 'last-modified': 'Mon, 01 Jan 2024 00:00:00 GMT' },
      then: reply => partly(reply, MANY.subarray(1_000), { 'content-range': `bytes 1000-${MANY.length - 1}/${MANY.length}`, 'last-modified': 'Tue, 02 Jan 2024 00:00:00 GMT' }, 206),
      cause: { message: 'asked for the rest, the server answered with another last-modified: the file has changed' }
    },
    'a part in another encoding': {
      then: reply => partly(reply, MANY.subarray(1_000), { 'content-range': `bytes 1000-${MANY.length - 1}/${MANY.length}`, 'content-encoding': 'x-own' }, 206),
      cause: { message: 'asked for the rest, the server answered with the content-encoding x-own' }
    },
    'no body': { then: reply => reply.code(204).send(), cause: { message: 'the server answered without a body' } },
    'a refusal': { then: reply => reply.code(416).send({ error: { message: 'no', type: 'x', param: null, code: null } }) },
    'ranges that it says it has not': { first: { 'accept-ranges': 'none' }, then: () => {}, asked: 1 },
    'an encoding, whose bytes are others': { first: { 'content-encoding': 'x-own' }, then: () => {}, asked: 1 },
    'nothing, again and again': { then: breaking(MANY, () => 0), asked: 4 }
  }
  for (const [name, { first, then, asked = 2, cause = Error }] of Object.entries(cases)) {
    server.requests.length = 0
    serve(reply => {
      if (reply.request.headers.range !== undefined) return then(reply)
      reply.hijack()
      reply.raw.writeHead(200, { 'content-length': MANY.length, ...first }).write(MANY.subarray(0, 1_000), () => reply.raw.destroy())
    })
    const { read, error } = await fails()
    t.ok(read.length > 0 && read.length < 50, name)
    t.match(error, { code: 'FST_OPENAI_WEBHOOK_BATCH_BROKEN', message: 'output file broke off after 1000 bytes', cause }, name)
    t.equal(server.requests.length - 1, asked, name)
  }
})

t.test('a part in place of the file, or more than the file, is broken', async t => {
  const { serve, fails } = await setUp(t)
  serve(reply => partly(reply, MANY.subarray(0, 1_000), { 'content-range': `bytes 0-999/${MANY.length}` }, 206))
  t.match(await fails(), { read: [], error: { code: 'FST_OPENAI_WEBHOOK_BATCH_BROKEN', cause: { message: 'asked for the file, the server answered with a part of it (status 206)' } } })
  serve(reply => {
    reply.hijack()
    if (reply.request.headers.range === undefined) reply.raw.writeHead(200, { 'content-length': MANY.length }).write(MANY.subarray(0, 1_000), () => reply.raw.destroy())
    else reply.raw.writeHead(206, { 'content-range': `bytes 1000-${MANY.length - 1}/${MANY.length}` }).end(Buffer.concat([MANY.subarray(1_000), Buffer.from(line('more', ok({})))]))
  })
  t.match((await fails()).error, { code: 'FST_OPENAI_WEBHOOK_BATCH_BROKEN', cause: { message: `the server sent more than the ${MANY.length} bytes of the file` } })
})

t.test('the signal ends a resumption too', async t => {
  const { serve, fails } = await setUp(t)
  const abort = new AbortController()
  serve(reply => {
    reply.hijack()
    if (reply.request.headers.range === undefined) reply.raw.writeHead(200).write(MANY.subarray(0, 1_000), () => reply.raw.destroy())
    else abort.abort(new Error('closing'))
  })
  t.match((await fails({ signal: abort.signal })).error, { message: 'closing' })
})

t.test('a resumption that the server does not answer ends at idleTimeout, and its connection with it', async t => {
  const { serve, fails } = await setUp(t)
  let gone: Promise<unknown> | undefined
  serve(reply => {
    reply.hijack()
    if (reply.request.headers.range === undefined) reply.raw.writeHead(200).write(MANY.subarray(0, 1_000), () => reply.raw.destroy())
    else gone = once(reply.raw, 'close')
  })
  const { read, error } = await fails({ idleTimeout: 200, signal: new AbortController().signal })
  t.ok(read.length > 0)
  t.match(error, { code: 'FST_OPENAI_WEBHOOK_BATCH_STALLED' })
  await gone
})

t.test('the signal ends the wait for headers with its reason', async t => {
  for (const path of ['GET /v1/batches/batch_1', 'GET /v1/files/file-1/content']) {
    const { server, fails } = await setUp(t)
    const abort = new AbortController()
    let gone: Promise<unknown> | undefined
    server.resources.set(path, (reply: FastifyReply) => {
      reply.hijack()
      gone = once(reply.raw, 'close')
      abort.abort(new Error('closing'))
    })
    t.match((await fails({ signal: abort.signal })).error, { message: 'closing' }, path)
    await gone
  }
})

t.test('an answer that is no batch, or no file', async t => {
  const { fails, server, serve } = await setUp(t)
  serve(reply => reply.code(204).send())
  t.match((await fails()).error, { code: 'FST_OPENAI_WEBHOOK_BATCH_BROKEN', cause: { message: 'the server answered without a body' } })
  for (const answer of [(reply: FastifyReply) => reply.code(204).send(), (reply: FastifyReply) => reply.type('text/html').send('<h1>secret</h1>')]) {
    server.resources.set('GET /v1/batches/batch_1', answer)
    const { error } = await fails()
    t.match(error, { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: /^batchResults\(\): expected a batch as the API gives it/ })
    t.notMatch(error, { message: /secret/ })
  }
})

t.test('an answer that was whole when it broke is whole, and one that ends early is not', async t => {
  const { client, server, read, fails } = await setUp(t)
  const answer = (end: 'close' | 'error', bytes: Buffer, length: number, ranges = 'bytes'): object => ({
    status: 200,
    headers: new Headers({ 'content-length': String(length), 'accept-ranges': ranges }),
    body: new ReadableStream({
      start: controller => controller.enqueue(bytes),
      pull: controller => { if (end === 'close') controller.close(); else controller.error(new Error('reset')) }
    })
  })
  // What a client with a fetch of its own may give.
  t.intercept(client.files, 'content', { value: async () => answer('error', MANY, MANY.length) })
  t.same((await read()).map(({ customId }) => customId), ALL)
  t.intercept(client.files, 'content', { value: async () => answer('close', MANY.subarray(0, 1_000), MANY.length, 'none') })
  t.match((await fails()).error, { code: 'FST_OPENAI_WEBHOOK_BATCH_BROKEN', cause: { message: `the body ended before the ${MANY.length} bytes of the file` } })
  t.equal(server.calls.length, 2)
})

t.test(`${sized(32, 2_048)} MB of lines go through a process of 128 MB`, async t => {
  const size = sized(32, 2_048) * MB
  const text = line('a-request', ok({ object: 'response', output: [{ type: 'message', content: [{ type: 'output_text', text: 'lorem ipsum '.repeat(80) }] }] }))
  const chunk = Buffer.from(text.repeat(Math.ceil(MB / text.length)))
  const chunks = Math.ceil(size / chunk.length)
  const server = createServer(async (_request, response) => {
    response.writeHead(200, { 'content-length': chunks * chunk.length })
    for (let i = 0; i < chunks; i++) if (!response.write(chunk)) await once(response, 'drain')
    response.end()
  })
  await once(server.listen(0, '127.0.0.1'), 'listening')
  t.teardown(() => server.close())
  const { port } = server.address() as AddressInfo
  const script = join(import.meta.dirname, '../support/processes/batch-reader.mjs')
  // By env: the test runner adds its loaders to what is spawned with Node, and they take 30 MB.
  const child = spawn('env', ['-i', process.execPath, '--max-old-space-size=64', '--max-semi-space-size=1', script, `http://127.0.0.1:${port}/v1`], {
    stdio: ['ignore', 'pipe', 'inherit']
  })
  let out = ''
  child.stdout.setEncoding('utf8').on('data', (text: string) => { out += text })
  const [code] = await once(child, 'close') as [number]
  t.equal(code, 0)
  const { lines, bytes, rss } = JSON.parse(out) as { lines: number, bytes: number, rss: number }
  t.equal(lines, chunks * chunk.length / text.length)
  t.equal(bytes, chunks * chunk.length)
  t.ok(rss < 128 * MB, `the process took ${Math.round(rss / MB)} MB`)
})
