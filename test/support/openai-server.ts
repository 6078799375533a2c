import { randomBytes, randomUUID } from 'node:crypto'
import Fastify from 'fastify'
import type { FastifyReply } from 'fastify'
import { sampleEvent } from '../../lib/testing/sample.ts'
import type { SampleType } from '../../lib/testing/sample.ts'
import { sign } from '../../lib/testing/sign.ts'

interface Endpoint {
  id: string
  object: 'webhook_endpoint'
  created_at: number
  updated_at: number
  name: string
  url: string
  event_types: string[]
  signing_secret_hint: string
}

interface Answer {
  status: number
  body: object | string
  headers?: Record<string, string>
}

/** A resource, with the fields that its list needs. */
export interface Listed {
  id: string
  created_at: number
  [field: string]: unknown
}

export interface ServerOptions {
  apiKey?: string
  /** The number of endpoints or resources in a page. */
  pageSize?: number
  /** The event types that the project can receive. */
  eventTypes?: string[]
}

/** Implements the webhook endpoint API as OpenAI documents it, and serves the resources of a test. Any other path is answered 404. */
export class OpenAIServer {
  url = ''
  readonly apiKey: string
  readonly endpoints: Endpoint[] = []
  /** The current signing secrets, by endpoint id. */
  readonly secrets = new Map<string, string>()
  /** Every request as it arrived. */
  readonly requests: Array<{ call: string, body: unknown, headers: Record<string, unknown> }> = []
  /** Answers to give instead of the usual ones, in this order. */
  readonly answers: Answer[] = []
  /** What is served, by method and path, such as `GET /v1/batches/batch_1`: JSON, the text of a file, or a function that replies. */
  readonly resources = new Map<string, object | string | ((reply: FastifyReply) => unknown)>()
  /** The resources that are listed, in any order, by path, such as `/v1/batches`. */
  readonly lists = new Map<string, Listed[]>()
  readonly #app = Fastify({ forceCloseConnections: true })
  readonly #eventTypes: string[]
  readonly #pageSize: number

  private constructor ({ apiKey = 'sk-proj-test', pageSize = 2, eventTypes = ['batch.completed', 'batch.failed', 'response.completed'] }: ServerOptions) {
    this.apiKey = apiKey
    this.#pageSize = pageSize
    this.#eventTypes = eventTypes
    this.#routes()
  }

