import { BatchBroken, BatchStalled } from '../errors.ts'
import type { BatchFile } from './batch-line.ts'

/** The part of a `Response` that is used here. */
export interface FileAnswer {
  readonly status: number
  readonly headers: { get (name: string): string | null }
  readonly body: unknown
}

interface Reader {
  read (): Promise<{ done: boolean, value?: Uint8Array }>
  cancel (): Promise<void>
}

interface Limits {
  readonly file: BatchFile
  /** ms without a byte after which reading is given up. */
  readonly idleTimeout: number
  readonly signal: AbortSignal | undefined
}

export interface BytesOptions extends Limits {
  /** Requests the file, with these headers in addition to the SDK's own. */
  readonly open: (headers: Record<string, string>, signal: AbortSignal | undefined) => Promise<FileAnswer | null>
}

/** The most times in a row that a body is resumed without receiving a byte. */
const FRUITLESS = 3

/** The result of one read: bytes, the end of the body, or the end because the connection broke. */
type Read = { readonly value: Uint8Array } | { readonly end: true, readonly cause?: unknown }

/**
 * Yields the bytes of a file, each once. A body that breaks off is resumed there with a Range request, if the server supports that and the
 * file has not changed.
 *
 * @throws FST_OPENAI_WEBHOOK_BATCH_STALLED, FST_OPENAI_WEBHOOK_BATCH_BROKEN; the signal's reason; the SDK's errors
 */
export async function * bytesOf (options: BytesOptions): AsyncGenerator<Uint8Array, void, undefined> {
  const { file, open, signal } = options
  // A range counts the bytes of the encoded body, so the file is requested unencoded. fetch() requests this encoding by itself when there
  // is a Range header.
  const answer = withBody(await open({ 'Accept-Encoding': 'identity' }, signal), 0)
  const { headers, status } = answer
  if (status === 206) {
    end(readerOf(answer))
    throw new BatchBroken(file, 0, { cause: new Error('asked for the file, the server answered with a part of it (status 206)') })
  }
  const resumable = isIdentity(headers) && headers.get('accept-ranges') !== 'none'
  const etag = headers.get('etag')
  const modified = headers.get('last-modified')
  /** The length of the file, once a server has said it. */
  let total = isIdentity(headers) ? lengthOf(headers.get('content-length')) : undefined
  let received = 0
  let reader = readerOf(answer)
  let isResumed = false
  try {
    let fruitless = 0
    let isWhole = false
    while (!isWhole) {
      const read = await next(reader, options)
      if ('value' in read) {
        received += read.value.length
        fruitless = 0
        if (total !== undefined && received > total) {
          throw new BatchBroken(file, received, { cause: new Error(`the server sent more than the ${total} bytes of the file`) })
        }
        yield read.value
      // The end of a part need not be the end of the file, since a server may answer with less than was asked for.
      } else if (total === undefined ? !isResumed && !('cause' in read) : received >= total) {
        isWhole = true
      } else {
        if (!resumable || fruitless++ === FRUITLESS) {
          throw new BatchBroken(file, received, { cause: read.cause ?? new Error(`the body ended before the ${total ?? 'unknown number of'} bytes of the file`) })
        }
        end(reader)
        isResumed = true
        const rest = await resume(received)
        if (rest === undefined) isWhole = true
        else reader = rest
      }
    }
  } finally {
    // Closes the connection, also when the consumer stops early.
    end(reader)
  }

  /** @returns `undefined` if the file has no more bytes */
  async function resume (from: number): Promise<Reader | undefined> {
    const ifRange = etag === null || etag.startsWith('W/') ? {} : { 'If-Range': etag }
    const stop = new AbortController()
    const either = signal === undefined ? stop.signal : AbortSignal.any([signal, stop.signal])
    let given
    try {
      given = await withinIdleTime(open({ Range: `bytes=${from}-`, ...ifRange }, either), options)
    } catch (cause) {
      stop.abort()
      signal?.throwIfAborted()
      if (total === undefined && isPastEnd(cause, from)) return undefined
      throw cause instanceof BatchStalled ? cause : new BatchBroken(file, from, { cause })
    }
    const resumed = withBody(given, from)
    const fault = faultOf(resumed, from)
    total ??= rangeOf(resumed.headers).whole
    if (fault === undefined) return readerOf(resumed)
    end(readerOf(resumed))
    throw new BatchBroken(file, from, { cause: new Error(`asked for the rest, the server answered ${fault}`) })
  }

  /** Why an answer does not hold the rest of the same file. Status 200 would carry the whole file, or another file. */
  function faultOf ({ status, headers }: FileAnswer, from: number): string | undefined {
    const { start, whole } = rangeOf(headers)
    const isOfTotal = total === undefined || whole === undefined || whole === total
    if (status !== 206 || start !== from || !isOfTotal) return `${status} with the content-range ${headers.get('content-range') ?? '(none)'}`
    if (!isIdentity(headers)) return `with the content-encoding ${headers.get('content-encoding')!}`
    const now = headers.get('etag')
    // A server may ignore If-Range, and a weak ETag cannot be sent in it.
    if (etag !== null && now !== null) return opaque(now) === opaque(etag) ? undefined : 'with another etag: the file has changed'
    const modifiedNow = headers.get('last-modified')
    return modified !== null && modifiedNow !== null && modifiedNow !== modified ? 'with another last-modified: the file has changed' : undefined
  }

  function withBody (given: FileAnswer | null, from: number): FileAnswer {
    if (given?.body == null) throw new BatchBroken(file, from, { cause: new Error('the server answered without a body') })
    return given
  }
}

