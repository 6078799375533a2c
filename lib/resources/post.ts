/** What the receiver said. `status` is absent where no answer came, and `code` says why. */
export interface Posted {
  readonly status: number | undefined
  readonly code: string | undefined
  readonly duplicate: boolean
}

/** Bytes of an answer that are read; more than a receiver has to say. */
const ANSWER_LIMIT = 65_536

/** Posts a delivery. A redirect is an answer, as it is to OpenAI. @throws the signal's reason */
export async function post (url: URL, headers: Record<string, string>, body: string, timeout: number, signal: AbortSignal | undefined): Promise<Posted> {
  const late = AbortSignal.timeout(timeout)
  try {
    const answer = await fetch(url, { method: 'POST', headers, body, redirect: 'manual', signal: signal === undefined ? late : AbortSignal.any([late, signal]) })
    return { status: answer.status, ...meaningOf(await textOf(answer)) }
  } catch (error) {
    signal?.throwIfAborted()
    return { status: undefined, code: late.aborted ? 'TIMEOUT' : codeOf(error), duplicate: false }
  }
}

async function textOf ({ body }: Response): Promise<string> {
  const decoder = new TextDecoder()
  let text = ''
  for await (const chunk of body ?? []) {
    text += decoder.decode(chunk as Uint8Array, { stream: true })
    if (text.length > ANSWER_LIMIT) break // which ends the connection
  }
  return text
}

/** What a receiver's answer says. */
export function meaningOf (text: string): Pick<Posted, 'code' | 'duplicate'> {
  try {
    const { code, duplicate } = JSON.parse(text) as { code?: unknown, duplicate?: unknown }
    return { code: typeof code === 'string' ? code : undefined, duplicate: duplicate === true }
  } catch {
    return { code: undefined, duplicate: false } // not JSON, or `null`
  }
}

/** What fetch wraps: ECONNREFUSED, ENOTFOUND, a certificate's fault. */
function codeOf (error: unknown): string {
  const { cause } = error as { cause?: { code?: unknown } }
  return typeof cause?.code === 'string' ? cause.code : 'UNREACHABLE'
}
