import { Component, render } from 'preact'
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from 'preact/hooks'
import type { VNode } from 'preact'
import type { DeadInfo, Hello, Row, Stats } from '../lib/inspector/messages.ts'
import { api } from './api.ts'
import { DetailView, State } from './detail.ts'
import { Dialog, SampleDialog } from './dialogs.ts'
import { STATES, instant, ms, plural, shortCode, time } from './format.ts'
import { html } from './html.ts'
import { NO_FILTER, Store, matching } from './store.ts'
import type { Filter } from './store.ts'

/** The number of rows that are drawn at first, and the number that each press of the button below them adds. */
const DRAWN = 100
const MORE = 200

let redraw = (): void => {}
const store = new Store(() => redraw())

function App (): VNode {
  const [, setVersion] = useState(0)
  const [paused, setPaused] = useState<readonly Row[] | undefined>(undefined)
  const [filter, setFilter] = useState<Filter>(NO_FILTER)
  const [drawn, setDrawn] = useState(DRAWN)
  const [selected, setSelected] = useState(selectedId)
  const [sending, setSending] = useState(false)
  const [said, say] = useSaid()
  const search = useRef<HTMLInputElement>(null)
  useEffect(() => {
    let waiting = false
    // Messages may come faster than frames, so they are drawn at most once per frame.
    redraw = () => {
      if (waiting) return
      waiting = true
      requestAnimationFrame(() => {
        waiting = false
        setVersion(version => version + 1)
      })
    }
    store.connect()
    const onHash = (): void => setSelected(selectedId())
    const onKey = (event: KeyboardEvent): void => {
      if (event.key !== '/' || event.ctrlKey || event.metaKey || /^(?:INPUT|TEXTAREA|SELECT)$/.test((event.target as Element).tagName)) return
      event.preventDefault()
      search.current?.focus()
    }
    addEventListener('hashchange', onHash)
    addEventListener('keydown', onKey)
  }, [])

  const shown = useRef(selected)
  const list = useRef<HTMLElement>(null)
  useLayoutEffect(() => {
    const closed = shown.current
    shown.current = selected
    // The closed detail had the focus if `document.body` has it now. Any other element keeps the focus.
    if (selected !== undefined || closed === undefined || document.activeElement !== document.body) return
    // The row may have been dropped or filtered out. Then the list gets the focus.
    ;(list.current?.querySelector<HTMLElement>(`tbody a[href="#/${closed}"]`) ?? list.current)?.focus()
  }, [selected])

  const { hello, stats, rows: live, version, connected } = store
  const rows = paused ?? live
  const found = useMemo(() => matching(rows, filter), [rows, filter, version])
  if (hello === undefined) {
    return html`<main class="empty"><h1>OpenAI webhooks</h1><p role="status">${connected ? 'Loading…' : 'Connecting to the app…'}</p></main>`
  }
  const close = (): void => { history.pushState(null, '', '#'); setSelected(undefined) }
  const change = (name: keyof Filter) => (event: Event): void => {
    setFilter({ ...filter, [name]: (event.target as HTMLInputElement).value })
    setDrawn(DRAWN)
  }
  const news = paused === undefined ? 0 : live.filter(({ id }) => id > (paused[0]?.id ?? 0)).length
  return html`
    <header class="top">
      <h1>OpenAI webhooks</h1>
      <span class=${`link ${connected ? 'good' : 'bad'}`} role="status">${connected ? (paused === undefined ? 'live' : 'paused') : 'not connected, trying again'}</span>
      ${stats !== undefined && html`<${Figures} stats=${stats} />`}
      ${hello.readOnly && html`<span class="state dull" title="This page may only look here. The option readOnly: false lets it act.">read-only</span>`}
      <span class="space"></span>
      <button type="button" onClick=${() => setPaused(paused === undefined ? live : undefined)}>${paused === undefined ? 'Pause' : 'Resume'}</button>
      ${!hello.readOnly && html`<button type="button" class="primary" onClick=${() => setSending(true)}>Send a sample</button>`}
    </header>
    <div class=${selected === undefined ? 'panes' : 'panes open'}>
      <main tabindex="-1" ref=${list}>
        <${Filters} filter=${filter} rows=${rows} hello=${hello} change=${change} search=${search} />
        ${selected === undefined && hello.deadLetters && (stats?.dead ?? 0) > 0 && html`<${DeadLetters} count=${stats!.dead!} readOnly=${hello.readOnly} say=${say} />`}
        ${paused !== undefined && html`<p class="hint" role="status">Paused. ${news > 0 && `${plural(news, 'delivery has', 'deliveries have')} come since.`}</p>`}
        ${rows.length === 0
          ? html`<${Nothing} hello=${hello} />`
          : found.length === 0
            ? html`<p class="empty">None of ${plural(rows.length, 'delivery', 'deliveries')} fits. <button type="button" onClick=${() => setFilter(NO_FILTER)}>Clear the filter</button></p>`
            : html`<${Table} rows=${found.slice(0, drawn)} selected=${selected} hello=${hello} />`}
        ${found.length > drawn && html`<p class="more"><button type="button" onClick=${() => setDrawn(drawn + MORE)}>Show more of ${found.length}</button></p>`}
      </main>
      ${selected !== undefined && html`<${DetailView} id=${selected} row=${live.find(({ id }) => id === selected)} readOnly=${hello.readOnly} say=${say} onClose=${close} />`}
    </div>
    <p class=${said === '' ? 'said' : 'said shown'} role="status" aria-live="polite">${said}</p>
    ${sending && html`<${SampleDialog} types=${hello.types} endpoints=${hello.endpoints} say=${say} onClose=${() => setSending(false)} />`}`
}

