import { createRequire } from 'node:module'
import { CommandError, EXIT, parse, usageError } from './command.ts'
import type { Command, Terminal } from './command.ts'
import { nearest } from '../nearest.ts'

/** Each command is loaded on use, so that one command does not load the modules of the others. Only the overview loads them all. */
const commands: Readonly<Record<string, () => Promise<Command>>> = {
  trigger: async () => (await import('./trigger.ts')).trigger,
  listen: async () => (await import('./listen.ts')).listen,
  replay: async () => (await import('./replay.ts')).replay,
  diagnose: async () => (await import('./diagnose.ts')).diagnose,
  dead: async () => (await import('./dead.ts')).dead,
  reconcile: async () => (await import('./reconcile.ts')).reconcile,
  endpoints: async () => (await import('./endpoints.ts')).endpoints
}

/**
 * Runs one command line.
 *
 * @param argv without the program's name
 * @returns the exit code: 0 done, 1 failed, 2 wrong usage
 */
export async function main (argv: readonly string[], terminal: Terminal): Promise<number> {
  try {
    return await dispatch(argv, terminal)
  } catch (error) {
    terminal.err(`openai-webhook: ${error instanceof CommandError ? error.message : `unexpected: ${String(error)}`}\n`)
    return error instanceof CommandError ? error.exitCode : EXIT.failed
  }
}

async function dispatch ([name, ...rest]: readonly string[], terminal: Terminal): Promise<number> {
  if (name === undefined || name === '--help' || name === '-h' || name === 'help') {
    const [topic] = rest
    if (name === 'help' && topic !== undefined) return await dispatch([topic, '--help'], terminal)
    terminal[name === undefined ? 'err' : 'out'](await overview())
    return name === undefined ? EXIT.usage : EXIT.ok
  }
  if (name === '--version' || name === '-v') {
    terminal.out(`${version()}\n`)
    return EXIT.ok
  }
  const load = Object.hasOwn(commands, name) ? commands[name] : undefined
  if (load === undefined) throw usageError(`unknown command "${name}"${nearest(name, Object.keys(commands))}`)
  const command = await load()
  const args = parse(rest, { help: { type: 'boolean', short: 'h' }, ...command.options })
  if (args.values['help'] === true) {
    terminal.out(command.help)
    return EXIT.ok
  }
  return await command.run(args, terminal)
}

async function overview (): Promise<string> {
  const lines = await Promise.all(Object.entries(commands).map(async ([name, load]) => `  ${name.padEnd(10)} ${(await load()).summary}`))
  return `openai-webhook: develop against OpenAI's webhooks without a tunnel or a dashboard

Usage: openai-webhook <command> [options]

${lines.join('\n')}

openai-webhook <command> --help tells the rest. The signing secret comes from OPENAI_WEBHOOK_SECRET or --secret-file.
Exit codes: 0 done, 1 failed, 2 wrong usage.
`
}

function version (): string {
  return (createRequire(import.meta.url)('fastify-openai-webhook/package.json') as { version: string }).version
}
