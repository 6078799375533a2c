import { AsyncResource } from 'node:async_hooks'

/**
 * Has `work` always run in the async context of this call. Not `AsyncResource.bind`: on Node 20 to 24 what its function closes
 * over, such as a request, stays in memory until a full collection.
 */
export function inContext<Args extends unknown[], T> (work: (...args: Args) => T): (...args: Args) => T {
  const context = new AsyncResource('openai-webhook')
  return (...args) => context.runInAsyncScope(work, undefined, ...args)
}
