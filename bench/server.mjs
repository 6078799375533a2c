// One contender in a process of its own: `server.mjs "<module>" '{…options}'`.
import { once } from 'node:events'
import { answerParent } from './processes.mjs'

const [module, options] = process.argv.slice(2).map(arg => JSON.parse(arg))
const { build, untilHandled } = await import(`./contenders/${module}.mjs`)
const app = await build(options)
const server = app.server ?? app // Fastify's, or one of Node's

if (app === server) await once(app.listen(0, '127.0.0.1'), 'listening')
else await app.listen({ port: 0, host: '127.0.0.1' })

answerParent({
  /** CPU µs of the whole process so far, its garbage collector's threads included. */
  cpu () {
    const { user, system } = process.cpuUsage()
    return user + system
  },

  /** Bytes that survive a collection; needs --expose-gc. */
  memory () {
    globalThis.gc()
    globalThis.gc()
    const { heapUsed, external, rss } = process.memoryUsage()
    return { live: heapUsed + external, rss }
  },

  /** Answers when the handlers of so many deliveries have run. */
  handled: count => untilHandled(count)
}, { port: server.address().port })
