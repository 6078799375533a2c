#!/usr/bin/env node
import { main } from './main.ts'

const interrupted = new AbortController()
for (const name of ['SIGINT', 'SIGTERM'] as const) process.once(name, () => interrupted.abort())
process.stdout.on('error', ({ code }: NodeJS.ErrnoException) => {
  // The reader has closed the pipe, as `| head` does. That is not a failure of the command.
  if (code === 'EPIPE') process.exit()
  process.stderr.write(`openai-webhook: cannot write the output: ${code}\n`)
  process.exit(1)
})

process.exitCode = await main(process.argv.slice(2), {
  out: text => { process.stdout.write(text) },
  err: text => { process.stderr.write(text) },
  isTTY: !process.env['NO_COLOR'] && process.stdout.isTTY === true,
  env: process.env,
  signal: interrupted.signal
})
