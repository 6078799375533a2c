import { createHash } from 'node:crypto'
import type { FastifyInstance } from 'fastify'
import type { DeadDelivery, EventContext, OpenAIWebhookOptions, TenantOptions } from '../../lib/index.ts'
import { build, post, sign, thin } from './deliveries.ts'
import type { Signed } from './deliveries.ts'
import { until } from './faults.ts'
import { listen } from './observe.ts'

type Teardown = { teardown: (fn: () => unknown) => void }

/** The secret of a tenant. */
export function secretOf (tenant: string, generation = 0): string {
  return `whsec_${createHash('sha256').update(`${tenant} ${generation}`).digest('base64')}`
}

/** Options that take the tenant from the last part of the URL. `known` says whether the tenant exists. */
export function tenants (known: (tenant: string) => boolean, options: Partial<TenantOptions> = {}): TenantOptions {
  return {
    of: request => request.params.tenant as string,
    secret: async tenant => known(tenant) ? secretOf(tenant) : undefined,
    ...options
  }
}

export const urlOf = (tenant: string): string => `/of/${tenant}`

export interface SignedOf { secret?: string, webhookId?: string, timestamp?: number, type?: string }

/** A delivery signed with the secret of its tenant. */
export function signedBy (tenant: string, { secret = secretOf(tenant), type = 'batch.failed', ...options }: SignedOf = {}): Signed {
  return sign(thin(type), { secret, ...options })
}

/** Builds an app with one route that serves tenants. */
export async function serving (t: Teardown, tenant: TenantOptions, options: OpenAIWebhookOptions = {}, server = {}): Promise<FastifyInstance> {
  const app = await build(t, { path: false, ...options }, server)
  app.openaiWebhook.route({ url: '/of/:tenant', tenant })
  return app
}

/**
 * Checks that a runner keeps two tenants' deliveries of the same webhook-id apart: each is run with its tenant, dies, and is requeued on
 * its own.
 */
export async function keepsTenantsApart (
  t: Teardown & { same: (found: unknown, wanted: unknown, message: string) => unknown, equal: (found: unknown, wanted: unknown, message: string) => unknown },
  options: OpenAIWebhookOptions,
  keepsDead = true
): Promise<void> {
  const app = await serving(t, tenants(() => true), { deadline: 10_000, ...options })
  const ran: Array<Pick<EventContext, 'tenant' | 'endpoint' | 'webhookId'>> = []
  const died: DeadDelivery[] = []
  let fails = false
  app.openaiWebhook.onDead(delivery => { died.push(delivery) })
  app.openaiWebhook.on('batch.failed', (_event, { tenant, endpoint, webhookId }) => {
    ran.push({ tenant: tenant!, endpoint, webhookId })
    if (fails) throw new Error('not now')
  })
  await listen(app)
  const deliver = async (tenant: string, webhookId: string): Promise<number> => (await post(app, signedBy(tenant, { webhookId }), urlOf(tenant))).statusCode
  const told = (tenant: string, webhookId: string) => ({ tenant, endpoint: '/of/:tenant', webhookId })

  const sent = ['acme', 'globex', 'acme']
  for (const tenant of sent) t.equal(await deliver(tenant, 'wh_same'), 200, `${tenant} is acknowledged`)
  await until('both have run', () => ran.length === 2)
  t.same(ran.splice(0).sort((a, b) => a.tenant! < b.tenant! ? -1 : 1), [told('acme', 'wh_same'), told('globex', 'wh_same')], 'each has run once')

  fails = true
  for (const tenant of ['acme', 'globex']) await deliver(tenant, 'wh_dying')
  if (!keepsDead) return
  await until('both are dead', () => died.length === 2)
  t.same(died.map(({ tenant }) => tenant).sort(), ['acme', 'globex'], 'each is told as dead')
  const { deadLetters } = app.openaiWebhook
  await until('both are listed', async () => (await deadLetters.list()).length === 2)
  t.same((await deadLetters.list()).map(({ tenant }) => tenant).sort(), ['acme', 'globex'], 'each is listed with its tenant')
  fails = false
  ran.length = 0
  t.equal(await deadLetters.requeue(told('initech', 'wh_dying')), false, 'no other tenant has it')
  t.equal(await deadLetters.requeue(told('globex', 'wh_dying')), true, 'one is requeued')
  await until('it has run', () => ran.length === 1)
  t.same(ran, [told('globex', 'wh_dying')], 'and nobody else\'s')
  t.same((await deadLetters.list()).map(({ tenant }) => tenant), ['acme'], 'the other one is dead still')
}
