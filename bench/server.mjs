// One contender in a process of its own: `server.mjs "<module>" '{…options}'`.
import { once } from 'node:events'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { answerParent } from './processes.mjs'

// An app has a heap of its own. Without one, chance decides whose first full collection comes between V8's first look at
// process.nextTick and its optimization. It takes the shape of a tick for dead then, and each tick costs that server 0.6 µs
// more for as long as it lives: a tenth of a delivery.
globalThis.app = Array.from({ length: 250_000 }, (_, index) => ({ index, name: `${index}` }))

setFlagsFromString('--expose-gc')
const collectGarbage = runInNewContext('gc')

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

  /** Bytes that survive a collection. */
  memory () {
    delete globalThis.app
    collectGarbage()
    collectGarbage()
    const { heapUsed, external, rss } = process.memoryUsage()
    return { live: heapUsed + external, rss }
  },

  /** Answers when the handlers of so many deliveries have run. */
  handled: count => untilHandled(count)
}, { port: server.address().port })
