// Processes that answer questions: `ask` here, `answerParent` there.
import { fork } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'

/** ms */
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

  /** @returns {Promise<Child>} once it has said what it starts with; see `hello` */
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

  /** One question at a time. */
  async ask (name, question) {
    this.#process.send({ name, question })
    return await this.#answer()
  }

  async stop () {
    this.#pending = undefined
    if (this.#process.connected) this.#process.disconnect() // ends by itself: a profile is written at the exit
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

/** In the child: answers what the parent asks, and says hello. */
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
