import { STATUS_CODES } from 'node:http'
import type { FastifyErrorConstructor } from '@fastify/error'
import { codeOfClass } from '../coded.ts'
import {
  BodyTimeout, DeadlineExceeded, HandlerFailed, InProgress, InvalidBody, InvalidEvent, InvalidId, InvalidSignature, InvalidTimestamp, MissingHeader, Overloaded,
  TimestampOutOfTolerance, Unavailable
} from '../errors.ts'
import { guideEntries, officialEntries } from '../events/index.ts'
import { jsonSchemaOf } from '../events/users.ts'
import type { AnySchema } from '../events/users.ts'
import { standardWebhooks } from '../verifiers/standard-webhooks.ts'
import type { Verifier } from '../verifiers/verifier.ts'
import { xOpenAISignature } from '../verifiers/x-openai-signature.ts'

type JsonSchema = Record<string, unknown>

/** What @fastify/swagger passes to a transform. `openapiObject` is absent when it makes a Swagger 2 document. */
interface Operation {
  readonly schema?: object
  readonly url: string
  readonly openapiObject?: { readonly openapi?: string }
}

export interface Documented {
  readonly events: Readonly<Record<string, AnySchema>>
  readonly verifier: Verifier
  /** Whether the route has its own handler, which replies. */
  readonly replies: boolean
}

/**
 * Makes the `config.swaggerTransform` of a receiving route. @fastify/swagger calls it only when it makes the document.
 *
 * Not the route's `schema`: Fastify would use it to check requests before the signature is verified, and to serialize answers. The app's
 * `transform` would also get it, and may support only schemas of another kind.
 */
export function documentation ({ events, verifier, replies }: Documented): (operation: Operation) => { schema: object, url: string } {
  return ({ schema, url, openapiObject }) => {
    const scheme = schemes.find(({ checkHeaders }) => checkHeaders === verifier.checkHeaders)
    return {
      url,
      schema: {
        summary: 'Receives webhooks of OpenAI',
        description: 'A delivery is verified before anything else is made of it. After any answer but 200 it comes again.',
        tags: ['OpenAI webhooks'],
        // The signature authenticates a delivery. The security that the document may require on every route does not apply.
        security: [],
        consumes: ['application/json'],
        ...(scheme !== undefined && { headers: { type: 'object', required: Object.keys(scheme.headers), properties: scheme.headers } }),
        body: openapiObject === undefined ? envelope(events) : union(events, openapiObject.openapi?.startsWith('3.0')),
        response: answers(scheme?.refusals ?? foreignRefusals, replies, !replies && scheme !== undefined),
        // An onRoute hook of the app may have set fields such as `hide` or `tags`.
        ...schema
      }
    }
  }
}

const timestamp = { type: 'string', pattern: '^[0-9]+$', description: 'When the delivery was signed, in Unix seconds.' }

/** Recognised by `checkHeaders`, so that a verifier that wraps one of these is documented too. */
const schemes = [
  {
    checkHeaders: standardWebhooks().checkHeaders,
    headers: {
      'webhook-id': { type: 'string', minLength: 1, maxLength: 256, description: 'The same for every retry of the delivery.' },
      'webhook-timestamp': timestamp,
      'webhook-signature': {
        type: 'string',
        minLength: 1,
        description: '`v1,` and the base64 HMAC-SHA256 of `webhook-id.webhook-timestamp.body`. Several are separated by spaces.'
      }
    },
    refusals: [MissingHeader, InvalidId, InvalidTimestamp, TimestampOutOfTolerance, InvalidSignature]
  },
  {
    checkHeaders: xOpenAISignature().checkHeaders,
    headers: {
      'X-OpenAI-Signature': { type: 'string', pattern: '^[0-9a-fA-F]{64}$', description: 'The hex HMAC-SHA256 of `X-OpenAI-Timestamp.body`.' },
      'X-OpenAI-Timestamp': timestamp
    },
    refusals: [MissingHeader, InvalidTimestamp, TimestampOutOfTolerance, InvalidSignature]
  }
]

/** The refusals with a user's verifier, besides the errors that the verifier throws itself. */
const foreignRefusals = [InvalidId, InvalidTimestamp, TimestampOutOfTolerance, InvalidSignature]

/** Exactly one member matches an event: the member for its type, or else the last one. */
function union (events: Documented['events'], isOpenAPI30 = false): JsonSchema {
  const descriptions = new Map<AnySchema, string>([...Object.values(officialEntries), ...Object.values(guideEntries)]
    .map(({ schema, description }) => [schema, description]))
  const members = Object.entries(events).map(([type, schema]) => {
    const plain = toPlain(schema, isOpenAPI30)
    const head = { title: type, description: descriptions.get(schema) }
    return hasType(plain, type) ? { ...head, ...plain } : { ...head, allOf: [ofType({ type: 'string', enum: [type] }), plain] }
  })
  return {
    description: 'The event.',
    oneOf: [...members, {
      title: 'any other type',
      description: 'OpenAI adds types: an event of a type that is not listed is accepted, whatever it holds.',
      ...ofType({ type: 'string', not: { enum: Object.keys(events) } }),
      additionalProperties: true
    }]
  }
}

