import { assertNone } from '../checks.ts'
import type { Runner, RunnerHost } from './runner.ts'

/**
 * Runs the handlers in the request, and acknowledges the delivery after they have succeeded. After a failure or a crash, OpenAI sends the
 * delivery again. This is the default.
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
