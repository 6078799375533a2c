import { spawn, spawnSync } from 'node:child_process'
import type { ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { chmodSync, chownSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { connect } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { postgresBindir } from './missing.ts'
import { freePort } from './port.mjs'

export { postgresMissing } from './missing.ts'

interface Teardown { teardown: (fn: () => unknown) => void }

/** PostgreSQL refuses to run as root. */
const ACCOUNT = process.getuid?.() === 0 ? account() : undefined

function account (): { uid: number, gid: number } | undefined {
  const [uid, gid] = ['-u', '-g'].map(which => Number(spawnSync('id', [which, 'postgres'], { encoding: 'utf8' }).stdout))
  return uid && gid ? { uid, gid } : undefined
}

/** A new folder that the account may write to. The test's own folder belongs to root when the tests run as root. */
function folder (t: Teardown): string {
  const dir = mkdtempSync(join(tmpdir(), 'webhook-postgres-'))
  if (ACCOUNT !== undefined) chownSync(dir, ACCOUNT.uid, ACCOUNT.gid)
  chmodSync(dir, 0o700)
  t.teardown(() => { rmSync(dir, { recursive: true, force: true }) })
  return dir
}

async function listening (port: number): Promise<void> {
  for (;;) {
    const socket = connect(port, '127.0.0.1')
    const isUp = await once(socket, 'connect').then(() => true, () => false)
    socket.destroy()
    if (isUp) return
    await sleep(20)
  }
}

/** A real PostgreSQL server on a free port, with its data in a temporary folder. */
export class PostgresServer {
  #process: ChildProcess | undefined

  private constructor (readonly port: number, readonly dir: string, readonly args: readonly string[]) {}

  /** @param args of the server, such as `-c`, `fsync=on`; fsync is off by default */
  static async start (t: Teardown, ...args: string[]): Promise<PostgresServer> {
    const dir = join(folder(t), 'data')
    const made = spawnSync(join(postgresBindir(), 'initdb'), ['-D', dir, '-A', 'trust', '-U', 'postgres', '-E', 'UTF8', '--no-sync', '--no-instructions'], { ...ACCOUNT, encoding: 'utf8', cwd: '/' })
    if (made.status !== 0) throw new Error(made.stderr)
    const server = new PostgresServer(await freePort(), dir, args)
    t.teardown(async () => await server.stop())
    await server.start()
    return server
  }

  get url (): string {
    return `postgres://postgres@127.0.0.1:${this.port}/postgres`
  }

  async start (): Promise<void> {
    this.#process = spawn(join(postgresBindir(), 'postgres'), [
      '-D', this.dir, '-p', String(this.port), '-c', 'listen_addresses=127.0.0.1', '-c', 'unix_socket_directories=', '-c', 'fsync=off',
      '-c', 'shared_buffers=16MB', '-c', 'autovacuum=off', ...this.args
    ], { ...ACCOUNT, cwd: '/', stdio: ['ignore', 'ignore', 'pipe'] })
    const { stderr } = this.#process
    let log = ''
    // After a crash the server says when it has recovered.
    await new Promise<void>((resolve, reject) => {
      stderr!.on('data', text => {
        log += String(text)
        if (log.includes('database system is ready to accept connections')) resolve()
      }).on('end', () => { reject(new Error(log)) })
    })
    stderr!.removeAllListeners('data').resume()
  }

  /** Sends SIGSTOP or SIGCONT to all of its processes, so that the server hangs or continues. */
  signal (signal: NodeJS.Signals): void {
    const { pid } = this.#process!
    for (const child of spawnSync('pgrep', ['-P', String(pid)], { encoding: 'utf8' }).stdout.split('\n').filter(Boolean)) process.kill(Number(child), signal)
    process.kill(pid!, signal)
  }

  /** Shuts down immediately and recovers. */
  async restart (): Promise<void> {
    await this.stop()
    await this.start()
  }

  /** @param signal by default SIGQUIT, an immediate shutdown, after which the server recovers as after a crash */
  async stop (signal: NodeJS.Signals = 'SIGQUIT'): Promise<void> {
    const child = this.#process
    this.#process = undefined
    if (child === undefined || child.exitCode !== null || child.signalCode !== null) return
    child.kill('SIGCONT')
    child.kill(signal)
    await once(child, 'exit')
  }
}

/**
 * Starts PgBouncer in transaction mode in front of a server.
 *
 * @returns its port
 */
export async function startPgBouncer (t: Teardown, server: PostgresServer): Promise<number> {
  const dir = folder(t)
  const port = await freePort()
  const file = join(dir, 'pgbouncer.ini')
  writeFileSync(file, `
[databases]
postgres = host=127.0.0.1 port=${server.port} user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = ${port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 4
ignore_startup_parameters = extra_float_digits
`)
  if (ACCOUNT !== undefined) chownSync(file, ACCOUNT.uid, ACCOUNT.gid)
  const child = spawn('pgbouncer', ['-q', file], { ...ACCOUNT, cwd: '/', stdio: ['ignore', 'ignore', 'inherit'], env: { ...process.env, PATH: `${process.env['PATH']}:/usr/sbin` } })
  t.teardown(async () => {
    child.kill('SIGKILL')
    await once(child, 'exit')
  })
  await listening(port)
  return port
}
