// The sender, in its own process: keep-alive connections over real sockets, with one request in flight on each. Each connection sends its
// next request as soon as it has an answer. With `arrivals` a second, requests are sent when they are due, and the time that a request
// waits for a connection is part of its latency.
import { once } from 'node:events'
import { connect } from 'node:net'
import { availableParallelism } from 'node:os'
import { buildRequests } from './deliveries.mjs'
import { answerParent } from './processes.mjs'

let requests = []
let connections = []
let polling = false
/** Requests a second; `undefined` means as fast as answers come. */
let arrivals

answerParent({
  /** Signs the requests and opens the connections, none of which is measured. */
  async prepare ({ port, connections: count, poll, arrivals: rate, ...plan }) {
    requests = buildRequests(plan)
    arrivals = rate
    polling = poll && availableParallelism() > 1
    connections = await Promise.all(Array.from({ length: Math.min(count, requests.length) }, () => open(port)))
  },

  async go () {
    const latencies = new Float64Array(requests.length)
    const answers = new Map()
    let next = 0
    let answered = 0
    const start = performance.now()
    const due = index => arrivals === undefined ? performance.now() : start + index * 1_000 / arrivals
    const idle = []
    let clock
    // Waking a sleeping sender costs the server up to a third of the CPU time of an answer, and the cost varies. So the sender stays awake.
    if (polling) poll()
    await new Promise((resolve, reject) => {
      const ended = error => {
        polling = false
        clearInterval(clock)
        reject(error instanceof Error ? error : new Error(`the server closed a connection after ${answered} answers`))
      }
      const senders = connections.map(socket => converse(socket, ended))
      if (arrivals === undefined) for (const send of senders) send()
      else {
        idle.push(...senders)
        clock = setInterval(() => { while (idle.length > 0 && next < requests.length && due(next) <= performance.now()) idle.pop()() }, 1)
      }

      function converse (socket, ended) {
        let index = 0
        let sentAt = 0
        let received = ''

        function send () {
          if (next === requests.length) return
          if (due(next) > performance.now()) return idle.push(send)
          index = next++
          sentAt = due(index)
          const pieces = requests[index]
          if (pieces.length === 1) return socket.write(pieces[0])
          socket.cork()
          for (const piece of pieces) socket.write(piece)
          socket.uncork()
        }

        socket.on('error', ended)
        socket.on('close', ended)
        socket.on('data', chunk => {
          received = received === '' ? chunk.latin1Slice() : received + chunk.latin1Slice()
          const answer = parse(received)
          if (answer === undefined) return
          latencies[index] = performance.now() - sentAt
          received = ''
          answers.set(answer, (answers.get(answer) ?? 0) + 1)
          if (++answered === requests.length) {
            polling = false
            clearInterval(clock)
            return resolve()
          }
          // A refusal may arrive before the body has been sent.
          if (socket.writableNeedDrain) socket.once('drain', send)
          else send()
        })
        return send
      }
    })
    const seconds = (performance.now() - start) / 1000
    for (const socket of connections) socket.removeAllListeners('close').destroy()
    connections = []
    latencies.sort()
    const percentile = share => latencies[Math.min(latencies.length - 1, Math.floor(latencies.length * share))]
    return { seconds, p50: percentile(0.5), p99: percentile(0.99), worst: latencies.at(-1), answers: Object.fromEntries(answers) }
  }
})

function poll () {
  if (polling) setImmediate(poll)
}

async function open (port) {
  const socket = connect(port, '127.0.0.1').setNoDelay(true)
  await once(socket, 'connect')
  return socket
}

/** @returns {string | undefined} the status and the body, once the answer is complete */
function parse (text) {
  const end = text.indexOf('\r\n\r\n')
  if (end === -1) return undefined
  const length = /\r\ncontent-length: *(\d+)/i.exec(text)?.[1]
  const isWhole = length === undefined ? text.endsWith('\r\n0\r\n\r\n') : text.length === end + 4 + Number(length)
  // The refusal says by how much a timestamp is off, which grows during the run.
  return isWhole ? `${text.slice(9, 12)} ${text.slice(end + 4).replace(/\d+ s (behind|ahead)/, 'some s $1')}` : undefined
}
