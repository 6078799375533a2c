import { inContext } from './async-context.ts'
import type { FastifyBaseLogger } from 'fastify'

/** Maximum number of characters in the message of an error, and in its stack. */
const MAX_TEXT = 10_000
/** Maximum number of nested causes. */
const MAX_CAUSES = 5
/** Maximum number of errors in an AggregateError. */
const MAX_ERRORS = 100

/**
 * Logs what a user's code threw. A huge error is clipped. An error that cannot be read, because a getter throws, is replaced by one that says so:
 * a logger reads the error when it is called, and must not fail the delivery.
 */
export function logError (log: FastifyBaseLogger, error: unknown, fields: object, message: string): void {
  try {
    log.error({ err: clipped(error), ...fields }, message)
  } catch {
    write(log, 'error', { err: new Error('an error that cannot be read'), ...fields }, message)
  }
}

/** Logs a line. Ignores errors, because a full disk, or a `mixin` of the user that throws, must not fail the delivery. */
export function write (log: FastifyBaseLogger, level: 'info' | 'warn' | 'error', fields: object, message: string): void {
  try {
    log[level](fields, message)
  } catch {}
}

function clipped (error: unknown, causes = MAX_CAUSES): unknown {
  if (typeof error === 'string') return error.slice(0, MAX_TEXT)
  if (!(error instanceof Error)) return error
  const { message, stack = '', cause } = error
  const errors = error instanceof AggregateError ? error.errors.slice(0, MAX_ERRORS).map(each => clipped(each, causes)) : undefined
  const clippedCause = causes === 0 ? undefined : clipped(cause, causes - 1)
  if (errors === undefined && message.length <= MAX_TEXT && stack.length <= MAX_TEXT && clippedCause === cause) return error
  const options = clippedCause === undefined ? undefined : { cause: clippedCause }
  const text = message.slice(0, MAX_TEXT)
  const copy = errors === undefined ? new Error(text, options) : new AggregateError(errors, text, options)
  copy.name = error.name
  copy.stack = stack.slice(0, MAX_TEXT)
  return copy
}

/** Maximum number of characters in the id and in the type of an event, which a schema need not limit. */
const MAX_NAME = 256
/** Maximum number of characters in a reason, because a type and the paths in it may be long. */
const MAX_REASON = 1_000

const nameOf = (value: unknown): string | undefined => typeof value === 'string' ? value.slice(0, MAX_NAME) : undefined

/** What is known about a delivery. */
export interface Described {
  readonly endpoint?: string | undefined
  readonly tenant?: string | undefined
  readonly webhookId?: string | undefined
  readonly event?: { readonly type: string, readonly id?: unknown } | undefined
}

/** What is known about a delivery that is not answered 200. */
export type Refused = Described & { readonly endpoint: string }

/** The fields of every line about a delivery. A caller may set more of them, because spreading them into another object costs a delivery 4 µs. */
export function logFields ({ endpoint, tenant, webhookId, event }: Described, attempt?: number): Record<string, unknown> {
  const fields: Record<string, unknown> = { webhookId: nameOf(webhookId), eventId: nameOf(event?.id), eventType: nameOf(event?.type), endpoint }
  if (tenant !== undefined) fields['tenant'] = tenant
  if (attempt !== undefined) fields['attempt'] = attempt
  return fields
}

/** Whether a line of this level is written. To be called first, because the fields of a line cost more than the dispatch. */
export function logs (log: FastifyBaseLogger, level: 'info' | 'warn'): boolean {
  const { isLevelEnabled } = log as { isLevelEnabled?: (level: string) => boolean }
  // The logger for Fastify's `logger: false` has the same function for all levels.
  return isLevelEnabled === undefined ? log[level] !== log.fatal : isLevelEnabled.call(log, level)
}

/** What to do, by the code of a refusal that a wrong setting may have caused. */
const FIXES: Readonly<Record<string, string>> = {
  FST_OPENAI_WEBHOOK_INVALID_SIGNATURE: 'where the sender is OpenAI: compare OPENAI_WEBHOOK_SECRET, or the secret option, with the signing secret ' +
    '(whsec_…) of the endpoint that has this URL at OpenAI, and give both while one replaces another; if it is the same, something in ' +
    'front of the app, or a body parser or preParsing hook in it, changes the body. Log level debug and `npx fastify-openai-webhook diagnose` say which',
  FST_OPENAI_WEBHOOK_UNKNOWN_TENANT: 'where the sender is OpenAI: compare the URL of the endpoint at OpenAI with what tenant.of makes of it, and see ' +
    'that tenant.secret finds a secret for that name'
}