function selectedId (): number | undefined {
  const id = /^#\/(\d+)$/.exec(location.hash)?.[1]
  return id === undefined ? undefined : Number(id)
}

/** A message that disappears by itself. */
function useSaid (): [string, (text: string) => void] {
  const [said, setSaid] = useState('')
  useEffect(() => {
    if (said === '') return
    const timer = setTimeout(() => setSaid(''), 8_000)
    return () => clearTimeout(timer)
  }, [said])
  return [said, setSaid]
}

function Figures ({ stats: { seconds, total, failed, depth, dead } }: { stats: Stats }): VNode {
  const most = Math.max(1, ...total, ...failed)
  const sum = (counts: readonly number[]): number => counts.reduce((all, count) => all + count, 0)
  const minutes = Math.round(total.length * seconds / 60)
  const bar = (counts: readonly number[], name: string): VNode =>
    html`<path class=${name} d=${counts.map((count, i) => count === 0 ? '' : `M${i + 0.5} 20V${20 - Math.max(1, 19 * count / most)}`).join('')} />`
  return html`
    <svg class="spark" viewBox="0 0 ${total.length} 20" preserveAspectRatio="none" role="img"
      aria-label=${`The last ${minutes} minutes: ${plural(sum(total), 'delivery', 'deliveries')}, ${sum(failed)} failed or refused`}>
      ${bar(total, 'total')}${bar(failed, 'failed')}
    </svg>
    ${depth !== null && html`<span class="figure">queued <strong>${depth}</strong></span>`}
    ${dead !== null && html`<span class=${dead > 0 ? 'figure bad' : 'figure'}>dead <strong>${dead}</strong></span>`}`
}

interface FilterProps {
  filter: Filter
  rows: readonly Row[]
  hello: Hello
  change: (name: keyof Filter) => (event: Event) => void
  search: { current: HTMLInputElement | null }
}

function Filters ({ filter, rows, hello, change, search }: FilterProps): VNode {
  const distinct = (values: Array<string | null>, chosen: string): string[] => [...new Set([...values, chosen])].filter(value => value !== null && value !== '').sort() as string[]
  const choice = (name: keyof Filter, label: string, values: readonly string[]): VNode => html`
    <select aria-label=${label} value=${filter[name]} onChange=${change(name)}>
      <option value="">${label}: all</option>
      ${values.map(value => html`<option value=${value}>${value}</option>`)}
    </select>`
  const tenants = distinct(rows.map(({ tenant }) => tenant), filter.tenant)
  return html`
    <div class="filters" role="search">
      <input type="search" aria-label="Filter" placeholder="Filter by id, type, code… ( / )" ref=${search} value=${filter.text} onInput=${change('text')} />
      ${choice('type', 'Type', distinct(rows.map(({ type }) => type), filter.type))}
      ${choice('state', 'State', Object.keys(STATES))}
      ${hello.endpoints.length > 1 && choice('endpoint', 'Endpoint', hello.endpoints.map(({ url }) => url))}
      ${tenants.length > 0 && choice('tenant', 'Tenant', tenants)}
    </div>`
}

