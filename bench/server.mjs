// One contender in its own process: `server.mjs "<module>" '{…options}'`.
import { once } from 'node:events'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { answerParent } from './processes.mjs'

// Simulates the heap of a real app. Without it, in some servers by chance, a full garbage collection comes between the first profiling of
// process.nextTick by V8 and its optimization. V8 then takes the hidden class of a tick for dead, and each tick costs that server 0.6 µs
// more, a tenth of a delivery, for as long as it runs.
globalThis.app = Array.from({ length: 250_000 }, (_, index) => ({ index, name: `${index}` }))

setFlagsFromString('--expose-gc')
const collectGarbage = runInNewContext('gc')

const [module, options] = process.argv.slice(2).map(arg => JSON.parse(arg))
const { build, untilHandled } = await import(`./contenders/${module}.mjs`)
const app = await build(options)
const server = app.server ?? app // Fastify's server, or a server of node:http

if (app === server) await once(app.listen(0, '127.0.0.1'), 'listening')
else await app.listen({ port: 0, host: '127.0.0.1' })

answerParent({
  /** CPU µs of the whole process so far, including the threads of its garbage collector. */
  cpu () {
    const { user, system } = process.cpuUsage()
    return user + system
  },

  /** Bytes that survive a collection. */
  memory () {
    delete globalThis.app
    collectGarbage()
    collectGarbage()
    const { heapUsed, external, rss } = process.memoryUsage()
    return { live: heapUsed + external, rss }
  },

  /** Answers once the handlers of this many deliveries have run. */
  handled: count => untilHandled(count)
}, { port: server.address().port })
