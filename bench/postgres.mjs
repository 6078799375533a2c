/** The PostgreSQL server of the tests, with fsync and autovacuum on. */
export class Postgres {
  #teardowns = []

  /** @returns {Promise<Postgres | undefined>} `undefined` when PostgreSQL is not installed */
  static async start () {
    const { PostgresServer, postgresMissing } = await import('../test/support/postgres.ts')
    if (postgresMissing !== false) return undefined
    const postgres = new Postgres()
    const { url } = await PostgresServer.start({ teardown: work => { postgres.#teardowns.unshift(work) } }, '-c', 'fsync=on', '-c', 'shared_buffers=128MB', '-c', 'autovacuum=on')
    postgres.url = url
    process.once('exit', postgres.#stopAtOnce)
    return postgres
  }

  async stop () {
    process.off('exit', this.#stopAtOnce)
    for (const work of this.#teardowns) await work()
  }

  #stopAtOnce = () => { for (const work of this.#teardowns) work() }
}
