import { useEffect, useRef, useState } from 'preact/hooks'
import type { VNode } from 'preact'
import type { AttemptInfo, Detail, DiagnosisInfo, ErrorInfo, Row, StepInfo } from '../lib/inspector/messages.ts'
import { api } from './api.ts'
import { asCurl, asTest, asTrigger } from './copies.ts'
import { AgainDialog, EditDialog } from './dialogs.ts'
import { STATES, instant, ms, plural, shortCode, time } from './format.ts'
import { html } from './html.ts'
import { Payload, bytesOf, textOf } from './payload.ts'

export function State ({ state }: { state: Row['state'] }): VNode {
  return html`<span class=${`state ${STATES[state].tone}`} title=${STATES[state].meaning}>${state}</span>`
}

interface Props {
  id: number
  /** The delivery's row in the list; `undefined` when the list no longer has it. */
  row: Row | undefined
  readOnly: boolean
  onClose: () => void
  say: (text: string) => void
}

export function DetailView ({ id, row, readOnly, onClose, say }: Props): VNode {
  const [detail, setDetail] = useState<Detail | undefined>(undefined)
  const [fault, setFault] = useState('')
  const [asking, setAsking] = useState<'again' | 'edit' | undefined>(undefined)
  const heading = useRef<HTMLHeadingElement>(null)
  // Loaded again whenever the row in the list changes.
  useEffect(() => {
    let latest = true
    api.detail(id).then(detail => { if (latest) { setDetail(detail); setFault('') } }, (error: Error) => { if (latest) setFault(error.message) })
    return () => { latest = false }
  }, [id, row])
  useEffect(() => { heading.current?.focus() }, [id])

  const shown = detail?.row.id === id ? detail : undefined
  const type = (row ?? shown?.row)?.type ?? 'a delivery'
  const state = (row ?? shown?.row)?.state
  return html`
    <aside class="detail" aria-labelledby="detail-title" onKeyDown=${(event: KeyboardEvent) => { if (event.key === 'Escape' && asking === undefined) onClose() }}>
      <header>
        <h2 id="detail-title" tabindex="-1" ref=${heading}>${type}</h2>
        ${state !== undefined && html`<${State} state=${state} />`}
        <button type="button" class="plain close" aria-label="Close" onClick=${onClose}>✕</button>
      </header>
      ${fault !== '' && html`<p class="fault" role="alert">${fault}</p>`}
      ${shown === undefined
        ? fault === '' && html`<p class="hint">Loading…</p>`
        : html`<${Body} detail=${shown} readOnly=${readOnly} say=${say} ask=${setAsking} />`}
      ${shown !== undefined && asking === 'again' && html`<${AgainDialog} id=${id} type=${type} url=${shown.url} say=${say} onClose=${() => setAsking(undefined)} />`}
      ${shown !== undefined && asking === 'edit' && html`<${EditDialog} id=${id} type=${type} url=${shown.url} text=${editable(shown)} say=${say} onClose=${() => setAsking(undefined)} />`}
    </aside>`
}

function editable ({ body }: Detail): string {
  const text = body === null ? '' : textOf(bytesOf(body)) ?? ''
  try {
    return JSON.stringify(JSON.parse(text), null, 2)
  } catch {
    return text
  }
}

