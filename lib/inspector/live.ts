import type { FastifyReply } from 'fastify'
import { isClosed, needsDrain, streamOf } from '../delivery/raw-response.ts'
import { Overloaded } from '../errors.ts'
import type { Hello, Row, Stats } from './messages.ts'

/** The most pages that are connected at once. */
const MAX_STREAMS = 20
/** The interval in ms between two messages about changes, however many changes there are. */
const PACE = 250
/** The figures are sent with every fourth message. */
const STATS_EVERY = 4

interface Source {
  watch (watched: boolean): void
  takeChanged (): Row[]
  stats (): Promise<Stats>
}

interface Stream {
  readonly raw: FastifyReply['raw']
  readonly hello: () => Promise<Hello>
  /** The reader is slow. Once it has read what was sent, it gets the whole state again. */
  behind: boolean
}

/** Sends server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html) to the open pages. */
export class Live {
  readonly #streams = new Set<Stream>()
  #timer: NodeJS.Timeout | undefined
  #turn = 0
  #closed = false

  constructor (readonly source: Source) {}

  /** Starts a stream as the answer. @throws FST_OPENAI_WEBHOOK_OVERLOADED */
  async open (reply: FastifyReply, hello: () => Promise<Hello>): Promise<void> {
    if (this.#closed || this.#streams.size >= MAX_STREAMS) throw new Overloaded()
    const { raw } = reply
    reply.hijack()
    // The page may have disconnected while the user's hook was running. Its 'close' event has then passed already.
    if (isClosed(raw)) return
    const stream: Stream = { raw, hello, behind: false }
    this.#streams.add(stream)
    raw.once('close', () => { this.#leave(stream) })
    raw.on('error', () => {}) // 'close' follows
    this.source.watch(true)
    raw.writeHead(200, {
      ...reply.getHeaders() as Record<string, string>,
      'content-type': 'text/event-stream; charset=utf-8',
      'cache-control': 'no-store',
      'x-accel-buffering': 'no', // nginx would buffer the stream
      // A kept-alive connection would delay the closing of the server. HTTP/2 has no `connection` header.
      ...(streamOf(raw) === undefined && { connection: 'close' })
    })
    this.#timer ??= setInterval(() => { this.#tick() }, PACE).unref()
    send(stream, 'hello', await hello())
  }

  close (): void {
    this.#closed = true
    for (const { raw } of this.#streams) {
      raw.end()
      streamOf(raw)?.session?.close()
    }
  }

  #leave (stream: Stream): void {
    this.#streams.delete(stream)
    if (this.#streams.size > 0) return
    clearInterval(this.#timer)
    this.#timer = undefined
    this.source.watch(false)
  }

  #tick (): void {
    const rows = this.source.takeChanged()
    if (rows.length > 0) this.#tell('rows', rows)
    if (++this.#turn % STATS_EVERY === 0) {
      // stats() does not reject: a runner that cannot be reached counts as one that does not answer.
      this.source.stats().then(stats => { this.#tell('stats', stats) })
    }
  }

  #tell (event: string, data: unknown): void {
    const text = format(event, data)
    for (const stream of this.#streams) {
      if (needsDrain(stream.raw)) {
        stream.behind = true
      } else if (stream.behind) {
        stream.behind = false
        stream.hello().then(hello => { send(stream, 'hello', hello) })
      } else {
        stream.raw.write(text)
      }
    }
  }
}

// JSON text contains no line breaks, so one data line is enough.
const format = (event: string, data: unknown): string => `event: ${event}\ndata: ${JSON.stringify(data)}\n\n`

function send ({ raw }: Stream, event: string, data: unknown): void {
  if (!raw.writableEnded) raw.write(format(event, data))
}
