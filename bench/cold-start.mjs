// `cold-start.mjs "<contender's module>"`: from nothing to an app that is ready, in ms.
const [module] = process.argv.slice(2).map(arg => JSON.parse(arg))
const cpuMs = () => {
  const { user, system } = process.cpuUsage()
  return (user + system) / 1000
}

const before = { wall: performance.now(), cpu: cpuMs() }
const { build } = await import(`./contenders/${module}.mjs`)
const app = await build()
await app.ready()
const after = { wall: performance.now(), cpu: cpuMs() }

process.send({ result: { boot: { wall: after.wall - before.wall, cpu: after.cpu - before.cpu }, process: after } })
process.disconnect()
await app.close()
process.exit()
