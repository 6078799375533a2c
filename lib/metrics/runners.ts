import { runnersInUse } from '../runners/runner.ts'
import type { Runner } from '../runners/runner.ts'
import { within } from '../within.ts'

/** ms to wait for a runner. Prometheus aborts a scrape after ten seconds and then gets no metric at all. */
const PATIENCE = 1_000

type Question = 'depth' | 'deadCount'

/** Runners that have not answered yet. They are not asked again, because questions would accumulate while Redis is down. */
const asked: Readonly<Record<Question, WeakMap<Runner, Promise<number | undefined>>>> = { depth: new WeakMap(), deadCount: new WeakMap() }

/**
 * Adds up the answers of this process's runners: how many deliveries wait in their queues, or are dead. A runner that fails or does not
 * answer in time is left out.
 *
 * @returns `undefined` when there are runners to ask and none of them answered
 */
export async function sumOfRunners (question: Question): Promise<number | undefined> {
  const answers = await Promise.all([...runnersInUse].filter(runner => runner[question] !== undefined).map(runner => answerOf(runner, question)))
  const known = answers.filter(answer => answer !== undefined)
  return answers.length > 0 && known.length === 0 ? undefined : known.reduce((sum, each) => sum + each, 0)
}

/**
 * Asks one runner.
 *
 * @returns `undefined` when it fails or does not answer in time
 */
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
