import { spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { createServer } from 'node:net'

/** A redis-server on a free port that stores nothing on disk. */
export class Redis {
  #process

  /** @returns {Promise<Redis | undefined>} `undefined` when redis-server is not installed */
  static async start () {
    if (spawnSync('redis-server', ['--version']).error !== undefined) return undefined
    const redis = new Redis()
    redis.port = await freePort()
    redis.#process = spawn('redis-server', ['--port', String(redis.port), '--bind', '127.0.0.1', '--save', '', '--appendonly', 'no'], {
      stdio: ['ignore', 'pipe', 'inherit']
    })
    process.once('exit', redis.#kill) // redis-server does not notice when its parent has gone
    for await (const line of redis.#process.stdout) if (String(line).includes('Ready to accept connections')) break
    redis.#process.stdout.resume()
    return redis
  }

  async stop () {
    process.off('exit', this.#kill)
    this.#kill()
    await once(this.#process, 'exit')
  }

  #kill = () => { this.#process.kill() }
}

async function freePort () {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address()
  server.close()
  await once(server, 'close')
  return port
}
