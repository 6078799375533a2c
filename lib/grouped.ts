import { inContext } from './async-context.ts'

interface Waiting<Item, Result> {
  readonly item: Item
  readonly resolve: (result: Result) => void
  readonly reject: (error: unknown) => void
}

/**
 * Makes one call of those that come in one turn of the event loop. Where it fails they are made one by one, so that none
 * fails by another's fault, unless that cannot help.
 *
 * @param most items of a call
 * @param all gives a result for each item, in their order
 * @param isShared whether each of them would fail likewise
 */
export function grouped<Item, Result> (most: number, all: (items: Item[]) => Promise<Result[]>, isShared: (error: unknown) => boolean = () => false): (item: Item) => Promise<Result> {
  let waiting: Array<Waiting<Item, Result>> = []

  async function call (group: ReadonlyArray<Waiting<Item, Result>>): Promise<void> {
    try {
      const results = await all(group.map(({ item }) => item))
      for (const [index, { resolve }] of group.entries()) resolve(results[index]!)
    } catch (error) {
      if (group.length === 1 || isShared(error)) for (const { reject } of group) reject(error)
      else await Promise.all(group.map(async each => await call([each])))
    }
  }

  // What is waiting is of many requests: the call is made in the async context of none.
  const callAll = inContext(() => {
    const every = waiting
    waiting = []
    while (every.length > 0) call(every.splice(0, most))
  })

  return async item => await new Promise((resolve, reject) => {
    if (waiting.push({ item, resolve, reject }) === 1) setImmediate(callAll)
  })
}
