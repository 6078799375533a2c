import { spawn } from 'node:child_process'
import type { ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { freePort } from './port.mjs'

export { redisMissing } from './missing.ts'

/** A real redis-server on a free port. By default it stores nothing on disk. */
export class RedisServer {
  #process: ChildProcess | undefined
  /** Its own: a replica writes a file there, which a later server on the same port would load. */
  readonly #dir = mkdtempSync(join(tmpdir(), 'webhook-redis-'))

  private constructor (readonly port: number, readonly args: readonly string[]) {}

  static async start (t: { teardown: (fn: () => unknown) => void }, ...args: string[]): Promise<RedisServer> {
    const server = new RedisServer(await freePort(), args)
    t.teardown(async () => {
      await server.stop()
      rmSync(server.#dir, { recursive: true })
    })
    await server.start()
    return server
  }

  async start (): Promise<void> {
    const child = spawn('redis-server', [
      '--port', String(this.port), '--bind', '127.0.0.1', '--save', '', '--appendonly', 'no', '--daemonize', 'no',
      '--dir', this.#dir, ...this.args
    ], { stdio: ['ignore', 'pipe', 'inherit'] })
    this.#process = child
    for await (const line of child.stdout) if (String(line).includes('Ready to accept connections')) break
    child.stdout.resume()
  }

  /** Kills the server, as when a machine fails. */
  async stop (): Promise<void> {
    const child = this.#process
    this.#process = undefined
    if (child === undefined || child.exitCode !== null || child.signalCode !== null) return
    child.kill('SIGKILL')
    await once(child, 'exit')
  }
}
