import type { Http2ServerRequest } from 'node:http2'
import { Readable } from 'node:stream'
import fastify from 'fastify'
import type { FastifyInstance, FastifyReply, FastifyRequest, RequestPayload } from 'fastify'
import type { Deadline } from '../deadline.ts'
import { BodyTimeout, Overloaded } from '../errors.ts'
import { retryLater } from './acknowledge.ts'
import { Gathered } from './gathered.ts'

/** Called once, with the bytes or with the error. */
type Captured = (error: Error | null, bytes?: Buffer) => void

/** The bounds of a body, whose sender is not known yet. */
export interface BodyBounds {
  /** Bytes. */
  readonly limit: number
  /** For the whole body to arrive. Closed while the app is closing. */
  readonly deadline: Deadline
}

/** Makes the routes of this scope take JSON alone, as the bytes that arrived. No other scope changes. */
export function captureBody (scope: FastifyInstance, bounds: BodyBounds): void {
  scope.removeAllContentTypeParsers() // text/plain has a default parser too
  // Not `parseAs: 'buffer'`: Fastify would copy a body that comes in one piece, for 3 to 7 % of a delivery's time.
  scope.addContentTypeParser('application/json', (request, payload, done: Captured) => { readPayload(request, payload, bounds, done) })
}

/**
 * Reads a whole payload within its bounds. What has been read is dropped as soon as it is too much or too late. The stream is not
 * destroyed, or the sender would see a reset connection instead of the answer.
 *
 * Coded errors: FST_ERR_CTP_BODY_TOO_LARGE (413), FST_OPENAI_WEBHOOK_BODY_TIMEOUT (408), FST_OPENAI_WEBHOOK_OVERLOADED
 * (503, closing), FST_ERR_CTP_INVALID_CONTENT_LENGTH (400), and what the stream fails with, as 400.
 */
export function readPayload (request: FastifyRequest, payload: RequestPayload, { limit, deadline }: BodyBounds, captured: Captured): void {
  const declared = request.headers['content-length']
  if (Number(declared) > limit) return captured(tooLarge())
  // Something has read it before, so that no end would come. Its signature is judged over what is left.
  if (payload.readableEnded) return captured(null, Buffer.alloc(0))
  // A preParsing hook has put another stream in place of the request's: it may hold other bytes than were declared.
  const isReplaced = payload !== request.raw as RequestPayload
  let gathered: Gathered | undefined = new Gathered(isReplaced ? limit : Number(declared) || limit)
  payload.on('data', onData)
  payload.on('end', onEnd)
  payload.on('error', fail)
  // A request that is cut off emits 'error'. Another stream may only emit 'close'.
  if (isReplaced) payload.on('close', onClose)
  payload.resume() // @fastify/compress hands on a paused one
  let timer: NodeJS.Timeout | undefined
  if (deadline.closed) giveUp(new Overloaded())
  else process.nextTick(startTimer)

  // Most bodies come with their headers and are whole in the next tick: a timer each would cost 3 % of a delivery.
  function startTimer (): void {
    if (gathered === undefined || request.raw.complete) return
    timer = deadline.start(() => { giveUp(deadline.closed ? new Overloaded() : new BodyTimeout(deadline.ms)) })
  }

  function onData (data: unknown): void {
    const chunk = toBytes(data)
    if (chunk === undefined) {
      payload.pause()
      return settle(Object.assign(new TypeError('expected a body of bytes or text, got other chunks from a preParsing hook'), { statusCode: 500 }))
    }
    if (gathered!.length + chunk.length > limit || (payload.receivedEncodedLength ?? 0) > limit) giveUp(tooLarge())
    else gathered!.add(chunk)
  }

  function onEnd (): void {
    if (gathered === undefined) return
    // A decoding stream has `receivedEncodedLength`.
    if (declared !== undefined && (payload.receivedEncodedLength || gathered.length) !== Number(declared)) {
      settle(new fastify.errorCodes.FST_ERR_CTP_INVALID_CONTENT_LENGTH())
    } else {
      settle(null, gathered.take())
    }
  }

  function fail (error: Error & { statusCode?: number }): void {
    if (gathered === undefined) return
    if (typeof error.statusCode !== 'number' || error.statusCode < 400) error.statusCode = 400
    settle(error)
  }

  function onClose (): void { fail(new Error('the sender went away before the body had ended')) }

  function giveUp (error: Error): void {
    // A few bytes may unpack to gigabytes, which would go on with nobody reading.
    if (isReplaced) payload.pause()
    settle(error)
  }

  function settle (error: Error | null, bytes?: Buffer): void {
    gathered = undefined
    deadline.stop(timer)
    payload.off('data', onData) // else node:http removes it, for 0.7 µs
    captured(error, bytes)
  }
}

/**
 * onError: bounds the rest of a refused request's body, which Node would read and drop for as long as the sender likes. An HTTP/2
 * stream is reset without an error once the answer is out, which asks the sender to stop. HTTP/1.1 can only close the connection, so
 * it waits: honest senders, and proxies before them, keep theirs when the body still arrives in time.
 */
export function boundRefused ({ raw }: FastifyRequest, reply: FastifyReply, error: Error, { deadline }: BodyBounds): void {
  if (error instanceof Overloaded) retryLater(reply)
  const { stream } = raw as { stream?: Http2ServerRequest['stream'] }
  // `undefined` where the request is injected.
  if (raw.complete !== false) return
  if (stream !== undefined) {
    const { session } = stream
    const reset = (): void => {
      stream.close()
      // An idle session keeps a closing server open until its own timeout, 72 s by default.
      if (deadline.closed) session?.close()
    }
    // A reset drops what Node has not sent yet, though the response has finished: the end of the answer, and where that has no body
    // since Node 22 its headers too. All of it is on its way in the turn after Node has asked for trailers. Where an answer has
    // asked for none, it is in the turn after the end, or once the sender reads.
    stream.once('wantTrailers', () => { setImmediate(reset) })
    stream.once('finish', () => {
      setImmediate(() => {
        if (stream.destroyed || stream.state.localClose === 1) return reset()
        const timer = deadline.start(reset)
        stream.once('close', () => { deadline.stop(timer) })
      })
    })
  } else if (deadline.closed) {
    reply.header('connection', 'close')
  } else {
    const timer = deadline.start(() => { raw.destroy() })
    raw.once('close', () => { deadline.stop(timer) })
  }
}

/** @returns `undefined` for what is neither bytes nor text: an earlier preParsing hook may give chunks of any kind */
export function toBytes (data: unknown): Buffer | undefined {
  if (Buffer.isBuffer(data)) return data
  if (typeof data === 'string') return Buffer.from(data)
  return data instanceof Uint8Array ? Buffer.from(data.buffer, data.byteOffset, data.byteLength) : undefined
}

const tooLarge = (): Error => new fastify.errorCodes.FST_ERR_CTP_BODY_TOO_LARGE()

/**
 * Makes a payload of the bytes, for the user's own parser.
 *
 * @param receivedLength bytes on the wire, where an earlier preParsing hook has unpacked them: Fastify compares them with
 * Content-Length
 */
export function replayPayload (bytes: Buffer, receivedLength = bytes.length): RequestPayload {
  // Not Readable.from: it would give an empty body as an empty chunk, and in older versions a Buffer byte by byte.
  const payload = new Readable() as Readable & RequestPayload
  if (bytes.length > 0) payload.push(bytes)
  payload.push(null)
  payload.receivedEncodedLength = receivedLength
  return payload
}