/** The envelope alone, because Swagger 2 has no unions. */
function envelope (events: Documented['events']): JsonSchema {
  const { required, properties, type } = ofType({ type: 'string', description: `${listed(Object.keys(events))}, or any other: OpenAI adds types.` })
  return { description: 'The event.', type, required, properties: { ...properties, data: { type: 'object' } } }
}

function ofType (type: JsonSchema): { type: string, required: string[], properties: Record<string, JsonSchema> } {
  return { type: 'object', required: ['type'], properties: { type } }
}

function hasType ({ properties }: { properties?: Record<string, { const?: unknown }> }, type: string): boolean {
  return properties?.['type']?.const === type
}

/**
 * The JSON Schema of an event schema, without TypeBox's symbols. It is empty if a library with Standard Schema cannot provide one.
 * @fastify/swagger turns `examples` into the single `example` of OpenAPI 3.0, but not within a union.
 */
function toPlain (schema: AnySchema, isOpenAPI30: boolean): JsonSchema {
  return JSON.parse(JSON.stringify(jsonSchemaOf(schema, ...(isOpenAPI30 ? ['openapi-3.0'] : [])), (_key, value: unknown) => {
    // The value of a property named `examples` is a schema, not an array.
    const { examples, ...rest } = (value ?? {}) as { examples?: unknown }
    return isOpenAPI30 && Array.isArray(examples) ? { ...rest, example: examples[0] as unknown } : value
  })) as JsonSchema
}

/** The refusals by status. Fastify's own errors are given by code, because their constructors are not used here. */
const refusals: ReadonlyArray<readonly [status: number, when: string, ...codes: Array<FastifyErrorConstructor | string>]> = [
  [400, 'Signed, but not an event or not of the shape of its type.', InvalidBody, InvalidEvent],
  [408, 'The body had not arrived whole in time.', BodyTimeout],
  [409, 'Another process is processing the delivery.', InProgress],
  [413, 'The body is over the limit.', 'FST_ERR_CTP_BODY_TOO_LARGE'],
  [415, 'The body is not application/json.', 'FST_ERR_CTP_INVALID_MEDIA_TYPE'],
  [500, 'A handler failed.', HandlerFailed],
  [503, 'Not done by the deadline, no room for it, or a store, a queue or a signing secret that cannot be reached.', DeadlineExceeded, Overloaded, Unavailable]
]

/** @param exhaustive whether no user's verifier or handler can answer with other codes */
function answers (unverified: FastifyErrorConstructor[], replies: boolean, exhaustive: boolean): Record<string, JsonSchema> {
  const all = [...refusals, [401, 'Not verified.', ...unverified] as const]
  return {
    ...(replies ? own : { 200: acknowledgement }),
    ...Object.fromEntries(all.map(([status, when, ...errors]) => [status, refusal(status, when, errors.map(toCode), exhaustive)]))
  }
}

const toCode = (Refusal: FastifyErrorConstructor | string): string => typeof Refusal === 'string' ? Refusal : codeOfClass(Refusal)

const acknowledgement = {
  'x-response-description': 'Processed, now or before, or accepted.',
  type: 'object',
  required: ['received'],
  properties: {
    received: { type: 'boolean', enum: [true] },
    duplicate: { type: 'boolean', enum: [true], description: 'It had been processed before.' }
  }
}

const own = {
  200: {
    'x-response-description': 'What the handler of the route replies; `{"received":true}` where it replies nothing, ' +
      '`{"received":true,"duplicate":true}` where it had answered the delivery before.'
  },
  default: { 'x-response-description': 'What else the handler of the route replies.' }
}

function refusal (status: number, when: string, codes: string[], exhaustive: boolean): JsonSchema {
  return {
    'x-response-description': `${when} ${listed(codes)}`,
    ...((status === 409 || status === 503) && { headers: { 'Retry-After': { type: 'integer', description: 'Seconds.' } } }),
    type: 'object',
    properties: {
      statusCode: { type: 'integer', enum: [status] },
      code: { type: 'string', ...(exhaustive ? { enum: codes } : { example: codes[0] }) },
      error: { type: 'string', example: STATUS_CODES[status] },
      message: { type: 'string' }
    }
  }
}

const listed = (names: readonly string[]): string => names.map(name => `\`${name}\``).join(', ')
