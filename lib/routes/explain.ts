import type { FastifyRequest } from 'fastify'
import { InvalidSignature } from '../errors.ts'
import type { Failures } from '../failures.ts'
import type { Verification } from '../pipeline/verify.ts'
import { standardWebhooks } from '../verifiers/standard-webhooks.ts'

/** Log levels at which `debug` is written. */
const DETAILED = new Set(['debug', 'trace'])
/** ms between two diagnoses of an endpoint. Each costs as much as many deliveries. */
const INTERVAL = 10_000

/** At level debug, logs why a signature does not match. The sender is not told. */
export class Explainer {
  readonly #failures: Failures
  readonly #explainedAt = new Map<string, number>()

  constructor (failures: Failures) {
    this.#failures = failures
  }

  explain (refusal: Error, name: string, { verifier, keyring, tolerance }: Verification, { headers, log }: FastifyRequest, rawBody: Buffer): void {
    if (!(refusal instanceof InvalidSignature) || !DETAILED.has(log.level) || verifier !== standardWebhooks()) return
    const now = Date.now()
    // A clock set back must not silence it until it has caught up.
    if (Math.abs(now - (this.#explainedAt.get(name) ?? 0)) < INTERVAL) return
    this.#explainedAt.set(name, now)
    const tell = async (): Promise<void> => {
      // Loaded here, as few apps ask for it.
      const { diagnoseQuickly } = await import('../diagnose.ts')
      const secret = keyring.keys.map(key => key.export())
      const { finding, likely } = diagnoseQuickly({ headers, rawBody, secret, now, tolerance })
      log.debug({ endpoint: name, cause: finding?.cause, fix: finding?.fix }, `the signature does not match: ${finding?.message ?? likely}`)
    }
    // Later, so that the answer neither waits for it nor fails with it.
    setImmediate(() => { tell().catch(error => this.#failures.report(error, { endpoint: name })) })
  }
}
