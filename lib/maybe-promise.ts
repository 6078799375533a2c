// A delivery that waits for nothing is answered in one turn, without a promise. Generators that yield what may be one would read
// better, and keep half a KB for each of their runs.

export type MaybePromise<T> = T | Promise<T>

export function isPromise<T> (value: MaybePromise<T> | unknown): value is Promise<T> {
  return (typeof value === 'object' || typeof value === 'function') && value !== null && typeof (value as Promise<T>).then === 'function'
}

/** `value.then(next)`, without a promise where there is none. */
export function then<T, U> (value: MaybePromise<T>, next: (value: T) => MaybePromise<U>): MaybePromise<U> {
  return isPromise<T>(value) ? later(value, next, rethrow) : next(value)
}

/** `Promise.try(work).then(next, recover)`, without a promise where there is none. */
export function after<T, U> (work: () => MaybePromise<T>, next: (value: T) => MaybePromise<U>, recover: (error: unknown) => MaybePromise<U>): MaybePromise<U> {
  let result
  let pending
  try {
    result = work()
    pending = isPromise<T>(result) // reads its `then`, which may be a getter
  } catch (error) {
    return recover(error)
  }
  return pending ? later(result as Promise<T>, next, recover) : next(result as T)
}

/** `Promise.try(work).catch(recover)`, without a promise where there is none. */
export function tryOr<T> (work: () => MaybePromise<T>, recover: (error: unknown) => MaybePromise<T>): MaybePromise<T> {
  return after<T, T>(work, itself, recover)
}

/**
 * `promise.then(next, recover)`, but not by a `then` of its own, which may throw or return nothing. Nor by `await`: what the two hold
 * would stay in memory until a full collection.
 */
export function later<T, U> (promise: Promise<T>, next: (value: T) => MaybePromise<U>, recover: (error: unknown) => MaybePromise<U>): MaybePromise<U> {
  let plain: Promise<T>
  try {
    plain = Promise.resolve(promise) // reads its `constructor`
  } catch (error) {
    return recover(error)
  }
  return Promise.prototype.then.call(plain, next as never, recover) as Promise<U>
}

function itself<T> (value: T): T { return value }

function rethrow (error: unknown): never { throw error }
