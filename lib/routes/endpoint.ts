import { InvalidRoute } from '../errors.ts'
import type { Verification } from '../pipeline/verify.ts'
import type { HandlerList, Registry } from '../registry.ts'
import type { TenantOptions } from '../options.ts'
import { Tenants } from './tenants.ts'
import type { Verifications } from './verifications.ts'

/** A receiving route: how it verifies, and the URL that names it in jobs, logs and idempotency keys. */
export type Endpoint = Verification & {
  readonly url: string
  /** Set if the route serves many tenants. Each tenant then has its own verification, and the endpoint has no keys. */
  readonly tenants: Tenants | undefined
}

/** The receiving routes of one registration of the plugin. */
export class Endpoints {
  readonly all = new Map<string, Endpoint>()

  constructor (readonly registry: Registry, readonly verifications: Verifications) {}

  /** @param verification has no keys if there are tenants @param lists the handlers of the route @throws FST_OPENAI_WEBHOOK_INVALID_ROUTE */
  add (url: string, verification: Verification, lists: readonly HandlerList[], tenant: TenantOptions | undefined): Endpoint {
    // Routes that differ only in a constraint would share jobs and idempotency keys, because those contain just the URL.
    if (this.all.has(url)) throw new InvalidRoute('POST', url, 'expected a URL of its own, got that of another receiving route')
    this.registry.lists.set(url, lists)
    const endpoint = { ...verification, url, tenants: tenant && new Tenants(url, tenant, verification, this.verifications.secretOptions) }
    this.all.set(url, endpoint)
    return endpoint
  }
}
