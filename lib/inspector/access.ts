import type { FastifyReply, FastifyRequest } from 'fastify'
import { InspectorRefused, InvalidOptions } from '../errors.ts'
import { logError } from '../log.ts'
import type { InspectorOptions } from './options.ts'

// Who may look, and who may act.

const isProduction = (): boolean => process.env['NODE_ENV'] === 'production'

/** @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS where deliveries would be shown to anybody */
export function assertProtected ({ onRequest }: InspectorOptions): void {
  if (onRequest !== undefined || !isProduction()) return
  throw new InvalidOptions('inspector: expected onRequest, a hook that lets in who may see deliveries, since NODE_ENV is "production"; without it the page is for development alone')
}

/** onRequest where the user gives none: the machine itself, by its own name. */
export function loopbackAlone (request: FastifyRequest, _reply: FastifyReply, done: (error?: Error) => void): void {
  const fault = strangeness(request)
  done(fault === undefined ? undefined : new InspectorRefused(`the inspector without \`onRequest\` is for this machine alone, and ${fault}: give it an \`onRequest\` hook that authenticates`))
}

const LOOPBACK_ADDRESS = /^(?:::ffff:)?127\.\d+\.\d+\.\d+$|^::1$/
/** A name of the DNS's may lead here, whose page would be of the same origin. */
const LOOPBACK_HOST = /^(?:localhost|127\.0\.0\.1|\[::1\])(?::\d{1,5})?$/i

/** @returns why it may come from elsewhere */
function strangeness ({ raw, headers }: FastifyRequest): string | undefined {
  // Not request.ip, which a sender may choose where proxies are trusted.
  if (!LOOPBACK_ADDRESS.test(raw.socket.remoteAddress ?? '')) return 'the request comes from elsewhere'
  const hosts = [headers.host, headers[':authority']].filter(host => host !== undefined)
  if (hosts.length === 0 || !hosts.every(host => LOOPBACK_HOST.test(String(host)))) return 'the request names another host than localhost'
  // The socket of a tunnel or of a proxy on this machine is a loopback one too.
  const forwarding = Object.keys(headers).find(name => name === 'forwarded' || name === 'via' || name === 'x-real-ip' || name.startsWith('x-forwarded-') || name.startsWith('cf-'))
  return forwarding === undefined ? undefined : 'the request has been forwarded'
}

/** onRequest of what is read by the page's script: another site's page must not even open a stream. */
export function sameSite ({ headers }: FastifyRequest, _reply: FastifyReply, done: (error?: Error) => void): void {
  const site = headers['sec-fetch-site']
  done(site === undefined || site === 'same-origin' || site === 'none' ? undefined : new InspectorRefused('the request comes from another page'))
}

/** preHandler of actions: only this page's own button may be pressed, and only by who may act. */
export function mayAct (readOnly: InspectorOptions['readOnly']) {
  return async (request: FastifyRequest): Promise<void> => {
    if (!isSameOrigin(request)) throw new InspectorRefused('actions are taken from the inspector\'s own page alone, by a request with Sec-Fetch-Site: same-origin, or with Origin equal to Host')
    if (await isReadOnly(readOnly, request)) throw new InspectorRefused('the inspector is read-only here: the `readOnly` option says who may act')
  }
}

function isSameOrigin ({ headers }: FastifyRequest): boolean {
  const site = headers['sec-fetch-site']
  if (site !== undefined) return site === 'same-origin'
  const host = headers[':authority'] ?? headers.host
  try {
    // Throws for "null", and where there is none.
    const { host: origin, protocol } = new URL(String(headers.origin))
    return /^https?:$/.test(protocol) && typeof host === 'string' && origin === new URL(`${protocol}//${host}`).host
  } catch {
    return false
  }
}

/** Nothing but `false` lets anybody act. */
export async function isReadOnly (readOnly: InspectorOptions['readOnly'], request: FastifyRequest): Promise<boolean> {
  if (typeof readOnly !== 'function') return readOnly ?? isProduction()
  try {
    return await readOnly(request) !== false
  } catch (error) {
    logError(request.log, error, {}, 'the readOnly function of the inspector failed, so it is read-only')
    return true
  }
}
