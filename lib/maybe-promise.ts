// A delivery that waits for nothing is answered in one turn, without a promise. Generators that yield a value or a promise would read better, but
// each of their runs takes half a KB of memory.

export type MaybePromise<T> = T | Promise<T>

export function isPromise<T> (value: MaybePromise<T> | unknown): value is Promise<T> {
  return (typeof value === 'object' || typeof value === 'function') && value !== null && typeof (value as Promise<T>).then === 'function'
}

/** Whether a value is a promise where none is expected. Its rejection is ignored, because an unhandled rejection would end the process. */
export function isStray (value: unknown): boolean {
  if (!isPromise(value)) return false
  value.then(undefined, () => {})
  return true
}

/** Like `value.then(next)`, but calls `next` synchronously if `value` is not a promise. */
export function then<T, U> (value: MaybePromise<T>, next: (value: T) => MaybePromise<U>): MaybePromise<U> {
  return isPromise<T>(value) ? later(value, next, rethrow) : next(value)
}

/** Waits for the first, and then for the second, which must not reject: nothing handles its rejection until the first has ended. */
export function both (first: MaybePromise<void>, second: MaybePromise<void>): MaybePromise<void> {
  return first === undefined ? second : then(first, () => second)
}

/** Like `Promise.try(work).then(next, recover)`, but synchronous if `work` does not return a promise. */
export function after<T, U> (work: () => MaybePromise<T>, next: (value: T) => MaybePromise<U>, recover: (error: unknown) => MaybePromise<U>): MaybePromise<U> {
  let result
  let pending
  try {
    result = work()
    pending = isPromise<T>(result) // reads `result.then`, which may be a getter that throws
  } catch (error) {
    return recover(error)
  }
  return pending ? later(result as Promise<T>, next, recover) : next(result as T)
}

/** Like `Promise.try(work).catch(recover)`, but synchronous if `work` does not return a promise. */
export function tryOr<T> (work: () => MaybePromise<T>, recover: (error: unknown) => MaybePromise<T>): MaybePromise<T> {
  return after<T, T>(work, itself, recover)
}

/**
 * Like `promise.then(next, recover)`, but does not call the promise's own `then`, which may throw or return nothing. Does not use `await`,
 * because whatever the two functions hold would stay in memory until a full garbage collection.
 */
export function later<T, U> (promise: Promise<T>, next: (value: T) => MaybePromise<U>, recover: (error: unknown) => MaybePromise<U>): MaybePromise<U> {
  let plain: Promise<T>
  try {
    plain = Promise.resolve(promise) // reads `promise.constructor`, which may be a getter that throws
  } catch (error) {
    return recover(error)
  }
  return Promise.prototype.then.call(plain, next as never, recover) as Promise<U>
}

function itself<T> (value: T): T { return value }

function rethrow (error: unknown): never { throw error }
