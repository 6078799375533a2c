import type { IncomingHttpHeaders } from 'node:http'
import { Readable } from 'node:stream'
import type { FastifyInstance, FastifyRequest, RequestPayload } from 'fastify'
import { InvalidOptions } from '../errors.ts'

type Done = (error: Error | null, body?: unknown) => void

/** Makes the routes of this scope take JSON as the bytes that arrived, and nothing else. No other scope changes. */
export function captureBody (scope: FastifyInstance): void {
  scope.removeAllContentTypeParsers() // text/plain has a default parser too
  scope.addContentTypeParser('application/json', { parseAs: 'buffer' },
    (_request: FastifyRequest, body: Buffer, done: Done) => { done(null, body) })
}

const OVER_LIMIT = Symbol('over limit')

/**
 * Reads the whole payload of a route whose parser is the user's. Resolves to the bytes, or `undefined` over the limit.
 * What has been read is dropped as soon as it is too much; the stream is not destroyed, or the sender would see a reset
 * connection instead of the answer.
 */
export function readPayload (payload: RequestPayload, limit: number, contentLength: string | undefined): Promise<Buffer | undefined> {
  if (Number(contentLength) > limit) return Promise.resolve(undefined)
  return new Promise((resolve, reject) => {
    const chunks: Buffer[] = []
    let length = 0
    payload.on('data', onData)
    payload.on('end', onEnd)
    payload.on('error', onError)
    payload.on('close', onClose)

    function onData (data: Buffer | string): void {
      const chunk = typeof data === 'string' ? Buffer.from(data) : data // an earlier preParsing hook may decode
      length += chunk.length
      if (length <= limit) chunks.push(chunk)
      else settle(OVER_LIMIT)
    }
    function onEnd (): void { settle(Buffer.concat(chunks, length)) }
    function onError (error: Error): void { settle(Object.assign(error, { statusCode: 400 })) }
    function onClose (): void { onError(new Error('the sender went away before the body had ended')) }
    function settle (result: Buffer | Error | typeof OVER_LIMIT): void {
      payload.off('data', onData).off('end', onEnd).off('error', onError).off('close', onClose)
      if (result instanceof Error) reject(result)
      else resolve(result === OVER_LIMIT ? undefined : result)
    }
  })
}

/** The bytes once more, as a payload for the user's own parser. */
export function replayPayload (bytes: Buffer): RequestPayload {
  // Not Readable.from: it would hand an empty body on as an empty chunk, and a Buffer byte by byte in older versions.
  const payload = new Readable() as Readable & RequestPayload
  if (bytes.length > 0) payload.push(bytes)
  payload.push(null)
  payload.receivedEncodedLength = bytes.length
  return payload
}

/** What `unwrap` was given as the body. @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS */
export function toBuffer (rawBody: unknown): Buffer {
  if (typeof rawBody === 'string') return Buffer.from(rawBody)
  if (rawBody instanceof Uint8Array) return Buffer.from(rawBody.buffer, rawBody.byteOffset, rawBody.byteLength)
  throw new InvalidOptions('unwrap(): expected the raw body as a string, a Buffer or a Uint8Array: a parsed body cannot be verified')
}

/** A Headers object, or a plain one with names in any case. @throws FST_OPENAI_WEBHOOK_INVALID_OPTIONS */
export function toHeaders (headers: unknown): IncomingHttpHeaders {
  if (typeof headers !== 'object' || headers === null) throw new InvalidOptions('unwrap(): expected the headers as an object or a Headers instance')
  const entries: Iterable<[string, unknown]> = typeof (headers as Headers).entries === 'function'
    ? (headers as Headers).entries()
    : Object.entries(headers)
  return Object.fromEntries([...entries].map(([name, value]) => [name.toLowerCase(), value])) as IncomingHttpHeaders
}
