import { useEffect, useLayoutEffect, useRef, useState } from 'preact/hooks'
import type { VNode } from 'preact'
import type { Delivered, EndpointInfo, Repeated } from '../lib/inspector/messages.ts'
import { api } from './api.ts'
import { shortCode } from './format.ts'
import { html } from './html.ts'
import type { Child } from './html.ts'

interface DialogProps {
  title: string
  /** The label of the button that confirms. */
  confirm: string
  disabled?: boolean
  onConfirm: () => Promise<void>
  onClose: () => void
  children?: Child
}

/** A dialog that asks before an action. It stays open when the action fails. */
export function Dialog ({ title, confirm, disabled = false, onConfirm, onClose, children }: DialogProps): VNode {
  const dialog = useRef<HTMLDialogElement>(null)
  const [fault, setFault] = useState<Error & { id?: number | null } | undefined>(undefined)
  const [busy, setBusy] = useState(false)
  useLayoutEffect(() => {
    const { current } = dialog
    current!.showModal()
    // When a dialog is closed, the browser returns the focus to the button that opened it. It does not when the dialog is only removed.
    return () => { current!.close() }
  }, [])
  const submit = async (event: Event): Promise<void> => {
    event.preventDefault()
    setBusy(true)
    setFault(undefined)
    try {
      await onConfirm()
      onClose()
    } catch (error) {
      setFault(error as Error)
      setBusy(false)
    }
  }
  return html`
    <dialog ref=${dialog} aria-labelledby="dialog-title" onClose=${onClose}>
      <form onSubmit=${submit}>
        <h2 id="dialog-title">${title}</h2>
        ${children}
        ${fault !== undefined && html`<p class="fault" role="alert">${fault.message}${fault.id && html` <a href=${`#/${fault.id}`} onClick=${onClose}>Show it</a>`}</p>`}
        <div class="buttons">
          <button type="button" onClick=${onClose}>Cancel</button>
          <button type="submit" class="primary" disabled=${disabled || busy}>${confirm}</button>
        </div>
      </form>
    </dialog>`
}

const isJson = (text: string): boolean => {
  try {
    JSON.parse(text)
    return true
  } catch {
    return false
  }
}

/** The editor of the event to deliver. */
function Editor ({ text, onEdit }: { text: string, onEdit: (text: string) => void }): VNode {
  return html`
    <label class="wide">Event
      <textarea rows="14" spellcheck=${false} value=${text} onInput=${(event: InputEvent) => onEdit((event.target as HTMLTextAreaElement).value)}></textarea>
    </label>
    <p class="hint" role="status">${isJson(text) ? 'It is signed here and sent through the real route, with a webhook-id of its own.' : 'This is not JSON. It can be sent all the same, and will be refused.'}</p>`
}

/** Returns what to say about an answer. @throws the answer when its status is 400 or above, so that the dialog stays open */
function told (type: string, { status, body, id }: Delivered & Partial<Repeated>): string {
  if (status < 400) return `${type}: answered ${status}`
  throw Object.assign(new Error(`Answered ${status} ${reasonOf(body)}`), { id })
}

function reasonOf (body: string): string {
  try {
    const { code, message } = JSON.parse(body) as { code?: unknown, message?: unknown }
    if (typeof message === 'string') return `${typeof code === 'string' ? `${shortCode(code)}: ` : ''}${message}`
  } catch {} // an error handler of the app may answer with any text
  return body.slice(0, 200)
}

export function SampleDialog ({ types, endpoints, onClose, say }: { types: readonly string[], endpoints: readonly EndpointInfo[], onClose: () => void, say: (text: string) => void }): VNode {
  const signing = endpoints.filter(({ signs }) => signs)
  const [type, setType] = useState(types.includes('response.completed') ? 'response.completed' : types[0]!)
  const [endpoint, setEndpoint] = useState(signing[0]?.url ?? '')
  const [url, setUrl] = useState(signing[0]?.url ?? '')
  const [tenant, setTenant] = useState('')
  const [text, setText] = useState('')
  const [fault, setFault] = useState('')
  useEffect(() => {
    let latest = true
    api.sample(type).then(sample => { if (latest) setText(sample) }, (error: Error) => setFault(error.message))
    return () => { latest = false }
  }, [type])
  const choose = (event: Event): void => {
    const { value } = event.target as HTMLSelectElement
    setEndpoint(value)
    setUrl(value)
  }
  if (signing.length === 0) {
    return html`<${Dialog} title="No endpoint to send to" confirm="Close" onConfirm=${async () => {}} onClose=${onClose}>
      <p>There is no receiving route here whose deliveries can be signed: its verifier is your own.</p>
    <//>`
  }
  const isPattern = /[:*]/.test(endpoint)
  const hasTenants = signing.some(each => each.url === endpoint && each.tenants)
  return html`
    <${Dialog} title="Send a signed sample" confirm="Deliver" disabled=${text === ''} onClose=${onClose}
      onConfirm=${async () => { say(told(type, await api.deliver(endpoint, url, tenant, text))) }}>
      <label class="wide">Sample of
        <select value=${type} onChange=${(event: Event) => setType((event.target as HTMLSelectElement).value)}>
          ${types.map(each => html`<option value=${each}>${each}</option>`)}
        </select>
      </label>
      ${signing.length > 1 && html`<label class="wide">Endpoint
        <select value=${endpoint} onChange=${choose}>${signing.map(each => html`<option value=${each.url}>${each.url}</option>`)}</select>
      </label>`}
      ${(isPattern || hasTenants) && html`<label class="wide">${isPattern ? 'URL, with its parameters filled in' : 'URL'}
        <input type="text" value=${url} onInput=${(event: Event) => setUrl((event.target as HTMLInputElement).value)} />
      </label>`}
      ${hasTenants && html`<label class="wide">Tenant
        <input type="text" value=${tenant} onInput=${(event: Event) => setTenant((event.target as HTMLInputElement).value)} />
      </label>`}
      <${Editor} text=${text} onEdit=${setText} />
      ${fault !== '' && html`<p class="fault" role="alert">${fault}</p>`}
    <//>`
}

interface AgainProps {
  id: number
  type: string
  url: string
  onClose: () => void
  say: (text: string) => void
}

async function repeat (id: number, type: string, say: (text: string) => void, body?: string): Promise<void> {
  const delivered = await api.again(id, body)
  say(told(type, delivered))
  if (delivered.id !== null) location.hash = `#/${delivered.id}`
}

export function AgainDialog ({ id, type, url, onClose, say }: AgainProps): VNode {
  return html`
    <${Dialog} title=${`Deliver ${type} again?`} confirm="Deliver" onClose=${onClose}
      onConfirm=${async () => await repeat(id, type, say)}>
      <p>The same bytes go to <code>${url}</code> once more, signed anew and with a new webhook-id. To the app it is another
      delivery, so <strong>its handlers run again and their effects repeat</strong>, unless the app handles each resource once
      (<code>idempotency.reconcile</code>) and has handled this one.</p>
    <//>`
}

export function EditDialog ({ id, type, url, text: given, onClose, say }: AgainProps & { text: string }): VNode {
  const [text, setText] = useState(given)
  return html`
    <${Dialog} title=${`Edit ${type} and send it`} confirm="Deliver" onClose=${onClose}
      onConfirm=${async () => await repeat(id, type, say, text)}>
      <p>To <code>${url}</code>. The handlers run for it, and have their effects.</p>
      <${Editor} text=${text} onEdit=${setText} />
    <//>`
}