function Body ({ detail, readOnly, say, ask }: { detail: Detail, readOnly: boolean, say: (text: string) => void, ask: (what: 'again' | 'edit') => void }): VNode {
  const { row, url, timestamp, steps, headers, body, refusal, diagnosis, duplicate, attempts, death, others } = detail
  const fact = (name: string, value: unknown): VNode | false => value !== null && html`<div><dt>${name}</dt><dd>${value}</dd></div>`
  const handled = attempts.length > 0 && html`
    <section>
      <h3>${plural(row.attempts, 'attempt', 'attempts')}</h3>
      ${attempts.map(attempt => html`<${Attempt} attempt=${attempt} />`)}
    </section>`
  // What a reader looks for comes first: after a failure, the attempts.
  const failed = attempts.some(({ outcome }) => outcome === 'failed')
  return html`
    <${Buttons} detail=${detail} readOnly=${readOnly} say=${say} ask=${ask} />
    <dl class="facts">
      ${fact('Came', `${time(row.at)} (${instant(row.at)})`)}
      ${fact('Answered', row.status !== null && `${row.status}${row.code === null ? '' : ` ${shortCode(row.code)}`}${row.ms === null ? '' : ` after ${ms(row.ms)}`}`)}
      ${refusal !== null && refusal.told !== null && fact('Sender was told', `${refusal.statusCode} ${shortCode(refusal.told)}, lest strangers find out which tenants there are`)}
      ${fact('webhook-id', row.webhookId)}
      ${fact('Signed', timestamp === null ? null : instant(timestamp * 1_000))}
      ${fact('Endpoint', row.endpoint)}
      ${url !== row.endpoint && fact('URL', url)}
      ${fact('Tenant', row.tenant)}
      ${fact('Resource', row.resource)}
      ${duplicate !== null && fact('Duplicate', DUPLICATES[duplicate])}
      ${row.own && fact('Sent', row.again === null ? 'from this page' : html`from this page, <a href=${`#/${row.again}`}>again</a>`)}
    </dl>
    ${refusal !== null && refusal.code !== HANDLER_FAILED && html`
      <section class="cause">
        <h3>${row.state === 'refused' ? 'Why it was refused' : `Why the sender was told ${refusal.statusCode}`}</h3>
        <p><code>${refusal.code}</code> ${refusal.message}</p>
        ${(diagnosis ?? refusal.fix) !== null && html`<${Diagnosis} diagnosis=${diagnosis} fix=${diagnosis?.fix ?? refusal.fix} />`}
        ${refusal.error !== null && html`<${Failure} error=${refusal.error} />`}
      </section>`}
    ${death !== null && html`
      <section class="cause">
        <h3>Dead since ${time(death.at)}</h3>
        <p>${plural(death.attempts, 'attempt', 'attempts')}, the last of which ended with:</p>
        ${death.errors.map(error => html`<${Failure} error=${error} />`)}
      </section>`}
    ${failed && handled}
    ${steps !== null && html`<${Steps} steps=${steps} />`}
    ${!failed && handled}
    ${body === null
      ? html`<section><h3>Payload</h3><p class="hint">${row.state === 'refused' ? 'Its headers condemned it, so its body was not read.' : 'Its body is too large to be kept.'}</p></section>`
      : html`<${Payload} body=${body} />`}
    ${headers !== null && html`
      <section>
        <h3>Headers</h3>
        <dl class="headers code">${headers.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
      </section>`}
    ${others.length > 0 && html`
      <section>
        <h3>With the same webhook-id</h3>
        <ul>${others.map(other => html`<li><a href=${`#/${other.id}`}>${time(other.at)}</a> <${State} state=${other.state} /> ${other.status}</li>`)}</ul>
      </section>`}`
}

/** This refusal is not shown, because the errors of the handlers say more. */
const HANDLER_FAILED = 'FST_OPENAI_WEBHOOK_HANDLER_FAILED'

const DUPLICATES: Readonly<Record<string, string>> = {
  processed: 'it had been processed before',
  joined: 'it joined one that was running in this process',
  elsewhere: 'it was running in another process',
  queued: 'the runner had it already'
}

function Buttons ({ detail, readOnly, say, ask }: { detail: Detail, readOnly: boolean, say: (text: string) => void, ask: (what: 'again' | 'edit') => void }): VNode {
  const { row, body, deliver, death } = detail
  const [refusal, refuse] = useState('')
  const text = body === null ? undefined : textOf(bytesOf(body))
  const isEvent = text !== undefined && row.type !== null && /^\s*\{/.test(text) && row.state !== 'refused'
  const copy = (what: string, make: () => string) => async (): Promise<void> => {
    try {
      await toClipboard(make())
      say(`Copied as ${what}.`)
    } catch (error) {
      say(`Not copied: ${(error as Error).message}`)
    }
  }
  const requeue = async (force: boolean): Promise<void> => {
    try {
      say(await api.requeue({ endpoint: row.endpoint, webhookId: row.webhookId!, tenant: row.tenant }, force) ? 'Back in the queue.' : 'It is not among the dead any more.')
      refuse('')
    } catch (error) {
      if ((error as { code?: string }).code === 'FST_OPENAI_WEBHOOK_NEEDS_FORCE' && !force) refuse((error as Error).message)
      else say((error as Error).message)
    }
  }
  return html`
    <div class="buttons">
      ${!readOnly && deliver.again === null && html`<button type="button" onClick=${() => ask('again')}>Deliver again</button>`}
      ${!readOnly && deliver.edited === null && html`<button type="button" onClick=${() => ask('edit')}>Edit and deliver</button>`}
      ${!readOnly && death !== null && row.state === 'dead' && html`<button type="button" onClick=${async () => await requeue(false)}>Requeue</button>`}
      ${text !== undefined && html`<button type="button" class="quiet" onClick=${copy('curl', () => asCurl(detail, text, location.origin))}>Copy as curl</button>`}
      ${isEvent && html`
        <button type="button" class="quiet" onClick=${copy('a trigger command', () => asTrigger(detail, text, location.origin))}>Copy as trigger</button>
        <button type="button" class="quiet" onClick=${copy('a test', () => asTest(detail, text))}>Copy as test</button>`}
    </div>
    ${!readOnly && deliver.again !== null && html`<p class="hint">It cannot be delivered again: ${deliver.again}.</p>`}
    ${refusal !== '' && html`<p class="fault" role="alert">${refusal} <button type="button" onClick=${async () => await requeue(true)}>By force</button></p>`}`
}

async function toClipboard (text: string): Promise<void> {
  if (navigator.clipboard !== undefined) {
    try {
      return await navigator.clipboard.writeText(text)
    } catch {} // the clipboard is not allowed, but the older way may be
  }
  const area = document.createElement('textarea')
  area.value = text
  document.body.append(area)
  area.select()
  const copied = document.execCommand('copy')
  area.remove()
  if (!copied) throw new Error('the browser does not allow it')
}

function Diagnosis ({ diagnosis, fix }: { diagnosis: DiagnosisInfo | null, fix: string | null }): VNode {
  return html`
    <dl class="facts">
      ${diagnosis !== null && html`<div><dt>${diagnosis.cause === null ? 'Likely, but not proved' : 'Cause'}</dt><dd>${diagnosis.message}${diagnosis.cause !== null && html` <code>${diagnosis.cause}</code>`}</dd></div>`}
      ${fix !== null && html`<div><dt>What to change</dt><dd>${fix}</dd></div>`}
    </dl>
    ${diagnosis !== null && diagnosis.ruledOut.length > 0 && html`<details><summary>Ruled out</summary><ul>${diagnosis.ruledOut.map(each => html`<li>${each}</li>`)}</ul></details>`}`
}

function Failure ({ error: { handler, message, stack } }: { error: ErrorInfo }): VNode {
  return html`
    <div class="failure">
      <p>${handler !== null && html`<strong>${handler}</strong> `}${message}</p>
      ${stack !== '' && html`<pre tabindex="0">${stack}</pre>`}
    </div>`
}

function Steps ({ steps }: { steps: readonly StepInfo[] }): VNode {
  const whole = Math.max(0.001, ...steps.map(({ to }) => to ?? 0))
  return html`
    <section>
      <h3>Steps</h3>
      <ol class="steps">
        ${steps.map(({ name, from, to, failed }) => html`
          <li class=${failed ? 'bad' : ''}>
            <span class="name">${name}${failed && html`<span class="hidden"> failed</span>`}</span>
            <svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">
              <rect x=${100 * (from ?? 0) / whole} width=${Math.max(0.7, 100 * ((to ?? whole) - (from ?? 0)) / whole)} y="0" height="8" />
            </svg>
            <span class="ms">${to === null ? '–' : ms(to - (from ?? 0))}</span>
          </li>`)}
      </ol>
    </section>`
}

function Attempt ({ attempt: { number, at, queued, ms: took, outcome, handlers, errors } }: { attempt: AttemptInfo }): VNode {
  return html`
    <div class="attempt">
      <p><strong>${number}.</strong> ${time(at)} ${queued ? 'out of the queue' : 'in the request'}, ${outcome}${took !== null && ` after ${ms(took)}`}</p>
      ${handlers.length === 0
        ? html`<p class="hint">No handler matched.</p>`
        : html`<ul class="handlers">${handlers.map(({ name, outcome, ms: took }) => html`
            <li><span class=${`state ${OUTCOMES[outcome]}`}>${outcome}</span> <code>${name}</code>${took !== null && html` <small>${ms(took)}</small>`}</li>`)}</ul>`}
      ${errors.map(error => html`<${Failure} error=${error} />`)}
    </div>`
}

const OUTCOMES: Readonly<Record<string, string>> = { running: 'busy', succeeded: 'good', failed: 'bad', skipped: 'dull' }
