// Child processes that answer questions: the parent calls `ask`, and the child calls `answerParent`.
import { fork } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'

/** ms to wait for an answer. */
const PATIENCE = 120_000

/** Node's defaults, whatever a shell or a test runner has set. */
const environment = () => ({
  ...Object.fromEntries(Object.entries(process.env).filter(([name]) => !/^(?:NODE_|TAP|_TAPJS)/.test(name))),
  NODE_ENV: 'production'
})

export class Child {
  #name
  #process
  #exited
  #pending

  /** @returns {Promise<Child>} once the child has sent its first message, which is in `hello` */
  static async start (file, args = [], execArgv = []) {
    const child = new Child()
    child.#name = [file, ...args.map(arg => JSON.stringify(arg))].join(' ')
    child.#process = fork(fileURLToPath(new URL(file, import.meta.url)), args.map(arg => JSON.stringify(arg)), {
      execArgv,
      env: environment(),
      stdio: ['ignore', 'inherit', 'inherit', 'ipc']
    })
    child.#exited = once(child.#process, 'exit')
    child.#process.on('message', ({ error, result }) => {
      const { resolve, reject } = child.#pending
      if (error === undefined) resolve(result)
      else reject(new Error(`${child.#name}: ${error}`))
    })
    child.#process.on('exit', code => child.#pending?.reject(new Error(`${child.#name} ended with ${code}`)))
    child.hello = await child.#answer()
    return child
  }

  /** Asks one question. The next one has to wait for its answer. */
  async ask (name, question) {
    this.#process.send({ name, question })
    return await this.#answer()
  }

  async stop () {
    this.#pending = undefined
    if (this.#process.connected) this.#process.disconnect() // the process ends by itself, so that it writes its profile
    await this.#exited
  }

  async #answer () {
    let timer
    try {
      return await new Promise((resolve, reject) => {
        this.#pending = { resolve, reject }
        timer = setTimeout(() => reject(new Error(`${this.#name} has not answered for ${PATIENCE / 1000} s`)), PATIENCE)
      })
    } finally {
      clearTimeout(timer)
    }
  }
}

/** Called in the child: sends `hello`, then answers the parent's questions. */
export function answerParent (answers, hello) {
  process.on('message', async ({ name, question }) => {
    try {
      process.send({ result: await answers[name](question) })
    } catch (error) {
      process.send({ error: error.stack })
    }
  })
  process.on('disconnect', () => process.exit())
  process.send({ result: hello })
}
