import type { OpenAI } from 'openai'
import { oneLine, openApi } from './api.ts'
import type { SDK } from './api.ts'
import { CommandError, EXIT, text, usageError } from './command.ts'
import type { Arguments, Command, Terminal } from './command.ts'
import { paint } from './table.ts'
import { officialEntries } from '../events/index.ts'
import { matches, nearest } from '../nearest.ts'

type Webhooks = OpenAI['webhooks']
type Endpoint = Awaited<ReturnType<Webhooks['retrieve']>>
type EventTypes = Parameters<Webhooks['create']>[0]['event_types']
type RequestOptions = NonNullable<Parameters<Webhooks['retrieve']>[1]>

/** The input of an action, once its arguments have been read. */
interface Input {
  readonly webhooks: Webhooks
  readonly read: RequestOptions
  readonly write: RequestOptions
  readonly print: (document: object, readable: string) => void
  readonly terminal: Terminal
}

interface Action {
  /** The names of the arguments after the action's name. */
  readonly takes: readonly string[]
  /** The options of this action, in addition to `--base-url` and `--json`. */
  readonly options: readonly string[]
  /** Reads the arguments, so that a wrong one is reported before any request to OpenAI. @throws CommandError with exit code 2 */
  readonly plan: (args: Arguments, first: string, second: string) => (api: Input) => Promise<number>
}

const help = `Usage: openai-webhook endpoints list
       openai-webhook endpoints create --name NAME --url URL --event-types TYPES
       openai-webhook endpoints update ID [--name NAME] [--url URL] [--event-types TYPES]
       openai-webhook endpoints delete ID --yes
       openai-webhook endpoints rotate-secret ID [--revoke-old-secret]
       openai-webhook endpoints test ID TYPE
       openai-webhook endpoints event-types

Manages OpenAI's webhook endpoints of the project that the API key in OPENAI_API_KEY belongs to, through the official
openai package (npm i openai@latest).

  list                 every endpoint
  create               prints the signing secret, which OpenAI shows this once
  update               changes what is given; --event-types replaces the whole set
  delete               for good
  rotate-secret        prints the new signing secret; the old one stays valid for 24 hours
  test                 has OpenAI deliver a sample event; exit code 1 if the answer is not 200
  event-types          what an endpoint of this project can receive; marks types without a schema here

Options:
  --name NAME          for people
  --url URL            where OpenAI delivers to: https
  --event-types TYPES  types and families, separated by commas or given several times: batch.*,response.completed;
                       "all" is every type that the project can receive
  --revoke-old-secret  the old secret ends at once; deliveries are refused until the receiver has the new one
  --yes                confirms delete
  --base-url URL       another address of the API; default OPENAI_BASE_URL, else OpenAI's
  --json               what the API answers: one JSON document; list and event-types print one object a line

Exit code 0 when it was done, 1 when OpenAI refused it or could not be reached.

Examples:
  openai-webhook endpoints create --name orders --url https://example.com/webhooks/openai --event-types 'batch.*'
  openai-webhook endpoints test whe_123 batch.completed
  openai-webhook endpoints rotate-secret whe_123 --json | jq -r .signing_secret
`

/** @param load imports the openai package, which may not be installed */
export function endpointsCommand (load: () => Promise<SDK>): Command {
  return {
    summary: 'lists, creates, updates, deletes and tests endpoints at OpenAI, rotates their secrets',
    help,
    options: {
      name: { type: 'string' },
      url: { type: 'string' },
      'event-types': { type: 'string', multiple: true },
      'revoke-old-secret': { type: 'boolean' },
      yes: { type: 'boolean' },
      'base-url': { type: 'string' },
      json: { type: 'boolean' }
    },
    run: async (args, terminal) => {
      const act = plan(args)
      const { client: { webhooks }, explain } = await openApi(args, terminal, load)
      if (!('create' in webhooks)) {
        throw new CommandError('this command needs a newer openai package, one that has webhook endpoints: npm i openai@latest')
      }
      try {
        return await act({
          webhooks,
          read: { signal: terminal.signal },
          // Writes are never retried: if the answer to a rotation were lost, a second rotation would revoke the secret that is in use.
          write: { signal: terminal.signal, maxRetries: 0 },
          print: (document, readable) => { terminal.out(args.values['json'] === true ? `${JSON.stringify(document)}\n` : readable) },
          terminal
        })
      } catch (error) {
        throw error instanceof CommandError ? error : new CommandError(explain(error))
      }
    }
  }
}

