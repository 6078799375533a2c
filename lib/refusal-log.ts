import type { FastifyBaseLogger } from 'fastify'
import { inContext } from './async-context.ts'
import { logError, logFields, logs, write } from './log.ts'
import type { RefusedDelivery } from './log.ts'

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

/** Maximum number of characters in a reason, because a type and the paths in it may be long. */
const MAX_REASON = 1_000
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
  write (log: FastifyBaseLogger, code: string, statusCode: number, delivery: RefusedDelivery, message: string): void {
    if (!this.#hasRoom(log, code, delivery)) return
    write(log, 'warn', { code, statusCode, ...logFields(delivery), reason: REASONED.includes(code) ? message.slice(0, MAX_REASON) : undefined, fix: fixOf(code, delivery.tenant !== undefined) }, 'webhook delivery refused')
  }

  /**
   * Logs a failure of the app at `error`, with the cause. The number of lines is limited, because any sender may cause the failure.
   *
   * @param counted names the window
   */
  failed (log: FastifyBaseLogger, code: string, cause: unknown, delivery: RefusedDelivery, message: string, counted = code): void {
    if (this.#hasRoom(log, counted, delivery)) logError(log, cause, { code, ...logFields(delivery) }, message)
  }

  unprocessed (log: FastifyBaseLogger, code: string, statusCode: number, endpoint: string): void {
    // Counted apart from the refusals with this code, because a flood of those must not hide this line.
    if (this.#hasRoom(log, 'NOT_PROCESSED', { endpoint })) write(log, 'warn', { code, statusCode, endpoint }, 'the delivery was not processed')
  }

  /** Whether the window has room for another line. */
  #hasRoom (log: FastifyBaseLogger, code: string, { endpoint, tenant }: RefusedDelivery): boolean {
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
