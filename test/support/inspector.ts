import type { FastifyInstance, FastifyServerOptions } from 'fastify'
import type { OpenAIWebhookOptions } from '../../lib/index.ts'
import inspector from '../../lib/inspector/index.ts'
import type { InspectorOptions } from '../../lib/inspector/index.ts'
import type { Journal } from '../../lib/inspector/journal.ts'
import type { Detail, Row } from '../../lib/inspector/messages.ts'
import { INSIDE } from '../../lib/observation.ts'
import type { Observation } from '../../lib/observation.ts'
import { build } from './deliveries.ts'

type Teardown = { teardown: (fn: () => unknown) => void }

/** Builds an app with the plugin and the inspector. */
export async function inspected (t: Teardown, options: OpenAIWebhookOptions = {}, page: InspectorOptions = {}, server: FastifyServerOptions = {}): Promise<FastifyInstance> {
  const app = await build(t, options, server)
  await app.register(inspector, page)
  return app
}

export function journalOf (app: FastifyInstance): Journal {
  return (app.openaiWebhook as unknown as Record<typeof INSIDE, { observation: Observation }>)[INSIDE].observation.observer as Journal
}

/** The rows of the list, the oldest first. */
export function rowsOf (app: FastifyInstance): Row[] {
  return journalOf(app).rows()
}

/** What the page shows of a delivery, by default of the last one. */
export async function detailOf (app: FastifyInstance, id = rowsOf(app).at(-1)!.id): Promise<Detail> {
  const response = await app.inject(`/openai-webhook/api/deliveries/${id}`)
  return response.json()
}

/** Requests an action as the page's own script does. */
export async function act (app: FastifyInstance, action: string, body: object, headers: Record<string, string> = { 'sec-fetch-site': 'same-origin' }) {
  return await app.inject({ method: 'POST', url: `/openai-webhook/api/${action}`, headers, payload: body })
}
