import { constants } from 'node:http2'
import type { ServerHttp2Stream } from 'node:http2'
import type { Socket } from 'node:net'
import type { FastifyReply, FastifyRequest } from 'fastify'
import { codeOf } from '../coded.ts'

type RawResponse = FastifyReply['raw']

/** Over HTTP/2 a response wraps a stream and lacks some of the properties that an HTTP/1.1 response has. */
export const streamOf = (raw: RawResponse): ServerHttp2Stream | undefined => (raw as { stream?: ServerHttp2Stream }).stream

/** Whether the response is closed. Its 'close' event may have been emitted already, so that a listener would wait forever. */
export function isClosed (raw: RawResponse): boolean {
  const stream = streamOf(raw)
  if (stream !== undefined) return stream.closed || stream.destroyed
  // An injected response is destroyed as soon as it has ended, and its `closed` is not set.
  return raw.closed || (raw.destroyed && isInjected(raw))
}

/**
 * Whether the whole answer had been sent when the response closed. `writableFinished` does not tell: what is written after a reset looks
 * finished, Node ends a stream that is reset, and Node may destroy a stream whose answer was sent before that stream is finished.
 */
export function isOut (raw: RawResponse): boolean {
  const stream = streamOf(raw)
  return stream === undefined ? isFinished(raw) && raw.socket?.destroyed !== true : !stream.aborted && stream.writableEnded && stream.rstCode === constants.NGHTTP2_NO_ERROR
}

/** An injected response does not set `writableFinished` either, so `writableEnded` counts. */
function isFinished (raw: RawResponse): boolean {
  return raw.writableFinished || (raw.writableEnded && isInjected(raw))
}

export const isInjected = (raw: RawResponse): boolean => (raw as { isLightMyRequest?: boolean }).isLightMyRequest === true

export function sentStatusOf (raw: RawResponse): number {
  return Number(streamOf(raw)?.sentHeaders?.[':status'] ?? raw.statusCode)
}

/** Whether the writer should wait for 'drain', because the reader is slower. */
export const needsDrain = (raw: RawResponse): boolean => (streamOf(raw) ?? raw).writableNeedDrain

/**
 * Makes a response that no sender waits for report its state and its 'close' event, as a response of HTTP/1.1 usually does. Fastify waits for
 * 'close', and an async handler that returns the reply waits for Fastify.
 */
export function traceReset (raw: RawResponse, { socket }: FastifyRequest['raw']): void {
  const stream = streamOf(raw)
  if (stream !== undefined) traceStream(raw, stream)
  else if (raw.socket === null && !raw.closed) closeWith(raw, socket)
}

/**
 * Watches what this process does with the response.
 *
 * @param wasEnded whether it has been ended already
 * @param ended called when it was ended. `isAgain`: it had been ended before
 * @param broke called when it is destroyed before it is over, or what is piped to it does not end it because it is over. `isAgain` as above
 */
export function watchResponse (raw: RawResponse, { socket }: FastifyRequest['raw'], wasEnded: boolean, ended: (isAgain: boolean) => void, broke: (isAgain: boolean) => void): void {
  const { end, destroy } = raw as unknown as Record<'end' | 'destroy', (...args: unknown[]) => RawResponse>
  // Not `writableEnded`, which Node sets when a stream of HTTP/2 is reset.
  let isEnded = wasEnded
  const watchedEnd = (...args: unknown[]): RawResponse => {
    end.apply(raw, args)
    ended(isEnded)
    isEnded = true
    return raw
  }
  const watchedDestroy = (error?: Error): RawResponse => {
    // Not when it is over or its connection has failed: hooks may clean up, and an injected response destroys itself.
    if (!isClosed(raw) && !raw.writableEnded && !socket.errored && !isOfNode(raw, socket, error)) broke(false)
    return destroy.call(raw, error)
  }
  // What is piped to a response that is over waits for ever to be drained. Node unpipes what was being piped when the response closed.
  const watchPipe = (): void => { if (isEnded || isClosed(raw)) broke(isEnded) }
  const watchUnpipe = (): void => { if (!isEnded && isClosed(raw)) broke(false) }
  raw.end = watchedEnd
  raw.destroy = watchedDestroy
  raw.on('pipe', watchPipe)
  raw.on('unpipe', watchUnpipe)
}

/** Whether it is Node that destroys a pipelined response, because its connection has gone, as it does from Node 24 on. */
function isOfNode (raw: RawResponse, socket: Socket, error: unknown): boolean {
  return raw.socket === null && socket.destroyed && codeOf(error) === 'ECONNRESET'
}

/**
 * A response that is pipelined behind another has no socket yet. Before Node 24 it is not closed with the connection. This function does to it
 * what Node does to one with a socket, so that Node does not emit 'close' again.
 */
function closeWith (raw: RawResponse, socket: Socket): void {
  if (socket.destroyed) return close()
  socket.once('close', close)
  raw.once('close', () => { socket.off('close', close) })

  function close (): void {
    Object.assign(raw, { destroyed: true, _closed: true })
    show(raw, 'writableFinished', false) // what is written now looks finished, because Node drops it
    raw.emit('close')
  }
}

/**
 * An HTTP/2 response does not record what is written after its stream was reset. This function makes it record the status, `headersSent`,
 * `writableEnded` and `closed`.
 */
function traceStream (raw: RawResponse, stream: ServerHttp2Stream): void {
  if (stream.aborted) trace()
  else stream.once('aborted', trace)

  function trace (): void {
    show(raw, 'closed')
    const { writeHead, end } = raw as unknown as Record<'writeHead' | 'end', (...args: unknown[]) => RawResponse>
    const tracedHead = (status: number, ...rest: unknown[]): RawResponse => {
      raw.statusCode = status
      show(raw, 'headersSent')
      return writeHead.call(raw, status, ...rest)
    }
    const tracedEnd = (...args: unknown[]): RawResponse => {
      show(raw, 'headersSent')
      show(raw, 'writableEnded')
      return end.apply(raw, args)
    }
    raw.writeHead = tracedHead
    raw.end = tracedEnd
  }
}

function show (raw: RawResponse, name: 'closed' | 'headersSent' | 'writableEnded' | 'writableFinished', value = true): void {
  Object.defineProperty(raw, name, { value, configurable: true })
}
