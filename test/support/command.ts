import { spawn, spawnSync } from 'node:child_process'
import type { ChildProcessByStdio } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import type { Readable } from 'node:stream'
import { main } from '../../lib/cli/main.ts'
import { spawnProgram } from './program.mjs'

const ROOT = join(import.meta.dirname, '../..')

type Teardown = { teardown: (fn: () => unknown) => void }
type Environment = Record<string, string>

/** A running command and its output. */
export class Session {
  out = ''
  err = ''
  /** The exit code. It settles once all output has been read. */
  ended: Promise<number | null> = Promise.resolve(null)
  interrupt: () => void = () => {}
  /** Closes the reading end of `out`. */
  hangUp: () => void = () => {}
  #over = false
  readonly #waiting = new Set<() => void>()

  write (to: 'out' | 'err', text: string): void {
    this[to] += text
    for (const look of this.#waiting) look()
  }

  /** Resolves to the match once `out` contains it; rejects when the command ends without it. */
  async shows (pattern: RegExp): Promise<RegExpExecArray> {
    return await new Promise((resolve, reject) => {
      const look = (): void => {
        const match = pattern.exec(this.out)
        if (match === null && !this.#over) return
        this.#waiting.delete(look)
        if (match === null) reject(new Error(`not shown: ${String(pattern)}\n${this.out}${this.err}`))
        else resolve(match)
      }
      this.#waiting.add(look)
      look()
    })
  }

  until (ended: Promise<number | null>): this {
    this.ended = ended.finally(() => {
      this.#over = true
      for (const look of this.#waiting) look()
    })
    return this
  }
}

export interface Result { code: number, out: string, err: string }

export interface Given { env?: Environment, isTTY?: boolean, signal?: AbortSignal }

/** Runs a command line in this process, to its end. */
export async function run (argv: readonly string[], { env = {}, isTTY = false, signal = new AbortController().signal }: Given = {}): Promise<Result> {
  const result = { code: 0, out: '', err: '' }
  result.code = await main(argv, {
    out: text => { result.out += text },
    err: text => { result.err += text },
    isTTY,
    env,
    signal
  })
  return result
}

/** Starts a command line in this process. */
export function start (t: Teardown, argv: readonly string[], { env = {}, isTTY = false }: { env?: Environment, isTTY?: boolean } = {}): Session {
  const session = new Session()
  const interrupted = new AbortController()
  session.interrupt = () => interrupted.abort()
  session.until(main(argv, {
    out: text => session.write('out', text),
    err: text => session.write('err', text),
    isTTY,
    env,
    signal: interrupted.signal
  }))
  t.teardown(async () => {
    interrupted.abort()
    await session.ended
  })
  return session
}

export const BUILT = join(ROOT, 'dist/cli/bin.js')

/** Starts a command line in its own process, whose environment contains nothing of the test runner. */
export function launch (t: Teardown, argv: readonly string[], { env = {}, cwd }: { env?: Environment, cwd?: string } = {}): Session {
  return started(t, spawnProgram([BUILT, ...argv], { env: { PATH: process.env['PATH'], ...env }, cwd, stdio: ['ignore', 'pipe', 'pipe'] }))
}

/** Like `launch`, but from lib/ with the loaders of the test runner, so that the coverage counts. */
export function launchSource (t: Teardown, argv: readonly string[], env: Environment = {}): Session {
  return started(t, spawn(process.execPath, ofSource(argv), { env: { ...process.env, NO_COLOR: '', ...env }, cwd: ROOT, stdio: ['ignore', 'pipe', 'pipe'] }))
}

/** Like `launchSource`, with an open file as stdout. */
export function runSource (argv: readonly string[], stdout: number): { status: number | null, stderr: string } {
  return spawnSync(process.execPath, ofSource(argv), { cwd: ROOT, stdio: ['ignore', stdout, 'pipe'], encoding: 'utf8' })
}

function ofSource (argv: readonly string[]): string[] {
  const loader = new URL('typescript.js', import.meta.url).href
  return [`--import=${loader}`, ...process.execArgv, join(ROOT, 'lib/cli/bin.ts'), ...argv]
}

function started (t: Teardown, child: ChildProcessByStdio<null, Readable, Readable>): Session {
  const session = new Session()
  session.interrupt = () => { child.kill('SIGINT') }
  session.hangUp = () => { child.stdout.destroy() }
  child.stdout.setEncoding('utf8').on('data', (text: string) => session.write('out', text))
  child.stderr.setEncoding('utf8').on('data', (text: string) => session.write('err', text))
  session.until(once(child, 'close').then(([code]) => code as number | null))
  t.teardown(async () => {
    child.kill('SIGKILL')
    await session.ended
  })
  return session
}
