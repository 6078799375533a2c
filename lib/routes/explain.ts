import type { FastifyRequest } from 'fastify'
import { InvalidSignature } from '../errors.ts'
import type { Failures } from '../failures.ts'
import type { Verification } from '../pipeline/verify.ts'
import { standardWebhooks } from '../verifiers/standard-webhooks.ts'

/** Log levels at which debug lines are written. */
const DETAILED = new Set(['debug', 'trace'])
/** Minimum ms between two diagnoses for one endpoint. A diagnosis costs as much as many deliveries. */
const INTERVAL = 10_000

/** Makes a function that logs at debug level why a signature does not match. The sender is not told. */
export function explainer (failures: Failures) {
  const explainedAt = new Map<string, number>()
  return (refusal: Error, url: string, { verifier, keyring, tolerance }: Verification, { headers, log }: FastifyRequest, rawBody: Buffer): void => {
    if (!(refusal instanceof InvalidSignature) || !DETAILED.has(log.level) || verifier !== standardWebhooks()) return
    // On the monotonic clock, so that a system clock that is set back does not suppress diagnoses until it has caught up.
    const since = performance.now()
    if (since - (explainedAt.get(url) ?? -Infinity) < INTERVAL) return
    explainedAt.set(url, since)
    const now = Date.now()
    const explain = async (): Promise<void> => {
      // Imported on demand, because few apps log at debug level.
      const { diagnoseQuickly } = await import('../diagnose.ts')
      const secret = keyring.keys.map(key => key.export())
      const { finding, likely } = diagnoseQuickly({ headers, rawBody, secret, now, tolerance })
      log.debug({ endpoint: url, cause: finding?.cause, fix: finding?.fix }, `the signature does not match: ${finding?.message ?? likely}`)
    }
    // setImmediate: the answer must neither wait for the diagnosis nor fail with it.
    setImmediate(() => { explain().catch(error => failures.report(error, { endpoint: url })) })
  }
}
