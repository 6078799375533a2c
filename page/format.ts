import type { DeliveryState } from '../lib/inspector/messages.ts'

const TIME = new Intl.DateTimeFormat(undefined, { hour: '2-digit', minute: '2-digit', second: '2-digit', hour12: false })

export const time = (at: number): string => TIME.format(at)
export const instant = (at: number): string => new Date(at).toISOString()

export function ms (value: number | null): string {
  if (value === null) return '–'
  if (value < 10) return `${value.toFixed(2)} ms`
  return value < 1_000 ? `${value.toFixed(0)} ms` : `${(value / 1_000).toFixed(2)} s`
}

export const plural = (count: number, one: string, many: string): string => `${count.toLocaleString('en')} ${count === 1 ? one : many}`

export const STATES: Readonly<Record<DeliveryState, { tone: string, meaning: string }>> = {
  received: { tone: 'busy', meaning: 'verified; its handlers have not started yet' },
  running: { tone: 'busy', meaning: 'its handlers run' },
  queued: { tone: 'busy', meaning: 'acknowledged; its handlers run later' },
  late: { tone: 'warn', meaning: 'answered 503 by the deadline; its handlers run on' },
  processed: { tone: 'good', meaning: 'its handlers have succeeded' },
  duplicate: { tone: 'dull', meaning: 'its webhook-id has been seen' },
  refused: { tone: 'bad', meaning: 'not accepted' },
  failed: { tone: 'bad', meaning: 'a handler failed' },
  dead: { tone: 'bad', meaning: 'its attempts are used up' }
}

/** The code of an answer without the prefix that all codes of the plugin have. */
export const shortCode = (code: string): string => code.replace('FST_OPENAI_WEBHOOK_', '')
