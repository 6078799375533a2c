import createError from '@fastify/error'
import type { FastifyErrorConstructor } from '@fastify/error'

// All coded errors, by pipeline step. A message says what was expected, what was given and what to do. It never contains a secret, an expected
// signature or a value from a payload.

function coded (name: string, message: string, statusCode: number, Base: ErrorConstructor = Error, stack = true): FastifyErrorConstructor {
  return createError(`FST_OPENAI_WEBHOOK_${name}`, message, statusCode, Base, stack)
}

/** Errors without a stack, because a stack says nothing about the sender's request, and costs several µs for each request of a flood. */
const withoutStack = (name: string, message: string, statusCode: number) => coded(name, message, statusCode, Error, false)

// At boot

export const InvalidOptions = coded('INVALID_OPTIONS', '%s', 500, TypeError)
export const InvalidSecret = coded('INVALID_SECRET', '%s', 500, TypeError)
export const InvalidRoute = coded('INVALID_ROUTE', 'route %s %s: %s', 500, TypeError)
export const AlreadyRegistered = coded('ALREADY_REGISTERED',
  'fastify-openai-webhook is already registered in this scope or in one above it: add a further endpoint with app.openaiWebhook.route(), or register in a sibling scope', 500)
export const AlreadyStarted = coded('ALREADY_STARTED',
  'app.openaiWebhook.%s() came after the app was ready: call it before app.ready(), app.listen() or app.inject(), and not in an onReady hook', 500)

// Capture

export const UnprotectedRoute = coded('UNPROTECTED_ROUTE', 'route %s asks for webhook verification but %s', 500)
export const BodyTimeout = withoutStack('BODY_TIMEOUT', 'the body had not arrived whole after %d ms', 408)

// Verify

export const MissingHeader = withoutStack('MISSING_HEADER', 'the %s header is missing or empty', 401)
export const InvalidId = withoutStack('INVALID_ID',
  'webhook-id must be 1 to 256 visible ASCII characters without "." or ",", sent once', 401)
export const InvalidTimestamp = withoutStack('INVALID_TIMESTAMP',
  '%s must be whole decimal seconds since the Unix epoch, sent once', 401)
export const TimestampOutOfTolerance = withoutStack('TIMESTAMP_OUT_OF_TOLERANCE',
  '%s is more than %d s away from this server\'s clock: %s', 401)
export const InvalidSignature = withoutStack('INVALID_SIGNATURE', 'no signature matches the body and the signing secret', 401)
/** For the log, the channels and onError. The sender is answered INVALID_SIGNATURE, so that it cannot find out which tenants exist. */
export const UnknownTenant = withoutStack('UNKNOWN_TENANT', '%s', 401)

// Validate

export const InvalidBody = withoutStack('INVALID_BODY', 'the signed body is not an event: expected %s', 400)
export const InvalidEvent = withoutStack('INVALID_EVENT', 'the event does not have the shape of its type, %s: %s', 400)

// Deduplicate, dispatch, acknowledge

export const InProgress = withoutStack('IN_PROGRESS', 'this webhook-id is being processed by another process, or its resource by another delivery', 409)
export const HandlerFailed = withoutStack('HANDLER_FAILED', 'an event handler failed', 500)
export const DeadlineExceeded = withoutStack('DEADLINE', 'the event is still being processed; the retry will find its result', 503)
export const Overloaded = withoutStack('OVERLOADED', 'no room for another delivery now; retry later', 503)
export const MissingRoute = coded('MISSING_ROUTE',
  'the delivery was received at %s, which has handlers of its own, and this process has no such route: declare it in every process that runs its deliveries', 500)
export const Unavailable = withoutStack('UNAVAILABLE', 'the store, the queue or the signing secret cannot be reached; retry later', 503)

// Dead deliveries

export const NoDeadLetters = coded('NO_DEAD_LETTERS',
  'the runner keeps no dead deliveries: expected durable(), bullmq(), pgboss(), or one with dead(), deadCount() and requeue()', 500)

export const NeedsForce = coded('NEEDS_FORCE',
  'the delivery %s is older than what the inbox remembers of its handler "%s", whose effect could happen twice: check whether it has happened, and pass { force: true } if the handler is to run again', 500)

// Inspector

export const InspectorRefused = withoutStack('INSPECTOR_REFUSED', '%s', 403)

// Inbox: handlers fail with these

export const TransactionOver = coded('TRANSACTION_OVER',
  'the transaction of the handler "%s" is over: use `tx` only before the work that was given to once() has returned, and await what it does; if the work has not returned, a ROLLBACK, a COMMIT or a statement that failed in it has ended the transaction: use savepoints, and let errors be thrown', 500)
export const RolledBack = coded('ROLLED_BACK',
  'PostgreSQL rolled the transaction of the handler "%s" back instead of committing it: a statement in it had failed and the error was swallowed, or the work said ROLLBACK; let the error be thrown, or use a savepoint', 500)
export const NoTransaction = coded('NO_TRANSACTION',
  'first("%s") was called outside a transaction, so its record and the writes could not commit together: call it inside, with a `query` that runs there', 500)
export const AsyncWork = coded('ASYNC_WORK',
  'the work of the handler "%s" returned a promise and was rolled back: a transaction on a SQLite handle is over when the function returns', 500)

// Resources: retrieve(), batchResults() and reconcile() reject with these

export const NoResource = coded('NO_RESOURCE', 'there is nothing to retrieve for the event %s: %s', 500)
export const BatchNotEnded = coded('BATCH_NOT_ENDED',
  'the batch has not ended, so it has no results yet: wait for its event, or for a status of completed, expired, cancelled or failed', 500)
export const BatchStalled = coded('BATCH_STALLED', 'no byte of the batch\'s %s file has come for %d ms', 500)
export const BatchBroken = coded('BATCH_BROKEN',
  'the batch\'s %s file broke off after %d bytes and could not be resumed there: read it again from the start', 500)
export const InvalidBatchLine = coded('INVALID_BATCH_LINE', 'line %d of the batch\'s %s file is not a result: expected %s', 500)
export const BatchLineTooLong = coded('BATCH_LINE_TOO_LONG', 'line %d of the batch\'s %s file is longer than lineLimit, which is %d bytes', 500)
export const UnexpectedList = coded('UNEXPECTED_LIST', 'GET %s was answered with something else than the API\'s: expected %s; is it the API\'s base URL?', 500)
