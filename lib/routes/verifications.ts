import { FUNCTION, assertOption } from '../checks.ts'
import { InvalidSecret } from '../errors.ts'
import { SecretSource } from '../verifiers/keyring.ts'
import type { Keyring, Secret, SecretOptions } from '../verifiers/keyring.ts'
import { DEFAULTS } from '../options.ts'
import type { EndpointOptions, TenantOptions } from '../options.ts'
import { verificationBy } from '../pipeline/verify.ts'
import type { Verification } from '../pipeline/verify.ts'
import { standardWebhooks } from '../verifiers/standard-webhooks.ts'
import { NO_KEYS } from './tenants.ts'

/** Makes the verification of each endpoint of one registration, from the plugin's options and the route's overrides. */
export class Verifications {
  readonly #defaults: EndpointOptions
  readonly secretOptions: SecretOptions
  #defaultSource: SecretSource | undefined
  /** Keyed by secret function, so that a function that several endpoints share is called once for all of them. */
  readonly #sources = new WeakMap<Function, SecretSource>()
  readonly #loading = new Set<Keyring>()
  #warned = false

  constructor (defaults: EndpointOptions, options: SecretOptions) {
    this.#defaults = defaults
    this.secretOptions = {
      ...options,
      warn: message => {
        if (!this.#warned) options.warn(message)
        this.#warned = true
      }
    }
  }

  /**
   * @param atBoot whether `load` calls a secret function. Otherwise it is called when a delivery needs it
   * @throws FST_OPENAI_WEBHOOK_INVALID_SECRET, FST_OPENAI_WEBHOOK_INVALID_OPTIONS for a verifier whose methods are none
   */
  of ({ secret, tenant, verifier, tolerance }: EndpointOptions & { tenant?: TenantOptions | undefined }, atBoot: boolean): Verification {
    verifier ??= this.#defaults.verifier ?? standardWebhooks()
    tolerance ??= this.#defaults.tolerance ?? DEFAULTS.tolerance
    for (const method of ['checkHeaders', 'keyBytes'] as const) assertOption('verifier', method, verifier[method], FUNCTION)
    if (tenant !== undefined) return verificationBy(verifier, NO_KEYS, tolerance)
    const source = secret === undefined ? this.#defaultSource ??= this.#source(secretOf(this.#defaults)) : this.#source(secret)
    const keyring = source.keyring(verifier.keyBytes)
    if (atBoot) this.#loading.add(keyring)
    return verificationBy(verifier, keyring, tolerance)
  }

  /** Calls the secret functions for the first time. @throws FST_OPENAI_WEBHOOK_INVALID_SECRET */
  async load (): Promise<void> {
    await Promise.all([...this.#loading].map(async keyring => await keyring.load()))
  }

  #source (secret: Secret): SecretSource {
    if (typeof secret !== 'function') return new SecretSource(secret, this.secretOptions)
    let source = this.#sources.get(secret)
    if (source === undefined) this.#sources.set(secret, source = new SecretSource(secret, this.secretOptions))
    return source
  }
}

/** Has a default instead of `??`, because null must be refused and not replaced by the secret of the environment. */
function secretOf ({ secret = process.env['OPENAI_WEBHOOK_SECRET'] }: EndpointOptions): Secret {
  if (secret === undefined) {
    throw new InvalidSecret('expected the signing secret of the webhook endpoint in the environment variable OPENAI_WEBHOOK_SECRET or the `secret` option, got neither; if each of your routes has a `tenant` or a `secret` of its own, set `path: false`')
  }
  return secret
}
