// Lists the deliveries whose attempts are used up, and gives new attempts to those that you name. The receiver may be
// running: it looks for them every second. `openai-webhook dead` does the same on the command line.
//
//   SQLITE_FILE=webhooks.db node docs/examples/sqlite-dead.mjs [webhook-id…]
import { durable } from 'fastify-openai-webhook/sqlite'
import Database from 'libsql'

const db = new Database(process.env.SQLITE_FILE ?? 'webhooks.db')
const runner = durable(db)
const wanted = process.argv.slice(2)

for (const delivery of runner.dead(1_000)) {
  const { webhookId, event, attempts, errors } = delivery
  const state = wanted.includes(webhookId) && runner.requeue(delivery) ? 'requeued' : 'dead'
  console.log(`${state} ${webhookId} ${event.type}, ${attempts} attempts: ${errors.map(({ message }) => message).join('; ')}`)
}
db.close()
