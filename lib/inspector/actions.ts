import type { IncomingHttpHeaders } from 'node:http'
import { setImmediate } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'
import type { Verification } from '../pipeline/verify.ts'
import type { Endpoint } from '../routes/endpoint.ts'
import type { Routes } from '../routes/routes.ts'
import { newSample, sampleEvent, sampleTypes } from '../testing/sample.ts'
import type { SampleType } from '../testing/sample.ts'
import { keyOf } from '../runners/runner.ts'
import { newWebhookId } from '../testing/sign.ts'
import { schemeOf } from '../verifiers/verifier.ts'
import type { Entry } from './entry.ts'
import type { Journal } from './journal.ts'
import type { Delivered, Detail, Obstacle, Repeated } from './messages.ts'

/** The page asked for something that cannot be done. The page shows the message. */
export class ActionFault extends Error {
  readonly code = 'INSPECTOR_FAULT'

  constructor (readonly statusCode: number, message: string) {
    super(message)
  }
}

export interface ActionsOptions {
  readonly instance: FastifyInstance
  readonly routes: Routes
  readonly journal: Journal
}

/** The actions of the page's buttons. */
export class Actions {
  constructor (readonly options: ActionsOptions) {}

  /** A sample of an event type, as JSON text to be edited. */
  sample (type: string): string {
    const { events } = this.options.routes
    if (!Object.hasOwn(events, type)) throw new ActionFault(404, 'no such event type')
    const event = sampleTypes.includes(type as SampleType)
      ? newSample(type as SampleType)
      // For a type of the user's own, the fields of `data` are unknown.
      : { ...sampleEvent('batch.completed'), type, data: {} }
    return JSON.stringify(event, null, 2)
  }

  /** Why a delivery cannot be repeated unchanged, and why it cannot be repeated edited; `null` when it can. */
  obstacles (entry: Entry): Detail['deliver'] {
    const edited = this.#obstacle(entry)
    const again = edited ?? (entry.rawBody === undefined
      ? 'its body is not kept'
      : schemeOf(this.#endpoint(entry.endpoint)!.verifier)!.namedByEvent ? 'its verifier names a delivery by its event, so the same event would be a duplicate: edit its id' : null)
    return { again, edited }
  }

  #obstacle ({ endpoint: name, url, verifiedAt, headers, tenant }: Entry): Obstacle {
    const endpoint = this.#endpoint(name)
    if (endpoint === undefined) return 'this process has no such route'
    // Signing an unverified payload would pass a stranger's data to the handlers.
    if (headers !== undefined && verifiedAt === undefined) return 'it was not verified, so anybody may have sent it'
    if (headers === undefined && (isPattern(name) || tenant !== undefined)) return 'it came out of a queue, which does not say at which URL it arrived'
    // Whoever sent it chose the URL, which is not signed.
    if (!isLiteral(url)) return 'its URL has parts that lead elsewhere, such as ".."'
    return obstacleOf(endpoint)
  }

  #endpoint (url: string): Endpoint | undefined {
    return this.options.routes.endpoints.all.get(url)
  }

  /** Delivers a delivery again, unchanged or edited, with a new signature and a new webhook-id. @throws ActionFault */
  async again (id: number, body: string | undefined): Promise<Repeated> {
    const entry = this.options.journal.find(id)
    if (entry === undefined) throw new ActionFault(404, 'the delivery is not kept any more')
    const { again, edited } = this.obstacles(entry)
    const obstacle = body === undefined ? again : edited
    if (obstacle !== null) throw new ActionFault(409, `it cannot be delivered again: ${obstacle}`)
    const { endpoint, url, tenant, headers = {}, rawBody, webhookId } = entry
    return await this.#deliver(endpoint, url, tenant, endToEnd(headers), body === undefined ? rawBody! : Buffer.from(body), { again: id, webhookId })
  }

  /**
   * @param url has to fit the URL of the endpoint, which may have parameters
   * @param tenant required when the endpoint serves tenants
   * @throws ActionFault
   */
  async deliver (name: string, url: string, tenant: string | undefined, body: string, host: string): Promise<Delivered> {
    const endpoint = this.#endpoint(name)
    if (endpoint === undefined) throw new ActionFault(404, 'no such endpoint')
    const open = parametersOf(name).filter(parameter => url.includes(parameter))
    if (open.length > 0) throw new ActionFault(400, `fill in ${open.join(' and ')} in the URL`)
    if (!fits(name, url)) throw new ActionFault(400, 'expected the path of a URL that fits the endpoint\'s')
    const obstacle = obstacleOf(endpoint)
    if (obstacle !== null) throw new ActionFault(409, `it cannot be delivered: ${obstacle}`)
    const { status, body: answer } = await this.#deliver(name, url, tenant, { host }, Buffer.from(body))
    return { status, body: answer }
  }

