import t from 'tap'
import { DEADLINE, UNAVAILABLE, answer, batchFailed, deliverUntil200, until } from '../support/faults.ts'
import { redelivered } from '../support/observe.ts'
import { queueing, startedBoss } from '../support/pgboss.ts'
import { PostgresServer, postgresMissing } from '../support/postgres.ts'
import { long } from '../support/size.ts'

t.test('pgboss: PostgreSQL goes', { skip: postgresMissing }, async t => {
  t.test('it stops: 503, nothing acknowledged is lost, and all goes on when it is back', async t => {
    const own = await PostgresServer.start(t, '-c', 'fsync=on')
    const boss = await startedBoss(t, own)
    const receiving = await queueing(t, boss, { worker: false, queueName: 'stopped' })
    const ids = Array.from({ length: 20 }, (_, i) => `wh_${i}`)
    t.same(await Promise.all(ids.map(async id => await answer(receiving.app, batchFailed(id)))), ids.map(() => '200'))
    await own.stop()
    const delivery = batchFailed('wh_during')
    t.equal(await answer(receiving.app, delivery), UNAVAILABLE)
    t.equal(await answer(receiving.app, redelivered(delivery)), UNAVAILABLE)
    await own.start()
    await deliverUntil200(receiving.app, redelivered(delivery))

    const working = await queueing(t, boss, { queueName: 'stopped' }, { path: false })
    await until('all to run', () => working.ran.length > ids.length)
    t.same([...working.ran].sort(), [...ids, 'wh_during'].sort())
    for (const id of ids) t.equal(await answer(receiving.app, batchFailed(id)), '200 duplicate', 'known, and not queued again')

    await own.stop()
    await until('the worker to tell of it', () => working.told.some(message => message.includes('ECONNREFUSED') || message.includes('terminat')))
    await own.start()
    await deliverUntil200(receiving.app, batchFailed('wh_after'))
    await until('the worker to go on', () => working.ran.includes('wh_after'))
    t.equal(working.ran.length, ids.length + 2)
    t.same(receiving.ran, [])
  })

  long(t, 'it hangs: 503 at the deadline, then queued and run once', {}, async t => {
    const own = await PostgresServer.start(t)
    const state = await queueing(t, await startedBoss(t, own), { queueName: 'hung' }, { deadline: 100 })
    const before = batchFailed('wh_before')
    await deliverUntil200(state.app, before)
    own.signal('SIGSTOP')
    const delivery = batchFailed('wh_hung')
    t.equal(await answer(state.app, delivery), DEADLINE)
    t.equal(await answer(state.app, redelivered(delivery)), DEADLINE, 'the retry joins it')
    own.signal('SIGCONT')
    await deliverUntil200(state.app, redelivered(delivery))
    await until('the delivery to run', () => state.ran.length === 2)
    t.match(await answer(state.app, redelivered(delivery)), /^200/)
    t.same(state.ran.sort(), ['wh_before', 'wh_hung'], 'in any order: the first may have been on its way from PostgreSQL when it hung')
  })
})
