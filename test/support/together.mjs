// Runs npm scripts at the same time, each to its end, and fails when one of them fails. The output of a script is printed when it ends.
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { text } from 'node:stream/consumers'

const codes = await Promise.all(process.argv.slice(2).map(async script => {
  const child = spawn('npm', ['run', '--silent', script], { stdio: ['ignore', 'pipe', 'pipe'], shell: process.platform === 'win32' })
  const [out, err, [code]] = await Promise.all([text(child.stdout), text(child.stderr), once(child, 'close')])
  process.stdout.write(out)
  process.stderr.write(err)
  return code
}))
process.exitCode = codes.find(code => code !== 0) ?? 0
