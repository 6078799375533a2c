import { execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { promisify } from 'node:util'
import { freePort } from './port.mjs'

export { prometheusMissing } from './missing.ts'

type Teardown = { teardown: (fn: () => unknown) => void }

/** Runs promtool. Resolves to its output, and rejects with it when promtool finds a fault. */
export async function promtool (args: readonly string[], input = ''): Promise<string> {
  const running = promisify(execFile)('promtool', args)
  running.child.stdin!.end(input)
  const { stdout, stderr } = await running
  return stdout + stderr
}

/**
 * Starts a real Prometheus on a free port, with its data in `directory`.
 *
 * @returns a function that queries its HTTP API at a path
 */
export async function startPrometheus (t: Teardown, configuration: string, directory: string): Promise<(path: string) => Promise<unknown>> {
  const origin = `127.0.0.1:${await freePort()}`
  const child = spawn('prometheus', [
    `--config.file=${configuration}`, `--storage.tsdb.path=${directory}`, `--web.listen-address=${origin}`, '--web.enable-lifecycle'
  ], { stdio: ['ignore', 'ignore', 'pipe'] })
  t.teardown(async () => {
    child.kill('SIGKILL')
    if (child.exitCode === null && child.signalCode === null) await once(child, 'exit')
  })
  await new Promise<void>((resolve, reject) => {
    let log = ''
    // stderr is read until the end, because a Go program dies when nobody reads its stderr.
    child.stderr.setEncoding('utf8').on('data', (text: string) => {
      log += text
      if (log.includes('Server is ready to receive web requests')) resolve()
    })
    child.on('error', reject).on('exit', () => reject(new Error(`prometheus ended: ${log}`)))
  })
  return async path => {
    const { status, data, error } = await (await fetch(`http://${origin}/api/v1/${path}`)).json() as { status: string, data: unknown, error?: string }
    if (status !== 'success') throw new Error(`${path}: ${error}`)
    return data
  }
}
