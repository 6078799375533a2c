import type { Detail } from '../lib/inspector/messages.ts'

// Renders a delivery as a text for a terminal or a test. The text contains no secret: the code that signs reads OPENAI_WEBHOOK_SECRET where
// it runs.

const quoted = (text: string): string => `'${text.replaceAll("'", "'\\''")}'`

/** @param origin the origin of the app */
export function asCurl ({ url, headers, scheme }: Detail, body: string, origin: string): string {
  const target = quoted(origin + url)
  if (scheme === null) {
    // The headers are copied as they arrived, so that the same refusal can be seen again.
    const lines = (headers ?? []).filter(([name]) => /^(?:content-type|webhook-.*|x-openai-.*)$/.test(name)).map(([name, value]) => `  -H ${quoted(`${name}: ${value}`)} \\\n`)
    return `curl -i ${target} \\\n${lines.join('')}  --data-binary ${quoted(body)}\n`
  }
  return `body=${quoted(body)}
id="wh_$(od -An -N16 -tx1 /dev/urandom | tr -d ' \\n')"
time=$(date +%s)
key=$(printf %s "\${OPENAI_WEBHOOK_SECRET#whsec_}" | base64 -d | od -An -v -tx1 | tr -d ' \\n')
signature=$(printf %s "$id.$time.$body" | openssl dgst -sha256 -mac HMAC -macopt "hexkey:$key" -binary | base64)
curl -i ${target} \\
  -H 'content-type: application/json' \\
  -H "webhook-id: $id" -H "webhook-timestamp: $time" -H "webhook-signature: v1,$signature" \\
  --data-binary "$body"
`
}

/** The command sets each field of the event's `data`. */
export function asTrigger ({ row: { type }, url }: Detail, body: string, origin: string): string {
  const fields = leaves((JSON.parse(body) as { data?: unknown }).data, 'data').map(([path, value]) => ` \\\n  --data ${quoted(`${path}=${value}`)}`)
  return `npx fastify-openai-webhook trigger ${quoted(type!)} --url ${quoted(origin + url)}${fields.join('')}\n`
}

function leaves (value: unknown, path: string): Array<[string, string]> {
  if (typeof value === 'object' && value !== null && !Array.isArray(value) && Object.keys(value).length > 0) {
    return Object.entries(value).flatMap(([key, inner]) => leaves(inner, `${path}.${key}`))
  }
  // Text that is valid JSON, such as 1, is quoted, because `trigger` would read it as a number.
  return value === undefined ? [] : [[path, typeof value === 'string' && !isJson(value) ? value : JSON.stringify(value)]]
}

function isJson (text: string): boolean {
  try {
    JSON.parse(text)
    return true
  } catch {
    return false
  }
}

export function asTest ({ url, row: { type, status } }: Detail, body: string): string {
  const event = JSON.stringify(JSON.parse(body), null, 2).replaceAll('\n', '\n  ')
  return `import assert from 'node:assert/strict'
import test from 'node:test'
import { deliver } from 'fastify-openai-webhook/testing'

test(${JSON.stringify(`takes ${type!}`)}, async () => {
  // app: yours, registered with { secret: testSecret } of fastify-openai-webhook/testing
  const response = await deliver(app, ${event}, { url: ${JSON.stringify(url)} })
  assert.equal(response.statusCode, ${status ?? 200})
})
`
}
