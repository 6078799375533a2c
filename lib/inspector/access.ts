import type { FastifyReply, FastifyRequest } from 'fastify'
import { InspectorRefused, InvalidOptions } from '../errors.ts'
import { logError } from '../log.ts'
import type { InspectorOptions } from './options.ts'

// Decides who may see deliveries, and who may act.

const isProduction = (): boolean => process.env['NODE_ENV'] === 'production'

/** @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS when everybody could see deliveries in production */
export function assertProtected ({ onRequest }: InspectorOptions): void {
  if (onRequest !== undefined || !isProduction()) return
  throw new InvalidOptions('inspector: expected onRequest, a hook that lets in who may see deliveries, since NODE_ENV is "production"; without it the page is for development alone')
}

/** The `onRequest` hook when the user gives none: admits only requests from this machine that name it as localhost. */
export function loopbackAlone (request: FastifyRequest, _reply: FastifyReply, done: (error?: Error) => void): void {
  const fault = strangeness(request)
  done(fault === undefined ? undefined : new InspectorRefused(`the inspector without \`onRequest\` is for this machine alone, and ${fault}: give it an \`onRequest\` hook that authenticates`))
}

const LOOPBACK_ADDRESS = /^(?:::ffff:)?127\.\d+\.\d+\.\d+$|^::1$/
/**
 * Any other name is refused: with DNS rebinding, a name of a foreign site can resolve to this machine, and its page would then be of the
 * same origin.
 */
const LOOPBACK_HOST = /^(?:localhost|127\.0\.0\.1|\[::1\])(?::\d{1,5})?$/i

/** @returns why the request may come from elsewhere, or `undefined` */
function strangeness ({ raw, headers }: FastifyRequest): string | undefined {
  // The socket's address is used because a sender can choose `request.ip` where proxies are trusted.
  if (!LOOPBACK_ADDRESS.test(raw.socket.remoteAddress ?? '')) return 'the request comes from elsewhere'
  const hosts = [headers.host, headers[':authority']].filter(host => host !== undefined)
  if (hosts.length === 0 || !hosts.every(host => LOOPBACK_HOST.test(String(host)))) return 'the request names another host than localhost'
  // A tunnel or a proxy on this machine connects from a loopback address too.
  const forwarding = Object.keys(headers).find(name => name === 'forwarded' || name === 'via' || name === 'x-real-ip' || name.startsWith('x-forwarded-') || name.startsWith('cf-'))
  return forwarding === undefined ? undefined : 'the request has been forwarded'
}

/** The `onRequest` hook of what the page's script reads. A page of another site must not even open a stream. */
export function sameSite ({ headers }: FastifyRequest, _reply: FastifyReply, done: (error?: Error) => void): void {
  const site = headers['sec-fetch-site']
  done(site === undefined || site === 'same-origin' || site === 'none' ? undefined : new InspectorRefused('the request comes from another page'))
}

/**
 * The preParsing check of actions: the request has to come from the inspector's own page, and the user has to be allowed to act.
 *
 * @throws FST_OPENAI_WEBHOOK_INSPECTOR_REFUSED
 */
export async function assertMayAct (readOnly: InspectorOptions['readOnly'], request: FastifyRequest): Promise<void> {
  if (!isSameOrigin(request)) throw new InspectorRefused('actions are taken from the inspector\'s own page alone, by a request with Sec-Fetch-Site: same-origin, or with Origin equal to Host')
  if (await isReadOnly(readOnly, request)) throw new InspectorRefused('the inspector is read-only here: the `readOnly` option says who may act')
}

function isSameOrigin ({ headers }: FastifyRequest): boolean {
  const site = headers['sec-fetch-site']
  if (site !== undefined) return site === 'same-origin'
  const host = headers[':authority'] ?? headers.host
  try {
    // new URL() throws for the origin "null" and for a missing one.
    const { host: origin, protocol } = new URL(String(headers.origin))
    return /^https?:$/.test(protocol) && typeof host === 'string' && origin === new URL(`${protocol}//${host}`).host
  } catch {
    return false
  }
}

/** Only the value `false` allows actions. */
export async function isReadOnly (readOnly: InspectorOptions['readOnly'], request: FastifyRequest): Promise<boolean> {
  if (typeof readOnly !== 'function') return readOnly ?? isProduction()
  try {
    return await readOnly(request) !== false
  } catch (error) {
    logError(request.log, error, {}, 'the readOnly function of the inspector failed, so it is read-only')
    return true
  }
}
