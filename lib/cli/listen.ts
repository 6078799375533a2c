import { randomBytes } from 'node:crypto'
import { mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { once } from 'node:events'
import type { AddressInfo } from 'node:net'
import fastify from 'fastify'
import type { FastifyInstance, FastifyReply, FastifyRequest, RequestPayload } from 'fastify'
import { CommandError, EXIT, count, text, usageError } from './command.ts'
import type { Arguments, Command, Terminal } from './command.ts'
import { formatSaved } from './saved.ts'
import { readSecret, secretHelp, secretOptions } from './secret.ts'
import { ANSWER_LIMIT, Sender, checkSecret, endToEnd, timeout, url } from './send.ts'
import { milliseconds, paint, paintStatus, printable, told } from './table.ts'
import { guideEvents } from '../events/index.ts'
import { Deadline } from '../deadline.ts'
import { readPayload, replayPayload } from '../pipeline/capture.ts'
import inspector from '../inspector/index.ts'
import { DEFAULTS as INSPECTOR } from '../inspector/options.ts'
import { DEFAULTS } from '../options.ts'
import { retryLater } from '../pipeline/acknowledge.ts'
import openaiWebhook from '../plugin.ts'
import { meaningOf } from '../resources/post.ts'

const PATH = DEFAULTS.path
/** The most bytes that are read of one delivery, far above the plugin's own limit. */
const CAPTURE_LIMIT = 1_048_576
const CAPTURE_BOUNDS = { limit: CAPTURE_LIMIT, deadline: new Deadline(10_000) }

const help = `Usage: openai-webhook listen [options]

A receiver that verifies deliveries and prints what arrives: time, type, webhook-id, answer. Ctrl-C ends it.
Its inspector, a page for this machine alone, shows each of them and sends samples; not with --forward-to.
Without a signing secret it makes one for this run and prints it.

  --port N             (3000; 0 for any that is free)
  --host HOST          the address to listen on (127.0.0.1)
  --path PATH          (${PATH})
  --forward-to URL     hands on what verifies, unchanged, and answers what that receiver answers; 503 when it cannot
                       be reached. Then nothing is deduplicated here
  --timeout MS         how long to wait for that answer (10000)
  --save DIR           writes each delivery, refused ones too, to DIR/<time>-<webhook-id>.http:
                       "Name: value" lines, an empty line, the body's bytes
  --json               a JSON object a line: {"listening":…,"inspector":…}, then one for each delivery
${secretHelp}

Examples:
  openai-webhook listen
  openai-webhook listen --port 4000 --forward-to http://127.0.0.1:3000/webhooks/openai --save deliveries
`

export const listen: Command = {
  summary: 'receives, verifies and prints deliveries; forwards and saves them',
  help,
  options: {
    ...secretOptions,
    port: { type: 'string' },
    host: { type: 'string' },
    path: { type: 'string' },
    'forward-to': { type: 'string' },
    timeout: { type: 'string' },
    save: { type: 'string' },
    json: { type: 'boolean' }
  },
  async run (args, terminal) {
    const settings = readSettings(args)
    const given = await readGivenSecret(args, terminal)
    const secret = given ?? `whsec_${randomBytes(32).toString('base64')}`
    checkSecret(secret, terminal)
    if (settings.save !== undefined) await makeDirectory(settings.save)
    const to = settings.forwardTo && new Sender(settings.forwardTo, timeout(args), terminal.signal)

    const app = await receiver(secret, settings, to, terminal)
    try {
      const { address, page } = await bind(app, settings)
      announce(address, page, given === undefined ? secret : undefined, settings, terminal)
      if (!terminal.signal.aborted) await once(terminal.signal, 'abort')
    } finally {
      await app.close()
      to?.close()
    }
    return EXIT.ok
  }
}

interface Settings {
  port: number
  host: string
  path: string
  forwardTo: URL | undefined
  save: string | undefined
  json: boolean
  /** Whether the inspector is served. With `--forward-to` the plugin has no route of its own, so there would be nothing to show. */
  inspects: boolean
}

/** @throws CommandError with exit code 2 */
function readSettings (args: Arguments): Settings {
  const { positionals, values } = args
  if (positionals.length > 0) throw usageError(`unexpected argument "${positionals[0]!}"`)
  const port = count(args, 'port', 3000, 0)
  if (port > 65_535) throw usageError(`--port: expected at most 65535, got ${port}`)
  const path = text(args, 'path') ?? PATH
  // Fastify reads ":" and "*" as parts of a pattern.
  if (!/^\/[^\s?#:*]*$/.test(path)) throw usageError(`--path: expected a path such as ${PATH}, got "${path}"`)
  return {
    port,
    host: text(args, 'host') ?? '127.0.0.1',
    path,
    forwardTo: url(args, 'forward-to'),
    save: text(args, 'save'),
    json: values['json'] === true,
    inspects: text(args, 'forward-to') === undefined && process.env['NODE_ENV'] !== 'production'
  }
}

async function readGivenSecret (args: Arguments, terminal: Terminal): Promise<string | undefined> {
  const given = [text(args, 'secret'), text(args, 'secret-file'), terminal.env['OPENAI_WEBHOOK_SECRET'] || undefined]
  return given.every(each => each === undefined) ? undefined : await readSecret(args, terminal)
}

async function makeDirectory (directory: string): Promise<void> {
  try {
    await mkdir(directory, { recursive: true })
  } catch (error) {
    throw new CommandError(`cannot make the directory ${directory}: ${(error as NodeJS.ErrnoException).code!}`)
  }
}

/** A request that is being answered. */
interface Arrival {
  bytes: Buffer
  file: string | undefined
  answer: string
  /** Whether the answer is that of the receiver of `--forward-to`. */
  isForwarded: boolean
  /** Why the sender did not get the answer of the receiver of `--forward-to`. */
  trouble: string | undefined
}

function readAll (request: FastifyRequest): Promise<Buffer> {
  return new Promise((resolve, reject) => {
    readPayload(request, request.raw as RequestPayload, CAPTURE_BOUNDS, (error, bytes) => {
      if (error === null) resolve(bytes!)
      else reject(error)
    })
  })
}

async function receiver (secret: string, settings: Settings, to: Sender | undefined, terminal: Terminal): Promise<FastifyInstance> {
  const arrivals = new WeakMap<FastifyRequest, Arrival>()
  const save = saver(settings.save, terminal)
  // Ctrl-C may drop open connections, because OpenAI sends unanswered deliveries again.
  const app = fastify({ forceCloseConnections: true }) as FastifyInstance

  const isOfPage = ({ routeOptions: { url } }: FastifyRequest): boolean => url !== undefined && url !== settings.path
  // The body is read and saved first, because nothing reads it once a delivery is refused.
  app.addHook('onRequest', async (request, reply) => {
    if (isOfPage(request)) return
    const arrival: Arrival = { bytes: Buffer.alloc(0), file: undefined, answer: '', isForwarded: false, trouble: undefined }
    arrivals.set(request, arrival)
    if (request.is404) return
    try {
      arrival.bytes = await readAll(request)
    } catch (error) {
      reply.header('connection', 'close')
      throw error
    }
    arrival.file = await save(request, arrival.bytes)
  })
  app.addHook('preParsing', async (request, _reply, payload) => request.is404 || isOfPage(request) ? payload : replayPayload(arrivals.get(request)!.bytes))
  app.addHook('onSend', async (request, _reply, payload) => {
    const arrival = arrivals.get(request)
    if (arrival !== undefined) arrival.answer = String(payload)
  })
  app.addHook('onResponse', async (request, reply) => {
    const arrival = arrivals.get(request)
    if (arrival !== undefined) print(request, reply, arrival, settings, terminal)
  })

  await app.register(openaiWebhook, { secret, events: guideEvents, path: to === undefined ? settings.path : false })
  if (settings.inspects) await app.register(inspector)
  if (to !== undefined) {
    // The receiver decides which content types it accepts, and whether a delivery is a duplicate.
    app.removeAllContentTypeParsers()
    app.addContentTypeParser('*', (_request, _payload, done) => { done(null) })
    app.post(settings.path, { bodyLimit: CAPTURE_LIMIT }, async (request, reply) => {
      const arrival = arrivals.get(request)!
      await app.openaiWebhook.unwrap(arrival.bytes, request.headers)
      return await forward(to, request, reply, arrival)
    })
  }
  return app
}

async function forward (to: Sender, request: FastifyRequest, reply: FastifyReply, arrival: Arrival): Promise<unknown> {
  let failure
  try {
    const { status, code, headers, body } = await to.send(headerLines(request), arrival.bytes)
    if (status !== undefined) {
      arrival.isForwarded = true
      const lines = endToEnd(Object.entries(headers))
      if (body !== undefined) return reply.code(status).headers(Object.fromEntries(lines)).send(body)
      // The receiver has the delivery, so the sender must learn its status and not send again.
      arrival.trouble = `the receiver's answer is longer than ${ANSWER_LIMIT} bytes, so it was passed on without its body`
      return reply.code(status).headers(Object.fromEntries(lines.filter(([name]) => !name.startsWith('content-')))).send()
    }
    failure = `the receiver did not answer: ${code!}`
  } catch (error) {
    failure = (error as CommandError).message
  }
  arrival.trouble = failure
  retryLater(reply)
  return reply.code(503).send({ statusCode: 503, error: 'Service Unavailable', message: 'the receiver behind this one cannot be reached' })
}

function headerLines ({ raw: { rawHeaders } }: FastifyRequest): Array<[string, string]> {
  return Array.from({ length: rawHeaders.length / 2 }, (_, i) => [rawHeaders[2 * i]!, rawHeaders[2 * i + 1]!])
}

/**
 * Returns a function that saves a delivery and resolves to the name of its file. A failure to write is reported, and the delivery is still
 * processed.
 */
function saver (directory: string | undefined, { err }: Terminal): (request: FastifyRequest, body: Buffer) => Promise<string | undefined> {
  if (directory === undefined) return async () => undefined
  let latest = 0
  return async (request, body) => {
    // Each file gets a time of its own, so that file names sort by arrival and never collide.
    latest = Math.max(Date.now(), latest + 1)
    const time = new Date(latest).toISOString().replace(/[-:]/g, '')
    const webhookId = String(request.headers['webhook-id'] ?? 'none').replace(/[^\w-]/g, '_').slice(0, 100)
    const file = join(directory, `${time}-${webhookId}.http`)
    try {
      await writeFile(file, formatSaved({ headers: headerLines(request), body }), { flag: 'wx', mode: 0o600 })
      return file
    } catch (error) {
      err(`openai-webhook: cannot write ${file}: ${(error as NodeJS.ErrnoException).code!}\n`)
      return undefined
    }
  }
}

/** @throws CommandError when the port or host cannot be used */
async function bind (app: FastifyInstance, { port, host, path, inspects }: Settings): Promise<{ address: string, page: string | undefined }> {
  try {
    await app.listen({ port, host })
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException
    const why = code === 'EADDRINUSE' ? 'it is taken; choose another with --port' : message
    throw new CommandError(`cannot listen on port ${port} of ${host}: ${why}`)
  }
  const { address, family, port: bound } = app.server.address() as AddressInfo
  const named = family === 'IPv6' ? `[${address}]` : address
  const loopback = LOOPBACK[named]
  return { address: `http://${named}:${bound}${path}`, page: inspects && loopback !== undefined ? `http://${loopback}:${bound}${INSPECTOR.path}` : undefined }
}

/** The address by which this machine reaches a server that listens on the loopback interface or on all interfaces. */
const LOOPBACK: Readonly<Record<string, string>> = { '127.0.0.1': '127.0.0.1', '0.0.0.0': '127.0.0.1', '[::1]': '[::1]', '[::]': '[::1]' }

function announce (address: string, page: string | undefined, made: string | undefined, { forwardTo, save, json }: Settings, terminal: Terminal): void {
  if (json) terminal.out(`${JSON.stringify({ listening: address, inspector: page })}\n`)
  const say = json ? terminal.err : terminal.out
  say(`listening on ${address}\n`)
  if (page !== undefined) say(`inspector on ${page}\n`)
  if (forwardTo !== undefined) say(`forwarding to ${forwardTo.href}\n`)
  if (save !== undefined) say(`saving to ${save}\n`)
  if (made !== undefined) {
    if (forwardTo !== undefined) say('no signing secret was given, so what OpenAI sends is refused here: give the secret of the app behind, by OPENAI_WEBHOOK_SECRET or --secret-file FILE\n')
    say(`no signing secret was given: made one for this run. Deliver to it from another terminal:\n\n  OPENAI_WEBHOOK_SECRET=${made} npx fastify-openai-webhook trigger batch.completed --url ${address}\n\n`)
  }
}

function print (request: FastifyRequest, reply: FastifyReply, arrival: Arrival, settings: Settings, terminal: Terminal): void {
  const { message } = parseObject(arrival.answer)
  const answer = { status: reply.statusCode, ...meaningOf(arrival.answer) }
  // These fields are unverified when the delivery was refused.
  const { type, data } = parseObject(arrival.bytes.toString())
  const webhookId = request.headers['webhook-id']
  const hint = answer.status === 200 && arrival.trouble === undefined ? undefined : hintFor(request, arrival, answer.code, textOf(message), settings)
  if (settings.json) {
    terminal.out(`${JSON.stringify({
      time: new Date().toISOString(),
      type: textOf(type) ?? null,
      webhookId: webhookId ?? null,
      ...answer,
      code: answer.code ?? null,
      ms: Math.round(reply.elapsedTime * 10) / 10,
      file: arrival.file ?? null,
      hint: hint ?? null
    })}\n`)
    return
  }
  const dim = (text: string): string => paint(terminal, 'dim', text)
  const id = textOf((data as { id?: unknown } | null | undefined)?.id)
  terminal.out([
    dim(new Date().toTimeString().slice(0, 8)),
    printable(textOf(type) ?? `${request.method} ${request.url}`, 60).padEnd(30),
    printable(String(webhookId ?? '-'), 60).padEnd(35),
    `${paintStatus(terminal, answer.status)} ${told(answer).padEnd(9)}`,
    ...(id === undefined ? [] : [printable(id, 60)]),
    dim(milliseconds(reply.elapsedTime))
  ].join('  ') + '\n')
  if (hint !== undefined) terminal.out(`          ${paint(terminal, 'yellow', printable(hint, 500))}\n`)
}

/** What went wrong, and where to look. */
function hintFor ({ is404, headers }: FastifyRequest, { file, trouble, isForwarded }: Arrival, code: string | undefined, message: string | undefined, { path, forwardTo }: Settings): string | undefined {
  if (is404) return `this receiver takes POST ${path} alone`
  if (trouble !== undefined) return trouble
  if (code === 'FST_OPENAI_WEBHOOK_INVALID_SIGNATURE') {
    if (isForwarded) return `${forwardTo!.origin} answers that ${message!}, which matched here: the app there has another signing secret`
    return `${message!}; to see why: npx fastify-openai-webhook diagnose ${file ?? 'FILE, with what --save DIR keeps'}`
  }
  if (code === 'FST_OPENAI_WEBHOOK_TIMESTAMP_OUT_OF_TOLERANCE') {
    const age = Math.round(Date.now() / 1000) - Number(headers['webhook-timestamp'])
    return `${message!}: signed ${Math.abs(age)} s ${age > 0 ? 'ago; an old delivery, which replay --resign renews, or a clock that is off' : 'ahead; one of the two clocks is off'}`
  }
  return message
}

function textOf (value: unknown): string | undefined {
  return typeof value === 'string' ? value : undefined
}

function parseObject (text: string): Record<string, unknown> {
  try {
    return { ...JSON.parse(text) }
  } catch {
    return {}
  }
}
