// A receiver in its own process, whose memory is measured: `node --expose-gc uploads.mjs http1|http2`. Each line on standard input is
// answered by one line on standard output: the memory that it holds and the bytes that it has read.

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
  // The memory of an ArrayBuffer is freed in the turn after its collection.
  for (let n = 0; n < 3; n++) {
    globalThis.gc()
    await new Promise(resolve => setImmediate(resolve))
  }
  const { rss, heapUsed, external } = process.memoryUsage()
  console.log(JSON.stringify({ rss, held: heapUsed + external, read: sockets.reduce((sum, { bytesRead }) => sum + bytesRead, 0) }))
})
