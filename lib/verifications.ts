import { InvalidSecret } from './errors.ts'
import { Keyring } from './keyring.ts'
import type { KeyringOptions, Secret } from './keyring.ts'
import type { EndpointOptions } from './options.ts'
import { verificationBy } from './pipeline/verify.ts'
import type { Verification } from './pipeline/verify.ts'
import { standardWebhooks } from './verifiers/standard-webhooks.ts'
import type { Verifier } from './verifiers/verifier.ts'

const TOLERANCE = 300

/** Stands for the usual way of making a key of a secret's text. */
const WHSEC = {}

/** How each endpoint of one registration verifies: the plugin's own options, with what a route overrides. */
export class Verifications {
  readonly #own: EndpointOptions
  readonly #verifier: Verifier
  readonly #keyringOptions: Omit<KeyringOptions, 'keyBytes'>
  /** Of the plugin's own secret: one for each way of making keys, so that a secret function is not asked for each route. */
  readonly #ownKeyrings = new WeakMap<object, Keyring>()
  readonly #loading: Keyring[] = []
  #warned = false

  constructor (own: EndpointOptions, options: Omit<KeyringOptions, 'keyBytes'>) {
    this.#own = own
    this.#verifier = own.verifier ?? standardWebhooks()
    this.#keyringOptions = {
      ...options,
      warn: message => {
        if (!this.#warned) options.warn(message)
        this.#warned = true
      }
    }
  }

  /**
   * @param atBoot whether a secret function is called by `load`, not when it first has to be
   * @throws FST_OPENAI_WEBHOOK_INVALID_SECRET
   */
  of ({ secret, verifier = this.#verifier, tolerance = this.#own.tolerance ?? TOLERANCE }: EndpointOptions, atBoot: boolean): Verification {
    const keyring = secret === undefined
      ? this.#ownKeyring(verifier.keyBytes, atBoot)
      : this.#keyring(secret, verifier.keyBytes, atBoot)
    return verificationBy(verifier, keyring, tolerance)
  }

  /** Calls the secret functions for the first time. @throws FST_OPENAI_WEBHOOK_INVALID_SECRET */
  async load (): Promise<void> {
    await Promise.all(this.#loading.map(async keyring => await keyring.load()))
  }

  #ownKeyring (keyBytes: Verifier['keyBytes'], atBoot: boolean): Keyring {
    let keyring = this.#ownKeyrings.get(keyBytes ?? WHSEC)
    if (keyring === undefined) {
      const { secret = secretFromEnvironment() } = this.#own
      keyring = this.#keyring(secret, keyBytes, atBoot)
      this.#ownKeyrings.set(keyBytes ?? WHSEC, keyring)
    }
    return keyring
  }

  #keyring (secret: Secret, keyBytes: Verifier['keyBytes'], atBoot: boolean): Keyring {
    const keyring = new Keyring(secret, { ...this.#keyringOptions, keyBytes })
    if (atBoot) this.#loading.push(keyring)
    return keyring
  }
}

function secretFromEnvironment (): Secret {
  const secret = process.env['OPENAI_WEBHOOK_SECRET']
  if (secret === undefined) {
    throw new InvalidSecret('expected the signing secret of the webhook endpoint in the environment variable OPENAI_WEBHOOK_SECRET or the `secret` option, got neither')
  }
  return secret
}
