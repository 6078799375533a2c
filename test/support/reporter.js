import { Transform } from 'node:stream'

/** Shows each file by a line, what failed in full, and closes with the one line that people and CI read. */
export default class ClosingLine extends Transform {
  #rest = ''
  #counts = { pass: 0, fail: 0, skip: 0 }
  /** What a file has printed; shown when it fails. */
  #details = []
  /** Why a file failed comes after its line. */
  #isFailure = false

  _transform (chunk, _encoding, done) {
    const lines = (this.#rest + chunk).split('\n')
    this.#rest = lines.pop()
    for (const line of lines) this.#read(line)
    done()
  }

  _flush (done) {
    this.#read(this.#rest)
    const { pass, fail, skip } = this.#counts
    this.push(`\n${pass} passed, ${fail} failed${skip > 0 ? `, ${skip} skipped` : ''}\n`)
    done()
  }

  #read (line) {
    // `# { total: 12, pass: 12 }`: the last such line counts the whole run.
    if (line.startsWith('# { total:')) return this.#count(line)
    const isResult = /^(?:ok|not ok|Bail out!)\b/.test(line)
    if (isResult || line.startsWith('# Subtest:')) this.#isFailure = false
    if (!isResult && !this.#isFailure) return this.#keep(line)
    if (line.startsWith('ok')) this.#details = this.#details.filter(detail => detail.includes('# SKIP'))
    else this.#isFailure = true
    this.push([...this.#details.splice(0), line, ''].join('\n'))
  }

  /** Of what passed, only what was skipped is kept: a file may have a thousand tests. */
  #keep (line) {
    const [, indent, name] = /^( +)ok \d+(?: - (.*?))?(?: # time=.*)?$/.exec(line) ?? []
    if (indent === undefined || line.includes('# SKIP')) return line.trim() !== '' && this.#details.push(line)
    const start = this.#details.lastIndexOf(`${indent}# Subtest: ${name}`)
    // An assertion may have the name of a subtest that failed before.
    if (start !== -1 && !this.#details.slice(start).some(detail => /^ +not ok/.test(detail))) this.#details.push(...this.#details.splice(start).filter(detail => detail.includes('# SKIP')))
  }

  #count (line) {
    const count = name => Number(new RegExp(`\\b${name}: (\\d+)`).exec(line)?.[1] ?? 0)
    this.#counts = { pass: count('pass'), fail: count('fail'), skip: count('skip') + count('todo') }
  }
}