function Nothing ({ hello }: { hello: Hello }): VNode {
  const [first] = hello.endpoints
  return html`
    <div class="empty">
      <h2>Nothing yet</h2>
      ${first === undefined
        ? html`<p>The app has no receiving route: leave <code>path</code> at its default, or add one with <code>app.openaiWebhook.route()</code>.</p>`
        : hello.readOnly
          ? html`<p>Deliveries to <code>${first.url}</code> will show here as they come.</p>`
          : html`<p>Press <em>Send a sample</em>, or have OpenAI deliver to <code>${first.url}</code>.</p>`}
    </div>`
}

function Table ({ rows, selected, hello }: { rows: readonly Row[], selected: number | undefined, hello: Hello }): VNode {
  const endpoints = hello.endpoints.length > 1
  const tenants = rows.some(({ tenant }) => tenant !== null)
  const onKeyDown = (event: KeyboardEvent): void => {
    const step = event.key === 'ArrowDown' ? 1 : event.key === 'ArrowUp' ? -1 : 0
    if (step === 0) return
    const links = [...(event.currentTarget as Element).querySelectorAll<HTMLElement>('tbody a')]
    const next = links[links.indexOf(event.target as HTMLElement) + step]
    if (next === undefined) return
    event.preventDefault()
    next.focus()
  }
  return html`
    <table onKeyDown=${onKeyDown}>
      <caption class="hidden">Deliveries, the newest first</caption>
      <thead>
        <tr>
          <th scope="col" class="time">Time</th><th scope="col" class="type">Type</th><th scope="col" class="state-of">State</th><th scope="col" class="answer">Answer</th>
          <th scope="col" class="low">webhook-id</th><th scope="col" class="low">Resource</th>
          ${endpoints && html`<th scope="col" class="low">Endpoint</th>`}${tenants && html`<th scope="col" class="low">Tenant</th>`}
          <th scope="col" class="mid number">Attempts</th><th scope="col" class="mid number" title="until its sender was answered">ms</th>
        </tr>
      </thead>
      <tbody>
        ${rows.map(row => html`<${TableRow} key=${row.id} row=${row} selected=${row.id === selected} endpoints=${endpoints} tenants=${tenants} />`)}
      </tbody>
    </table>`
}

/** Allows line breaks after dots, slashes and underscores, because the end of a type or an endpoint distinguishes it from others. */
const breakable = (name: string): unknown => name.split(/(?<=[./_])/).map((part, i) => i === 0 ? part : html`<wbr />${part}`)

interface RowProps {
  row: Row
  selected: boolean
  endpoints: boolean
  tenants: boolean
}

/** A row that is drawn again only when it has changed. */
class TableRow extends Component<RowProps> {
  override shouldComponentUpdate ({ row, selected, endpoints, tenants }: RowProps): boolean {
    const { props } = this
    return row !== props.row || selected !== props.selected || endpoints !== props.endpoints || tenants !== props.tenants
  }

