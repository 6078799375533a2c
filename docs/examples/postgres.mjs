// Shows what an inbox does, with a PostgreSQL inside this process: no server, no secret, no network.
//
//   node docs/examples/postgres.mjs
import { PGlite } from '@electric-sql/pglite'
import Fastify from 'fastify'
import openaiWebhook from 'fastify-openai-webhook'
import { postgresInbox } from 'fastify-openai-webhook/postgres'
import { deliver, redeliver, sampleEvent, testSecret } from 'fastify-openai-webhook/testing'

const db = await PGlite.create()
await db.exec("create table orders (batch text primary key, imports int not null default 0); insert into orders values ('batch_1')")
const inbox = postgresInbox(db)
let fails = true

// Each replica has its own memory: they share only the database.
async function replica () {
  const app = Fastify()
  await app.register(openaiWebhook, { secret: testSecret })
  app.openaiWebhook.on('batch.completed', inbox.once('settle', async (tx, event) => {
    await tx.query('update orders set imports = imports + 1 where batch = $1', [event.data.id])
    if (fails) throw new Error('the process is killed, say')
  }))
  return app
}

async function imports () {
  const { rows } = await db.query('select imports from orders')
  return rows
}

const [one, other] = [await replica(), await replica()]
const first = await deliver(one, sampleEvent('batch.completed', { data: { id: 'batch_1' } }))
console.log('A handler that fails after its update:', first.statusCode, await imports())
fails = false
const second = await redeliver(one, first)
console.log('OpenAI delivers again:', second.statusCode, await imports())
const third = await redeliver(other, first)
console.log('And once more, to a replica that knows nothing of it:', third.statusCode, await imports())

await Promise.all([one.close(), other.close()])
await inbox.close()
await db.close()
