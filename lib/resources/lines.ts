const NEWLINE = 0x0a

/** Splits bytes into lines as they arrive, and holds only the line that has begun. */
export class Lines {
  /** The number of lines that have ended. */
  count = 0
  #begun: Uint8Array[] = []
  #length = 0

  /** @param limit the most bytes of a line */
  constructor (readonly limit: number) {}

  /** @returns the lines that end in this chunk; `undefined` for a line longer than the limit, after which the caller has to stop */
  * push (chunk: Uint8Array): Generator<Buffer | undefined> {
    let from = 0
    for (let end = chunk.indexOf(NEWLINE); end !== -1; end = chunk.indexOf(NEWLINE, from)) {
      yield this.#add(chunk.subarray(from, end)) ? this.end() : this.#tooLong()
      from = end + 1
    }
    if (!this.#add(chunk.subarray(from))) yield this.#tooLong()
  }

  /** Ends the current line and returns it, also when no newline ends it. */
  end (): Buffer {
    this.count++
    // A line within one chunk is not copied.
    const [only] = this.#begun
    const line = this.#begun.length === 1 ? Buffer.from(only!.buffer, only!.byteOffset, only!.length) : Buffer.concat(this.#begun)
    this.#begun = []
    this.#length = 0
    return line
  }

  #add (part: Uint8Array): boolean {
    if (part.length > 0) this.#begun.push(part)
    this.#length += part.length
    return this.#length <= this.limit
  }

  #tooLong (): undefined {
    this.count++
  }
}
