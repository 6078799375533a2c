import { TransactionOver } from '../errors.ts'

/**
 * Lends a database's client for the length of a transaction.
 *
 * @param name of the handler
 * @returns `tx`, whose methods throw FST_OPENAI_WEBHOOK_TRANSACTION_OVER once `end` has been called
 */
export function lend<Tx extends object> (client: Tx, name: string): { tx: Tx, end: () => void } {
  let over = false
  const tx = new Proxy(client, {
    get (target, property) {
      // Native methods and private fields work on the client itself, not on a proxy.
      const value: unknown = Reflect.get(target, property, target)
      if (typeof value !== 'function') return value
      return (...args: unknown[]): unknown => {
        if (over) throw new TransactionOver(name)
        // release() would make the pool lend the client out in the midst of the transaction.
        if (property === 'release') return undefined
        return Reflect.apply(value, target, args)
      }
    }
  })
  return { tx, end: () => { over = true } }
}
