// The environment of the sections: processes, databases, and a way to compare contenders.
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Child } from './processes.mjs'
import { Postgres } from './postgres.mjs'
import { Redis } from './redis.mjs'
import { max, median, min } from './statistics.mjs'

export const CONNECTIONS = 50

export class Bench {
  #load
  #redis
  #postgres
  #directory
  #serverFlags
  /** By resource: why contenders that need it are left out. */
  missing = {}

  /**
   * @param {object} [options]
   * @param {boolean} [options.quick] fewest rounds, in one generation of processes
   * @param {boolean} [options.short] fewer rounds, in two generations of processes
   * @param {string} [options.profile] a directory for CPU profiles of the servers
   * @param {(line: string) => void} [options.log]
   */
  static async start ({ quick = false, short = false, profile, log = () => {} } = {}) {
    const bench = new Bench()
    bench.quick = quick
    bench.short = short
    bench.log = log
    bench.#serverFlags = profile === undefined ? [] : ['--cpu-prof', `--cpu-prof-dir=${profile}`]
    bench.#directory = mkdtempSync(join(tmpdir(), 'bench-'))
    process.once('exit', bench.#removeDirectory)
    bench.#load = await Child.start('load.mjs')
    bench.#redis = await Redis.start()
    if (bench.#redis === undefined) bench.missing.redis = 'there is no redis-server'
    bench.#postgres = await Postgres.start()
    if (bench.#postgres === undefined) bench.missing.postgres = 'there is no PostgreSQL'
    return bench
  }

  async close () {
    await this.#load.stop()
    await this.#redis?.stop()
    await this.#postgres?.stop()
    process.off('exit', this.#removeDirectory)
    this.#removeDirectory()
  }

  #removeDirectory = () => { rmSync(this.#directory, { recursive: true, force: true }) }

  get redisPort () { return this.#redis?.port }

  /** Scales a plan to the size of the run. Each generation of processes serves `warmUp` requests, then `rounds` of `count` requests. */
  scaled (plan) {
    if (this.quick) return { ...plan, warmUp: plan.warmUp / 4, rounds: 6, generations: 1 }
    return this.short ? { ...plan, rounds: 6, generations: 2 } : plan
  }

  /** Whether the resource that a contender needs is available. */
  has ({ needs }) { return needs === undefined || this.missing[needs] === undefined }

  async serve ({ module, options }, flags = []) {
    const resources = { redisPort: this.redisPort, postgresUrl: this.#postgres?.url, directory: this.#directory }
    const server = await Child.start('server.mjs', [module, { ...options, ...resources }], [...flags, ...this.#serverFlags])
    return { ask: (name, question) => server.ask(name, question), stop: () => server.stop(), port: server.hello.port }
  }

  /**
   * Sends requests, see `buildRequests`.
   *
   * @param {object} server
   * @param {object} plan by default with 50 `connections`; with `arrivals`, requests a second, else at full load
   * @param {object} [options]
   * @param {number} [options.untilHandled] waits until the handlers of this many deliveries have run since the start of the server
   * @param {boolean} [options.poll] whether the sender stays awake, which occupies a core
   * @returns the server's CPU µs per request, requests a second, latencies in ms, and the answer
   * @throws unless all answers are the same
   */
  async send (server, plan, { untilHandled, poll = true } = {}) {
    await this.#load.ask('prepare', { port: server.port, connections: CONNECTIONS, poll, ...plan })
    const before = await server.ask('cpu')
    const start = performance.now()
    const { seconds, answers, ...latency } = await this.#load.ask('go')
    const answer = only(answers)
    if (untilHandled !== undefined) {
      if (!answer.startsWith('200 ')) throw new Error(`expected 200, got ${answer}`)
      await server.ask('handled', untilHandled)
    }
    const elapsed = untilHandled === undefined ? seconds : (performance.now() - start) / 1000
    const cpu = await server.ask('cpu') - before
    return { cpu: cpu / plan.count, rate: plan.count / elapsed, ...latency, answer }
  }

  async answerTo (server, plan) {
    const { answer } = await this.send(server, { ...plan, count: 3 })
    return answer
  }

  /**
   * Checks that a correct delivery is answered 200 and a forged one is refused.
   *
   * @returns the answer to a correct delivery
   * @throws when the contender answers otherwise
   */
  async check (name, server, { scheme, checksNothing = false, refusesAll = false }, templates) {
    if (refusesAll) return await this.refusalOf(name, server, { templates, scheme })
    const right = await this.answerTo(server, { templates, scheme })
    if (!right.startsWith('200 ')) throw new Error(`${name} answers a correct delivery ${right}`)
    if (!checksNothing) await this.refusalOf(name, server, { templates, scheme, kind: 'forged' })
    return right
  }

  async refusalOf (name, server, plan) {
    const answer = await this.answerTo(server, plan)
    if (!/^4\d\d /.test(answer)) throw new Error(`${name} answers a delivery that is ${plan.kind ?? 'correct'} ${answer}`)
    return answer
  }

  /**
   * Measures contenders in interleaved rounds, each round in a new random order. Each generation has new processes, because two processes
   * of the same program differ by some percent.
   *
   * @param {Record<string, import('./contenders/index.mjs').Contender & { plan?: { templates?: string[][], kind?: string } }>} candidates
   * @param {{ templates: string[][], count: number, warmUp: number, rounds: number, generations: number }} plan
   */
  async compare (candidates, { templates, count, warmUp, rounds, generations }) {
    const names = Object.keys(candidates)
    const plans = Object.fromEntries(names.map(name => [name, { templates, scheme: candidates[name].scheme, ...candidates[name].plan }]))
    const samples = Object.fromEntries(names.map(name => [name, []]))
    for (let generation = 0; generation < generations; generation++) {
      const servers = {}
      const expected = {}
      try {
        for (const name of names) {
          const plan = plans[name]
          servers[name] = await this.serve(candidates[name])
          expected[name] = await this.check(name, servers[name], candidates[name], plan.templates)
          if (plan.kind !== undefined && !candidates[name].checksNothing) expected[name] = await this.refusalOf(name, servers[name], plan)
          await this.send(servers[name], { ...plan, count: warmUp })
        }
        for (let round = 0; round < rounds; round++) {
          for (const name of shuffled(names)) {
            const sample = await this.send(servers[name], { ...plans[name], count })
            if (sample.answer !== expected[name]) throw new Error(`${name}: expected ${expected[name]}, got ${sample.answer}`)
            samples[name].push(sample)
          }
        }
      } finally {
        for (const server of Object.values(servers)) await server.stop()
      }
    }
    return Object.fromEntries(names.map(name => [name, summary(samples[name])]))
  }
}

function shuffled (values) {
  return values.map(value => ({ value, at: Math.random() })).sort((a, b) => a.at - b.at).map(({ value }) => value)
}

function only (answers) {
  const [answer, ...others] = Object.keys(answers)
  if (others.length > 0) throw new Error(`expected all answers to be the same, got ${JSON.stringify(answers)}`)
  return answer
}

export function summary (samples) {
  const of = name => samples.map(sample => sample[name])
  const cpu = of('cpu')
  return {
    cpu: { rounds: cpu, median: median(cpu), min: min(cpu), max: max(cpu) },
    rate: median(of('rate')),
    p50: median(of('p50')),
    p99: median(of('p99')),
    worst: max(of('worst'))
  }
}
