import { inContext } from './async-context.ts'
import { within } from './within.ts'

/** ms after which a call no longer counts, because it may hang. */
const HANGS = 1_000

interface Options {
  readonly isShared?: (error: unknown) => boolean
  readonly atOnce?: number
}

interface Waiting<Item, Result> {
  readonly item: Item
  readonly resolve: (result: Result) => void
  readonly reject: (error: unknown) => void
}

/**
 * Combines all calls of one turn of the event loop into one. If that call fails, a call is made for each item, so that no item fails because of
 * another one.
 *
 * @param most maximum number of items in a call
 * @param all returns a result for each item, in the order of the items
 * @param options.isShared whether the call for each item would fail with the same error, so that none is made
 * @param options.atOnce maximum number of calls at the same time. The items that come meanwhile share the next call. A call that hangs does not
 * count.
 */
export function grouped<Item, Result> (most: number, all: (items: Item[]) => Promise<Result[]>, { isShared = () => false, atOnce = Infinity }: Options = {}): (item: Item) => Promise<Result> {
  const waiting: Array<Waiting<Item, Result>> = []
  let calls = 0

  async function call (group: ReadonlyArray<Waiting<Item, Result>>): Promise<void> {
    try {
      const results = await all(group.map(({ item }) => item))
      for (const [index, { resolve }] of group.entries()) resolve(results[index]!)
    } catch (error) {
      if (group.length === 1 || isShared(error)) for (const { reject } of group) reject(error)
      else await Promise.all(group.map(async each => await call([each])))
    }
  }

  // The items come from many requests, so the call must not run in the async context of one of them.
  const callAll = inContext(() => {
    while (waiting.length > 0 && calls < atOnce) {
      calls++
      within(call(waiting.splice(0, most)), HANGS, () => {}).then(() => {
        calls--
        callAll()
      })
    }
  })

  return async item => await new Promise((resolve, reject) => {
    if (waiting.push({ item, resolve, reject }) === 1 && calls < atOnce) setImmediate(callAll)
  })
}
