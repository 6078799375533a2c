// `cold-start.mjs "<contender's module>"`: measures the time and the CPU time, in ms, until the app is ready and for its first delivery.
const [module] = process.argv.slice(2).map(arg => JSON.parse(arg))
const cpuMs = () => {
  const { user, system } = process.cpuUsage()
  return (user + system) / 1000
}

const now = () => ({ wall: performance.now(), cpu: cpuMs() })
const since = (start, end) => ({ wall: end.wall - start.wall, cpu: end.cpu - start.cpu })

const before = now()
const { build } = await import(`./contenders/${module}.mjs`)
const app = await build()
await app.ready()
const ready = now()

const { buildRequests, eventOf, PATH } = await import('./deliveries.mjs')
const [[request]] = buildRequests({ templates: [eventOf(200)], count: 1 })
const [head, payload] = request.toString().split('\r\n\r\n')
const headers = Object.fromEntries(head.split('\r\n').slice(1).map(line => line.split(': ')))
await app.inject('/not-there') // loads the modules of inject()
const start = now()
const { statusCode, body } = await app.inject({ method: 'POST', url: PATH, headers, payload })
const end = now()
if (statusCode !== 200) throw new Error(`expected 200, got ${statusCode} ${body}`)

process.send({ result: { boot: since(before, ready), process: ready, delivery: since(start, end) } })
process.disconnect()
await app.close()
process.exit()
