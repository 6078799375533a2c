import { EXIT, usageError } from './command.ts'
import type { Command } from './command.ts'
import { header, readSaved } from './saved.ts'
import type { Saved } from './saved.ts'
import { secretHelp, secretOptions } from './secret.ts'
import { readSigningSecret, sendOptions, sender } from './send.ts'
import { milliseconds, paint, paintStatus, told } from './table.ts'
import { sign } from '../testing/sign.ts'

const help = `Usage: openai-webhook replay FILE… --url URL [options]

Sends deliveries that \`listen --save\` saved again: their headers as they arrived, their body byte for byte.
OpenAI's signature holds for 5 minutes; after that a receiver refuses them, unless --resign renews it.

  --url URL            the receiver, such as http://127.0.0.1:3000/webhooks/openai
  --resign             renews timestamp and signature with the signing secret; the webhook-id stays, so a receiver
                       that has processed it answers duplicate
  --timeout MS         how long to wait for an answer (10000)
  --json               a JSON object a line for each file
${secretHelp}

Exit code 0 when every delivery was answered 200, else 1.

Example:
  openai-webhook replay deliveries/*.http --resign --url http://127.0.0.1:3000/webhooks/openai
`

export const replay: Command = {
  summary: 'sends saved deliveries again',
  help,
  options: { ...sendOptions, ...secretOptions, resign: { type: 'boolean' } },
  async run (args, terminal) {
    const { positionals: files, values } = args
    if (files.length === 0) throw usageError('missing a FILE to send')
    const to = sender(args, terminal)
    const secret = values['resign'] === true ? await readSigningSecret(args, terminal) : undefined
    // Every file is read before the first is sent, so that an unreadable file sends nothing.
    const deliveries: Array<Saved & { file: string }> = []
    for (const file of files) {
      const saved = await readSaved(file)
      const delivery = secret === undefined ? saved : resign(saved, secret)
      if (delivery !== undefined) deliveries.push({ file, ...delivery })
      else terminal.err(`openai-webhook: ${file}: left out, it has no webhook-id to sign again\n`)
    }

    let failed = deliveries.length === 0
    try {
      for (const { file, headers, body } of deliveries) {
        const answer = await to.send(headers, body)
        const { status, code, duplicate, ms } = answer
        failed ||= status !== 200
        if (values['json'] === true) {
          terminal.out(`${JSON.stringify({ file, status: status ?? null, code: code ?? null, duplicate, ms: Number(ms.toFixed(3)) })}\n`)
        } else {
          terminal.out(`${file}  ${paintStatus(terminal, status)}  ${told(answer)}  ${paint(terminal, 'dim', milliseconds(ms))}\n`)
        }
      }
    } finally {
      to.close()
    }
    return failed ? EXIT.failed : EXIT.ok
  }
}

/** @returns `undefined` when the delivery has no webhook-id, as an unsigned request has none */
function resign (saved: Saved, secret: string): Saved | undefined {
  const webhookId = header(saved, 'webhook-id')
  if (webhookId === undefined) return undefined
  const signed = sign(saved.body, { secret, webhookId })
  const renewed = ['webhook-timestamp', 'webhook-signature']
  return {
    headers: [
      ...saved.headers.filter(([name]) => !renewed.includes(name.toLowerCase())),
      ...renewed.map((name): [string, string] => [name, signed[name]!])
    ],
    body: saved.body
  }
}
