import { runnersInUse } from '../runners/runner.ts'
import type { Runner } from '../runners/runner.ts'
import { within } from '../within.ts'

/** ms. Prometheus gives up a scrape after ten seconds, and with it every other metric. */
const PATIENCE = 1_000

type Question = 'depth' | 'deadCount'

/** Runners that have not answered yet. They are not asked again, or questions would pile up while Redis is down. */
const asked: Readonly<Record<Question, WeakMap<Runner, Promise<number | undefined>>>> = { depth: new WeakMap(), deadCount: new WeakMap() }

/**
 * Adds up the answers of this process's runners: how many deliveries wait in their queues, or are dead. A runner that fails or does
 * not answer in time is left out.
 *
 * @returns `undefined` when some could be asked and none can tell
 */
export async function sumOfRunners (question: Question): Promise<number | undefined> {
  const answers = await Promise.all([...runnersInUse].filter(runner => runner[question] !== undefined).map(runner => answerOf(runner, question)))
  const known = answers.filter(answer => answer !== undefined)
  return answers.length > 0 && known.length === 0 ? undefined : known.reduce((sum, each) => sum + each, 0)
}

/** The answer of one runner. @returns `undefined` when it fails or does not answer in time */
export async function answerOf (runner: Runner, question: Question): Promise<number | undefined> {
  let answer = asked[question].get(runner)
  if (answer === undefined) {
    answer = ask(runner, question).finally(() => asked[question].delete(runner))
    asked[question].set(runner, answer)
  }
  return await within(answer, PATIENCE, () => undefined)
}

async function ask (runner: Runner, question: Question): Promise<number | undefined> {
  try {
    const answer = await runner[question]!()
    return Number.isFinite(answer) ? answer : undefined
  } catch {
    return undefined
  }
}
