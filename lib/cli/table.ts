import { STATUS_CODES } from 'node:http'
import { styleText } from 'node:util'
import type { Terminal } from './command.ts'
import type { Posted } from '../resources/post.ts'

/** Adds colour only when `out` is a terminal. */
export function paint ({ isTTY }: Terminal, style: Parameters<typeof styleText>[0], text: string): string {
  // `isTTY` decides, so styleText must not check the process's own stdout.
  return isTTY ? styleText(style, text, { validateStream: false }) : text
}

/** Replaces unprintable characters by "?", so that untrusted text cannot control the terminal. */
export function printable (text: string, max = 200): string {
  return text.slice(0, max).replace(/[^\x20-\x7e\p{L}\p{N}\p{P}\p{S}]/gu, '?')
}

/** OpenAI takes only 200 for received and retries after any other status. */
export function paintStatus (terminal: Terminal, status: number | undefined): string {
  return paint(terminal, status === 200 ? 'green' : 'red', status === undefined ? '---' : String(status))
}

/** The answer in a word or two. */
export function told ({ status, code, duplicate }: Posted): string {
  if (code !== undefined) return printable(code)
  if (status === 200) return duplicate ? 'duplicate' : 'received'
  return STATUS_CODES[status!] ?? ''
}

export function milliseconds (ms: number): string {
  return `${ms.toFixed(1)} ms`
}

const BAR = 30

/** A progress bar that overwrites the one before. For a terminal only. */
export function progress (done: number, total: number, text: string): string {
  const filled = Math.floor(BAR * done / total)
  return `\r${'█'.repeat(filled)}${'░'.repeat(BAR - filled)} ${done}/${total}  ${text}\x1b[K`
}