/** Reads once. The timer runs only while the server is waited for, and not while the consumer works. */
async function next (reader: Reader, limits: Limits): Promise<Read> {
  const { signal } = limits
  signal?.throwIfAborted()
  // The SDK may pass the signal to the body, whose read then fails too.
  return await withinIdleTime(reader.read().then(({ value }): Read => value === undefined ? { end: true } : { value }, (cause): Read => {
    signal?.throwIfAborted()
    return { end: true, cause }
  }), limits)
}

/** Settles as `asked` does, but rejects once `idleTimeout` is over, and with the reason of the signal. */
async function withinIdleTime<T> (asked: Promise<T>, { file, idleTimeout, signal }: Limits): Promise<T> {
  let timer: NodeJS.Timeout | undefined
  let onAbort: (() => void) | undefined
  const stopped = new Promise<never>((_resolve, reject) => {
    timer = setTimeout(() => reject(new BatchStalled(file, idleTimeout)), idleTimeout)
    onAbort = () => reject(signal!.reason)
    signal?.addEventListener('abort', onAbort)
  })
  try {
    return await Promise.race([asked, stopped])
  } finally {
    clearTimeout(timer)
    signal?.removeEventListener('abort', onAbort!)
  }
}

/** Cancelling is not awaited, because a stalled body may never answer. */
function end (reader: Reader): void {
  reader.cancel().catch(() => {})
}

function readerOf ({ body }: FileAnswer): Reader {
  return (body as { getReader: () => Reader }).getReader()
}

function isIdentity (headers: FileAnswer['headers']): boolean {
  return (headers.get('content-encoding') ?? 'identity') === 'identity'
}

/** An ETag without its mark of weakness, which a proxy may add to some answers. */
const opaque = (etag: string): string => etag.replace(/^W\//, '')

function lengthOf (header: string | null): number | undefined {
  return header !== null && /^\d+$/.test(header) ? Number(header) : undefined
}

/**
 * What a content-range says (RFC 9110, section 14.4): where the part begins, if there is one, and the length of the whole file, which may be
 * unknown.
 */
function rangeOf (headers: FileAnswer['headers']): { start: number | undefined, whole: number | undefined } {
  const [, start = '', whole = ''] = /^bytes (?:(\d+)-\d+|\*)\/(\d+|\*)$/.exec(headers.get('content-range') ?? '') ?? []
  return { start: lengthOf(start), whole: lengthOf(whole) }
}

/** Whether the SDK's error says that the file ends at this byte: status 416, and no other length. */
function isPastEnd (error: unknown, from: number): boolean {
  const { status, headers } = error as { status?: unknown, headers?: FileAnswer['headers'] }
  return status === 416 && headers !== undefined && (rangeOf(headers).whole ?? from) === from
}
