import Database from 'libsql'
import t from 'tap'
import { background } from '../../lib/index.ts'
import { bullmq } from '../../lib/runners/bullmq.ts'
import { pgboss } from '../../lib/runners/pgboss.ts'
import { durable } from '../../lib/sqlite/index.ts'
import { build, post, sign, thin } from '../support/deliveries.ts'

t.test('a runner belongs to one app', async t => {
  const runner = background()
  const app = await build(t, { runner })
  let runs = 0
  app.openaiWebhook.on('batch.failed', () => { runs++ })
  await app.ready()
  const second = await build(t, { runner })
  await t.rejects(async () => await second.ready(), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: /^expected a runner of its own/ })
  await second.close()
  t.equal((await post(app, sign(thin('batch.failed')))).statusCode, 200, 'one that failed to start closes no other\'s')
  await app.close()
  t.equal(runs, 1)

  for (const [name, closed] of Object.entries({ background: runner, durable: durable(new Database(':memory:')) })) {
    const unstarted = await build(t, { runner: closed })
    await unstarted.close()
    if (name === 'durable') {
      const first = await build(t, { runner: closed })
      await first.ready()
      await first.close()
    }
    const next = await build(t, { runner: closed })
    await t.rejects(async () => await next.ready(), { code: 'FST_OPENAI_WEBHOOK_INVALID_OPTIONS', message: `${name}: expected a runner that no app has closed: make one for each app` })
  }
  for (const unstarted of [background(), bullmq({ connection: {} }), pgboss({ boss: { previewRedrive () {}, work () {} } as never })]) await unstarted.close?.()
})
