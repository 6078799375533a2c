import type { Hello, Row, Stats } from '../lib/inspector/messages.ts'
import { api } from './api.ts'

export interface Filter {
  readonly text: string
  readonly type: string
  readonly state: string
  readonly endpoint: string
  readonly tenant: string
}

export const NO_FILTER: Filter = { text: '', type: '', state: '', endpoint: '', tenant: '' }

/** What the server has sent. Its size has the same bounds as the server's own memory. */
export class Store {
  hello: Hello | undefined
  stats: Stats | undefined
  connected = false
  /** The newest first. */
  rows: readonly Row[] = []
  /** Increases with each message about deliveries. */
  version = 0
  readonly #byId = new Map<number, Row>()
  readonly #changed: () => void

  constructor (changed: () => void) {
    this.#changed = changed
  }

  connect (): void {
    const events = api.events()
    const on = <T>(name: string, take: (data: T) => void): void => {
      events.addEventListener(name, ({ data }) => {
        this.connected = true
        take(JSON.parse(data as string) as T)
        this.#changed()
      })
    }
    on<Hello>('hello', hello => {
      this.hello = hello
      this.stats = hello.stats
      // The server has restarted, or this page had fallen behind.
      this.#byId.clear()
      this.#take(hello.rows)
    })
    on<Row[]>('rows', rows => { this.#take(rows) })
    on<Stats>('stats', stats => { this.stats = stats })
    events.onerror = () => {
      this.connected = false
      this.#changed()
      // A browser does not reconnect after an answer such as 401 or 503.
      if (events.readyState !== EventSource.CLOSED) return
      events.close()
      setTimeout(() => { this.connect() }, 3_000)
    }
  }

  #take (rows: readonly Row[]): void {
    for (const row of rows) this.#byId.set(row.id, row)
    const max = this.hello!.max
    const left = { refused: max.refused, others: max.deliveries }
    const sorted = [...this.#byId.values()].sort((a, b) => b.id - a.id)
    this.rows = sorted.filter(row => left[row.state === 'refused' ? 'refused' : 'others']-- > 0)
    if (this.rows.length < sorted.length) {
      this.#byId.clear()
      for (const row of this.rows) this.#byId.set(row.id, row)
    }
    this.version++
  }
}

export function matching (rows: readonly Row[], { text, type, state, endpoint, tenant }: Filter): readonly Row[] {
  const words = text.toLowerCase().split(/\s+/).filter(word => word !== '')
  return rows.filter(row =>
    (type === '' || row.type === type) &&
    (state === '' || row.state === state) &&
    (endpoint === '' || row.endpoint === endpoint) &&
    (tenant === '' || row.tenant === tenant) &&
    (words.length === 0 || holds(row, words)))
}

function holds ({ type, webhookId, endpoint, tenant, resource, state, status, code }: Row, words: readonly string[]): boolean {
  const text = [type, webhookId, endpoint, tenant, resource, state, status, code].join(' ').toLowerCase()
  return words.every(word => text.includes(word))
}
