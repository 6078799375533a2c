import type { FastifyInstance, FastifyPluginAsync, FastifyReply, FastifyRequest, RouteHandlerMethod, onRequestHookHandler } from 'fastify'
import { statusOf } from '../coded.ts'
import { InvalidOptions } from '../errors.ts'
import { answerOf } from '../metrics/runners.ts'
import { INSIDE } from '../observation.ts'
import type { Routes } from '../routes/routes.ts'
import { assertMayAct, assertProtected, isReadOnly, loopbackAlone, sameSite } from './access.ts'
import { ActionFault, Actions, obstacleOf, verificationOf } from './actions.ts'
import { readAssets } from './assets.ts'
import { deadOf, detailOf } from './detail.ts'
import { Journal } from './journal.ts'
import { Live } from './live.ts'
import type { Hello, Stats } from './messages.ts'
import { DEFAULTS, assertInspectorOptions } from './options.ts'
import type { InspectorOptions } from './options.ts'

export type { InspectorOptions }

/** The most bytes in the body of an action, which may hold an edited event. Far more than a route accepts by default. */
const ACTION_LIMIT = 1_048_576
/** The most dead deliveries that are listed. */
const DEAD_LISTED = 100

const HTML = 'text/html; charset=utf-8'

const HEADERS = {
  'content-security-policy': "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
  'x-content-type-options': 'nosniff',
  'x-frame-options': 'DENY',
  'referrer-policy': 'no-referrer',
  'cross-origin-resource-policy': 'same-origin',
  'cross-origin-opener-policy': 'same-origin',
  'cache-control': 'no-store'
}

/**
 * A page that shows every delivery of the plugin's registration in this scope and its outcome. The page can also send sample deliveries,
 * repeat deliveries and requeue dead ones. Register the inspector after the plugin. It keeps deliveries in memory from then on.
 *
 * Throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS at boot: for a wrong option, when the plugin is not registered in this scope or one above, for
 * a second inspector of the same registration, and without `onRequest` when NODE_ENV is `production`. A request that may not see deliveries
 * or may not act is answered 403 FST_OPENAI_WEBHOOK_INSPECTOR_REFUSED.
 */
const inspector: FastifyPluginAsync<InspectorOptions> = async (instance, options) => {
  assertInspectorOptions(options)
  assertProtected(options)
  const { path = DEFAULTS.path, onRequest, readOnly, max = DEFAULTS.max, redact } = options
  const routes = registrationOf(instance)
  const { observation, receiver: { runner } } = routes
  const assets = await readAssets()

  const journal = observation.observer = new Journal(max)
  const { deadLetters } = instance.openaiWebhook
  const actions = new Actions({ instance, routes, journal })
  const stats = async (): Promise<Stats> => {
    const [depth, dead] = await Promise.all([answerOf(runner, 'depth'), answerOf(runner, 'deadCount')])
    return { ...journal.rate.read(performance.now()), depth: depth ?? null, dead: dead ?? null }
  }
  const live = new Live({ watch: watched => journal.watch(watched), takeChanged: () => journal.takeChanged(), stats })
  const hello = async (request: FastifyRequest): Promise<Hello> => ({
    readOnly: await isReadOnly(readOnly, request),
    endpoints: [...routes.endpoints.all.values()].map(endpoint => ({ url: endpoint.url, signs: obstacleOf(endpoint) === null, tenants: endpoint.tenants !== undefined })),
    types: Object.keys(routes.events).sort(),
    deadLetters: runner.dead !== undefined,
    max: { deliveries: journal.deliveries.max, refused: journal.refusals.max },
    stats: await stats(),
    rows: journal.rows() // read last, because later changes are sent as messages
  })
  instance.addHook('preClose', async () => { live.close() })
  instance.addHook('onClose', async () => { observation.observer = undefined })

  // This is a scope of its own, so the parsers of other routes do not change.
  instance.removeAllContentTypeParsers()
  instance.addContentTypeParser('application/json', { parseAs: 'string' }, instance.getDefaultJsonParser('error', 'error'))

  const letsIn = (onRequest === undefined ? [loopbackAlone] : [onRequest].flat()) as onRequestHookHandler[]
  const admitted: onRequestHookHandler[] = [...letsIn, (request, _reply, done) => {
    admittedRequests.add(request)
    done()
  }]
  const common = { exposeHeadRoute: false, schema: { hide: true } as object }
  const api = { ...common, errorHandler: tell }

  function get (url: string, handler: RouteHandlerMethod): void {
    instance.route({ ...api, method: 'GET', url: `${path}/api/${url}`, onRequest: [...admitted, sameSite], handler })
  }

  function post (url: string, act: (body: Asked, request: FastifyRequest) => Promise<object>): void {
    instance.route({
      ...api,
      method: 'POST',
      url: `${path}/api/${url}`,
      bodyLimit: ACTION_LIMIT,
      onRequest: admitted,
      // Checked before the body is parsed, so that no body of a stranger is parsed.
      preParsing: async (request, _reply, payload) => {
        await assertMayAct(readOnly, request)
        return payload
      },
      handler: async (request, reply) => json(reply, await act(new Asked(request.body), request))
    })
  }

  function serve (url: string, type: string, content: (request: FastifyRequest) => string): void {
    instance.route({
      ...common,
      method: 'GET',
      url,
      onRequest: admitted,
      handler: (request, reply) => { reply.headers(HEADERS).type(type).send(content(request)) }
    })
  }

  // The base is relative to the page, so that a proxy may serve the page under another path. The app may ignore a slash at the end of the
  // URL.
  const page = ({ url }: FastifyRequest): string => assets.page.replaceAll('{{base}}', /\/(?:\?|$)/.test(url) ? '.' : path.slice(path.lastIndexOf('/') + 1))
  serve(path, HTML, page)
  const { routerOptions, ignoreTrailingSlash = false } = instance.initialConfig
  // With ignoreTrailingSlash both paths are the same route, and the router would refuse the second one.
  if (!(routerOptions?.ignoreTrailingSlash ?? ignoreTrailingSlash)) serve(`${path}/`, HTML, page)
  serve(`${path}/page.js`, 'text/javascript; charset=utf-8', () => assets.script)
  serve(`${path}/page.css`, 'text/css; charset=utf-8', () => assets.style)

  get('events', async (request, reply) => {
    reply.headers(HEADERS)
    await live.open(reply, async () => await hello(request))
    return reply
  })
  get('deliveries/:id', async (request, reply) => {
    const entry = journal.find(Number((request.params as { id: string }).id))
    if (entry === undefined) throw new ActionFault(404, 'the delivery is not kept any more: the last ones are')
    // For an unknown tenant there is no secret, so nothing can be diagnosed.
    const endpoint = routes.endpoints.all.get(entry.endpoint)
    const verification = endpoint && await verificationOf(endpoint, entry.tenant).catch(() => undefined)
    return json(reply, detailOf(entry, { verification, others: journal.others(entry), deliver: actions.obstacles(entry), redact, log: request.log }))
  })
  get('dead', async (request, reply) => {
    const { type } = request.query as { type?: string }
    return json(reply, (await deadLetters.list({ limit: DEAD_LISTED, ...(type !== undefined && { type }) })).map(deadOf))
  })
  get('sample', async (request, reply) => json(reply, { text: actions.sample(String((request.query as { type?: string }).type)) }))

  post('deliver', async (asked, { host }) => await actions.deliver(asked.text('endpoint'), asked.text('url'), asked.optional('tenant'), asked.text('body'), host))
  post('again', async asked => await actions.again(asked.number('id'), asked.optional('body')))
  post('requeue', async asked => {
    const tenant = asked.optional('tenant')
    const delivery = { endpoint: asked.text('endpoint'), webhookId: asked.text('webhookId'), ...(tenant !== undefined && { tenant }) }
    return { requeued: await deadLetters.requeue(delivery, { force: asked.flag('force') }) }
  })
  post('requeue-all', async asked => await actions.requeueAll(asked.optional('type')))
}

