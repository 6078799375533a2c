import { STATUS_CODES } from 'node:http'
import { styleText } from 'node:util'
import type { Terminal } from './command.ts'
import type { Answer } from './send.ts'

/** Colour is for people: nothing is added where `out` is no terminal. */
export function paint ({ isTTY }: Terminal, style: Parameters<typeof styleText>[0], text: string): string {
  // The terminal given here decides, not what stdout is.
  return isTTY ? styleText(style, text, { validateStream: false }) : text
}

/** A stranger's text must not steer the terminal: what is not printable becomes "?". */
export function printable (text: string, max = 200): string {
  return text.slice(0, max).replace(/[^\x20-\x7e\p{L}\p{N}\p{P}\p{S}]/gu, '?')
}

/** 200 is what OpenAI takes for received: everything else it sends again. */
export function paintStatus (terminal: Terminal, status: number | undefined): string {
  return paint(terminal, status === 200 ? 'green' : 'red', status === undefined ? '---' : String(status))
}

/** What the receiver said, in a word or two. */
export function told ({ status, code, duplicate }: Pick<Answer, 'status' | 'code' | 'duplicate'>): string {
  if (code !== undefined) return printable(code)
  if (status === 200) return duplicate ? 'duplicate' : 'received'
  return STATUS_CODES[status!] ?? ''
}

export function milliseconds (ms: number): string {
  return `${ms.toFixed(1)} ms`
}

const BAR = 30

/** A bar in place of a line each, written over the one before. Only for a terminal. */
export function progress (done: number, total: number, text: string): string {
  const filled = Math.floor(BAR * done / total)
  return `\r${'█'.repeat(filled)}${'░'.repeat(BAR - filled)} ${done}/${total}  ${text}\x1b[K`
}
