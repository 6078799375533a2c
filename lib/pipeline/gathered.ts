/**
 * Copies pieces of bytes into one buffer of at most twice their size. If the pieces were kept as they arrive, a sender that sends single bytes
 * would cost 400 bytes for each, and under HTTP/2 each piece would keep the whole read buffer in memory that it is a part of.
 */
export class Gathered {
  length = 0
  #bytes: Buffer | undefined
  #isCopy = false

  /** @param expected maximum number of bytes in total */
  constructor (readonly expected: number) {}

  /** @param piece must not be changed afterwards, because it is kept without copying if it fills at least half of its ArrayBuffer */
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
    // Not allocUnsafe: a small buffer would share a slab with others and keep the whole slab in memory.
    const bytes = Buffer.allocUnsafeSlow(Math.max(needed, Math.min(this.expected, 2 * this.length)))
    if (this.#bytes !== undefined) bytes.set(this.#bytes.subarray(0, this.length))
    this.#bytes = bytes
    this.#isCopy = true
  }
}

/** Whether the piece fills at least half of the ArrayBuffer that it keeps in memory. */
const isAlone = (piece: Buffer): boolean => piece.buffer.byteLength <= 2 * piece.length
