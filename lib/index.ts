import type {
  ContextConfigDefault, FastifyBaseLogger, FastifySchema, FastifyTypeProvider, FastifyTypeProviderDefault, RawRequestDefaultExpression,
  RawServerBase, RawServerDefault, RouteGenericInterface
} from 'fastify'
import type { OpenAIWebhook } from './api.ts'
import type { RouteOverrides } from './options.ts'
import type { RequestDelivery } from './request.ts'

/** The plugin: `await app.register(openaiWebhook, options)`. */
export { default } from './plugin.ts'

// Events
export { guideEvents } from './events/index.ts'
export type { GuideEvents, OfficialEvents } from './events/index.ts'
export type { AnySchema, EventOfSchema, EventsOf, StandardResult, StandardSchema, TypeBoxSchema } from './events/users.ts'
// `export *`, so that `declare module 'fastify-openai-webhook'` merges into the interfaces that are declared there.
export type * from './events/map.ts'
export type { EventContext, EventHandler, RouteHandlers } from './handlers.ts'

// Verification
export { standardWebhooks } from './verifiers/standard-webhooks.ts'
export { xOpenAISignature } from './verifiers/x-openai-signature.ts'
export type { SignedDelivery, Verified, Verifier } from './verifiers/verifier.ts'
export type { Secret } from './verifiers/keyring.ts'

// Delivery guarantees
export { memoryStore } from './stores/memory.ts'
export type { Claim, IdempotencyStore } from './stores/store.ts'
export type { MaybePromise } from './maybe-promise.ts'
export { inline } from './runners/inline.ts'
export { background } from './runners/background.ts'
export type { BackgroundOptions } from './runners/background.ts'
export type {
  Attempts, DeadDelivery, DeliveryError, DeliveryRef, Job, RequeueOptions, Runner, RunnerHost
} from './runners/runner.ts'
export { deadDelivery } from './runners/handler-failures.ts'
export { assertRemembered } from './runners/runner.ts'
export type { DeadLetters, DeadLettersOptions } from './dead-letters.ts'

// Diagnosis
export { diagnose } from './diagnose.ts'
export type { Cause, Diagnosis, DiagnoseHeaders, DiagnoseOptions, Finding } from './diagnose.ts'

// Observation
export { channels } from './channels.ts'
export type {
  DeliveryInfo, DeliveryMessage, DuplicateMessage, EnqueueMessage, HandlerMessage, MessageChannel, RefusedMessage, TraceChannel, TracePart, TraceSubscribers,
  TroubleMessage, VerifiedMessage
} from './channels.ts'

// Options and contexts
export type { OpenAIWebhook } from './api.ts'
export type {
  EndpointOptions, IdempotencyOptions, OpenAIWebhookOptions, ReceivingOptions, RouteOverrides, TenantOptions, TenantSecret, VerifiedHandler, WebhookRouteOptions
} from './options.ts'
export type { DeadHandler, ErrorHandler, FailureInfo, HandlerOptions } from './registry.ts'
export type { Delivery, RequestDelivery, VerifiedRequest, WebhookHeaders } from './request.ts'

declare module 'fastify' {
  interface FastifyInstance {
    openaiWebhook: OpenAIWebhook
  }
  interface FastifyRequest<
    RouteGeneric extends RouteGenericInterface = RouteGenericInterface,
    RawServer extends RawServerBase = RawServerDefault,
    RawRequest extends RawRequestDefaultExpression<RawServer> = RawRequestDefaultExpression<RawServer>,
    SchemaCompiler extends FastifySchema = FastifySchema,
    TypeProvider extends FastifyTypeProvider = FastifyTypeProviderDefault,
    ContextConfig = ContextConfigDefault,
    Logger extends FastifyBaseLogger = FastifyBaseLogger
  > {
    /** The verified delivery on a receiving or marked route. `null` before the verification, and on all other routes. */
    openaiWebhook: RequestDelivery<ContextConfig>
  }
  interface FastifyContextConfig {
    /** Marks the route: its deliveries are verified, validated and deduplicated. */
    openaiWebhook?: RouteOverrides
  }
}
