import { connect } from 'node:net'
import type { Socket } from 'node:net'
import type { FastifyInstance, FastifyServerOptions } from 'fastify'
import { memoryStore } from '../../lib/index.ts'
import type { IdempotencyStore } from '../../lib/index.ts'
import { sign } from './deliveries.ts'
import type { Signed } from './deliveries.ts'

/** ms, far more than an app with nothing left to wait for needs to close. */
export const closeTimeout = 2_000

/** Closes an app with that `closeTimeout`, and checks that it had nothing left to wait for. */
export async function drained (t: { ok: (value: unknown, message: string) => unknown }, app: FastifyInstance): Promise<void> {
  const startedAt = performance.now()
  await app.close()
  t.ok(performance.now() - startedAt < closeTimeout / 2, 'drained')
}

export interface Deferred<T> {
  promise: Promise<T>
  resolve: (value: T) => void
  reject: (error: unknown) => void
}

/** A promise that the test settles. */
export function deferred<T = void> (): Deferred<T> {
  let resolve!: Deferred<T>['resolve']
  let reject!: Deferred<T>['reject']
  const promise = new Promise<T>((_resolve, _reject) => {
    resolve = _resolve
    reject = _reject
  })
  return { promise, resolve, reject }
}

export interface LogLine {
  level: number
  msg: string
  err?: { type: string, message: string, code?: string, aggregateErrors?: Array<{ message: string }> }
  [field: string]: unknown
}

/** A logger whose lines the test reads. */
export function capturedLog (): { lines: LogLine[], logger: NonNullable<FastifyServerOptions['logger']>, errors: () => LogLine[] } {
  const lines: LogLine[] = []
  const stream = { write (line: string): void { lines.push(JSON.parse(line) as LogLine) } }
  return { lines, logger: { level: 'info', stream }, errors: () => lines.filter(({ level }) => level >= 50) }
}

/** A delivery as OpenAI retries it: with the same webhook-id, and a new timestamp and signature. */
export function redelivered ({ headers, body }: Signed, secret?: string): Signed {
  return sign(body.toString(), {
    webhookId: headers['webhook-id']!,
    timestamp: Number(headers['webhook-timestamp']) + 1,
    ...(secret !== undefined && { secret })
  })
}

/** The message of the error that `work` throws or rejects with, or the empty string when it does neither. */
export async function messageOf (work: () => unknown): Promise<string> {
  try {
    await work()
    return ''
  } catch (error) {
    return (error as Error).message
  }
}

/** The code of the error that `work` throws or rejects with, without the common prefix. */
export async function codeOf (work: () => unknown): Promise<string> {
  try {
    await work()
    return 'none'
  } catch (error) {
    return String((error as { code?: string }).code).replace('FST_OPENAI_WEBHOOK_', '')
  }
}

/** A memory store that records its calls, and with each checkpoint the name of the handler. */
export function watchedStore (): { store: IdempotencyStore, calls: string[], next: (method: keyof IdempotencyStore) => Promise<void> } {
  const memory = memoryStore()
  const calls: string[] = []
  const waiting: Array<{ method: string, resolve: () => void }> = []
  function tell (method: keyof IdempotencyStore, detail = ''): void {
    calls.push(`${method}${detail}`)
    for (const entry of waiting.filter(entry => entry.method === method)) {
      waiting.splice(waiting.indexOf(entry), 1)
      entry.resolve()
    }
  }
  return {
    calls,
    next: method => new Promise(resolve => waiting.push({ method, resolve })),
    store: {
      begin (key, lease) {
        tell('begin')
        return memory.begin(key, lease)
      },
      checkpoint (key, token, handler) {
        tell('checkpoint', ` ${handler}`)
        return memory.checkpoint(key, token, handler)
      },
      complete (key, token, retention) {
        tell('complete')
        return memory.complete(key, token, retention)
      },
      extend (key, token, lease) {
        tell('extend')
        return memory.extend(key, token, lease)
      },
      release (key, token) {
        tell('release')
        return memory.release(key, token)
      }
    }
  }
}

/** Resolves when the route's handler has been called for the nth delivery. Call this function before the app is ready. */
export function handled (app: FastifyInstance, nth: number): Promise<void> {
  const { promise, resolve } = deferred()
  let count = 0
  app.addHook('preHandler', (_request, _reply, done) => {
    done() // runs the handler
    if (++count === nth) resolve()
  })
  return promise
}

/** Lets the app listen on a free port. */
export async function listen (app: FastifyInstance): Promise<FastifyInstance> {
  await app.listen({ port: 0, host: '127.0.0.1' })
  return app
}

/** The head of a delivery as it is sent, for one exchange on one connection. */
export function head ({ headers, body }: Signed, url = '/webhooks/openai'): string {
  const fields = { host: 'localhost', connection: 'close', 'content-length': String(body.length), ...headers }
  return `POST ${url} HTTP/1.1\r\n${Object.entries(fields).map(([name, value]) => `${name}: ${value}\r\n`).join('')}\r\n`
}

/** Opens a connection to the app and collects all that arrives until it ends. The result is empty when the connection was reset. */
export async function dial (app: FastifyInstance): Promise<{ socket: Socket, received: Promise<string> }> {
  const { port } = app.server.address() as { port: number }
  const socket = connect(port, '127.0.0.1')
  const received = new Promise<string>(resolve => {
    let text = ''
    socket.setEncoding('utf8').on('data', (chunk: string) => { text += chunk })
    socket.on('error', () => {}) // a reset connection is an expected result
    socket.on('close', () => resolve(text))
  })
  await new Promise((resolve, reject) => socket.once('connect', resolve).once('error', reject))
  return { socket, received }
}

/** Sends a delivery over a connection of its own, and does not wait for the answer. */
export async function dialWith (app: FastifyInstance, delivery: Signed, url?: string): ReturnType<typeof dial> {
  const connection = await dial(app)
  connection.socket.write(head(delivery, url))
  connection.socket.write(delivery.body)
  return connection
}

/** Sends a delivery over a connection of its own, and returns the answer as it arrived. */
export async function send (app: FastifyInstance, delivery: Signed, url?: string): Promise<string> {
  const { received } = await dialWith(app, delivery, url)
  return await received
}
