#!/usr/bin/env node
import { main } from './main.ts'

const interrupted = new AbortController()
for (const name of ['SIGINT', 'SIGTERM'] as const) process.once(name, () => interrupted.abort())
// Writing fails once the reader has closed the pipe, as `| head` does. That is not a failure of the command.
process.stdout.on('error', () => process.exit())

process.exitCode = await main(process.argv.slice(2), {
  out: text => { process.stdout.write(text) },
  err: text => { process.stderr.write(text) },
  isTTY: !process.env['NO_COLOR'] && process.stdout.isTTY === true,
  env: process.env,
  signal: interrupted.signal
})
