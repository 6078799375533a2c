/** Every cause that `diagnose` can name: what is wrong, and what to change. `%s` is the detail of the case. */
export const causes = {
  // The signing secret

  'secret-empty': [
    'the signing secret is empty',
    'set OPENAI_WEBHOOK_SECRET or the `secret` option to the whsec_… value shown when the webhook endpoint was created'
  ],
  'secret-is-api-key': [
    'an API key is given where the signing secret belongs',
    'use the endpoint\'s signing secret (whsec_…), shown when the webhook endpoint was created'
  ],
  'secret-is-id': [
    'an identifier is given where the signing secret belongs',
    'use the endpoint\'s signing secret (whsec_…), shown when the webhook endpoint was created'
  ],
  'secret-quoted': [
    'the signing secret has quotes or other marks around it',
    'remove them where the secret is set: an env file that is read by Docker or a CI keeps quotes as part of the value'
  ],
  'secret-whitespace': [
    'the signing secret has white space or a line break around or within it',
    'remove it where the secret is set; a secret made from a file often keeps the last newline (`echo -n`, `printf %s`)'
  ],
  'secret-with-name': [
    'the signing secret holds the name of its variable too',
    'set the value alone, from whsec_ on'
  ],
  'secret-list': [
    'the signing secret is several secrets in one text',
    'give them as an array: secret: [next, previous]'
  ],
  'secret-prefix-missing': [
    'the signing secret has lost its prefix whsec_, so its text was used as the key in place of the bytes it stands for',
    'put whsec_ back in front of it'
  ],
  'secret-prefix-mangled': [
    'the prefix of the signing secret is not exactly one whsec_ in lower case',
    'write it as it was shown: whsec_ once, then the base64'
  ],
  'secret-escaped': [
    'the signing secret was escaped or unescaped on its way (%s)',
    'copy the value again as it was shown, and set it without URL, JSON or shell escaping'
  ],
  'secret-base64-urlsafe': [
    'the base64 of the signing secret is in the URL-safe alphabet (- and _ for + and /)',
    'copy the value again as it was shown'
  ],
  'secret-base64-padding': [
    'the base64 of the signing secret ends with the wrong number of "="',
    'copy the value again as it was shown'
  ],
  'secret-base64-twice': [
    'the signing secret was base64-encoded once more',
    'set the value as it was shown; in a Kubernetes Secret that is `stringData`, or `data` encoded exactly once'
  ],
  'secret-base64-decoded': [
    'the signing secret was decoded already (%s)',
    'set the value as it was shown, with whsec_ and in base64'
  ],
  'secret-cut': [
    'the signing secret was cut: %s',
    'copy the value again whole, with the "=" at its end'
  ],
  'secret-not-base64': [
    'what follows whsec_ in the signing secret is not base64',
    'copy the value again as it was shown'
  ],
  'secret-case-changed': [
    'the base64 of the signing secret has letters of one case only',
    'copy the value again as it was shown: upper and lower case are part of it'
  ],
  'secret-as-text': [
    'the sender took the secret\'s text as the key, not the bytes that its base64 stands for',
    'have the sender decode what follows whsec_; OpenAI does, so this delivery is of another sender or a test of yours'
  ],

  // The headers

  'header-missing': [
    '%s',
    'let whatever stands before the app pass the webhook-* headers on; a probe of a stranger has none of them'
  ],
  'header-renamed': [
    'headers arrive under other names (%s)',
    'have the gateway pass the headers on as webhook-id, webhook-timestamp and webhook-signature, or copy them back before verifying'
  ],
  'header-doubled': [
    '%s arrived more than once or joined by a comma',
    'have only one hop set or copy the header; joined signatures must be separated by single spaces'
  ],
  'header-whitespace': [
    '%s has white space that was not signed',
    'pass header values on untouched'
  ],
  'header-quoted': [
    '%s has quotes around it',
    'pass header values on untouched, not as JSON'
  ],
  'header-escaped': [
    '%s was URL-encoded or URL-decoded',
    'pass header values on untouched; "+" in a signature is not a space'
  ],
  'webhook-id-dot': [
    'webhook-id holds a ".", which would let what was signed be read in two ways',
    'have the sender use ids without "."; OpenAI\'s have none'
  ],
  'webhook-id-invalid': [
    'webhook-id is not 1 to 256 visible ASCII characters without ","',
    'pass the header on as OpenAI sent it'
  ],
  'timestamp-milliseconds': [
    'webhook-timestamp is in milliseconds (%s)',
    'send and pass on whole seconds since the Unix epoch'
  ],
  'timestamp-format': [
    'webhook-timestamp is not whole seconds since the Unix epoch',
    'pass the header on as OpenAI sent it, not as a date or a decimal number'
  ],
  'timestamp-stale': [
    'the delivery was signed %s before the time it is judged at',
    'if it has only now arrived, this machine\'s clock is ahead: set it (NTP; in a container that is the host\'s clock). If it was stored or queued, judge it at the time it arrived (`now`, --now), or send it again signed anew'
  ],
  'timestamp-future': [
    'the delivery was signed %s after the time it is judged at',
    'this machine\'s clock is behind: set it (NTP; in a container that is the host\'s clock)'
  ],
  'signature-version': [
    'webhook-signature has no signature of version v1 (%s)',
    'have the sender sign with HMAC-SHA256 as v1,<base64>, which is what OpenAI does'
  ],
  'signature-prefix': [
    'the signature does not begin with "v1,"',
    'pass webhook-signature on as OpenAI sent it, or have the sender write v1,<base64>'
  ],
  'signature-hex': [
    'the signature is hexadecimal in place of base64',
    'have the sender write v1,<base64> of the HMAC\'s bytes'
  ],
  'signature-base64': [
    'the base64 of the signature is URL-safe or without its "="',
    'have the sender write v1,<base64> in the standard alphabet, padded'
  ],
  'signature-case-changed': [
    'the signature was turned to another case on its way',
    'pass header values on untouched: only names may change their case'
  ],
  'signature-cut': [
    'the signature was cut on its way',
    'pass header values on whole'
  ],
  'signature-malformed': [
    'webhook-signature holds nothing that could be a signature',
    'pass webhook-signature on as OpenAI sent it'
  ],

  // Other senders

  'x-openai-signature': [
    'the delivery is signed with the X-OpenAI-Signature headers of a community guide%s',
    'OpenAI itself sends webhook-*; for a sender of yours that uses these headers set `verifier: xOpenAISignature()`'
  ],
  'provider-svix': [
    'the delivery carries svix-* headers: a product that delivers through Svix sent it, not OpenAI',
    'have that product deliver to a route of its own, with its own secret'
  ],
  'provider-github': [
    'the delivery carries GitHub\'s headers (X-Hub-Signature-256), not OpenAI\'s',
    'have GitHub deliver to a route of its own'
  ],
  'provider-stripe': [
    'the delivery carries Stripe\'s header (Stripe-Signature), not OpenAI\'s',
    'have Stripe deliver to a route of its own; its signing secrets begin with whsec_ too'
  ],

  // The body

  'body-empty': [
    'the body that was verified is empty: it was never captured, or something read it before',
    'capture the bytes before any parser reads them; a route of the plugin does'
  ],
  'body-not-captured': [
    'the body is the text that an object turns into (%s), not what arrived',
    'keep the bytes that arrived (request.openaiWebhook.rawBody), not the parsed body'
  ],
  'body-cut': [
    'the body ends in the middle of its JSON%s',
    'look for a limit on the way: a proxy\'s buffer, a log line\'s length, a column\'s size'
  ],
  'body-length-differs': [
    'the body is not as long as it was when it was sent: content-length says %s',
    'look for what changes the body on the way; a body that was parsed and serialised again is the usual case'
  ],
  'body-newline-added': [
    'a newline was added at the end of the body',
    'store and pass on the bytes as they arrived: editors and `echo` add one'
  ],
  'body-newline-removed': [
    'the newline at the end of the body was removed',
    'store and pass on the bytes as they arrived: `$(…)` and trim() remove it'
  ],
  'body-whitespace': [
    'white space was added around the body',
    'pass on the bytes as they arrived'
  ],
  'body-crlf': [
    'the line ends of the body were changed (%s)',
    'pass on the bytes as they arrived: git, FTP and Windows text mode change line ends'
  ],
  'body-bom-added': [
    'a byte order mark was put before the body',
    'write the body without it: Windows editors and PowerShell add one'
  ],
  'body-bom-removed': [
    'the byte order mark before the body was removed',
    'pass on the bytes as they arrived'
  ],
  'body-charset': [
    'the body was decoded and encoded again in another charset (%s)',
    'pass on the bytes (Buffer), or decode and encode as UTF-8 both times'
  ],
  'body-compressed': [
    'the body arrived compressed (%s), and was signed uncompressed',
    'have the proxy not compress requests, or decompress the body before it is verified'
  ],
  'body-decompressed': [
    'the body was decompressed on its way, and was signed compressed (%s)',
    'verify the bytes as they were sent, before they are decompressed'
  ],
  'body-form-encoded': [
    'the body arrived URL-encoded as form data',
    'have the gateway pass the body on as it is, as application/json'
  ],
  'body-url-decoded': [
    'the body was URL-decoded on its way',
    'have the gateway pass the body on as it is'
  ],
  'body-html-escaped': [
    'the body was HTML-escaped on its way',
    'pass on the bytes as they arrived; escape where text is shown'
  ],
  'body-stringified': [
    'the body was serialised as a JSON string: JSON.stringify() of a text',
    'pass on the text itself'
  ],
  'body-buffer-json': [
    'the body is the JSON form of a Buffer ({"type":"Buffer","data":[…]})',
    'pass on the Buffer itself, or buffer.toString()'
  ],
  'body-base64': [
    'the body arrived in base64',
    'decode it before verifying: Buffer.from(event.body, \'base64\') where isBase64Encoded is set'
  ],
  'body-in-envelope': [
    'the body is the gateway\'s envelope, with what was signed in one of its fields',
    'verify the inner text (event.body), decoded where isBase64Encoded is set'
  ],
  'body-reserialized': [
    'the body was parsed and serialised again: what was signed is the same JSON as %s',
    'verify the bytes that arrived, before any JSON parser or middleware rewrites them'
  ]
} as const satisfies Record<string, readonly [message: string, fix: string]>

/** Stable: programs may compare it. */
export type Cause = keyof typeof causes

/** A cause in this case. */
export interface Found {
  readonly cause: Cause
  readonly detail?: string
}

export function found (cause: Cause, detail?: string): Found {
  return detail === undefined ? { cause } : { cause, detail }
}

export function messageOf ({ cause, detail = '' }: Found): string {
  return causes[cause][0].replace('%s', () => detail)
}

/** One of each cause, its details joined. */
export function merged (causes: readonly Found[]): Found[] {
  const details = new Map<Cause, Set<string>>()
  for (const { cause, detail } of causes) {
    const known = details.get(cause) ?? new Set()
    details.set(cause, detail === undefined ? known : known.add(detail))
  }
  return [...details].map(([cause, known]) => known.size === 0 ? { cause } : { cause, detail: [...known].join(', ') })
}
