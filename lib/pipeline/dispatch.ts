import type { EventContext, Handler } from '../handlers.ts'
import type { ObservedAttempt } from '../observation.ts'
import type { HandlerFailure } from '../runners/handler-failures.ts'
import { after, both, then } from '../maybe-promise.ts'
import type { MaybePromise } from '../maybe-promise.ts'

/** Called when a handler has succeeded. @param isLast whether it was the last one to end, and all others have succeeded */
type Succeeded = (handler: Handler, isLast: boolean) => MaybePromise<void>

/** Starts all handlers in order and waits for all of them. @returns the handlers that failed, with what they threw */
export function dispatch (handlers: readonly Handler[], event: unknown, context: EventContext, succeeded: Succeeded, observed?: ObservedAttempt): MaybePromise<readonly HandlerFailure[]> {
  const failures: HandlerFailure[] = []
  let allEnded: MaybePromise<void> | undefined
  let remaining = handlers.length
  for (const [index, handler] of handlers.entries()) {
    const ended = after<unknown, void>(() => handler.run(event, context), () => {
      observed?.succeeded(index)
      return succeeded(handler, --remaining === 0 && failures.length === 0)
    }, error => {
      observed?.failed(index)
      remaining--
      failures.push({ handler: handler.name, error })
    })
    allEnded = both(allEnded, ended)
  }
  return then(allEnded, () => failures)
}
