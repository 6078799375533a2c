import { execFile, spawn } from 'node:child_process'
import type { ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { request } from 'node:http'
import type { IncomingMessage } from 'node:http'
import { text } from 'node:stream/consumers'
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { promisify } from 'node:util'
import type { Test } from 'tap'
import { sampleEvent, sign, testSecret } from '../../lib/testing/index.ts'
import { ROOT, codeBlocks, readDocument } from './docs.ts'
import { environment } from './program.mjs'

// Users' projects: the packed package, the packages of others, and the code that a recipe prints.

const exec = promisify(execFile)

/** The environment of a user's program: nothing of the test runner's loaders, and a secret. */
export const env: NodeJS.ProcessEnv = {
  ...Object.fromEntries(Object.entries(environment).filter(([name]) => !/^(?:NODE_V8_COVERAGE|npm_)/.test(name))),
  OPENAI_WEBHOOK_SECRET: testSecret,
  NO_COLOR: '1'
}

export async function run (cwd: string, command: string, args: readonly string[], more: NodeJS.ProcessEnv = {}): Promise<string> {
  try {
    const { stdout, stderr } = await exec(command, args, { cwd, env: { ...env, ...more }, maxBuffer: 64e6 })
    return stdout + stderr
  } catch (error) {
    const { stdout, stderr } = error as { stdout: string, stderr: string }
    throw new Error(`${command} ${args.join(' ')} failed in ${cwd}:\n${stdout}\n${stderr}`, { cause: error })
  }
}

let tarball: Promise<string> | undefined

async function pack (dir: string): Promise<string> {
  const [packed] = JSON.parse(await run(ROOT, 'npm', ['pack', '--ignore-scripts', '--json', '--pack-destination', dir])) as [{ filename: string }]
  return join(dir, packed.filename)
}

export async function install (cwd: string, ...packages: string[]): Promise<void> {
  await run(cwd, 'npm', ['install', '--no-audit', '--no-fund', '--prefer-offline', '--loglevel=error', ...packages])
}

/**
 * Makes a folder with the package and others installed.
 *
 * @param dir the folder of all projects of a test
 */
export async function project (dir: string, name: string, packages: readonly string[], manifest: object = { type: 'module' }): Promise<string> {
  const cwd = join(dir, name)
  mkdirSync(cwd, { recursive: true })
  if (!existsSync(join(cwd, 'package.json'))) {
    // The same override as in this package's package.json, because some registries lack the version that npm would install otherwise.
    writeFileSync(join(cwd, 'package.json'), JSON.stringify({ name, private: true, overrides: { 'msgpackr-extract': '3.0.4' }, ...manifest }))
  }
  tarball ??= pack(dir)
  await install(cwd, await tarball, ...packages)
  return cwd
}

const NAMED = /^(?:\/\/|#|<!--) (\S*[\w])(, at the top)?(?: -->)?\n/

/** Writes the code blocks of a document whose first line names their file, each as `adapt` returns it. */
export function writeRecipe (cwd: string, document: string, adapt = (_file: string, code: string): string => code): string[] {
  const files: string[] = []
  for (const { code } of codeBlocks(readDocument(document))) {
    const [line, name, atTheTop] = NAMED.exec(code) ?? []
    if (line === undefined || !/[./]|^[A-Z]\w+$/.test(name!)) continue
    const file = join(cwd, name!)
    const before = atTheTop === undefined || !existsSync(file) ? '' : readFileSync(file, 'utf8')
    mkdirSync(dirname(file), { recursive: true })
    writeFileSync(file, adapt(name!, code.slice(line.length)) + before)
    files.push(name!)
  }
  return files
}

/** A running program of the user. */
export class Program {
  output = ''
  readonly child: ChildProcess
  readonly #ended: Promise<unknown>
  #hasEnded = false
  readonly #waiting = new Set<() => void>()

  constructor (t: Test, cwd: string, command: string, args: readonly string[], more: NodeJS.ProcessEnv = {}) {
    this.child = spawn(command, args, { cwd, env: { ...env, ...more }, stdio: ['ignore', 'pipe', 'pipe'] })
    const changed = (): void => { for (const look of this.#waiting) look() }
    for (const stream of [this.child.stdout!, this.child.stderr!]) {
      stream.on('data', chunk => {
        this.output += String(chunk)
        changed()
      })
    }
    this.#ended = once(this.child, 'close').then(() => {
      this.#hasEnded = true
      changed()
    })
    t.teardown(async () => {
      this.child.kill('SIGKILL')
      await this.#ended
    })
  }

  /** Resolves once the output matches; rejects when the program ends before that. */
  async until (wanted: RegExp): Promise<RegExpExecArray> {
    return await new Promise((resolve, reject) => {
      const look = (): void => {
        const found = wanted.exec(this.output)
        if (found === null && !this.#hasEnded) return
        this.#waiting.delete(look)
        if (found === null) reject(new Error(`it ended without ${String(wanted)}:\n${this.output}`))
        else resolve(found)
      }
      this.#waiting.add(look)
      look()
    })
  }

  /** The address that Fastify logs when it listens. */
  async listening (): Promise<string> {
    return (await this.until(/Server listening at (http:\/\/(?:127\.0\.0\.1|\[::1\]|localhost):\d+)/))[1]!
  }

  /** Ends the program as a process manager does, and returns its exit code. */
  async end (signal: NodeJS.Signals = 'SIGTERM'): Promise<number | null> {
    this.child.kill(signal)
    await this.#ended
    return this.child.exitCode
  }
}

export interface Answer {
  readonly status: number
  readonly body: string
}

/**
 * Sends a delivery as OpenAI does, over a connection of its own.
 *
 * @param options.changed the body to send instead of the signed one
 * @param options.from the loopback address to send from
 */
export async function send (url: string, type: Parameters<typeof sampleEvent>[0] = 'batch.completed', { webhookId, changed, headers = {}, from = '127.0.0.1' }: { webhookId?: string, changed?: string, headers?: Record<string, string>, from?: string } = {}): Promise<Answer> {
  const body = JSON.stringify(sampleEvent(type))
  const signed = sign(body, webhookId === undefined ? {} : { webhookId })
  const sending = request(url, { method: 'POST', agent: false, localAddress: from, headers: { ...signed, ...headers } })
  sending.end(changed ?? body)
  const [response] = await once(sending, 'response') as [IncomingMessage]
  return { status: response.statusCode!, body: await text(response) }
}
