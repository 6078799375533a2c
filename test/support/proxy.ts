import { once } from 'node:events'
import { connect, createServer } from 'node:net'
import type { AddressInfo } from 'node:net'

/** Between a client and a PostgreSQL server: once it is told to, it cuts the connection between a COMMIT and its answer. */
export class CuttingProxy {
  /** How many COMMITs are yet to be cut off. */
  cuts = 0
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
