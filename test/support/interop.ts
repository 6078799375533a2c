import { once } from 'node:events'
import http from 'node:http'
import http2 from 'node:http2'
import https from 'node:https'
import type { AddressInfo } from 'node:net'
import { buffer } from 'node:stream/consumers'
import Fastify from 'fastify'
import type { FastifyInstance, FastifyServerOptions } from 'fastify'
import type { Test } from 'tap'
import openaiWebhook, { standardWebhooks } from '../../lib/index.ts'
import type { OpenAIWebhookOptions, Verifier, WebhookRouteOptions } from '../../lib/index.ts'
import { SECRET, sign } from './deliveries.ts'
import type { Signed } from './deliveries.ts'
import { redelivered } from './observe.ts'
import { TLS } from './tls.ts'

/** One receiving route of each kind. */
export const OWN = '/webhooks/openai'
export const ROUTE = '/route'
export const REPLYING = '/replying'
export const MARKED = '/marked'
export const DISPATCHING = '/dispatching'
export const RECEIVING = [OWN, ROUTE, REPLYING, MARKED, DISPATCHING] as const

/** No JSON serializer reproduces these bytes, so their signature matches only if the bytes that arrived are verified. */
export const AWKWARD = '\n{"type" : "response.completed","object":"event", "id":"evt_1","created_at":1.75086121e9,' +
  '"data":{"id":"resp_1","10":1,"2":0.10,"text":"Gr\\u00fc\\u00dfe, 世界 👋 \\/ \\u2028"}}\r\n'

export interface Answer {
  status: number
  headers: Record<string, string | string[] | undefined>
  body: Buffer
  /** The `code` in a JSON body. */
  code: unknown
}

export interface Message {
  url: string
  method?: string
  headers?: Record<string, string>
  body?: Buffer | string
}

export type Send = (message: Message) => Promise<Answer>

export type Order = 'before' | 'after'

/** When the other plugin is registered, relative to this one. */
export const ORDERS: readonly Order[] = ['before', 'after']

export interface Interop {
  app: FastifyInstance
  port: number
  send: Send
  /** The route and the verified bytes of each delivery that reached a handler. */
  seen: Array<{ url: string, bytes: string }>
  /** How many bodies have been hashed. */
  hashed: () => number
}

interface Options {
  order?: Order
  /** Registers the other plugin. */
  beside?: (app: FastifyInstance) => PromiseLike<unknown> | void
  /** Adds routes of the app after both plugins. */
  routes?: (app: FastifyInstance) => void
  webhook?: OpenAIWebhookOptions
  /** Further options of the routes that `.route()` makes. */
  route?: Partial<WebhookRouteOptions>
  /** Further config of the marked routes. */
  marked?: object
  server?: FastifyServerOptions & { http2?: boolean, https?: object }
}

/** Starts an app with the plugin, another plugin and one receiving route of each kind. It is closed when the test ends. */
export async function interop (t: Test, { order = 'before', beside, routes, webhook, route, marked, server }: Options = {}): Promise<Interop> {
  const app = Fastify({ forceCloseConnections: true, ...server } as FastifyServerOptions) as FastifyInstance
  t.teardown(() => app.close())
  const { verifier, hashed } = countingVerifier()
  if (order === 'before') await beside?.(app)
  await app.register(openaiWebhook, { secret: SECRET, verifier, ...webhook })
  if (order === 'after') await beside?.(app)

  const seen: Interop['seen'] = []
  app.openaiWebhook.onAny((_event, { request }) => {
    seen.push({ url: request!.routeOptions.url!, bytes: request!.openaiWebhook.rawBody.toString() })
  })
  app.openaiWebhook.route({ ...route, url: ROUTE })
  app.openaiWebhook.route({ ...route, url: REPLYING, handler: async () => ({ received: true }) })
  const config = { ...marked, openaiWebhook: {} }
  app.post(MARKED, { config }, async request => {
    seen.push({ url: MARKED, bytes: request.openaiWebhook.rawBody.toString() })
  })
  app.post(DISPATCHING, { config }, app.openaiWebhook.handler)
  app.post('/json', async ({ body }) => ({ body }))
  routes?.(app)
  await app.listen({ port: 0, host: '127.0.0.1' })
  const { port } = app.server.address() as AddressInfo
  return { app, port, send: overHttp1(port, server?.https !== undefined), seen, hashed }
}

