import { AsyncLocalStorage } from 'node:async_hooks'
import Fastify from 'fastify'
import type { FastifyInstance } from 'fastify'
import t from 'tap'
import openaiWebhook, { memoryStore } from '../../lib/index.ts'
import { outcome, SECRET, sign, thin } from '../support/deliveries.ts'
import type { Signed } from '../support/deliveries.ts'
import { deferred, handled, redelivered } from '../support/observe.ts'

const RECEIVED = '200 {"received":true}'

// An injected request keeps no socket open, and the timer of a deadline alone keeps no process alive.
const alive = setInterval(() => {}, 1_000)
t.teardown(() => clearInterval(alive))

t.test('a delivery is not told or answered in the async context of another', async t => {
  const context = new AsyncLocalStorage<string>()

  /** Delivers both, the second while the first waits; what each request's onSend hook finds in its context. */
  async function contextsOf (app: FastifyInstance, first: Signed, second: Signed, both: () => void = () => {}): Promise<Array<string | undefined>> {
    const found: Array<string | undefined> = []
    app.addHook('onSend', async ({ headers }) => { found[Number(headers['x-nth'])] = context.getStore() })
    const nth = ({ headers, body }: Signed, n: number): Signed => ({ body, headers: { ...headers, 'x-nth': String(n) } })
    const bothHandled = handled(app, 2)
    const one = context.run('first', () => outcome(app, nth(first, 0)))
    const two = context.run('second', () => outcome(app, nth(second, 1)))
    await bothHandled
    both()
    await Promise.all([one, two])
    return found
  }

  t.test('at the deadline', async t => {
    const app = Fastify()
    t.teardown(() => app.close())
    await app.register(openaiWebhook, { secret: SECRET, deadline: 20 })
    const end = deferred()
    const told: unknown[] = []
    app.openaiWebhook.on('batch.failed', () => end.promise)
    app.openaiWebhook.onError(() => { told.push(context.getStore()) })
    const [, second] = await contextsOf(app, sign(thin('batch.failed')), sign(thin('batch.failed')))
    t.not(second, 'first')
    t.equal(told.length, 2)
    t.not(told[1], 'first')
    end.resolve()
  })

  t.test('as it joins another', async t => {
    const app = Fastify()
    t.teardown(() => app.close())
    await app.register(openaiWebhook, { secret: SECRET })
    const end = deferred()
    app.openaiWebhook.on('batch.failed', () => end.promise)
    const delivery = sign(thin('batch.failed'))
    const found = await contextsOf(app, delivery, redelivered(delivery), end.resolve)
    t.same(found, ['first', 'second'])
  })

  t.test('as its claim is renewed', async t => {
    const app = Fastify()
    t.teardown(() => app.close())
    const renewed = deferred<unknown>()
    const store = { ...memoryStore(), extend: () => { renewed.resolve(context.getStore()); return true } }
    await app.register(openaiWebhook, { secret: SECRET, idempotency: { store, lease: 30 } })
    app.openaiWebhook.on('batch.failed', async () => { await renewed.promise })
    t.equal(await context.run('first', () => outcome(app)), RECEIVED)
    t.equal(await renewed.promise, undefined)
  })
})
