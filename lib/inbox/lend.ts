import { TransactionOver } from '../errors.ts'
import { isPromise } from '../maybe-promise.ts'

/**
 * Lends a database's client for the length of a transaction, and with it the statements and iterators that it makes.
 *
 * @param name of the handler
 * @param holds asked when a statement has failed: whether the transaction is still there
 * @returns `tx`, whose methods and whose statements' throw FST_OPENAI_WEBHOOK_TRANSACTION_OVER once it is over, by `end` or by itself
 */
export function lend<Tx extends object> (client: Tx, name: string, holds = (): boolean => true): { tx: Tx, end: () => void } {
  let over = false
  const iterators: Iterator<unknown>[] = []

  function lent<T extends object> (owned: T): T {
    // A function of ours in place of one of the client's, whose own properties a proxy may not have give another value.
    const target = typeof owned === 'function' ? (...args: unknown[]) => call(owned, undefined, args) : owned
    return new Proxy(target as T, {
      get (target, property) {
        // Native methods and private fields work on the owned itself, not on a proxy.
        const value: unknown = Reflect.get(owned, property, owned)
        if (typeof value !== 'function' || isFixed(target, property)) return value
        return (...args: unknown[]): unknown => {
          // release() would make the pool lend the client out in the midst of the transaction.
          return property === 'release' ? assertLent() : call(value, owned, args)
        }
      }
    })
  }

  function call (method: Function, self: unknown, args: unknown[]): unknown {
    assertLent()
    let result: unknown
    try {
      result = Reflect.apply(method, self, args)
    } catch (error) {
      // SQLite rolls back by itself where the disk is full. Whatever is written then, by work that goes on, would commit by itself.
      over ||= !holds()
      throw error
    }
    if (!isMade(result)) return result
    if (isIterator(result)) iterators.push(result)
    return lent(result)
  }

  function assertLent (): undefined {
    if (over) throw new TransactionOver(name)
  }

  return {
    tx: lent(client),
    end () {
      over = true
      // better-sqlite3 neither commits nor rolls back while one is open.
      for (const iterator of iterators) iterator.return?.()
    }
  }
}

/** A proxy may give no other value for it. */
function isFixed (target: object, property: string | symbol): boolean {
  const own = Reflect.getOwnPropertyDescriptor(target, property)
  return own?.configurable === false && own.writable === false
}

/** Whether it is something of the client's, such as a statement, and not rows or a value of one. */
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
