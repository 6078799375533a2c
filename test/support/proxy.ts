import { once } from 'node:events'
import { connect, createServer } from 'node:net'
import type { AddressInfo } from 'node:net'

/** The error message of a server that is being shut down. */
const FATAL = (() => {
  const fields = Buffer.from('SFATAL\0VFATAL\0C57P01\0Mterminating connection due to administrator command\0\0')
  const head = Buffer.from('E\0\0\0\0')
  head.writeInt32BE(fields.length + 4, 1)
  return Buffer.concat([head, fields])
})()
const READY = Buffer.from([0x5a, 0, 0, 0, 5, 0x49])

/** A proxy between a client and a PostgreSQL server. On request it cuts the connection between a COMMIT and its answer. */
export class CuttingProxy {
  /** The number of COMMITs that will still be cut off. */
  cuts = 0
  /** The number of connections that will still be ended as soon as they are ready. */
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
      // The transaction has been committed once the server answers.
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
