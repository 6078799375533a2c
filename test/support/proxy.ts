import { once } from 'node:events'
import { connect, createServer } from 'node:net'
import type { AddressInfo } from 'node:net'

/** As from a server that is shut down. */
const FATAL = (() => {
  const fields = Buffer.from('SFATAL\0VFATAL\0C57P01\0Mterminating connection due to administrator command\0\0')
  const head = Buffer.from('E\0\0\0\0')
  head.writeInt32BE(fields.length + 4, 1)
  return Buffer.concat([head, fields])
})()
const READY = Buffer.from([0x5a, 0, 0, 0, 5, 0x49])

/** Between a client and a PostgreSQL server: once it is told to, it cuts the connection between a COMMIT and its answer. */
export class CuttingProxy {
  /** How many COMMITs are yet to be cut off. */
  cuts = 0
  /** How many connections are yet to be ended in the instant in which they are ready. */
  stillborn = 0
  port = 0

  static async start (t: { teardown: (fn: () => unknown) => void }, target: number): Promise<CuttingProxy> {
    const proxy = new CuttingProxy()
    const server = createServer(client => {
      const upstream = connect(target, '127.0.0.1')
      let cut = false
      client.on('data', data => {
        if (proxy.cuts > 0 && data.includes('COMMIT')) {
          proxy.cuts--
          cut = true
        }
        upstream.write(data)
      })
      // The server has answered, so it has committed.
      upstream.on('data', data => {
        if (proxy.stillborn > 0 && data.includes(READY)) {
          proxy.stillborn--
          return client.end(Buffer.concat([data, FATAL]))
        }
        if (!cut) return client.write(data)
        client.destroy()
        upstream.destroy()
      })
      for (const [socket, other] of [[client, upstream], [upstream, client]] as const) socket.on('error', () => {}).on('close', () => { other.destroy() })
    }).listen(0, '127.0.0.1')
    await once(server, 'listening')
    t.teardown(() => { server.close() })
    proxy.port = (server.address() as AddressInfo).port
    return proxy
  }
}
