import type { KeyObject } from 'node:crypto'
import type { FastifyRequest } from 'fastify'
import { LRUCache } from 'lru-cache'
import { isId } from '../checks.ts'
import { Overloaded, Unavailable, UnknownTenant } from '../errors.ts'
import { DEFAULTS } from '../options.ts'
import type { TenantOptions } from '../options.ts'
import type { Verification } from '../pipeline/verify.ts'
import { tryOr } from '../maybe-promise.ts'
import type { MaybePromise } from '../maybe-promise.ts'
import { REFRESH_INTERVAL, inTime, keysOf } from '../verifiers/keyring.ts'
import type { Keys, SecretOptions } from '../verifiers/keyring.ts'

// Times are of the monotonic clock: one that is set forward or back neither asks for secrets nor stops that.

/** New tenants whose secrets are asked for at once. */
const MAX_LOOKUPS = 16
/** New tenants whose secrets are asked for within a second. */
const MAX_LOOKUPS_A_SECOND = 100
/** Known tenants whose secrets are asked for again at once. Apart from the above, so that invented names do not hold up a rotation. */
const MAX_REFRESHES = 16
/** ms for which an unknown name is remembered. */
const UNKNOWN_FOR = 10_000
/** As many as can be looked up in that time. */
const MAX_UNKNOWN = MAX_LOOKUPS_A_SECOND * UNKNOWN_FOR / 1_000

/** Of an endpoint that has none itself. */
export const NO_KEYS: Keys = { keys: [], refresh: () => undefined }

/** A tenant whose secret is kept: one object, since what many tenants have is read from memory for each delivery. */
class Tenant implements Verification, Keys {
  readonly verifier: Verification['verifier']
  readonly judge: Verification['judge']
  readonly judgeHeaders: Verification['judgeHeaders']
  readonly tolerance: number
  /** Its own keyring: `verify` asks it to refresh. */
  readonly keyring: Keys = this
  readonly #tenants: Tenants
  readonly name: string
  keys: readonly KeyObject[]
  /** Whole ms, for the same reason. */
  askedAt = Math.floor(performance.now())
  /** ms from then on for which the answer holds. */
  holdsFor: number
  asking: Promise<boolean> | undefined

  constructor (tenants: Tenants, name: string, { verifier, judge, judgeHeaders, tolerance }: Verification, keys: readonly KeyObject[], ttl: number) {
    this.#tenants = tenants
    this.name = name
    this.verifier = verifier
    this.judge = judge
    this.judgeHeaders = judgeHeaders
    this.tolerance = tolerance
    this.keys = keys
    this.holdsFor = ttl
  }

  refresh (): Promise<boolean> | undefined {
    return this.#tenants.refresh(this, REFRESH_INTERVAL)
  }
}

/** The tenants of one endpoint: their secrets are asked for by name, and kept. Strangers who invent names cost a bounded amount. */
export class Tenants {
  readonly #endpoint: string
  readonly #of: TenantOptions['of']
  readonly #secret: TenantOptions['secret']
  /** ms */
  readonly #ttl: number
  readonly #verification: Verification
  readonly #options: SecretOptions
  readonly #kept: LRUCache<string, Tenant>
  /** When each was asked for. Apart from the kept ones, so that it evicts none. */
  readonly #unknown = new LRUCache<string, number>({ max: MAX_UNKNOWN })
  readonly #lookups = new Map<string, Promise<Verification | Error>>()
  /** When the last lookups began, in a ring. */
  readonly #began = new Float64Array(MAX_LOOKUPS_A_SECOND).fill(-Infinity)
  #next = 0
  #refreshes = 0

  /** @param verification how each tenant's deliveries are verified, but for the keys */
  constructor (endpoint: string, { of, secret, ttl = DEFAULTS.tenantTtl, max = DEFAULTS.tenantMax }: TenantOptions, verification: Verification, options: SecretOptions) {
    this.#endpoint = endpoint
    this.#of = of
    this.#secret = secret
    this.#ttl = ttl
    this.#verification = verification
    this.#options = options
    this.#kept = new LRUCache({ max })
  }

  /** @returns the tenant's name, or FST_OPENAI_WEBHOOK_UNKNOWN_TENANT */
  nameOf (request: FastifyRequest): string | Error {
    let name: unknown
    let cause: unknown
    try {
      name = this.#of(request)
    } catch (error) {
      cause = error
    }
    if (isId(name)) return name
    // Unheard, its rejection would end the process.
    tryOr(() => name, () => undefined)
    return new UnknownTenant('tenant.of gave no name of 1 to 256 visible ASCII characters', { cause })
  }

  /**
   * @param name as `nameOf` gave it
   * @returns how its deliveries are verified; or FST_OPENAI_WEBHOOK_UNKNOWN_TENANT, FST_OPENAI_WEBHOOK_UNAVAILABLE where its secret
   * cannot be had, FST_OPENAI_WEBHOOK_OVERLOADED where too many are asked for
   */
  verificationOf (name: string): MaybePromise<Verification | Error> {
    const tenant = this.#kept.get(name)
    if (tenant !== undefined) {
      // It serves on meanwhile.
      this.refresh(tenant, tenant.holdsFor)
      return tenant
    }
    const since = this.#unknown.get(name)
    if (since !== undefined && performance.now() - since < UNKNOWN_FOR) return unknown()
    return this.#lookups.get(name) ?? this.#lookUp(name)
  }

  /**
   * Asks for a kept tenant's secret again.
   *
   * @param interval ms since it was last asked for, before which it is not
   * @returns whether there is a newer answer; `undefined` where it was not asked for
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
      // A question that failed is put again sooner.
      tenant.holdsFor = Math.min(this.#ttl, REFRESH_INTERVAL)
      this.#options.onTrouble(error, { endpoint: this.#endpoint, tenant: name })
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
    // A copy, or what is kept may be a slice that holds the whole URL of its request.
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
    const tenant = new Tenant(this, name, this.#verification, keys, this.#ttl)
    this.#kept.set(name, tenant)
    return tenant
  }

  /** @returns undefined for an unknown tenant. Rejects with what `secret` threw, or with FST_OPENAI_WEBHOOK_INVALID_SECRET */
  async #ask (name: string): Promise<KeyObject[] | undefined> {
    const secrets = await inTime('tenant.secret', () => this.#secret(name), this.#options.patience)
    return secrets === undefined || secrets === null ? undefined : keysOf(secrets, this.#verification.verifier.keyBytes, this.#options.warn)
  }
}

function unknown (): Error {
  return new UnknownTenant('tenant.secret knows no tenant of that name')
}
