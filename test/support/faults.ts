import type { ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, readFileSync } from 'node:fs'
import { connect, createServer } from 'node:net'
import type { AddressInfo, Server, Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { Redis } from 'ioredis'
import type { FastifyInstance } from 'fastify'
import { SECRET, post, sign } from './deliveries.ts'
import type { Signed } from './deliveries.ts'
import { redelivered } from './observe.ts'
import { forkProgram } from './program.mjs'
import type { HandleName } from './sqlite.mjs'
import { RedisServer } from './redis.ts'

type Teardown = { teardown: (fn: () => unknown) => void }

/** ms to wait for something that must happen. */
const PATIENCE = 20_000

/** Waits until the condition holds, and fails the test when it does not hold in time. */
export async function until (what: string, holds: () => boolean | Promise<boolean>): Promise<void> {
  const end = performance.now() + PATIENCE
  while (!await holds()) {
    if (performance.now() > end) throw new Error(`expected ${what} within ${PATIENCE} ms`)
    await sleep(5)
  }
}

/** A Redis client with a user's configuration. It has a listener for 'error', because every failed attempt to connect emits one. */
export function redisClient (t: Teardown, port: number, options: { maxRetriesPerRequest?: number, retryStrategy?: (times: number) => number } = {}): Redis {
  const client = new Redis({ port, host: '127.0.0.1', ...options })
  client.on('error', () => {})
  t.teardown(() => client.disconnect())
  return client
}

/** Options of a client that fails a command after one attempt to reconnect, and reconnects at short intervals. */
export const IMPATIENT = { maxRetriesPerRequest: 1, retryStrategy: () => 50 }

/** The answer to the sender: `200`, `200 duplicate`, or the status with the code and whether there was a Retry-After. */
export async function answer (app: FastifyInstance, delivery: Signed): Promise<string> {
  const { statusCode, headers, body } = await post(app, delivery)
  const { code, duplicate } = JSON.parse(body) as { code?: string, duplicate?: boolean }
  const words = [String(statusCode), code?.replace('FST_OPENAI_WEBHOOK_', ''), duplicate === true ? 'duplicate' : undefined]
  if (headers['retry-after'] !== undefined) words.push(`retry after ${String(headers['retry-after'])}`)
  return words.filter(word => word !== undefined).join(' ')
}

/** Delivers again until the answer is 200, as OpenAI does, and returns all answers. */
export async function deliverUntil200 (app: FastifyInstance, delivery: Signed): Promise<string[]> {
  const answers: string[] = []
  await until('an answer 200', async () => {
    answers.push(await answer(app, delivery))
    delivery = redelivered(delivery)
    return answers.at(-1)!.startsWith('200')
  })
  return answers
}

export const UNAVAILABLE = '503 UNAVAILABLE retry after 5'
export const DEADLINE = '503 DEADLINE retry after 5'
export const IN_PROGRESS = '409 IN_PROGRESS retry after 5'

/** The event of most tests, with a new webhook-id. */
export function batchFailed (webhookId?: string): Signed {
  return sign({ id: 'evt_1', object: 'event', created_at: 1750861210, type: 'batch.failed', data: { id: 'batch_1' } }, webhookId === undefined ? {} : { webhookId })
}

/** A proxy between a client and a server that fails over. A connection goes to the server that is current when it is opened. */
export class TcpProxy {
  readonly #server: Server
  readonly #pairs = new Set<[Socket, Socket]>()
  /** While this is set, the answers of the server are lost. */
  swallowing = false
  /** Changes what the server answers. */
  rewrite: (answer: Buffer) => Buffer | string = answer => answer
  /** Called when an answer was lost. */
  onSwallowed: () => void = () => {}

  #upstream: number
  port = 0

  private constructor (upstream: number) {
    this.#upstream = upstream
    this.#server = createServer(client => {
      const server = connect(this.#upstream, '127.0.0.1')
      const pair: [Socket, Socket] = [client, server]
      this.#pairs.add(pair)
      client.on('data', bytes => server.write(bytes))
      server.on('data', bytes => {
        if (this.swallowing) this.onSwallowed()
        else client.write(this.rewrite(bytes))
      })
      for (const [socket, other] of [[client, server], [server, client]] as const) {
        socket.on('error', () => {})
        socket.on('close', () => {
          other.destroy()
          this.#pairs.delete(pair)
        })
      }
    })
  }

  static async start (t: Teardown, upstream: number): Promise<TcpProxy> {
    const proxy = new TcpProxy(upstream)
    await proxy.up(upstream)
    t.teardown(() => proxy.down())
    return proxy
  }

  /** Refuses connections, like an address where nothing listens. */
  down (): void {
    this.#server.close()
    this.cut()
  }

  async up (upstream: number): Promise<void> {
    this.#upstream = upstream
    this.#server.listen(this.port, '127.0.0.1')
    await once(this.#server, 'listening')
    this.port = (this.#server.address() as AddressInfo).port
  }

  /** Leads new connections to another server, as a name or an address does after a failover. Those that are open stay. */
  moveTo (upstream: number): void { this.#upstream = upstream }

  /** Closes every open connection. */
  cut (): void {
    for (const [client] of this.#pairs) client.destroy()
  }
}

export interface Command {
  name: string
  args: string[]
  /** Whether a script called the command. */
  inScript: boolean
}

/** Returns the commands that a Redis server receives while `work` runs, without those of connecting. */
export async function commandsOf (t: Teardown, port: number, work: () => Promise<void>): Promise<Command[]> {
  const watcher = redisClient(t, port)
  const monitor = await watcher.monitor()
  t.teardown(() => monitor.disconnect())
  const seen: Command[] = []
  const marker = `end-${Math.random()}`
  const ended = new Promise<void>(resolve => {
    monitor.on('monitor', (_time: string, [name = '', ...args]: string[], source: string) => {
      if (args[0] === marker) resolve()
      else seen.push({ name: name.toLowerCase(), args, inScript: source === 'lua' })
    })
  })
  await work()
  const client = redisClient(t, port)
  await client.echo(marker)
  await ended
  return seen.filter(({ name }) => !['info', 'client', 'hello', 'command', 'select'].includes(name))
}

export interface MemberOptions {
  /** A file to which each run of the handler adds the line `<webhook-id> <pid>`. */
  effects: string
  path?: false
  store?: 'memory' | 'sqlite' | 'redis'
  runner?: 'inline' | 'durable' | 'bullmq' | 'pgboss'
  /** The file of the SQLite database. */
  file?: string
  /** The library that opens the SQLite database. */
  handle?: HandleName
  redisPort?: number
  postgresUrl?: string
  lease?: number
  worker?: boolean | { concurrency?: number, lockDuration?: number, stalledInterval?: number, pollingIntervalSeconds?: number }
  /** The handler blocks the event loop until this file exists. */
  blockedUntil?: string
  /** Whether the handler fails at its end. */
  fails?: boolean
  /** Whether the handler never ends, or ms after which it does. */
  hangs?: boolean | number
  /** ms */
  closeTimeout?: number
}

/**
 * A process with the built package, one of several that share a store or a queue. It is a user's program, so its environment contains
 * nothing of the test runner.
 */
export class Member {
  readonly #process: ChildProcess
  readonly port: number
  /** The messages that its `onError` received. */
  readonly told: string[] = []

  private constructor (child: ChildProcess, port: number) {
    this.#process = child
    this.port = port
    child.on('message', ({ error }: { error: string }) => { this.told.push(error) })
  }

  static async start (t: Teardown, options: MemberOptions): Promise<Member> {
    const child = forkProgram(fileURLToPath(new URL('processes/member.mjs', import.meta.url)), [JSON.stringify({ secret: SECRET, ...options })])
    t.teardown(async () => await end(child, () => child.kill('SIGKILL')))
    const [message] = await Promise.race([once(child, 'message'), once(child, 'exit')]) as [{ port: number } | number | null]
    if (typeof message !== 'object' || message === null) throw new Error('the process ended before it listened')
    return new Member(child, message.port)
  }

  get pid (): number {
    return this.#process.pid!
  }

  async close (): Promise<void> {
    await end(this.#process, () => this.#process.send('close'))
  }

  async kill (): Promise<void> {
    await end(this.#process, () => this.#process.kill('SIGKILL'))
  }
}

async function end (child: ChildProcess, how: () => unknown): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return
  const exited = once(child, 'exit')
  how()
  await exited
}

/** The lines of an effects file. */
export function effectsIn (file: string): Array<{ webhookId: string, pid: number }> {
  if (!existsSync(file)) return []
  return readFileSync(file, 'utf8').split('\n').filter(line => line !== '').map(line => {
    const [webhookId = '', pid] = line.split(' ')
    return { webhookId, pid: Number(pid) }
  })
}

/** Starts a replica of `main`, and resolves once it is in sync. */
export async function replicaOf (t: { teardown: (fn: () => unknown) => void }, main: RedisServer): Promise<RedisServer> {
  const replica = await RedisServer.start(t, '--replicaof', '127.0.0.1', String(main.port))
  const admin = redisClient(t, replica.port)
  await until('the replica to be in step', async () => (await admin.info('replication')).includes('master_link_status:up'))
  return replica
}
