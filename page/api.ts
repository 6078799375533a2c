import type { DeadInfo, Delivered, Detail, Fault, Repeated } from '../lib/inspector/messages.ts'

/** The API is relative to this script, because a proxy may serve the page under any path. */
const BASE = new URL('./api/', import.meta.url)

async function answer<T> (path: string, init?: RequestInit): Promise<T> {
  let response
  try {
    response = await fetch(new URL(path, BASE), init)
  } catch {
    throw new Error('The app does not answer. Is it running?')
  }
  const body = await response.json().catch(() => ({})) as T & Partial<Fault>
  if (response.ok) return body
  throw Object.assign(new Error(body.message ?? `The app answers ${response.status}.`), { code: body.code })
}

async function post<T> (path: string, body: object): Promise<T> {
  return await answer<T>(path, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body) })
}

const query = (name: string, value: string): string => value === '' ? '' : `?${name}=${encodeURIComponent(value)}`

export const api = {
  events: (): EventSource => new EventSource(new URL('events', BASE)),
  detail: async (id: number) => await answer<Detail>(`deliveries/${id}`),
  sample: async (type: string) => (await answer<{ text: string }>(`sample${query('type', type)}`)).text,
  dead: async () => await answer<DeadInfo[]>('dead'),
  deliver: async (endpoint: string, url: string, tenant: string, body: string) => await post<Delivered>('deliver', { endpoint, url, body, ...(tenant !== '' && { tenant }) }),
  again: async (id: number, body?: string) => await post<Repeated>('again', { id, body }),
  requeue: async ({ endpoint, webhookId, tenant }: Pick<DeadInfo, 'endpoint' | 'webhookId' | 'tenant'>, force: boolean) =>
    (await post<{ requeued: boolean }>('requeue', { endpoint, webhookId, tenant, force })).requeued,
  requeueAll: async (type: string) => await post<{ requeued: number, failed: string | null }>('requeue-all', type === '' ? {} : { type })
}
