import { TransactionOver } from '../errors.ts'
import { isPromise } from '../maybe-promise.ts'

/**
 * Lends the client of a database for the duration of a transaction, together with the statements and iterators that the client makes.
 *
 * @param name of the handler
 * @param holds returns whether the transaction still exists
 * @param isPg whether `query` is that of `pg`, which tells a promise or a callback of its end
 * @returns `tx`. Its methods and those of its statements fail with FST_OPENAI_WEBHOOK_TRANSACTION_OVER once the transaction has ended, by `end` or
 * by itself: `query` of `pg` as it fails otherwise, and all others throw
 */
export function lend<Tx extends object> (client: Tx, name: string, holds = (): boolean => true, isPg = false): { tx: Tx, end: () => void } {
  let over = false
  const iterators: Iterator<unknown>[] = []

  function lent<T extends object> (owned: T): T {
    // The target is our own function and not the client's, because a proxy must not change the value of a fixed property of its target.
    const target = typeof owned === 'function' ? (...args: unknown[]) => call(owned, undefined, args) : owned
    return new Proxy(target as T, {
      get (target, property) {
        // Native methods and private fields work on the owned object itself, not on a proxy.
        const value: unknown = Reflect.get(owned, property, owned)
        if (typeof value !== 'function' || isFixed(target, property)) return value
        return (...args: unknown[]): unknown => {
          // release() does nothing, because the pool would lend the client to others in the middle of the transaction.
          if (property === 'release') return over ? raise(new TransactionOver(name)) : undefined
          return call(value, owned, args, isPg && property === 'query' ? failQuery : raise)
        }
      }
    })
  }

  function call (method: Function, self: unknown, args: unknown[], fail: (error: Error, args: unknown[]) => unknown = raise): unknown {
    // SQLite rolls back by itself if the disk is full, and work may say ROLLBACK, or use a library that does. Each further write would be a commit of
    // its own, and be repeated by each attempt.
    over ||= !holds()
    if (over) return fail(new TransactionOver(name), args)
    const result: unknown = Reflect.apply(method, self, args)
    if (!isMade(result)) return result
    if (isIterator(result)) iterators.push(result)
    return lent(result)
  }

  return {
    tx: lent(client),
    end () {
      over = true
      // better-sqlite3 neither commits nor rolls back while an iterator is open.
      for (const iterator of iterators) iterator.return?.()
    }
  }
}

function raise (error: Error): never { throw error }

/** Fails a query of `pg` as `pg` does when its connection is lost: by its callback or its promise. A cursor has neither. */
function failQuery (error: Error, args: unknown[]): Promise<never> | undefined {
  const { submit, callback } = Object(args[0]) as { submit?: unknown, callback?: unknown }
  // `pg` takes the callback as the second argument or the third.
  const told = [...args.slice(1), callback].find(each => typeof each === 'function')
  if (told !== undefined) process.nextTick(told as (error: Error) => void, error)
  else if (typeof submit === 'function') throw error
  else return Promise.reject(error)
}

/** Whether the property is fixed: a proxy must return the value that the target has. */
function isFixed (target: object, property: string | symbol): boolean {
  const own = Reflect.getOwnPropertyDescriptor(target, property)
  return own?.configurable === false && own.writable === false
}

/** Whether the client made the result itself, such as a statement, and the result is not rows or a value of a row. */
function isMade (result: unknown): result is object {
  if (typeof result === 'function') return true
  if (typeof result !== 'object' || result === null || Array.isArray(result) || ArrayBuffer.isView(result) || isPromise(result)) return false
  const prototype: unknown = Object.getPrototypeOf(result)
  const isPlain = prototype === null || prototype === Object.prototype
  return !isPlain || Object.values(result).some(value => typeof value === 'function')
}

function isIterator (made: object): made is Iterator<unknown> {
  return typeof (made as Partial<Iterator<unknown>>).next === 'function'
}
