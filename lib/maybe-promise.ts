import type { MaybePromise } from './stores/store.ts'

export function isPromise<T> (value: MaybePromise<T> | unknown): value is Promise<T> {
  return (typeof value === 'object' || typeof value === 'function') && value !== null && typeof (value as Promise<T>).then === 'function'
}

/** `value.then(next)`, without a promise where there is none: a delivery that waits for nothing is answered in one tick. */
export function then<T, U> (value: MaybePromise<T>, next: (value: T) => MaybePromise<U>): MaybePromise<U> {
  return isPromise<T>(value) ? value.then(next) : next(value)
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
  // What is no promise but has a `then` may throw as it is called, or return nothing.
  return pending ? Promise.resolve(result).then(undefined, recover) : result
}