  static async start (t: { teardown: (fn: () => unknown) => void }, options: ServerOptions = {}): Promise<OpenAIServer> {
    const server = new OpenAIServer(options)
    t.teardown(() => server.#app.close())
    server.url = `${await server.#app.listen({ port: 0, host: '127.0.0.1' })}/v1`
    return server
  }

  get calls (): string[] {
    return this.requests.map(({ call }) => call)
  }

  add ({ name = 'orders', url = 'https://example.com/webhooks/openai', event_types: types = ['batch.completed'] }: Partial<Endpoint> = {}): Endpoint {
    const secret = `whsec_${randomBytes(32).toString('base64')}`
    const endpoint: Endpoint = {
      id: `whe_${randomUUID().replaceAll('-', '')}`,
      object: 'webhook_endpoint',
      created_at: 1750861210,
      updated_at: 1750861210,
      name,
      url,
      event_types: types,
      signing_secret_hint: `whsec_…${secret.slice(-4)}`
    }
    this.endpoints.push(endpoint)
    this.secrets.set(endpoint.id, secret)
    return endpoint
  }

  #routes (): void {
    const app = this.#app
    app.removeContentTypeParser('application/json')
    app.addContentTypeParser('*', { parseAs: 'string' }, (_request, body, done) => {
      done(null, body === '' ? undefined : JSON.parse(body as string))
    })

    app.addHook('preHandler', async ({ method, url, body, headers }, reply) => {
      this.requests.push({ call: `${method} ${url}`, body, headers })
      const answer = this.answers.shift()
      if (answer !== undefined) return await reply.code(answer.status).headers(answer.headers ?? {}).send(answer.body)
      if (headers.authorization !== `Bearer ${this.apiKey}`) {
        return await refuse(reply, 401, 'invalid_api_key', `Incorrect API key provided: ${String(headers.authorization).slice('Bearer '.length)}.`)
      }
      const resource = this.resources.get(`${method} ${url}`)
      if (typeof resource === 'function') return await resource(reply)
      if (resource !== undefined) return await reply.send(resource)
      const { pathname, searchParams } = new URL(url, this.url)
      const listed = this.lists.get(pathname)
      if (listed !== undefined && method === 'GET') return await this.#page(reply, listed, searchParams)
    })

    app.get<{ Querystring: { after?: string } }>('/v1/webhook_endpoints', async ({ query: { after } }) => {
      const start = after === undefined ? 0 : this.endpoints.findIndex(({ id }) => id === after) + 1
      const data = this.endpoints.slice(start, start + this.#pageSize)
      return {
        object: 'list',
        data,
        first_id: data[0]?.id ?? null,
        last_id: data.at(-1)?.id ?? null,
        has_more: start + data.length < this.endpoints.length
      }
    })

    app.get('/v1/webhook_event_types', async () => ({ object: 'list', data: this.#eventTypes }))

    app.post<{ Body: Pick<Endpoint, 'name' | 'url' | 'event_types'> }>('/v1/webhook_endpoints', async ({ body }, reply) => {
      if (this.#refuses(body, reply)) return reply
      const endpoint = this.add(body)
      return { ...endpoint, signing_secret: this.secrets.get(endpoint.id) }
    })

    app.post<Named<Partial<Endpoint>>>('/v1/webhook_endpoints/:id', async ({ body, params: { id } }, reply) => {
      const endpoint = this.#find(id, reply)
      if (endpoint === undefined || this.#refuses(body, reply)) return reply
      return Object.assign(endpoint, body)
    })

    app.delete<Named<undefined>>('/v1/webhook_endpoints/:id', async ({ params: { id } }, reply) => {
      const endpoint = this.#find(id, reply)
      if (endpoint === undefined) return reply
      this.endpoints.splice(this.endpoints.indexOf(endpoint), 1)
      return { object: 'webhook_endpoint.deleted', id, deleted: true }
    })

    app.post<Named<object>>('/v1/webhook_endpoints/:id/rotate_secret', async ({ params: { id } }, reply) => {
      const endpoint = this.#find(id, reply)
      if (endpoint === undefined) return reply
      const secret = `whsec_${randomBytes(32).toString('base64')}`
      this.secrets.set(id, secret)
      return { ...endpoint, signing_secret_hint: `whsec_…${secret.slice(-4)}`, signing_secret: secret }
    })

    app.post<Named<{ event_type: string }>>('/v1/webhook_endpoints/:id/test', async ({ body, params: { id } }, reply) => {
      const endpoint = this.#find(id, reply)
      if (endpoint === undefined || this.#refuses({ event_types: [body.event_type] }, reply)) return reply
      const event = JSON.stringify(sampleEvent(body.event_type as SampleType))
      const { status } = await fetch(endpoint.url, { method: 'POST', headers: sign(event, { secret: this.secrets.get(id)! }), body: event })
      return { object: 'webhook_endpoint.test', webhook_endpoint_id: id, event_type: body.event_type, success: true, status_code: status }
    })

    // A hook serves the resources, because hooks run for unknown paths as well.
    app.setNotFoundHandler(async ({ method, url }, reply) => await refuse(reply, 404, null, `Invalid URL (${method} ${url})`))
  }

  /** A page of resources ordered by creation, by default the newest first. */
  async #page (reply: FastifyReply, listed: Listed[], query: URLSearchParams): Promise<FastifyReply> {
    const after = query.get('after')
    const order = query.get('order') === 'asc' ? 1 : -1
    const sorted = [...listed].sort((a, b) => order * (a.created_at - b.created_at || (a.id < b.id ? -1 : 1)))
    const start = after === null ? 0 : sorted.findIndex(({ id }) => id === after) + 1
    if (after !== null && start === 0) return refuse(reply, 400, 'invalid_value', `Invalid value for 'after': '${after}'.`)
    const data = sorted.slice(start, start + Math.min(this.#pageSize, Number(query.get('limit') ?? 20)))
    return await reply.send({ object: 'list', data, first_id: data[0]?.id ?? null, last_id: data.at(-1)?.id ?? null, has_more: start + data.length < sorted.length })
  }

  #find (id: string, reply: FastifyReply): Endpoint | undefined {
    const endpoint = this.endpoints.find(endpoint => endpoint.id === id)
    if (endpoint === undefined) refuse(reply, 404, 'webhook_endpoint_not_found', `No webhook endpoint found with id '${id}'.`)
    return endpoint
  }

  #refuses ({ event_types: types = [] }: Partial<Endpoint>, reply: FastifyReply): boolean {
    const wrong = types.find(type => !this.#eventTypes.includes(type))
    if (wrong !== undefined) refuse(reply, 400, 'invalid_value', `Invalid value: '${wrong}'. Supported values are: ${this.#eventTypes.join(', ')}.`)
    return wrong !== undefined
  }
}

interface Named<Body> {
  Params: { id: string }
  Body: Body
}

function refuse (reply: FastifyReply, status: number, code: string | null, message: string): FastifyReply {
  return reply.code(status).send({ error: { message, type: 'invalid_request_error', param: null, code } })
}
