import { AsyncResource } from 'node:async_hooks'

/**
 * Makes a function that runs `work` in the async context of this call. `AsyncResource.bind` is not used, because on Node 20 to 24 whatever its
 * function closes over, such as a request, stays in memory until a full garbage collection.
 */
export function inContext<Args extends unknown[], T> (work: (...args: Args) => T): (...args: Args) => T {
  const context = new AsyncResource('openai-webhook')
  return (...args) => context.runInAsyncScope(work, undefined, ...args)
}
