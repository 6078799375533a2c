import { runnersInUse } from '../runners/runner.ts'
import type { Runner } from '../runners/runner.ts'

/** ms. Prometheus gives up a scrape after ten seconds, and with it every other metric. */
const PATIENCE = 1_000

/** Runners that have been asked and have not answered: not asked again, or questions would pile up while Redis is down. */
const asked = new WeakMap<Runner, Promise<number | undefined>>()

/**
 * Deliveries that wait in the queues of this process's runners. One that fails, or does not answer in time, is left out.
 *
 * @returns `undefined` when there are queues and none can tell
 */
export async function queueDepth (): Promise<number | undefined> {
  const depths = await Promise.all([...runnersInUse].filter(({ depth }) => depth !== undefined).map(depthOf))
  const known = depths.filter(depth => depth !== undefined)
  return depths.length > 0 && known.length === 0 ? undefined : known.reduce((sum, depth) => sum + depth, 0)
}

async function depthOf (runner: Runner): Promise<number | undefined> {
  let answer = asked.get(runner)
  if (answer === undefined) {
    answer = ask(runner).finally(() => asked.delete(runner))
    asked.set(runner, answer)
  }
  let timer: NodeJS.Timeout | undefined
  const tooLate = new Promise<undefined>(resolve => { timer = setTimeout(resolve, PATIENCE, undefined) })
  const depth = await Promise.race([answer, tooLate])
  clearTimeout(timer)
  return depth
}

async function ask (runner: Runner): Promise<number | undefined> {
  try {
    const depth = await runner.depth!()
    return Number.isFinite(depth) ? depth : undefined
  } catch {
    return undefined
  }
}