  render ({ row, selected, endpoints, tenants }: RowProps): VNode {
    const { id, at, type, webhookId, endpoint, tenant, resource, state, status, code, attempts, ms: took, own, again } = row
    return html`
      <tr class=${selected ? 'selected' : ''} onClick=${() => { location.hash = `#/${id}` }}>
        <td class="time" title=${instant(at)}>${time(at)}</td>
        <td class="type"><a href=${`#/${id}`} aria-current=${selected ? 'true' : undefined}>${breakable(type ?? 'unknown')}</a>${own && html` <small title="sent from this page">${again === null ? 'sample' : 'again'}</small>`}</td>
        <td><${State} state=${state} /></td>
        <td class="answer" title=${code ?? undefined}>${status ?? ''}${code !== null && html` <small>${shortCode(code)}</small>`}</td>
        <td class="low code" title=${webhookId}>${webhookId}</td>
        <td class="low code" title=${resource}>${resource}</td>
        ${endpoints && html`<td class="low endpoint">${breakable(endpoint)}</td>`}
        ${tenants && html`<td class="low" title=${tenant}>${tenant}</td>`}
        <td class="mid number">${attempts > 0 ? attempts : ''}</td>
        <td class="mid number">${took === null ? '' : ms(took)}</td>
      </tr>`
  }
}

function DeadLetters ({ count, readOnly, say }: { count: number, readOnly: boolean, say: (text: string) => void }): VNode {
  const [dead, setDead] = useState<readonly DeadInfo[]>([])
  const [type, setType] = useState('')
  const [fault, setFault] = useState<{ text: string, of?: DeadInfo }>({ text: '' })
  const [asking, setAsking] = useState(false)
  const [turn, setTurn] = useState(0)
  useEffect(() => {
    let latest = true
    api.dead().then(dead => { if (latest) setDead(dead) }, (error: Error) => { if (latest) setFault({ text: error.message }) })
    return () => { latest = false }
  }, [count, turn])
  const types = [...new Set(dead.map(({ type }) => type))].sort()
  const shown = dead.filter(each => type === '' || each.type === type)
  const requeue = async (delivery: DeadInfo, force: boolean): Promise<void> => {
    try {
      const done = await api.requeue(delivery, force)
      say(done ? `${delivery.type} is back in the queue.` : 'It is not among the dead any more.')
      setFault({ text: '' })
      setDead(dead.filter(each => each !== delivery))
    } catch (error) {
      const needsForce = (error as { code?: string }).code === 'FST_OPENAI_WEBHOOK_NEEDS_FORCE'
      setFault({ text: (error as Error).message, ...(needsForce && { of: delivery }) })
    }
  }
  const all = async (): Promise<void> => {
    const { requeued, failed } = await api.requeueAll(type)
    say(`${plural(requeued, 'delivery is', 'deliveries are')} back in the queue.`)
    if (failed !== null) setFault({ text: failed })
    setTurn(turn + 1)
  }
  return html`
    <section class="dead" aria-labelledby="dead-title">
      <header>
        <h2 id="dead-title">${plural(count, 'dead delivery', 'dead deliveries')}</h2>
        ${types.length > 1 && html`
          <select aria-label="Type of dead deliveries" value=${type} onChange=${(event: Event) => setType((event.target as HTMLSelectElement).value)}>
            <option value="">all types</option>${types.map(each => html`<option value=${each}>${each}</option>`)}
          </select>`}
        ${!readOnly && shown.length > 1 && html`<button type="button" onClick=${() => setAsking(true)}>All back to the queue</button>`}
      </header>
      ${fault.text !== '' && html`<p class="fault" role="alert">${fault.text} ${fault.of !== undefined && html`<button type="button" onClick=${async () => await requeue(fault.of!, true)}>By force</button>`}</p>`}
      <ul>
        ${shown.map(delivery => html`
          <li key=${`${delivery.endpoint} ${delivery.tenant ?? ''} ${delivery.webhookId}`}>
            <details>
              <summary>
                <span class="type">${delivery.type}</span> <small>${time(delivery.diedAt)}, ${plural(delivery.attempts, 'attempt', 'attempts')}${delivery.tenant !== null && `, ${delivery.tenant}`}: ${delivery.errors[0]?.message}</small>
              </summary>
              <p class="code">${delivery.webhookId}</p>
              ${delivery.finished.length > 0 && html`<p class="hint">These have succeeded and do not run again: ${delivery.finished.join(', ')}</p>`}
              ${delivery.errors.map(({ handler, message, stack }) => html`<p>${handler !== null && html`<strong>${handler}</strong> `}${message}</p>${stack !== '' && html`<pre tabindex="0">${stack}</pre>`}`)}
              <pre tabindex="0">${delivery.event}</pre>
            </details>
            ${!readOnly && html`<button type="button" onClick=${async () => await requeue(delivery, false)}>Requeue</button>`}
          </li>`)}
      </ul>
      ${asking && html`
        <${Dialog} title="All of them back to the queue?" confirm="Yes, all" onConfirm=${all} onClose=${() => setAsking(false)}>
          <p>Each gets its attempts anew. Handlers that have succeeded do not run again.</p>
        <//>`}
    </section>`
}

render(html`<${App} />`, document.body)