export default inspector

/** @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS */
function registrationOf (instance: FastifyInstance): Routes {
  const { openaiWebhook } = instance as { openaiWebhook?: FastifyInstance['openaiWebhook'] & { [INSIDE]?: Routes } }
  const routes = openaiWebhook?.[INSIDE]
  if (routes === undefined) throw new InvalidOptions('inspector: expected fastify-openai-webhook to be registered before, in this scope or in one above, got none')
  if (routes.observation.observer !== undefined) throw new InvalidOptions('inspector: expected one inspector for a registration of the plugin, got a second one')
  return routes
}

function json (reply: FastifyReply, value: object): string {
  reply.headers(HEADERS).type('application/json; charset=utf-8')
  return JSON.stringify(value)
}

/** Requests that passed `onRequest`. Their errors are explained to the page, whatever the app's error handler does. */
const admittedRequests = new WeakSet<FastifyRequest>()

function tell (error: Error & { code?: unknown }, request: FastifyRequest, reply: FastifyReply): void {
  if (!admittedRequests.has(request)) {
    reply.send(error) // calls the error handler of the app
    return
  }
  reply.code(statusOf(error)).headers(HEADERS).type('application/json; charset=utf-8')
    .send(JSON.stringify({ code: String(error.code), message: error.message }))
}

/** The JSON body of an action. */
class Asked {
  readonly #body: Record<string, unknown>

  constructor (body: unknown) {
    this.#body = typeof body === 'object' && body !== null ? body as Record<string, unknown> : {}
  }

  text (name: string): string {
    const value = this.optional(name)
    if (value === undefined) throw new ActionFault(400, `expected ${name} to be a string`)
    return value
  }

  optional (name: string): string | undefined {
    const value = this.#body[name]
    if (value === undefined || value === null) return undefined
    if (typeof value !== 'string') throw new ActionFault(400, `expected ${name} to be a string`)
    return value
  }

  number (name: string): number {
    const value = this.#body[name]
    if (!Number.isSafeInteger(value)) throw new ActionFault(400, `expected ${name} to be a whole number`)
    return value as number
  }

  flag (name: string): boolean {
    return this.#body[name] === true
  }
}
