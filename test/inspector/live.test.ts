import { EventEmitter, once } from 'node:events'
import { get } from 'node:http'
import type { ClientRequest, IncomingMessage } from 'node:http'
import { connect } from 'node:http2'
import type { Http2ServerResponse } from 'node:http2'
import type { AddressInfo } from 'node:net'
import Fastify from 'fastify'
import type { FastifyInstance, FastifyReply } from 'fastify'
import t from 'tap'
import openaiWebhook, { background } from '../../lib/index.ts'
import inspector from '../../lib/inspector/index.ts'
import { Live } from '../../lib/inspector/live.ts'
import type { Hello, Row, Stats } from '../../lib/inspector/messages.ts'
import { SECRET, post, sign, thin } from '../support/deliveries.ts'
import { inspected } from '../support/inspector.ts'

const EVENTS = '/openai-webhook/api/events'

interface Message { event: string, data: any }

/** Reads a stream of server-sent events, message by message. */
async function * messages (stream: AsyncIterable<unknown>): AsyncGenerator<Message> {
  let text = ''
  for await (const data of stream) {
    text += String(data)
    for (let end; (end = text.indexOf('\n\n')) !== -1; text = text.slice(end + 2)) {
      const [, event, json] = /^event: (\w+)\ndata: (.*)$/s.exec(text.slice(0, end))!
      yield { event: event!, data: JSON.parse(json!) }
    }
  }
}

async function look (app: FastifyInstance): Promise<{ request: ClientRequest, response: IncomingMessage, next: (event: string) => Promise<any>, iterator: AsyncGenerator<Message> }> {
  const { port } = app.server.address() as AddressInfo
  const request = get({ port, path: EVENTS, agent: false })
  const [response] = await once(request, 'response') as [IncomingMessage]
  const iterator = messages(response)
  const next = async (event: string): Promise<unknown> => {
    for (;;) {
      const { value } = await iterator.next() as { value: Message }
      if (value.event === event) return value.data
    }
  }
  return { request, response, next, iterator }
}

t.test('a page that looks is told what is there, then what changes, and figures', async t => {
  const app = await inspected(t, { runner: background() }, { max: 7 })
  app.openaiWebhook.on('batch.failed', () => {})
  await app.listen({ port: 0, host: '127.0.0.1' })
  await post(app, sign(thin('batch.failed')))
  const { response, next, request } = await look(app)
  t.match(response.headers, { 'content-type': 'text/event-stream; charset=utf-8', 'cache-control': 'no-store', connection: 'close', 'content-security-policy': String })
  const hello: Hello = await next('hello')
  t.match(hello, {
    readOnly: false,
    deadLetters: false,
    max: { deliveries: 7, refused: 7 },
    endpoints: [{ url: '/webhooks/openai', signs: true, tenants: false }],
    rows: [{ id: 1, type: 'batch.failed' }],
    stats: { depth: Number, dead: null, seconds: 5 }
  })
  t.ok(hello.types.includes('response.completed'))
  await post(app, sign(thin('batch.expired')))
  const rows: Row[] = await next('rows')
  t.match(rows.at(-1), { id: 2, type: 'batch.expired' })
  const stats: Stats = await next('stats')
  t.equal(stats.total.reduce((all, count) => all + count), 2)
  // Whatever happens between two messages, it is one.
  for (let i = 0; i < 50; i++) await post(app, sign(thin('batch.failed')))
  const many: Row[] = await next('rows')
  t.ok(many.length <= 7)
  request.destroy()
})

t.test('pages are bounded in number, and do not hold app.close()', async t => {
  const app = await inspected(t)
  await app.listen({ port: 0, host: '127.0.0.1' })
  const looking = []
  for (let i = 0; i < 20; i++) looking.push(await look(app))
  t.equal((await look(app)).response.statusCode, 503)
  const ends = looking.slice(1).map(async ({ response }) => { response.resume(); await once(response, 'end') })
  await app.close()
  await Promise.all(ends)
})

t.test('over HTTP/2 they do not hold app.close() either', async t => {
  const app = Fastify({ http2: true }) as unknown as FastifyInstance
  await app.register(openaiWebhook, { secret: SECRET })
  await app.register(inspector)
  await app.listen({ port: 0, host: '127.0.0.1' })
  const session = connect(`http://127.0.0.1:${(app.server.address() as AddressInfo).port}`)
  const stream = session.request({ ':path': EVENTS })
  const [headers] = await once(stream, 'response')
  t.match(headers, { ':status': 200, 'content-type': /event-stream/ })
  const iterator = messages(stream)
  t.equal((await iterator.next()).value.event, 'hello')
  await app.close()
  if (!session.closed) await once(session, 'close')
})

