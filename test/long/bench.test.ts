import t from 'tap'
import { redisMissing } from '../support/redis.ts'

interface Contender { label: string, module: string, options?: object, needs?: string, checksNothing?: boolean }

interface Server { stop: () => Promise<void> }

interface Bench {
  has: (contender: Contender) => boolean
  serve: (contender: Contender) => Promise<Server>
  check: (name: string, server: Server, contender: Contender, templates: string[][]) => Promise<string>
  send: (server: Server, plan: object) => Promise<{ answer: string, cpu: number, rate: number, p50: number, p99: number }>
  close: () => Promise<void>
}

const load = async (file: string): Promise<any> => await import(new URL(`../../bench/${file}`, import.meta.url).href)

const { Bench } = await load('bench.mjs') as { Bench: { start: () => Promise<Bench> } }
const { contenders } = await load('contenders/index.mjs') as { contenders: Record<string, Contender> }
const { eventOf } = await load('deliveries.mjs') as { eventOf: (size: number) => string[] }
const { templatesOf, types } = await load('event-types.mjs') as { templatesOf: (types: string[], size: number) => string[][], types: string[] }

t.test('contenders', async t => {
  const bench = await Bench.start()
  t.teardown(() => bench.close())
  const templates = [200, 2_048, 65_536].map(eventOf)

  for (const [name, contender] of Object.entries(contenders)) {
    const skip = contender.needs === 'redis' ? redisMissing : false
    t.test(`${name} answers a correct delivery 200${contender.checksNothing === true ? '' : ' and refuses a forged one'}`, { skip }, async t => {
      t.ok(bench.has(contender), 'what it needs is there')
      const server = await bench.serve(contender)
      t.teardown(() => server.stop())
      t.match(await bench.check(name, server, contender, templates), /^200 /)
    })
  }

  t.test('one that accepts what is forged does not pass', async t => {
    const bare = contenders['bare']!
    const server = await bench.serve(bare)
    t.teardown(() => server.stop())
    await t.rejects(bench.check('bare', server, { ...bare, checksNothing: false }, templates), { message: /^bare answers a delivery that is forged 200 / })
  })

  t.test('one that refuses a correct delivery does not pass, nor one whose answers differ', async t => {
    const ours = { ...contenders['ours-sync']!, options: { secretCount: 2, types: ['response.completed'] } }
    const server = await bench.serve(ours)
    t.teardown(() => server.stop())
    const unknown = [['{"id":"', '","type":1}']]
    await t.rejects(bench.check('ours', server, ours, unknown), { message: /^ours answers a correct delivery 400 / })
    await t.rejects(bench.send(server, { templates: [...templates, ...unknown], count: 8 }), { message: /^expected all answers to be the same, got \{"200 .*"400 / })
  })

  t.test('no two deliveries are the same, of whatever type they are', async t => {
    t.equal(types.length, 40)
    const ours = { ...contenders['ours-sync']!, options: { types: [types[0]], ownTypes: types.filter(type => type.startsWith('own.')) } }
    const server = await bench.serve(ours)
    t.teardown(() => server.stop())
    const sent = await bench.send(server, { templates: templatesOf(types, 512), count: 200 })
    t.equal(sent.answer, '200 {"received":true}', 'a duplicate would be answered differently')
    t.ok(sent.cpu > 0 && sent.rate > 0 && sent.p50 > 0 && sent.p99 >= sent.p50)
  })
})
