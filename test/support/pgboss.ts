import type { FastifyInstance } from 'fastify'
import { PgBoss } from 'pg-boss'
import type { ConstructorOptions } from 'pg-boss'
import type { DeadDelivery, OpenAIWebhookOptions } from '../../lib/index.ts'
import { pgboss } from '../../lib/runners/pgboss.ts'
import type { PgBossOptions } from '../../lib/runners/pgboss.ts'
import { build } from './deliveries.ts'
import { listen } from './observe.ts'
import type { PostgresServer } from './postgres.ts'

type Teardown = { teardown: (fn: () => unknown) => void }

/** A started PgBoss with a user's configuration. It is stopped when the test ends. */
export async function startedBoss (t: Teardown, { url }: PostgresServer, options: ConstructorOptions = {}): Promise<PgBoss> {
  const boss = await new PgBoss({ connectionString: url, monitorIntervalSeconds: 1, ...options }).on('error', () => {}).start()
  t.teardown(async () => await boss.stop({ graceful: false }))
  return boss
}

let queues = 0

export function newQueue (): string {
  return `queue-${++queues}`
}

export interface Queueing {
  readonly app: FastifyInstance
  readonly queueName: string
  /** The messages that `onError` received. */
  readonly told: string[]
  /** The webhook-ids that the handler received. */
  readonly ran: string[]
  readonly died: DeadDelivery[]
  /** What the handler waits for. */
  work: () => Promise<void>
}

/** A receiver that queues deliveries and, by default, also works on them. */
export async function queueing (t: Teardown, boss: PgBoss, options: Partial<PgBossOptions> = {}, plugin: OpenAIWebhookOptions = {}): Promise<Queueing> {
  const { queueName = newQueue() } = options
  const app = await build(t, { runner: pgboss({ boss, backoff: 0, ...options, queueName }), deadline: 10_000, ...plugin })
  const state: Queueing = { app, queueName, told: [], ran: [], died: [], work: async () => {} }
  app.openaiWebhook.onError((error, { webhookId }) => { state.told.push(`${webhookId ?? ''} ${error.message}`) })
  app.openaiWebhook.onDead(delivery => { state.died.push(delivery) })
  app.openaiWebhook.on('batch.failed', async (_event, { webhookId }) => {
    state.ran.push(webhookId)
    await state.work()
  }, { name: 'work' })
  await listen(app)
  return state
}
