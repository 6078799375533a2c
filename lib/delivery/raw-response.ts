import { constants } from 'node:http2'
import type { ServerHttp2Stream } from 'node:http2'
import type { FastifyReply } from 'fastify'

type RawResponse = FastifyReply['raw']

// Over HTTP/2 a response wraps a stream and lacks some of the properties that an HTTP/1.1 response has.
const streamOf = (raw: RawResponse): ServerHttp2Stream | undefined => (raw as { stream?: ServerHttp2Stream }).stream

/** Whether it is closed. Its 'close' may have been emitted already. */
export function isClosed (raw: RawResponse): boolean {
  const stream = streamOf(raw)
  return stream === undefined ? raw.closed : stream.closed || stream.destroyed
}

/**
 * Whether it had left whole when it closed. `writableFinished` does not tell: what is written after a reset looks finished, Node
 * ends a stream that is reset, and may destroy one whose answer is out before it is finished.
 */
export function isOut (raw: RawResponse): boolean {
  const stream = streamOf(raw)
  return stream === undefined ? raw.writableFinished && raw.socket?.destroyed !== true : !stream.aborted && stream.writableEnded && stream.rstCode === constants.NGHTTP2_NO_ERROR
}

export function statusOf (raw: RawResponse): number {
  return Number(streamOf(raw)?.sentHeaders?.[':status'] ?? raw.statusCode)
}

/**
 * An HTTP/2 response keeps no trace of what is written after its stream was reset. This makes it keep the status, that headers
 * were sent and that it ended, as over HTTP/1.1. It also shows `closed`: Fastify waits for that, and an async handler that
 * returns the reply waits for Fastify.
 */
export function traceAfterReset (raw: RawResponse): void {
  const stream = streamOf(raw)
  if (stream === undefined) return
  if (stream.aborted) trace()
  else stream.once('aborted', trace)

  function trace (): void {
    show('closed')
    const { writeHead, end } = raw as unknown as Record<'writeHead' | 'end', (...args: unknown[]) => RawResponse>
    const tracedHead = (status: number, ...rest: unknown[]): RawResponse => {
      raw.statusCode = status
      show('headersSent')
      return writeHead.call(raw, status, ...rest)
    }
    const tracedEnd = (...args: unknown[]): RawResponse => {
      show('headersSent')
      show('writableEnded')
      return end.apply(raw, args)
    }
    raw.writeHead = tracedHead
    raw.end = tracedEnd
  }

  function show (name: 'closed' | 'headersSent' | 'writableEnded'): void {
    Object.defineProperty(raw, name, { value: true, configurable: true })
  }
}

/** Calls `broken` when this side destroys it before it is out. Fastify does so when the source of a stream fails. */
export function watchDestroy (raw: RawResponse, broken: () => void): void {
  const { destroy } = raw
  const watched: RawResponse['destroy'] = error => {
    if (!isClosed(raw)) broken()
    return destroy.call(raw, error)
  }
  raw.destroy = watched
}
