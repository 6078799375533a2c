import type { Http2ServerRequest } from 'node:http2'
import { Readable } from 'node:stream'
import fastify from 'fastify'
import type { FastifyInstance, FastifyReply, FastifyRequest, RequestPayload } from 'fastify'
import type { Deadline } from '../deadline.ts'
import { BodyTimeout, Overloaded } from '../errors.ts'
import { Gathered } from './gathered.ts'

/** Called once, with the bytes or with an error. */
type Captured = (error: Error | null, bytes?: Buffer) => void

/** The limits on a body whose sender is not known yet. */
export interface BodyBounds {
  /** Bytes. */
  readonly limit: number
  /** For the arrival of the whole body. Closed when the app is closing. */
  readonly deadline: Deadline
}

/** Makes the routes of this scope accept only JSON, and get its bytes unparsed. No other scope changes. */
export function captureBody (scope: FastifyInstance, bounds: BodyBounds): void {
  scope.removeAllContentTypeParsers() // text/plain has a default parser too
  // Not `parseAs: 'buffer'`: Fastify would copy even a body that arrives in one piece, which takes 3 to 7 % of a delivery's time.
  scope.addContentTypeParser('application/json', (request, payload, done: Captured) => { readPayload(request, payload, bounds, done) })
}

/**
 * Reads a whole payload within its limits. As soon as the payload is too large or too late, the bytes read so far are dropped. The stream is
 * not destroyed, because the sender would then see a reset connection instead of the answer.
 *
 * Coded errors: FST_ERR_CTP_BODY_TOO_LARGE (413), FST_OPENAI_WEBHOOK_BODY_TIMEOUT (408), FST_OPENAI_WEBHOOK_OVERLOADED
 * (503, closing), FST_ERR_CTP_INVALID_CONTENT_LENGTH (400). An error of the stream is passed on, as 400 unless it has a `statusCode` of at
 * least 400.
 */
export function readPayload (request: FastifyRequest, payload: RequestPayload, { limit, deadline }: BodyBounds, captured: Captured): void {
  const declared = request.headers['content-length']
  if (Number(declared) > limit) return captured(tooLarge())
  // Something has already read the payload, so 'end' would never come. The signature is checked over the bytes that are left, which are none.
  if (payload.readableEnded) return captured(null, Buffer.alloc(0))
  // If a preParsing hook has replaced the request's stream, the number of bytes may differ from Content-Length.
  const isReplaced = payload !== request.raw as RequestPayload
  let gathered: Gathered | undefined = new Gathered(isReplaced ? limit : Number(declared) || limit)
  payload.on('data', onData)
  payload.on('end', onEnd)
  payload.on('error', fail)
  // A request that is cut off emits 'error'. Another stream may emit only 'close'.
  if (isReplaced) payload.on('close', onClose)
  payload.resume() // @fastify/compress passes on a paused stream
  let timer: NodeJS.Timeout | undefined
  if (deadline.closed) giveUp(new Overloaded())
  else setImmediate(startTimer)

  // Most bodies arrive with their headers and have been read by now, though not by the next tick, in which node:http has the last byte and does
  // not know yet that it is the last one. A timer for each would take 3 % of a delivery's time.
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
    // A decoding stream counts the bytes before decoding in `receivedEncodedLength`.
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
    // A few bytes may decompress to gigabytes, and a stream that is not paused would continue although nobody reads.
    if (isReplaced) payload.pause()
    settle(error)
  }

  function settle (error: Error | null, bytes?: Buffer): void {
    gathered = undefined
    deadline.stop(timer)
    payload.off('data', onData) // while an async hook holds the refusal, chunks go on arriving, and nothing gathers them
    captured(error, bytes)
  }
}

/**
 * For onError hooks: limits the rest of a refused request's body, which Node would otherwise read and drop for as long as the sender likes. An
 * HTTP/2 stream is reset without an error once the answer has been sent, which asks the sender to stop. HTTP/1.1 can only close the connection.
 * That happens only at the deadline, so that honest senders and the proxies in front of them keep their connection if the body arrives in time.
 */
export function boundRefused ({ raw }: FastifyRequest, reply: FastifyReply, { deadline }: BodyBounds): void {
  const { stream } = raw as { stream?: Http2ServerRequest['stream'] }
  // `complete` is `undefined` on an injected request.
  if (raw.complete !== false) return
  if (stream !== undefined) {
    const { session } = stream
    const reset = (): void => {
      stream.close()
      // An idle session keeps a closing server open until its own timeout, 72 s by default.
      if (deadline.closed) session?.close()
    }
    // A reset drops what Node has not sent yet, even after the response has finished: the end of the answer and, since Node 22, the headers of
    // an answer without a body. All of it is on its way in the turn after Node has asked for trailers. If Node asks for none, all of it is on
    // its way in the turn after the end, or once the sender reads.
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

/** @returns `undefined` for a value that is neither bytes nor text, such as a chunk that the stream of a preParsing hook emits */
export function toBytes (data: unknown): Buffer | undefined {
  if (Buffer.isBuffer(data)) return data
  if (typeof data === 'string') return Buffer.from(data)
  return data instanceof Uint8Array ? Buffer.from(data.buffer, data.byteOffset, data.byteLength) : undefined
}

const tooLarge = (): Error => new fastify.errorCodes.FST_ERR_CTP_BODY_TOO_LARGE()

/**
 * Makes a payload from the bytes, for the user's own parser.
 *
 * @param receivedLength number of bytes on the wire, if an earlier preParsing hook has decompressed them. Fastify compares it with
 * Content-Length
 */
export function replayPayload (bytes: Buffer, receivedLength = bytes.length): RequestPayload {
  // Not Readable.from: it would emit an empty chunk for an empty body, and in older versions of Node a Buffer byte by byte.
  const payload = new Readable() as Readable & RequestPayload
  if (bytes.length > 0) payload.push(bytes)
  payload.push(null)
  payload.receivedEncodedLength = receivedLength
  return payload
}
