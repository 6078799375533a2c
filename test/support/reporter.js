import { Transform } from 'node:stream'

/** Passes the TAP through and closes with the one line that people and CI read. */
export default class ClosingLine extends Transform {
  #rest = ''
  #counts = { pass: 0, fail: 0, skip: 0 }

  _transform (chunk, _encoding, done) {
    const lines = (this.#rest + chunk).split('\n')
    this.#rest = lines.pop()
    for (const line of lines) this.#read(line)
    this.push(chunk)
    done()
  }

  _flush (done) {
    this.#read(this.#rest)
    const { pass, fail, skip } = this.#counts
    this.push(`\n${pass} passed, ${fail} failed${skip > 0 ? `, ${skip} skipped` : ''}\n`)
    done()
  }

  /** `# { total: 12, pass: 12 }`: the last such line counts the whole run. */
  #read (line) {
    if (!line.startsWith('# { total:')) return
    const count = name => Number(new RegExp(`\\b${name}: (\\d+)`).exec(line)?.[1] ?? 0)
    this.#counts = { pass: count('pass'), fail: count('fail'), skip: count('skip') + count('todo') }
  }
}
