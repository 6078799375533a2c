import { useState } from 'preact/hooks'
import type { VNode } from 'preact'
import type { BodyInfo } from '../lib/inspector/messages.ts'
import { html } from './html.ts'

export function bytesOf ({ base64 }: BodyInfo): Uint8Array {
  return Uint8Array.from(atob(base64), character => character.charCodeAt(0))
}

/** The bytes as text; `undefined` when they are not UTF-8. */
export function textOf (bytes: Uint8Array): string | undefined {
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes)
  } catch {
    return undefined
  }
}

type View = 'tree' | 'text' | 'bytes'

export function Payload ({ body }: { body: BodyInfo }): VNode {
  const bytes = bytesOf(body)
  const text = textOf(bytes)
  let parsed: unknown
  try {
    parsed = JSON.parse(text ?? '')
  } catch {}
  const [chosen, choose] = useState<View | undefined>(undefined)
  const view = chosen ?? (parsed !== undefined ? 'tree' : text !== undefined && text !== '' ? 'text' : 'bytes')
  const tab = (name: View, label: string): VNode =>
    html`<button type="button" aria-pressed=${view === name} onClick=${() => choose(name)}>${label}</button>`
  return html`
    <section>
      <h3>Payload <small>${body.size.toLocaleString('en')} bytes${body.arrived ? '' : ', as the queue had it'}</small></h3>
      <div class="tabs" role="group" aria-label="Show the payload as">${tab('tree', 'Tree')}${tab('text', 'Text')}${tab('bytes', 'Bytes')}</div>
      ${view === 'tree' && (parsed === undefined
        ? html`<p class="hint">These bytes are not JSON.</p>`
        : html`<div class="tree code" tabindex="0" role="group" aria-label="Payload as a tree"><${Tree} value=${parsed} level=${0} /></div>`)}
      ${view === 'text' && html`<pre tabindex="0">${text ?? 'These bytes are not UTF-8.'}</pre>`}
      ${view === 'bytes' && html`<${Bytes} bytes=${bytes} />`}
    </section>`
}

/** The most items of an object or a list, and the most characters of a text, that are shown. */
const MAX_ITEMS = 200
const MAX_TEXT = 2_000

function Tree ({ name, value, level }: { name?: string, value: unknown, level: number }): VNode {
  const key = name === undefined ? null : html`<span class="key">${name}</span>: `
  if (typeof value !== 'object' || value === null) {
    const text = JSON.stringify(value)
    const shown = text.length > MAX_TEXT ? `${text.slice(0, MAX_TEXT)}… ${text.length.toLocaleString('en')} characters` : text
    return html`<div class="leaf">${key}<span class=${value === null ? 'null' : typeof value}>${shown}</span></div>`
  }
  const entries = Object.entries(value)
  const [open, close] = Array.isArray(value) ? '[]' : '{}'
  if (entries.length === 0) return html`<div class="leaf">${key}${open}${close}</div>`
  return html`
    <details open=${level < 3}>
      <summary>${key}${open} <small>${entries.length}</small></summary>
      ${entries.slice(0, MAX_ITEMS).map(([inner, item]) => html`<${Tree} name=${inner} value=${item} level=${level + 1} />`)}
      ${entries.length > MAX_ITEMS && html`<div class="leaf hint">… ${entries.length - MAX_ITEMS} more: see Text</div>`}
    </details>`
}

const LINE = 16
const MAX_LINES = 256

function Bytes ({ bytes }: { bytes: Uint8Array }): VNode {
  const lines: string[] = []
  for (let at = 0; at < bytes.length && lines.length < MAX_LINES; at += LINE) {
    const line = [...bytes.subarray(at, at + LINE)]
    const hex = line.map(byte => byte.toString(16).padStart(2, '0')).join(' ')
    lines.push(`${at.toString(16).padStart(6, '0')}  ${hex.padEnd(3 * LINE)} ${line.map(byte => byte >= 0x20 && byte < 0x7f ? String.fromCharCode(byte) : '·').join('')}`)
  }
  if (bytes.length > LINE * MAX_LINES) lines.push(`… ${(bytes.length - LINE * MAX_LINES).toLocaleString('en')} more bytes`)
  return html`<pre class="bytes" tabindex="0">${lines.join('\n')}</pre>`
}
