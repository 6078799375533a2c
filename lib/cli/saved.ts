import { CommandError } from './command.ts'
import { readBytes } from './secret.ts'

/** A delivery as it arrived. In a file: `Name: value` lines, an empty line, then the bytes of the body to the end of the file. */
export interface Saved {
  /** In the order of their arrival. */
  readonly headers: ReadonlyArray<[name: string, value: string]>
  readonly body: Buffer
}

const LF = 0x0a

/** Headers are written as latin1, as they are sent, so that every byte is preserved. */
export function formatSaved ({ headers, body }: Saved): Buffer {
  return Buffer.concat([Buffer.from(`${headers.map(([name, value]) => `${name}: ${value}\n`).join('')}\n`, 'latin1'), body])
}

/**
 * Parses a saved delivery. To accept a request copied off the wire, lines may end with CRLF, and a request line may come first.
 *
 * @throws CommandError when the bytes are not a saved delivery
 */
export function parseSaved (bytes: Buffer): { headers: Array<[name: string, value: string]>, body: Buffer } {
  const headers: Array<[string, string]> = []
  let start = 0
  for (let number = 1, end; (end = bytes.indexOf(LF, start)) !== -1; number++) {
    const line = bytes.toString('latin1', start, end).replace(/\r$/, '')
    start = end + 1
    if (line === '') return { headers, body: bytes.subarray(start) }
    if (number === 1 && /^[A-Z]+ \S+ HTTP\/\d/.test(line)) continue
    const header = /^([!#$%&'*+.^_`|~\w-]+):[ \t]*(.*?)[ \t]*$/.exec(line)
    if (header === null) throw notSaved(`line ${number} is not "Name: value"`)
    headers.push([header[1]!, header[2]!])
  }
  throw notSaved('no empty line ends its headers')
}

/** @throws CommandError with the name of the file */
export async function readSaved (file: string): Promise<Saved> {
  const bytes = await readBytes(file)
  try {
    return parseSaved(bytes)
  } catch (error) {
    throw new CommandError(`${file}: ${(error as Error).message}`)
  }
}

/**
 * The first header of this name, in any case.
 *
 * @param name in lower case
 */
export function header ({ headers }: Saved, name: string): string | undefined {
  return headers.find(([each]) => each.toLowerCase() === name)?.[1]
}

function notSaved (why: string): CommandError {
  return new CommandError(`not a saved delivery: ${why}`)
}
