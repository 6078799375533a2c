import type { EventContext, Handler } from '../handlers.ts'
import type { HandlerFailure } from '../runners/handler-failures.ts'
import { drive, isPromise } from '../steps.ts'
import type { MaybePromise, Steps } from '../steps.ts'

/** Called when a handler has succeeded. @param isLast whether all have, this one last */
type Succeeded = (handler: Handler, isLast: boolean) => MaybePromise<void>

/** Starts every handler in order and waits for all of them. @returns those that failed, with what they threw */
export function dispatch (handlers: readonly Handler[], event: unknown, context: EventContext, succeeded: Succeeded): MaybePromise<readonly HandlerFailure[]> {
  const failures: HandlerFailure[] = []
  let remaining = handlers.length

  function * run (handler: Handler): Steps<void> {
    try {
      yield handler.run(event, context)
    } catch (error) {
      remaining--
      failures.push({ handler: handler.name, error })
      return
    }
    yield succeeded(handler, --remaining === 0 && failures.length === 0)
  }

  const waiting: Promise<void>[] = []
  for (const handler of handlers) {
    const ended = drive(run(handler))
    if (isPromise<void>(ended)) waiting.push(ended)
  }
  if (waiting.length === 0) return failures
  // One promise less in the usual case.
  return (waiting.length === 1 ? waiting[0]! : Promise.all(waiting)).then(() => failures)
}
