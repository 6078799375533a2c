import { isUtf8 } from 'node:buffer'
import { isObject } from '../checks.ts'
import { InvalidBatchLine } from '../errors.ts'
import type { Answer } from './kinds.ts'

/** The results of a batch are in two files, and either of them can be absent. */
export type BatchFile = 'output' | 'error'

/** The endpoints for which OpenAI documents batches. */
export type BatchEndpoint =
  '/v1/chat/completions' | '/v1/completions' | '/v1/embeddings' | '/v1/images/edits' | '/v1/images/generations' | '/v1/moderations' | '/v1/responses' | '/v1/videos'

type Other = Record<string, unknown>

/** The body of a successful request, with the client's own type for it. */
type Body<Client, Endpoint extends BatchEndpoint> =
  Endpoint extends '/v1/chat/completions'
    ? Client extends { chat: { completions: { create: infer Method } } } ? Answer<Method, 'chat.completion'> : Other
    : Endpoint extends '/v1/responses'
      ? Client extends { responses: { retrieve: infer Method } } ? Answer<Method, 'response'> : Other
      : Endpoint extends '/v1/embeddings'
        ? Client extends { embeddings: { create: infer Method } } ? Answer<Method, 'list'> : Other
        : Other

interface Line {
  /** The `custom_id` of the request in your input file. */
  readonly customId: string
  /** OpenAI's id of the request in the batch; `undefined` when the line has none. */
  readonly id: string | undefined
  readonly file: BatchFile
  /** The number of the line in its file, from 1. */
  readonly line: number
  /** OpenAI's id of the API request. OpenAI's support asks for it. */
  readonly requestId: string | undefined
}

export interface BatchSuccess<Client, Endpoint extends BatchEndpoint> extends Line {
  /** The endpoint of the batch, which narrows the type of `body`. */
  readonly endpoint: Endpoint
  /** The status of the answer, 200 to 299. */
  readonly status: number
  readonly body: Body<Client, Endpoint>
  readonly error: null
}

export interface BatchFault {
  /** OpenAI's error code, such as `batch_expired`; `null` when OpenAI gives none. */
  readonly code: string | null
  readonly message: string
}

export interface BatchFailure extends Line {
  readonly endpoint: BatchEndpoint
  /** The status of the answer; `undefined` when the request was not made, as in a batch that expired. */
  readonly status: number | undefined
  /** The body of the answer, if there was one. */
  readonly body: unknown
  readonly error: BatchFault
}

/** The result of one request of a batch. `error` is `null` when the request succeeded; `endpoint` then determines the type of `body`. */
export type BatchResult<Client> = BatchFailure | { [Endpoint in BatchEndpoint]: BatchSuccess<Client, Endpoint> }[BatchEndpoint]

/**
 * @param bytes one line, not empty
 * @param line the number of the line in its file, from 1
 * @throws FST_OPENAI_WEBHOOK_INVALID_BATCH_LINE, whose message quotes nothing of the line
 */
export function readLine<Client> (bytes: Buffer, line: number, file: BatchFile, endpoint: string): BatchResult<Client> {
  const invalid = (expected: string): Error => new InvalidBatchLine(line, file, expected)
  const parsed = parse(bytes, invalid)
  if (!isObject(parsed)) throw invalid('an object')
  const { id, custom_id: customId, response = null, error = null } = parsed
  if (typeof customId !== 'string') throw invalid('a custom_id')
  if (error !== null && !isObject(error)) throw invalid('error to be an object or null')
  if (response !== null && !(isObject(response) && Number.isInteger(response['status_code']))) throw invalid('response to be null or an object with a status_code')
  if (response === null && error === null) throw invalid('a response or an error')

  const { status_code: status, request_id: requestId, body } = response ?? {}
  const failure = error ?? faultOf(status as number, body)
  return {
    customId,
    id: textOf(id),
    file,
    line,
    requestId: textOf(requestId),
    endpoint,
    status,
    body,
    error: failure === null ? null : { code: textOf(failure['code']) ?? null, message: textOf(failure['message']) ?? '' }
  } as BatchResult<Client>
}

function parse (bytes: Buffer, invalid: (expected: string) => Error): unknown {
  if (!isUtf8(bytes)) throw invalid('UTF-8')
  try {
    return JSON.parse(bytes.toString())
  } catch {
    throw invalid('JSON') // the message of the parser would quote the line
  }
}

/** The error of a request that was answered with a failure. Such a line has it in the body of the answer and not in `error`. */
function faultOf (status: number, body: unknown): Record<string, unknown> | null {
  if (status >= 200 && status < 300) return null
  const { error } = isObject(body) ? body : {}
  return isObject(error) ? error : { message: `the request was answered ${status}` }
}

const textOf = (value: unknown): string | undefined => typeof value === 'string' ? value : undefined
