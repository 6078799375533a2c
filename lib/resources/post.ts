/** The receiver's answer. */
export interface Posted {
  /** `undefined` when no answer came. */
  readonly status: number | undefined
  /** The `code` of the answer, such as FST_OPENAI_WEBHOOK_INVALID_SIGNATURE, or why no answer came. */
  readonly code: string | undefined
  readonly duplicate: boolean
}

/** The most characters of an answer that are read, more than a receiver sends. */
const ANSWER_LIMIT = 65_536

/**
 * Posts a delivery. A redirect is not followed, as OpenAI does not follow one either.
 *
 * @param timeout ms
 * @throws the signal's reason
 */
export async function post (url: URL, headers: Record<string, string>, body: string, timeout: number, signal: AbortSignal | undefined): Promise<Posted> {
  const late = AbortSignal.timeout(timeout)
  try {
    const answer = await fetch(url, { method: 'POST', headers, body, redirect: 'manual', signal: signal === undefined ? late : AbortSignal.any([late, signal]) })
    return { status: answer.status, ...meaningOf(await textOf(answer)) }
  } catch (error) {
    signal?.throwIfAborted()
    return { status: undefined, code: late.aborted ? 'TIMEOUT' : causeCodeOf(error), duplicate: false }
  }
}

async function textOf ({ body }: Response): Promise<string> {
  const decoder = new TextDecoder()
  let text = ''
  for await (const chunk of body ?? []) {
    text += decoder.decode(chunk as Uint8Array, { stream: true })
    if (text.length > ANSWER_LIMIT) break // leaving the loop closes the connection
  }
  return text
}

/** Reads `code` and `duplicate` from the body of an answer. */
export function meaningOf (text: string): Pick<Posted, 'code' | 'duplicate'> {
  try {
    const { code, duplicate } = JSON.parse(text) as { code?: unknown, duplicate?: unknown }
    return { code: typeof code === 'string' ? code : undefined, duplicate: duplicate === true }
  } catch {
    return { code: undefined, duplicate: false } // not JSON, or `null`
  }
}

/** fetch() wraps the error that matters: ECONNREFUSED, ENOTFOUND, a certificate error. */
function causeCodeOf (error: unknown): string {
  const { cause } = error as { cause?: { code?: unknown } }
  return typeof cause?.code === 'string' ? cause.code : 'UNREACHABLE'
}
