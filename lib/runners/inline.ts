import { assertNone } from '../checks.ts'
import type { Runner, RunnerHost } from './runner.ts'

/**
 * Runs the handlers in the request: a delivery is acknowledged after they have succeeded, so that a failure or a crash
 * leaves the retry to OpenAI. The default.
 */
export function inline (): Runner
export function inline (...given: unknown[]): Runner {
  assertNone('inline', given, 'background(), durable(), bullmq() and pgboss() have some')
  let host: RunnerHost
  return {
    start (startedBy) { host = startedBy },
    run (job) { return host.process(job) }
  }
}
