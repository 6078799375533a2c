export type MaybePromise<T> = T | Promise<T>

export function isPromise<T> (value: MaybePromise<T> | unknown): value is Promise<T> {
  return (typeof value === 'object' || typeof value === 'function') && value !== null && typeof (value as Promise<T>).then === 'function'
}

/**
 * A story that waits only where it has to. It yields what may be a promise, and gets what that resolves to, or throws what it
 * rejects with.
 */
export type Steps<T> = Generator<unknown, T, any>

/** Runs a story to its end. Where it yields no promise it makes none, so a delivery that waits for nothing is answered in one tick. */
export function drive<T> (steps: Steps<T>): MaybePromise<T> {
  let step = steps.next()
  while (step.done !== true) {
    let pending
    try {
      pending = isPromise(step.value) // reads its `then`, which may be a getter
    } catch (error) {
      step = steps.throw(error)
      continue
    }
    if (pending) return driveOn(steps, step.value)
    step = steps.next(step.value)
  }
  return step.value
}

async function driveOn<T> (steps: Steps<T>, awaited: unknown): Promise<T> {
  let step: IteratorResult<unknown, T> = { done: false, value: awaited }
  while (step.done !== true) {
    let value
    try {
      value = await step.value
    } catch (error) {
      step = steps.throw(error)
      continue
    }
    step = steps.next(value)
  }
  return step.value
}

/** `value.then(next)`, without a promise where there is none. */
export function then<T, U> (value: MaybePromise<T>, next: (value: T) => MaybePromise<U>): MaybePromise<U> {
  return isPromise<T>(value) ? Promise.resolve(value).then(next) : next(value)
}

/** `try { work() } catch { recover() }` for work that may be asynchronous. */
export function attempt<T> (work: () => MaybePromise<T>, recover: (error: unknown) => MaybePromise<T>): MaybePromise<T> {
  let result
  let pending
  try {
    result = work()
    pending = isPromise<T>(result) // reads its `then`, which may be a getter
  } catch (error) {
    return recover(error)
  }
  // Promise.resolve: the `then` of a thenable may throw or return nothing.
  return pending ? Promise.resolve(result).then(undefined, recover) : result
}
