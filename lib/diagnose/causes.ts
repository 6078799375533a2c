/**
 * Every cause that `diagnose` can name: what is wrong, and what to change. `%s` stands for a detail of the case.
 *
 * Each cause has been seen with OpenAI's webhooks or with others that are signed in a similar way: the comment above it names the issues.
 * The causes without an issue are what the verifier itself refuses, and the headers of other schemes.
 */
export const causes = {
  // The signing secret

  // chadfawcett/probot-serverless-now#11, openai/openai-ruby#403
  'secret-empty': [
    'the signing secret is empty',
    'set OPENAI_WEBHOOK_SECRET or the `secret` option to the whsec_… value shown when the webhook endpoint was created'
  ],
  // stripe/stripe-node#1886
  'secret-is-api-key': [
    'an API key is given where the signing secret belongs',
    'use the endpoint\'s signing secret (whsec_…), shown when the webhook endpoint was created'
  ],
  // vercel/nextjs-subscription-payments#387
  'secret-is-id': [
    'an identifier is given where the signing secret belongs',
    'use the endpoint\'s signing secret (whsec_…), shown when the webhook endpoint was created'
  ],
  // moby/moby#46773, docker/cli#3630
  'secret-quoted': [
    'the signing secret has quotes or other marks around it',
    'remove them where the secret is set: an env file that is read by Docker or a CI keeps quotes as part of the value'
  ],
  // kimdre/doco-cd#545, stripe/stripe-node#1980, webhookdb/webhookdb#895
  'secret-whitespace': [
    'the signing secret has white space or a line break around or within it',
    'remove it where the secret is set; a secret made from a file often keeps the last newline (`echo -n`, `printf %s`)'
  ],
  // nextlyhq/nextly#227
  'secret-prefix-missing': [
    'the signing secret has lost its prefix whsec_, so its text was used as the key in place of the bytes it stands for',
    'put whsec_ back in front of it'
  ],
  // standard-webhooks/standard-webhooks#235
  'secret-prefix-mangled': [
    'the prefix of the signing secret is not exactly one whsec_ in lower case',
    'write it as it was shown: whsec_ once, then the base64'
  ],
  // polarsource/polar#14102
  'secret-base64-twice': [
    'the signing secret was base64-encoded once more',
    'set the value as it was shown; in a Kubernetes Secret that is `stringData`, or `data` encoded exactly once'
  ],
  // openai/openai-node#1887
  'secret-cut': [
    'the signing secret was cut: %s',
    'copy the value again whole, with the "=" at its end'
  ],
  // openai/openai-node#1887, openai/openai-ruby#403
  'secret-not-base64': [
    'what follows whsec_ in the signing secret is not base64',
    'copy the value again as it was shown'
  ],
  // polarsource/polar#13522, standard-webhooks/standard-webhooks#236
  'secret-as-text': [
    'the sender took the secret\'s text as the key, not the bytes that its base64 stands for',
    'have the sender decode what follows whsec_; OpenAI does, so this delivery is of another sender or a test of yours'
  ],

  // The headers

  // cwaldbieser/jhub_remote_user_authenticator#6, stellar/go-stellar-sdk#596
  'header-missing': [
    '%s',
    'let whatever stands before the app pass the webhook-* headers on; a probe of a stranger has none of them'
  ],
  // plivo/plivoframework#33
  'header-renamed': [
    'headers arrive under other names (%s)',
    'have the gateway pass the headers on as webhook-id, webhook-timestamp and webhook-signature, or copy them back before verifying'
  ],
  'header-doubled': [
    '%s arrived more than once or joined by a comma',
    'have only one hop set or copy the header; joined signatures must be separated by single spaces'
  ],
  // jackmusick/bifrost#726
  'header-whitespace': [
    '%s has white space that was not signed',
    'pass header values on untouched'
  ],
  'webhook-id-dot': [
    'webhook-id holds a ".", which would let what was signed be read in two ways',
    'have the sender use ids without "."; OpenAI\'s have none'
  ],
  'webhook-id-invalid': [
    'webhook-id is not 1 to 256 visible ASCII characters without ","',
    'pass the header on as OpenAI sent it'
  ],
  // adcontextprotocol/adcp#440, hookdeck/outpost#412, workos/emulate#35
  'timestamp-milliseconds': [
    'webhook-timestamp is in milliseconds (%s)',
    'send and pass on whole seconds since the Unix epoch'
  ],
  'timestamp-format': [
    'webhook-timestamp is not whole seconds since the Unix epoch',
    'pass the header on as OpenAI sent it, not as a date or a decimal number'
  ],
  // svix/svix-webhooks#93, argilla-io/argilla#5521, stripe/stripe-node#356
  'timestamp-stale': [
    'the delivery was signed %s before the time it is judged at',
    'if it has only now arrived, this machine\'s clock is ahead: set it (NTP; in a container that is the host\'s clock). If it was stored or queued, judge it at the time it arrived (`now`, --now), or send it again signed anew'
  ],
  // opengovsg/formsg-javascript-sdk#48, stripe/stripe-dotnet#1184
  'timestamp-future': [
    'the delivery was signed %s after the time it is judged at',
    'this machine\'s clock is behind: set it (NTP; in a container that is the host\'s clock)'
  ],
  'signature-version': [
    'webhook-signature has no signature of version v1 (%s)',
    'have the sender sign with HMAC-SHA256 as v1,<base64>, which is what OpenAI does'
  ],
  // workos/emulate#35, jackmusick/bifrost#726
  'signature-prefix': [
    'the signature does not begin with "v1,"',
    'pass webhook-signature on as OpenAI sent it, or have the sender write v1,<base64>'
  ],
  // square/square-go-sdk#24, jackmusick/bifrost#726, nfe/whmcs-addon#190
  'signature-hex': [
    'the signature is hexadecimal in place of base64',
    'have the sender write v1,<base64> of the HMAC\'s bytes'
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

  // The body

  // airqo-platform/AirQo-api#6616, vercel/next.js#13405
  'body-empty': [
    'the body that was verified is empty: it was never captured, or something read it before',
    'capture the bytes before any parser reads them; a route of the plugin does'
  ],
  // stripe/stripe-node#331, stripe/stripe-node#1915
  'body-not-captured': [
    'the body is the text that an object turns into (%s), not what arrived',
    'keep the bytes that arrived (request.openaiWebhook.rawBody), not the parsed body'
  ],
  // stripe/stripe-node#341
  'body-length-differs': [
    'the body is not as long as it was when it was sent: content-length says %s',
    'look for what changes the body on the way; a body that was parsed and serialised again is the usual case'
  ],
  // octokit/webhooks-methods.js#21
  'body-newline-added': [
    'a newline was added at the end of the body',
    'store and pass on the bytes as they arrived: editors and `echo` add one'
  ],
  // sendgrid/sendgrid-csharp#1018
  'body-newline-removed': [
    'the newline at the end of the body was removed',
    'store and pass on the bytes as they arrived: `$(…)` and trim() remove it'
  ],
  // github/docs#3567, mapbox/ecs-conex#64, stripe/stripe-node#523
  'body-charset': [
    'the body was decoded and encoded again in another charset (%s)',
    'pass on the bytes (Buffer), or decode and encode as UTF-8 both times'
  ],
  // GetStream/stream-chat-java#254
  'body-compressed': [
    'the body arrived compressed (%s), and was signed uncompressed',
    'have the proxy not compress requests, or decompress the body before it is verified'
  ],
  // octokit/webhooks.js#158, mdluo/github-webhook-handler-php#1
  'body-form-encoded': [
    'the body arrived URL-encoded as form data',
    'have the gateway pass the body on as it is, as application/json'
  ],
  // meditohq/medito-app#720
  'body-buffer-json': [
    'the body is the JSON form of a Buffer ({"type":"Buffer","data":[…]})',
    'pass on the Buffer itself, or buffer.toString()'
  ],
  // redwoodjs/graphql#2339, stripe/stripe-node#1768
  'body-base64': [
    'the body arrived in base64',
    'decode it before verifying: Buffer.from(event.body, \'base64\') where isBase64Encoded is set'
  ],
  // stripe/stripe-node#356, GetStream/stream-chat-python#230
  'body-in-envelope': [
    'the body is the gateway\'s envelope, with what was signed in one of its fields',
    'verify the inner text (event.body), decoded where isBase64Encoded is set'
  ],
  // stripe/stripe-node#341, cloudconvert/cloudconvert-node#59, attendee-labs/attendee#227, KickEngineering/KickDevDocs#304, line/line-bot-sdk-nodejs#922
  'body-reserialized': [
    'the body was parsed and serialised again: what was signed is the same JSON as %s',
    'verify the bytes that arrived, before any JSON parser or middleware rewrites them'
  ]
} as const satisfies Record<string, readonly [message: string, fix: string]>

/** A stable identifier that programs may compare. */
export type Cause = keyof typeof causes

/** A cause together with its details in this case. */
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

/** Combines repeated causes into one each, and joins their details. */
export function merged (causes: readonly Found[]): Found[] {
  const details = new Map<Cause, Set<string>>()
  for (const { cause, detail } of causes) {
    const known = details.get(cause) ?? new Set()
    details.set(cause, detail === undefined ? known : known.add(detail))
  }
  return [...details].map(([cause, known]) => known.size === 0 ? { cause } : { cause, detail: [...known].join(', ') })
}
