// A receiver in a process of its own, whose memory is measured: `node --expose-gc uploads.mjs http1|http2`. Each line on its
// standard input is answered by one on its standard output: what its memory holds and what it has read, in bytes.

import { createInterface } from 'node:readline'
import Fastify from 'fastify'
import openaiWebhook from '../../dist/index.js'

const app = Fastify({ http2: process.argv[2] === 'http2', forceCloseConnections: true })
await app.register(openaiWebhook, { secret: process.env.SECRET })
app.post('/marked', { config: { openaiWebhook: {} } }, async () => {})
app.addContentTypeParser('application/octet-stream', (_request, payload, done) => {
  payload.on('end', () => done(null)).resume()
})
app.post('/sink', async () => 'drained')
const sockets = []
app.server.on('connection', socket => { sockets.push(socket) })
await app.listen({ port: 0, host: '127.0.0.1' })
console.log(app.server.address().port)

createInterface({ input: process.stdin }).on('line', async () => {
  // What an ArrayBuffer held is freed after the turn in which it was collected.
  for (let n = 0; n < 3; n++) {
    globalThis.gc()
    await new Promise(resolve => setImmediate(resolve))
  }
  const { rss, heapUsed, external } = process.memoryUsage()
  console.log(JSON.stringify({ rss, held: heapUsed + external, read: sockets.reduce((sum, { bytesRead }) => sum + bytesRead, 0) }))
})
