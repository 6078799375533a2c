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
      // Methods of native handles and private fields know the client itself, not what stands for it.
      const value: unknown = Reflect.get(target, property, target)
      if (typeof value !== 'function') return value
      return (...args: unknown[]): unknown => {
        if (over) throw new TransactionOver(name)
        // A pool would hand the client to the next one in the midst of the transaction.
        if (property === 'release') return undefined
        return Reflect.apply(value, target, args)
      }
    }
  })
  return { tx, end: () => { over = true } }
}
