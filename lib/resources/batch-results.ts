import { LONGEST_TIMER, SIGNAL, assertRules, wholeNumber } from '../checks.ts'
import { BatchLineTooLong, BatchNotEnded, InvalidOptions, NoResource } from '../errors.ts'
import { readLine } from './batch-line.ts'
import type { BatchResult } from './batch-line.ts'
import { bytesOf } from './body.ts'
import type { FileAnswer } from './body.ts'
import { insteadOf, kindOf } from './kinds.ts'
import type { ResourceClient } from './kinds.ts'
import { Lines } from './lines.ts'
import { assertClient, assertId, retrieve } from './retrieve.ts'

/** The part of the official client that batchResults() uses. */
export interface BatchClient extends ResourceClient {
  readonly files: { content (id: string, options?: any): PromiseLike<FileAnswer> }
}

/** A Batch of the API. */
export interface BatchLike {
  readonly endpoint: string
  readonly status?: string
  readonly output_file_id?: string | null | undefined
  readonly error_file_id?: string | null | undefined
}

export interface BatchEvent {
  readonly type: `batch.${string}`
  readonly data: { readonly id: string }
}

export interface BatchResultsOptions {
  /** Aborts the iteration with the signal's reason. A handler has such a signal in its context. */
  signal?: AbortSignal | undefined
  /**
   * ms without a byte after which reading a file is given up.
   *
   * @default 60_000
   */
  idleTimeout?: number | undefined
  /**
   * The most bytes of one line. One line at a time is held in memory.
   *
   * @default 67_108_864 (64 MiB)
   */
  lineLimit?: number | undefined
}

const IDLE_TIMEOUT = 60_000
const LINE_LIMIT = 64 * 1_048_576

/** The final states of a batch. A batch in another state is still in progress and has no files yet. */
const ENDED = ['cancelled', 'completed', 'expired', 'failed']

/**
 * Reads the results of a batch line by line as they arrive: those of its output file, then those of its error file, each if there is one.
 * Only one line is held in memory, whatever the size of the files. Breaking out of the loop closes the connection.
 *
 * Throws FST_OPENAI_WEBHOOK_BATCH_STALLED when no byte has come for `idleTimeout`; FST_OPENAI_WEBHOOK_BATCH_BROKEN when a file breaks off
 * and cannot be resumed; FST_OPENAI_WEBHOOK_INVALID_BATCH_LINE and FST_OPENAI_WEBHOOK_BATCH_LINE_TOO_LONG, with the number of the line;
 * FST_OPENAI_WEBHOOK_BATCH_NOT_ENDED; FST_OPENAI_WEBHOOK_NO_RESOURCE for an event that is not of a batch;
 * FST_OPENAI_WEBHOOK_INVALID_OPTIONS; and the SDK's errors.
 *
 * @param client a client of the official `openai` package. Its `timeout` covers only the time until the headers of an answer
 * @param of the batch, or an event of the batch
 */
export async function * batchResults<Client extends BatchClient> (
  client: Client,
  of: BatchLike | BatchEvent,
  options: BatchResultsOptions = {}
): AsyncGenerator<BatchResult<Client>, void, undefined> {
  assertRules('batchResults()', options, { signal: SIGNAL, idleTimeout: wholeNumber('ms', 1, LONGEST_TIMER), lineLimit: wholeNumber('bytes', 1) })
  const { signal, idleTimeout = IDLE_TIMEOUT, lineLimit = LINE_LIMIT } = options
  assertClient('batchResults()', client)
  if (typeof of !== 'object' || of === null) throw new InvalidOptions(`batchResults(): expected a batch or an event of one, got a value of type ${typeof of}`)
  signal?.throwIfAborted()
  const batch = 'type' in of ? await orReason(batchOf(client, of, signal === undefined ? {} : { signal }), signal) : of
  if (!isBatch(batch)) throw new InvalidOptions('batchResults(): expected a batch as the API gives it, got a value that has none of endpoint, status and the ids of files: retrieve the batch first')
  if (batch.status !== undefined && !ENDED.includes(batch.status)) throw new BatchNotEnded()

  for (const [file, id] of [['output', batch.output_file_id], ['error', batch.error_file_id]] as const) {
    if (id === undefined || id === null) continue
    const open = async (headers: Record<string, string>, by: AbortSignal | undefined): Promise<FileAnswer | null> =>
      await orReason(client.files.content(id, { headers, ...(by !== undefined && { signal: by }) }), signal)
    const lines = new Lines(lineLimit)
    for await (const chunk of bytesOf({ file, open, idleTimeout, signal })) {
      for (const line of lines.push(chunk)) {
        if (line === undefined) throw new BatchLineTooLong(lines.count, file, lineLimit)
        if (!isBlank(line)) yield readLine(line, lines.count, file, batch.endpoint)
      }
    }
    const last = lines.end()
    if (!isBlank(last)) yield readLine(last, lines.count, file, batch.endpoint)
  }
}

/** Any other object would have no results, and the handler would succeed. A proxy may answer with a page. */
const isBatch = (batch: unknown): batch is BatchLike =>
  typeof batch === 'object' && batch !== null && ['endpoint', 'status', 'output_file_id', 'error_file_id'].some(name => name in batch)

/** The SDK rejects with an error of its own when the signal aborts. */
async function orReason<T> (asked: PromiseLike<T>, signal: AbortSignal | undefined): Promise<T> {
  try {
    return await asked
  } catch (error) {
    signal?.throwIfAborted()
    throw error
  }
}

async function batchOf (client: BatchClient, event: BatchEvent, options: { signal?: AbortSignal }): Promise<unknown> {
  if (kindOf(event.type) !== 'batch') throw new NoResource(event.type, `batchResults() expects a batch or an event of one; ${insteadOf(event.type)}`)
  assertId('batchResults(): expected event.data.id', (event as { data?: { id?: unknown } }).data?.id)
  return await retrieve(client, event, options)
}

/** Whether a line holds nothing but JSON white space. */
function isBlank (line: Buffer): boolean {
  return line.length === 0 || line.every(byte => byte === 0x20 || byte === 0x09 || byte === 0x0d)
}
