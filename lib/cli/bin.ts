#!/usr/bin/env node
import { main } from './main.ts'

/** ms; longer than a command takes to end once it is interrupted. */
const GRACE = 3_000

const interrupted = new AbortController()
for (const name of ['SIGINT', 'SIGTERM'] as const) {
  process.once(name, () => {
    interrupted.abort()
    // Nothing interrupts the system's own waits, such as the one of opening a pipe that nobody writes to.
    setTimeout(process.kill, GRACE, process.pid, name).unref()
  })
}
process.stdout.on('error', ({ code }: NodeJS.ErrnoException) => {
  // The reader has closed the pipe, as `| head` does. What is sent or requeued does not depend on a reader. `listen` would never end.
  if (code === 'EPIPE') {
    if (process.argv[2] === 'listen') interrupted.abort()
    return
  }
  process.stderr.write(`openai-webhook: cannot write the output: ${code}\n`)
  process.exit(1)
})
process.stderr.on('error', () => {}) // `2>&1 | head` closes it too

process.exitCode = await main(process.argv.slice(2), {
  out: text => { process.stdout.write(text) },
  err: text => { process.stderr.write(text) },
  isTTY: !process.env['NO_COLOR'] && process.stdout.isTTY === true,
  env: process.env,
  signal: interrupted.signal
})
