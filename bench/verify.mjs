// CPU time per verification: this package's standardWebhooks() and the `standardwebhooks` package. Needs `npm run build` first. Rounds are
// interleaved and medians are shown: compare figures of one run, not of different runs.
import { createSecretKey, randomBytes } from 'node:crypto'
import { Webhook } from 'standardwebhooks'
import { standardWebhooks } from '../dist/index.js'
import { median } from './statistics.mjs'

const ROUNDS = 31
const CPU_MS_A_ROUND = 40

const secretBytes = randomBytes(32)
const key = createSecretKey(secretBytes)
const webhook = new Webhook(`whsec_${secretBytes.toString('base64')}`)
const verify = standardWebhooks()

function delivery (size) {
  const head = '{"id":"evt_685c059ae3a481909bdc86819b066fb6","object":"event","created_at":1750861210,"type":"response.completed","data":{"id":"resp_123","text":"'
  const tail = '"}}'
  const rawBody = Buffer.from(head + 'x'.repeat(size - head.length - tail.length) + tail)
  const id = 'wh_685c059ae39c8190af8c71ed1022a24d'
  const date = new Date()
  return {
    rawBody,
    headers: {
      'webhook-id': id,
      'webhook-timestamp': String(Math.floor(date.getTime() / 1000)),
      'webhook-signature': webhook.sign(id, date, rawBody)
    }
  }
}

const contestants = {
  standardwebhooks: ({ rawBody, headers }) => webhook.verify(rawBody, headers, { jsonParse: false }),
  'standardWebhooks()': signed => verify(signed, [key])
}

/** CPU µs per call. */
function measure (run, signed, calls) {
  const start = process.cpuUsage()
  for (let i = 0; i < calls; i++) run(signed)
  const { user, system } = process.cpuUsage(start)
  return (user + system) / calls
}

const table = {}
for (const [label, size] of [['200 B', 200], ['2 KB', 2048], ['64 KB', 65_536]]) {
  const signed = delivery(size)
  const calls = {}
  const figures = {}
  for (const [name, run] of Object.entries(contestants)) {
    measure(run, signed, 500) // warm up
    calls[name] = Math.max(10, Math.ceil(CPU_MS_A_ROUND * 1000 / measure(run, signed, 200)))
    figures[name] = []
  }
  for (let round = 0; round < ROUNDS; round++) {
    for (const [name, run] of Object.entries(contestants)) figures[name].push(measure(run, signed, calls[name]))
  }
  const [theirs, ours] = Object.values(figures).map(median)
  table[label] = {
    'standardwebhooks (µs)': theirs.toFixed(1),
    'standardWebhooks() (µs)': ours.toFixed(1),
    ratio: (theirs / ours).toFixed(1)
  }
}

console.log(`CPU µs a verification, medians of ${ROUNDS} interleaved rounds, Node ${process.version}`)
console.table(table)