  async #deliver (name: string, url: string, tenant: string | undefined, headers: IncomingHttpHeaders, body: Buffer, repeated?: { again: number, webhookId: string | undefined }): Promise<Repeated> {
    const { instance, journal } = this.options
    const { verifier, keyring } = await verificationOf(this.#endpoint(name)!, tenant)
    const { sign, namedByEvent } = schemeOf(verifier)!
    const webhookId = namedByEvent ? idOf(body) : newWebhookId()
    if (namedByEvent && repeated !== undefined && webhookId === repeated.webhookId) throw new ActionFault(409, 'its verifier names a delivery by its event: edit the event\'s id, or it is a duplicate')
    const signed = sign(body, { webhookId: webhookId ?? '', timestamp: Math.floor(Date.now() / 1_000) }, keyring.keys[0]!)
    const { answer: { statusCode, payload }, id } = await journal.sending(signed, repeated?.again, async () => await instance.inject({
      method: 'POST',
      url,
      headers: { ...headers, 'content-type': 'application/json', ...signed },
      payload: body
    }))
    return { status: statusCode, body: payload.slice(0, 2_000), id: id ?? null }
  }

  /** Requeues the dead deliveries of one type, or of all types. Deliveries that need `force` are not requeued. */
  async requeueAll (type: string | undefined): Promise<{ requeued: number, failed: string | null }> {
    const { deadLetters } = this.options.instance.openaiWebhook
    let requeued = 0
    let failed: string | null = null
    const tried = new Set<string>()
    // The oldest are listed first, and may be those that need `force`. So more are listed until one could be requeued.
    for (const limit of LIMITS) {
      const listed = await deadLetters.list({ limit, ...(type !== undefined && { type }) })
      for (const delivery of listed.filter(delivery => !tried.has(keyOf(delivery)))) {
        tried.add(keyOf(delivery))
        await setImmediate() // a synchronous runner must not hold up deliveries
        try {
          if (await deadLetters.requeue(delivery)) requeued++
        } catch (error) {
          failed = (error as Error).message
        }
      }
      if (requeued > 0 || listed.length < limit) break
    }
    return { requeued, failed }
  }
}

/** How many dead deliveries are listed to requeue all. */
const LIMITS = [1_000, 2_000, 4_000, 8_000]

export function obstacleOf ({ verifier }: Endpoint): Obstacle {
  return schemeOf(verifier) === undefined ? 'its verifier is your own, which cannot sign' : null
}

/** How deliveries of an endpoint, or of one of its tenants, are verified. @throws ActionFault */
export async function verificationOf (endpoint: Endpoint, tenant: string | undefined): Promise<Verification> {
  if (endpoint.tenants === undefined) return endpoint
  if (tenant === undefined || tenant === '') throw new ActionFault(400, 'fill in Tenant: this endpoint serves many, and each has its own secret')
  const found = await endpoint.tenants.verificationOf(tenant)
  if (found instanceof Error) throw new ActionFault(409, `the tenant's secret cannot be had: ${found.message}`)
  return found
}

const isPattern = (url: string): boolean => /[:*]/.test(url)

/** The parameters `:name` of a URL. A doubled colon is a literal one. */
const parametersOf = (url: string): string[] => [...url.matchAll(/(?<!:):\w+/g)].map(([parameter]) => parameter)

/**
 * Whether inject() leaves a URL as it is, so that the page reaches no other route of the app. inject() reads `\` as `/`, follows `.` and `..`,
 * also if they are encoded, and leaves out control characters and what comes after a `#`.
 */
function isLiteral (url: string): boolean {
  return !/[\p{Cc}\\#]/u.test(url) && !url.split('?')[0]!.split('/').some(part => /^(?:\.|%2e){1,2}$/i.test(part))
}

/** Whether an endpoint's route may get a URL. A query may name the tenant. */
function fits (endpoint: string, url: string): boolean {
  return url.length <= 2_000 && isLiteral(url) && pathsOf(endpoint).test(url.split('?')[0]!.split('/').map(decoded).join('/'))
}

/** A part of a path. An encoded slash in it separates nothing. */
function decoded (part: string): string {
  try {
    return decodeURIComponent(part).replaceAll('/', '%2F')
  } catch {
    return part
  }
}

/**
 * The paths of a route: `:name`, also with a regular expression of its own, is a part of a path, which may be absent if a `?` follows; `*` is any
 * rest, and `::` is a colon.
 */
function pathsOf (endpoint: string): RegExp {
  const parts = endpoint.split(/(::|\/:\w+\?$|:\w+(?:\((?:[^()]|\([^()]*\))*\))?|\*)/)
  const sources = parts.map(part => {
    if (part === '::') return ':'
    if (part === '*') return '.*'
    if (part.startsWith('/:')) return '(?:/[^/]*)?'
    return part.startsWith(':') ? '[^/]+' : part.replace(/[.+?^${}()|[\]\\]/g, '\\$&')
  })
  return new RegExp(`^${sources.join('')}$`)
}

/** These headers describe the connection, the framing of the body or the signature, so the new request has its own. */
const NOT_REPEATED = /^(?::|connection$|keep-alive$|transfer-encoding$|te$|trailer$|upgrade$|expect$|http2-settings$|content-(?:length|type|encoding)$|webhook-|x-openai-(?:signature|timestamp)$)/

/** The headers that the app's hooks, constraints and tenants may depend on. */
function endToEnd (headers: IncomingHttpHeaders): IncomingHttpHeaders {
  return {
    ...(headers[':authority'] !== undefined && { host: String(headers[':authority']) }),
    ...Object.fromEntries(Object.entries(headers).filter(([name]) => !NOT_REPEATED.test(name)))
  }
}

function idOf (body: Buffer): string | undefined {
  try {
    const { id } = JSON.parse(body.toString()) as { id?: unknown }
    return typeof id === 'string' ? id : undefined
  } catch {
    return undefined // the validate step refuses the body
  }
}
