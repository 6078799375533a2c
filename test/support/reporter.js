import { Transform } from 'node:stream'

/** Prints one line for each file, the full output of failures, and a closing line for people and CI. */
export default class ClosingLine extends Transform {
  #rest = ''
  #counts = { pass: 0, fail: 0, skip: 0 }
  /** The output of the current file, printed if the file fails. */
  #details = []
  /** The reason of a file's failure follows the line of the file. */
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
    // `# { total: 12, pass: 12 }`. The last such line counts the whole run.
    if (line.startsWith('# { total:')) return this.#count(line)
    const isResult = /^(?:ok|not ok|Bail out!)\b/.test(line)
    if (isResult || line.startsWith('# Subtest:')) this.#isFailure = false
    if (!isResult && !this.#isFailure) return this.#keep(line)
    if (line.startsWith('ok')) this.#details = this.#details.filter(detail => detail.includes('# SKIP'))
    else this.#isFailure = true
    this.push([...this.#details.splice(0), line, ''].join('\n'))
  }

  /** Of the passed tests only the skipped ones are kept, because a file may have a thousand tests. */
  #keep (line) {
    const [, indent, name] = /^( +)ok \d+(?: - (.*?))?(?: # time=.*)?$/.exec(line) ?? []
    if (indent === undefined || line.includes('# SKIP')) return line.trim() !== '' && this.#details.push(line)
    const start = this.#details.lastIndexOf(`${indent}# Subtest: ${name}`)
    // An assertion may have the same name as a subtest that failed before it.
    if (start !== -1 && !this.#details.slice(start).some(detail => /^ +not ok/.test(detail))) this.#details.push(...this.#details.splice(start).filter(detail => detail.includes('# SKIP')))
  }

  #count (line) {
    const count = name => Number(new RegExp(`\\b${name}: (\\d+)`).exec(line)?.[1] ?? 0)
    this.#counts = { pass: count('pass'), fail: count('fail'), skip: count('skip') + count('todo') }
  }
}