export const endpoints = endpointsCommand(async () => await import('openai'))

const actions: Readonly<Record<string, Action>> = {
  list: {
    takes: [],
    options: [],
    plan: () => async api => {
      const { data: page, response } = await api.webhooks.list({}, api.read).withResponse()
      // The SDK parses a page that is not the API's as an empty list.
      if (!/\bjson\b/.test(String(response.headers.get('content-type')))) throw new Error('expected a list of webhook endpoints')
      let count = 0
      for await (const endpoint of page) {
        count++
        api.print(endpoint, paragraphOf(endpoint, api))
      }
      if (count === 0) api.terminal.err('the project of this API key has no webhook endpoints\n')
      return EXIT.ok
    }
  },

  create: {
    takes: [],
    options: ['name', 'url', 'event-types'],
    plan: args => {
      const [name, url] = [required(args, 'name'), required(args, 'url')]
      const names = eventTypes(args)
      if (names === undefined) throw usageError('create: expected --event-types TYPES')
      return async api => {
        const body = { name, url, event_types: await expand(names, api) }
        const endpoint = expected('webhook_endpoint', await api.webhooks.create(body, api.write))
        api.print(endpoint, `${paragraphOf(endpoint, api)}
The signing secret is shown this once. Put it into the receiver's environment:

OPENAI_WEBHOOK_SECRET=${endpoint.signing_secret}
`)
        return EXIT.ok
      }
    }
  },

  update: {
    takes: ['ID'],
    options: ['name', 'url', 'event-types'],
    plan: (args, id) => {
      const [name, url, names] = [text(args, 'name'), text(args, 'url'), eventTypes(args)]
      if (name === undefined && url === undefined && names === undefined) {
        throw usageError('update: expected --name, --url or --event-types')
      }
      return async api => {
        const body = {
          ...(name !== undefined && { name }),
          ...(url !== undefined && { url }),
          ...(names !== undefined && { event_types: await expand(names, api) })
        }
        const endpoint = expected('webhook_endpoint', await api.webhooks.update(id, body, api.write))
        api.print(endpoint, paragraphOf(endpoint, api))
        return EXIT.ok
      }
    }
  },

  delete: {
    takes: ['ID'],
    options: ['yes'],
    plan: (args, id) => {
      if (args.values['yes'] !== true) throw usageError(`delete: ${id} and its secret would be gone for good; confirm it with --yes`)
      return async api => {
        const result = expected('webhook_endpoint.deleted', await api.webhooks.delete(id, api.write))
        api.print(result, `deleted ${oneLine(result.id)}\n`)
        return EXIT.ok
      }
    }
  },

  'rotate-secret': {
    takes: ['ID'],
    options: ['revoke-old-secret'],
    plan: (args, id) => async api => {
      const keep = args.values['revoke-old-secret'] !== true
      const body = { keep_old_secret_active_for_24_hours: keep }
      const endpoint = expected('webhook_endpoint', await api.webhooks.rotateSecret(id, body, api.write))
      const rotated = `${oneLine(endpoint.id)} has a new signing secret, shown this once.`
      api.print(endpoint, keep
        ? `${rotated} ${overlap(endpoint.signing_secret)}`
        : `${rotated} The old one has ended: put the new one into the receiver's environment now.

OPENAI_WEBHOOK_SECRET=${endpoint.signing_secret}
`)
      return EXIT.ok
    }
  },

  test: {
    takes: ['ID', 'TYPE'],
    options: [],
    plan: (_args, id, type) => async api => {
      const [eventType, ...others] = await expand([type], api)
      if (eventType === undefined || others.length > 0) throw usageError(`test: expected one event type, got "${oneLine(type)}"`)
      const result = expected('webhook_endpoint.test', await api.webhooks.test(id, { event_type: eventType }, api.write))
      const ok = result.status_code === 200
      api.print(result, `${oneLine(result.event_type)}: the endpoint answered ${result.status_code}${ok ? '' : ', which OpenAI takes for a failure: only 200 is not'}\n`)
      return ok ? EXIT.ok : EXIT.failed
    }
  },

  'event-types': {
    takes: [],
    options: [],
    plan: () => async api => {
      const { data } = expected('list', await api.webhooks.eventTypes.list(api.read))
      for (const type of data) {
        const schema = Object.hasOwn(officialEntries, type)
        api.print({ type, schema }, schema ? `${type}\n` : `${oneLine(type)}  ${paint(api.terminal, 'yellow', 'no schema here: goes to onAny and onUnhandled handlers')}\n`)
      }
      return EXIT.ok
    }
  }
}