for (const http2 of [false, true]) {
  const over = http2 ? 'HTTP/2' : 'HTTP/1.1'
  const ask = ({ server }: FastifyInstance, headers = {}) => {
    const { port } = server.address() as AddressInfo
    if (!http2) return get({ port, path: EVENTS, agent: false, headers }).on('error', () => {})
    const session = connect(`http://127.0.0.1:${port}`)
    return session.request({ ':path': EVENTS, ...headers }).on('error', () => {}).on('close', () => { session.destroy() })
  }

  t.test(`pages that go away while onRequest decides take up no room, ${over}`, async t => {
    const app = Fastify({ http2 } as object) as unknown as FastifyInstance
    t.teardown(() => app.close())
    await app.register(openaiWebhook, { secret: SECRET })
    const decided: Array<Promise<unknown>> = []
    const arrivals = new EventEmitter()
    await app.register(inspector, {
      onRequest: async ({ headers }, { raw }) => {
        if (headers['x-leaves'] === undefined) return
        const gone = once(raw, 'close')
        decided.push(gone)
        arrivals.emit('one')
        await gone
      }
    })
    await app.listen({ port: 0, host: '127.0.0.1' })
    for (let i = 0; i < 20; i++) {
      const arrived = once(arrivals, 'one')
      const request = ask(app, { 'x-leaves': 'yes' })
      await arrived
      request.destroy()
    }
    await Promise.all(decided)
    const request = ask(app)
    const [answer] = await once(request, 'response') as [IncomingMessage | { ':status': number }]
    t.equal(':status' in answer ? answer[':status'] : answer.statusCode, 200)
    request.destroy()
  })

  t.test(`a reader that is paused costs no memory, ${over}`, async t => {
    const ticks: Array<() => void> = []
    t.capture(global, 'setInterval', ((tick: () => void) => {
      ticks.push(tick)
      return { unref () { return this } }
    }) as never)
    const live = new Live({ watch () {}, takeChanged: () => [{ type: 'x'.repeat(262_144) } as Row], stats: async () => ({}) as Stats })
    const app = Fastify({ http2 } as object) as unknown as FastifyInstance
    t.teardown(() => app.close())
    let raw: FastifyReply['raw']
    app.get(EVENTS, (_request, reply) => {
      raw = reply.raw
      live.open(reply, async () => ({}) as Hello).catch(t.error)
    })
    await app.listen({ port: 0, host: '127.0.0.1' })
    const request = ask(app)
    await once(request, 'response') // nobody reads on
    for (let nth = 0; nth < 80; nth++) { // 20 MB
      ticks.at(-1)!()
      await new Promise(resolve => setImmediate(resolve))
    }
    t.ok((http2 ? (raw! as unknown as Http2ServerResponse).stream : raw!).writableLength < 2 * 1_048_576)
    request.destroy()
    await once(raw!, 'close')
  })
}

/** A reply whose reader the test is. */
function fakeReply (): { reply: FastifyReply, written: string[], raw: EventEmitter & { writableNeedDrain: boolean } } {
  const written: string[] = []
  const raw = Object.assign(new EventEmitter(), {
    writableNeedDrain: false,
    writableEnded: false,
    writeHead () {},
    write (text: string) { written.push(/^event: (\w+)/.exec(text)![1]!) },
    end () { raw.writableEnded = true }
  })
  return { raw, written, reply: { raw, hijack () {}, getHeaders: () => ({}) } as unknown as FastifyReply }
}

t.test('a reader that is slow is told everything anew once it has caught up, and costs no memory meanwhile', async t => {
  t.capture(global, 'setInterval', ((tick: () => void) => {
    ticks.push(tick)
    return { unref () { return this } }
  }) as never)
  const ticks: Array<() => void> = []
  const watched: boolean[] = []
  const live = new Live({ watch: on => { watched.push(on) }, takeChanged: () => [{} as Row], stats: async () => ({}) as Stats })
  const { reply, raw, written } = fakeReply()
  await live.open(reply, async () => ({}) as Hello)
  t.equal(ticks.length, 1)
  const tick = async (): Promise<void> => {
    ticks[0]!()
    await new Promise(resolve => setImmediate(resolve))
  }
  await tick()
  t.same(written, ['hello', 'rows'])
  raw.writableNeedDrain = true
  await tick()
  await tick()
  t.same(written, ['hello', 'rows'])
  raw.writableNeedDrain = false
  await tick() // the fourth has figures too
  t.same(written, ['hello', 'rows', 'hello', 'stats'])
  raw.emit('error', new Error('gone'))
  raw.emit('close')
  t.same(watched, [true, false])
  await tick()
  t.equal(written.length, 4)
})

t.test('a page that goes away, or an app that closes, while the first message is put together', async t => {
  const live = new Live({ watch () {}, takeChanged: () => [], stats: async () => ({}) as Stats })
  const { reply, raw, written } = fakeReply()
  let answer = (_hello: Hello): void => {}
  const opened = live.open(reply, async () => await new Promise(resolve => { answer = resolve }))
  live.close()
  answer({} as Hello)
  await opened
  t.same(written, [])
  raw.emit('close')
  await t.rejects(live.open(fakeReply().reply, async () => ({}) as Hello), { code: 'FST_OPENAI_WEBHOOK_OVERLOADED' })
})
