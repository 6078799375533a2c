import type { EventContext, Handler } from '../handlers.ts'
import type { ObservedAttempt } from '../observation.ts'
import type { HandlerFailure } from '../runners/handler-failures.ts'
import { after, isPromise, then } from '../maybe-promise.ts'
import type { MaybePromise } from '../maybe-promise.ts'

/** Called when a handler has succeeded. @param isLast whether it was the last one to end, and all others have succeeded */
type Succeeded = (handler: Handler, isLast: boolean) => MaybePromise<void>

/** The progress of the handlers of one delivery. */
interface Progress {
  readonly event: unknown
  readonly context: EventContext
  readonly succeeded: Succeeded
  readonly observed: ObservedAttempt | undefined
  readonly failures: HandlerFailure[]
  remaining: number
}

/** Starts all handlers in order and waits for all of them. @returns the handlers that failed, with what they threw */
export function dispatch (handlers: readonly Handler[], event: unknown, context: EventContext, succeeded: Succeeded, observed?: ObservedAttempt): MaybePromise<readonly HandlerFailure[]> {
  const failures: HandlerFailure[] = []
  const progress: Progress = { event, context, succeeded, observed, failures, remaining: handlers.length }
  // The usual case, which needs no list and no Promise.all().
  if (handlers.length === 1) return run(handlers[0]!, 0, progress)
  const waiting: Promise<unknown>[] = []
  for (const [index, handler] of handlers.entries()) {
    const ended = run(handler, index, progress)
    if (isPromise(ended)) waiting.push(ended)
  }
  return waiting.length === 0 ? failures : Promise.all(waiting).then(() => failures)
}

function run (handler: Handler, index: number, progress: Progress): MaybePromise<readonly HandlerFailure[]> {
  const { event, context, succeeded, observed, failures } = progress
  return after<unknown, readonly HandlerFailure[]>(() => handler.run(event, context), () => {
    observed?.succeeded(index)
    return then(succeeded(handler, --progress.remaining === 0 && failures.length === 0), () => failures)
  }, error => {
    observed?.failed(index)
    progress.remaining--
    failures.push({ handler: handler.name, error })
    return failures
  })
}
