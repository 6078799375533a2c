/**
 * Copies pieces of bytes together, in at most twice their memory. Kept as they come, they would cost 400 bytes for each byte of a
 * sender that dribbles, and under HTTP/2 each would keep the whole read buffer that it came in.
 */
export class Gathered {
  length = 0
  #bytes: Buffer | undefined
  #isCopy = false

  /** @param expected bytes in all, at most */
  constructor (readonly expected: number) {}

  /** @param piece must not be changed afterwards: where little else is in its memory, it is kept and not copied */
  add (piece: Buffer): void {
    const length = this.length + piece.length
    if (this.#bytes === undefined && isAlone(piece)) {
      this.#bytes = piece
    } else {
      if (!this.#isCopy || length > this.#bytes!.length) this.#grow(length)
      this.#bytes!.set(piece, this.length)
    }
    this.length = length
  }

  take (): Buffer {
    if (this.#bytes === undefined) return Buffer.alloc(0)
    return this.#bytes.length === this.length ? this.#bytes : this.#bytes.subarray(0, this.length)
  }

  #grow (needed: number): void {
    // Not allocUnsafe: a small buffer would share a slab with others and keep all of it.
    const bytes = Buffer.allocUnsafeSlow(Math.max(needed, Math.min(this.expected, 2 * this.length)))
    if (this.#bytes !== undefined) bytes.set(this.#bytes.subarray(0, this.length))
    this.#bytes = bytes
    this.#isCopy = true
  }
}

/** Whether little else is in the memory that the piece keeps. */
const isAlone = (piece: Buffer): boolean => piece.buffer.byteLength <= 2 * piece.length