/** The usual verifier, with a count of its calls. */
function countingVerifier (): { verifier: Verifier, hashed: () => number } {
  let count = 0
  const { checkHeaders } = standardWebhooks()
  const verifier: Verifier = Object.assign((delivery: Parameters<Verifier>[0], keys: Parameters<Verifier>[1]) => {
    count++
    return standardWebhooks()(delivery, keys)
  }, { checkHeaders: checkHeaders! })
  return { verifier, hashed: () => count }
}

/** Opens a new connection for each message. */
export function overHttp1 (port: number, tls = false): Send {
  return async ({ url, method = 'POST', headers, body = '' }) => {
    const options = { port, host: '127.0.0.1', path: url, method, headers: { ...headers, 'content-length': Buffer.byteLength(body) }, agent: false }
    const request = tls ? https.request({ ...options, ca: TLS.cert }) : http.request(options)
    request.end(body)
    const [response] = await once(request, 'response') as [http.IncomingMessage]
    return answer(response.statusCode!, response.headers, await buffer(response))
  }
}

/** Sends all messages over one connection. */
export async function overHttp2 (t: Test, port: number, tls = false): Promise<Send> {
  const session = http2.connect(`${tls ? 'https' : 'http'}://127.0.0.1:${port}`, { ca: TLS.cert })
  t.teardown(() => session.destroy())
  await once(session, 'connect')
  return async ({ url, method = 'POST', headers, body = '' }) => {
    const stream = session.request({ ...headers, ':method': method, ':path': url })
    stream.end(body)
    const [{ ':status': status, ...rest }] = await once(stream, 'response') as [http2.IncomingHttpHeaders & http2.IncomingHttpStatusHeader]
    return answer(status!, rest, await buffer(stream))
  }
}

function answer (status: number, headers: Answer['headers'], body: Buffer): Answer {
  let code: unknown
  try {
    code = (JSON.parse(body.toString()) as { code?: unknown } | null)?.code
  } catch {} // not JSON
  return { status, headers, body, code }
}

/** The message of a delivery. */
export function message (url: string, { headers, body }: Signed, also: Record<string, string> = {}): Message {
  return { url, headers: { ...headers, ...also }, body }
}

/** The same delivery with one changed byte in its body. */
export function forged ({ headers, body }: Signed): Signed {
  const changed = Buffer.from(body)
  changed[changed.indexOf('resp_1') + 5] = '2'.charCodeAt(0)
  return { headers, body: changed }
}

/** Checks that every receiving route accepts what was signed, byte for byte and once, and refuses what was not signed. */
export async function receives (t: Test, { seen, send: plain }: Pick<Interop, 'seen' | 'send'>, { send = plain, urls = RECEIVING, headers = {}, at = url => url }: {
  send?: Send
  urls?: readonly string[]
  headers?: Record<string, string>
  /** The URL that the messages for a route are sent to. */
  at?: (url: string) => string
} = {}): Promise<void> {
  for (const url of urls) {
    seen.length = 0
    const delivery = sign(AWKWARD)
    const refused = await send(message(at(url), forged(delivery), headers))
    t.match(refused, { status: 401, code: 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE' }, `${url} refuses a forged delivery`)
    t.same(seen, [], `${url} runs nothing for it`)

    const accepted = await send(message(at(url), delivery, headers))
    t.equal(`${accepted.status} ${accepted.body.toString()}`, '200 {"received":true}', `${url} takes a signed one`)
    const again = await send(message(at(url), redelivered(delivery), headers))
    t.equal(`${again.status} ${again.body.toString()}`, '200 {"received":true,"duplicate":true}', `${url} knows its retry`)
    t.same(seen, [{ url, bytes: AWKWARD }], `${url} hands on, once, the bytes that arrived`)
  }
}