/** @throws CommandError with exit code 2 */
function plan (args: Arguments): (api: Input) => Promise<number> {
  const [name, ...given] = args.positionals
  const names = Object.keys(actions)
  if (name === undefined) throw usageError(`endpoints: expected one of ${names.join(', ')}`)
  const action = Object.hasOwn(actions, name) ? actions[name] : undefined
  if (action === undefined) throw usageError(`endpoints: unknown action "${oneLine(name)}"${nearest(name, names)}`)
  if (given.length !== action.takes.length) {
    throw usageError(`${name}: expected ${action.takes.length === 0 ? 'nothing more' : action.takes.join(' and ')}, got ${given.length === 0 ? 'nothing' : `"${oneLine(given.join(' '))}"`}`)
  }
  for (const option of Object.keys(args.values)) {
    if (!['base-url', 'json', ...action.options].includes(option)) throw usageError(`${name}: --${option} is of no use here`)
  }
  const [first = '', second = ''] = given
  if (action.takes.length > 0 && !/^[\w-]+$/.test(first)) throw usageError(`${name}: expected an endpoint's id such as whe_123, got "${oneLine(first)}"`)
  return action.plan(args, first, second)
}

/** @throws CommandError with exit code 2 */
function required (args: Arguments, name: string): string {
  const value = text(args, name)
  if (value === undefined || value === '') throw usageError(`create: expected --${name} ${name.toUpperCase()}`)
  return value
}

/** The event types and families of `--event-types`, or `undefined` when the option was not given. @throws CommandError with exit code 2 */
function eventTypes ({ values }: Arguments): string[] | undefined {
  const given = values['event-types'] as string[] | undefined
  const names = given?.flatMap(list => list.split(',')).map(name => name.trim()).filter(name => name !== '')
  if (names?.length === 0) throw usageError('--event-types: expected at least one event type')
  return names
}

/**
 * Replaces families by their event types, without repetition. A name that this package does not know is looked up among the types that the
 * project can receive, so that a newer type is accepted and a misspelt one is reported.
 *
 * @throws CommandError with exit code 2
 */
async function expand (names: readonly string[], api: Input): Promise<EventTypes> {
  const isKnown = (name: string): boolean => Object.hasOwn(officialEntries, name)
  const available = names.every(isKnown) ? [] : expected('list', await api.webhooks.eventTypes.list(api.read)).data
  const types = names.flatMap(name => {
    if (isKnown(name)) return [name]
    const matching = available.filter(type => name === 'all' || matches(name, type))
    if (matching.length > 0) return matching
    throw usageError(`unknown event type "${oneLine(name)}"${nearest(name, available)}: openai-webhook endpoints event-types lists them`)
  })
  // The SDK's type for event names may be older than OpenAI's list.
  return [...new Set(types)] as EventTypes
}

/** Checks that the answer is one of the API's, because a server that is not the API may answer 200 as well. @throws Error */
function expected<Answer extends { object: string }> (object: Answer['object'], answer: Answer): Answer {
  if ((answer as Partial<Answer> | undefined)?.object !== object) throw new Error(`expected a ${object}`)
  return answer
}

function paragraphOf ({ id, name, url, event_types: types, signing_secret_hint: hint }: Endpoint, { terminal }: Input): string {
  return `${paint(terminal, 'bold', oneLine(id))}  ${oneLine(name)}
  delivers to  ${oneLine(url)}
  event types  ${oneLine(types.join(', '))}
  secret       ${oneLine(hint ?? 'no hint')}
`
}

function overlap (secret: string): string {
  return `The old one stays valid for 24 hours:
until then the receiver has to accept both.

In its environment, the previous secret being the value that OPENAI_WEBHOOK_SECRET has now:

OPENAI_WEBHOOK_SECRET_PREVIOUS="$OPENAI_WEBHOOK_SECRET"
OPENAI_WEBHOOK_SECRET=${secret}

In its code:

await app.register(openaiWebhook, {
  secret: [process.env['OPENAI_WEBHOOK_SECRET'], process.env['OPENAI_WEBHOOK_SECRET_PREVIOUS']].filter(secret => secret !== undefined)
})

After 24 hours remove OPENAI_WEBHOOK_SECRET_PREVIOUS; the code can stay.
`
}
