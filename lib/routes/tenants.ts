import type { KeyObject } from 'node:crypto'
import type { FastifyRequest } from 'fastify'
import { LRUCache } from 'lru-cache'
import { isId } from '../checks.ts'
import { Overloaded, Unavailable, UnknownTenant } from '../errors.ts'
import { DEFAULTS } from '../options.ts'
import type { TenantOptions } from '../options.ts'
import type { Verification } from '../pipeline/verify.ts'
import { isStray } from '../maybe-promise.ts'
import type { MaybePromise } from '../maybe-promise.ts'
import { REFRESH_INTERVAL, secretInTime, keysOf } from '../verifiers/keyring.ts'
import type { Keys, SecretOptions } from '../verifiers/keyring.ts'

// Times are taken from the monotonic clock, so that changing the system clock neither causes nor prevents calls of `tenant.secret`.

/** Maximum number of concurrent lookups of new tenants' secrets. */
const MAX_LOOKUPS = 16
/** Maximum number of lookups of new tenants' secrets that begin within one second. */
const MAX_LOOKUPS_A_SECOND = 100
/** Maximum number of concurrent refreshes of known tenants' secrets. Apart from the lookups, so that invented names do not delay a rotation. */
const MAX_REFRESHES = 16
/** ms for which an unknown name is remembered. */
const UNKNOWN_FOR = 10_000
/** As many names as can be looked up within UNKNOWN_FOR. */
const MAX_UNKNOWN = MAX_LOOKUPS_A_SECOND * UNKNOWN_FOR / 1_000

/** The keys of an endpoint with tenants, which has no keys itself. */
export const NO_KEYS: Keys = { keys: [], refresh: () => undefined }

/** A tenant and its cached secret. One flat object, because with many tenants each delivery reads its tenant from main memory. */
class Tenant implements Verification, Keys {
  readonly verifier: Verification['verifier']
  readonly readHeaders: Verification['readHeaders']
  readonly judge: Verification['judge']
  readonly tolerance: number
  /** The tenant is its own keyring, which `verify` asks to refresh. */
  readonly keyring: Keys = this
  /** When the secret was last asked for, in ms on the monotonic clock. A whole number, which V8 can store in the object itself. */
  askedAt = Math.floor(performance.now())
  asking: Promise<boolean> | undefined

  /** @param holdsFor ms after `askedAt` for which the secret is used without asking for it again */
  constructor (readonly tenants: Tenants, readonly name: string, { verifier, readHeaders, judge, tolerance }: Verification, public keys: readonly KeyObject[], public holdsFor: number) {
    this.verifier = verifier
    this.readHeaders = readHeaders
    this.judge = judge
    this.tolerance = tolerance
  }

  refresh (): Promise<boolean> | undefined {
    return this.tenants.refresh(this, REFRESH_INTERVAL)
  }
}

/** The tenants of one endpoint. Their secrets are fetched by name and cached. Senders who invent names cause a bounded cost. */
export class Tenants {
  /** ms */
  readonly #ttl: number
  readonly #kept: LRUCache<string, Tenant>
  /** When each unknown name was looked up. Separate from `#kept`, so that unknown names evict no known tenant. */
  readonly #unknown = new LRUCache<string, number>({ max: MAX_UNKNOWN })
  readonly #lookups = new Map<string, Promise<Verification | Error>>()
  /** Ring buffer of the start times of the last lookups. */
  readonly #began = new Float64Array(MAX_LOOKUPS_A_SECOND).fill(-Infinity)
  #next = 0
  #refreshes = 0

  /** @param verification how each tenant's deliveries are verified, apart from the keys */
  constructor (readonly endpoint: string, readonly tenant: TenantOptions, readonly verification: Verification, readonly options: SecretOptions) {
    const { ttl = DEFAULTS.tenantTtl, max = DEFAULTS.tenantMax } = tenant
    this.#ttl = ttl
    this.#kept = new LRUCache({ max })
  }

