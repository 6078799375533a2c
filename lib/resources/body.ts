import { BatchBroken, BatchStalled } from '../errors.ts'
import type { BatchFile } from './batch-line.ts'

/** As much of a `Response` as is read here. */
export interface FileAnswer {
  readonly status: number
  readonly headers: { get (name: string): string | null }
  readonly body: unknown
}

interface Reader {
  read (): Promise<{ done: boolean, value?: Uint8Array }>
  cancel (): Promise<void>
}

export interface BytesOptions {
  readonly file: BatchFile
  /** Asks for the file, with these headers beside the usual ones. */
  readonly open: (headers: Record<string, string>) => PromiseLike<FileAnswer>
  /** ms without a byte */
  readonly idleTimeout: number
  readonly signal: AbortSignal | undefined
}

/** How often in a row a body may be resumed and break before a byte has come. */
const FRUITLESS = 3

/** What was read: bytes, the end, or that the connection broke. */
type Read = { readonly value: Uint8Array } | { readonly end: true, readonly cause?: unknown }

/**
 * The bytes of a file, each once. A body that breaks off is resumed where it broke, by Range, if the server does that and the
 * file is still the same.
 *
 * @throws FST_OPENAI_WEBHOOK_BATCH_STALLED, FST_OPENAI_WEBHOOK_BATCH_BROKEN; the signal's reason; the SDK's errors
 */
export async function * bytesOf ({ file, open, idleTimeout, signal }: BytesOptions): AsyncGenerator<Uint8Array, void, undefined> {
  // A range counts the bytes of the encoding that is sent. fetch asks for this one by itself where there is a Range.
  const answer = await open({ 'Accept-Encoding': 'identity' })
  const { headers } = answer
  const resumable = isIdentity(headers) && headers.get('accept-ranges') !== 'none'
  const etag = headers.get('etag')
  const total = isIdentity(headers) ? lengthOf(headers.get('content-length')) : undefined
  let received = 0
  let reader = readerOf(answer)
  try {
    let fruitless = 0
    let isWhole = false
    while (!isWhole) {
      const read = await next(reader, { file, idleTimeout, signal })
      if ('value' in read) {
        received += read.value.length
        fruitless = 0
        yield read.value
      } else if (total === undefined ? !('cause' in read) : received >= total) {
        isWhole = true
      } else {
        if (!resumable || fruitless++ === FRUITLESS) {
          throw new BatchBroken(file, received, { cause: read.cause ?? new Error(`the body ended before the ${total} bytes that its content-length says`) })
        }
        end(reader)
        reader = await resume(received)
      }
    }
  } finally {
    // Where the consumer has had enough, this ends the connection.
    end(reader)
  }

  async function resume (from: number): Promise<Reader> {
    const ifRange = etag === null || etag.startsWith('W/') ? {} : { 'If-Range': etag }
    let resumed
    try {
      resumed = await open({ Range: `bytes=${from}-`, ...ifRange })
    } catch (cause) {
      signal?.throwIfAborted()
      throw new BatchBroken(file, from, { cause })
    }
    const rest = readerOf(resumed)
    // 200 would be the whole file, or another one.
    if (resumed.status === 206 && isRangeFrom(resumed.headers.get('content-range'), from, total)) return rest
    end(rest)
    throw new BatchBroken(file, from, { cause: new Error(`asked for the rest, the server answered ${resumed.status} with the content-range ${resumed.headers.get('content-range') ?? '(none)'}`) })
  }
}

/** One read. The timer runs while the server is waited for, and not while the consumer takes its time. */
async function next (reader: Reader, { file, idleTimeout, signal }: Omit<BytesOptions, 'open'>): Promise<Read> {
  signal?.throwIfAborted()
  let timer: NodeJS.Timeout | undefined
  let onAbort: (() => void) | undefined
  const stopped = new Promise<never>((_resolve, reject) => {
    timer = setTimeout(() => reject(new BatchStalled(file, idleTimeout)), idleTimeout)
    onAbort = () => reject(signal!.reason)
    signal?.addEventListener('abort', onAbort)
  })
  // The SDK may hand the signal on to the body, which then breaks as well.
  const read = reader.read().then(({ value }): Read => value === undefined ? { end: true } : { value }, (cause): Read => {
    signal?.throwIfAborted()
    return { end: true, cause }
  })
  try {
    return await Promise.race([read, stopped])
  } finally {
    clearTimeout(timer)
    signal?.removeEventListener('abort', onAbort!)
  }
}

/** Not awaited: what is stalled may not answer this either. */
function end (reader: Reader): void {
  reader.cancel().catch(() => {})
}

function readerOf ({ body }: FileAnswer): Reader {
  return (body as { getReader: () => Reader }).getReader()
}

function isIdentity (headers: FileAnswer['headers']): boolean {
  return (headers.get('content-encoding') ?? 'identity') === 'identity'
}

function lengthOf (header: string | null): number | undefined {
  return header !== null && /^\d+$/.test(header) ? Number(header) : undefined
}

function isRangeFrom (header: string | null, from: number, total: number | undefined): boolean {
  const [, start, , whole] = /^bytes (\d+)-(\d+)\/(\d+|\*)$/.exec(header ?? '') ?? []
  return Number(start) === from && (total === undefined || whole === '*' || Number(whole) === total)
}