/** What to do on a route with tenants, if that differs from FIXES. */
const TENANT_FIXES: typeof FIXES = {
  FST_OPENAI_WEBHOOK_INVALID_SIGNATURE: 'where the sender is OpenAI: compare what tenant.secret gives for this tenant, and gave when it was last asked (once a minute at most), ' +
    'with the signing secret (whsec_…) of the endpoint that has this URL at OpenAI, and give both while one replaces another'
}

/** What the operator of the app can do about a refusal with this code. */
export function fixOf (code: string, isTenants: boolean): string | undefined {
  return isTenants ? TENANT_FIXES[code] ?? FIXES[code] : FIXES[code]
}

/** Codes whose message says more than the code. */
const REASONED: readonly string[] = ['TIMESTAMP_OUT_OF_TOLERANCE', 'UNKNOWN_TENANT', 'INVALID_BODY', 'INVALID_EVENT'].map(name => `FST_OPENAI_WEBHOOK_${name}`)

/** Maximum number of lines in a window about refusals with one code at one endpoint. Further refusals are only counted. */
const MAX_LINES = 5
/** Length of a window in ms. */
const WINDOW = 10_000
/** Maximum number of tenants that the line at the end of a window names. */
const MAX_TENANTS = 20
/** Maximum number of windows, because a user's verifier may throw errors with any code. */
const MAX_WINDOWS = 200
const OTHERS = 'others'

interface Window {
  written: number
  suppressed: number
  /** The tenants of the suppressed lines. */
  tenants: Set<string> | undefined
  readonly timer: NodeJS.Timeout
  readonly code: string
  readonly endpoint: string | undefined
}

/** Logs refused deliveries at `warn`, without the payload. The number of lines is limited, so that a flood of forgeries cannot fill a disk. */
export class RefusalLog {
  readonly #windows = new Map<string, Window>()
  // Bound here, because the line at the end of a window is about many requests, and must not be logged in the async context of one of them.
  readonly #endOutside = inContext((key: string) => this.#end(key))

  /** @param log for the lines at the end of windows */
  constructor (readonly log: FastifyBaseLogger) {}

  /** @param message of the error */
  write (log: FastifyBaseLogger, code: string, statusCode: number, delivery: Refused, message: string): void {
    if (!this.#hasRoom(log, code, delivery)) return
    write(log, 'warn', { code, statusCode, ...logFields(delivery), reason: REASONED.includes(code) ? message.slice(0, MAX_REASON) : undefined, fix: fixOf(code, delivery.tenant !== undefined) }, 'webhook delivery refused')
  }

  /**
   * Logs a failure of the app at `error`, with the cause. The number of lines is limited, because any sender may cause the failure.
   *
   * @param counted names the window
   */
  failed (log: FastifyBaseLogger, code: string, cause: unknown, delivery: Refused, message: string, counted = code): void {
    if (this.#hasRoom(log, counted, delivery)) logError(log, cause, { code, ...logFields(delivery) }, message)
  }

  unprocessed (log: FastifyBaseLogger, statusCode: number, endpoint: string): void {
    const code = 'ANSWERED_BY_A_HOOK'
    if (this.#hasRoom(log, code, { endpoint })) write(log, 'warn', { code, statusCode, endpoint }, 'the delivery was not processed')
  }

  /** Whether the window has room for another line. */
  #hasRoom (log: FastifyBaseLogger, code: string, { endpoint, tenant }: Refused): boolean {
    if (!logs(log, 'warn')) return false
    const own = `${code} ${endpoint}`
    const isOther = this.#windows.size >= MAX_WINDOWS && !this.#windows.has(own)
    const key = isOther ? OTHERS : own
    let window = this.#windows.get(key)
    if (window === undefined) {
      window = { written: 0, suppressed: 0, tenants: undefined, ...(isOther ? { code: OTHERS, endpoint: undefined } : { code, endpoint }), timer: setTimeout(this.#endOutside, WINDOW, key).unref() }
      this.#windows.set(key, window)
    }
    if (window.written < MAX_LINES) {
      window.written++
      return true
    }
    window.suppressed++
    if (tenant !== undefined && (window.tenants ??= new Set()).size < MAX_TENANTS) window.tenants.add(tenant)
    return false
  }

  /** Ends all windows now. */
  flush (): void {
    for (const key of [...this.#windows.keys()]) this.#end(key)
  }

  #end (key: string): void {
    const { timer, code, endpoint, tenants, suppressed } = this.#windows.get(key)!
    clearTimeout(timer)
    this.#windows.delete(key)
    if (suppressed > 0) write(this.log, 'warn', { code, endpoint, tenants: tenants && [...tenants], suppressed }, `${suppressed} more webhook deliveries refused`)
  }
}