  /** @returns the tenant's name, or FST_OPENAI_WEBHOOK_UNKNOWN_TENANT */
  nameOf (request: FastifyRequest): string | Error {
    let cause: unknown
    try {
      const name: unknown = this.tenant.of(request)
      if (isId(name)) return name
      isStray(name) // if `tenant.of` is async
    } catch (error) {
      cause = error
    }
    return new UnknownTenant('tenant.of gave no name of 1 to 256 visible ASCII characters', { cause })
  }

  /**
   * @param name as `nameOf` returned it
   * @returns how the tenant's deliveries are verified; or FST_OPENAI_WEBHOOK_UNKNOWN_TENANT, FST_OPENAI_WEBHOOK_UNAVAILABLE if its secret
   * cannot be fetched, FST_OPENAI_WEBHOOK_OVERLOADED if too many secrets are being fetched
   */
  verificationOf (name: string): MaybePromise<Verification | Error> {
    const tenant = this.#kept.get(name)
    if (tenant !== undefined) {
      // The cached secret stays in use during the refresh.
      this.refresh(tenant, tenant.holdsFor)
      return tenant
    }
    const since = this.#unknown.get(name)
    if (since !== undefined && performance.now() - since < UNKNOWN_FOR) return unknown()
    return this.#lookups.get(name) ?? this.#lookUp(name)
  }

  /**
   * Fetches the secret of a cached tenant again.
   *
   * @param interval minimum ms since the secret was last asked for
   * @returns whether a secret was fetched; `undefined` if no fetch was started or under way
   */
  refresh (tenant: Tenant, interval: number): Promise<boolean> | undefined {
    if (tenant.asking !== undefined) return tenant.asking
    const now = performance.now()
    if (now - tenant.askedAt < interval || this.#refreshes >= MAX_REFRESHES) return undefined
    this.#refreshes++
    tenant.askedAt = Math.floor(now)
    tenant.asking = this.#renew(tenant).finally(() => {
      this.#refreshes--
      tenant.asking = undefined
    })
    return tenant.asking
  }

  async #renew (tenant: Tenant): Promise<boolean> {
    const { name } = tenant
    let keys
    try {
      keys = await this.#ask(name)
    } catch (error) {
      // A failed refresh is repeated sooner than a successful one.
      tenant.holdsFor = Math.min(this.#ttl, REFRESH_INTERVAL)
      this.options.onTrouble(error, { endpoint: this.endpoint, tenant: name })
      return false
    }
    if (keys === undefined) {
      this.#kept.delete(name)
      this.#unknown.set(name, performance.now())
      return false
    }
    tenant.holdsFor = this.#ttl
    tenant.keys = keys
    return true
  }

  #lookUp (given: string): Promise<Verification | Error> | Error {
    const now = performance.now()
    if (this.#lookups.size >= MAX_LOOKUPS || now - this.#began[this.#next]! < 1_000) return new Overloaded()
    this.#began[this.#next] = now
    this.#next = (this.#next + 1) % MAX_LOOKUPS_A_SECOND
    // Copied, because the string may be a slice that keeps the whole URL of its request in memory.
    const name = Buffer.from(given).toString()
    const lookup = this.#find(name).finally(() => this.#lookups.delete(name))
    this.#lookups.set(name, lookup)
    return lookup
  }

  async #find (name: string): Promise<Verification | Error> {
    let keys
    try {
      keys = await this.#ask(name)
    } catch (cause) {
      return new Unavailable({ cause })
    }
    if (keys === undefined) {
      this.#unknown.set(name, performance.now())
      return unknown()
    }
    const tenant = new Tenant(this, name, this.verification, keys, this.#ttl)
    this.#kept.set(name, tenant)
    return tenant
  }

  /** @returns undefined for an unknown tenant; rejects with what `secret` threw, or with FST_OPENAI_WEBHOOK_INVALID_SECRET */
  async #ask (name: string): Promise<KeyObject[] | undefined> {
    const secrets = await secretInTime('tenant.secret', () => this.tenant.secret(name), this.options.patience)
    return secrets === undefined || secrets === null ? undefined : keysOf(secrets, this.verification.verifier.keyBytes, this.options.warn)
  }
}

function unknown (): Error {
  return new UnknownTenant('tenant.secret knows no tenant of that name')
}
