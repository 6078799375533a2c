import { once } from 'node:events'
import { connect } from 'node:net'
import type { AddressInfo, Socket } from 'node:net'
import type { FastifyInstance } from 'fastify'

type Teardown = { teardown: (fn: () => unknown) => void }

/** Name and value of each header line, in order. A name may occur twice. */
export type HeaderLines = ReadonlyArray<readonly [name: string, value: string]>

export interface Answer {
  status: number
  headers: Record<string, string>
  body: string
}

/** Listens on a free port of 127.0.0.1. */
export async function listen (app: FastifyInstance): Promise<number> {
  await app.listen({ port: 0, host: '127.0.0.1' })
  return (app.server.address() as AddressInfo).port
}

/** The head of a request as text. Header values are written as Latin-1 and not checked. */
export function head (lines: HeaderLines, url = '/webhooks/openai', method = 'POST'): Buffer {
  const text = [`${method} ${url} HTTP/1.1`, 'host: localhost', ...lines.map(([name, value]) => `${name}: ${value}`), '', '']
  return Buffer.from(text.join('\r\n'), 'latin1')
}

/** A request with a correct Content-Length. */
export function request (lines: HeaderLines, body: Buffer, url?: string, method?: string): Buffer {
  return Buffer.concat([head([...lines, ['content-length', String(body.length)]], url, method), body])
}

export function chunk (bytes: Buffer): Buffer {
  return Buffer.concat([Buffer.from(`${bytes.length.toString(16)}\r\n`), bytes, Buffer.from('\r\n')])
}

export const LAST_CHUNK = Buffer.from('0\r\n\r\n')

export const CHUNKED: HeaderLines = [['transfer-encoding', 'chunked']]

/** A client that can write malformed requests, and reads HTTP/1.1 answers one by one. */
export class Wire {
  readonly socket: Socket
  #received = Buffer.alloc(0)
  #closed = false
  #error: Error | undefined
  #wake: () => void = () => {}

  private constructor (socket: Socket) {
    this.socket = socket
    socket.setNoDelay(true)
    socket.on('data', bytes => {
      this.#received = Buffer.concat([this.#received, bytes])
      this.#wake()
    })
    socket.on('error', error => { this.#error = error })
    socket.on('close', () => {
      this.#closed = true
      this.#wake()
    })
  }

  /** Opens a connection that is destroyed when the test ends. */
  static async open (t: Teardown, port: number): Promise<Wire> {
    const socket = connect(port, '127.0.0.1')
    t.teardown(() => socket.destroy())
    await once(socket, 'connect')
    return new Wire(socket)
  }

  /** Resolves when the bytes have been handed to the operating system. */
  write (bytes: Buffer): Promise<void> {
    return new Promise((resolve, reject) => {
      this.socket.write(bytes, error => { error ? reject(error) : resolve() })
    })
  }

  /** The next answer, including `100 Continue`. Rejects when the connection ends without an answer. */
  async answer (): Promise<Answer> {
    for (;;) {
      const answer = this.#take()
      if (answer !== undefined) return answer
      if (this.#closed) throw new Error('the connection ended without an answer', { cause: this.#error })
      await new Promise<void>(resolve => { this.#wake = resolve })
    }
  }

  #take (): Answer | undefined {
    const end = this.#received.indexOf('\r\n\r\n')
    if (end === -1) return undefined
    const [statusLine, ...lines] = this.#received.toString('latin1', 0, end).split('\r\n')
    const headers = Object.fromEntries(lines.map(line => {
      const colon = line.indexOf(':')
      return [line.slice(0, colon).toLowerCase(), line.slice(colon + 1).trim()]
    }))
    const status = Number(statusLine?.split(' ')[1])
    const length = status < 200 ? '0' : headers['content-length']
    if (length === undefined && !this.#closed) return undefined
    const start = end + 4
    const stop = length === undefined ? this.#received.length : start + Number(length)
    if (this.#received.length < stop) return undefined
    const body = this.#received.toString('utf8', start, stop)
    this.#received = this.#received.subarray(stop)
    return { status, headers, body }
  }
}
