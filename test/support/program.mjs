// A user's program in its own process. Under the test runner, Node starts a child with two hooks of the runner: half a second of CPU and 30
// MB each, and on Node 20 a thread that every import asks. The `env` command removes NODE_OPTIONS again.
import { execFile, fork, spawn } from 'node:child_process'
import { promisify } from 'node:util'

/** The environment without the variables of the test runner. */
export const environment = Object.fromEntries(Object.entries(process.env).filter(([name]) => !/^(?:NODE_OPTIONS|_TAPJS|TAP)/.test(name)))

const withOptions = options => ['-u', 'NODE_OPTIONS', ...(options === undefined ? [] : [`NODE_OPTIONS=${options}`]), process.execPath]

export function spawnProgram (args, { env = environment, ...options } = {}) {
  return spawn('env', [...withOptions(env.NODE_OPTIONS), ...args], { env, ...options })
}

export function forkProgram (file, args = [], { env = environment, execArgv = [], ...options } = {}) {
  return fork(file, args, { env, execPath: 'env', execArgv: [...withOptions(env.NODE_OPTIONS), ...execArgv], ...options })
}

export async function runProgram (args, { env = environment, ...options } = {}) {
  return await promisify(execFile)('env', [...withOptions(env.NODE_OPTIONS), ...args], { env, ...options })
}
