import type { EventContext, Handler } from '../handlers.ts'
import type { ObservedAttempt } from '../observation.ts'
import type { HandlerFailure } from '../runners/handler-failures.ts'
import { drive, isPromise } from '../steps.ts'
import type { MaybePromise, Steps } from '../steps.ts'

/** Called when a handler has succeeded. @param isLast whether all have, this one last */
type Succeeded = (handler: Handler, isLast: boolean) => MaybePromise<void>

/** How far the handlers of one delivery have come. */
interface Progress {
  readonly event: unknown
  readonly context: EventContext
  readonly succeeded: Succeeded
  readonly observed: ObservedAttempt | undefined
  readonly failures: HandlerFailure[]
  remaining: number
}

/** Starts every handler in order and waits for all of them. @returns those that failed, with what they threw */
export function * dispatch (handlers: readonly Handler[], event: unknown, context: EventContext, succeeded: Succeeded, observed?: ObservedAttempt): Steps<readonly HandlerFailure[]> {
  const failures: HandlerFailure[] = []
  const progress: Progress = { event, context, succeeded, observed, failures, remaining: handlers.length }
  // The usual case, without promises of its own.
  if (handlers.length === 1) {
    yield * run(handlers[0]!, 0, progress)
    return failures
  }
  const waiting: Promise<void>[] = []
  for (const [index, handler] of handlers.entries()) {
    const ended = drive(run(handler, index, progress))
    if (isPromise<void>(ended)) waiting.push(ended)
  }
  if (waiting.length > 0) yield Promise.all(waiting)
  return failures
}

// Not within dispatch(): V8 makes a hidden class for the generators of each function object, in old space. One for each
// delivery would keep its request until a full collection, which doubles what a delivery costs.
function * run (handler: Handler, index: number, progress: Progress): Steps<void> {
  const { event, context, succeeded, observed, failures } = progress
  try {
    yield handler.run(event, context)
  } catch (error) {
    observed?.failed(index)
    progress.remaining--
    failures.push({ handler: handler.name, error })
    return
  }
  observed?.succeeded(index)
  yield succeeded(handler, --progress.remaining === 0 && failures.length === 0)
}
