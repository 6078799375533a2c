import { LogController } from 'fastify'
import { sign, thin } from './deliveries.ts'
import type { Signed } from './deliveries.ts'
import type { LogLine } from './observe.ts'

export const ENDPOINT = '/webhooks/openai'
/** Without the lines of Fastify's own about each request. */
export const quiet = { logController: new LogController({ disableRequestLogging: true }) }
export const REFUSED = 'webhook delivery refused'
export const MARKER = 'what only the payload says'

/** What names the delivery of `valid` on every line about it. */
export const NAMED = { webhookId: 'wh_1', eventId: 'evt_1', eventType: 'batch.failed', endpoint: ENDPOINT }

export const valid = (): Signed => sign(thin('batch.failed', { id: 'batch_1', note: MARKER }), { webhookId: 'wh_1' })
export const forged = (): Signed => ({ ...valid(), headers: { ...valid().headers, 'webhook-signature': 'v1,Zm9yZ2Vk' } })

/** What a line says beside what the logger puts on each of its own. */
export function said ({ level, msg, time, pid, hostname, reqId, ...fields }: LogLine): object {
  return { level, msg, ...fields }
}

export const withText = (lines: readonly LogLine[], text: string): LogLine[] => lines.filter(({ msg }) => msg.includes(text))
