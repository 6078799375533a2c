import type { FastifyReply } from 'fastify'
import type { Http2ServerResponse } from 'node:http2'
import { isClosed, needsDrain } from '../delivery/raw-response.ts'
import { Overloaded } from '../errors.ts'
import type { Hello, Row, Stats } from './messages.ts'

/** Pages that look at once. */
const MAX_STREAMS = 20
/** ms between two messages about what has changed, however much that is. */
const PACE = 250
/** Between two messages with figures, one in so many. */
const STATS_EVERY = 4

interface Source {
  watch (watched: boolean): void
  takeChanged (): Row[]
  stats (): Promise<Stats>
}

interface Stream {
  readonly raw: FastifyReply['raw']
  readonly hello: () => Promise<Hello>
  /** Its reader is slow: it is told everything anew once it has read what is on its way. */
  behind: boolean
}

/** Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html) to the pages that look. */
export class Live {
  readonly #source: Source
  readonly #streams = new Set<Stream>()
  #timer: NodeJS.Timeout | undefined
  #turn = 0
  #closed = false

  constructor (source: Source) {
    this.#source = source
  }

  /** Answers with a stream. @throws FST_OPENAI_WEBHOOK_OVERLOADED */
  async open (reply: FastifyReply, hello: () => Promise<Hello>): Promise<void> {
    if (this.#closed || this.#streams.size >= MAX_STREAMS) throw new Overloaded()
    const { raw } = reply
    reply.hijack()
    // The page went away while a hook of the user's decided: its 'close' is past.
    if (isClosed(raw)) return
    const stream: Stream = { raw, hello, behind: false }
    this.#streams.add(stream)
    raw.once('close', () => { this.#leave(stream) })
    raw.on('error', () => {}) // 'close' follows
    this.#source.watch(true)
    raw.writeHead(200, {
      ...reply.getHeaders() as Record<string, string>,
      'content-type': 'text/event-stream; charset=utf-8',
      'cache-control': 'no-store',
      'x-accel-buffering': 'no', // nginx would hold it back
      // Else it would hold a closing server open. HTTP/2 has no such header.
      ...((raw as unknown as Http2ServerResponse).stream === undefined && { connection: 'close' })
    })
    this.#timer ??= setInterval(() => { this.#tick() }, PACE).unref()
    send(stream, 'hello', await hello())
  }

  /** Ends all streams. */
  close (): void {
    this.#closed = true
    for (const { raw } of this.#streams) {
      raw.end()
      ;(raw as unknown as Partial<Http2ServerResponse>).stream?.session?.close()
    }
  }

  #leave (stream: Stream): void {
    this.#streams.delete(stream)
    if (this.#streams.size > 0) return
    clearInterval(this.#timer)
    this.#timer = undefined
    this.#source.watch(false)
  }

  #tick (): void {
    const rows = this.#source.takeChanged()
    if (rows.length > 0) this.#tell('rows', rows)
    if (++this.#turn % STATS_EVERY === 0) {
      // Does not fail: a runner that cannot be reached counts as one that does not answer.
      this.#source.stats().then(stats => { this.#tell('stats', stats) })
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

// JSON text has no line breaks of its own.
const format = (event: string, data: unknown): string => `event: ${event}\ndata: ${JSON.stringify(data)}\n\n`

function send ({ raw }: Stream, event: string, data: unknown): void {
  if (!raw.writableEnded) raw.write(format(event, data))
}
