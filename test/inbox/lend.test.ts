import t from 'tap'
import { lend } from '../../lib/inbox/lend.ts'

const OVER = { code: 'FST_OPENAI_WEBHOOK_TRANSACTION_OVER', message: /handler "settle"/ }

t.test('what a client makes is lent with it, and rows and values are not', async t => {
  class Statement {
    readonly #sql: string
    constructor (sql: string) { this.#sql = sql }
    run (): string { return this.#sql }
    bind (): this { return this }
    iterate (): Iterator<number> { return { next: () => ({ done: false, value: 1 }) } }
  }
  const committing = Object.defineProperty((): string => 'committed', 'database', { value: () => 'the client' }) as (() => string) & { database: () => string, called?: string }
  committing.called = 'transaction'
  const row = { a: 1 }
  const rows = [row]
  const bare = Object.assign(Object.create(null) as object, row)
  const bytes = new Uint8Array([1])
  const client = {
    released: 0,
    release () { this.released++ },
    prepare: (sql: string) => new Statement(sql),
    adapted: () => ({ run: () => 'adapted' }),
    transaction: () => committing,
    row: () => row,
    rows: () => rows,
    bare: () => bare,
    bytes: () => bytes,
    nothing: () => null,
    later: async () => row
  }
  Object.defineProperty(client, 'fixed', { value: () => 'fixed' })
  const { tx, end } = lend(client as typeof client & { readonly fixed: () => string }, 'settle')
  t.equal(tx.fixed(), 'fixed')
  for (const value of ['row', 'rows', 'bare', 'bytes', 'nothing'] as const) t.equal(tx[value](), client[value](), value)
  t.equal(await tx.later(), row)
  tx.release()
  t.equal(tx.released, 0)
  const statement = tx.prepare('SELECT 1')
  const { run } = statement.bind()
  const adapted = tx.adapted()
  const commit = tx.transaction()
  t.same([statement.run(), run(), adapted.run(), commit(), commit.database(), commit.called], ['SELECT 1', 'SELECT 1', 'adapted', 'committed', 'the client', 'transaction'])
  t.same(statement.iterate().next(), { done: false, value: 1 })

  end()
  for (const act of [() => tx.prepare(''), () => tx.release(), () => statement.run(), run, () => statement.bind(), () => adapted.run(), () => commit(), () => commit.database()]) t.throws(act, OVER)
  t.equal(client.released, 0)
})

t.test('the loan ends with the transaction, however that has ended', async t => {
  const client = { fail () { throw new Error('disk full') }, write: () => 'written', release () {} }
  const { tx } = lend(client, 'settle')
  t.throws(() => tx.fail(), /disk full/)
  t.equal(tx.write(), 'written')
  let holds = true
  const asked = lend(client, 'settle', () => holds)
  t.throws(() => asked.tx.fail(), /disk full/)
  t.equal(asked.tx.write(), 'written')
  holds = false
  asked.tx.release() // as in a `finally`, where it must not hide an error
  for (const act of [() => asked.tx.write(), () => asked.tx.fail()]) t.throws(act, OVER)
  holds = true
  t.throws(() => asked.tx.write(), OVER, 'in a transaction that the work has begun too')
})

t.test('iterators that are left are ended', async t => {
  let ended = 0
  class Rows {
    next (): IteratorResult<number> { return { done: false, value: 1 } }
    return (): void { ended++ }
  }
  const { tx, end } = lend({ iterate: () => new Rows() }, 'settle')
  tx.iterate().next()
  tx.iterate()
  end()
  t.equal(ended, 2)
})

t.test('once the loan is over, a query of pg fails as pg has it fail: by its promise or its callback; the rest throws', async t => {
  const { tx, end } = lend({ query: async (_query: string | object, ..._rest: unknown[]) => 'rows', escapeLiteral: (text: string) => `'${text}'`, release () {} }, 'settle', () => true, true)
  t.equal(await tx.query('SELECT 1'), 'rows')
  t.equal(tx.release(), undefined)
  end()
  await t.rejects(tx.query('SELECT 1'), OVER)
  for (const act of [() => tx.release(), () => tx.escapeLiteral('a'), () => tx.query({ submit () {} })]) t.throws(act, OVER)
  type Told = (error: Error) => void
  const asked: Array<(told: Told) => unknown> = [
    told => tx.query('SELECT 1', told),
    told => tx.query('SELECT $1', [1], told),
    told => tx.query('SELECT 1', told, undefined), // by a function that passes on (text, values, callback)
    callback => tx.query({ text: 'SELECT 1', callback })
  ]
  for (const ask of asked) t.match(await new Promise<Error>(resolve => { t.equal(ask(resolve), undefined) }), OVER)
})
