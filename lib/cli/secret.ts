import { createReadStream } from 'node:fs'
import { CommandError, text, usageError } from './command.ts'
import type { Arguments, Terminal } from './command.ts'

/** The options of a command that needs the signing secret. */
export const secretOptions = {
  'secret-file': { type: 'string' },
  secret: { type: 'string' }
} as const

export const secretHelp = `  --secret-file FILE   read the signing secret from a file
  --secret SECRET      the signing secret itself; others on this machine can see it: prefer
                       OPENAI_WEBHOOK_SECRET or --secret-file`

/** Reads the signing secret exactly as it was given. @throws CommandError when none was given, or its file cannot be read */
export async function readSecret (args: Arguments, { env }: Terminal): Promise<string> {
  const given = text(args, 'secret')
  const file = text(args, 'secret-file')
  if (given !== undefined && file !== undefined) throw usageError('--secret and --secret-file both say the secret: give one of them')
  if (given !== undefined) return given
  if (file !== undefined) return await readText(file)
  const { OPENAI_WEBHOOK_SECRET: secret } = env
  if (secret === undefined || secret === '') {
    throw new CommandError('no signing secret: set OPENAI_WEBHOOK_SECRET or give --secret-file FILE')
  }
  return secret
}

/** Removes the newline at the end of a text file, which is not part of the secret. */
async function readText (file: string): Promise<string> {
  return (await readBytes(file)).toString().replace(/\r?\n$/, '')
}

/** In bytes: 64 MiB, 64 times what a route accepts by default. */
const FILE_LIMIT = 64 << 20

/** @throws CommandError with the name of the file */
export async function readBytes (file: string): Promise<Buffer> {
  // A pipe or device, such as /dev/zero, tells no size and may have no end.
  const chunks = await createReadStream(file, { end: FILE_LIMIT }).toArray().catch((error: NodeJS.ErrnoException) => {
    throw new CommandError(`cannot read ${file}: ${error.code!}`)
  })
  const bytes = Buffer.concat(chunks)
  if (bytes.length > FILE_LIMIT) throw new CommandError(`cannot read ${file}: expected at most 64 MiB`)
  return bytes
}
